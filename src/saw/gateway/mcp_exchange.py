"""What a server over HTTP answers to one request, decided message by message before it goes on, free of input and output.

The rules are those of the mediator of stdio servers (:mod:`saw.policy.mcp_answers`). An answer passes once, for a request that is
without one. What the server asks of the client never does; the server is told so in the client's place. Everything is written
anew from what was read.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from typing import NamedTuple

from saw.errors import SawError
from saw.gateway.mcp_stream import Event, EventReader, EventUnreadable
from saw.policy.mcp_answers import (
    INITIALIZE,
    LIST_TOOLS,
    READING_CAPABILITIES,
    READING_NOTIFICATIONS,
    SERVER_CAPABILITIES,
    SERVER_NOTIFICATIONS,
    Definitions,
    Listed,
    ServerTools,
    judge_answer,
    refusal,
    without_client_capabilities,
)
from saw.policy.mcp_messages import (
    MAX_OUTSTANDING,
    METHOD_NOT_FOUND,
    Identifier,
    Json,
    MessageInvalid,
    checked,
    encode,
    error_message,
    identifier_of,
    read,
)

LAYER = "ring2"
MAX_BATCH = 64
_NO_TOOLS = ServerTools({}, ())
_CAPABILITIES = SERVER_CAPABILITIES | READING_CAPABILITIES
_NOTIFICATIONS = SERVER_NOTIFICATIONS | READING_NOTIFICATIONS
CANCELLED = "notifications/cancelled"
_SERVER_ERROR = -32000
PING = "ping"
MOST_REPLIES = 64
"""How many of its own requests a server is told about in one exchange; further ones are dropped without a word."""

Asked = MutableMapping[Identifier, str]
"""The requests that are without an answer, each with its method."""


class AnswerRefused(Exception):
    """The answer is not passed on, beyond what of a stream has ``passed``; the text says why."""

    def __init__(self, why: str, passed: bytes = b"") -> None:
        super().__init__(why)
        self.passed = passed


class Finding(NamedTuple):
    """Something that was not passed on as it came: ``kind`` is one of a few words, ``detail`` says more."""

    kind: str
    detail: str


class Rules(NamedTuple):
    """What counts when a message comes: ``tools`` returns those of the server, ``definitions`` is what is known of them.

    ``shows``: whether the agent is told of one of them, which it may be handed or not.
    """

    tools: Callable[[], ServerTools]
    definitions: Definitions
    shows: Callable[[str], bool] = lambda _: True


class Sessions:
    """The requests without an answer in each session of a server, which an answer on another stream of it may be for.

    Of one workspace ``most`` sessions are remembered, the oldest are forgotten: then their late answers do not pass.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._of: dict[str, OrderedDict[tuple[str, str], Asked]] = {}

    def asked(self, workspace: str, server: str, session: str) -> Asked:
        """Return what is without an answer in a session."""
        known = self._of.setdefault(workspace, OrderedDict())
        found = known.setdefault((server, session), {})
        known.move_to_end((server, session))
        while len(known) > self._most:
            known.popitem(last=False)
        return found


class Questions(NamedTuple):
    """What a call that was allowed asks: its requests, those it calls off, and whether it is a batch.

    ``body`` is what is sent: an ``initialize`` without what the client offers, anything else as it came.
    """

    asked: dict[Identifier, str]
    cancelled: tuple[Identifier, ...]
    batch: bool
    body: bytes


def questions(body: bytes) -> Questions:
    """Return what the body of a call asks; raise :class:`saw.policy.mcp_messages.MessageInvalid` where that cannot be read."""
    if not body:
        return Questions({}, (), batch=False, body=b"")
    value = read(body)
    items = [checked(item) for item in value] if isinstance(value, list) else [checked(value)]
    asked = {identifier_of(item): str(item["method"]) for item in items if "id" in item}
    cancelled = []
    for item in items:
        params = item.get("params")
        called_off = params.get("requestId") if item.get("method") == CANCELLED and isinstance(params, dict) else None
        if isinstance(called_off, int | str):
            cancelled.append((type(called_off), called_off))
    if not isinstance(value, list) and items[0].get("method") == INITIALIZE:
        body = encode(without_client_capabilities(items[0]))
    return Questions(asked, tuple(cancelled), isinstance(value, list), body)


class Exchange:
    """One request and what comes back. ``mine`` are its own requests, which an error names when nothing else answers them.

    ``asked``: all that the session waits for. ``rules`` returns what counts now, and raises :class:`AnswerRefused` when the
    workspace may not receive anything any more. ``found`` is told what was not passed on as it came.
    """

    def __init__(
        self,
        mine: Mapping[Identifier, str],
        asked: Asked,
        rules: Callable[[], Rules],
        found: Callable[[Finding], None],
        *,
        batch: bool = False,
    ) -> None:
        self._mine = dict(mine)
        self._asked = asked
        self._rules = rules
        self._found = found
        self._batch = batch
        self._resumable = False
        self._replies: list[Json] = []
        self._replied = 0
        self._events = EventReader()
        if set(mine) & set(asked):
            raise AnswerRefused("this id is still without an answer; use another")
        asked.update(mine)
        for oldest in list(asked)[: max(0, len(asked) - MAX_OUTSTANDING)]:
            del asked[oldest]

    def whole(self, body: bytes) -> bytes:
        """Return a JSON answer as it is passed on; raise :class:`AnswerRefused` when nothing of it is."""
        try:
            value = read(body)
            if isinstance(value, list) != self._batch:
                raise MessageInvalid("it is a batch where one message was asked for, or one message for a batch")
            items = [checked(item) for item in value] if isinstance(value, list) else [checked(value)]
        except MessageInvalid as error:
            raise AnswerRefused(str(error)) from None
        if len(items) > MAX_BATCH:
            raise AnswerRefused(f"a batch of more than {MAX_BATCH} answers")
        passed = self._messages(items)
        if not passed:
            raise AnswerRefused("it answers nothing that was asked")
        return _written(passed) if self._batch else encode(passed[0])

    def stream(self, piece: bytes) -> bytes:
        """Return what goes on of a piece of an event stream; raise :class:`AnswerRefused` where the stream cannot be read on."""
        passed = b""
        try:
            for event in self._events.feed(piece):
                passed += self._event(event)
        except (EventUnreadable, AnswerRefused) as error:
            raise AnswerRefused(str(error), passed) from None
        return passed

    def error_body(self, body: bytes, status: int) -> bytes:
        """Return what is told of an answer with an HTTP status that says no: its JSON-RPC error, or ours in its place."""
        try:
            value = read(body)
            unnumbered = isinstance(value, dict) and value.get("id") is None
            message = checked({**value, "id": 0} if isinstance(value, dict) and unnumbered else value)
        except MessageInvalid:
            return encode(
                error_message(None, _SERVER_ERROR, f"the server answered HTTP {status}; its text is not passed on")
            )
        error = judge_answer("", message, {}, layer=LAYER).message.get("error") if "error" in message else None
        if not isinstance(error, dict):
            return encode(error_message(None, _SERVER_ERROR, f"the server answered HTTP {status}"))
        known = not unnumbered and identifier_of(message) in self._mine
        return encode({"jsonrpc": "2.0", "id": message["id"] if known else None, "error": error})

    @property
    def held(self) -> int:
        """Return how many bytes of an event that is not whole yet are kept."""
        return self._events.held

    def replies(self) -> list[bytes]:
        """Return, once, what the server is told in place of the client about its own requests: pong, or that it may not ask."""
        found, self._replies = self._replies, []
        return [encode(reply) for reply in found]

    @property
    def lists(self) -> bool:
        """Return whether a list of tools is waited for: what it says may have to be written before it goes on."""
        return LIST_TOOLS in list(self._asked.values())

    @property
    def asks(self) -> bool:
        """Return whether anything is to be answered."""
        return bool(self._mine)

    def over(self, *, resumable: bool) -> None:
        """Take note that nothing more comes; what is without an answer may get it later only where the stream can be resumed."""
        if not (resumable and self._resumable):
            for identifier in self._mine:
                self._asked.pop(identifier, None)

    def refused(self, why: str) -> bytes:
        """Return errors for this exchange's own requests that are without an answer; they count as answered then."""
        left = [identifier for identifier in self._mine if self._asked.pop(identifier, None) is not None]
        errors = [refusal(identifier[1], LAYER, "answer_unreadable", why) for identifier in left]
        if not errors:
            return encode(refusal(None, LAYER, "answer_unreadable", why))
        return _written(errors) if self._batch else encode(errors[0])

    def refused_events(self, why: str) -> bytes:
        """Return the same as events, one for each request."""
        left = [identifier for identifier in self._mine if self._asked.pop(identifier, None) is not None]
        errors = (encode(refusal(identifier[1], LAYER, "answer_unreadable", why)).rstrip() for identifier in left)
        return b"".join(Event().written(error) for error in errors)

    def _event(self, event: Event) -> bytes:
        self._resumable = self._resumable or bool(event.id)
        if not event.data:
            self._rules()
            return event.written(event.data)
        if event.kind != b"message":
            self._found(Finding("dropped", "an event of another type than message"))
            return event.written(None)
        try:
            value = read(event.data)
            items = value if isinstance(value, list) else [value]
            if isinstance(value, list) and (not self._batch or len(value) > MAX_BATCH):
                raise MessageInvalid("a batch of messages where none was asked for")
            passed = self._messages([checked(item) for item in items])
        except MessageInvalid as error:
            raise AnswerRefused(str(error)) from None
        if not passed:
            return event.written(None)
        return event.written((_written(passed) if isinstance(value, list) else encode(passed[0])).rstrip())

    def _messages(self, messages: list[Json]) -> list[Json]:
        rules = self._rules()
        return [passed for message in messages if (passed := self._message(message, rules)) is not None]

    def _message(self, message: Json, rules: Rules) -> Json | None:
        if "method" in message:
            return self._unasked(message, str(message["method"]))
        identifier = identifier_of(message)
        method = self._asked.pop(identifier, None)
        if method is None:
            self._found(Finding("dropped", "an answer to nothing that was asked"))
            return None
        tools = rules.tools() if method == LIST_TOOLS else _NO_TOOLS
        answered = judge_answer(
            method, message, tools.usable, layer=LAYER, capabilities=_CAPABILITIES, shows=rules.shows
        )
        if answered.withheld:
            self._found(Finding("refused", answered.withheld))
        if answered.listed is not None:
            try:
                self._listed(answered.listed, rules.definitions, tools)
            except SawError as error:
                self._asked[identifier] = method  # so that the error which takes the list's place is for it
                raise AnswerRefused(error.message) from error
        return answered.message

    def _unasked(self, message: Json, method: str) -> Json | None:
        if "id" not in message and method in _NOTIFICATIONS:
            return message
        if "id" in message and self._replied < MOST_REPLIES:
            self._replied += 1
            self._replies.append(_reply(message["id"], method))
        if method != PING:
            what = "request" if "id" in message else "notification"
            self._found(Finding("dropped", f"{what} {method[:64]}"))
        return None

    def _listed(self, listed: Listed, definitions: Definitions, tools: ServerTools) -> None:
        for name, digest in sorted(listed.changed.items()):
            self._found(Finding("definition_changed", f"{name[:128]} is defined as {digest}"))
        definitions.note(listed, tools.usable, tools.names)
        if listed.offered > listed.allowed:
            self._found(
                Finding("filtered", f"{listed.offered - listed.allowed} of {listed.offered} tools are not listed")
            )


def _reply(identifier: object, method: str) -> Json:
    if method == PING:
        return {"jsonrpc": "2.0", "id": identifier, "result": {}}
    return error_message(identifier, METHOD_NOT_FOUND, f"{method[:64]} is not offered here")


def _written(messages: list[Json]) -> bytes:
    return json.dumps(messages, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"
