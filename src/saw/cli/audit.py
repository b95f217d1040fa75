"""``saw audit``: read, export and verify the audit trail."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from saw.audit import ChainedEvent, ChainReport, Head, verify_chain
from saw.broker.client import OperatorClient
from saw.cli.operator_options import add_options, show, table
from saw.errors import ConfigError, SawError

PAGE = 500


class IncompleteTrailError(SawError):
    """A copy of the trail is not whole."""

    code = "trail_incomplete"


def main(argv: list[str]) -> int:
    """Run ``saw audit events``, ``verify`` or ``export``."""
    options = _parser().parse_args(argv)
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
        ("source", "complete", "events", "head"),
    )
    if not answer["complete"]:
        raise _incomplete(answer["findings"])
    show(answer, text, as_json=options.json)
    return 0


def _verify_file(options: argparse.Namespace) -> int:
    expected = _head(options.expect_head) if options.expect_head else None
    chains: dict[str, list[ChainedEvent]] = {}
    for event in _read_file(Path(options.file)):
        chains.setdefault(event.source, []).append(event)
    if expected is not None and len(chains) > 1:
        raise ConfigError(
            "--expect-head is about one chain, the file holds several", cure="export one source to each file"
        )
    reports: list[ChainReport] = [verify_chain(events, expected) for events in chains.values()]
    if expected is not None and not reports:
        reports = [verify_chain((), expected)]
    findings = [msgspec.to_builtins(finding) for report in reports for finding in report.findings]
    if findings:
        raise _incomplete(findings)
    rows = [
        {"source": item.source, "complete": True, "events": item.count, "head": f"{item.head.seq}:{item.head.hash}"}
        for item in reports
    ]
    show(
        {"complete": True, "chains": rows}, table(rows, ("source", "complete", "events", "head")), as_json=options.json
    )
    return 0


def _incomplete(findings: list[dict[str, Any]]) -> IncompleteTrailError:
    first = findings[0]
    where = f"{first['code']} at {first['source']} {first['seq']}: {first['detail']}"
    return IncompleteTrailError(
        f"the trail is not whole: {len(findings)} finding(s), first {where}",
        cure="compare with another copy of the trail",
        details={"findings": findings},
    )


def _read_file(path: Path) -> Iterator[ChainedEvent]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield msgspec.json.decode(line, type=ChainedEvent)
                except msgspec.DecodeError as error:
                    raise IncompleteTrailError(
                        f"line {number} of {path} is no chained event: {error}", cure="export again"
                    ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", cure="check the path") from error


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
    verify.add_argument("--expect-head", help="SEQ:HASH that the copy must contain, kept from an earlier verification")
    return parser
