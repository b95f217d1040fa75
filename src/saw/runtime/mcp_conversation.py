"""Between one session and the reviews of its mediator: held calls go out and come back, each claimed one is told of once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from typing import Protocol

from saw.errors import SawError
from saw.policy.mcp_messages import Identifier
from saw.runtime.mcp_protocol import Held, Out, Session
from saw.runtime.mcp_reviews import Asked, Ready, Reviews, Told
from saw.runtime.review_desk import ReviewRefused

MOST_UNREAD = 1024 * 1024
"""Most bytes (beside one answer) that an end of a session leaves unread before it is closed."""
_RUNNING: set[asyncio.Task[None]] = set()
"""What goes on after its session has ended: the broker is still to be told."""


class Writer(Protocol):
    """What of :class:`asyncio.StreamWriter` is used."""

    def write(self, data: bytes) -> None:
        """Send ``data``."""
        ...

    def is_closing(self) -> bool:
        """Tell whether nothing more is sent."""
        ...

    def close(self) -> None:
        """Send nothing more."""
        ...

    @property
    def transport(self) -> asyncio.WriteTransport:
        """What holds the bytes that the other end has not taken yet."""
        ...


class Conversation:
    """The reviewed calls of one session. ``digest`` is the policy in force, ``writers`` lead to ``client`` and ``server``."""

    def __init__(
        self, session: Session, reviews: Reviews, digest: Callable[[], str], writers: Mapping[str, Writer]
    ) -> None:
        self._session = session
        self._reviews = reviews
        self._digest = digest
        self._writers = writers
        self._running: dict[Identifier, Ready] = {}
        self._left = False

    def hold(self, held: Held) -> None:
        """Ask people about a call; it is written, answered or refused once that is known."""
        _start(self._decide(held, Asked(self._digest(), self._session.name, held.params)))

    def from_server(self, line: bytes) -> list[Out]:
        """Judge one line of the server as the session does, and tell of each claimed call that it answers."""
        outs = self._session.from_server(line)
        for number in [number for number in self._running if number not in self._session.asked_by_client]:
            ready = self._running.pop(number)
            answer = next((out.line for out in outs if out.to == "client"), b"")
            _start(self._reviews.done(ready, answer.rstrip(b"\n")))
        return outs

    def leave(self) -> None:
        """Write no further call: the client asks for nothing more."""
        self._left = True

    def close(self) -> None:
        """The session has ended: of what was written and not answered nobody knows the end."""
        self._left = True
        for ready in self._running.values():
            _start(self._reviews.end(ready, "unknown", detail="the session ended before the server answered"))
        self._running.clear()

    async def _decide(self, held: Held, asked: Asked) -> None:
        try:
            found = await self._reviews.decide(
                asked, lambda: not self._left and self._session.held.get(held.identifier) is held
            )
        except ReviewRefused as error:
            reason = "review_required" if error.code == "review_unavailable" else error.code
            detail = f"a person must decide on this call first, and cannot be asked: {error.message}"
            self._send(self._session.refuse(held, reason, detail, error.cure))
            return
        if isinstance(found, Told):
            self._session.log(
                {
                    "event": "tool_review",
                    "server": self._session.name,
                    "tool": held.tool,
                    "review": found.review.id,
                    "state": found.review.state,
                }
            )
            self._send(self._session.tell(held, found.result))
            return
        self._write(held, found)

    def _write(self, held: Held, ready: Ready) -> None:
        """Write a claimed call to the server; without a pause between the last look and that."""
        gone = self._left or self._writers["server"].is_closing() or self._digest() != ready.asked.policy_digest
        out = None
        if not gone:
            # A policy that cannot be read lets nothing through.
            with contextlib.suppress(SawError):
                out = self._session.release(held, ready.review)
        if out is None:
            why = "the call was taken back, or policy or session changed, before it was written"
            _start(self._reviews.end(ready, "failed", detail=why))
            self._reviews.forget(ready.asked)
            self._send(self._session.refuse(held, "review_cancelled", f"nothing was called: {why}", "call it again"))
            return
        self._running[held.identifier] = ready
        self._send(out)

    def _send(self, out: Out | None) -> None:
        if out is None or (writer := self._writers[out.to]).is_closing():
            return
        writer.write(out.line)
        # Nobody waits here until it is taken: who asks and never reads must not fill the mediator's memory.
        if writer.transport.get_write_buffer_size() > MOST_UNREAD:
            writer.close()


def _start(work: Coroutine[None, None, None]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    _RUNNING.add(task)
    task.add_done_callback(_RUNNING.discard)


__all__ = ["Conversation"]
