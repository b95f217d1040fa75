"""``saw image compare``: what differs between two builds of a golden image, and whether it may."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import msgspec

from saw.cli.operator_options import show
from saw.errors import SawError

SHOWN = 40
"""Places that are shown for people; ``--json`` names all."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``saw image``."""
    parser = commands.add_parser(
        "compare",
        help="hold two builds of an image against each other; 1 when more differs than may, 2 when one is no image",
    )
    parser.add_argument("a", type=Path, metavar="A", help="directory of an image (build/images/…), or a disk image")
    parser.add_argument("b", type=Path, metavar="B", help="the other one")
    parser.add_argument("--json", action="store_true", help="print JSON, with every place that differs")


def compare(options: argparse.Namespace) -> int:
    """Compare, show what differs, and answer 0, 1 or 2."""
    from saw.image.compare import compare as compare_builds

    try:
        found = compare_builds(options.a, options.b)
    except SawError as error:
        if options.json:
            print(json.dumps({"ok": False, "error": error.as_dict()}))
        print(f"saw image: {error}", file=sys.stderr)
        return 2
    answer = {"ok": not found.refused, **msgspec.to_builtins(found)}
    lines = [f"differs: {one.where}: {', '.join(one.how)}" for one in found.refused[:SHOWN]]
    if len(found.refused) > SHOWN:
        lines.append(f"differs: {len(found.refused) - SHOWN} more places (--json names all)")
    lines += [f"allowed: {one.where}: {', '.join(one.how)} ({one.allowed})" for one in found.differences if one.allowed]
    same = "the disk images are the same, bit by bit" if found.identical else "the disk images are not the same file"
    show(answer, "\n".join([*lines, same]), as_json=options.json)
    return 1 if found.refused else 0
