"""Known vulnerabilities of an image, and the gate that they have to pass.

debsbom matches the Debian packages of a bill of materials with the database of Debian's security tracker (one JSON file that an
organisation mirrors); :mod:`saw.image.advisories` matches those of PyPI and npm. What the gate asks is ours: no released fix is
missing, nothing of an urgency or worse is open, unless somebody answers for it until a day.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from saw.image.disk import ImageError, digest_of, run
from saw.image.sbom import components, tool
from saw.strict_yaml import read_strict_yaml
from saw.waivers import good_on, refuse_empty

Urgency = Literal["high", "medium", "low", "unimportant", "end-of-life", "not-yet-assigned"]
URGENCIES: tuple[Urgency, ...] = ("high", "medium", "low", "unimportant", "end-of-life", "not-yet-assigned")
"""From the worst on, as Debian's security tracker names them; the last is what nobody has judged yet."""
KERNEL = "linux"
"""A source package that every image and every whole database has: a database without it is not one."""
PAGE = "docs/images.md"
Ecosystem = Literal["debian", "pypi", "npm"]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]


class Waiver(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A vulnerability of a package that ``owner`` answers for until a day (inclusive). ``cve`` may be any of its ids.

    Of ``debian`` it is a source package; of ``pypi`` and ``npm`` the name in its usual form (PEP 503, scope included).
    """

    cve: Text
    package: Text
    owner: Text
    reason: Text
    expires: date
    ecosystem: Ecosystem = "debian"

    @property
    def about(self) -> str:
        """What it is about, in words."""
        return f"{self.cve} in {_named(self.ecosystem, self.package)}"

    def covers(self, finding: Finding) -> bool:
        """Whether it is about this finding."""
        same = (self.ecosystem, self.package) == (finding.ecosystem, finding.package)
        return same and self.cve in (finding.cve, *finding.aliases)


class Waivers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of waivers."""

    waivers: tuple[Waiver, ...]


class Finding(msgspec.Struct, frozen=True):
    """One vulnerability that a package of the image has, a source package of Debian's. ``fixed_in`` is empty while no fix is
    released. ``cve`` is its number, or another id where it has none; ``aliases`` are its other ids."""

    cve: str
    package: str
    version: str
    urgency: Urgency
    fixed_in: str = ""
    ecosystem: Ecosystem = "debian"
    aliases: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Package and version, in words."""
        return f"{_named(self.ecosystem, self.package)} {self.version}"


class Verdict(msgspec.Struct, frozen=True):
    """What the gate says; it passes when ``problems`` is empty. ``waived_until`` is the first end of a waiver in use."""

    problems: tuple[str, ...]
    open: tuple[Finding, ...]
    waived: tuple[Finding, ...]
    unused: tuple[str, ...]
    waived_until: date | None = None


def read_waivers(path: Path | str) -> tuple[Waiver, ...]:
    """Read waivers; raises :class:`ConfigError` that names file, reason and cure."""
    waivers = read_strict_yaml(path, Waivers, "file of waivers", PAGE).waivers
    refuse_empty(path, waivers, ("cve", "package", "owner", "reason"))
    return waivers


def read_database(path: Path, suite: str, *, longest: timedelta, now: datetime) -> str:
    """Check the tracker's database and return its SHA-256; raises :class:`ImageError` when it says nothing or is old.

    Its age is that of the file: whoever mirrors it keeps the time of the download.
    """
    try:
        found = json.loads(path.read_bytes())
        modified = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}", cure="name the mirrored database") from error
    except ValueError as error:
        raise ImageError(f"{path} is no JSON: {error}", cure="download it again") from error
    kernel = found.get(KERNEL) if isinstance(found, dict) else None
    known = isinstance(kernel, dict) and any(
        suite in cve.get("releases", {}) for cve in kernel.values() if isinstance(cve, dict)
    )
    if not known:
        raise ImageError(
            f"{path} knows nothing of {KERNEL} in {suite}: it is not the whole database of Debian's security tracker",
            cure="download it again",
        )
    if now - modified > longest:
        raise ImageError(
            f"{path} is {(now - modified).days} days old, more than {longest.days}", cure="download it again"
        )
    return digest_of(path)


def scan(bill: Path, database: Path, suite: str) -> tuple[Finding, ...]:
    """Return what the Debian packages of ``bill`` (CycloneDX or SPDX) have, worst first; see :func:`read_database`."""
    if not any(name == KERNEL for name, _ in components(bill)):
        raise ImageError(f"{bill} lists no {KERNEL}: it is not a bill of an image", cure="take sbom/debian.cdx.json")
    return match(bill, database, suite)


def match(bill: Path, database: Path, suite: str) -> tuple[Finding, ...]:
    """Return what the Debian packages of any bill have, worst first; a host in a container has no kernel, for example."""
    text = run(tool("debsbom"), "--json", "sec-scan", "--db", str(database), "--distro", suite, str(bill))
    try:
        found = {_finding(json.loads(line)) for line in text.splitlines() if line.strip()}
    except (KeyError, TypeError, ValueError) as error:
        raise ImageError(f"what debsbom found cannot be read: {error}", cure="report this") from error
    return worst_first(found)


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings in the order of reports."""
    return tuple(sorted(findings, key=lambda one: (URGENCIES.index(one.urgency), one.ecosystem, one.package, one.cve)))


def judge(findings: Iterable[Finding], waivers: Iterable[Waiver], *, fail_on: Urgency, today: date) -> Verdict:
    """Hold ``findings`` against the gate: a released fix that is missing, or an urgency of ``fail_on`` and worse, needs a waiver.

    Waivers are good up to and including their day; one that ran out is a problem of its own.
    """
    findings = tuple(findings)
    valid, ran_out = good_on(waivers, today)
    worst = URGENCIES[: URGENCIES.index(fail_on) + 1]
    waived = tuple(one for one in findings if any(waiver.covers(one) for waiver in valid))
    left = tuple(one for one in findings if one not in waived)
    problems = [*ran_out]
    problems += [
        f"{one.cve} in {one.where} is fixed in {one.fixed_in}"
        if one.fixed_in
        else f"{one.cve} in {one.where} is open and its urgency is {one.urgency}"
        for one in left
        if one.fixed_in or one.urgency in worst
    ]
    used = [waiver for waiver in valid if any(waiver.covers(one) for one in findings)]
    return Verdict(
        problems=tuple(problems),
        open=left,
        waived=waived,
        unused=tuple(waiver.about for waiver in valid if waiver not in used),
        waived_until=min((waiver.expires for waiver in used), default=None),
    )


def _named(ecosystem: Ecosystem, package: str) -> str:
    return package if ecosystem == "debian" else f"{ecosystem} package {package}"


def _finding(told: dict[str, Any]) -> Finding:
    package, _, version = str(told["package"]).rpartition("@")
    about = told["vulnerability"]
    fixed = about.get("fixed-in", "") if about["status"] == "resolved" else ""
    return msgspec.convert(
        {"cve": about["id"], "package": package, "version": version, "urgency": about["urgency"], "fixed_in": fixed},
        Finding,
    )
