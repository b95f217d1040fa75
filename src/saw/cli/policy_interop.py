"""``saw policy export`` and ``import``: OpenShell policies, and signed bundles of NVIDIA Agent Policy Fabric."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

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
    """Write the policy file that OpenShell loads, and report what it cannot express."""
    if not options.openshell:
        raise ConfigError("no format is named", cure="give --openshell")
    bundle = load_bundle_folder(options.path)
    Matcher.compile(bundle.policy, bundle.governance)
    made = to_openshell(bundle)
    write_atomic(options.out, made.text)
    lines = [str(finding) for finding in made.findings]
    lines.append(f"{options.out}: for OpenShell; it cannot express {len(made.findings)} things of {options.path}")
    return {"ok": True, "out": options.out, **_summary(made.findings)}, "\n".join(lines), 0


def import_(options: argparse.Namespace) -> Answer:
    """Make a bundle folder of another runtime's policy; exit code 1 if something of it was not carried over."""
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
    sub = add("export", export, "write the policy in the form of another runtime")
    sub.add_argument("path", help="bundle folder")
    sub.add_argument("--openshell", action="store_true", help="NVIDIA OpenShell's policy.yaml")
    sub.add_argument("--out", required=True, help="file to write")
    sub = add("import", import_, "make a bundle folder of another runtime's policy")
    sub.add_argument("path", help="OpenShell policy, or the signed manifest of an Agent Policy Fabric bundle")
    sub.add_argument("--out", required=True, help="folder of the bundle; must not exist")
    sub.add_argument("--owner", required=True, help="the team that answers for it")
    sub.add_argument("--name", help="blueprint name (default: after the file)")
    sub.add_argument(
        "--dialect", choices=["0.0", "0.1", "either"], default="either", help="OpenShell release that wrote it"
    )
    sub.add_argument(
        "--trust-root", action="append", default=[], metavar="KEYID.pub", help="public key of a bundle's signer"
    )
    sub.add_argument("--document", default="default", help="sandbox policy of the bundle (default: %(default)s)")
