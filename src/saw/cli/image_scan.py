"""``saw image scan`` and ``saw image evidence``: known vulnerabilities of an image, and the files that its record names."""

from __future__ import annotations

import argparse
import hashlib
import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from saw import jsontext
from saw.cli.operator_options import fields, show
from saw.cli.policy_signing import present
from saw.errors import ConfigError
from saw.files import write_atomic
from saw.policy.envelope import payload_of, read_envelope
from saw.policy.governance import duration

if TYPE_CHECKING:
    from saw.image.advisories import Found as PackagesFound

BILL = "sbom/debian.cdx.json"
PACKAGE_BILLS = ("sbom/python.cdx.json", "sbom/npm.cdx.json")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands to those of ``saw image``."""
    from saw.image.vulnerabilities import URGENCIES

    scan = commands.add_parser("scan", help="search an image for known vulnerabilities; 1 when the gate is not passed")
    scan.add_argument(
        "record", help="release.json beside the image, not signed yet; a passed search is written into it"
    )
    scan.add_argument("--database", required=True, type=Path, help="JSON of Debian's security tracker, as mirrored")
    add_advisories(scan)
    scan.add_argument("--waivers", type=Path, metavar="FILE", help="who answers for what until when (docs/images.md)")
    scan.add_argument("--suite", default="trixie", help="release of the distribution (default: %(default)s)")
    scan.add_argument(
        "--fail-on", default="high", choices=URGENCIES, help="this urgency and worse fail (default: %(default)s)"
    )
    scan.add_argument(
        "--max-age",
        default="7d",
        metavar="TIME",
        help="oldest database and advisories that count (default: %(default)s)",
    )
    scan.add_argument("--json", action="store_true", help="print JSON")
    evidence = commands.add_parser(
        "evidence", help="hold the files beside an image against its record; 1 when one differs"
    )
    evidence.add_argument("record", help="release record, signed or not")
    evidence.add_argument(
        "--image-directory", type=Path, metavar="DIR", help="where the files lie (default: the record's)"
    )
    evidence.add_argument(
        "--signed", type=Path, metavar="FILE", help="what officers signed: hold its record against this one, too"
    )
    evidence.add_argument(
        "--scanned-within",
        metavar="TIME",
        help="and that a search of this image, all packages, passed within this time",
    )
    evidence.add_argument("--json", action="store_true", help="print JSON")


def add_advisories(parser: argparse.ArgumentParser) -> None:
    """Add the option that names advisories on PyPI and npm packages."""
    parser.add_argument(
        "--advisories", action="append", default=[], metavar="PLACE",
        help="OSV export for PyPI and npm packages: archive, folder, or https mirror; can be repeated",
    )  # fmt: skip


def span(name: str, text: str) -> timedelta:
    """Read a time as ``7d``; raises :class:`ConfigError` that names the option."""
    try:
        return timedelta(seconds=duration(text))
    except ValueError as error:
        raise ConfigError(f"{name} {text!r}: {error}", cure="write for example 7d") from error


def scan(options: argparse.Namespace) -> int:
    """Search, judge, and write a passed search into the record; a failed one takes an earlier one out of it.

    What was found lies beside the image either way, in a file named by its content; the record names it where the search passed.
    Reports of earlier searches that passed stay there, since a signed record may name one.
    """
    from saw.attest.image_record import cve_report, is_cve_report
    from saw.image.vulnerabilities import judge, read_database, read_waivers
    from saw.image.vulnerabilities import scan as search

    file = Path(options.record)
    record = _record(file)
    bill = file.parent / BILL
    for name in (BILL, *(PACKAGE_BILLS if options.advisories else ())):
        if differing := _differing(record, file.parent, only=name):
            raise ConfigError(
                f"{file.parent / name} is not the one that {file} names: {differing[0]}", cure="build the image again"
            )
    longest = span("--max-age", options.max_age)
    waivers = read_waivers(options.waivers) if options.waivers else ()
    now = present()
    digest = read_database(options.database, options.suite, longest=longest, now=now)
    packages = _packages(options, [file.parent / name for name in PACKAGE_BILLS], longest, now)
    findings = (*search(bill, options.database, options.suite), *(packages.findings if packages else ()))
    verdict = judge(findings, waivers, fail_on=options.fail_on, today=now.date())
    about = {"sha256": packages.about.sha256, "records": packages.about.records} if packages else None
    before = record.pop("scan", None)
    named = {path: sha256 for path, sha256 in record.get("evidence", {}).items() if not is_cve_report(path)}
    record["evidence"] = named
    report = {
        "image_sha256": record.get("image_sha256", ""),
        "database_sha256": digest,
        **({"advisories": about} if about else {}),
        "suite": options.suite,
        "fail_on": options.fail_on,
        **msgspec.to_builtins(verdict),
    }
    found_text = json.dumps(report, indent=2) + "\n"
    found_sha256 = hashlib.sha256(found_text.encode()).hexdigest()
    write_atomic(file.with_name(cve_report(found_sha256)), found_text)
    if not verdict.problems:
        covering = [waiver for waiver in waivers if any(waiver.covers(one) for one in verdict.waived)]
        found = {
            "database_sha256": digest,
            "scanned_at": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "fail_on": options.fail_on,
            "open": len(verdict.open),
            "waived": [f"{one.about} until {one.expires} ({one.owner}: {one.reason})" for one in covering],
            **({"waived_until": verdict.waived_until.isoformat()} if verdict.waived_until else {}),
            "image_sha256": record.get("image_sha256", ""),
            **({"advisories": about} if about else {}),
        }
        # The same search again with the same end is no news: the record, and what officers signed of it, stays as it is, as long
        # as the earlier one is not too old itself.
        same = isinstance(before, dict) and {**found, "scanned_at": before.get("scanned_at")} == before
        same = same and not _too_old(before, longest, now)
        record["scan"] = before if same else found
        record["evidence"] = {**named, cve_report(found_sha256): found_sha256}
    text = json.dumps(record, indent=2) + "\n"
    if changed := text.encode() != file.read_bytes():
        write_atomic(file, text)
    _sweep(file.parent, keep=cve_report(found_sha256))
    answer = {
        "report": cve_report(found_sha256),
        "ok": not verdict.problems,
        "changed": changed,
        "searched": ["debian", *(packages.about.records if packages else ())],
        "name": record.get("name", ""),
        **msgspec.to_builtins(verdict),
    }
    told = {"image": answer["name"], "open": len(verdict.open), "waived": len(verdict.waived)}
    lines = [fields(told), *(f"problem: {text}" for text in verdict.problems)]
    lines += [f"waived: {one.cve} in {one.where}" for one in verdict.waived]
    lines += [] if packages else ["NOT searched: PyPI and npm packages (--advisories)"]
    lines += [f"waiver that nothing needs: {text}" for text in verdict.unused]
    show(answer, "\n".join(lines), as_json=options.json)
    return 1 if verdict.problems else 0


def evidence(options: argparse.Namespace) -> int:
    """Compare digests of the files beside the image with the record's."""
    file = Path(options.record)
    record = _record(file)
    named = dict(record.get("evidence", {}))
    differing = _differing(record, options.image_directory or file.parent)
    if not named:
        differing = ["the record names no files"]
    if options.scanned_within:
        differing += _unsearched(record, span("--scanned-within", options.scanned_within))
    differing += _foreign(record, options.image_directory or file.parent)
    stale = bool(options.signed) and _unended(_record(options.signed)) != _unended(record)
    if stale:
        differing.append(f"{options.signed} holds another record than {file}: sign this one")
    answer = {
        "ok": not differing,
        "name": record.get("name", ""),
        "evidence": named,
        "problems": differing,
        "stale": stale,
    }
    lines = [
        *(f"{digest}  {path}" for path, digest in sorted(named.items())),
        *(f"problem: {one}" for one in differing),
    ]
    show(answer, "\n".join(lines), as_json=options.json)
    return 1 if differing else 0


def _packages(
    options: argparse.Namespace, bills: list[Path], longest: timedelta, now: datetime
) -> PackagesFound | None:
    """Search the PyPI and npm packages, where advisories are given."""
    if not options.advisories:
        return None
    from saw.image.advisories import search

    return search(bills, options.advisories, longest=longest, now=now)


def _too_old(scan: Any, longest: timedelta, now: datetime) -> bool:
    """Whether a search is older than ``longest`` or says no time; one whose time is to come is too old as well."""
    try:
        age = now - datetime.fromisoformat(str(scan["scanned_at"]))
    except (KeyError, TypeError, ValueError):
        return True
    return not -timedelta(hours=1) <= age <= longest


def _unsearched(record: dict[str, Any], longest: timedelta) -> list[str]:
    """Return why a record states no search that counts: of this image, of all its packages, passed within ``longest``."""
    from saw.attest.image_record import is_cve_report

    found = record.get("scan")
    if not isinstance(found, dict) or not any(map(is_cve_report, record.get("evidence", {}))):
        return ["no search for known vulnerabilities passed: saw image scan"]
    problems = []
    if found.get("image_sha256") != record.get("image_sha256"):
        problems.append("the search does not say that it was of this image: saw image scan")
    if not found.get("advisories"):
        problems.append("PyPI and npm packages were not searched: saw image scan --advisories")
    if _too_old(found, longest, present()):
        problems.append(f"the search is of {found.get('scanned_at')}, which is too old or to come: saw image scan")
    return problems


def _foreign(record: dict[str, Any], folder: Path) -> list[str]:
    """Return the reports of known vulnerabilities among the record's evidence that are about another image."""
    from saw.attest.image_record import is_cve_report

    problems = []
    for name in filter(is_cve_report, record.get("evidence", {})):
        try:
            told = jsontext.decode((folder / name).read_bytes(), kind=dict[str, Any]).get("image_sha256")
        except (OSError, msgspec.DecodeError):
            continue  # its digest says so already
        if told not in (None, record.get("image_sha256")):
            problems.append(f"{name} is about another image: SHA-256 {told}")
    return problems


def _sweep(folder: Path, keep: str) -> None:
    """Remove the reports of earlier searches that failed: no record names one. Those of passed ones stay, for signed records."""
    from saw.attest.image_record import is_cve_report

    for file in folder.glob("vulnerabilities-*.json"):
        if not is_cve_report(file.name) or file.name == keep:
            continue
        try:
            failed = bool(jsontext.decode(file.read_bytes(), kind=dict[str, Any]).get("problems"))
        except (OSError, msgspec.DecodeError):
            continue
        if failed:
            file.unlink(missing_ok=True)


def _unended(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record without its end, which it gets when it is signed."""
    return {name: value for name, value in record.items() if name != "not_after"}


def _differing(record: dict[str, Any], folder: Path, only: str = "") -> list[str]:
    from saw.image.disk import digest_of

    named = dict(record.get("evidence", {}))
    problems = [] if not only or only in named else [f"the record names no {only}"]
    for path, digest in sorted(named.items()):
        if only and path != only:
            continue
        if path.startswith("/") or ".." in Path(path).parts:
            problems.append(f"{path} leads out of the image's directory")
        elif not (folder / path).is_file():
            problems.append(f"{path} is missing")
        elif digest_of(folder / path) != digest:
            problems.append(f"{path} is another file than the record names")
    return problems


def _record(file: Path) -> dict[str, Any]:
    from saw.attest.image_record import PAYLOAD_TYPE

    try:
        raw = file.read_bytes()
        if b'"payloadType"' in raw:
            raw = payload_of(read_envelope(raw, PAYLOAD_TYPE))
        return jsontext.decode(raw, kind=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", cure="name a readable file") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} is no release record: {error}", cure="pass the image's release.json") from error
