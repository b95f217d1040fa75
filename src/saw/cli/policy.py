"""``saw policy``: author, check, test, sign, verify, stage and publish policy bundles."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from saw.cli import (
    policy_definitions,
    policy_explain,
    policy_interop,
    policy_keys,
    policy_learn,
    policy_openshell,
    policy_reach,
    policy_release,
    policy_requests,
    policy_rings,
    policy_watch,
    policy_way_back,
)
from saw.cli.answers import Answer, Run, read_file
from saw.errors import ConfigError
from saw.files import write_atomic
from saw.policy import bundle as bundles
from saw.policy.casefile import load_cases, run_case
from saw.policy.errors import PolicyError
from saw.policy.loader import load_bundle_folder
from saw.policy.matcher import Matcher
from saw.policy.references import STORES, stores_of
from saw.policy.schema import KINDS, schema_of

_EXIT_CODES = """exit codes:
  0  done, or the answer is yes (the policy is good, the call is allowed)
  1  refused or failed; the message names the thing, the reason and the cure
  2  wrong usage
"""

# ---------------------------------------------------------------- authoring


def check(options: argparse.Namespace) -> Answer:
    """Read the bundle folder and compile it."""
    try:
        bundle = load_bundle_folder(options.path)
        Matcher.compile(bundle.policy, bundle.governance)
    except PolicyError as error:
        problems = [msgspec.to_builtins(problem) for problem in error.problems]
        return {"ok": False, "problems": problems}, "\n".join(str(problem) for problem in error.problems), 1
    blueprint, wanted = bundle.governance.blueprint, stores_of(bundle.governance)
    absent = sorted({store for _, store in wanted} - set(options.store)) if options.store else []
    if absent:
        missing = [
            f"credential {name} lies in a store that the perimeter has not: {s}" for name, s in wanted if s in absent
        ]
        return {"ok": False, "problems": [], "missing_stores": absent}, "\n".join(missing), 1
    found = sorted({store for _, store in wanted})
    needs = f"; its credentials lie in: {', '.join(found)}" if found else ""
    return (
        {"ok": True, "blueprint": blueprint.name, "version": blueprint.version, "stores": found},
        f"{options.path}: good ({blueprint.name} {blueprint.version}){needs}",
        0,
    )


def test(options: argparse.Namespace) -> Answer:
    """Run the cases of ``tests.yaml``."""
    bundle = load_bundle_folder(options.path)
    matcher = Matcher.compile(bundle.policy, bundle.governance)
    path = str(options.cases or Path(options.path) / "tests.yaml")
    outcomes = [run_case(case, matcher, bundle.governance) for case in load_cases(read_file(path), path).cases]
    failed = [outcome for outcome in outcomes if outcome.fault]
    lines = [f"FAILED  {outcome.name}: {outcome.fault}" for outcome in failed]
    lines.append(f"{len(outcomes) - len(failed)} of {len(outcomes)} cases as expected")
    report = [{"name": outcome.name, "fault": outcome.fault} for outcome in outcomes]
    return {"ok": not failed, "cases": report}, "\n".join(lines), 1 if failed else 0


def digest(options: argparse.Namespace) -> Answer:
    """Print the policy digest of a signed bundle, or the digests of a folder's members."""
    if Path(options.path).is_dir():
        bundle = load_bundle_folder(options.path)
        members = {name: bundles.policy_digest(raw) for name, raw in sorted(bundle.members.items())}
        return {"ok": True, "members": members}, "\n".join(f"{value}  {name}" for name, value in members.items()), 0
    value, manifest, _ = bundles.describe(read_file(options.path))
    return {"ok": True, "policy_digest": value, "revision": manifest.revision}, value, 0


def init(options: argparse.Namespace) -> Answer:
    """Write a bundle folder that denies everything, to start from."""
    folder = Path(options.path)
    name = options.name or folder.resolve().name
    if not re.match(r"[a-z0-9][a-z0-9-]{0,62}\Z", name):
        raise ConfigError(
            f"{name!r} is not a blueprint name", cure="give one with --name: lower-case letters, digits, -"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "policy.yaml": "version: 1\n\nfilesystem_policy:\n  read_only: [/usr, /etc]\n  read_write: [/home/agent, /tmp]\n\n"
        "network_policies: {}\n",
        "governance.yaml": f"schema: 1\n\nblueprint:\n  name: {name}\n  version: 0.1.0\n  owner: {options.owner}\n",
        "tests.yaml": "schema: 1\ncases:\n  - name: nothing is reachable\n    request: {url: https://example.com/}\n"
        "    expect: {verdict: deny, reason: host_not_allowed}\n",
    }
    for file in files:
        if (folder / file).exists():
            raise ConfigError(f"{folder / file} exists already", cure="choose another folder")
    for file, content in files.items():
        write_atomic(folder / file, content)
    return {"ok": True, "files": sorted(files)}, f"wrote {', '.join(sorted(files))} in {folder}", 0


def schema(options: argparse.Namespace) -> Answer:
    """Print the JSON Schema of a file, for editors."""
    value = schema_of(options.kind)
    text = json.dumps(value, indent=2)
    return value, text, 0


# ---------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saw policy",
        description=__doc__,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Run, text: str, group: Any = None) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = (group or commands).add_parser(
            name,
            help=text,
            description=run.__doc__,
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(run=run)
        return sub

    sub = add("init", init, "start a bundle folder that denies everything")
    sub.add_argument("path")
    sub.add_argument("--name", help="blueprint name (default: the folder's name)")
    sub.add_argument("--owner", default="unassigned", help="the team that answers for it")
    sub = add("check", check, "say everything that is wrong with a bundle folder")
    sub.add_argument("path")
    sub.add_argument(
        "--store",
        action="append",
        choices=STORES,
        default=[],
        help="a store of credentials that the perimeter has; with it, credentials in any other are refused",
    )
    sub = add("test", test, "run the cases of tests.yaml")
    sub.add_argument("path")
    sub.add_argument("--cases", help="another file of cases")
    add("digest", digest, "print the policy digest of a bundle").add_argument("path")
    add("schema", schema, "print the JSON Schema of a file").add_argument("kind", choices=list(KINDS))

    for part in (
        policy_keys,
        policy_release,
        policy_rings,
        policy_way_back,
        policy_requests,
        policy_watch,
        policy_learn,
        policy_interop,
        policy_openshell,
        policy_reach,
        policy_explain,
        policy_definitions,
    ):
        part.register(add)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``saw policy`` and return its exit code; raises :class:`saw.errors.SawError` for refusals."""
    options = _parser().parse_args(argv)
    try:
        value, text, code = options.run(options)
    except ValueError as error:
        raise ConfigError(str(error), cure="correct the argument") from error
    print(json.dumps(value) if options.json else text)
    return int(code)
