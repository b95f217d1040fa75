"""What the agent may use of this workspace: the policy's limits, less what the workspace keeps for its own services.

Everything of the agent (shell, always-on agents, MCP servers) runs in one slice, :data:`SLICE`, which carries the limits for all
of it together; a unit carries the same ones for itself. Temporary directories are file systems of a bounded size and number of
files, since the system's own lie beside what the services need. Sources: systemd.resource-control(5), tmpfs(5).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from decimal import Decimal

from saw.policy.sandbox_limits import SandboxLimits, cores, size

SLICE = "sandbox.slice"
"""A slice of its own beside ``system.slice``: shares of processors and disks are between neighbours."""

RESERVE = 512 * 1024**2
"""Memory (bytes) that the workspace's own services keep, at least, where it is at most half of the machine's."""
RESERVED_PART = 16
"""The part of a large machine's memory that they keep."""

OOM_SCORE = 500
"""Added to the agent's processes, so that the kernel ends one of them first when the whole machine is out of memory."""


@dataclass(frozen=True)
class Machine:
    """The memory of this workspace in bytes."""

    memory: int

    @property
    def given(self) -> int:
        """Return the memory (bytes) that an agent may have at most: all but the reserve."""
        return self.memory - max(self.memory // RESERVED_PART, min(RESERVE, self.memory // 2))


def here() -> Machine:
    """Return the machine that this process runs on."""
    return Machine(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


@dataclass(frozen=True)
class Limits:
    """Limits in bytes, tasks, files and hundredths of a processor (``cpu_percent``, None: no quota), and POSIX limits by name."""

    memory_max: int
    swap_max: int
    tasks_max: int
    cpu_percent: int | None
    cpu_weight: int
    io_weight: int
    tmp_max: int
    shm_max: int
    inodes_max: int
    rlimits: tuple[tuple[str, int], ...]

    def tmpfs(self, size_max: int) -> str:
        """Return the mount options of a temporary directory of ``size_max`` bytes."""
        return f"rw,nosuid,nodev,mode=1777,size={size_max},nr_inodes={self.inodes_max}"


def limits_of(words: SandboxLimits, machine: Machine) -> Limits:
    """Return what ``words`` give on ``machine``: never the reserve."""
    processors = cores(words.cpu)
    return Limits(
        memory_max=min(size(words.memory), machine.given),
        swap_max=size(words.swap),
        tasks_max=words.tasks,
        cpu_percent=None if processors is None else int(processors * Decimal(100)),
        cpu_weight=words.cpu_weight,
        io_weight=words.io_weight,
        tmp_max=size(words.tmp),
        shm_max=size(words.shm),
        inodes_max=words.inodes,
        rlimits=(("core", 0), ("nofile", words.files), ("memlock", 8 * 1024**2)),
    )


def properties(limits: Limits) -> list[tuple[str, str]]:
    """Return the directives that hold a unit, or the slice of all of them, to ``limits``."""
    quota = [("CPUQuota", f"{limits.cpu_percent}%")] if limits.cpu_percent is not None else []
    return [
        ("MemoryMax", str(limits.memory_max)),
        ("MemorySwapMax", str(limits.swap_max)),
        ("TasksMax", str(limits.tasks_max)),
        *quota,
        ("CPUWeight", str(limits.cpu_weight)),
        ("IOWeight", str(limits.io_weight)),
    ]
