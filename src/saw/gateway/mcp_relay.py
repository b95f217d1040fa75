"""Brings allowed calls of MCP servers over HTTP to them, and passes on what :mod:`saw.gateway.mcp_exchange` lets pass back.

Envoy brings such a call here after the gatekeeper has judged it, with the ticket of that judgement; from here it goes to Envoy
again, which adds the credential and dials. Answers are read as they come: one event, or one JSON answer, is kept at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import httpx

from saw.audit.events import EventFactory
from saw.errors import SawError
from saw.gateway.answer_audit import AnswerAudit
from saw.gateway.app import Receive, Scope, Send, gone
from saw.gateway.envoy_parts import HOP_HEADERS, LOCAL_MARK, SEND_TICKET
from saw.gateway.judge import Refused, Verdict
from saw.gateway.mcp_exchange import AnswerRefused, Asked, Exchange, Finding, Rules, Sessions, questions
from saw.gateway.review_answers import in_json, problem
from saw.gateway.reviews import TICKET, bound_of
from saw.gateway.spool import Spool
from saw.gateway.tickets import Tickets
from saw.policy.mcp_http import METHOD_HEADER, NAME_HEADER, SESSION_HEADER
from saw.policy.mcp_messages import MAX_MESSAGE, MessageInvalid
from saw.policy.seen_body import LONGEST

LOG = logging.getLogger("saw.gateway")

REPLY_TIME_S = 30.0
"""Longest time for telling a server something in the client's place (seconds)."""
AT_ONCE = 64 * 1024
"""Up to how many bytes are read at once; more are read beside the decisions on other calls."""
MOST, MOST_EACH = 512, 64
"""How many calls may be on their way at a time, of all workspaces and of one: bounds the memory for answers."""
LISTING = 4
"""How many lists of tools are looked at, and kept, at a time."""
_JSON, _EVENTS = "application/json", "text/event-stream"
_SESSION = re.compile(r"[\x21-\x7e]{1,256}\Z")
_NOT_SENT = frozenset({*HOP_HEADERS, "host", "accept-encoding"})
_NOT_BACK = frozenset(
    {*HOP_HEADERS, "content-type", "content-encoding", "content-length", "alt-svc", "etag", "trailer"}
)
_OF_THE_CALL = ("accept", "content-type", "last-event-id", METHOD_HEADER, NAME_HEADER)
_OURS = ("x-saw-", "x-envoy-", "x-forwarded-")

Headers = list[tuple[str, str]]


class McpRelay:
    """An ASGI application behind Envoy's route for MCP servers whose answers are looked at.

    ``rules`` returns what answers to an allowed call are judged by now (:meth:`saw.gateway.judge.Judge.rules`).
    ``arriving`` are the tickets with which Envoy brings calls, ``sending`` those with which they go back to its ``socket``.
    """

    def __init__(
        self,
        rules: Callable[[Verdict], Rules],
        arriving: Tickets[Verdict],
        sending: Tickets[Verdict],
        spool: Spool,
        factory: EventFactory,
        *,
        socket: Path,
        now: Callable[[], datetime],
    ) -> None:
        self._rules = rules
        self._arriving = arriving
        self._sending = sending
        self._spool = spool
        self._factory = factory
        # One transport for all, as each has a TLS context to set up, though nothing here speaks TLS; each call connects anew.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._transport = httpx.AsyncHTTPTransport(uds=str(socket), retries=0, limits=limits)
        self._now = now
        # Threads of their own: lists that wait to be written must not hold up ledger, names and state, which every call needs.
        self._listing = ThreadPoolExecutor(LISTING, "saw-mcp-lists")
        self._sessions = Sessions()
        self._replying: set[asyncio.Task[None]] = set()
        self._active: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call that Envoy brings."""
        if scope["type"] != "http":
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        brought = [value for name, value in headers if name == TICKET]
        verdict = self._arriving.redeem(brought[0], bound_of(scope, headers)) if len(brought) == 1 else None
        body = await _read(receive)
        if body is None:
            return
        answer = _Sending(send)
        if verdict is None or not verdict.server:
            await answer.plain(
                *problem(403, "gatekeeper_unavailable", "the call was not sent here by the gatekeeper's decision")
            )
            return
        workspace = verdict.workspace_id
        if self._active.total() >= MOST or self._active[workspace] >= MOST_EACH:
            await answer.plain(
                *problem(503, "gatekeeper_unavailable", "too many calls of MCP servers are open", "end some, try again")
            )
            return
        self._active[workspace] += 1
        relaying = asyncio.create_task(self._relay(verdict, headers, body, answer))
        left = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({relaying, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._active[workspace] -= 1
            self._active += Counter()
            for task in (relaying, left):
                task.cancel()
            await asyncio.gather(relaying, left, return_exceptions=True)

    async def _relay(self, verdict: Verdict, headers: Headers, body: bytes, answer: _Sending) -> None:
        audit = AnswerAudit(verdict, self._spool, self._factory, self._now)
        try:
            await self._answered(verdict, headers, body, answer, audit)
            await audit.tell(end=True)
        except (httpx.HTTPError, OSError) as error:
            LOG.warning("the call %s of an MCP server ended: %s", verdict.call.request_id, type(error).__name__)
            await answer.broken()
        except SawError as error:
            LOG.critical("the call %s of an MCP server is ended: %s", verdict.call.request_id, error.message)
            await answer.broken()
        except Exception as error:  # noqa: BLE001 - any fault of ours must end as a refusal, without its text
            LOG.critical(
                "the call %s of an MCP server is ended: internal fault %s",
                verdict.call.request_id,
                type(error).__name__,
            )
            await answer.broken()

    async def _answered(
        self, verdict: Verdict, headers: Headers, body: bytes, answer: _Sending, audit: AnswerAudit
    ) -> None:
        def rules() -> Rules:
            try:
                return self._rules(verdict)
            except Refused as refusal:
                raise AnswerRefused(f"{refusal.reason}: {refusal.detail}") from None

        sessions = [value for name, value in headers if name == SESSION_HEADER]
        known = len(sessions) == 1 and _SESSION.match(sessions[0]) is not None
        asked: Asked = self._sessions.asked(verdict.workspace_id, verdict.server, sessions[0]) if known else {}
        try:
            said = questions(body)
            for called_off in said.cancelled:
                asked.pop(called_off, None)
            exchange = Exchange(said.asked, asked, rules, audit.found, batch=said.batch)
        except (MessageInvalid, AnswerRefused) as error:
            await answer.whole(200, [], _for_nothing(body, str(error)))
            return
        try:
            async with self._sent(verdict, verdict.call.method, headers, said.body) as response:
                given = response.headers.get(SESSION_HEADER)
                replying = headers if given is None else [*_without(headers, SESSION_HEADER), (SESSION_HEADER, given)]
                back = _Back(
                    response, exchange, audit, lambda reply: self._reply(verdict, replying, reply), self._listing
                )
                await back.to(answer, verdict.call.method)
        finally:
            exchange.over(resumable=known)

    @contextlib.asynccontextmanager
    async def _sent(
        self, verdict: Verdict, method: str, headers: Headers, body: bytes
    ) -> AsyncIterator[httpx.Response]:
        call = verdict.call
        ticket = self._sending.issue((method, call.authority, call.target), verdict)
        fields = [(name, value) for name, value in headers if name not in _NOT_SENT and not name.startswith(_OURS)]
        fields += [("host", call.authority), (SEND_TICKET, ticket), ("accept-encoding", "identity")]
        request = httpx.Request(
            method,
            httpx.URL(scheme="http", host="ring2", path="/"),
            headers=[(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields],
            content=body,
            extensions={"target": call.target.encode("latin-1"), "timeout": httpx.Timeout(None, connect=5.0).as_dict()},
        )
        try:
            response = await self._transport.handle_async_request(request)
            response.request = request
            try:
                yield response
            finally:
                await response.aclose()
        finally:
            self._sending.drop(ticket)

    def _reply(self, verdict: Verdict, headers: Headers, reply: bytes) -> None:
        """Begin to tell the server something in the client's place; what comes of it changes nothing."""

        async def tell() -> None:
            fields = [*_without(headers, *_OF_THE_CALL), ("content-type", _JSON), ("accept", f"{_JSON}, {_EVENTS}")]
            try:
                async with asyncio.timeout(REPLY_TIME_S), self._sent(verdict, "POST", fields, reply):
                    pass
            except (httpx.HTTPError, OSError, TimeoutError, SawError) as error:
                LOG.warning("an MCP server was not told about its own request: %s", type(error).__name__)

        task = asyncio.create_task(tell())
        self._replying.add(task)
        task.add_done_callback(self._replying.discard)


class _Back:
    """One answer on its way back. ``reply`` begins to tell the server something in the client's place.

    Lists of tools are looked at by ``listing``.
    """

    def __init__(
        self,
        response: httpx.Response,
        exchange: Exchange,
        audit: AnswerAudit,
        reply: Callable[[bytes], None],
        listing: Executor,
    ) -> None:
        self._response = response
        self._exchange = exchange
        self._audit = audit
        self._reply = reply
        self._listing = listing

    async def to(self, answer: _Sending, method: str) -> None:
        """Pass on what may be passed on, for a call by ``method``."""
        response, exchange, status = self._response, self._exchange, self._response.status_code
        raw = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.headers.raw]
        kept = [(name, value) for name, value in raw if name not in _NOT_BACK and not name.startswith(_OURS)]
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        coding = response.headers.get("content-encoding", "").strip().lower()
        if response.headers.get(LOCAL_MARK) is not None:
            # Envoy's own words: the server was not reached, or the gatekeeper's second answer was no.
            fields = [*kept, ("content-type", response.headers.get("content-type", "text/plain"))]
            await answer.start(status, fields)
            await answer.end(await _all(response))
            return
        try:
            if coding not in {"", "identity"}:
                raise AnswerRefused(f"it is packed as {coding[:40]!r}, though nobody asked for that")
            if status == 200 and kind == _EVENTS:
                await self._streamed(kept, answer)
                return
            body = await _all(response)
            if status >= 300:
                passed = exchange.error_body(body, status)
            elif not exchange.asks and method != "GET":
                passed = b""
            elif kind != _JSON or method == "GET":
                raise AnswerRefused(f"its type {kind[:80]!r} is not what was asked for")
            else:
                passed = await self._decided(exchange.whole, body)
        except AnswerRefused as error:
            await self._told(str(error))
            await answer.whole(200 if exchange.asks else 502, kept, exchange.refused(str(error)))
            return
        await self._told()
        await answer.whole(status, kept, passed)

    async def _decided(self, decide: Callable[[bytes], bytes], piece: bytes) -> bytes:
        """Return what ``decide`` makes of ``piece``; other calls are decided meanwhile where it may take long."""
        if self._exchange.lists:
            return await asyncio.get_running_loop().run_in_executor(self._listing, decide, piece)
        if self._exchange.held + len(piece) > AT_ONCE:
            return await asyncio.to_thread(decide, piece)
        return decide(piece)

    async def _told(self, refused: str = "") -> None:
        if refused:
            self._audit.found(Finding("refused", refused))
        await self._audit.tell()
        for reply in self._exchange.replies():
            self._reply(reply)

    async def _streamed(self, kept: Headers, answer: _Sending) -> None:
        exchange = self._exchange
        await answer.start(200, [*kept, ("content-type", _EVENTS)])
        try:
            async for piece in self._response.aiter_raw():
                passed = await self._decided(exchange.stream, piece) if piece else b""
                await self._told()
                if passed:
                    await answer.more(passed)
        except AnswerRefused as error:
            await self._told(str(error))
            await answer.end(error.passed + exchange.refused_events(str(error)))
            return
        await answer.end(b"")


class _Sending:
    """The answer to the client, which is begun once and ended once."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = self._ended = False

    async def plain(self, status: int, headers: list[tuple[bytes, bytes]], content: bytes) -> None:
        """Send a whole answer of ours."""
        await self.start(status, [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers])
        await self.end(content)

    async def whole(self, status: int, headers: Headers, content: bytes) -> None:
        """Send a whole JSON answer, or an empty one."""
        kind = [("content-type", _JSON)] if content else []
        length = [] if status in {204, 304} else [("content-length", str(len(content)))]
        await self.start(status, [*headers, *kind, *length])
        await self.end(b"" if status in {204, 304} else content)

    async def start(self, status: int, headers: Headers) -> None:
        """Begin an answer."""
        self._begun = True
        fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await self._send({"type": "http.response.start", "status": status, "headers": fields})

    async def more(self, content: bytes) -> None:
        """Send one more piece."""
        await self._send({"type": "http.response.body", "body": content, "more_body": True})

    async def end(self, content: bytes) -> None:
        """Send the last piece."""
        self._ended = True
        await self._send({"type": "http.response.body", "body": content})

    async def broken(self) -> None:
        """Say that there is no answer, or end what has begun."""
        if not self._begun:
            detail = "the server's answer could not be read"
            await self.plain(
                *in_json(
                    502, {"error": "policy_denied", "layer": "ring2", "reason": "answer_unreadable", "detail": detail}
                )
            )
        elif not self._ended:
            await self.end(b"")


def _for_nothing(body: bytes, why: str) -> bytes:
    """Return the error to a call that is not sent because of its ids."""
    try:
        asked = questions(body)
    except MessageInvalid:
        return Exchange({}, {}, _no_rules, lambda _: None).refused(why)
    return Exchange(asked.asked, {}, _no_rules, lambda _: None, batch=asked.batch).refused(why)


def _no_rules() -> Rules:
    raise AnswerRefused("nothing was asked")


def _without(headers: Headers, *names: str) -> Headers:
    return [(name, value) for name, value in headers if name not in names]


async def _all(response: httpx.Response) -> bytes:
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > MAX_MESSAGE:
            raise AnswerRefused(f"it is longer than {MAX_MESSAGE} bytes")
    return bytes(body)


async def _read(receive: Receive) -> bytes | None:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if sum(map(len, parts)) > LONGEST:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)
