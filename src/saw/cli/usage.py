"""``saw usage``: what agents used of their workspaces, by day and engagement."""

from __future__ import annotations

import argparse
from typing import Any

from saw.broker.client import OperatorClient
from saw.cli.operator_options import add_days, add_options, days_query, show, table

_COLUMNS = (
    "day", "workspace", "engagement", "cpu_s", "memory_peak_mib", "read_mib", "written_mib", "oom_kills", "refused_tasks",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Run ``saw usage``."""
    options = _parser().parse_args(argv)
    answer = OperatorClient.from_context(options.context).request("GET", f"/v1/usage?{days_query(options)}")
    show(answer, table([_row(row) for row in answer["usage"]], _COLUMNS), as_json=options.json)
    return 0


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as people read it: seconds, and MiB rounded up so that a little is not nothing."""
    sizes = {"memory_peak_mib": "memory_peak", "read_mib": "read_bytes", "written_mib": "written_bytes"}
    return {
        **row,
        "cpu_s": f"{row['cpu_ms'] / 1000:.1f}",
        **{name: -(-row[source] // 1024**2) for name, source in sizes.items()},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw usage", description="What agents used of their workspaces.")
    add_days(parser)
    add_options(parser)
    return parser
