"""A tool of an MCP server over HTTP that waits for a person: which call it is, and what its client is told.

A client of MCP waits for the answer to its request and gives up after a minute, and it numbers its requests. So the answer is a
result of the tool that says "ask again", and the same tool with the same arguments, whatever its number, is the same call: it
gets the stored answer once, under its own number. Forms: Model Context Protocol, "Streamable HTTP" and "Tools" (isError).
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

from saw.gateway.judge import Verdict
from saw.gateway.review_answers import Answer, ended, in_json
from saw.policy import strict_json
from saw.policy.mcp_http import CALL_TOOL
from saw.policy.review_poll import REVIEWS_PATH
from saw.review.messages import MAX_REVIEWED_BODY, ReviewedAnswer, ReviewView

MOST_REMEMBERED = 64
"""How many calls of one workspace are remembered: as many as may wait at the broker."""
MAX_UNPACKED = 4 * 1024 * 1024
"""Longest answer that is unpacked to be read (bytes)."""
_DOMAIN = "saw-mcp-call/1"

Identifier = int | str


class ToolAsked(NamedTuple):
    """A call of one tool: the number of its request, and what makes it the same call again."""

    identifier: Identifier
    fingerprint: str


class Remembered(NamedTuple):
    """The review of a call, and the number that its request had."""

    review: str
    identifier: Identifier


def tool_asked(verdict: Verdict, body: bytes) -> ToolAsked | None:
    """Return the call of a tool that ``body``, judged by ``verdict``, is, or None for any other request.

    Notifications, batches and tasks are none: they have no one answer to wait for.
    """
    decision, call = verdict.decision, verdict.call
    if decision is None or decision.protocol != "mcp" or [asked.kind for asked in decision.operations] != [CALL_TOOL]:
        return None
    try:
        value = strict_json.loads(body, limit=MAX_REVIEWED_BODY)
    except strict_json.NotStrict:
        return None
    params = value.get("params") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(params, dict) or "task" in params:
        return None
    identifier = value.get("id")
    if not isinstance(identifier, int | str):
        return None
    said = [
        _DOMAIN, verdict.workspace_id, verdict.policy_digest, call.scheme, verdict.host, verdict.port, call.target, call.binary,
        params.get("name"), params.get("arguments") or {},
    ]  # fmt: skip
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return ToolAsked(identifier, hashlib.sha256(text.encode()).hexdigest())


class ToolReviews:
    """Which review a call of a tool has, for each workspace; the oldest are forgotten beyond :data:`MOST_REMEMBERED`.

    It is memory alone: after a restart the same call opens a review anew, and nothing is ever sent without one.
    """

    def __init__(self) -> None:
        self._of: dict[str, OrderedDict[str, Remembered]] = {}

    def find(self, workspace: str, asked: ToolAsked) -> Remembered | None:
        """Return the review of this call, or None."""
        known = self._of.get(workspace)
        return None if known is None else known.get(asked.fingerprint)

    def keep(self, workspace: str, asked: ToolAsked, review: str) -> None:
        """Remember the review of a call."""
        known = self._of.setdefault(workspace, OrderedDict())
        known[asked.fingerprint] = Remembered(review, asked.identifier)
        while len(known) > MOST_REMEMBERED:
            known.popitem(last=False)

    def forget(self, workspace: str, asked: ToolAsked) -> None:
        """Forget a call, whose answer was given."""
        known = self._of.get(workspace)
        if known is not None:
            known.pop(asked.fingerprint, None)
            if not known:
                del self._of[workspace]


def tool_waits(view: ReviewView, asked: ToolAsked) -> Answer:
    """Return the answer to a call of a tool that waits for people, or is on its way."""
    poll = f"{REVIEWS_PATH}{view.id}"
    said = (
        f"This call is waiting for a person's decision (review {view.id}, until {view.expires_at}); nothing was sent yet. "
        "Go on with other work, and call this tool with the same arguments again later: the call then gets the answer. "
        f"Without MCP: GET {poll}?wait=30 at this host."
    )
    return _told(view, asked, said)


def tool_ended(view: ReviewView, known: Remembered, asked: ToolAsked) -> Answer:
    """Return the answer to a call of a tool whose review has ended: what the server answered, or why there is none."""
    if view.state == "done" and view.answer is not None:
        found = _message(view.answer, known.identifier)
        if found is not None:
            return in_json(200, {**found, "id": asked.identifier}, *_marks(view))
        cut = ", cut after its first part" if view.answer.truncated else ""
        said = (
            f"A person approved this call and it was sent once. The server answered HTTP {view.answer.status}{cut}, which is no "
            f"answer to a call of a tool; it is kept at {REVIEWS_PATH}{view.id} at this host."
        )
        return _told(view, asked, said)
    problem = ended(view)
    return _told(view, asked, f"{problem['detail']}. Next: {' '.join(map(str, problem['next_steps']))}.")


def _told(view: ReviewView, asked: ToolAsked, said: str) -> Answer:
    poll = f"{REVIEWS_PATH}{view.id}"
    about = {"id": view.id, "state": view.state, "expires_at": view.expires_at, "poll": poll}
    result = {"content": [{"type": "text", "text": said}], "isError": True, "_meta": {"saw/review": about}}
    return in_json(200, {"jsonrpc": "2.0", "id": asked.identifier, "result": result}, *_marks(view))


def _marks(view: ReviewView) -> tuple[tuple[str, str], ...]:
    return ("x-saw-review", view.state), ("x-saw-review-id", view.id)


def _message(answer: ReviewedAnswer, identifier: Identifier) -> dict[str, Any] | None:
    """Return the JSON-RPC answer to ``identifier`` in a stored answer, or None where it holds none that can be read."""
    headers = dict(answer.headers)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    body = None if answer.truncated else _plain(answer.body, headers.get("content-encoding", "").strip().lower())
    if body is None or answer.status != 200:
        return None
    texts = _events(body) if kind == "text/event-stream" else iter((body,))
    for text in texts:
        try:
            value = strict_json.loads(text, limit=MAX_UNPACKED)
        except strict_json.NotStrict:
            continue
        if not isinstance(value, dict) or "method" in value or ("result" in value) == ("error" in value):
            continue
        if type(value.get("id")) is type(identifier) and value["id"] == identifier:
            return value
    return None


def _plain(body: bytes, coding: str) -> bytes | None:
    if coding in {"", "identity"}:
        return body
    if coding not in {"gzip", "deflate"}:
        return None
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        plain = unpack.decompress(body, MAX_UNPACKED)
    except zlib.error:
        return None
    return plain if unpack.eof else None


def _events(body: bytes) -> Iterator[bytes]:
    """Yield the data of each event of an event stream (HTML standard, "Server-sent events")."""
    data: list[bytes] = []
    for line in [*body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"), b""]:
        if not line and data:
            yield b"\n".join(data)
            data = []
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
