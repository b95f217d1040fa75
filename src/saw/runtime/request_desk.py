"""Where the decision service passes on what an agent asks for beyond its policy: a socket of the policy agent, two questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Protocol

import msgspec

from saw import jsontext
from saw.errors import SawError
from saw.policy.policy_request import MAX_BODY, Asked, AskedList, Wanted
from saw.review.messages import Message
from saw.runtime.desk import Desk, Rules

SOCKET = "/run/saw/ask/policy.sock"
MAX_QUESTION = 2 * MAX_BODY
"""Longest question (bytes)."""
MAX_ANSWER = 256 * 1024
"""Longest answer (bytes)."""
MAX_ASKING = 4
"""Most questions at a time."""


class More(Wanted, frozen=True, kw_only=True, tag="more"):
    """Ask people for a call that the policy in force refuses."""


class Mine(Message, frozen=True, kw_only=True, tag="mine"):
    """What was asked for here, and what came of it."""


Question = More | Mine


class Refusal(Message, frozen=True, kw_only=True):
    """Why nothing was asked: the broker's refusal, or that it cannot be asked (``ask_unavailable``)."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    message: str
    cure: str = ""


class Reply(Message, frozen=True, kw_only=True):
    """One of the three."""

    asked: Asked | None = None
    mine: AskedList | None = None
    refused: Refusal | None = None


class AskRefused(SawError):
    """The broker refused; ``code`` is its own, or ``ask_unavailable`` where it could not be asked."""

    code = "ask_refused"

    def __init__(self, code: str, message: str, cure: str = "") -> None:
        super().__init__(message, cure=cure)
        self.code = code


def unavailable(why: str) -> AskRefused:
    """Return what a question ends with that nobody answered."""
    return AskRefused("ask_unavailable", why[:300], "ask again later")


class Broker(Protocol):
    """What a question is passed on to."""

    def pass_on(self, question: Question) -> Asked | AskedList:
        """Return the answer; raise :class:`AskRefused`."""
        ...


class RequestDesk(Desk):
    """Serves ``path`` for the user ``uid`` alone, the decision service's; ``log`` gets a line for each question that failed."""

    def __init__(self, path: Path, uid: int, broker: Broker, log: Callable[[str], None]) -> None:
        busy = _refused(unavailable(f"{MAX_ASKING} requests are made at this moment"))
        rules = Rules(name="a policy", longest=MAX_QUESTION, most=MAX_ASKING, busy=busy)
        super().__init__(path, uid, lambda line: _answer(broker, line), log, rules)


def _answer(broker: Broker, line: bytes) -> bytes:
    try:
        question = jsontext.decode(line, kind=Question)
    except msgspec.DecodeError as error:
        return _refused(AskRefused("malformed", f"the question cannot be read: {error}"[:300]))
    try:
        found = broker.pass_on(question)
    except AskRefused as error:
        return _refused(error)
    return msgspec.json.encode(Reply(asked=found) if isinstance(found, Asked) else Reply(mine=found))


def _refused(error: AskRefused) -> bytes:
    return msgspec.json.encode(Reply(refused=Refusal(code=error.code[:64], message=error.message, cure=error.cure)))
