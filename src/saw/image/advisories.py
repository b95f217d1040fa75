"""Known vulnerabilities of an image's PyPI and npm packages: advisories that an operator mirrors, matched with its bills.

    export.zip           an OSV export of one ecosystem, or of several
    folder               such archives, and records as .json files, at any depth
    https://mirror/osv   fetched as URL/PyPI/all.zip and URL/npm/all.zip, as OSV lays them out

A record that cannot be read ends the search: an export is taken whole or not at all. How old an export is, its newest record
says, so that a copied or unpacked file is no younger than what it holds. Each archive is judged by itself, and so are the .json
files of each place together: the largest about an ecosystem has to be fresh, so that a new record of one's own renews no old one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
from packageurl import PackageURL

from saw import jsontext
from saw.https import https_client
from saw.image.disk import ImageError, digest_of
from saw.image.osv import NAMES, Advisory, Component, Ecosystem, Match, ecosystem_of, latest, match, normalised
from saw.image.vulnerabilities import URGENCIES, Finding, worst_first

OWN = "secure-agent-workspace"
"""The distribution of this project; no registry has it."""
LARGEST_RECORD = 16 * 1024 * 1024
LARGEST_EXPORT = 4 * 1024 * 1024 * 1024
"""Bytes of a record, and of an export that is fetched."""
LEAST = 1000
"""Records that the largest export about an ecosystem has to have. Those of PyPI and npm have had many thousands for years; what
is smaller is cut off, or somebody's own."""
_TIMEOUT_S = 60.0
_AHEAD = timedelta(days=1)
"""How far a record's time may lie ahead of this machine's clock."""
_CURE = "mirror it again, whole"


class Advisories(msgspec.Struct, frozen=True):
    """What was read: SHA-256 over the files, and of each ecosystem the number of records and the largest export's newest."""

    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    records: dict[str, int]
    newest: dict[str, datetime]


@dataclass(frozen=True)
class Found:
    """What a search found and what it rests on."""

    about: Advisories
    findings: tuple[Finding, ...]


def components_of(bills: Iterable[Path]) -> tuple[Component, ...]:
    """Return the PyPI and npm packages of CycloneDX bills; raises :class:`ImageError` where one has none, or names no version."""
    found: set[Component] = set()
    for bill in bills:
        try:
            listed = json.loads(bill.read_bytes()).get("components", [])
            urls = [PackageURL.from_string(one["purl"]) for one in listed if "purl" in one]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ImageError(f"{bill} cannot be read as a bill: {error}", cure="build the image again") from error
        here = [url for url in urls if url.type in NAMES.values()]
        if len(here) != len(listed) or not here:
            raise ImageError(
                f"{bill} lists {len(listed)} components, {len(here)} of them with the address of a package",
                cure="take the bills that the build made: sbom/python.cdx.json and sbom/npm.cdx.json",
            )
        for url in here:
            kind: Ecosystem = "npm" if url.type == "npm" else "pypi"
            name = f"{url.namespace}/{url.name}" if url.namespace else url.name
            if not url.version:
                raise ImageError(f"{bill} names no version of {name}", cure="build the image again")
            found.add(Component(kind, normalised(kind, name), url.version))
    return tuple(sorted(found - {one for one in found if one.name == OWN}, key=lambda one: (one.ecosystem, one.name)))


class _Held:
    """The newest record of each id, where it is about one of ``names``. An older one of the same id says nothing any more."""

    def __init__(self, names: set[tuple[Ecosystem, str]]) -> None:
        self._names = names
        self._records: dict[str, tuple[datetime, Advisory | None]] = {}

    def take(self, advisory: Advisory) -> set[str]:
        """Take a record over, or not; return its ecosystems."""
        keys = {
            (kind, normalised(kind, one.package.name))
            for one in advisory.affected or ()
            if one.package and (kind := ecosystem_of(one))
        }
        known = self._records.get(advisory.id)
        if known is None or known[0] < advisory.modified:
            self._records[advisory.id] = (advisory.modified, advisory if keys & self._names else None)
        return {kind for kind, _ in keys}

    def by_name(self) -> dict[tuple[str, str], list[Advisory]]:
        """Return what is held, by ecosystem and name."""
        found: dict[tuple[str, str], list[Advisory]] = {}
        for _, advisory in self._records.values():
            for one in (advisory.affected or ()) if advisory else ():
                if advisory and one.package and (kind := ecosystem_of(one)):
                    listed = found.setdefault((kind, normalised(kind, one.package.name)), [])
                    if advisory not in listed[-1:]:
                        listed.append(advisory)
        return found


class _Counted:
    """How many records each export has about each ecosystem, and the time of the newest."""

    def __init__(self, wanted: Iterable[Ecosystem]) -> None:
        self._wanted = set(wanted)
        self._found: dict[tuple[str, str], tuple[int, datetime]] = {}

    def count(self, export: str, kinds: Iterable[str], modified: datetime) -> None:
        """Count a record of ``export`` that is about ``kinds``."""
        for kind in self._wanted.intersection(kinds):
            number, newest = self._found.get((kind, export), (0, modified))
            self._found[kind, export] = number + 1, max(newest, modified)

    def fresh(self, *, longest: timedelta, now: datetime) -> tuple[dict[str, int], dict[str, datetime]]:
        """Return records and newest as :class:`Advisories` has them; raises :class:`ImageError`, see :func:`read`."""
        records: dict[str, int] = {}
        newest: dict[str, datetime] = {}
        for kind in sorted(self._wanted):
            exports = [found for (about, _), found in self._found.items() if about == kind]
            if not exports:
                raise ImageError(f"no advisory given is about {kind}, and the image has packages of it", cure=_CURE)
            most, at = max(exports)
            if most < LEAST:
                raise ImageError(
                    f"the largest export has {most} advisories about {kind}, fewer than {LEAST}: that is not all of them",
                    cure="mirror it whole; advisories of your own come beside an export",
                )
            if now - at > longest:
                raise ImageError(
                    f"the newest advisory about {kind} is {(now - at).days} days old, more than {longest.days}",
                    cure=_CURE,
                )
            last = max(time for _, time in exports)
            if last - now > _AHEAD:
                raise ImageError(
                    f"the newest advisory about {kind} is of {last:%Y-%m-%d}, which is to come",
                    cure="set this machine's clock, or mirror the advisories again",
                )
            records[kind], newest[kind] = sum(number for number, _ in exports), at
        return records, newest


class Known:
    """Advisories that were read for some packages, to be held against the bills of several images."""

    def __init__(self, about: Advisories, names: set[tuple[Ecosystem, str]], held: _Held) -> None:
        self.about = about
        self._names = names
        self._by_name = held.by_name()

    def findings(self, components: Iterable[Component]) -> tuple[Finding, ...]:
        """Return what they say of ``components``; raises :class:`ImageError` where they were not read for one of them."""
        found: list[Finding] = []
        for one in components:
            if (one.ecosystem, one.name) not in self._names:
                raise ImageError(f"no advisories were read for {one.ecosystem} package {one.name}", cure="try again")
            found += _findings(one, self._by_name)
        return worst_first(found)


def read(components: Iterable[Component], sources: Sequence[str], *, longest: timedelta, now: datetime) -> Known:
    """Read what ``sources`` say of ``components``, once; see the module.

    Raises :class:`ImageError` where for an ecosystem of them there is no advisory, the largest export has fewer than
    :data:`LEAST` or none that is younger than ``longest``, or one is of a time to come.
    """
    names = {(one.ecosystem, one.name) for one in components}
    wanted = sorted({ecosystem for ecosystem, _ in names})
    counted, held = _Counted(wanted), _Held(names)
    with tempfile.TemporaryDirectory(prefix="saw-advisories-") as folder:
        files = [(source, file) for source in sources for file in _files(source, wanted, Path(folder))]
        total = hashlib.sha256()
        for digest in sorted(digest_of(file) for _, file in files):
            total.update(f"{digest}\n".encode())
        for source, file in files:
            export = source if file.suffix == ".json" else str(file)
            for advisory in _records(file):
                counted.count(export, held.take(advisory), advisory.modified)
    records, newest = counted.fresh(longest=longest, now=now)
    return Known(Advisories(total.hexdigest(), records, newest), names, held)


def search(bills: Sequence[Path], sources: Sequence[str], *, longest: timedelta, now: datetime) -> Found:
    """Match the packages of ``bills`` with the advisories of ``sources``; raises :class:`ImageError` as :func:`read` does."""
    components = components_of(bills)
    known = read(components, sources, longest=longest, now=now)
    return Found(known.about, known.findings(components))


def _findings(component: Component, by_name: dict[tuple[str, str], list[Advisory]]) -> Iterator[Finding]:
    """Yield one finding for each vulnerability, however many databases have an advisory on it."""
    try:
        hits = [
            hit
            for one in by_name.get((component.ecosystem, component.name), [])
            if (hit := match(component, one)) is not None
        ]
    except ValueError as error:
        raise ImageError(
            f"{component.version!r} of {component.ecosystem} package {component.name} is no version: {error}",
            cure="build the image again, with a released version",
        ) from error
    for group in _same_ones(hits):
        ids = {name for hit in group for name in (hit.advisory.id, *(hit.advisory.aliases or ()))}
        first, *others = sorted(ids, key=_rank)
        fixes = [hit.fixed_in for hit in group if hit.fixed_in]
        yield Finding(
            cve=first,
            package=component.name,
            version=component.version,
            urgency=min((hit.urgency for hit in group), key=URGENCIES.index),
            fixed_in=latest(component.ecosystem, fixes),
            ecosystem=component.ecosystem,
            aliases=tuple(others),
        )


def _same_ones(hits: Sequence[Match]) -> list[list[Match]]:
    """Put together what shares an id, directly or by others between."""
    groups: list[tuple[set[str], list[Match]]] = []
    for hit in hits:
        ids = {hit.advisory.id, *(hit.advisory.aliases or ())}
        joined = [group for group in groups if group[0] & ids]
        rest = [group for group in groups if not group[0] & ids]
        names = ids.union(*(group[0] for group in joined))
        groups = [*rest, (names, [*(one for group in joined for one in group[1]), hit])]
    return [members for _, members in groups]


def _rank(name: str) -> tuple[int, str]:
    order = ("CVE-", "GHSA-", "PYSEC-")
    return next((index for index, prefix in enumerate(order) if name.startswith(prefix)), len(order)), name


def _files(source: str, wanted: Iterable[str], folder: Path) -> Iterator[Path]:
    if "://" in source:
        yield from (_fetched(source, kind, folder) for kind in wanted)
        return
    path = Path(source)
    if path.is_dir():
        files = sorted(one for one in path.rglob("*") if one.suffix in (".zip", ".json") and one.is_file())
        if not files:
            raise ImageError(f"{path} has neither .zip nor .json files", cure="name an OSV export")
        yield from files
    elif path.is_file():
        yield path
    else:
        raise ImageError(f"cannot read {path}: no such file or folder", cure="name an OSV export")


def _fetched(source: str, kind: str, folder: Path) -> Path:
    """Fetch the export of an ecosystem from a mirror, over TLS alone."""
    if not source.startswith("https://"):
        raise ImageError(f"{source} is no https address", cure="name a mirror with TLS, or a file")
    name = next(osv for osv, ours in NAMES.items() if ours == kind)
    address = f"{source.rstrip('/')}/{name}/all.zip"
    target = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:12]}-{kind}.zip"
    size = 0
    try:
        with https_client(source, None, _TIMEOUT_S, "advisories") as client, client.stream("GET", address) as answer:
            if answer.status_code != 200:
                raise ImageError(f"{address} answered {answer.status_code}", cure="look at the mirror")
            with target.open("wb") as out:
                for part in answer.iter_bytes():
                    size += len(part)
                    if size > LARGEST_EXPORT:
                        raise ImageError(f"{address} has more than {LARGEST_EXPORT} bytes", cure="look at the mirror")
                    out.write(part)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(f"{address} cannot be fetched: {error}", cure="look at the mirror, or name a file") from error
    return target


def _records(file: Path) -> Iterator[Advisory]:
    if file.suffix == ".json":
        if file.stat().st_size > LARGEST_RECORD:
            raise ImageError(f"{file} has more than {LARGEST_RECORD} bytes", cure=_CURE)
        yield _advisory(file.read_bytes(), str(file))
        return
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if not entry.filename.endswith(".json"):
                    continue
                if entry.file_size > LARGEST_RECORD:
                    raise ImageError(f"{entry.filename} in {file} has more than {LARGEST_RECORD} bytes", cure=_CURE)
                yield _advisory(archive.read(entry), f"{entry.filename} in {file}")
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
        raise ImageError(f"{file} cannot be read as an archive: {error}", cure=_CURE) from error


def _advisory(raw: bytes, place: str) -> Advisory:
    try:
        found = jsontext.decode(raw, kind=Advisory)
    except msgspec.DecodeError as error:
        raise ImageError(f"{place} is no OSV record: {error}", cure=_CURE) from error
    if found.modified.tzinfo is None:
        return msgspec.structs.replace(found, modified=found.modified.replace(tzinfo=UTC))
    return found


__all__ = ["LEAST", "Advisories", "Found", "Known", "components_of", "read", "search"]
