"""``saw broker secrets``: where the broker's own secrets are, and how they get to another place."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import msgspec

from saw.broker.clock import utc_now
from saw.broker.config import load_config


def add_commands(commands: Any) -> None:
    """Add ``saw broker secrets`` to the parser."""
    group = commands.add_parser("secrets", help="the broker's own secrets: where they are, and move them")
    steps = group.add_subparsers(dest="step", required=True)
    from saw.secrets.credential import WITH_KEY

    for name, text in (
        ("status", "open every secret, and tell where copies of them lie; exit code 1 when something is wrong"),
        ("move", "bring all to where the configuration says, in steps that a crash does not harm"),
        ("put", "let a file take the place of a secret, such as the next online key"),
        ("take", "write a secret in the clear to a new file, for a program that takes files alone"),
        ("key", "make the key of sealed secrets, encrypted for systemd on this host (root)"),
    ):
        step = steps.add_parser(name, help=text)
        step.add_argument("--json", action="store_true", help="print JSON")
        if name == "key":
            step.add_argument(
                "--out", default="/etc/credstore.encrypted/saw-secrets", help="where (default: %(default)s)"
            )
            step.add_argument("--name", default="saw-secrets", help="name of the credential (default: %(default)s)")
            step.add_argument(
                "--with-key",
                choices=WITH_KEY,
                default="auto",
                help="what opens it, see systemd-creds(1) (default: %(default)s)",
            )
            step.add_argument(
                "--from", dest="given", metavar="FILE", help="a recovery copy, or the key of another host"
            )
            step.add_argument(
                "--recovery", metavar="FILE", help="also write a copy in the clear, to keep off this host"
            )
            continue
        step.add_argument("--config", default="/etc/saw/broker.json", help="configuration file (default: %(default)s)")
        if name == "move":
            step.add_argument(
                "--to", choices=("files", "sealed", "vault"), help="refuse when the configuration says another"
            )
        if name in {"put", "take"}:
            step.add_argument("name", help="its name, as saw broker secrets status prints it")
            where = {"put": "a file that is yours alone (0600)", "take": "a new file (0600)"}[name]
            step.add_argument(
                "--from" if name == "put" else "--out", dest="file", metavar="FILE", required=True, help=where
            )


def _make_key(options: argparse.Namespace) -> int:
    from saw.secrets.credential import make_credential

    made = make_credential(
        Path(options.out),
        options.name,
        options.with_key,
        random=os.urandom,
        given=None if options.given is None else Path(options.given),
        recovery=None if options.recovery is None else Path(options.recovery),
    )
    said = f"made {options.out}" if made else f"{options.out} is there already"
    print(json.dumps({"ok": True, "changed": made}) if options.json else said)
    return 0


def run(options: argparse.Namespace) -> int:
    """Run one of the commands."""
    from saw.broker import secret_move

    if options.step == "key":
        return _make_key(options)
    config = load_config(options.config)

    if options.step == "status":
        found = secret_move.secrets_status(config)
        wrong = bool(found.problems or any(found.copies.values()) or found.leaving)
        if options.json:
            print(json.dumps({"ok": not wrong, **msgspec.to_builtins(found)}))
        else:
            print("\n".join(_words(found)))
        return int(wrong)
    if options.step == "move":
        moved = secret_move.move_secrets(config, utc_now, options.to)
        changed = bool(moved.copied or moved.removed)
        said = f"all secrets are in {moved.provider}: {moved.copied} copied, {moved.removed} removed elsewhere"
        print(json.dumps({"ok": True, "changed": changed, **msgspec.to_builtins(moved)}) if options.json else said)
        return 0
    act = secret_move.put_secret if options.step == "put" else secret_move.take_secret
    act(config, utc_now, options.name, Path(options.file))
    words = {
        "put": f"{options.name} was replaced",
        "take": f"{options.file} holds {options.name} in the clear; remove it after use",
    }
    print(json.dumps({"ok": True, "changed": options.step == "put"}) if options.json else words[options.step])
    return 0


def _words(found: Any) -> list[str]:
    """Return what ``saw broker secrets status`` prints."""
    lines = [f"{found.provider}: {found.place}"]
    lines += [f"  {name}  opens" for name in found.held]
    lines += [f"  {name}  {what}" for name, what in found.problems.items()]
    lines += [f"  {name}  lies in {kind} too" for kind, names in found.copies.items() for name in names]
    if found.leaving:
        lines.append(f"  a move from {found.leaving} is not at its end: saw broker secrets move")
    return lines
