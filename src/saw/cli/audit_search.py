"""``saw audit search`` and ``tail``: events over all chains in the order of arrival, by filters that the broker applies."""

from __future__ import annotations

import argparse
import re
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import msgspec

from saw.audit.choose import verdict_of
from saw.broker.client import BrokerRefusal, OperatorClient
from saw.cli.operator_options import add_options, line
from saw.errors import ConfigError, SawError, UnavailableError

_PAGE = 200
_POLL_S = 25
_LONGEST_PAUSE_S = 5.0
_AGO = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_FILTERS = ("source", "workspace", "agent", "principal", "class", "activity", "verdict", "text")


def search(options: argparse.Namespace) -> int:
    """Run ``saw audit search``: print each event that is asked for, oldest first. Memory is bounded by one page."""
    client = OperatorClient.from_context(options.context)
    query = filters(options, datetime.now(UTC))
    with client.session():
        for page in pages(client, query, options.after, options.limit):
            for event in page["events"]:
                _print(event, as_json=options.json)
    return 0


def pages(client: OperatorClient, query: dict[str, str], after: int, limit: int) -> Iterator[dict[str, Any]]:
    """Yield pages ``{events, next, end, …}`` of what ``query`` chooses behind the position ``after``, ``limit`` events in all."""
    left = limit
    while left > 0:
        page = _read(client, query, after, min(left, _PAGE), 0)
        yield page
        left -= len(page["events"])
        after = page["next"]
        if after >= page["end"]:
            break


def tail(options: argparse.Namespace) -> int:
    """Run ``saw audit tail``: print what comes, until interrupted; a broker that is away is waited for."""
    for event in follow(options, threading.Event()):
        _print(event, as_json=options.json)
        sys.stdout.flush()
    return 0


def follow(options: argparse.Namespace, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """Yield events as they come, each once; says on stderr when the broker is away, and when it is back."""
    query = filters(options, datetime.now(UTC))
    after: int | None = options.after
    last: dict[str, Any] | None = None
    pause = 0.0
    while not stop.is_set():
        try:
            with OperatorClient.from_context(options.context).session() as client:
                if after is None:
                    after = max(0, int(_read(client, {}, 0, 1, 0)["end"]) - options.lines)
                    last = _read(client, {}, after, 1, 0)["before"]
                while not stop.is_set():
                    page = _read(client, query, after, _PAGE, _POLL_S)
                    if pause:
                        print("the broker is back", file=sys.stderr)
                    pause = 0.0
                    if last is not None and page["before"] != last:
                        raise _other_trail()
                    yield from page["events"]
                    if page["next"] > after:
                        after = int(page["next"])
                        last = _read(client, {}, after, 1, 0)["before"]
        except SawError as error:
            if (
                isinstance(error, BrokerRefusal)
                or not isinstance(error, UnavailableError)
                or error.code == "other_trail"
            ):
                raise
            if not pause:
                print(f"waiting for the broker: {error.message}", file=sys.stderr)
            pause = min(pause * 2 or 0.25, _LONGEST_PAUSE_S)
            stop.wait(pause)


def _other_trail() -> SawError:
    error = UnavailableError(
        "the broker's trail is not the one that was read until now", cure="saw audit verify; then start again"
    )
    error.code = "other_trail"
    return error


def _read(client: OperatorClient, query: dict[str, str], after: int, limit: int, wait_s: int) -> dict[str, Any]:
    return client.request(
        "GET", f"/v1/audit/log?{urlencode({'after': after, 'limit': limit, 'wait': wait_s, **query})}"
    )


def filters(options: argparse.Namespace, now: datetime) -> dict[str, str]:
    """Return the query of the options; times become milliseconds since 1970."""
    query = {name: str(value) for name in _FILTERS if (value := getattr(options, f"only_{name}"))}
    for name in ("since", "until"):
        if value := getattr(options, name):
            query[name] = str(int(moment(value, now).timestamp() * 1000))
    return query


def moment(text: str, now: datetime) -> datetime:
    """Return the time that ``text`` says: ISO 8601 (UTC without a zone), or how long ago, as in ``90s``, ``2h``, ``7d``."""
    if ago := _AGO.fullmatch(text):
        return now - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"{text!r} is no time", cure="use 2026-11-29T08:00:00Z, or how long ago: 30m, 2h, 7d"
        ) from error
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _print(item: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(msgspec.json.encode(item).decode() + "\n")
        return
    event = item["event"]
    if not event:
        place = [item["position"], "", f"{item['source']}:{item['seq']}", "", "", "", "", "removed by retention"]
        sys.stdout.write(line(place) + "\n")
        return
    ours = event.get("unmapped", {}).get("saw", {})
    time = datetime.fromtimestamp(event["time"] / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    title = event.get("message") or event.get("finding_info", {}).get("title") or event.get("api", {}).get("operation")
    verdict = event.get("status_detail") or verdict_of(event)
    who = [item["position"], time, f"{item['source']}:{item['seq']}", event.get("type_name"), verdict]
    sys.stdout.write(line([*who, ours.get("principal"), ours.get("workspace"), title]) + "\n")


def add_search(commands: Any) -> None:
    """Add both commands to the parser of ``saw audit``."""
    for name, text in (("search", "print the events that filters choose"), ("tail", "print events as they come")):
        command = commands.add_parser(name, help=text)
        add_options(command)
        command.add_argument("--since", metavar="TIME", help="ISO 8601, or how long ago (30m, 2h, 7d)")
        command.add_argument("--until", metavar="TIME", help="the same; not included")
        command.add_argument("--source", dest="only_source", metavar="CHAIN", help="broker, or a perimeter host")
        for what in ("workspace", "agent", "principal"):
            command.add_argument(f"--{what}", dest=f"only_{what}", metavar="NAME", help=f"about this {what}")
        command.add_argument(
            "--class", dest="only_class", metavar="CLASS", help='number or name, as in "HTTP Activity"'
        )
        command.add_argument("--activity", dest="only_activity", metavar="NAME", help="name of the activity, as in Get")
        command.add_argument("--verdict", dest="only_verdict", choices=["allowed", "refused"], help="what became of it")
        command.add_argument("--text", dest="only_text", metavar="TEXT", help="occurs anywhere in the event")
        first = 0 if name == "search" else None
        command.add_argument("--after", type=int, default=first, metavar="POSITION", help="start behind this position")
        if name == "search":
            command.add_argument("--limit", type=int, default=100, help="at most this many (default: %(default)s)")
        else:
            command.add_argument(
                "--lines", type=int, default=10, help="begin so many events back (default: %(default)s)"
            )
