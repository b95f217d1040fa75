"""Calls of tools over stdio that wait for people, at their mediator: asked, waited for, claimed once, and told how they ended.

A client of MCP gives up a request after a minute, and people take longer. So a call is held for a moment, and then answered with
a result that says "call again"; the same tool with the same arguments, whatever its number, is the same call. It is claimed while
somebody is there who waits for the answer, and nothing is written to the server before the broker gave the claim.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec

from saw import jsontext
from saw.policy.mcp_messages import Json
from saw.review.messages import FINAL
from saw.review.tool import ToolView
from saw.runtime.review_desk import (
    MAX_ANSWER,
    SOCKET,
    Ask,
    Claim,
    End,
    Question,
    Reply,
    ReviewRefused,
    Wait,
    unavailable,
)

WAIT_S = 25
"""How long a call is held while people decide (seconds); clients of MCP give up after a minute."""
MAX_HELD = 16
"""Most calls that are held at a time."""
MOST_REMEMBERED = 64
"""How many calls are remembered with their review: as many as may wait at the broker."""
_ANSWER_S = 90.0
_TRIES = 4

AskDesk = Callable[[Question], Awaitable[ToolView]]
"""Asks the policy agent; raises :class:`ReviewRefused`."""

_NOT_YET = frozenset({"lease_lapsed", "after_review_overdue", "not_approved", "already_claimed"})
"""Refusals of a claim after which the same call may be claimed, or have ended, later."""


class Asked(NamedTuple):
    """A call of a tool: by which policy it was judged, whose tool it is, and the bytes that people decide on."""

    policy_digest: str
    server: str
    params: bytes

    @property
    def key(self) -> str:
        """What makes it the same call again."""
        return hashlib.sha256(f"{self.policy_digest}\n{self.server}\n".encode() + self.params).hexdigest()


class Ready(NamedTuple):
    """A call that is claimed: it is written to the server now, or never."""

    asked: Asked
    review: str
    claim: str


class Told(NamedTuple):
    """What the agent is told instead of an answer: a result of the tool."""

    review: ToolView
    result: Json


class Reviews:
    """The reviews of one mediator's calls; the memory is lost with it, and nothing is ever called without a claim."""

    def __init__(self, ask: AskDesk, log: Callable[[Json], None], *, pause: Callable[[float], Awaitable[None]]) -> None:
        self._ask = ask
        self._log = log
        self._pause = pause
        self._known: OrderedDict[str, str] = OrderedDict()
        self._end_awaited: set[str] = set()
        self._held = 0

    async def decide(self, asked: Asked, wanted: Callable[[], bool]) -> Ready | Told:
        """Return the claim to a call that people approved, or what to tell; raise :class:`ReviewRefused`.

        An approval is not claimed for somebody who does not wait any more: ``wanted`` tells, asked right before the claim.
        """
        if not asked.policy_digest:
            raise unavailable("no policy is in force")
        if self._held >= MAX_HELD:
            raise unavailable(f"{MAX_HELD} calls of this server are waiting at this moment")
        self._held += 1
        try:
            view = await self._look(asked)
            if view.state == "pending":
                view = await self._ask(Wait(id=view.id, wait_s=WAIT_S))
            if view.state == "approved" and wanted():
                return await self._claim(asked, view)
            if view.state in FINAL:
                self._end_awaited.discard(asked.key)
                self.forget(asked)
            elif view.state == "executing":
                self._end_awaited.add(asked.key)
            return told(view)
        finally:
            self._held -= 1

    async def end(self, ready: Ready, outcome: str, *, answer: bytes = b"", detail: str = "") -> None:
        """Tell how a claimed call ended; without an answer to that, the broker calls it unknown by itself."""
        digest = hashlib.sha256(answer).hexdigest() if outcome == "done" else ""
        said = {"id": ready.review, "claim": ready.claim, "outcome": outcome, "answer_sha256": digest, "detail": detail}
        try:
            await self._again(msgspec.convert(said, End))
        except ReviewRefused as error:
            self._log({"event": "tool_review", "review": ready.review, "told": outcome, "reason": error.message[:300]})

    async def done(self, ready: Ready, answer: bytes) -> None:
        """Tell that a claimed call was answered. The same call again is another one from then on; but whoever was told meanwhile
        to ask how it ended, is told that first."""
        await self.end(ready, "done", answer=answer)
        if ready.asked.key not in self._end_awaited:
            self.forget(ready.asked)

    def forget(self, asked: Asked) -> None:
        """Forget a call whose end was told: the same one again is another call."""
        self._known.pop(asked.key, None)

    async def _look(self, asked: Asked) -> ToolView:
        known = self._known.get(asked.key)
        if known is not None:
            try:
                return await self._ask(Wait(id=known))
            except ReviewRefused as error:
                if error.code != "unknown_review":
                    raise
        view = await self._ask(Ask(policy_digest=asked.policy_digest, server=asked.server, params=asked.params))
        self._known[asked.key] = view.id
        self._known.move_to_end(asked.key)
        while len(self._known) > MOST_REMEMBERED:
            self._end_awaited.discard(self._known.popitem(last=False)[0])
        return view

    async def _claim(self, asked: Asked, view: ToolView) -> Ready | Told:
        claim = base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()
        ready = Ready(asked, view.id, claim)
        try:
            await self._again(
                Claim(
                    id=view.id,
                    policy_digest=asked.policy_digest,
                    server=asked.server,
                    params=asked.params,
                    claim=claim,
                )
            )
        except ReviewRefused as error:
            if error.code in _NOT_YET:
                return told(view, error)
            if error.code == "review_unavailable":
                # It may have been given. It is not used: then the broker hears so now, or calls it unknown.
                await self.end(ready, "failed", detail="the answer to the claim was lost, nothing was called")
            elif error.code != "outside_delegation":
                self.forget(asked)
            raise
        return ready

    async def _again(self, question: Claim | End) -> ToolView:
        """Ask, again after a pause when nobody answered: the same question has the same answer."""
        for number in range(_TRIES):
            try:
                return await self._ask(question)
            except ReviewRefused as error:
                if error.code != "review_unavailable" or number == _TRIES - 1:
                    raise
                await self._pause(float(2**number))
        raise AssertionError  # pragma: no cover


def told(view: ToolView, refused: ReviewRefused | None = None) -> Told:
    """Return the result of the tool that says how a review stands."""
    said = (
        _words(view) if refused is None else f"{refused.message} (review {view.id}). Nothing was called now. {_LATER}"
    )
    about = {"id": view.id, "state": view.state, "expires_at": view.expires_at}
    result: Json = {"content": [{"type": "text", "text": said}], "isError": True, "_meta": {"saw/review": about}}
    return Told(view, result)


_LATER = "Go on with other work, and call this tool with the same arguments again later: the call is made then, once."


def _words(view: ToolView) -> str:
    name = f"review {view.id}"
    if view.state == "executing":
        return (
            f"A person approved this call and it is being made now ({name}). Its answer goes to the request that was first; "
            "call again to hear how it ended."
        )
    if view.state not in FINAL:
        return f"This call is waiting for a person's decision ({name}, until {view.expires_at}); nothing was called. {_LATER}"
    if view.state in {"done", "unknown"}:
        how = "was made, and its answer went to an earlier request" if view.state == "done" else "may have been made"
        return f"A person approved this call and it {how} ({name}). Look at what it did before you call it again."
    why = {"denied": "A person denied this call", "expired": "Nobody decided on this call in time"}.get(
        view.state, "This call was not made"
    )
    step = (
        "Do not ask for it again without a reason that is new." if view.state == "denied" else "Call again to ask anew."
    )
    return f"{why}: {view.detail or view.state} ({name}). {step}"


def desk_client(path: str = SOCKET) -> AskDesk:
    """Return what asks the policy agent at the socket ``path``."""

    async def ask(question: Question) -> ToolView:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await _exchange(path, question)
        except (OSError, TimeoutError, EOFError, asyncio.LimitOverrunError, msgspec.MsgspecError) as error:
            raise unavailable(f"the policy agent does not answer: {type(error).__name__}") from error

    return ask


async def _exchange(path: str, question: Question) -> ToolView:
    reader, writer = await asyncio.open_unix_connection(path, limit=MAX_ANSWER)
    try:
        writer.write(msgspec.json.encode(question) + b"\n")
        await writer.drain()
        reply = jsontext.decode(await reader.readuntil(b"\n"), kind=Reply)
    finally:
        writer.close()
    if reply.refused is not None:
        raise ReviewRefused(reply.refused.code, reply.refused.message, reply.refused.cure)
    if reply.view is None:
        raise unavailable("the policy agent answered nothing")
    return reply.view


__all__ = ["SOCKET", "WAIT_S", "AskDesk", "Asked", "Ready", "Reviews", "Told", "desk_client", "told"]
