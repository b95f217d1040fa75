"""What of a host's patching is a finding: OCSF 1.8 Compliance Findings (class 2003) in a spool of their own."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec

from saw.audit.events import EventFactory, Severity, Subject
from saw.edr.detection import Detection, printable
from saw.edr.place import ways_of, workspace_id
from saw.edr.store import Store
from saw.patching.config import PatchConfig

Kind = Literal[
    "update_overdue",
    "hold_expired",
    "hold_unexplained",
    "hold_not_held",
    "unsigned_source",
    "source_not_listed",
    "lists_stale",
    "run_failed",
    "reboot_overdue",
]
#: Kind → the rule that is broken, and how bad that is.
RULES: dict[Kind, tuple[str, Severity]] = {
    "update_overdue": ("a security update is installed before its limit", "high"),
    "hold_expired": ("a held package is upgraded before its hold ends", "high"),
    "hold_unexplained": ("a held package has an owner, a reason and an end", "medium"),
    "hold_not_held": ("a package that is to be held is held", "low"),
    "unsigned_source": ("packages come from signed sources alone", "high"),
    "source_not_listed": ("updates come from listed sources alone", "high"),
    "lists_stale": ("the lists of packages are fresh, so that what is pending is known", "medium"),
    "run_failed": ("the scheduled run succeeds", "medium"),
    "reboot_overdue": ("the host runs what was installed before the limit", "medium"),
}
STANDARD = "Secure Agent Workspace P0-02"


class Breach(msgspec.Struct, frozen=True):
    """A rule that does not hold here. ``subject`` tells it from others of its kind; ``words`` say it to people, with the cure."""

    kind: Kind
    subject: str
    words: str
    evidence: dict[str, Any] = {}


def event_of(detection: Detection, factory: EventFactory, time: datetime, workspace: str = "") -> dict[str, Any]:
    """Return ``detection`` as an OCSF 1.8 Compliance Finding (class 2003) that was validated."""
    control, _ = _rule(detection.kind)
    return factory.compliance_finding(
        time,
        Subject(principal="saw-patching", workspace=workspace),
        kind=detection.kind,
        title=printable(detection.title),
        control=control,
        standards=[STANDARD],
        severity=detection.severity,
        detail={"kind": detection.kind, "subject": printable(detection.subject), **detection.evidence},
    )


def open_store(config: PatchConfig) -> Store:
    """Open the spool of this host."""
    return Store(config.state, config.spool_limit, ways=ways_of(config), render=event_of, tells_gaps=False)


def record(
    breaches: tuple[Breach, ...], config: PatchConfig, store: Store, factory: EventFactory, now: datetime
) -> list[int]:
    """Write a finding for each newly broken rule, and return its numbers; one that held again in between is told again."""
    known = store.known("breaches")
    broken = {f"{one.kind}|{one.subject}": one for one in breaches}
    found = [
        Detection(one.kind, one.subject, one.words, f"{name}|{now.isoformat()}", _rule(one.kind)[1], dict(one.evidence))
        for name, one in broken.items()
        if name not in known
    ]
    marks: dict[str, str | None] = {name: None for name in known if name not in broken}
    marks |= dict.fromkeys(broken, "broken")
    if broken.keys() == known.keys():
        return []
    return store.record(found, factory, now, workspace=workspace_id(config), known={"breaches": marks})


def _rule(kind: str) -> tuple[str, Severity]:
    return next(rule for name, rule in RULES.items() if name == kind)


__all__ = ["RULES", "STANDARD", "Breach", "Kind", "event_of", "open_store", "record"]
