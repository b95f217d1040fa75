"""Known vulnerabilities of hosts: what ``saw patch status --packages`` told, held against Debian's security tracker.

Matching and judging are those of images (``saw.image.vulnerabilities``), on the controller; hosts need no database and no tools.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import msgspec

from saw import jsontext
from saw.audit.events import EventFactory, Severity, Subject
from saw.errors import ConfigError
from saw.image.vulnerabilities import Finding, Urgency, match

KIND = "known_vulnerability"
#: One event names so many vulnerabilities of a package; the others are counted.
AT_ONCE = 50
_SEVERITY: dict[Urgency, Severity] = {"high": "high", "medium": "medium", "low": "low"}
_ORDER: tuple[Severity, ...] = ("informational", "low", "medium", "high")


class Source(msgspec.Struct, frozen=True):
    """A source package that something on the host was built from. What a host tells is data of a stranger, so it is bounded."""

    source: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9+.-]{1,127}\Z")]
    source_version: Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z.+:~-]{1,128}\Z")]


class Told(msgspec.Struct, frozen=True):
    """The part of ``saw patch status --json --packages`` that counts here."""

    packages: Annotated[tuple[Source, ...], msgspec.Meta(min_length=1, max_length=100_000)]


def read_told(path: Path) -> Told:
    """Read what a host told; raises :class:`ConfigError` that names file, reason and cure."""
    try:
        return jsontext.decode(path.read_bytes(), kind=Told)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", cure="name a readable file") from error
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path} is no answer of `saw patch status --json --packages`: {error}", cure="ask the host again"
        ) from error


def vulnerabilities_of(told: Told, database: Path, suite: str) -> tuple[Finding, ...]:
    """Return what the host's packages have, worst first; ``database`` was checked with ``read_database``."""
    with tempfile.TemporaryDirectory(prefix="saw-patch-") as folder:
        bill = Path(folder) / "packages.cdx.json"
        bill.write_text(json.dumps(bill_of(told)), encoding="utf-8")
        return match(bill, database, suite)


def bill_of(told: Told) -> dict[str, Any]:
    """Return a CycloneDX 1.6 bill (ECMA-424) of the source packages, each by its package URL."""
    sources = sorted({(one.source, one.source_version) for one in told.packages})
    parts = [
        {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:deb/debian/{quote(name, safe='')}@{quote(version, safe='')}?arch=source",
        }
        for name, version in sources
    ]
    components = [{**part, "bom-ref": part["purl"]} for part in parts]
    host = {"type": "operating-system", "name": "host", "bom-ref": "host"}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": host},
        "components": components,
        "dependencies": [{"ref": one["bom-ref"]} for one in (host, *components)],
    }


def events_of(
    host: str,
    findings: Iterable[Finding],
    factory: EventFactory,
    time: datetime,
    about: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return an OCSF 1.8 Vulnerability Finding (class 2002) for each source package of ``host``; ``about`` goes into each."""
    by_package: dict[tuple[str, str, str], list[Finding]] = {}
    for one in findings:
        by_package.setdefault((one.ecosystem, one.package, one.version), []).append(one)
    return [
        factory.vulnerability_finding(
            time,
            Subject(principal="saw-patching"),
            kind=KIND,
            title=f"{package} {version} on {host} has {len(found)} known vulnerabilities",
            vulnerabilities=[_vulnerability(one) for one in found[:AT_ONCE]],
            severity=max((_SEVERITY.get(one.urgency, "informational") for one in found), key=_ORDER.index),
            detail={
                "host": host,
                "package": package,
                **({} if ecosystem == "debian" else {"ecosystem": ecosystem}),
                "count": len(found),
                "fixed": sum(bool(f.fixed_in) for f in found),
                **(about or {}),
            },
        )
        for (ecosystem, package, version), found in by_package.items()
    ]


def _vulnerability(one: Finding) -> dict[str, Any]:
    manager = {"debian": "dpkg", "pypi": "pip", "npm": "npm"}[one.ecosystem]
    package = {"name": one.package, "version": one.version, "package_manager": manager}
    return {
        "cve": {"uid": one.cve},  # or another id, where nobody gave it a number yet
        "severity": one.urgency,
        "is_fix_available": bool(one.fixed_in),
        "affected_packages": [{**package, **({"fixed_in_version": one.fixed_in} if one.fixed_in else {})}],
    }


__all__ = ["AT_ONCE", "KIND", "Source", "Told", "bill_of", "events_of", "read_told", "vulnerabilities_of"]
