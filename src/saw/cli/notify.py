"""``saw notify``: what people were told by webhook and e-mail, a test of a channel, another try."""

from __future__ import annotations

import argparse
import time
from typing import Any
from urllib.parse import quote, urlencode

from saw.broker.client import OperatorClient
from saw.cli.operator_options import add_options, add_pages, more, show, table
from saw.errors import SawError

_COLUMNS = ("id", "kind", "channel", "to", "workspace", "review", "state", "attempts", "created_at", "why")
_CHANNELS = ("name", "type", "groups", "kinds")
_STATES = ("waiting", "sending", "delivered", "given_up")
WAIT_S = 25
PATIENCE_S = 100.0
"""How long the first attempt of a test may take, seconds: longer than any attempt does."""


class NotTold(SawError):
    """A test did not arrive at everyone."""

    code = "not_delivered"

    def __init__(self, found: dict[str, Any]) -> None:
        error = found["error"] or {}
        why = error.get("message") or f"it is {found['state']}"
        super().__init__(
            f"{found['id']} to {found['recipient'] or found['channel']} was not delivered: {why}",
            cure="see the broker's log; it is tried again by itself, saw notify list shows how it goes",
            details={"id": found["id"], "state": found["state"], "reason": error.get("code", "")},
        )


def main(argv: list[str]) -> int:
    """Run one ``saw notify`` command; ``test`` ends with 0 only when everyone was reached."""
    options = _parser().parse_args(argv)
    with OperatorClient.from_context(options.context).session() as client:
        return int(options.run(client, options))


def _list(client: OperatorClient, options: argparse.Namespace) -> int:
    wanted = {"state": options.state, "channel": options.channel, "after": options.after, "limit": options.limit}
    query = urlencode({name: value for name, value in wanted.items() if value})
    answer = client.request("GET", f"/v1/notifications?{query}")
    if options.channels:
        rows = [
            {**one, "groups": ",".join(one["groups"]), "kinds": ",".join(one["kinds"])} for one in answer["channels"]
        ]
        text = table(rows, _CHANNELS) if rows else "no channels"
        show({"channels": answer["channels"]}, text, as_json=options.json)
        return 0
    text = _table(answer["notifications"]) if answer["notifications"] else "no messages"
    show(answer, text + more(answer), as_json=options.json)
    return 0


def _test(client: OperatorClient, options: argparse.Namespace) -> int:
    made = client.request("POST", "/v1/notifications/test", {"channel": options.channel})["notifications"]
    found = made if options.no_wait else [_tried(client, one["id"]) for one in made]
    failed = [one for one in found if one["state"] != "delivered"]
    if failed and not options.no_wait:
        raise NotTold(failed[0])
    show({"notifications": found}, _table(found), as_json=options.json)
    return 0


def _retry(client: OperatorClient, options: argparse.Namespace) -> int:
    found = [client.request("POST", f"{_path(identifier)}/retry") for identifier in options.ids]
    show({"notifications": found}, _table(found), as_json=options.json)
    return 0


def _tried(client: OperatorClient, identifier: str) -> dict[str, Any]:
    """Return a message once its first attempt has ended, or as it is when that takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = client.request("GET", f"{_path(identifier)}?wait={WAIT_S}")
        tried = found["state"] in {"delivered", "given_up"} or (found["state"] == "waiting" and found["attempts"] > 0)
        if tried or time.monotonic() > deadline:
            return found


def _table(rows: list[dict[str, Any]]) -> str:
    told = [{**row, "to": row["recipient"], "why": (row["error"] or {}).get("message")} for row in rows]
    return table(told, _COLUMNS)


def _path(identifier: str) -> str:
    return f"/v1/notifications/{quote(identifier, safe='')}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw notify", description="What people are told by webhook and e-mail.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        add_options(command)
        command.set_defaults(run=run)
        return command

    listing = add("list", _list, "list messages, the newest first, and how each stands")
    listing.add_argument("--state", choices=_STATES, help="in this state alone")
    listing.add_argument("--channel", help="of this channel alone")
    add_pages(listing, "100")
    listing.add_argument(
        "--channels", action="store_true", help="the configured channels instead, and what each is told"
    )
    trial = add("test", _test, "send a test to everyone whom a channel reaches, and end with its result")
    trial.add_argument("channel", help="name of the channel")
    trial.add_argument("--no-wait", action="store_true", help="do not wait for the first attempt")
    again = add("retry", _retry, "try messages again now")
    again.add_argument("ids", nargs="+", metavar="ID", help="id of a message")
    return parser
