"""How long whole runs of ``make workspace`` took: a small history in ``build/workspace-runs.json``, newest last.

    python benchmarks/workspace_runs.py --build DIR --before nothing|everything|partial --seconds N [--packages N]

``scripts/workspace.sh`` appends to it. A run is *cold* when neither virtual environment nor image nor lab was there before it,
*warm* when an earlier run had ended well and the image was reused. Others (after an interruption, with another image) are
kept and are neither.
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from saw.files import write_atomic

FILE = "workspace-runs.json"
KEPT = 50
IMAGE = "golden image (Packer, Ansible)"
# Reusing an image or a release record takes about a second; making one never takes this little.
MADE_S = 5.0

Before = Literal["nothing", "everything", "partial"]
Kind = Literal["cold", "warm", "other"]


class Step(msgspec.Struct):
    """A step of the report."""

    name: str
    ok: bool
    seconds: float


class Report(msgspec.Struct):
    """``build/report.json`` as far as it is read here."""

    ok: bool
    steps: list[Step]


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run. ``seconds`` is the whole command, what it installed included; ``packages`` how many it installed."""

    ended: str
    kind: Kind
    ok: bool
    seconds: float
    packages: int


def kind_of(before: Before, report: Report) -> Kind:
    """Return what the time of a run says, by what was there before it."""
    image = next((step.seconds for step in report.steps if step.name == IMAGE), None)
    if before == "nothing":
        return "cold"
    return "warm" if before == "everything" and image is not None and image < MADE_S else "other"


def history(build: Path) -> list[Run]:
    """Return the runs that were kept; a file that cannot be read counts as none."""
    try:
        return msgspec.json.decode((build / FILE).read_bytes(), type=list[Run])
    except (OSError, msgspec.MsgspecError):
        return []


def append(build: Path, before: Before, seconds: float, packages: int, now: datetime) -> Run:
    """Note the run that ``build/report.json`` tells of; raises ``OSError`` or ``msgspec.MsgspecError`` without one."""
    report = msgspec.json.decode((build / "report.json").read_bytes(), type=Report)
    run = Run(now.isoformat(timespec="seconds"), kind_of(before, report), report.ok, seconds, packages)
    write_atomic(build / FILE, msgspec.json.format(msgspec.json.encode([*history(build), run][-KEPT:])) + b"\n")
    return run


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--before", choices=["nothing", "everything", "partial"], required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--packages", type=int, default=0)
    options = parser.parse_args()
    run = append(options.build, options.before, options.seconds, options.packages, datetime.now(UTC))
    print(f"{run.kind} run of {run.seconds:.0f} s noted in {options.build / FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
