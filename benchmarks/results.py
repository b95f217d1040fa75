"""What a benchmark says: one figure, what it was compared with in the same run, and whether it reaches its goal."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Literal

import msgspec

from saw.files import write_atomic


class Goal(msgspec.Struct, frozen=True):
    """A bound on the value, on ``value / baseline`` or on ``value - baseline``; the bound itself still meets it."""

    of: Literal["value", "ratio", "difference"]
    at: Literal["most", "least"]
    bound: float

    def __str__(self) -> str:
        return f"{self.of} at {self.at} {self.bound:g}"

    def met_by(self, value: float, baseline: float | None) -> bool:
        """Return whether it is met; a comparison without a baseline never is."""
        if self.of == "value":
            figure: float | None = value
        elif not baseline:
            figure = None
        else:
            figure = value / baseline if self.of == "ratio" else value - baseline
        if figure is None:
            return False
        return figure <= self.bound if self.at == "most" else figure >= self.bound


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One row. ``value`` None: not measured, and ``note`` says why. ``met`` None: no goal, or not measured."""

    name: str
    value: float | None
    unit: str
    baseline: float | None
    ratio: float | None
    goal: str
    met: bool | None
    command: str
    note: str = ""


def result(
    name: str,
    value: float | None,
    unit: str,
    *,
    baseline: float | None = None,
    goal: Goal | None = None,
    command: str = "",
    note: str = "",
) -> Result:
    """Return a row; ratio and ``met`` follow from the unrounded figures."""
    met = None if goal is None or value is None else goal.met_by(value, baseline)
    ratio = None if value is None or not baseline else round(value / baseline, 3)
    return Result(
        name=name,
        value=_rounded(value),
        unit=unit,
        baseline=_rounded(baseline),
        ratio=ratio,
        goal=str(goal) if goal else "",
        met=met,
        command=command,
        note=note or ("not measured" if value is None else ""),
    )


def line_of(process: subprocess.Popen[str], seconds: float) -> str:
    """Return the next line of a process that writes one at a time; one that writes nothing for ``seconds`` is killed: empty."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], seconds)[0]:
        process.kill()
        return ""
    return process.stdout.readline()


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest of ``values`` that at least ``share`` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * share // 1)
    return ordered[min(len(ordered), max(1, int(rank))) - 1]


def fastest(operations: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Return the seconds of one operation of each kind, the best of five rounds in turns (neighbours only make one slower)."""
    best = [float("inf")] * len(operations)
    for _ in range(5):
        for index, operation in enumerate(operations):
            count, start = 0, perf_counter()
            while (now := perf_counter()) - start < seconds / 5:
                for _ in range(20):
                    operation()
                count += 20
            best[index] = min(best[index], (now - start) / count)
    return best


def processor_time(pid: int) -> float:
    """Return the processor time of a process in seconds (proc(5), ``utime`` and ``stime``)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def table(results: Iterable[Result]) -> str:
    """Return the rows for a terminal."""
    lines = [f"  {'figure':<38} {'value':>10} {'unit':<6} {'baseline':>10} {'ratio':>8}  goal"]
    lines.append("-" * 108)
    for row in results:
        mark = {True: "+", False: "!", None: " "}[row.met]
        verdict = {True: ": met", False: ": MISSED", None: ""}[row.met]
        lines.append(
            f"{mark} {row.name:<38} {_shown(row.value):>10} {row.unit:<6} {_shown(row.baseline):>10} "
            f"{_shown(row.ratio):>8}  {row.goal}{verdict}"
        )
        if row.note:
            lines.append(f"    {row.note}")
    return "\n".join(lines)


def write(results: Iterable[Result], path: Path) -> None:
    """Write the rows as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, msgspec.json.format(msgspec.json.encode(list(results))) + b"\n")


def _rounded(figure: float | None) -> float | None:
    return None if figure is None else float(f"{figure:.4g}") if abs(figure) < 1000 else float(round(figure))


def _shown(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.4g}"
