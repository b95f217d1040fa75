"""Reads for reviews at the far end: what became of an approved push, and the state that a call which waits would change.

Each question is a call like any other: policy decides on it, the credential is put in outside the workspace, it is in the trail.
"""

from __future__ import annotations

import logging

from saw.gateway.review_link import ReviewLink
from saw.gateway.review_questions import NotAllowed, Questions, Unreached
from saw.review.git_fetch import NotOffered, first_question, offers_of, pack_of, second_question
from saw.review.messages import MAX_CONTEXT, ContextResult, ReadBack, ReadBackResult, ReadContext, ReadState
from saw.review.read_back import compare, question_of
from saw.review.state_diff import MAX_STATE, state_question

LOG = logging.getLogger("saw.gateway")


class Reader:
    """Reads for one gatekeeper and tells the broker; what cannot be told, the broker asks again."""

    def __init__(self, questions: Questions, link: ReviewLink) -> None:
        self._questions = questions
        self._link = link

    async def read(self, asked: ReadBack) -> None:
        """Look what became of a push, and tell; raises :class:`SawError` when it cannot be told."""
        result = await self._read_back(asked)
        LOG.warning("review %s was read back: %s %s", asked.id, result.outcome, result.detail)
        await self._link.tell_read_back(asked.id, result)

    async def read_context(self, asked: ReadContext) -> None:
        """Read what a push would change, and tell; raises as :meth:`read`."""
        result = await self._context(asked)
        LOG.info("the state before the push of review %s: %s %s", asked.id, result.outcome, result.detail)
        await self._link.tell_context(asked.id, result)

    async def read_state(self, asked: ReadState) -> None:
        """Read what a write would change, and tell; raises as :meth:`read`."""
        question = state_question(asked.scheme, asked.host, asked.port, asked.path)
        try:
            answer = await self._questions.ask(asked, question, most=MAX_STATE + 1)
            result = ContextResult(step=1, outcome="read", answer=answer)
        except NotAllowed as error:
            result = ContextResult(step=1, outcome="unreadable", detail=str(error)[:1024])
        except Unreached as error:
            result = ContextResult(step=1, outcome="unreached", detail=str(error)[:1024])
        LOG.info("the state before the write of review %s: %s %s", asked.id, result.outcome, result.detail)
        await self._link.tell_context(asked.id, result)

    async def _read_back(self, asked: ReadBack) -> ReadBackResult:
        question = question_of(asked.call)
        if question is None:
            return ReadBackResult(outcome="undecided", detail="only pushes are read back")
        try:
            answer = await self._questions.ask(asked, question)
        except NotAllowed as error:
            return ReadBackResult(outcome="undecided", detail=str(error)[:1024])
        except Unreached as error:
            return ReadBackResult(outcome="unreached", detail=str(error)[:1024])
        outcome, detail = compare(asked.call, answer)
        return ReadBackResult(outcome=outcome, detail=detail[:1024])

    async def _context(self, asked: ReadContext) -> ContextResult:
        try:
            offers = offers_of(await self._questions.ask(asked, first_question(asked)))
            answer = await self._questions.ask(asked, second_question(asked, offers), most=MAX_CONTEXT)
            return ContextResult(step=asked.step, outcome="read", pack=pack_of(answer))
        except (NotAllowed, NotOffered) as error:
            return ContextResult(step=asked.step, outcome="unreadable", detail=str(error)[:1024])
        except Unreached as error:
            return ContextResult(step=asked.step, outcome="unreached", detail=str(error)[:1024])


__all__ = ["Reader"]
