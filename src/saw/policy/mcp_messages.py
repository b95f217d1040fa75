"""The messages of MCP as JSON-RPC 2.0, parsed so that no two parsers read them differently, and written anew.

The mediator of servers over stdio and ring 2, for servers over HTTP, read by these rules alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from saw.policy import strict_json
from saw.policy.calls import MAX_DEPTH, json_depth_within

MAX_MESSAGE = 4 * 1024 * 1024
"""Longest message that is read (bytes)."""
MAX_OUTSTANDING = 256
"""Most requests of one side that may be without an answer at a time."""

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, POLICY_DENIED = -32700, -32600, -32601, -32602, -32001
_MEMBERS = frozenset({"jsonrpc", "id", "method", "params", "result", "error"})

Json = dict[str, object]
Identifier = tuple[type, int | str]


class MessageInvalid(Exception):
    """Bytes that are not one acceptable JSON-RPC message. ``code`` is the JSON-RPC error code."""

    def __init__(self, message: str, code: int = INVALID_REQUEST) -> None:
        super().__init__(message)
        self.code = code


def read(raw: bytes, *, limit: int = MAX_MESSAGE) -> object:
    """Return the JSON value of ``raw``; raise :class:`MessageInvalid` for what :mod:`saw.policy.strict_json` refuses."""
    try:
        return strict_json.loads(raw, limit=limit)
    except strict_json.NotStrict as error:
        raise MessageInvalid(f"not JSON: {error}", PARSE_ERROR) from None


def checked(value: object) -> Json:
    """Return ``value`` when it is one JSON-RPC message; raise :class:`MessageInvalid` otherwise.

    Refused: batches, depth over :data:`saw.policy.calls.MAX_DEPTH`, ids that are neither integer nor string, and objects that
    are request and response at once.
    """
    if isinstance(value, list):
        raise MessageInvalid("batches are not accepted; send one message per line")
    if not isinstance(value, dict) or value.get("jsonrpc") != "2.0":
        raise MessageInvalid('not a JSON-RPC 2.0 message ("jsonrpc": "2.0" is missing)')
    if not json_depth_within(value, MAX_DEPTH):
        raise MessageInvalid("nested too deeply")
    if "id" in value and type(value["id"]) not in {int, str}:
        raise MessageInvalid("the id must be an integer or a string")
    answers = ("result" in value) + ("error" in value)
    if ("method" in value) == bool(answers) or answers > 1 or (answers and "id" not in value):
        raise MessageInvalid("neither a request, a notification nor a response")
    if "method" in value and not isinstance(value["method"], str):
        raise MessageInvalid("the method must be a string")
    if set(value) - _MEMBERS:
        raise MessageInvalid("unknown members beside jsonrpc, id, method, params, result and error")
    return value


def parse(raw: bytes) -> Json:
    """Return the one JSON-RPC message in ``raw``; raise :class:`MessageInvalid` for anything ambiguous."""
    return checked(read(raw))


def encode(message: Mapping[str, object]) -> bytes:
    """Return ``message`` as one line of ASCII JSON."""
    return json.dumps(message, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def identifier_of(message: Mapping[str, object]) -> Identifier:
    """Return the id of a message as what tells it apart from others: 1 is not "1"."""
    value = message["id"]
    assert isinstance(value, int | str)  # noqa: S101 - checked() admits nothing else
    return (type(value), value)


def error_message(identifier: object, code: int, text: str, data: Json | None = None) -> Json:
    """Return a JSON-RPC error to the request that ``identifier`` numbers, None for one that is not known."""
    body: Json = {"code": code, "message": text}
    if data is not None:
        body["data"] = data
    return {"jsonrpc": "2.0", "id": identifier, "error": body}
