"""``saw policy openshell``: a bundle for a workspace whose runtime is OpenShell, and who holds what OpenShell cannot say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec

from saw.cli.answers import Add, Answer, read_file
from saw.cli.policy_signing import present
from saw.errors import ConfigError
from saw.files import write_atomic
from saw.policy import bundle as bundles
from saw.policy import tuf_repository as repositories
from saw.policy.loader import Bundle, load_bundle_folder, load_members
from saw.policy.matcher import Matcher
from saw.policy.openshell_runtime import SUPERVISOR, plan


def openshell(options: argparse.Namespace) -> Answer:
    """Make the policy for OpenShell as the runtime of a workspace, with ring 2 as its only way out.

    Lists who holds each part that OpenShell cannot say. Refused when somebody has to decide first: a part that nobody holds there
    is accepted by its name (--accept governance.persistence).
    """
    bundle = _bundle(options)
    Matcher.compile(bundle.policy, bundle.governance)
    made = plan(bundle, supervisor=options.supervisor, accept=options.accept)
    if options.out:
        write_atomic(options.out, made.text)
    if options.message:
        write_atomic(options.message, json.dumps(made.message, indent=2) + "\n")
    counts = made.counts()
    lines = [str(one) for one in made.held]
    lines.append(f"{options.path}: for OpenShell 0.1.x; " + ", ".join(f"{n} {by}" for by, n in counts.items() if n))
    answer = {"ok": True, "held": msgspec.to_builtins(made.held), "counts": counts, "message": made.message}
    return answer, "\n".join(lines), 0


def _bundle(options: argparse.Namespace) -> Bundle:
    """Return the bundle of a folder, or of a signed file once it is verified under a pinned root."""
    if Path(options.path).is_dir():
        if options.root:
            raise ConfigError(
                f"{options.path} is a folder, which nobody signed", cure="give the bundle file with --root"
            )
        return load_bundle_folder(options.path)
    if not options.root:
        raise ConfigError(f"whose signatures count on {options.path} is not said", cure="give --root ROOT.json")
    keys, threshold = repositories.trusted_policy_keys(read_file(options.root))
    good = bundles.verify_bundle(read_file(options.path), keys, threshold, present())
    return load_members(dict(good.members))


def register(add: Add) -> None:
    """Add the command to the group ``saw policy``."""
    sub = add("openshell", openshell, "make the policy of a workspace that OpenShell runs, and say who holds the rest")
    sub.add_argument("path", help="bundle folder, or a signed bundle file")
    sub.add_argument("--root", help="pinned root.json under which a bundle file is verified")
    sub.add_argument("--out", help="policy file to write, for openshell policy set")
    sub.add_argument("--message", help="the same as a message of OpenShell's gateway, in JSON, to write")
    sub.add_argument(
        "--supervisor", default=SUPERVISOR, help="OpenShell's own program in the VM (default: %(default)s)"
    )
    sub.add_argument(
        "--accept", action="append", default=[], metavar="FIELD", help="take a field as it is that nobody holds there"
    )
