"""Tells the broker what the agent used of this workspace, out of the control groups of its slice (Linux, cgroup-v2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from saw.audit.workspace_usage import MOST_UNITS, Usage, Used
from saw.errors import SawError
from saw.runtime.limits import SLICE

GROUPS = Path("/sys/fs/cgroup")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_UNITS = ("saw-shell.service", "saw-agent@*.service")


def read_usage(groups: Path = GROUPS, boot_id: Path = BOOT_ID) -> Usage | None:
    """Return what was used since boot, or ``None`` where nothing of the agent has run, or nothing is counted."""
    top = groups / SLICE
    if not (top / "cpu.stat").exists():
        return None
    units = sorted(path for pattern in _UNITS for path in top.glob(pattern))[:MOST_UNITS]
    try:
        boot = boot_id.read_text(encoding="ascii").strip().replace("-", "")
    except OSError as error:
        raise SawError(f"the boot has no name: {error}", cure="mount /proc") from error
    return Usage(boot=boot, total=_used(top), units={path.name: _used(path) for path in units})


def _used(group: Path) -> Used:
    events, pids = _table(group / "memory.events"), _table(group / "pids.events")
    transferred = [_pairs(line) for line in _lines(group / "io.stat")]
    refused = [pids, *(_table(path) for path in group.glob("*/pids.events"))]
    return Used(
        cpu_ms=_table(group / "cpu.stat").get("usage_usec", 0) // 1000,
        memory_peak=_number(group / "memory.peak"),
        tasks=_number(group / "pids.current"),
        read_bytes=sum(pairs.get("rbytes", 0) for pairs in transferred),
        written_bytes=sum(pairs.get("wbytes", 0) for pairs in transferred),
        oom_kills=events.get("oom_kill", 0),
        # Counted in the group of the process that could not start another one, and not above it.
        refused_tasks=sum(table.get("max", 0) for table in refused),
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:  # a unit that has just ended, or a controller that is not there
        return []


def _number(path: Path) -> int:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else 0


def _table(path: Path) -> dict[str, int]:
    words = [line.split() for line in _lines(path)]
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdigit()}


def _pairs(line: str) -> dict[str, int]:
    parts = [word.partition("=") for word in line.split()[1:]]
    return {name: int(value) for name, _, value in parts if value.isdigit()}


class UsageReports:
    """Tells what was used, at most every ``every`` seconds, when it is more than was told. ``boottime`` is a clock in seconds."""

    def __init__(
        self,
        tell: Callable[[Usage], None],
        boottime: Callable[[], float],
        every: float,
        *,
        read: Callable[[], Usage | None] = read_usage,
    ) -> None:
        self._tell = tell
        self._boottime = boottime
        self._every = every
        self._read = read
        self._at = boottime()
        self._told: Usage | None = None

    def report(self) -> None:
        """Tell what was used; raises :class:`SawError` when it cannot be read or ``tell`` did not deliver."""
        now = self._boottime()
        if now - self._at < self._every:
            return
        self._at = now
        usage = self._read()
        if usage is not None and usage != self._told:
            self._tell(usage)
            self._told = usage
