"""What is pending in golden images that are in force, and so in the workspaces that run them.

A workspace gets newer packages with a rebuild on a newer image alone, so that the bill of its image says what it has. The
records come from the broker, which took none without the officers' signatures; a bill counts only when it is the one that its
record names. Matching and judging are those of ``saw image scan``, with the advisories of today.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from saw.audit.events import EventFactory, Subject
from saw.errors import SawError, UnavailableError
from saw.image.disk import digest_of
from saw.image.vulnerabilities import Finding, Verdict
from saw.patching.findings import STANDARD
from saw.patching.vulnerable import AT_ONCE, events_of

BILL = "sbom/debian.cdx.json"
_OFFERED = ("candidate", "stable")
_GONE = "decommissioned"


class AnswerInvalid(UnavailableError):
    """The broker's answer cannot be read."""

    code = "answer_invalid"


class Record(msgspec.Struct, frozen=True):
    """The part of a registered release record that counts here, and the state of its image."""

    name: str
    image_sha256: str
    created: datetime
    not_after: datetime
    state: str
    evidence: dict[str, str] = {}


class Runs(msgspec.Struct, frozen=True):
    """A workspace: which image it is made of, and where it stands."""

    id: str
    state: str
    image: str
    image_sha256: str


class ImageReport(msgspec.Struct, frozen=True):
    """What one image in force has: ``pending`` counts packages that lack a released fix, ``age_days`` whole days.

    ``problems`` is empty while it passes the gate, is not overdue, and could be looked at. ``judged`` is false when it could not
    be: nothing is known of its packages then.
    """

    name: str
    image_sha256: str
    state: str
    age_days: int
    overdue: bool
    pending: int
    workspaces: tuple[str, ...]
    problems: tuple[str, ...]
    open: tuple[Finding, ...] = ()
    waived: tuple[Finding, ...] = ()
    judged: bool = True


def in_force(
    images: Iterable[Mapping[str, Any]], workspaces: Iterable[Mapping[str, Any]]
) -> list[tuple[Record, tuple[str, ...]]]:
    """Return the images that workspaces may be made of or run, each with the ids of those that do; raises :class:`AnswerInvalid`.

    Both are what the broker lists. An image that is deprecated or revoked counts as long as a workspace is made of it.
    """
    try:
        records = msgspec.convert(list(images), list[Record])
        rows = msgspec.convert(list(workspaces), list[Runs])
    except msgspec.ValidationError as error:
        raise AnswerInvalid(
            f"the broker's list cannot be read: {error}", cure="use a saw of the broker's release"
        ) from error
    made: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.state != _GONE:
            made.setdefault((row.image, row.image_sha256), []).append(row.id)
    found = [(one, tuple(sorted(made.get((one.name, one.image_sha256), ())))) for one in records]
    return [(one, ids) for one, ids in found if ids or one.state in _OFFERED]


def bill_of(record: Record, images: Path, name: str = BILL) -> tuple[Path | None, str]:
    """Return a bill of an image below ``images``/NAME, or None and why it does not count."""
    bill = images / record.name / name
    wanted = record.evidence.get(name)
    if wanted is None:
        what = "bill of Debian packages" if name == BILL else name
        return None, f"its record names no {what} (build, sign and register a newer image)"
    if not bill.is_file():
        gone = "the image is gone from there" if not bill.parents[1].is_dir() else "the image is there without it"
        return None, (
            f"its bill {bill} is not there, {gone} (copy {name} of it there from where it was built or kept; "
            "or move its workspaces to a newer image, then deprecate it)"
        )
    if digest_of(bill) != wanted:
        return None, f"{bill} is not the bill that its record names (copy the one there that was signed)"
    return bill, ""


def report_on(
    record: Record,
    workspaces: tuple[str, ...],
    images: Path,
    judged: Callable[[Path], Verdict],
    *,
    longest: timedelta,
    now: datetime,
    bills: Sequence[str] = (BILL,),
) -> ImageReport:
    """Report on one image: ``judged`` holds a bill against the advisories; an image older than ``longest`` is overdue.

    ``bills``: those that have to be the record's own, the first of which ``judged`` gets.
    An image that cannot be judged is a report with that problem and no error, so that the others are judged all the same.
    """
    age = now - record.created
    problems: list[str] = []
    if age > longest:
        problems.append(
            f"it is {age.days} days old, more than {longest.days}: build a newer one, and rebuild its workspaces on that"
        )
    if now >= record.not_after:
        problems.append(f"its record counts no longer since {record.not_after:%Y-%m-%d}")
    found = [bill_of(record, images, name) for name in bills]
    bill, why = next((one for one in found if one[0] is None), found[0])
    verdict = Verdict((), (), (), ())
    try:
        verdict = judged(bill) if bill else verdict
    except SawError as error:
        bill, why = None, str(error)
    problems += [f"not judged: {why}"] if bill is None else verdict.problems
    return ImageReport(
        name=record.name,
        image_sha256=record.image_sha256,
        state=record.state,
        age_days=age.days,
        overdue=age > longest,
        pending=len({(one.ecosystem, one.package) for one in verdict.open if one.fixed_in}),
        workspaces=workspaces,
        problems=tuple(problems),
        open=verdict.open,
        waived=verdict.waived,
        judged=bill is not None,
    )


def image_events(report: ImageReport, factory: EventFactory, time: datetime) -> list[dict[str, Any]]:
    """Return OCSF 1.8 findings: of each source package its vulnerabilities (class 2002), and that it is overdue (class 2003)."""
    about = {
        "image": report.name,
        "image_sha256": report.image_sha256,
        "image_state": report.state,
        "workspaces": list(report.workspaces[:AT_ONCE]),
        "workspace_count": len(report.workspaces),
    }
    events = events_of(f"image {report.name}", (*report.open, *report.waived), factory, time, about)
    if report.overdue:
        events.append(
            factory.compliance_finding(
                time,
                Subject(principal="saw-patching"),
                kind="image_overdue",
                title=f"image {report.name} is {report.age_days} days old",
                control="an image in force is rebuilt before its limit",
                standards=[STANDARD],
                severity="high" if report.workspaces else "medium",
                detail={"kind": "image_overdue", **about},
            )
        )
    return events


def workspaces_of(reports: Iterable[ImageReport]) -> list[dict[str, Any]]:
    """Return a row for each workspace: its image, and what is pending there."""
    rows = [
        {
            "id": one,
            "image": report.name,
            "pending": report.pending,
            "open": len(report.open),
            "overdue": report.overdue,
            "ok": not report.problems,
        }
        for report in reports
        for one in report.workspaces
    ]
    return sorted(rows, key=lambda row: str(row["id"]))


__all__ = ["ImageReport", "Record", "Runs", "bill_of", "image_events", "in_force", "report_on", "workspaces_of"]
