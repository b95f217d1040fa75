"""The report: its content, the summary, and how it is read back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

import saw
from saw import jsontext
from saw.conformance.case import SUITES
from saw.conformance.verdict import CaseResult
from saw.errors import ConfigError

SCHEMA = 2


class Counts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Cases by result. ``right`` are refused for an expected reason, ``unknown`` for one that nobody stated."""

    right: int = 0
    unknown: int = 0
    wrong_reason: int = 0
    allowed: int = 0
    error: int = 0
    twin_broken: int = 0
    not_applicable: int = 0

    @property
    def applicable(self) -> int:
        """Return how many cases said something."""
        return self.right + self.unknown + self.wrong_reason + self.allowed + self.error + self.twin_broken

    @property
    def score(self) -> float:
        """Return the share of applicable cases that were refused, for a reason that is right or not known, in percent."""
        return round(100 * (self.right + self.unknown) / self.applicable, 1) if self.applicable else 0.0


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The counts, and how much of what could be tried was refused, in percent."""

    total: Counts
    suites: dict[str, Counts]
    controls: dict[str, Counts]
    score: float


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``report.json``. ``started`` is RFC 3339; ``problems`` is what was wrong with the run itself."""

    schema: int
    target: str
    started: str
    kit_version: str
    ok: bool
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    cases: tuple[CaseResult, ...]
    summary: Summary


def count(cases: Iterable[CaseResult]) -> Counts:
    """Return the counts of ``cases``."""
    found = dict.fromkeys(Counts.__struct_fields__, 0)
    for case in cases:
        if case.result == "refused":
            name = "twin_broken" if case.twin.result == "broken" else "right" if case.reason_ok else "unknown"
        else:
            name = case.result
        found[name] += 1
    return Counts(**found)


def make(target: str, started: str, cases: list[CaseResult], problems: list[str], notes: list[str]) -> Report:
    """Return the report of a run. It is ok when something was tried and nobody must look at anything."""
    total = count(cases)
    suites = {name: count(case for case in cases if case.suite == name) for name in SUITES}
    controls = {
        name: count(case for case in cases if case.control == name) for name in sorted({c.control for c in cases})
    }
    summary = Summary(
        total, {name: found for name, found in suites.items() if found != Counts()}, controls, total.score
    )
    ok = total.applicable > 0 and not problems and not any(case.finding for case in cases)
    return Report(SCHEMA, target, started, saw.__version__, ok, tuple(problems), tuple(notes), tuple(cases), summary)


def encode(report: Report) -> bytes:
    """Return the report as JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def load(path: Path | str) -> Report:
    """Read a report; raise :class:`ConfigError` naming file and field."""
    try:
        report = jsontext.decode(Path(path).read_bytes(), kind=Report)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", cure="check the path") from error
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path} is no conformance report: {error}", cure="make it with saw conformance run"
        ) from error
    if report.schema != SCHEMA:
        raise ConfigError(f"{path} has schema {report.schema}, not {SCHEMA}", cure="make it again with this version")
    return report
