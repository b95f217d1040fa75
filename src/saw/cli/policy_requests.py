"""``saw policy requests``: what agents ask for beyond their policy, and what a person says to it. No answer allows anything."""

from __future__ import annotations

import argparse
from typing import Any
from urllib.parse import quote, urlencode

from saw.cli.answers import Add, Answer
from saw.cli.operator_options import table
from saw.errors import ConfigError
from saw.review.escapes import escape

_COLUMNS = ("id", "state", "standing", "workspace", "opened_at", "call", "reason")


def listed(options: argparse.Namespace) -> Answer:
    """List requests, the newest first; call and reason are the agents' words."""
    from saw.broker.client import OperatorClient

    wanted = {"state": options.state, "workspace_id": options.workspace, "sponsor": options.sponsor}
    filters = {name: value for name, value in wanted.items() if value}
    rows: list[dict[str, Any]] = []
    after: str | None = ""
    with OperatorClient.from_context(options.context).session() as client:
        while after is not None and len(rows) < options.limit:
            limit = min(200, options.limit - len(rows))
            page = client.request(
                "GET", f"/v1/policy/requests?{urlencode({**filters, 'after': after, 'limit': limit})}"
            )
            rows += page["requests"]
            after = page["next"]
    shown = [{**row, "call": _call(row), "reason": escape(str(row["reason"]))[:80]} for row in rows]
    return {"ok": True, "requests": rows, "next": after}, table(shown, _COLUMNS), 0


def show(options: argparse.Namespace) -> Answer:
    """Show one request, how policy stands to it now, and the lines of a bundle that would allow it."""
    from saw.broker.client import OperatorClient

    path = f"/v1/policy/requests/{quote(options.id, safe='')}"
    found = OperatorClient.from_context(options.context).request("GET", path)
    return {"ok": True, **found}, "\n".join(_lines(found)), 0


def answer(options: argparse.Namespace) -> Answer:
    """Accept or decline a request. Accepting allows nothing: put the lines into the blueprint, then sign and release it."""
    from saw.broker.client import OperatorClient

    path = f"/v1/policy/requests/{quote(options.id, safe='')}/answer"
    body = {"decision": options.decision, "comment": options.comment}
    found = OperatorClient.from_context(options.context).request("POST", path, body)
    text = f"{found['id']} is {found['state']}" if found["changed"] else f"{found['id']} was {found['state']} before"
    if found["state"] == "accepted":
        text += "; nothing is allowed yet: change the blueprint, sign it and release it"
    return {"ok": True, **found}, text, 0


def _call(row: dict[str, Any]) -> str:
    return escape(f"{row['method']} {row['scheme']}://{row['host']}:{row['port']}{row['path']}")


def _lines(found: dict[str, Any]) -> list[str]:
    now = found["now"]
    said = (
        f"{found['state']} by {found['answered_by']}: {escape(found['comment'])}"
        if found["answered_by"]
        else found["state"]
    )
    lines = [
        f"request    {found['id']}: {said}",
        f"workspace  {found['workspace']} (blueprint {found['blueprint']}, ring {found['ring']}), agent {found['agent']}",
        f"sponsor    {escape(found['sponsor'])}",
        f"asked      {found['opened_at']} under {found['policy_digest']}, open until {found['expires_at']}",
        "",
        "# written by the agent",
        f"call       {_call(found)}",
        f"program    {escape(found['program']) or '-'}",
        f"reason     {escape(found['reason'])}",
        "",
        "# how policy stands to it now",
        f"{now['standing']}: {escape(now['detail'])}",
    ]
    if now["proposal"]:
        lines += ["", "# these lines would allow exactly this call, once officers have signed and released them"]
        lines += now["proposal"].splitlines()
    elif now["impossible"]:
        lines.append(f"no line of a bundle would allow it: {escape(now['impossible'])}")
    return lines + [f"note: {escape(note)}" for note in now["notes"]]


def requests(_options: argparse.Namespace) -> Answer:
    """List, show and answer what agents ask for beyond their policy; an answer allows nothing."""
    raise ConfigError("requests is followed by a command", cure="see saw policy requests --help")


def register(add: Add) -> None:
    """Add ``saw policy requests`` and its commands."""
    group = add("requests", requests, "what agents ask for beyond their policy").add_subparsers(
        dest="requests_command", required=True, metavar="COMMAND"
    )
    sub = add("list", listed, "list what agents ask for", group)
    sub.add_argument("--state", choices=("open", "accepted", "declined", "expired"), help="in this state")
    sub.add_argument("--workspace", metavar="ID", help="of this workspace")
    sub.add_argument("--sponsor", help="of the agents of this sponsor")
    sub.add_argument("--limit", type=int, default=100, help="most requests (default: 100)")
    _context(sub)
    sub = add("show", show, "show one, and what would allow it", group)
    sub.add_argument("id", help="id of the request")
    _context(sub)
    sub = add("answer", answer, "accept or decline one; it allows nothing", group)
    sub.add_argument("id", help="id of the request")
    sub.add_argument("decision", choices=("accept", "decline"))
    sub.add_argument("--comment", required=True, help="why; the agent reads it, and it is audited")
    _context(sub)


def _context(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--context", help="context file of the broker (default: SAW_CONTEXT)")
