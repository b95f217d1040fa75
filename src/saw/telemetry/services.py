"""Services: what systemd itself says of units, as OCSF Application Lifecycle (6002). Message ids are those of sd-messages(3)."""

from __future__ import annotations

from typing import Any, Literal

from saw.audit.events import Outcome
from saw.telemetry.config import Select
from saw.telemetry.journal import Entry, words
from saw.telemetry.told import Host, short, time_of

STARTED = "39f53479d3a045ac8e11786248231fbf"
STOPPED = "9d1aaa27d60140bd96365438aad20286"
START_FAILED = "be02cf6855d2428ba40df7e9d022f03d"
FAILED = "d9b373ed55a64feb8242e02dbe79a49c"
RELOADED = "7b05ebc668384222baa8881179cfda54"
OUT_OF_MEMORY = "fe6faa94e7774663a0da52717891d8ef"
_Activity = Literal["start", "stop", "update"]
#: Message id → what happened, how it ended, words.
_FORMS: dict[str, tuple[_Activity, Outcome, str]] = {
    STARTED: ("start", "success", "started"),
    STOPPED: ("stop", "success", "stopped"),
    RELOADED: ("update", "success", "reloaded"),
    START_FAILED: ("start", "failure", "did not start"),
    FAILED: ("stop", "failure", "failed"),
    OUT_OF_MEMORY: ("stop", "failure", "lost a process for lack of memory"),
}


def service_event(host: Host, entry: Entry, select: Select) -> dict[str, Any] | None:
    """Return the event of an entry of systemd's that is to be told, else None."""
    form = _FORMS.get(words(entry.message_id))
    unit = short(words(entry.unit), 256)
    # Only the first process of the system speaks for its units.
    if form is None or not unit or entry.pid != "1" or entry.uid != "0":
        return None
    activity, outcome, said = form
    if not (select.tells_service(unit) or (outcome == "failure" and select.failures)):
        return None
    reason = short(words(entry.unit_result) or (words(entry.job_result) if outcome == "failure" else ""), 64)
    event = host.factory.application_lifecycle(
        time_of(entry),
        host.subject(),
        (unit, ""),
        activity=activity,
        outcome=outcome,
        message=f"{unit} {said}",
        status_detail=reason,
        detail={"unit": unit},
    )
    return host.finished(event, entry)


__all__ = ["FAILED", "OUT_OF_MEMORY", "RELOADED", "STARTED", "START_FAILED", "STOPPED", "service_event"]
