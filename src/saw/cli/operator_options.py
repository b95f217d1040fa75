"""What the operator's commands share: ``--context``, ``--json`` and tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--context`` and ``--json``."""
    parser.add_argument(
        "--context", help="context file (default: the file named by SAW_CONTEXT, else this machine's broker)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_pages(parser: argparse.ArgumentParser, most: str) -> None:
    """Add ``--after`` and ``--limit`` of a list in pages; ``most`` says what a page holds without a limit."""
    parser.add_argument("--after", metavar="ID", help="the page behind this one")
    parser.add_argument("--limit", type=int, metavar="N", help=f"most of a page (default: {most})")


def more(answer: Mapping[str, Any]) -> str:
    """Return the line below a page that says how the list goes on, empty where it ends."""
    return f"\nmore: --after {answer['next']}" if answer["next"] else ""


def add_days(parser: argparse.ArgumentParser) -> None:
    """Add ``--first``, ``--last`` and ``--workspace``, for :func:`days_query`."""
    parser.add_argument("--first", metavar="DAY", help="first day in UTC, as 2026-11-29 (default: the last one)")
    parser.add_argument("--last", metavar="DAY", help="last day in UTC (default: the first one, or today)")
    parser.add_argument("--workspace", metavar="ID", help="only this workspace")


def days_query(options: argparse.Namespace) -> str:
    """Return the query of a call that takes days and a workspace, as far as they were named."""
    query = {"first": options.first, "last": options.last or options.first, "workspace_id": options.workspace}
    return urlencode({name: value for name, value in query.items() if value})


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return ``rows`` as aligned text under the names of ``columns``; absent values are ``-``."""
    lines = [[name.upper() for name in columns]]
    lines += [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def line(values: Iterable[Any]) -> str:
    """Return ``values`` as one line, for output that grows and therefore has no column widths; absent values are ``-``."""
    return "  ".join(_cell(value) for value in values)


def show(value: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print ``value`` as one JSON line or ``text`` for people."""
    print(json.dumps({"ok": True, **value}) if as_json else text)


def fields(value: Mapping[str, Any]) -> str:
    """Return ``value`` as one ``name: value`` line for each field."""
    width = max((len(name) for name in value), default=0)
    return "\n".join(f"{name + ':':<{width + 1}} {_cell(item)}" for name, item in value.items())


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    # Text from elsewhere must not steer the terminal.
    return "".join(character if character.isprintable() else "?" for character in text)
