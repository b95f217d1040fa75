"""Where the mediators of MCP servers ask people, through the policy agent: a socket in the workspace, one question a connection.

Mediators have no network. The policy agent has the way to the broker and the workspace's identity, and passes on four questions
about tools and nothing else. The answer to a question that cannot be passed on is a refusal, so nothing is called without one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Protocol

import msgspec

from saw import jsontext
from saw.errors import SawError
from saw.review.messages import Digest, Message, ReviewId, Secret
from saw.review.tool import MAX_PARAMS, MaybeDigest, Params, Server, ToolView
from saw.runtime.desk import Desk, Rules

SOCKET = "/run/saw/review/tools.sock"
MAX_QUESTION = MAX_PARAMS // 3 * 4 + 16 * 1024
"""Longest question (bytes): parameters travel in base64."""
MAX_ANSWER = 64 * 1024
"""Longest answer (bytes)."""
MAX_ASKING = 32
"""Most questions at a time."""
LONGEST_WAIT_S = 30


class Ask(Message, frozen=True, kw_only=True, tag="ask"):
    """Ask people about a call."""

    policy_digest: Digest
    server: Server
    params: Params


class Wait(Message, frozen=True, kw_only=True, tag="wait"):
    """Look at a review; while it is pending, for up to ``wait_s`` seconds."""

    id: ReviewId
    wait_s: Annotated[int, msgspec.Meta(ge=0, le=LONGEST_WAIT_S)] = 0


class Claim(Message, frozen=True, kw_only=True, tag="claim"):
    """Claim the one right to make a call."""

    id: ReviewId
    policy_digest: Digest
    server: Server
    params: Params
    claim: Secret


class End(Message, frozen=True, kw_only=True, tag="end"):
    """Tell how a call ended."""

    id: ReviewId
    claim: Secret
    outcome: Literal["done", "failed", "unknown"]
    answer_sha256: MaybeDigest = ""
    detail: Annotated[str, msgspec.Meta(max_length=512)] = ""


Question = Ask | Wait | Claim | End


class Refusal(Message, frozen=True, kw_only=True):
    """Why there is no review to tell of: the broker's refusal, or that it cannot be asked (``review_unavailable``)."""

    code: str
    message: str
    cure: str = ""


class Reply(Message, frozen=True, kw_only=True):
    """One of the two."""

    view: ToolView | None = None
    refused: Refusal | None = None


class ReviewRefused(SawError):
    """The broker refused; ``code`` is its own, or ``review_unavailable`` where it could not be asked."""

    code = "review_refused"

    def __init__(self, code: str, message: str, cure: str = "") -> None:
        super().__init__(message, cure=cure)
        self.code = code


def unavailable(why: str) -> ReviewRefused:
    """Return what a question ends with that nobody answered: nothing is known of it."""
    return ReviewRefused("review_unavailable", why[:300], "call again later with the same arguments")


class Broker(Protocol):
    """What a question is passed on to."""

    def review(self, question: Question) -> ToolView:
        """Return the review; raise :class:`ReviewRefused`."""
        ...


class ReviewDesk(Desk):
    """Serves ``path`` for the user ``uid`` alone until it is closed; ``log`` gets a line for each question that failed here."""

    def __init__(self, path: Path, uid: int, broker: Broker, log: Callable[[str], None]) -> None:
        busy = _reply(unavailable(f"{MAX_ASKING} questions are asked at this moment"))
        rules = Rules(name="a tool", longest=MAX_QUESTION, most=MAX_ASKING, busy=busy)
        super().__init__(path, uid, lambda line: _reply(_ask(broker, line)), log, rules)


def _ask(broker: Broker, line: bytes) -> ToolView | ReviewRefused:
    try:
        question = jsontext.decode(line, kind=Question)
    except msgspec.DecodeError as error:
        return ReviewRefused("malformed", f"the question cannot be read: {error}"[:300])
    try:
        return broker.review(question)
    except ReviewRefused as error:
        return error


def _reply(found: ToolView | ReviewRefused) -> bytes:
    if isinstance(found, ReviewRefused):
        reply = Reply(refused=Refusal(code=found.code, message=found.message, cure=found.cure))
    else:
        reply = Reply(view=found)
    return msgspec.json.encode(reply)
