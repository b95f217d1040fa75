"""``saw drift``: what the plays would change on hosts, whom they could not ask, and who answers for the rest."""

from __future__ import annotations

import argparse
import fcntl
import uuid
from datetime import datetime
from pathlib import Path
from socket import gethostname
from typing import Any

import msgspec

from saw.broker.client import OperatorClient
from saw.cli.answers import Answer
from saw.cli.operator_options import table
from saw.drift.findings import TrailDestination, open_store, record
from saw.drift.look import Wanted, look
from saw.drift.report import Report, judge, read_report, read_waivers, write_report
from saw.edr.forward import Destination, SyslogDestination, deliver
from saw.edr.service import factory_of, now
from saw.edr.store import Store, Way
from saw.errors import SawError

DEFAULT_PLAYBOOK = "secure_agent.workspace.control_plane"
DEFAULT_STATE = "/var/lib/saw/drift"
_COLUMNS = ("host", "role", "task", "module", "place")
_WORDS = {
    "unreachable": "was not reached",
    "failed": "failed at",
    "not_looked_at": "was not looked at: the run ended before it",
}


def main(argv: list[str]) -> int:
    """Run ``saw drift``; 1 when something drifted, a host could not be checked, or a finding was not delivered."""
    options = _parser().parse_args(argv)
    answer, text, code = _check(options) if options.command == "check" else _show(read_report(options.report))
    print(msgspec.json.encode(answer).decode() if options.json else text)
    return code


def _check(options: argparse.Namespace) -> Answer:
    waivers = read_waivers(options.waivers) if options.waivers else ()
    wanted = Wanted(
        playbooks=tuple(options.playbook or [DEFAULT_PLAYBOOK]),
        inventories=tuple(options.inventory),
        limit=options.limit,
        variables=tuple(options.variables or ()),
        forks=options.forks,
        timeout_s=options.timeout,
    )
    seen = look(wanted)
    moment = now()
    report = judge(seen, waivers, moment)
    if options.output:
        write_report(options.output, report)
    answer, text, code = _show(report)
    if not options.report:
        return answer, text, code
    reported, waiting = _report(report, options, moment)
    answer |= {"ok": answer["ok"] and not waiting, "reported": reported, "waiting": waiting}
    lines = [text, f"findings: {reported} new or gone", *(f"problem: {words}" for words in waiting)]
    return answer, "\n".join(lines), 1 if waiting else code


def _report(report: Report, options: argparse.Namespace, moment: datetime) -> tuple[int, list[str]]:
    """Write what is new or gone to the spool and deliver what waits there; return how many are new, and what did not arrive."""
    ways: tuple[Way, ...] = ("broker", "syslog") if options.syslog else ("broker",)
    factory = factory_of("saw-drift")
    state = Path(options.state)
    store = open_store(state, ways)
    try:
        with (state / "lock").open("a") as lock:  # a look by hand and one by timer tell a finding once
            fcntl.flock(lock, fcntl.LOCK_EX)
            numbers = record(report, store, factory, moment, lambda: str(uuid.uuid4()))
            waiting = [words for way in ways if (words := _deliver(store, way, options))]
    finally:
        store.close()
    return len(numbers), waiting


def _deliver(store: Store, way: Way, options: argparse.Namespace) -> str:
    """Deliver on one way; return why something still waits. The next look tries again."""
    if not store.pending(way, 1):
        return ""
    try:
        if way == "broker":
            with OperatorClient.from_context(options.context).session() as client:
                deliver(store, way, TrailDestination(client))
        else:
            log: Destination = SyslogDestination(options.syslog, gethostname())
            deliver(store, way, log)
    except SawError as error:
        return f"findings wait for the {way}: {error}"
    return ""


def _show(report: Report) -> Answer:
    answer: dict[str, Any] = {"ok": report.ok, **msgspec.to_builtins(report)}
    rows = [
        {
            **msgspec.to_builtins(one),
            "place": f"{one.place or ('hidden' if one.hidden else '')}{' (changed)' if one.applied else ''}",
        }
        for one in report.drift
    ]
    lines = [table(rows, _COLUMNS)] if rows else []
    for one in report.unchecked:
        where = ": ".join(filter(None, (one.role, one.task))) if one.reason == "failed" else ""
        lines.append(f"unchecked: {one.host} {_WORDS[one.reason]} {where}".rstrip() + f" ({one.playbook})")
    lines += [f"problem: {words}" for words in report.problems]
    lines += [f"waived: {one.host}: {one.role}: {one.task}: {one.place}" for one in report.waived]
    lines += [f"waiver that nothing needs: {words}" for words in report.unused]
    if report.not_asked:
        tasks = sorted({": ".join(filter(None, (one.role, one.task))) for one in report.not_asked})
        lines.append(f"cannot be asked in check mode: {'; '.join(tasks)}")
    lost = {one.host for one in report.unchecked}
    summary = f"{len(report.hosts)} hosts, {len(lost)} of them unchecked; places that drifted: {len(report.drift)}"
    text = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in "\n".join([*lines, summary]))
    return answer, text, 0 if report.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saw drift", description="What is not as the plays want it. See docs/drift.md."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", help="run playbooks in check mode and tell what they would change; 1 when something"
    )
    check.add_argument(
        "--inventory",
        "-i",
        action="append",
        required=True,
        metavar="PATH",
        help="inventory, as Ansible takes it; again for more",
    )
    check.add_argument(
        "--playbook",
        action="append",
        metavar="NAME",
        help=f"file or name; again for more (default: {DEFAULT_PLAYBOOK})",
    )
    check.add_argument("--limit", default="", metavar="PATTERN", help="these hosts only")
    check.add_argument(
        "--variables", action="append", metavar="FILE", help="variables for the plays, from a file; again for more"
    )
    check.add_argument("--waivers", metavar="FILE", help="drift that somebody answers for until a day")
    check.add_argument("--output", metavar="FILE", help="write the report, as JSON")
    check.add_argument("--forks", type=_whole, default=10, help="hosts at a time (%(default)s)")
    check.add_argument(
        "--timeout", type=_whole, default=3600, metavar="SECONDS", help="bound of each playbook (%(default)s)"
    )
    check.add_argument(
        "--report", action="store_true", help="send findings: each once while it stands, once when it has gone"
    )
    check.add_argument(
        "--state", default=DEFAULT_STATE, metavar="DIR", help="what was told, for --report (%(default)s)"
    )
    check.add_argument(
        "--syslog", default="/dev/log", metavar="SOCKET", help="log of this host, for --report; empty for none"
    )
    check.add_argument("--context", help="context file of the broker, for --report (default: that of SAW_CONTEXT)")
    check.add_argument("--json", action="store_true", help="print JSON")
    show = commands.add_parser("show", help="show a report that was written; 1 when it does not hold")
    show.add_argument("report", help="file that saw drift check --output wrote")
    show.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _whole(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 86_400:
        raise ValueError(text)
    return number
