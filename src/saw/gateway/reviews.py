"""The review service of ring 2: takes in calls that wait for a person, and tells their workspace what became of them.

Envoy brings a call here only after the gatekeeper has judged it, with the ticket of that judgement; nothing is believed
that the ticket does not stand for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime

from saw.audit.events import EventFactory
from saw.errors import SawError
from saw.gateway.app import Receive, Scope, Send
from saw.gateway.envoy_parts import HOP_HEADERS
from saw.gateway.errors import ReviewRefused, ReviewUnavailable, UnknownReview
from saw.gateway.events import review_event
from saw.gateway.held import Held
from saw.gateway.judge import Verdict
from saw.gateway.placeholders import holds_placeholder
from saw.gateway.review_answers import Answer, git_waits, problem, state_of, waits
from saw.gateway.review_link import ReviewLink
from saw.gateway.review_mcp import ToolAsked, ToolReviews, tool_asked, tool_ended, tool_waits
from saw.gateway.spool import Spool
from saw.gateway.tickets import Bound, Tickets
from saw.policy.actions import RECEIVE_PACK, git_service
from saw.policy.review_poll import Poll
from saw.review.messages import FINAL, MAX_REVIEWED_BODY, OpenReview, ReviewedCall, ReviewView
from saw.review.state_diff import has_state, state_question

LOG = logging.getLogger("saw.gateway")

TICKET = "x-saw-ticket"
BODY_TIME_S = 120.0
"""Longest time that a body may take to arrive (seconds)."""
MOST_OPENING, MOST_OPENING_EACH = 32, 4
"""How many calls may be taken in at a time, of all workspaces and of one: bounds the memory for bodies."""
MOST_WAITING_EACH = 8
"""How many questions of one workspace are held back at a time; further ones are answered at once."""
_DRAINED = 64 * MAX_REVIEWED_BODY

_NOT_KEPT = frozenset(
    {
        *HOP_HEADERS,
        "host",
        "authorization",
        "cookie",
        "idempotency-key",
        "x-request-id",
        "x-api-key",
        "via",
        "forwarded",
    }
)


class ReviewApp:
    """An ASGI application behind Envoy's route for calls that wait.

    ``credential_headers`` returns the header names that loaded releases inject; ``now`` the time; ``may_read`` tells whether
    policy lets the workspace of a decided call make another one, so that people can be shown what it would answer.
    """

    def __init__(
        self,
        tickets: Tickets[Verdict],
        link: ReviewLink,
        spool: Spool,
        factory: EventFactory,
        *,
        credential_headers: Callable[[], frozenset[str]],
        now: Callable[[], datetime],
        may_read: Callable[[Verdict, ReviewedCall], bool],
    ) -> None:
        self._may_read = may_read
        self._tickets = tickets
        self._link = link
        self._spool = spool
        self._factory = factory
        self._credential_headers = credential_headers
        self._now = now
        self._opening: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._tools = ToolReviews()
        self._one_by_one: dict[str, asyncio.Lock] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call that Envoy brings."""
        if scope["type"] != "http":
            return
        try:
            answer = await self._answer(scope, receive)
        except asyncio.CancelledError:
            raise
        except ReviewRefused as error:
            answer = problem(
                409, error.code, error.message, "end or wait for reviews of this workspace, then make the call again"
            )
        except SawError as error:
            LOG.warning("a review cannot be served: %s", error.message)
            answer = _unavailable(error.message)
        except Exception as error:  # noqa: BLE001 - any fault of ours must end as a refusal, without its text
            LOG.critical("a review cannot be served: internal fault %s", type(error).__name__)
            answer = _unavailable("the review service could not take this call in")
        if answer is None:
            return
        status, headers, content = answer
        if status not in {204, 304}:
            headers = [*headers, (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, scope: Scope, receive: Receive) -> Answer | None:
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        brought = [value for name, value in headers if name == TICKET]
        verdict = self._tickets.redeem(brought[0], bound_of(scope, headers)) if len(brought) == 1 else None
        if verdict is None:
            return problem(403, "review_refused", "the call was not sent here by the gatekeeper's decision")
        if verdict.poll is not None:
            return await self._poll(verdict.workspace_id, verdict.poll, verdict.policy_digest)
        if verdict.held is None:
            return problem(403, "review_refused", "nobody has to decide on this call")
        workspace = verdict.workspace_id
        if self._opening.total() >= MOST_OPENING or self._opening[workspace] >= MOST_OPENING_EACH:
            return _unavailable("too many calls are being taken in for review at the moment")
        self._opening[workspace] += 1
        try:
            return await self._open(verdict, verdict.held, headers, receive)
        finally:
            self._opening[workspace] -= 1
            self._opening += Counter()

    async def _open(
        self, verdict: Verdict, held: Held, headers: list[tuple[str, str]], receive: Receive
    ) -> Answer | None:
        try:
            async with asyncio.timeout(BODY_TIME_S):
                body = await _read(receive)
        except TimeoutError:
            return problem(408, "review_refused", "the body of the call did not arrive in time", "send it again")
        if body is None:
            return None
        if isinstance(body, int):
            return problem(
                413,
                "review_body_too_large",
                f"a call that waits for a person may have {MAX_REVIEWED_BODY} bytes, this one has more",
                "split the change into smaller ones",
            )
        tool = tool_asked(verdict, body)
        if tool is None:
            return await self._opened(verdict, held, headers, body)
        async with self._one_by_one.setdefault(verdict.workspace_id, asyncio.Lock()):
            return await self._tool(verdict, held, headers, body, tool)

    async def _tool(
        self, verdict: Verdict, held: Held, headers: list[tuple[str, str]], body: bytes, tool: ToolAsked
    ) -> Answer:
        """Answer a call of an MCP tool: it is the same call as before where tool and arguments are."""
        workspace = verdict.workspace_id
        known = self._tools.find(workspace, tool)
        if known is not None:
            try:
                view = await self._link.view(known.review, workspace, 0)
            except UnknownReview:
                self._tools.forget(workspace, tool)
            else:
                if view.state not in FINAL:
                    return tool_waits(view, tool)
                self._tools.forget(workspace, tool)
                return tool_ended(view, known, tool)
        view = await self._ask(verdict, held, headers, body)
        self._tools.keep(workspace, tool, view.id)
        return tool_waits(view, tool)

    async def _opened(self, verdict: Verdict, held: Held, headers: list[tuple[str, str]], body: bytes) -> Answer:
        view, call = await self._ask(verdict, held, headers, body), verdict.call
        if git_service(call.method, call.target.partition("?")[0]) == RECEIVE_PACK:
            told = git_waits(view, body, call.headers.get("content-encoding", ""), verdict.policy_digest)
            if told is not None:
                return told
        return waits(view, verdict.policy_digest)

    async def _ask(self, verdict: Verdict, held: Held, headers: list[tuple[str, str]], body: bytes) -> ReviewView:
        """Open a review of this call at the broker, or get the one that is open for these bytes."""
        call = verdict.call
        made = ReviewedCall(
            method=call.method,
            scheme="https" if call.scheme == "https" else "http",
            host=verdict.host,
            port=verdict.port,
            path=call.target,
            headers=kept_headers(headers, self._credential_headers()),
            body=body,
        )
        question = state_question(made.scheme, made.host, made.port, made.path) if has_state(made) else None
        asked = OpenReview(
            workspace_id=verdict.workspace_id,
            call=made,
            policy_digest=verdict.policy_digest,
            group=held.group,
            quorum=held.quorum,
            expires_in_s=held.expires_in_s,
            rule=held.rule,
            delegation=held.delegation,
            binary=call.binary,
            request_id=call.request_id[:64],
            readable=question is not None and self._may_read(verdict, question),
        )
        view = await self._link.open(asked)
        detail = {"state": view.state, "request_digest": view.request_digest, "group": held.group, "rule": held.rule}
        event = review_event(verdict, self._factory, self._now(), "open", view.id, detail=detail)
        await self._spool.record(event)
        return view

    async def _poll(self, workspace: str, poll: Poll, policy_digest: str) -> Answer:
        wait = poll.wait
        if self._waiting[workspace] >= MOST_WAITING_EACH:
            wait = 0
        self._waiting[workspace] += 1
        try:
            view = await self._link.view(poll.review, workspace, wait)
        except UnknownReview as error:
            return problem(404, error.code, "this workspace has no such review", "check the id")
        finally:
            self._waiting[workspace] -= 1
            self._waiting += Counter()
        return state_of(view, policy_digest)


def bound_of(scope: Scope, headers: Iterable[tuple[str, str]]) -> Bound:
    """Return what a ticket must have been issued for to be good for this request."""
    hosts = [value for name, value in headers if name == "host"]
    query = scope["query_string"].decode("latin-1")
    path = scope["raw_path"].decode("latin-1")
    return scope["method"], hosts[0] if len(hosts) == 1 else "", f"{path}?{query}" if query else path


def kept_headers(headers: Iterable[tuple[str, str]], credential_headers: frozenset[str]) -> tuple[tuple[str, str], ...]:
    """Return the agent's own headers in order, without those of the connection, of the rings, and every credential."""
    found = [(name.lower(), value) for name, value in headers]
    named = {
        part.strip().lower()
        for name, value in found
        if name == "connection"
        for part in value.split(",")
        if part.strip()
    }
    return tuple(
        (name, value)
        for name, value in found
        if name not in _NOT_KEPT
        and name not in credential_headers
        and name not in named
        and not name.startswith(("x-saw-", "x-envoy-", "x-forwarded-", "proxy-"))
        and not holds_placeholder(value)
    )


def _unavailable(detail: str) -> Answer:
    return problem(503, ReviewUnavailable.code, detail, "make the call again later; nothing was sent")


async def _read(receive: Receive) -> bytes | int | None:
    """Return the body, its size when that is more than a review takes, or None when the caller went away.

    What is too large is read to its end (within bounds), so that the refusal arrives.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece = message.get("body", b"")
        size += len(piece)
        if size <= MAX_REVIEWED_BODY:
            parts.append(piece)
        else:
            parts.clear()
        if not message.get("more_body", False) or size > _DRAINED:
            return b"".join(parts) if size <= MAX_REVIEWED_BODY else size
