"""What counts as good enough: a floor under the score, no warning without a waiver, no waiver after its day."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import msgspec

from saw.baseline.report import Finding, Report
from saw.errors import ConfigError, SawError
from saw.strict_yaml import read_strict_yaml
from saw.waivers import good_on, refuse_empty


class Waiver(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finding that somebody answers for until a day (inclusive). ``details`` narrows it to one finding of a test."""

    test: str
    owner: str
    reason: str
    expires: date
    details: str = ""

    @property
    def about(self) -> str:
        """What it is about, in words."""
        return self.test

    def covers(self, finding: Finding) -> bool:
        """Whether it is about this finding."""
        return finding.test == self.test and self.details in {"", finding.details}


class Floor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The least hardening index (0 to 100) of a scanner, and the waivers."""

    scanner: str
    index: int
    waivers: tuple[Waiver, ...] = ()


class Verdict(msgspec.Struct, frozen=True):
    """``problems`` is empty when all is well. Waived findings, and waivers that no finding needs, are named besides."""

    index: int
    floor: int | None
    problems: tuple[str, ...]
    open: tuple[Finding, ...]
    waived: tuple[Finding, ...]
    unused: tuple[str, ...]


class Comparison(msgspec.Struct, frozen=True):
    """Two scans of one host by the same scanner; ``problems`` is empty when the second is no worse."""

    before: int
    after: int
    problems: tuple[str, ...]
    new: tuple[Finding, ...]
    gone: tuple[Finding, ...]


class CompareError(SawError):
    """Two reports say nothing about each other."""

    code = "reports_differ"


def read_floor(path: Path | str) -> Floor:
    """Read a floor with its waivers; raises :class:`ConfigError` that names file, reason and cure."""
    floor = read_strict_yaml(path, Floor, "floor", "docs/baseline.md")
    if floor.scanner != "lynis" or not 0 <= floor.index <= 100:
        raise ConfigError(f"{path}: the scanner has to be lynis and the index 0 to 100", cure="correct them")
    refuse_empty(path, floor.waivers, ("test", "owner", "reason"))
    return floor


def judge(report: Report, floor: Floor | None, today: date) -> Verdict:
    """Hold ``report`` against ``floor``, if any; waivers are good up to and including their day."""
    waivers = floor.waivers if floor else ()
    valid, ran_out = good_on(waivers, today)
    findings = [*report.warnings, *report.suggestions]
    waived = [finding for finding in findings if any(waiver.covers(finding) for waiver in valid)]
    problems = []
    if floor and report.index < floor.index:
        problems.append(f"the hardening index is {report.index}, below the floor of {floor.index}")
    problems += ran_out
    problems += [f"warning {one.test}: {one.text}" for one in report.warnings if floor and one not in waived]
    return Verdict(
        index=report.index,
        floor=floor.index if floor else None,
        problems=tuple(problems),
        open=tuple(finding for finding in findings if finding not in waived),
        waived=tuple(waived),
        unused=tuple(waiver.test for waiver in valid if not any(waiver.covers(finding) for finding in findings)),
    )


def compare(before: Report, after: Report) -> Comparison:
    """Compare two scans; raises :class:`CompareError` when scanner or operating system are not the same."""
    for what, one, other in (
        ("scanner", f"{before.scanner} {before.version}", f"{after.scanner} {after.version}"),
        ("operating system", before.system, after.system),
    ):
        if one != other:
            raise CompareError(
                f"the reports are of another {what}: {one} and {other}", cure="scan both times with the same scanner"
            )
    old = {finding.identity for finding in (*before.warnings, *before.suggestions)}
    now = {finding.identity for finding in (*after.warnings, *after.suggestions)}
    new = tuple(one for one in (*after.warnings, *after.suggestions) if one.identity not in old)
    problems = []
    if after.index < before.index:
        problems.append(f"the hardening index fell from {before.index} to {after.index}")
    problems += [f"new warning {one.test}: {one.text}" for one in after.warnings if one.identity not in old]
    return Comparison(
        before=before.index,
        after=after.index,
        problems=tuple(problems),
        new=new,
        gone=tuple(one for one in (*before.warnings, *before.suggestions) if one.identity not in now),
    )
