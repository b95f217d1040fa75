"""What became of an approved push whose answer is not known: the question to the far end, and what its answer says.

A Git server lists its refs before a push (``GET …/info/refs?service=git-receive-pack``, gitprotocol-http and
gitprotocol-pack). Compared with the commands of the push they tell whether it arrived. Nothing is ever sent again.
"""

from __future__ import annotations

import re
from typing import Literal

from saw.policy.gitproto import PushUnreadable, inflate, push_updates
from saw.review.messages import ReviewedAnswer, ReviewedCall

Outcome = Literal["arrived", "not_arrived", "undecided"]

PUSH = "/git-receive-pack"
_ADVERTISED = "application/x-git-receive-pack-advertisement"
_LINE = re.compile(rb"([0-9a-f]{40}|[0-9a-f]{64}) ([^\x00\n]+)")
_FIRST = b"# service=git-receive-pack"
_SHOWN = 5


class Unreadable(ValueError):
    """The far end's answer is no list of refs; the text says why."""


def question_of(call: ReviewedCall) -> ReviewedCall | None:
    """Return the call that asks the far end for its refs; None when ``call`` is no push."""
    path, mark, query = call.path.partition("?")
    if call.method != "POST" or not path.endswith(PUSH) or mark or query:
        return None
    asked = f"{path.removesuffix(PUSH)}/info/refs?service=git-receive-pack"
    return ReviewedCall(method="GET", scheme=call.scheme, host=call.host, port=call.port, path=asked)


def compare(call: ReviewedCall, answer: ReviewedAnswer) -> tuple[Outcome, str]:
    """Return what ``answer``, the far end's refs, says of the push ``call``, and why in words.

    ``arrived``: each ref of the push is what the push makes it. ``not_arrived``: each one is what the push found. Anything else
    is ``undecided``: somebody else has pushed meanwhile, or a part was taken.
    """
    headers = {name: value for name, value in call.headers if name == "content-encoding"}
    try:
        commands = _commands(call.body, headers.get("content-encoding", ""))
        refs = advertised(answer)
    except (PushUnreadable, Unreadable) as error:
        return "undecided", str(error)
    new = [ref for ref, (_, to) in commands.items() if refs.get(ref, "") == to]
    old = [ref for ref, (at, _) in commands.items() if refs.get(ref, "") == at]
    if len(new) == len(commands):
        return "arrived", f"the far end has {_named(new)} as the push makes {'it' if len(new) == 1 else 'them'}"
    if len(old) == len(commands):
        return "not_arrived", f"the far end has {_named(old)} as before the push"
    other = [ref for ref in commands if ref not in new]
    return "undecided", f"the far end has {_named(other)} neither all as before the push nor all as it makes them"


def advertised(answer: ReviewedAnswer) -> dict[str, str]:
    """Return ref → object id (lower-case hex) of a list of refs; raises :class:`Unreadable`."""
    kind = next((value for name, value in answer.headers if name.lower() == "content-type"), "")
    if answer.status != 200 or kind.partition(";")[0].strip() != _ADVERTISED:
        raise Unreadable(f"the far end answered {answer.status} {kind[:80]}".rstrip())
    if answer.truncated:
        raise Unreadable("the far end's list of refs is longer than what is read of it")
    lines = _packets(answer.body)
    # Heading, flush, at least one line (a server without refs lists its capabilities), flush.
    if len(lines) < 4 or lines[0] != _FIRST or lines[1] is not None or lines[-1] is not None:
        raise Unreadable("the far end's answer is no list of refs")
    refs: dict[str, str] = {}
    for line in lines[2:-1]:
        found = None if line is None else _LINE.fullmatch(line.partition(b"\x00")[0])
        if found is None:
            raise Unreadable("a line of the far end's list of refs cannot be read")
        refs[found[2].decode("utf-8", "backslashreplace")] = found[1].decode()
    return refs


def _packets(data: bytes) -> list[bytes | None]:
    """Return the pkt-lines of ``data`` without their line ends, a flush packet as None."""
    found: list[bytes | None] = []
    at = 0
    while at < len(data):
        prefix = data[at : at + 4]
        if not re.fullmatch(rb"[0-9a-fA-F]{4}", prefix):
            raise Unreadable("the far end's answer is not in pkt-lines")
        length = int(prefix, 16)
        if length == 0:
            found.append(None)
            at += 4
            continue
        if length < 5 or at + length > len(data):
            raise Unreadable("a pkt-line of the far end's answer is cut")
        found.append(data[at + 4 : at + length].removesuffix(b"\n"))
        at += length
    return found


def _commands(body: bytes, coding: str) -> dict[str, tuple[str, str]]:
    """Return ref → (object id before, object id after) of a push; no id is an empty text."""
    if not push_updates(body, complete=True, encoding=coding):
        raise PushUnreadable("the push changes nothing")
    found: dict[str, tuple[str, str]] = {}
    data = inflate(body, coding)
    at = 0
    while (length := int(data[at : at + 4], 16)) != 0:
        line = data[at + 4 : at + length].removesuffix(b"\n").partition(b"\x00")[0]
        at += length
        if not line.startswith(b"shallow "):
            old, new, ref = line.decode("ascii").split(" ", 2)
            found[ref] = (_id(old), _id(new))
    return found


def _id(text: str) -> str:
    return text if text.strip("0") else ""


def _named(refs: list[str]) -> str:
    more = f" and {len(refs) - _SHOWN} more" if len(refs) > _SHOWN else ""
    return ", ".join(refs[:_SHOWN]) + more


__all__ = ["PUSH", "Outcome", "Unreadable", "advertised", "compare", "question_of"]
