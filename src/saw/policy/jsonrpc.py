"""What a JSON-RPC 2.0 request over HTTP asks for: the method of each of its calls and notifications.

Batches are all or nothing. Answers from the client are refused: nothing here can tell what they would answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from saw.policy.calls import BodyRefused, Reading, batch, body_of, read_json
from saw.policy.model import Endpoint, JsonRpcOptions, Operation, Request

MAX_BATCH = 64
"""Most messages in one request."""
METHOD = re.compile(r"[\x21-\x7e]{1,128}\Z")
"""What the name of a method may be."""

_MEMBERS = frozenset({"jsonrpc", "id", "method", "params"})


class Message(NamedTuple):
    """One call, or a notification: then ``identifier`` is ``None``."""

    method: str
    params: dict[str, object] | list[object] | None
    identifier: int | str | None


def messages(request: Request, query: str, limit: int) -> tuple[Message, ...]:
    """Return the messages of a POST; raise :class:`BodyRefused` for anything that is not plainly JSON-RPC 2.0."""
    if request.method.upper() != "POST":
        detail = f"JSON-RPC is spoken by POST, not by {request.method.upper()}"
        raise BodyRefused(detail, "method_or_path_not_allowed")
    if query:
        raise BodyRefused("a POST with a query in its URL can be read in two ways")
    value = read_json(body_of(request, limit), limit)
    found = tuple(_message(item) for item in batch(value, MAX_BATCH))
    identifiers = [(type(m.identifier), m.identifier) for m in found if m.identifier is not None]
    if len(set(identifiers)) != len(identifiers):
        raise BodyRefused("two calls of the batch have the same id")
    return found


def _message(value: object) -> Message:
    if not isinstance(value, dict) or value.get("jsonrpc") != "2.0":
        raise BodyRefused('not a JSON-RPC 2.0 message ("jsonrpc": "2.0" is missing)')
    if "result" in value or "error" in value:
        raise BodyRefused("an answer of the client cannot be matched to what was asked, so it is refused")
    unknown = sorted(set(value) - _MEMBERS)
    if unknown:
        raise BodyRefused(f"the member {unknown[0][:40]!r} is not one of JSON-RPC")
    method, params, identifier = value.get("method"), value.get("params"), value.get("id")
    if not isinstance(method, str) or not METHOD.match(method):
        raise BodyRefused("the method is 1 to 128 printable characters without spaces")
    if "params" in value and not isinstance(params, dict | list):
        raise BodyRefused("params is an object or an array")
    if "id" in value and type(identifier) not in {int, str}:
        raise BodyRefused("the id is an integer or a string")
    return Message(method, params, identifier)


def json_rpc_reader(endpoint: Endpoint) -> Callable[[Request, str], Reading]:
    """Return how requests to a JSON-RPC ``endpoint`` are read."""
    limit = (endpoint.json_rpc or JsonRpcOptions()).max_body_bytes

    def read(request: Request, query: str) -> Reading:
        return Reading(tuple(Operation(message.method) for message in messages(request, query, limit)))

    return read
