"""What an agent's sandbox may use of the workspace's memory, processors, tasks and temporary space.

The numbers hold for everything of the agent together: shell, one-shot commands, always-on agents and MCP servers. Sizes are
written with a unit (``512MiB``, ``3GiB``: powers of 1024), processors as a number of them (``1.5``). The workspace keeps a
reserve for its own services besides, which no policy takes away (:mod:`saw.runtime.limits`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated

import msgspec

from saw.policy.always_on import Agent
from saw.policy.decode import Report
from saw.policy.model import Part, says

_SIZE = re.compile(r"(0|[1-9][0-9]{0,6})(MiB|GiB)\Z")
_UNITS = {"MiB": 1024**2, "GiB": 1024**3}
_CORES = re.compile(r"(?:0|[1-9][0-9]{0,2})(?:\.[0-9]{1,2})?\Z")

LARGEST = 4096 * 1024**3
"""Largest size that is taken for one (bytes)."""
LEAST_MEMORY = 128 * 1024**2
"""Less memory than this (bytes) does not carry the sandbox's own command daemon and a terminal beside a program."""
MOST_WEIGHT = 100
"""The weight of the workspace's own services, which an agent's never exceeds (systemd.resource-control(5))."""


def size(text: str) -> int:
    """Return the bytes that ``text`` (such as ``512MiB``) stands for; raise ``ValueError`` for other forms."""
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is not a size such as 512MiB or 3GiB")
    return int(match[1]) * _UNITS[match[2]]


def cores(text: str) -> Decimal | None:
    """Return the processors that ``text`` stands for, or None for ``all``; raise ``ValueError`` for other forms."""
    if text == "all":
        return None
    if not _CORES.match(text):
        raise ValueError(f"{text[:40]!r} is not a number of processors such as 1.5, and not all")
    return Decimal(text)


class SandboxLimits(Part, frozen=True):
    """What everything of the agent may use together. ``tmp`` and ``shm`` lie in memory and count as memory too."""

    memory: Annotated[str, says("Most memory; where the workspace has less to give, that.", "3GiB")] = "3GiB"
    swap: Annotated[str, says("Most swap space, where the workspace has any.", "0MiB")] = "0MiB"
    tasks: Annotated[int, says("Most processes and threads at once, 32 to 32768.", 1024)] = 1024
    cpu: Annotated[str, says("Most processors: a decimal number in quotes, or all.", "1.5", "all")] = "all"
    cpu_weight: Annotated[
        int, says("Share of the processors when they are busy, 1 to 100; the workspace's own services have 100.", 25)
    ] = 25
    io_weight: Annotated[int, says("The same for disks.", 25)] = 25
    tmp: Annotated[str, says("Size of the private /tmp, and of the private /var/tmp: each has as much.", "512MiB")] = (
        "512MiB"
    )
    shm: Annotated[str, says("Size of the private /dev/shm.", "512MiB")] = "512MiB"
    inodes: Annotated[int, says("Most files and directories in each of these three, 1024 to 1048576.", 65536)] = 65536
    files: Annotated[int, says("Most files that one process has open, 64 to 65536.", 8192)] = 8192


class Sandbox(Part, frozen=True):
    """How the sandbox is run, beyond what it may reach."""

    limits: Annotated[
        SandboxLimits, says("What the agent may use of the workspace.", {"memory": "3GiB", "tasks": 1024})
    ] = SandboxLimits()
    agents: Annotated[
        dict[str, Agent],
        says(
            "Always-on agents by name: they run without anybody who starts them.",
            {"triage": {"command": ["/usr/bin/triage-agent", "--watch"], "restart": "on-failure"}},
        ),
    ] = msgspec.field(default_factory=dict)


def amount(name: str, value: str | int) -> Decimal:
    """Return how much the field ``name`` of :class:`SandboxLimits` gives, to be compared with others of the field."""
    if isinstance(value, int):
        return Decimal(value)
    if name != "cpu":
        return Decimal(size(value))
    found = cores(value)
    return Decimal("Infinity") if found is None else found


def check_size(value: str, report: Report) -> None:
    """Report a text that is no size."""
    try:
        found = size(value)
    except ValueError as error:
        report(str(error), "write a whole number with MiB or GiB")
        return
    if found > LARGEST:
        report(f"{value} is more than any workspace has", "write at most 4096GiB")


def check_tmp(value: str, report: Report) -> None:
    """Report a text that is no size of a file system."""
    check_size(value, report)
    if _SIZE.match(value) and size(value) == 0:
        report("a file system of no size cannot be mounted", "write at least 1MiB")


def check_memory(value: str, report: Report) -> None:
    """Report a text that is no size, or too little to start in."""
    check_size(value, report)
    if _SIZE.match(value) and size(value) < LEAST_MEMORY:
        report(f"{value} is too little for the sandbox to start", f"write at least {LEAST_MEMORY // 1024**2}MiB")


def check_cores(value: str, report: Report) -> None:
    """Report a text that is no number of processors, or less than a tenth of one."""
    try:
        found = cores(value)
    except ValueError as error:
        report(str(error), 'write for example "1.5", or all')
        return
    if found is not None and found < Decimal("0.1"):
        report(f"{value} processors are too few for the sandbox to start", 'write at least "0.1"')


def between(least: int, most: int, what: str) -> Callable[[int, Report], None]:
    """Return a check that reports numbers outside ``least`` to ``most``."""

    def check(value: int, report: Report) -> None:
        if not least <= value <= most:
            report(f"{value} is not a number of {what} that can be set", f"write {least} to {most}")

    return check
