"""Drift as OCSF 1.8 Compliance Findings (class 2003): each once while it stands, and once more when it has gone.

They wait in a spool of their own (that of :mod:`saw.edr.store`), and leave for the broker's trail and for the log of this host.
What could not be looked at is never taken for gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import msgspec

from saw import jsontext
from saw.audit.drift import RULES, STANDARD, Kind
from saw.audit.events import EventFactory, Severity, Subject
from saw.drift.report import Report
from saw.edr.detection import AT_ONCE, Detection, printable
from saw.edr.store import Found, Store, Way

_AREA = "drift"
_SPOOL = 10_000


class Standing(msgspec.Struct, frozen=True, order=True, forbid_unknown_fields=True):
    """What is wrong, as far as it tells one finding from another. ``words`` are for kinds that are about no host."""

    kind: Kind
    playbook: str = ""
    host: str = ""
    role: str = ""
    task: str = ""
    module: str = ""
    place: str = ""
    words: str = ""

    @property
    def title(self) -> str:
        """Say it to people, in one line."""
        if self.kind in {"waiver_expired", "check_incomplete"}:
            return printable(self.words)
        where = ": ".join(filter(None, (self.role, self.task)))
        said = f"could not be checked at {where}" if where else "was not looked at"
        return printable(
            f"{self.host}: {where or self.playbook}: {self.place or self.module}"
            if self.kind == "drift"
            else f"{self.host} {said}"
        )


class Caller(Protocol):
    """Calls the broker, as :class:`saw.broker.client.OperatorClient` does."""

    def request(self, method: str, path: str, json: object | None = None) -> dict[str, Any]:
        """Call it; raise :class:`saw.errors.SawError`."""
        ...


def standing(report: Report) -> tuple[Standing, ...]:
    """Return what a report says is wrong."""
    found = [
        *(Standing("drift", at.playbook, at.host, at.role, at.task, at.module, at.place) for at in report.drift),
        # the reason is left out: a host that fails today and is away tomorrow is one finding
        *(Standing("host_unchecked", at.playbook, at.host) for at in report.unchecked),
        *(_problem(words) for words in report.problems),
    ]
    return tuple(dict.fromkeys(found))


def _problem(words: str) -> Standing:
    """A problem of the report. Of a run that broke off, what Ansible said stays in the report: it may quote anything."""
    if words.startswith("the waiver of "):
        return Standing("waiver_expired", words=words)
    return Standing("check_incomplete", words=": ".join(words.split(": ")[:2]))


def gone(known: Iterable[Standing], report: Report) -> tuple[Standing, ...]:
    """Return what stood and is gone: of a host and a playbook only when this report checked both to the end."""
    now = set(standing(report))
    broken_off = {words.partition(": ")[0] for words in report.problems}
    unchecked = {(at.playbook, at.host) for at in report.unchecked}

    def looked_at(one: Standing) -> bool:
        if one.kind in {"waiver_expired", "check_incomplete"}:
            return True
        complete = one.playbook in report.playbooks and one.playbook not in broken_off
        return complete and one.host in report.hosts and (one.playbook, one.host) not in unchecked

    return tuple(one for one in known if one not in now and looked_at(one))


def open_store(state: Path, ways: tuple[Way, ...]) -> Store:
    """Open the spool in the folder ``state``."""
    return Store(state, _SPOOL, ways=ways, render=event_of, tells_gaps=False)


def record(report: Report, store: Store, factory: EventFactory, now: datetime, new_uid: Callable[[], str]) -> list[int]:
    """Write a finding for what is newly wrong and for what is gone, and return their numbers."""
    known = {jsontext.decode(raw, kind=Standing): uid for raw, uid in store.known(_AREA).items()}
    new = [(one, new_uid(), False) for one in standing(report) if one not in known]
    over = [(one, known[one], True) for one in gone(known, report)]
    told = [*new, *over]
    numbers: list[int] = []
    for at in range(0, len(told), AT_ONCE):
        part = told[at : at + AT_ONCE]
        marks = {_mark(one): None if resolved else uid for one, uid, resolved in part}
        found = [_detection(one, uid, resolved=resolved) for one, uid, resolved in part]
        numbers += store.record(found, factory, now, known={_AREA: marks})
    return numbers


def _mark(one: Standing) -> str:
    return json.dumps(msgspec.to_builtins(one), sort_keys=True)


def _detection(one: Standing, uid: str, *, resolved: bool) -> Detection:
    evidence = {name: value for name, value in msgspec.structs.asdict(one).items() if value and name != "kind"}
    key = f"{uid}|{'resolved' if resolved else 'new'}"
    severity: Severity = "informational" if resolved else RULES[one.kind][1]
    return Detection(one.kind, one.host, one.title, key, severity, {**evidence, "finding": uid, "resolved": resolved})


def event_of(detection: Detection, factory: EventFactory, time: datetime, workspace: str = "") -> dict[str, Any]:
    """Return ``detection`` as an OCSF 1.8 Compliance Finding that was validated."""
    return factory.compliance_finding(
        time,
        Subject(principal="saw-drift", workspace=workspace),
        kind=detection.kind,
        title=detection.title,
        control=next(rule for kind, (rule, _) in RULES.items() if kind == detection.kind),
        standards=[STANDARD],
        severity=detection.severity,
        uid=str(detection.evidence["finding"]),
        resolved=bool(detection.evidence["resolved"]),
        detail={"kind": detection.kind, **detection.evidence},
    )


class TrailDestination:
    """The broker, which writes each finding into its trail under the name of whoever reports."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def send(self, found: Found) -> None:
        """Report one finding."""
        told = found.event["unmapped"]["saw"]
        names = ("kind", "finding", "resolved", "playbook", "host", "role", "task", "module", "place", "words")
        self._caller.request("POST", "/v1/findings/drift", {name: told[name] for name in names if name in told})

    def close(self) -> None:
        """Nothing is open between two calls."""


__all__ = ["Standing", "TrailDestination", "event_of", "gone", "open_store", "record", "standing"]
