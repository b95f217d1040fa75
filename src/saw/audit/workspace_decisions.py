"""What was decided inside a workspace, on its way into the trail: the form in which it is told, and the events that it becomes.

A call that ring 1 refuses, and every call of an MCP tool over stdio, never leaves the VM, so nobody outside sees it. The policy
agent reads such decisions from the workspace's journal and tells them in batches; alike ones of one batch are one
:class:`Decided` with their number. They are the workspace's own word: whoever is root there can hide them or make them up, and
nothing rests on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec

from saw.audit.events import EventFactory, Subject
from saw.audit.ocsf import validate

MOST = 32
"""Most different decisions of one batch; what is beyond is counted by reason."""
MOST_IDS = 8
"""Most request ids that are told of alike decisions, the first ones."""
TEXT = 256
"""Where a text is cut (characters), as in ring 2's events."""
PATH = 2048
"""Where a path is cut (characters), as in ring 2's events."""

_Short = Annotated[str, msgspec.Meta(max_length=TEXT)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
_Ms = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Reason = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_]{1,64}\Z")]


class Decided(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Alike decisions: ``count`` of them between ``first`` and ``last`` (the VM's clock, milliseconds since 1970 UTC).

    ``uid`` names the first one and is the same however often it is told. Of a call to the network ``host`` to ``upgrade``
    are stated, of a tool ``server`` and ``tool``. ``reason`` is that of a refusal, and ``text`` what else it said.
    """

    uid: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}:[0-9]{1,16}\Z")]
    layer: Literal["ring1", "mcp"]
    verdict: Literal["allow", "deny"] = "deny"
    reason: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_]{0,64}\Z")] = ""
    first: _Ms
    last: _Ms
    count: _Count = 1
    policy_digest: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    host: _Short = ""
    port: Annotated[int, msgspec.Meta(ge=0, lt=65536)] = 0
    method: _Short = ""
    path: Annotated[str, msgspec.Meta(max_length=PATH)] = ""
    binary: _Short = ""
    policy: _Short = ""
    rule: _Short = ""
    upgrade: _Short = ""
    server: _Short = ""
    tool: _Short = ""
    text: _Short = ""
    request_ids: Annotated[tuple[_Short, ...], msgspec.Meta(max_length=MOST_IDS)] = ()


class Decisions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A batch: ``decided``, ``more`` beyond them by reason (``allowed``), and how many the journal has lost (``missing``)."""

    decided: Annotated[tuple[Decided, ...], msgspec.Meta(max_length=MOST)] = ()
    more: Annotated[dict[Reason, _Count], msgspec.Meta(max_length=32)] = {}
    missing: Annotated[int, msgspec.Meta(ge=0, le=10**9)] = 0


def events_of(factory: EventFactory, time: datetime, subject: Subject, said: Decisions) -> Iterator[dict[str, Any]]:
    """Yield the OCSF events of a batch that ``subject``'s workspace told at ``time``.

    A call is HTTP Activity (4002), a tool API Activity (6003), both with ``count``, ``start_time`` and ``end_time``; what is
    beyond a batch, or lost, is a Detection Finding (2004).
    """
    for one in said.decided:
        asked = one.request_ids[0] if one.request_ids else subject.request_id
        about = msgspec.structs.replace(subject, policy_digest=one.policy_digest, request_id=asked)
        event = _call(factory, time, about, one) if one.layer == "ring1" else _tool(factory, time, about, one)
        event |= {"count": one.count, "start_time": one.first, "end_time": one.last}
        validate(event)
        yield event
    lost = [
        ("decisions_many", sum(said.more.values()), "more, of too many kinds to be told one by one", said.more),
        ("decisions_missing", said.missing, "are missing in the journal of the workspace", {}),
    ]
    for kind, count, words, reasons in lost:
        if count:
            detail = {"layer": "workspace", "count": count, "by_reason": reasons}
            title = f"decisions in the workspace: {count} {words}"
            yield factory.detection_finding(time, subject, kind=kind, title=title, severity="medium", detail=detail)


def _call(factory: EventFactory, time: datetime, subject: Subject, one: Decided) -> dict[str, Any]:
    return factory.http_activity(
        time,
        subject,
        method=one.method or "UNKNOWN",
        scheme="https",
        host=one.host,
        port=one.port,
        path=one.path,
        allowed=False,
        status_code=403,
        reason=one.reason,
        rule=one.rule,
        message=f"refused inside the workspace: {one.reason}",
        detail=_detail(one, "binary", "policy", "upgrade"),
    )


def _tool(factory: EventFactory, time: datetime, subject: Subject, one: Decided) -> dict[str, Any]:
    allowed = one.verdict == "allow"
    return factory.api_activity(
        time,
        subject,
        "tools/call" if one.tool else "mcp",
        outcome="success" if allowed else "failure",
        message="allowed inside the workspace" if allowed else f"refused inside the workspace: {one.reason}",
        resource=("mcp_tool", f"{one.server}/{one.tool}") if one.tool else ("mcp_server", one.server),
        status_detail=one.reason,
        detail=_detail(one, "server", "tool", "rule", "text"),
    )


def _detail(one: Decided, *names: str) -> dict[str, object]:
    said = {name: getattr(one, name) for name in names}
    told = datetime.fromtimestamp(one.first / 1000, UTC).isoformat(timespec="milliseconds")
    facts: dict[str, object] = {
        "layer": one.layer,
        "uid": one.uid,
        "told_time": told,
        "request_ids": list(one.request_ids),
    }
    return facts | {name: value for name, value in {"reason": one.reason, **said}.items() if value}


__all__ = ["MOST", "MOST_IDS", "PATH", "TEXT", "Decided", "Decisions", "events_of"]
