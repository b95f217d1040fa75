"""What a workspace's journal said, on its way into the trail: the form in which it is told, and the events that it becomes.

Telemetry in a workspace makes OCSF events and chains them (:mod:`saw.telemetry`). They are the workspace's own word: whoever is
root there can hide them or make them up, and nothing rests on them. So the broker keeps what they say and states itself who said
it, when and of which workspace, whatever they claim.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec

from saw.audit.chain import ChainedEvent, ChainError, event_hash
from saw.audit.events import EventFactory, Subject
from saw.audit.ocsf import EventInvalid, validate

MOST = 32
"""Most events of one report."""
LONGEST = 16 * 1024
"""The longest event that is kept, bytes."""
TOLD = frozenset({0, 2004, 3001, 3002, 6002})
"""Classes that are taken. Others are the control plane's own, and no workspace speaks for it."""
#: What the broker states itself, or does not take from anybody.
_OURS = (
    "actor",
    "policy",
    "firewall_rule",
    "src_endpoint",
    "device",
    "metadata",
    "unmapped",
    "time",
    "start_time",
    "end_time",
)


class Telemetry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Events of the chain ``source`` of a host, in their order."""

    source: Annotated[str, msgspec.Meta(pattern=r"^host\.[a-z0-9-]{1,40}\.[0-9a-f]{8}\Z")]
    events: Annotated[tuple[ChainedEvent, ...], msgspec.Meta(max_length=MOST)]


def events_of(factory: EventFactory, time: datetime, subject: Subject, said: Telemetry) -> Iterator[dict[str, Any]]:
    """Yield the OCSF events of a report that ``subject``'s workspace told at ``time``.

    What is not what such an event has to be is a Detection Finding in its place: to refuse it would stop all behind it.
    """
    for item in said.events:
        problem = _problem(said.source, item)
        if problem:
            detail = {"layer": "workspace", "source": said.source, "seq": item.seq, "why": problem}
            title = "telemetry of the workspace is not what it has to be"
            yield factory.detection_finding(
                time, subject, kind="telemetry_invalid", title=title, severity="medium", detail=detail
            )
        else:
            yield _kept(factory, time, subject, item)


def _problem(source: str, item: ChainedEvent) -> str:
    """Return why an event is not taken, empty when it is."""
    event = item.event
    if len(msgspec.json.encode(event)) > LONGEST:
        return "it is too long"
    if item.source != source or item.seq < 1:
        return "it is of another chain"
    try:
        if event_hash(item.source, item.seq, item.prev, event) != item.hash:
            return "it does not match its hash"
        validate(event)
    except (ChainError, EventInvalid):
        return "it is not valid OCSF"
    return "" if event["class_uid"] in TOLD else "it is of a class that no workspace tells"


def _kept(factory: EventFactory, time: datetime, subject: Subject, item: ChainedEvent) -> dict[str, Any]:
    said = item.event
    detail = {
        "layer": "workspace",
        "uid": str(said["metadata"].get("uid", "")),
        "told_time": _iso(said["time"]),
        "chain": {"source": item.source, "seq": item.seq, "prev": item.prev, "hash": item.hash},
        "report": said.get("unmapped", {}).get("saw", {}),
    }
    # The frame is the broker's; what stands in it is the workspace's.
    frame = factory.log(time, subject, message="", detail=detail)
    event = {name: value for name, value in said.items() if name not in _OURS}
    event |= {
        name: frame[name] for name in ("metadata", "unmapped", "time", "actor", "device", "policy") if name in frame
    }
    event |= {"start_time": said["time"], "end_time": said["time"]}
    if said["class_uid"] == _AUTHENTICATION and "src_endpoint" in said:
        event["src_endpoint"] = said["src_endpoint"]
    validate(event)
    return event


_AUTHENTICATION = 3002


def _iso(millis: int) -> str:
    try:
        return datetime.fromtimestamp(millis / 1000, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):
        return ""


__all__ = ["LONGEST", "MOST", "TOLD", "Telemetry", "events_of"]
