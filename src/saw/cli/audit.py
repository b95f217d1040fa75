"""``saw audit``: read, export and verify the audit trail."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from saw.audit import ChainedEvent, ChainReport, Head, verify_chain
from saw.audit.removal import Removals
from saw.broker.client import OperatorClient
from saw.cli.audit_copy import completed, incomplete, removed_text, span_of
from saw.cli.audit_hold import add_hold, hold
from saw.cli.audit_search import add_search, search, tail
from saw.cli.audit_ship import add_ship, ship
from saw.cli.audit_tree import add_tree, checkpoint, key, verify_tree
from saw.cli.audit_witness import add_witness, witness
from saw.cli.operator_options import add_options, show, table
from saw.errors import ConfigError

PAGE = 500


_ELSEWHERE = {
    "ship": ship,
    "search": search,
    "tail": tail,
    "key": key,
    "checkpoint": checkpoint,
    "witness": witness,
    "hold": hold,
}


def main(argv: list[str]) -> int:
    """Run one of the commands of ``saw audit``."""
    options = _parser().parse_args(argv)
    if run := _ELSEWHERE.get(options.command):
        return run(options)
    if options.command == "verify" and options.archive and not options.file:
        raise ConfigError("--archive gives back what a copy lacks", cure="give the copy with --file")
    if options.command == "verify" and options.checkpoint:
        return verify_tree(options)
    if options.command == "verify" and any(
        (options.key, options.tiles, options.since_checkpoint, options.witness, options.part)
    ):
        raise ConfigError(
            "without --checkpoint there is nothing to hold the tree against", cure="give --checkpoint too"
        )
    if options.command == "verify":
        return _verify_file(options) if options.file else _verify_broker(options)
    client = OperatorClient.from_context(options.context)
    if options.command == "export":
        if options.after and not options.source:
            raise ConfigError("--after counts within one chain", cure="name the chain with --source")
        with client.session():
            for source in [options.source] if options.source else _sources(client):
                for event in _pages(client, source, options.after, None):
                    sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
        return 0
    with client.session():
        events = list(_pages(client, options.source, options.after, options.limit))
    rows = [_summary(event) for event in events]
    columns = ("seq", "time", "event", "status", "principal", "workspace", "message")
    show({"events": events}, table(rows, columns), as_json=options.json)
    return 0


def _verify_broker(options: argparse.Namespace) -> int:
    answer = OperatorClient.from_context(options.context).request("GET", "/v1/audit/verify")
    text = table(
        [{**chain, "head": chain["head"]["hash"]} for chain in answer["chains"]],
        ("source", "complete", "events", "removed", "head"),
    )
    if not answer["complete"]:
        raise incomplete(answer["findings"])
    show(answer, text + removed_text(answer["removed"]), as_json=options.json)
    return 0


def _verify_file(options: argparse.Namespace) -> int:
    expected = _head(options.expect_head) if options.expect_head else None
    chains: dict[str, list[ChainedEvent]] = {}
    for event in completed(options):
        chains.setdefault(event.source, []).append(event)
    told = Removals(event for events in chains.values() for event in events)
    if expected is not None and len(chains) > 1:
        raise ConfigError(
            "--expect-head is about one chain, the file holds several", cure="export one source to each file"
        )
    reports: list[ChainReport] = [verify_chain(events, expected, told=told.tell) for events in chains.values()]
    if expected is not None and not reports:
        reports = [verify_chain((), expected)]
    findings = [msgspec.to_builtins(finding) for report in reports for finding in report.findings]
    if findings:
        raise incomplete(findings)
    rows = [
        {
            "source": item.source,
            "complete": True,
            "events": item.count,
            "removed": item.removed,
            "head": f"{item.head.seq}:{item.head.hash}",
        }
        for item in reports
    ]
    removed = span_of(told, sum(item.removed for item in reports))
    text = table(rows, ("source", "complete", "events", "removed", "head")) + removed_text(removed)
    show({"complete": True, "removed": removed, "chains": rows}, text, as_json=options.json)
    return 0


def _head(text: str) -> Head:
    seq, _, digest = text.partition(":")
    if not seq.isdecimal() or len(digest) != 64:
        raise ConfigError(f"{text!r} is not a head", cure="use SEQ:HASH as printed by saw audit verify")
    return Head(int(seq), digest)


def _sources(client: OperatorClient) -> list[str]:
    """Return every chain that the broker holds: its own, and those of the perimeter hosts."""
    return [str(source) for source in client.request("GET", "/v1/audit/events?source=broker&limit=1")["sources"]]


def _pages(client: OperatorClient, source: str, after: int, limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield events of ``source`` behind ``after``, up to ``limit`` of them."""
    left = limit
    while left is None or left > 0:
        size = PAGE if left is None else min(PAGE, left)
        events = client.request("GET", f"/v1/audit/events?source={source}&after={after}&limit={size}")["events"]
        yield from events
        if len(events) < size:
            return
        after = events[-1]["seq"]
        left = None if left is None else left - len(events)


def _summary(chained: dict[str, Any]) -> dict[str, Any]:
    event = chained["event"]
    ours = event.get("unmapped", {}).get("saw", {})
    if not event:
        return {"seq": chained["seq"], "message": "removed by retention"}
    time = datetime.fromtimestamp(event["time"] / 1000, UTC).isoformat(timespec="milliseconds")
    title = event.get("message") or event.get("api", {}).get("operation") or event.get("comment")
    return {
        "seq": chained["seq"],
        "time": time,
        "event": event.get("type_name"),
        "status": event.get("status_detail") or event.get("status"),
        "principal": ours.get("principal"),
        "workspace": ours.get("workspace"),
        "message": title,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw audit", description="The audit trail.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text, chain in (
        ("events", "show events", "broker"),
        ("export", "write the trail as JSON lines", None),
    ):
        command = commands.add_parser(name, help=text)
        add_options(command)
        command.add_argument("--source", default=chain, help=f"chain (default: {chain or 'all of them'})")
        command.add_argument("--after", type=int, default=0, help="start behind this sequence number")
        if name == "events":
            command.add_argument("--limit", type=int, default=100, help="at most this many (default: %(default)s)")
    verify = commands.add_parser("verify", help="prove the broker's trail, or an exported copy, complete")
    add_options(verify)
    verify.add_argument("--file", help="an exported copy")
    verify.add_argument("--syslog", action="store_true", help="the file holds messages as saw audit ship sent them")
    verify.add_argument("--otlp", action="store_true", help="the file holds log records as saw audit ship sent them")
    verify.add_argument(
        "--archive",
        metavar="FILE",
        action="append",
        help="an export from before a removal, whose events take the place of those that retention removed",
    )
    verify.add_argument("--expect-head", help="SEQ:HASH that the copy must contain, kept from an earlier verification")
    add_search(commands)
    add_hold(commands)
    add_tree(commands, verify)
    add_witness(commands)
    add_ship(commands)
    return parser
