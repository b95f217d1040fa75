"""The machine-readable report of Lynis (``lynis-report.dat``, report version 1), read strictly.

A report is lines ``name=value``; a name that ends with ``[]`` may come more than once. Of its several hundred names only those
below are used. A report that was cut off, that states one of them twice or that holds a finding of another shape is refused
rather than scored. Source: the scanner's own report of a finished run.
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import msgspec

from saw.errors import SawError

MAX_BYTES = 4 * 1024 * 1024
_LINE = re.compile(r"([A-Za-z0-9_.-]{1,64})(\[\])?=(.*)")
_TEST = re.compile(r"[A-Z]{2,12}(-[0-9]{4})?")
_FIELDS = 4
_FINDINGS = {"warning": "warnings", "suggestion": "suggestions"}
_NEEDED = (
    "report_version_major",
    "report_datetime_start",
    "report_datetime_end",
    "lynis_version",
    "os_fullname",
    "lynis_tests_done",
    "hardening_index",
    "finish",
)


class ReportError(SawError):
    """A scanner's report cannot be read, or says nothing that can be relied on."""

    code = "report_invalid"


class Finding(msgspec.Struct, frozen=True, order=True):
    """One warning or suggestion: the scanner's test, its text, and details and solution where it gives any."""

    test: str
    text: str
    details: str = ""
    solution: str = ""

    @property
    def identity(self) -> tuple[str, str, str]:
        """What makes two findings of two runs the same."""
        return (self.test, self.text, self.details)


class Report(msgspec.Struct, frozen=True):
    """A finished scan. ``index`` is the scanner's hardening index, 0 to 100; times are local to the scanned host."""

    scanner: str
    version: str
    system: str
    started: datetime
    ended: datetime
    tests: int
    index: int
    warnings: tuple[Finding, ...]
    suggestions: tuple[Finding, ...]


def read_report(path: Path | str) -> Report:
    """Read and parse the file ``path``; raises :class:`ReportError` that names file, reason and cure."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}", cure="name the report of a finished scan") from error
    return parse_report(raw, str(path))


def parse_report(raw: bytes, name: str = "report") -> Report:
    """Parse the bytes of a report; raises :class:`ReportError`."""

    def refuse(reason: str) -> ReportError:
        return ReportError(f"{name} is no report of a finished scan: {reason}", cure="scan again and take that report")

    if len(raw) > MAX_BYTES:
        raise refuse(f"it is larger than {MAX_BYTES} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise refuse(f"byte {error.start} is no UTF-8") from error
    values: dict[str, str] = {}
    found: dict[str, list[Finding]] = {"warning": [], "suggestion": []}
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.startswith("#"):
            continue
        if any(not (character.isprintable() or character == "\t") for character in line):
            raise refuse(f"line {number} holds a control character")
        match = _LINE.fullmatch(line)
        if match is None:
            raise refuse(f"line {number} is not name=value")
        key, many, value = match.groups()
        if key in _FINDINGS:
            if not many:
                raise refuse(f"line {number}: {key} has to be a list")
            finding = _finding(value)
            if finding is None:
                raise refuse(f"line {number}: this is no {key} with test, text, details and solution")
            found[key].append(finding)
        elif key in _NEEDED:
            if many or key in values:
                raise refuse(f"line {number} states {key} again")
            values[key] = value
    missing = [key for key in _NEEDED if key not in values]
    if missing:
        raise refuse(f"{missing[0]} is missing, the scan may have been cut off")
    if values["report_version_major"] != "1" or values["finish"] != "true":
        raise refuse("it is of an unknown version or unfinished")
    numbers = [_number(values[key]) for key in ("hardening_index", "lynis_tests_done")]
    times = [_time(values[key]) for key in ("report_datetime_start", "report_datetime_end")]
    index, tests = numbers
    started, ended = times
    if index is None or tests is None or index > 100:
        raise refuse("its hardening index or its number of tests is no number")
    if started is None or ended is None or ended < started:
        raise refuse("its times are none, or in the wrong order")
    return Report(
        scanner="lynis",
        version=values["lynis_version"],
        system=values["os_fullname"],
        started=started,
        ended=ended,
        tests=tests,
        index=index,
        warnings=tuple(found["warning"]),
        suggestions=tuple(found["suggestion"]),
    )


def _finding(value: str) -> Finding | None:
    parts = value.split("|")
    if len(parts) != _FIELDS + 1 or parts[-1] or not _TEST.fullmatch(parts[0]) or not parts[1].strip():
        return None
    details, solution = ("" if part.strip() == "-" else part.strip() for part in parts[2:4])
    return Finding(parts[0], parts[1].strip(), details, solution)


def _number(value: str) -> int | None:
    return int(value) if re.fullmatch(r"[0-9]{1,6}", value) else None


def _time(value: str) -> datetime | None:
    try:
        return datetime.strptime(value, "%Y-%m-%d %H:%M:%S")  # noqa: DTZ007 - the report has no zone
    except ValueError:
        return None


__all__ = ["MAX_BYTES", "Finding", "Report", "ReportError", "parse_report", "read_report"]
