"""What a workspace's agent used of it, on its way into the trail: the form in which it is told, and the event that it becomes.

All numbers are counted by the kernel since the VM's boot (a unit's since its last start) and only grow, so that a report that was
lost costs nothing: the last one of a boot says it all. They are the workspace's own word, as decisions are: whoever is root there
can make them up, and nothing rests on them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import msgspec

from saw.audit.events import EventFactory, Subject

MOST_UNITS = 32
"""Most units of one report."""

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class Used(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a unit, or all of the agent, used: milliseconds of processors, bytes, and how often it met its limits.

    ``tasks`` is the number at the time of the report, ``oom_kills`` the processes that were ended for want of memory,
    ``refused_tasks`` the times that a process could not be started. What a kernel does not count is 0.
    """

    cpu_ms: _Count = 0
    memory_peak: _Count = 0
    tasks: _Count = 0
    read_bytes: _Count = 0
    written_bytes: _Count = 0
    oom_kills: _Count = 0
    refused_tasks: _Count = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A report: of which boot, everything together (MCP servers and units that have ended, too), and each lasting unit."""

    boot: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    total: Used
    units: Annotated[
        dict[Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9@.-]{0,62}\Z")], Used],
        msgspec.Meta(max_length=MOST_UNITS),
    ] = {}


def event_of(factory: EventFactory, time: datetime, subject: Subject, usage: Usage) -> dict[str, Any]:
    """Return the OCSF event (API Activity, 6003) of a report that ``subject``'s workspace made at ``time``."""
    total = usage.total
    return factory.api_activity(
        time,
        subject,
        "sandbox/usage",
        activity="update",
        message=f"used {total.cpu_ms / 1000:.1f} s of processors since boot, at most {total.memory_peak // 1024**2} MiB",
        resource=("workspace", subject.workspace),
        detail={"layer": "workspace", "usage": msgspec.to_builtins(usage)},
    )


__all__ = ["MOST_UNITS", "Usage", "Used", "event_of"]
