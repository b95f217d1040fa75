"""A verdict as an OCSF HTTP Activity event: who, under which policy, what, why, which credential id, which address."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from saw import addressing
from saw.audit.events import EventFactory, Outcome, Subject
from saw.gateway.judge import Verdict

_PATH = 2048
_TEXT = 256
_NUMBER = len(str(addressing.HIGHEST))


def event_of(verdict: Verdict, factory: EventFactory) -> dict[str, Any]:
    """Return the event; texts that the caller chose are cut to a bounded length."""
    call, decision, dial = verdict.call, verdict.decision, verdict.dial
    subject = _subject(verdict)
    detail: dict[str, object] = {
        "layer": "ring2",
        "verdict": "allow" if verdict.allowed else "deny",
        "reason": verdict.reason,
        "detail": verdict.detail[:_PATH],
        "revision": verdict.revision,
        "binary": call.binary[:_TEXT],
        "delegation": verdict.delegation,
        "review": verdict.review,
    }
    if decision is not None:
        detail |= {
            "policy": decision.policy,
            "rule": decision.rule,
            "action_class": decision.action_class,
            "credential": decision.credential or "",
            "inference": decision.inference or "",
            "data_classes": " ".join(decision.data_classes)[:_TEXT],
            "protocol": decision.protocol,
            "operations": "; ".join(asked.text() for asked in decision.operations)[:_TEXT],
        }
    if call.upgrade:
        detail |= {"upgrade": call.upgrade[:_TEXT], "frames": decision.frames if decision else ""}
    if verdict.budget is not None:
        detail["budget"] = dict(verdict.budget)
    if verdict.limit is not None:
        detail["limit"] = dict(verdict.limit)
    if verdict.record:
        detail["record"] = verdict.record
    if verdict.offline:
        detail["offline"] = True
    if dial is not None:
        detail |= {"upstream": dial.address, "authority": dial.authority, "injected": bool(dial.inject or dial.login)}
        if dial.edit is not None:
            detail["model_sent"] = dial.edit.text.strip('"')[:_TEXT]
    return factory.http_activity(
        verdict.time,
        subject,
        method=call.method[:_TEXT],
        scheme=call.scheme[:16],
        host=verdict.host[:_TEXT] or "unknown",
        port=verdict.port,
        path=call.target[:_PATH],
        allowed=verdict.allowed,
        reason=verdict.reason,
        rule=decision.rule if decision else "",
        message=f"{'allowed' if verdict.allowed else 'refused'} by ring 2",
        detail={name: value for name, value in detail.items() if value is not None and value != ""},
    )


def review_event(
    verdict: Verdict,
    factory: EventFactory,
    time: datetime,
    step: str,
    review: str,
    *,
    outcome: Outcome = "success",
    detail: Mapping[str, object],
) -> dict[str, Any]:
    """Return the event of a step of a review at the perimeter: ``open`` or ``result``."""
    return factory.api_activity(
        time,
        _subject(verdict),
        f"review.{step}",
        activity="create" if step == "open" else "update",
        outcome=outcome,
        resource=("review", review),
        detail={"layer": "ring2", "review": review, **detail},
    )


def answer_event(
    verdict: Verdict, factory: EventFactory, time: datetime, kind: str, *, detail: str, times: int
) -> dict[str, Any]:
    """Return the event of what a server's answer was not passed on as it came for: ``times`` things of one ``kind``."""
    said: dict[str, object] = {"layer": "ring2", "kind": kind, "detail": detail[:_TEXT], "count": times}
    return factory.api_activity(
        time,
        _subject(verdict),
        "mcp.answer",
        outcome="failure",
        message="a server's answer was not passed on as it came",
        resource=("mcp_server", verdict.server),
        detail={**said, "host": verdict.host, "path": verdict.call.target[:_PATH]},
    )


def session_event(
    verdict: Verdict,
    factory: EventFactory,
    time: datetime,
    step: str,
    *,
    outcome: Outcome,
    detail: Mapping[str, object],
) -> dict[str, Any]:
    """Return the event of a step of a session of PostgreSQL: ``connect``, ``cancel`` or ``end``; long texts are cut."""
    said = {name: value[:_TEXT] if isinstance(value, str) else value for name, value in detail.items()}
    credential = verdict.decision.credential if verdict.decision is not None else None
    return factory.api_activity(
        time,
        _subject(verdict),
        f"postgres.{step}",
        outcome=outcome,
        message=f"session of PostgreSQL: {step}",
        resource=("postgres", f"{verdict.host}:{verdict.port}"),
        detail={"layer": "ring2", "credential": credential or "", "delegation": verdict.delegation, **said},
    )


def _subject(verdict: Verdict) -> Subject:
    call, entry = verdict.call, verdict.workspace
    return Subject(
        principal=entry.sponsor if entry else "",
        agent=(entry.agent or "") if entry else "",
        workspace=verdict.workspace_id,
        policy_digest=verdict.policy_digest,
        request_id=call.request_id[:_TEXT],
        address=_address(call.listener),
    )


def _address(listener: str) -> str:
    """Return the address of the VM that a listener is for; listeners are named by workspace numbers."""
    number = int(listener) if listener.isdecimal() and len(listener) <= _NUMBER else 0
    return addressing.workspace(number) if addressing.is_number(number) else ""
