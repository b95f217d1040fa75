"""``saw image scan`` and ``saw image evidence``: known vulnerabilities of an image, and the files that its record names."""

from __future__ import annotations

import argparse
import hashlib
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec

from saw.cli.operator_options import fields, show
from saw.cli.policy_signing import present
from saw.errors import ConfigError
from saw.files import write_atomic
from saw.policy.envelope import payload_of, read_envelope
from saw.policy.governance import duration

BILL = "sbom/debian.cdx.json"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands to those of ``saw image``."""
    from saw.image.vulnerabilities import URGENCIES

    scan = commands.add_parser("scan", help="search an image for known vulnerabilities; 1 when the gate is not passed")
    scan.add_argument(
        "record", help="release.json beside the image, not signed yet; a passed search is written into it"
    )
    scan.add_argument("--database", required=True, type=Path, help="JSON of Debian's security tracker, as mirrored")
    scan.add_argument("--waivers", type=Path, metavar="FILE", help="who answers for what until when (docs/images.md)")
    scan.add_argument("--suite", default="trixie", help="release of the distribution (default: %(default)s)")
    scan.add_argument(
        "--fail-on", default="high", choices=URGENCIES, help="this urgency and worse fail (default: %(default)s)"
    )
    scan.add_argument(
        "--max-age", default="7d", metavar="TIME", help="oldest database that counts (default: %(default)s)"
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
    evidence.add_argument("--json", action="store_true", help="print JSON")


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
    differing = _differing(record, file.parent, only=BILL)
    if differing:
        raise ConfigError(f"{bill} is not the one that {file} names: {differing[0]}", cure="build the image again")
    try:
        longest = timedelta(seconds=duration(options.max_age))
    except ValueError as error:
        raise ConfigError(f"--max-age {options.max_age!r}: {error}", cure="write for example 7d") from error
    waivers = read_waivers(options.waivers) if options.waivers else ()
    now = present()
    digest = read_database(options.database, options.suite, longest=longest, now=now)
    verdict = judge(search(bill, options.database, options.suite), waivers, fail_on=options.fail_on, today=now.date())
    before = record.pop("scan", None)
    named = {path: sha256 for path, sha256 in record.get("evidence", {}).items() if not is_cve_report(path)}
    record["evidence"] = named
    report = {
        "database_sha256": digest,
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
            "waived": [
                f"{one.cve} in {one.package} until {one.expires} ({one.owner}: {one.reason})" for one in covering
            ],
            **({"waived_until": verdict.waived_until.isoformat()} if verdict.waived_until else {}),
        }
        # The same search again with the same end is no news: the record, and what officers signed of it, stays as it is.
        same = isinstance(before, dict) and {**found, "scanned_at": before.get("scanned_at")} == before
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
        "name": record.get("name", ""),
        **msgspec.to_builtins(verdict),
    }
    about = {"image": answer["name"], "open": len(verdict.open), "waived": len(verdict.waived)}
    lines = [fields(about), *(f"problem: {text}" for text in verdict.problems)]
    lines += [f"waived: {one.cve} in {one.package} {one.version}" for one in verdict.waived]
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


def _sweep(folder: Path, keep: str) -> None:
    """Remove the reports of earlier searches that failed: no record names one. Those of passed ones stay, for signed records."""
    from saw.attest.image_record import is_cve_report

    for file in folder.glob("vulnerabilities-*.json"):
        if not is_cve_report(file.name) or file.name == keep:
            continue
        try:
            failed = bool(msgspec.json.decode(file.read_bytes(), type=dict[str, Any]).get("problems"))
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
        return msgspec.json.decode(raw, type=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", cure="name a readable file") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} is no release record: {error}", cure="pass the image's release.json") from error
