"""``saw policy diff`` and ``saw policy prove``: what a bundle newly allows, and what it can never allow."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

import msgspec

from saw.cli.answers import Add, Answer, read_file
from saw.errors import ConfigError, SawError
from saw.files import write_atomic
from saw.policy.bundle import read_content
from saw.policy.loader import Bundle, load_bundle_folder
from saw.policy.reach_diff import diff_bundles
from saw.policy.reach_html import page, plain, table
from saw.policy.reach_invariants import Invariant, Invariants, load_invariants
from saw.policy.reach_prove import Finding, prove

INVARIANTS = "invariants.yaml"
"""Name of the file of invariants that is looked for next to a bundle folder."""


def _load(path: str) -> Bundle:
    """Return the bundle in a folder or a signed bundle file; signatures are not the question here."""
    return load_bundle_folder(path) if Path(path).is_dir() else read_content(read_file(path))


def _bad_input(options: argparse.Namespace, error: SawError) -> NoReturn:
    """Say what is wrong with the input and leave with exit code 2, since 1 is an answer here."""
    if options.json:
        print(json.dumps({"ok": False, "error": error.as_dict()}))
    print(f"saw policy {options.command}: {error}", file=sys.stderr)
    raise SystemExit(2)


def diff(options: argparse.Namespace) -> Answer:
    """Compare what two bundles allow, over all calls. Exit code 0: nothing is wider; 1: wider; 2: bad input."""
    try:
        result = diff_bundles(_load(options.old), _load(options.new))
        if options.html:
            try:
                write_atomic(options.html, page(result))
            except OSError as error:
                reason = f"cannot write {options.html}: {error.strerror}"
                raise ConfigError(reason, cure="name a file in a folder that exists") from error
    except SawError as error:
        _bad_input(options, error)
    value = {"ok": not result.widening, **result.to_builtins()}
    return value, table(result), 1 if result.widening else 0


def _invariants(options: argparse.Namespace) -> tuple[Invariants, Path]:
    """Return the invariants and the folder that their relative paths start from."""
    path = Path(options.invariants) if options.invariants else _nearby(Path(options.path))
    if path is None:
        if not options.parent:
            raise ConfigError(f"no {INVARIANTS} lies next to {options.path}", cure="name one with --invariants")
        return Invariants(schema=1, invariants=()), Path()
    return load_invariants(read_file(str(path)), str(path)), path.parent


def _nearby(bundle: Path) -> Path | None:
    folders = (bundle, bundle.parent) if bundle.is_dir() else (bundle.parent,)
    return next((folder / INVARIANTS for folder in folders if (folder / INVARIANTS).is_file()), None)


def _findings(options: argparse.Namespace) -> list[Finding]:
    invariants, folder = _invariants(options)
    parents = {
        invariant.parent: _load(str(folder / invariant.parent))
        for invariant in invariants.invariants
        if invariant.kind == "subset_of" and invariant.parent
    }
    if options.parent:
        parents[""] = _load(options.parent)
        if not any(i.kind == "subset_of" and not i.parent for i in invariants.invariants):
            child = Invariant(id="subset-of-parent", kind="subset_of", why="It was derived from this parent.")
            invariants = msgspec.structs.replace(invariants, invariants=(*invariants.invariants, child))
    return prove(_load(options.path), invariants, parents)


def _lines(finding: Finding) -> list[str]:
    lines = [f"{finding.verdict:<8}  {finding.id} ({finding.kind}): {plain(finding.detail)}"]
    if not finding.ok:
        lines += [f"          why      {plain(finding.why)}"] if finding.why else []
        lines += [f"          rule     {plain('; '.join(finding.rules))}"] if finding.rules else []
        if finding.counter_example is not None:
            lines.append(f"          example  {plain(finding.counter_example.text())}")
    return lines


def prove_(options: argparse.Namespace) -> Answer:
    """Prove the invariants over everything a bundle allows. Exit code 0: all hold; 1: broken or unproven; 2: bad input."""
    try:
        findings = _findings(options)
    except SawError as error:
        _bad_input(options, error)
    good = all(finding.ok for finding in findings)
    lines = [line for finding in findings for line in _lines(finding)]
    lines.append(f"{sum(finding.ok for finding in findings)} of {len(findings)} invariants hold")
    return {"ok": good, "findings": msgspec.to_builtins(findings)}, "\n".join(lines), 0 if good else 1


def register(add: Add) -> None:
    """Add ``diff`` and ``prove`` to ``saw policy``."""
    sub = add("diff", diff, "say what one bundle allows beyond another: the diff of reach")
    sub.add_argument("old", help="bundle folder or signed bundle file")
    sub.add_argument("new", help="bundle folder or signed bundle file")
    sub.add_argument("--html", metavar="FILE", help="also write the diff as a self-contained page")
    sub = add("prove", prove_, "prove the invariants over everything a bundle allows")
    sub.add_argument("path", help="bundle folder or signed bundle file")
    sub.add_argument("--invariants", metavar="FILE", help=f"invariants (default: {INVARIANTS} in or above the folder)")
    sub.add_argument("--parent", metavar="PATH", help="bundle that this one must be a subset of")
