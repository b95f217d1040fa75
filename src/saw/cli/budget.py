"""``saw budget``: what inference costs, what is left of each budget, and an export for cost tools."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec

from saw.broker.client import OperatorClient
from saw.budget.focus import VERSION, Line, focus_csv
from saw.budget.ledger import money
from saw.cli.operator_options import add_days, add_options, days_query, show, table
from saw.errors import ConfigError
from saw.files import write_atomic

_BUDGETS = ("budget", "subject", "period", "from", "limit", "reserved", "spent", "left")
_CHARGES = ("day", "workspace", "engagement", "model", "calls", "in", "out", "reserved", "spent", "unmetered")


def main(argv: list[str]) -> int:
    """Run ``saw budget show`` or ``export``."""
    options = _parser().parse_args(argv)
    answer = OperatorClient.from_context(options.context).request("GET", f"/v1/budgets?{days_query(options)}")
    if options.command == "export":
        return _export(options, answer)
    text = table([_budget(row) for row in answer["budgets"]], _BUDGETS)
    text += "\n\n" + table([_charge(row) for row in answer["charges"]], _CHARGES)
    show(answer, text, as_json=options.json)
    return 0


def _export(options: argparse.Namespace, answer: dict[str, Any]) -> int:
    lines = [msgspec.convert({name: row[name] for name in Line.__struct_fields__}, Line) for row in answer["charges"]]
    lines = [line for line in lines if line.calls]
    path = Path(options.focus)
    try:
        write_atomic(path, focus_csv(lines), mode=0o640)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}", cure="name a file in a folder that is there"
        ) from error
    value = {"file": str(path), "rows": len(lines), "focus": VERSION, "first": answer["first"], "last": answer["last"]}
    text = f"{path}: {len(lines)} rows of {answer['first']} to {answer['last']}, FOCUS {VERSION}"
    show(value, text, as_json=options.json)
    return 0


def _budget(row: dict[str, Any]) -> dict[str, Any]:
    amounts = {name: money(row[name], row["currency"]) for name in ("limit", "reserved", "spent", "left")}
    return {**row, **amounts, "from": row["start"]}


def _charge(row: dict[str, Any]) -> dict[str, Any]:
    amounts = {name: money(row[name], row["currency"]) for name in ("reserved", "spent")}
    return {**row, **amounts, "in": row["input_tokens"], "out": row["output_tokens"]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw budget", description="What inference costs, and what is left.")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("show", help="what is reserved, spent and left, and by whom")
    exported = commands.add_parser("export", help="write what was spent to a file for cost tools")
    exported.add_argument("--focus", required=True, metavar="FILE", help=f"CSV file in FOCUS {VERSION}")
    for command in (shown, exported):
        add_days(command)
        add_options(command)
    return parser
