"""Questions of our own to a far end, for a review: judged like a call of the workspace, recorded, sent through ring 2 once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from saw.audit.events import EventFactory
from saw.errors import SawError
from saw.gateway.envoy_parts import SEND_TICKET
from saw.gateway.events import event_of
from saw.gateway.judge import Judge, Verdict
from saw.gateway.review_exchange import call_of, exchange
from saw.gateway.spool import Spool
from saw.gateway.tickets import Tickets
from saw.review.messages import MAX_REVIEWED_ANSWER, FarEnd, ReadBack, ReviewedAnswer, ReviewedCall

PATIENCE_S = 30.0
"""How long the far end has for an answer (seconds)."""


class NotAllowed(Exception):
    """Policy refuses the question; the text says why."""


class Unreached(Exception):
    """There is no answer of the far end; the text says why."""


class Questions:
    """Asks for one gatekeeper; ``socket`` is where Envoy takes calls."""

    def __init__(
        self, judge: Judge, spool: Spool, factory: EventFactory, tickets: Tickets[Verdict], *, socket: Path
    ) -> None:
        self._judge = judge
        self._spool = spool
        self._factory = factory
        self._tickets = tickets
        self._socket = socket

    async def ask(
        self, about: ReadBack | FarEnd, question: ReviewedCall, *, most: int = MAX_REVIEWED_ANSWER
    ) -> ReviewedAnswer:
        """Return the far end's answer, ``most`` bytes of it; raise :class:`NotAllowed` or :class:`Unreached`."""
        # What became of a push is part of the push that people approved; what it would change is not.
        decide = self._judge.decide_approved if isinstance(about, ReadBack) else self._judge.decide_question
        call = call_of(question, about.binary, about.id)
        verdict = await decide(call, about.workspace_id, about.policy_digest, about.id)
        try:
            await self._spool.record(event_of(verdict, self._factory))
            if not verdict.allowed:
                raise NotAllowed(f"{verdict.reason}: {verdict.detail}")
            ticket = self._tickets.issue((question.method, verdict.call.authority, question.path), verdict)
        except SawError as error:
            raise Unreached(error.message) from error
        headers = [("host", verdict.call.authority), *question.headers, (SEND_TICKET, ticket)]
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer, mark = await exchange(self._socket, question, headers, most=most)
        except (httpx.HTTPError, OSError, TimeoutError) as error:
            raise Unreached(f"no answer: {type(error).__name__}") from error
        finally:
            self._tickets.drop(ticket)
        if mark is not None or answer.status >= 500:
            raise Unreached(f"no answer of the far end ({mark or answer.status})")
        return answer
