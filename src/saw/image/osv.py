"""Which versions an advisory in the format of OSV concerns, by the rules of each ecosystem.

Source: the OSV schema 1.7 (ossf.github.io/osv-schema). Versions are compared by kept libraries: those of PyPI by ``packaging``
(PEP 440), those of npm by ``semver`` (Semantic Versioning 2.0.0). What cannot be compared counts as concerned, and so does every
version of a package of which an advisory names none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, cast

import msgspec
from cvss import CVSS2, CVSS3, CVSS4  # type: ignore[import-untyped]
from cvss.exceptions import CVSSError  # type: ignore[import-untyped]
from packaging.utils import canonicalize_name
from packaging.version import Version as PythonVersion
from semver import Version as NpmVersion

from saw.image.vulnerabilities import URGENCIES, Urgency

Ecosystem = Literal["pypi", "npm"]
NAMES: dict[str, Ecosystem] = {"PyPI": "pypi", "npm": "npm"}
"""Ecosystems that are looked at, as OSV writes them."""
MALICIOUS = "MAL-"
"""Ids of advisories on packages that were made to do harm (OpenSSF); they state no severity."""
_WORDS: dict[str, Urgency] = {
    "critical": "high", "high": "high", "moderate": "medium", "medium": "medium", "low": "low",
}  # fmt: skip
_SCORERS: dict[str, Callable[[str], Any]] = {"CVSS_V2": CVSS2, "CVSS_V3": CVSS3, "CVSS_V4": CVSS4}


class Event(msgspec.Struct, frozen=True):
    """A step of a range; exactly one is set. ``introduced`` ``0`` is before every version."""

    introduced: str | None = None
    fixed: str | None = None
    last_affected: str | None = None


class Range(msgspec.Struct, frozen=True):
    """``type`` is SEMVER, ECOSYSTEM or GIT; the last names commits and says nothing of released versions."""

    type: str
    events: tuple[Event, ...] = ()


class Severity(msgspec.Struct, frozen=True):
    """A score: of types that begin with ``CVSS_`` it is a vector."""

    type: str
    score: str


class Package(msgspec.Struct, frozen=True):
    """``ecosystem`` may have a part after a colon."""

    name: str
    ecosystem: str


class Affected(msgspec.Struct, frozen=True):
    """A package, and which of its versions: those listed, and those in any of the ranges."""

    package: Package | None = None
    ranges: tuple[Range, ...] | None = None
    versions: tuple[str, ...] | None = None
    severity: tuple[Severity, ...] | None = None


class Advisory(msgspec.Struct, frozen=True):
    """The part of an OSV record that counts here; others are ignored, as the schema asks."""

    id: str
    modified: datetime
    withdrawn: datetime | None = None
    aliases: tuple[str, ...] | None = None
    affected: tuple[Affected, ...] | None = None
    severity: tuple[Severity, ...] | None = None
    database_specific: Any = None


@dataclass(frozen=True)
class Component:
    """A package of a bill, by its normalised name."""

    ecosystem: Ecosystem
    name: str
    version: str


@dataclass(frozen=True)
class Match:
    """What an advisory says of a component. ``fixed_in`` is the first version without it after this one, or empty."""

    advisory: Advisory
    fixed_in: str
    urgency: Urgency


def normalised(ecosystem: Ecosystem, name: str) -> str:
    """Return the one form of a package's name: PEP 503 for PyPI, as it stands for npm."""
    return canonicalize_name(name) if ecosystem == "pypi" else name


def ecosystem_of(affected: Affected) -> Ecosystem | None:
    """Return whose package it is, or None where that is not looked at."""
    return NAMES.get(affected.package.ecosystem.partition(":")[0]) if affected.package else None


def match(component: Component, advisory: Advisory) -> Match | None:
    """Return what ``advisory`` says of a component, or None where it does not concern it. A withdrawn one concerns nothing.

    Raises :class:`ValueError` where the component's own version is none of its ecosystem.
    """
    if advisory.withdrawn is not None:
        return None
    version = _version(component.ecosystem, component.version)
    about = [
        one
        for one in advisory.affected or ()
        if one.package
        and ecosystem_of(one) == component.ecosystem
        and normalised(component.ecosystem, one.package.name) == component.name
    ]
    hits = [found for one in about if (found := _concerned(version, component, one)) is not None]
    if not hits:
        return None
    fixes = [fix for fix, _ in hits if fix]
    severities = [severity for _, one in hits for severity in one.severity or ()] or list(advisory.severity or ())
    return Match(
        advisory,
        # Several lines of the same package are all to be left, so the furthest fix counts; none where one of them has none.
        fixed_in=latest(component.ecosystem, fixes) if len(fixes) == len(hits) else "",
        urgency=urgency_of(advisory, severities),
    )


def urgency_of(advisory: Advisory, severities: Iterable[Severity]) -> Urgency:
    """Return the worst of what the database says in words and what its vectors score (CVSS: 7 is high, 4 is medium)."""
    found: list[Urgency] = ["high"] if advisory.id.startswith(MALICIOUS) else []
    word = advisory.database_specific.get("severity") if isinstance(advisory.database_specific, dict) else None
    if isinstance(word, str) and word.lower() in _WORDS:
        found.append(_WORDS[word.lower()])
    found += [urgency for one in severities if (urgency := _scored(one))]
    return min(found, key=URGENCIES.index, default="not-yet-assigned")


def _scored(severity: Severity) -> Urgency | None:
    scorer = _SCORERS.get(severity.type)
    if scorer is None:
        return None
    try:
        score = float(scorer(severity.score).scores()[0])
    except (CVSSError, ValueError, KeyError, TypeError):
        return None
    return "high" if score >= 7 else "medium" if score >= 4 else "low" if score > 0 else "unimportant"


def _concerned(version: Any, component: Component, affected: Affected) -> tuple[str, Affected] | None:
    """Return the first fix (or an empty text) and ``affected``, where it concerns ``version``."""
    ecosystem = component.ecosystem
    ranges = [one for one in affected.ranges or () if one.type in ("SEMVER", "ECOSYSTEM") and one.events]
    if not ranges and not affected.versions:
        return "", affected
    hits = [fix for one in ranges if (fix := in_range(ecosystem, version, one)) is not None]
    if hits:
        fixes = [fix for fix in hits if fix]
        return (latest(ecosystem, fixes) if len(fixes) == len(hits) else ""), affected
    if any(_same(ecosystem, version, component.version, listed) for listed in affected.versions or ()):
        return "", affected
    return None


def in_range(ecosystem: Ecosystem, version: Any, about: Range) -> str | None:
    """Return the first fix after ``version`` (empty: none) where it lies in a range, else None."""
    try:
        steps = sorted(_steps(ecosystem, about.events), key=lambda step: step[:3])
    except ValueError:
        return ""
    inside = False
    for _, point, order, _ in steps:
        if order == _INTRODUCED and (point is None or version >= point):
            inside = True
        elif (order == _FIXED and version >= point) or (
            order == _LAST and _released(ecosystem, version, point) > point
        ):
            inside = False
    if not inside:
        return None
    return next((text for _, point, order, text in steps if order == _FIXED and point > version), "")


_FIXED, _INTRODUCED, _LAST = range(3)
"""The order at one version: what is fixed and comes again there is there; what is there last was there."""


def _steps(ecosystem: Ecosystem, events: Iterable[Event]) -> Iterable[tuple[bool, Any, int, str]]:
    """Yield whether a step is after the start, its version (None: the start), its kind, and the version in words."""
    for event in events:
        for text, kind in ((event.fixed, _FIXED), (event.introduced, _INTRODUCED), (event.last_affected, _LAST)):
            if text is None:
                continue
            point = None if kind == _INTRODUCED and text == "0" else _version(ecosystem, text)
            yield point is not None, point, kind, text


def _version(ecosystem: Ecosystem, text: str) -> Any:
    """Return a version that can be compared; raises :class:`ValueError`."""
    if ecosystem == "pypi":
        return PythonVersion(text)  # InvalidVersion is a ValueError
    try:
        return NpmVersion.parse(text.strip().removeprefix("v"), optional_minor_and_patch=True)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _released(ecosystem: Ecosystem, version: Any, limit: Any) -> Any:
    """Return ``version`` without its local part (``2.0+cu118`` is a build of ``2.0``), unless ``limit`` has one."""
    if ecosystem != "pypi" or limit.local:
        return version
    return PythonVersion(version.public)


def _same(ecosystem: Ecosystem, version: Any, text: str, listed: str) -> bool:
    try:
        other = _version(ecosystem, listed)
    except ValueError:
        return text == listed
    return bool(_released(ecosystem, version, other) == other if ecosystem == "pypi" else version == other)


def latest(ecosystem: Ecosystem, texts: Iterable[str]) -> str:
    """Return the greatest of versions that can all be compared, or an empty text where there is none."""
    return max(texts, key=lambda text: cast("Any", _version(ecosystem, text)), default="")


__all__ = ["NAMES", "Advisory", "Component", "Match", "ecosystem_of", "latest", "match", "normalised"]
