"""From an entry of the journal to an OCSF event, or to nothing: one place says in which order kinds are tried."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from saw.telemetry import accounts, sign_ins
from saw.telemetry.config import Select
from saw.telemetry.journal import Entry, Gap, words
from saw.telemetry.records import audit_event, claim_event, kernel_event, log_event
from saw.telemetry.services import service_event
from saw.telemetry.told import Host, proven, short, time_of

#: journald threw entries of a unit away, for there were too many (sd-messages(3)).
_SUPPRESSED = "a596d6fe7bfa4994828e72309e95d61e"


def event_of(host: Host, entry: Entry, select: Select) -> dict[str, Any] | None:
    """Return the event of ``entry``, None when it is not to be told."""
    if entry.transport == "audit":
        return audit_event(host, entry, select)
    if entry.transport == "kernel":
        return kernel_event(host, entry, select)
    if words(entry.message_id) == _SUPPRESSED and entry.transport == "driver":
        return _suppressed(host, entry)
    return service_event(host, entry, select) or _of_people(host, entry, select) or log_event(host, entry, select)


def _of_people(host: Host, entry: Entry, select: Select) -> dict[str, Any] | None:
    account = select.accounts and words(entry.syslog_identifier) in accounts.PROGRAMS
    if not proven(entry):
        claims = (select.sign_ins and sign_ins.looks_like_one(entry)) or (account and accounts.looks_like_one(entry))
        return claim_event(host, entry) if claims else None
    found = accounts.account_change(host, entry) if account else None
    return found or (sign_ins.sign_in(host, entry) if select.sign_ins else None)


def _suppressed(host: Host, entry: Entry) -> dict[str, Any]:
    count = words(entry.n_dropped)
    detail = {
        "cause": "suppressed",
        "unit": short(words(entry.unit), 256),
        "entries": int(count) if count.isdecimal() else None,
    }
    return _gap_event(host, time_of(entry), "journald threw entries away, for one unit wrote too many", detail)


def gap_event(host: Host, gap: Gap, now: datetime, full_since: str = "") -> dict[str, Any]:
    """Return the event of entries that left the journal before they were read; ``full_since``: the spool had no room then."""
    detail = {
        "cause": "spool_full" if full_since else "journal_rotated",
        "after_cursor": gap.after,
        "before_cursor": gap.before,
        "since": _iso(gap.since),
        "until": _iso(gap.until),
        "entries": gap.entries,
    } | ({"full_since": full_since} if full_since else {})
    return _gap_event(host, now, "entries left the journal before they were read", detail)


def untold_event(host: Host, now: datetime, cursor: str, why: str) -> dict[str, Any]:
    """Return the event of an entry that is in the journal and cannot be told."""
    detail = {"cause": "not_told", "cursor": cursor, "why": why, "entries": 1}
    return _gap_event(host, now, "an entry of the journal cannot be told", detail)


def began_event(host: Host, now: datetime, source: str) -> dict[str, Any]:
    """Return the first event of a spool: there was none before, or somebody removed it."""
    event = host.factory.detection_finding(
        now,
        host.subject("saw-telemetry"),
        kind="telemetry_began",
        title="telemetry begins a new chain",
        severity="low",
        detail={"source": source},
    )
    return event | {"device": event.get("device", {"type_id": 0, "type": "Unknown"}) | {"hostname": host.name}}


def _gap_event(host: Host, now: datetime, title: str, detail: Mapping[str, object]) -> dict[str, Any]:
    event = host.factory.detection_finding(
        now, host.subject("saw-telemetry"), kind="telemetry_gap", title=title, severity="high", detail=detail
    )
    return event | {"device": event.get("device", {"type_id": 0, "type": "Unknown"}) | {"hostname": host.name}}


def _iso(micros: int | None) -> str | None:
    return (
        None if micros is None else datetime.fromtimestamp(micros / 1_000_000, UTC).isoformat(timespec="milliseconds")
    )


__all__ = ["began_event", "event_of", "gap_event", "untold_event"]
