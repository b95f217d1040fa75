"""Sends approved calls: claims one, judges it again, brings it once to ring 2's Envoy, and tells the broker what came of it.

There is no second attempt. ``failed`` is told only when certainly nothing was sent: the call was refused, Envoy was not
reached, or Envoy says that it had no connection to the far end. Whatever else is without an answer is ``unknown``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import httpx

from saw.audit.events import EventFactory, Outcome
from saw.errors import SawError
from saw.gateway.answer_audit import AnswerAudit
from saw.gateway.envoy_parts import NOT_SENT, SEND_TICKET
from saw.gateway.errors import ReviewUnavailable
from saw.gateway.events import event_of, review_event
from saw.gateway.judge import Judge, Refused, Verdict
from saw.gateway.mcp_exchange import AnswerRefused, Rules
from saw.gateway.mcp_stored import stored_answer
from saw.gateway.read_back import Reader
from saw.gateway.review_exchange import call_of, exchange
from saw.gateway.review_link import ReviewLink
from saw.gateway.review_questions import Questions
from saw.gateway.spool import Spool
from saw.gateway.tickets import Tickets
from saw.review.digest import request_digest
from saw.review.messages import Claimed, ReadBack, ReadContext, ReadState, ReviewedAnswer, ReviewResult

LOG = logging.getLogger("saw.gateway")

MOST_AT_ONCE = 8
"""How many approved calls may be on their way at a time."""
MARGIN_S = 5.0
"""How long before the claim ends an answer is no longer waited for, so that the result can still be told (seconds)."""
RETRY_FIRST_S, RETRY_MOST_S = 0.2, 2.0


def _new_secret() -> str:
    """Return what makes one claim ours: asked again with it after a lost answer, the broker gives the same call."""
    return secrets.token_urlsafe(32)


class Unsent(Exception):
    """Certainly nothing was sent; the text says why."""


class Sender:
    """The loop of one gatekeeper. ``doubt`` says why nothing may be claimed now; ``socket`` is where Envoy takes calls."""

    def __init__(
        self,
        judge: Judge,
        link: ReviewLink,
        spool: Spool,
        factory: EventFactory,
        tickets: Tickets[Verdict],
        *,
        socket: Path,
        doubt: Callable[[], str],
        now: Callable[[], datetime],
        wait_s: int,
    ) -> None:
        self._judge = judge
        self._link = link
        self._spool = spool
        self._factory = factory
        self._tickets = tickets
        self._socket = socket
        self._doubt = doubt
        self._now = now
        self._wait_s = wait_s
        # Threads of their own: a list in an answer that waits to be written must not hold up what every call needs.
        self._looking = ThreadPoolExecutor(2, "saw-mcp-answers")
        self._slots = asyncio.Semaphore(MOST_AT_ONCE)
        self._reader = Reader(Questions(judge, spool, factory, tickets, socket=socket), link)

    async def run_forever(self) -> None:
        """Claim and send until cancelled; a call that is on its way then is left to the broker, which calls it unknown."""
        pause, told, secret = RETRY_FIRST_S, "", _new_secret()
        async with asyncio.TaskGroup() as group:
            while True:
                await self._slots.acquire()
                try:
                    claimed = None if self._doubt() else await self._link.claim(self._wait_s, secret)
                except SawError as error:
                    self._slots.release()
                    if error.message != told:
                        LOG.warning("approved calls cannot be claimed: %s", error.message)
                    told = error.message
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, RETRY_MOST_S)
                    continue
                except BaseException:
                    self._slots.release()
                    raise
                if told:
                    LOG.warning("approved calls can be claimed again")
                pause, told = RETRY_FIRST_S, ""
                if isinstance(claimed, Claimed):
                    secret = _new_secret()
                if claimed is None:
                    self._slots.release()
                    await asyncio.sleep(RETRY_FIRST_S)
                else:
                    group.create_task(self._attempt(claimed))

    async def _attempt(self, claimed: Claimed | ReadBack | ReadContext | ReadState) -> None:
        try:
            if isinstance(claimed, ReadBack):
                await self._reader.read(claimed)
            elif isinstance(claimed, ReadContext):
                await self._reader.read_context(claimed)
            elif isinstance(claimed, ReadState):
                await self._reader.read_state(claimed)
            else:
                await self.execute(claimed)
        except SawError as error:
            LOG.critical("the end of review %s could not be told: %s", claimed.id, error.message)
        except Exception as error:  # noqa: BLE001 - one call's fault must not end the others; the broker calls it unknown
            LOG.critical("review %s: internal fault %s", claimed.id, type(error).__name__)
        finally:
            self._slots.release()

    async def execute(self, claimed: Claimed) -> None:
        """Send one claimed call and tell the result; raises what stands between its end and the broker's knowing of it."""
        call = call_of(claimed.call, claimed.binary, claimed.id)
        verdict = await self._judge.decide_approved(
            call, claimed.workspace_id, claimed.policy_digest, claimed.id, rule=claimed.rule
        )
        ends = datetime.fromisoformat(claimed.claim_ends_at)
        try:
            if request_digest(claimed.workspace_id, claimed.call) != claimed.request_digest:
                raise Unsent("the stored call is not the one that was approved: its digest differs")
            if not verdict.allowed:
                raise Unsent(f"{verdict.reason}: {verdict.detail}")
            await self._record(event_of(verdict, self._factory))
            result = await self._send(claimed, verdict, (ends - self._now()).total_seconds() - MARGIN_S)
        except Unsent as error:
            result = ReviewResult(claim=claimed.claim, outcome="failed", detail=str(error)[:1024])
            await self._judge.give_back(verdict, "the approved call was not sent")
        detail: dict[str, object] = {"outcome": result.outcome, "request_digest": claimed.request_digest}
        if result.answer is not None:
            detail |= {"status": result.answer.status, "bytes": len(result.answer.body)}
        if result.detail:
            detail["detail"] = result.detail
        outcome: Outcome = "success" if result.outcome == "done" else "failure"
        event = review_event(verdict, self._factory, self._now(), "result", claimed.id, outcome=outcome, detail=detail)
        try:
            await self._spool.record(event)
        except SawError as error:
            LOG.critical(
                "the end of review %s (%s) is not in the audit trail: %s", claimed.id, result.outcome, error.message
            )
        await self._tell(claimed.id, result, ends)

    async def _record(self, event: dict[str, object]) -> None:
        try:
            await self._spool.record(event)
        except SawError as error:
            raise Unsent(f"the call could not be recorded: {error.message}") from error

    async def _send(self, claimed: Claimed, verdict: Verdict, time_s: float) -> ReviewResult:
        call = claimed.call
        authority = verdict.call.authority
        if time_s <= 0:
            raise Unsent("the claim ended before the call could be sent")
        try:
            ticket = self._tickets.issue((call.method, authority, call.path), verdict)
        except SawError as error:
            raise Unsent(error.message) from error
        # The answer of an MCP server is looked at, so it must come as it is.
        left_out = {"host", "accept-encoding"} if verdict.server else {"host"}
        headers = [(name, value) for name, value in call.headers if name not in left_out]
        headers += [("host", authority), ("idempotency-key", claimed.id), (SEND_TICKET, ticket)]
        try:
            async with asyncio.timeout(time_s):
                answer, mark = await exchange(self._socket, call, headers)
        except (httpx.HTTPError, OSError, TimeoutError) as error:
            if self._tickets.drop(ticket):
                raise Unsent(f"ring 2 did not take the call: {type(error).__name__}") from error
            return ReviewResult(claim=claimed.claim, outcome="unknown", detail=f"no answer: {type(error).__name__}")
        never_asked = self._tickets.drop(ticket)
        if mark is None and not never_asked:
            kept = await self._looked_at(claimed, verdict, answer) if verdict.server else answer
            return ReviewResult(claim=claimed.claim, outcome="done", answer=kept)
        flags = set((mark or "").split(","))
        if never_asked or (flags and flags <= NOT_SENT):
            raise Unsent(f"ring 2 could not send the call ({mark or 'not authorised'})")
        return ReviewResult(claim=claimed.claim, outcome="unknown", detail=f"the far end gave no answer ({mark})")

    async def _looked_at(self, claimed: Claimed, verdict: Verdict, answer: ReviewedAnswer) -> ReviewedAnswer:
        """Return what is kept of an MCP server's answer."""

        def rules() -> Rules:
            try:
                return self._judge.rules(verdict)
            except Refused as refusal:
                raise AnswerRefused(f"{refusal.reason}: {refusal.detail}") from None

        audit = AnswerAudit(verdict, self._spool, self._factory, self._now)
        kept = await asyncio.get_running_loop().run_in_executor(
            self._looking, stored_answer, answer, claimed.call.body, rules, audit.found
        )
        try:
            await audit.tell(end=True)
        except SawError as error:
            LOG.critical("what was kept of review %s's answer is not in the audit trail: %s", claimed.id, error.message)
        return kept

    async def _tell(self, review: str, result: ReviewResult, ends: datetime) -> None:
        """Tell the broker; only telling is repeated, until the claim has ended."""
        pause = RETRY_FIRST_S
        while True:
            try:
                return await self._link.tell(review, result)
            except ReviewUnavailable:
                if self._now() >= ends:
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_MOST_S)
