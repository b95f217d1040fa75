"""``saw audit witness``: sign a checkpoint by hand, or look by a timer (``run``), and say how it is (``status``)."""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from saw.audit.note import LOG, WITNESS, PublicKey, Signer, open_checkpoint
from saw.audit.tiles import Folder
from saw.audit.witness import cosign
from saw.audit.witness_watch import Watch, clear_alarm, load_settings, status_of
from saw.cli.operator_options import fields, show
from saw.errors import ConfigError
from saw.files import write_atomic

_BY_HAND = ("checkpoint", "tiles", "key", "witness_key", "state", "out")


def witness(options: argparse.Namespace) -> int:
    """Run ``saw audit witness``; ``status`` ends with 1 when the log is not witnessed."""
    now = datetime.now(UTC)
    match options.step:
        case None:
            return _by_hand(options)
        case "check":
            load_settings(options.config)
            print(json.dumps({"ok": True}) if options.json else f"{options.config} is valid")
        case "run":
            health = Watch(load_settings(options.config), now).look()
            value: dict[str, Any] = msgspec.to_builtins(health)
            show(value, fields({name: value[name] for name in ("state", "size", "root")}), as_json=options.json)
        case "status":
            value = status_of(load_settings(options.config), now)
            flat = {name: item for name, item in value.items() if name not in {"ok", "alarm", "error"}}
            flat |= {name: (value[name] or {}).get("message") for name in ("alarm", "error")}
            show(value, fields(flat), as_json=options.json)
            return 0 if value["ok"] else 1
        case "clear":
            value = msgspec.to_builtins(clear_alarm(load_settings(options.config), options.reason))
            show(value, fields(value), as_json=options.json)
    return 0


def _by_hand(options: argparse.Namespace) -> int:
    """Sign a checkpoint that continues the last one that this witness signed."""
    if missing := [name for name in _BY_HAND if getattr(options, name) is None]:
        raise ConfigError(
            f"--{missing[0].replace('_', '-')} is missing", cure="give all of it, or run, status, check or clear"
        )
    raw, signer = _bytes(options.checkpoint), Signer.parse(_bytes(options.witness_key).decode("utf-8", "replace"))
    if signer.public.kind != WITNESS:
        raise ConfigError(f"{options.witness_key} is the key of a log", cure="make one with saw audit key --witness")
    log = PublicKey.read(options.key, LOG)
    note = cosign(raw, log, Folder(Path(options.tiles)), signer, Path(options.state), time=int(time.time()))
    write_atomic(Path(options.out), note)
    new = open_checkpoint(raw, log).checkpoint
    value = {"origin": new.origin, "size": new.size, "root": new.root.hex(), "signed": options.out}
    show(value, fields(value), as_json=options.json)
    return 0


def _bytes(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}", cure="check the path") from error


def add_witness(commands: Any) -> None:
    """Add the command to the parser of ``saw audit``."""
    signing = commands.add_parser(
        "witness", help="sign a checkpoint that continues the last one, by hand or by a timer"
    )
    signing.add_argument("--checkpoint", metavar="FILE", help="checkpoint of the log")
    signing.add_argument("--tiles", metavar="DIR", help="folder of the tree, or a copy")
    signing.add_argument("--key", metavar="FILE", help="public key of the log")
    signing.add_argument("--witness-key", metavar="FILE", help="private key of this witness")
    signing.add_argument("--state", metavar="FILE", help="what this witness remembers")
    signing.add_argument("--out", metavar="FILE", help="where the signed checkpoint goes")
    signing.add_argument("--json", action="store_true", help="print JSON")
    steps = signing.add_subparsers(dest="step", metavar="{run,status,check,clear}")
    for name, words in (
        ("run", "look once, as the timer does: fetch, verify, sign; ends with 1 for all that is not good"),
        ("status", "say how it is; ends with 1 when the log is not witnessed"),
        ("check", "check the configuration and end"),
        ("clear", "let the witness go on after an alarm"),
    ):
        step = steps.add_parser(name, help=words)
        step.add_argument("--config", default="/etc/saw/witness.json", help="configuration file (default: %(default)s)")
        step.add_argument("--json", action="store_true", help="print JSON")
        if name == "clear":
            step.add_argument("--reason", required=True, help="why the witness may go on; it is kept")
