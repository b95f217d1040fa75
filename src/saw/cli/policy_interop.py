"""``saw policy export`` and ``import``: what leaves for other places and comes from them.

OpenShell policies, signed bundles of NVIDIA Agent Policy Fabric, and the release repository as one archive.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from saw.cli import policy_rings
from saw.cli.answers import Add, Answer, read_file
from saw.cli.folders import write_new_folder
from saw.errors import ConfigError
from saw.files import write_atomic
from saw.policy import agent_policy_fabric as fabric
from saw.policy.errors import BundleRefused
from saw.policy.loader import load_bundle_folder
from saw.policy.matcher import Matcher
from saw.policy.openshell import Finding
from saw.policy.openshell import export as to_openshell
from saw.policy.openshell_import import import_policy, import_tree
from saw.policy.yamltext import dump

_TESTS = {
    "schema": 1,
    "cases": [
        {
            "name": "cloud metadata",
            "request": {"url": "http://169.254.169.254/latest/meta-data/"},
            "expect": {"verdict": "deny", "reason": "destination_blocked"},
        },
        {
            "name": "a host that nobody named",
            "request": {"url": "https://nobody-named-this.invalid/"},
            "expect": {"verdict": "deny", "reason": "host_not_allowed"},
        },
    ],
}


def _summary(findings: Sequence[Finding]) -> dict[str, Any]:
    effects = [finding.effect for finding in findings]
    return {
        "findings": msgspec.to_builtins(findings),
        "counts": {effect: effects.count(effect) for effect in ("same", "narrower", "wider", "left_out", "lost")},
    }


def export(options: argparse.Namespace) -> Answer:
    """Write a bundle as the policy file that OpenShell loads, or the repository as one archive for a place without a network.

    export FOLDER --openshell FILE        reports what OpenShell cannot express
    export --repository DIR ARCHIVE       everything a client needs, also for a web server or an object store
    """
    if (options.openshell is None) == (options.repository is None):
        raise ConfigError("what to export is not clear", cure="give either --openshell FILE or --repository DIR")
    if options.repository is not None:
        options.out = options.out or options.path
        if not options.out:
            raise ConfigError("the archive has no name", cure="give the file to write")
        return policy_rings.export(options)
    if options.timestamp_key or options.valid_for or options.passphrase_file:
        raise ConfigError("a timestamp belongs to a repository", cure="use --timestamp-key with --repository")
    out = options.openshell or options.out
    if not options.path or not out or (options.openshell and options.out):
        raise ConfigError("the bundle folder or the file to write is missing", cure="give FOLDER --openshell FILE")
    bundle = load_bundle_folder(options.path)
    Matcher.compile(bundle.policy, bundle.governance)
    made = to_openshell(bundle)
    write_atomic(out, made.text)
    lines = [str(finding) for finding in made.findings]
    lines.append(f"{out}: for OpenShell; it cannot express {len(made.findings)} things of {options.path}")
    return {"ok": True, "out": out, **_summary(made.findings)}, "\n".join(lines), 0


def import_(options: argparse.Namespace) -> Answer:
    """Make a bundle folder of another runtime's policy, or bring a copy of the repository up to an exported archive.

    Exit code 1 if something of the policy was not carried over.
    """
    if options.repository is not None:
        if not options.root or options.out or options.owner:
            cure = "give ARCHIVE --repository DIR --root ROOT.json, and nothing that is about a bundle"
            raise ConfigError("an archive is imported into a repository under a pinned root", cure=cure)
        options.archive = options.path
        return policy_rings.import_(options)
    if not options.out or not options.owner:
        raise ConfigError("the folder of the bundle or its owner is missing", cure="give --out FOLDER --owner TEAM")
    raw = read_file(options.path)
    name = options.name or re.sub(r"[^a-z0-9]+", "-", Path(options.path).stem.lower()).strip("-") or "imported"
    source = Path(options.path).name
    before: tuple[Finding, ...] = ()
    answer: dict[str, Any] = {}
    if fabric.is_signed_bundle(raw):
        opened = _fabric(options, raw)
        before = opened.findings
        answer = {"bundle_id": opened.bundle_id, "revision": opened.revision, "signed_by": opened.key_id}
        made = import_tree(opened.policy, source, name=name, owner=options.owner, dialect=options.dialect)
    else:
        made = import_policy(raw, source, name=name, owner=options.owner, dialect=options.dialect)
    findings = [*before, *made.findings]
    summary = _summary(findings)
    whole = not any(summary["counts"][effect] for effect in ("wider", "left_out", "lost"))
    answer |= {"ok": whole, "out": options.out, "dialect": made.dialect, **summary}
    files = {
        **made.files,
        "tests.yaml": dump(_TESTS).encode(),
        "import.json": json.dumps({"source": source, **answer}, indent=2).encode() + b"\n",
    }
    write_new_folder(options.out, files)
    lines = [str(finding) for finding in findings]
    lines.append(f"{options.out}: {'everything is carried over' if whole else 'read the findings before you go on'}")
    return answer, "\n".join(lines), 0 if whole else 1


def _fabric(options: argparse.Namespace, raw: bytes) -> fabric.FabricPolicy:
    if not options.trust_root:
        reason = f"{options.path} belongs to Agent Policy Fabric, and whose signature counts is not said"
        raise BundleRefused("unsigned", reason, cure="give the signed manifest and --trust-root KEYID.pub (or .pem)")
    folder = Path(options.path).parent

    def member(path: str) -> bytes:
        return read_file(str(folder / path))

    keys = {Path(path).stem: fabric.trust_key(read_file(path), path) for path in options.trust_root}
    return fabric.open_bundle(raw, keys, member, datetime.now(UTC), document=options.document)


def register(add: Add) -> None:
    """Add the commands to the group ``saw policy``."""
    sub = add("export", export, "write a policy for another runtime, or the repository as one archive")
    sub.add_argument("path", nargs="?", help="bundle folder; with --repository the archive to write")
    sub.add_argument("--openshell", nargs="?", const="", metavar="FILE", help="NVIDIA OpenShell's policy.yaml to write")
    policy_rings.add_export(sub, required=False)
    sub = add("import", import_, "make a bundle folder of another runtime's policy, or take an archive in")
    sub.add_argument(
        "path", help="OpenShell policy, signed manifest of an Agent Policy Fabric bundle, or archive of a repository"
    )
    sub.add_argument("--out", help="folder of the bundle; must not exist")
    sub.add_argument("--owner", help="the team that answers for it")
    sub.add_argument("--name", help="blueprint name (default: after the file)")
    sub.add_argument(
        "--dialect", choices=["0.0", "0.1", "either"], default="either", help="OpenShell release that wrote it"
    )
    sub.add_argument(
        "--trust-root", action="append", default=[], metavar="KEYID.pub", help="public key of a bundle's signer"
    )
    sub.add_argument("--document", default="default", help="sandbox policy of the bundle (default: %(default)s)")
    sub.add_argument("--repository", help="copy of the repository to bring up to the archive")
    sub.add_argument("--root", help="pinned root.json of that repository")
