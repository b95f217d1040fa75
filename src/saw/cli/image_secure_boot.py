"""``saw image secure-boot``: the owner's keys, and the firmware's variable store that lets nothing else boot."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from saw.cli.operator_options import fields, show


def main(options: argparse.Namespace) -> int:
    """Run one command; nothing here needs a broker."""
    from saw.image import uefi_keys

    answer: dict[str, Any]
    if options.verb == "keys":
        made = uefi_keys.make_keys(Path(options.dir), options.owner)
        answer = {"dir": options.dir, **made}
    elif options.verb == "enrol":
        store = uefi_keys.enrol(Path(options.pk), _paths(options.kek), _paths(options.db), Path(options.out))
        answer = {"out": options.out, **msgspec.to_builtins(store)}
    else:
        answer = dict(msgspec.to_builtins(uefi_keys.read_store(Path(options.store))))
    shown = {name: ", ".join(value) if isinstance(value, list | tuple) else value for name, value in answer.items()}
    show(answer, fields(shown), as_json=options.json)
    return 0


def _paths(names: Sequence[str]) -> list[Path]:
    return [Path(name) for name in names]


def add_commands(commands: Any) -> None:
    """Add the command to those of ``saw image``."""
    top = commands.add_parser("secure-boot", help="keys of secure boot, and the variable store that holds them")
    verbs = top.add_subparsers(dest="verb", required=True)
    keys = verbs.add_parser("keys", help="make PK, KEK and db, each a private key and a certificate")
    keys.add_argument("--dir", required=True, help="directory for them; nothing in it is overwritten")
    keys.add_argument("--owner", required=True, help="whose they are; a part of the certificates' names")
    enrol = verbs.add_parser("enrol", help="make a variable store that trusts these certificates and nothing else")
    enrol.add_argument("--pk", required=True, metavar="FILE", help="certificate of the machine's owner")
    enrol.add_argument("--kek", required=True, action="append", metavar="FILE", help="who may change db; repeatable")
    enrol.add_argument("--db", required=True, action="append", metavar="FILE", help="what may boot; repeatable")
    enrol.add_argument("--out", required=True, metavar="FILE", help="store to write; never overwritten")
    view = verbs.add_parser("show", help="show what a variable store trusts")
    view.add_argument("store", help="variable store")
    for verb in verbs.choices.values():
        verb.add_argument("--json", action="store_true", help="print JSON")
