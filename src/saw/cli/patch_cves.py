"""``saw patch cves`` and ``saw patch images``: known vulnerabilities of hosts and of images, judged on the controller."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from saw.cli.answers import Answer
from saw.cli.image_scan import BILL, PACKAGE_BILLS, add_advisories, span
from saw.cli.operator_options import table
from saw.errors import ConfigError

if TYPE_CHECKING:
    from saw.image.advisories import Known
    from saw.image.osv import Component
    from saw.image.vulnerabilities import Finding, Verdict, Waiver

INCOMPLETE = 3
"""Exit code of ``saw patch images`` when an image in force could not be judged, whatever became of the others."""
_COLUMNS = ("image", "state", "age_days", "pending", "open", "workspaces")


class _Gate(NamedTuple):
    """What findings are held against: database with its SHA-256, suite, waivers, urgency, and when that is."""

    database: Path
    digest: str
    suite: str
    waivers: tuple[Waiver, ...]
    fail_on: Any
    now: datetime

    def judge(self, findings: Iterable[Finding]) -> Verdict:
        """Hold findings against the gate."""
        from saw.image.vulnerabilities import judge

        return judge(findings, self.waivers, fail_on=self.fail_on, today=self.now.date())


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands to those of ``saw patch``."""
    text = "hold packages of hosts against Debian's security tracker; 1 when the gate is not passed (on the controller)"
    cves = commands.add_parser("cves", help=text, description=text)
    cves.add_argument(
        "hosts", nargs="+", type=Path, help="HOST.json: what `saw patch status --json --packages` said there"
    )
    _add_gate(cves)
    text = (
        "hold images in force, and so their workspaces, against the tracker of today; 1 when one fails, 3 when one cannot be "
        "judged (on the controller)"
    )
    images = commands.add_parser("images", help=text, description=text)
    images.add_argument("images", type=Path, help="folder of images: FOLDER/NAME/sbom/debian.cdx.json")
    images.add_argument(
        "--overdue", default="30d", metavar="TIME", help="age from which an image is overdue (default: %(default)s)"
    )
    images.add_argument(
        "--context", help="context file (default: the file named by SAW_CONTEXT, else this machine's broker)"
    )
    add_advisories(images)
    _add_gate(images)


def judge_hosts(options: argparse.Namespace) -> Answer:
    """Judge each host by itself; a waiver counts for all."""
    from saw.patching.vulnerable import events_of, read_told, vulnerabilities_of

    hosts = {path.stem: read_told(path) for path in options.hosts}
    gate = _gate(options)
    found = {name: vulnerabilities_of(told, gate.database, gate.suite) for name, told in hosts.items()}
    verdicts = {name: gate.judge(one) for name, one in found.items()}
    if options.report:
        factory = _factory()
        _send(options.syslog, [event for name in found for event in events_of(name, found[name], factory, gate.now)])
    bad = {name: verdict.problems for name, verdict in verdicts.items() if verdict.problems}
    lines = [f"{name}: {len(verdict.open)} open, {len(verdict.waived)} waived" for name, verdict in verdicts.items()]
    lines += [f"problem: {name}: {text}" for name, problems in bad.items() for text in problems]
    answer: dict[str, Any] = {"ok": not bad, "database_sha256": gate.digest, "hosts": msgspec.to_builtins(verdicts)}
    return answer, "\n".join(lines), 1 if bad else 0


def judge_images(options: argparse.Namespace) -> Answer:
    """Judge each image that the broker says is in force; a waiver counts for all."""
    from saw.broker.client import OperatorClient, listed_workspaces
    from saw.image.vulnerabilities import scan
    from saw.patching.images import image_events, in_force, report_on, workspaces_of

    longest = span("--overdue", options.overdue)
    gate = _gate(options)
    client = OperatorClient.from_context(options.context)
    with client.session():
        listed = in_force(client.request("GET", "/v1/images")["images"], listed_workspaces(client))
    known, packages = _packages(options, gate, [record.name for record, _ in listed])
    reports = [
        report_on(
            record, ids, options.images,
            lambda bill: gate.judge((*scan(bill, gate.database, gate.suite), *packages(bill))),
            longest=longest, now=gate.now, bills=(BILL, *PACKAGE_BILLS) if options.advisories else (BILL,),
        )
        for record, ids in listed
    ]  # fmt: skip
    if options.report:
        factory = _factory()
        _send(options.syslog, [event for one in reports for event in image_events(one, factory, gate.now)])
    bad = any(one.problems for one in reports)
    incomplete = [one.name for one in reports if not one.judged]
    rows = [
        {
            "image": one.name, "state": one.state, "age_days": one.age_days, "pending": one.pending if one.judged else "?",
            "open": len(one.open) if one.judged else "?", "workspaces": " ".join(one.workspaces),
        }
        for one in reports
    ]  # fmt: skip
    lines = [table(rows, _COLUMNS)] if rows else ["no image is in force"]
    lines += [] if options.advisories else ["NOT searched: PyPI and npm packages (--advisories)"]
    lines += [f"problem: {one.name}: {text}" for one in reports for text in one.problems]
    answer: dict[str, Any] = {
        "ok": not bad,
        "incomplete": incomplete,
        "database_sha256": gate.digest,
        **({"advisories_sha256": known.about.sha256} if known else {}),
        "images": msgspec.to_builtins(reports),
        "workspaces": workspaces_of(reports),
    }
    return answer, "\n".join(lines), INCOMPLETE if incomplete else int(bad)


def _packages(
    options: argparse.Namespace, gate: _Gate, images: Iterable[str]
) -> tuple[Known | None, Callable[[Path], Iterable[Finding]]]:
    """Return the advisories, read once for all ``images``, and what searches the packages beside a Debian bill.

    Both are empty where no advisories are given. What keeps them from being read is said of each image.
    """
    if not options.advisories:
        return None, lambda _: ()
    from saw.image.advisories import components_of, read
    from saw.image.disk import ImageError

    components: set[Component] = set()
    for name in images:
        with suppress(ImageError):  # said where its turn comes
            components.update(components_of(options.images / name / bill for bill in PACKAGE_BILLS))
    known: Known | None = None
    failed = ImageError("no bill of packages can be read", cure="look at the images")
    if components:
        try:
            longest = span("--max-age", options.max_age)
            known = read(components, options.advisories, longest=longest, now=gate.now)
        except ImageError as error:
            failed = error

    def found(bill: Path) -> Iterable[Finding]:
        here = components_of(bill.parents[1] / name for name in PACKAGE_BILLS)
        if known is None:
            raise failed
        return known.findings(here)

    return known, found


def _add_gate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--database", required=True, type=Path, help="JSON of Debian's security tracker, as mirrored")
    parser.add_argument("--waivers", type=Path, metavar="FILE", help="who answers for what until when (docs/images.md)")
    parser.add_argument("--suite", default="trixie", help="release of the distribution (default: %(default)s)")
    parser.add_argument("--fail-on", default="high", help="this urgency and worse fail (default: %(default)s)")
    parser.add_argument(
        "--max-age", default="7d", metavar="TIME", help="oldest database that counts (default: %(default)s)"
    )
    parser.add_argument("--report", action="store_true", help="send OCSF findings to this machine's log")
    parser.add_argument("--syslog", default="/dev/log", help="socket of the log (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _gate(options: argparse.Namespace) -> _Gate:
    from saw.image.vulnerabilities import URGENCIES, read_database, read_waivers

    longest = span("--max-age", options.max_age)
    if options.fail_on not in URGENCIES:
        raise ConfigError(f"--fail-on {options.fail_on!r} is no urgency", cure=f"one of {', '.join(URGENCIES)}")
    now = datetime.now(UTC)
    waivers = read_waivers(options.waivers) if options.waivers else ()
    digest = read_database(options.database, options.suite, longest=longest, now=now)
    return _Gate(options.database, digest, options.suite, waivers, options.fail_on, now)


def _factory() -> Any:
    from saw.edr.service import factory_of

    return factory_of("saw-patching")


def _send(syslog: str, events: list[dict[str, Any]]) -> None:
    from saw.edr.forward import SyslogDestination
    from saw.edr.store import Found

    destination = SyslogDestination(syslog, gethostname())
    for number, event in enumerate(events):
        destination.send(Found(number, event, broker=False, syslog=False))
