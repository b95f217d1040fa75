"""``saw data-disk``: open the encrypted data disk (in the VM), and the operator's recovery key."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from saw import jsontext
from saw.datadisk import recovery, volume
from saw.datadisk.config import CONFIG, DataDiskConfig, read_config
from saw.errors import ConfigError
from saw.files import load_json


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    top = argparse.ArgumentParser(prog="saw data-disk", description="The encrypted data disk of a workspace.")
    verbs = top.add_subparsers(dest="verb", required=True)
    opened = verbs.add_parser(
        "open", help="open it with the TPM, and make it first on a blank disk (what its unit does)"
    )
    opened.add_argument("--config", type=Path, default=CONFIG)
    verbs.add_parser("close", help="close it (what its unit does at its end)")
    checked = verbs.add_parser("check-config", help="read a configuration and tell whether it is valid")
    checked.add_argument("file", type=Path)
    keys = verbs.add_parser("keys", help="the operator's keys").add_subparsers(dest="keys", required=True)
    create = keys.add_parser("create", help="make NAME.key (private, 0600) and NAME.pub")
    create.add_argument("--dir", type=Path, required=True)
    create.add_argument("--name", required=True)
    key = verbs.add_parser(
        "recovery-key", help="print the recovery key of one disk, a secret; into a pipe without an end of line"
    )
    key.add_argument("--escrow", required=True, help="what saw vm escrow printed, a file, or - for standard input")
    key.add_argument("--key", type=Path, required=True, help="the operator's private key")
    for sub in (*verbs.choices.values(), create):
        if sub is not key:
            sub.add_argument("--json", action="store_true", help="machine-readable output")
    return top


def main(argv: list[str]) -> int:
    """Run ``saw data-disk``."""
    options = parser().parse_args(argv)
    if options.verb == "recovery-key":
        # Programs count every byte of what they read as part of the key, a line's end too (cryptsetup --key-file=-).
        print(_recovery_key(options.escrow, options.key), end="\n" if sys.stdout.isatty() else "")
        return 0
    answer: dict[str, Any] = {"changed": False}
    if options.verb == "open":
        config, once = read_config(options.config, os.environ)
        answer = msgspec.to_builtins(volume.open_disk(config, once))
        if answer["opened_by"] == "recovery":
            print("<4>the data disk was opened with the recovery key; the TPM has a new key", file=sys.stderr)
    elif options.verb == "close":
        volume.close()
    elif options.verb == "check-config":
        load_json(options.file, DataDiskConfig)
    else:
        private, public = recovery.make_keys(options.dir, options.name)
        answer = {"changed": True, "private": str(private), "public": str(public)}
    print(json.dumps({"ok": True, **answer}) if options.json else "\n".join(f"{k}: {v}" for k, v in answer.items()))
    return 0


def _recovery_key(source: str, key: Path) -> str:
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        private = key.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}", cure="name a readable file") from error
    try:
        escrow = jsontext.decode(raw, kind=recovery.Escrow)
    except msgspec.DecodeError as error:
        raise ConfigError(f"the escrow is not valid: {error}", cure="take what saw vm escrow printed") from error
    return recovery.unseal(escrow, private)
