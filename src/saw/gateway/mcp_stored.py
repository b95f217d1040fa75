"""The stored answer to an approved call of an MCP server: looked at like any other answer, before it is kept for the agent."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from saw.gateway.mcp_exchange import AnswerRefused, Exchange, Finding, Rules, questions
from saw.policy.mcp_messages import MessageInvalid
from saw.review.messages import ReviewedAnswer

_JSON, _EVENTS = "application/json", "text/event-stream"


def stored_answer(
    answer: ReviewedAnswer, body: bytes, rules: Callable[[], Rules], found: Callable[[Finding], None]
) -> ReviewedAnswer:
    """Return what of ``answer`` to the approved ``body`` is kept; ``found`` is told what is not.

    Of a stream that was cut the whole events are kept. What cannot be read becomes an error that says so.
    """
    headers = dict(answer.headers)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        said = questions(body)
    except MessageInvalid as error:
        return _kept(answer, Exchange({}, {}, rules, found).refused(str(error)), _JSON)
    exchange = Exchange(said.asked, {}, rules, found, batch=said.batch)
    try:
        if headers.get("content-encoding", "").strip().lower() not in {"", "identity"}:
            raise AnswerRefused("it is packed, though nobody asked for that")
        if answer.status >= 300:
            return _kept(answer, exchange.error_body(answer.body, answer.status), _JSON)
        if not said.asked:
            return _kept(answer, b"", "")
        if answer.status == 200 and kind == _EVENTS:
            return _kept(answer, _stream(exchange, answer.body, found), _EVENTS)
        if answer.truncated:
            raise AnswerRefused(f"it is longer than the {len(answer.body)} bytes that are kept")
        if kind != _JSON:
            raise AnswerRefused(f"its type {kind[:80]!r} is not what was asked for")
        return _kept(answer, exchange.whole(answer.body), _JSON)
    except AnswerRefused as error:
        found(Finding("refused", str(error)))
        return _kept(answer, exchange.refused(str(error)), _JSON)


def _stream(exchange: Exchange, body: bytes, found: Callable[[Finding], None]) -> bytes:
    try:
        return exchange.stream(body) if body else b""
    except AnswerRefused as error:
        found(Finding("refused", str(error)))
        return error.passed + exchange.refused_events(str(error))


def _kept(answer: ReviewedAnswer, body: bytes, kind: str) -> ReviewedAnswer:
    headers = tuple((name, value) for name, value in answer.headers if name not in {"content-type", "content-encoding"})
    truncated = answer.truncated and kind == _EVENTS
    typed = (*headers, ("content-type", kind)) if kind else headers
    return msgspec.structs.replace(answer, headers=typed, body=body, truncated=truncated)
