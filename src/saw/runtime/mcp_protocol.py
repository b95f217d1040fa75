"""The rules by which one MCP session over stdio is mediated, free of input and output.

Framing and messages: Model Context Protocol, "stdio" transport, and JSON-RPC 2.0. Every message is parsed strictly and written
anew before it is passed on, so that the far side cannot read something else than was judged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from saw.policy import strict_json
from saw.policy.governance import McpServer
from saw.policy.model import Decision

MAX_MESSAGE = 4 * 1024 * 1024
MAX_OUTSTANDING = 256
MAX_DEPTH = 64

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, POLICY_DENIED = -32700, -32600, -32601, -32602, -32001
CLIENT_REQUESTS = frozenset({"initialize", "ping", "tools/list", "tools/call", "logging/setLevel"})
CLIENT_NOTIFICATIONS = frozenset({"notifications/initialized", "notifications/cancelled", "notifications/progress"})
SERVER_REQUESTS = frozenset({"ping"})
SERVER_NOTIFICATIONS = frozenset(
    {"notifications/message", "notifications/progress", "notifications/cancelled", "notifications/tools/list_changed"}
)
SERVER_CAPABILITIES = frozenset({"tools", "logging"})

Json = dict[str, object]
Identifier = tuple[type, int | str]
Decide = Callable[[str, Json], Decision]
"""(tool, arguments) → decision."""


class Out(NamedTuple):
    """One message to send: ``to`` is ``client`` or ``server``, ``line`` includes the newline."""

    to: str
    line: bytes


class MessageInvalid(Exception):
    """A line that is not one acceptable JSON-RPC message. ``code`` is the JSON-RPC error code."""

    def __init__(self, message: str, code: int = INVALID_REQUEST) -> None:
        super().__init__(message)
        self.code = code


def _depth_within(value: object, left: int) -> bool:
    if left < 0:
        return False
    if isinstance(value, dict):
        return all(_depth_within(item, left - 1) for item in value.values())
    return all(_depth_within(item, left - 1) for item in value) if isinstance(value, list) else True


def parse(line: bytes) -> Json:
    """Return the one JSON-RPC object in ``line``; raise :class:`MessageInvalid` for anything ambiguous.

    Refused: what :mod:`saw.policy.strict_json` refuses (bad UTF-8, duplicate keys, numbers that are none or infinite, half
    characters), more than :data:`MAX_MESSAGE` bytes, batches, depth over :data:`MAX_DEPTH`, ids that are neither integer nor
    string, and objects that are request and response at once.
    """
    try:
        value = strict_json.loads(line, limit=MAX_MESSAGE)
    except strict_json.NotStrict as error:
        raise MessageInvalid(f"not JSON: {error}", PARSE_ERROR) from None
    if isinstance(value, list):
        raise MessageInvalid("batches are not accepted; send one message per line")
    if not isinstance(value, dict) or value.get("jsonrpc") != "2.0":
        raise MessageInvalid('not a JSON-RPC 2.0 message ("jsonrpc": "2.0" is missing)')
    if not _depth_within(value, MAX_DEPTH):
        raise MessageInvalid("nested too deeply")
    if "id" in value and type(value["id"]) not in {int, str}:
        raise MessageInvalid("the id must be an integer or a string")
    answers = ("result" in value) + ("error" in value)
    if ("method" in value) == bool(answers) or answers > 1 or (answers and "id" not in value):
        raise MessageInvalid("neither a request, a notification nor a response")
    if "method" in value and not isinstance(value["method"], str):
        raise MessageInvalid("the method must be a string")
    if set(value) - {"jsonrpc", "id", "method", "params", "result", "error"}:
        raise MessageInvalid("unknown members beside jsonrpc, id, method, params, result and error")
    return value


def encode(message: Mapping[str, object]) -> bytes:
    """Return ``message`` as one line of ASCII JSON."""
    return json.dumps(message, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _identifier(message: Json) -> Identifier:
    value = message["id"]
    assert isinstance(value, int | str)  # noqa: S101 - parse() admits nothing else
    return (type(value), value)


def _error(identifier: object, code: int, text: str, data: Json | None = None) -> bytes:
    body: Json = {"code": code, "message": text}
    if data is not None:
        body["data"] = data
    return encode({"jsonrpc": "2.0", "id": identifier, "error": body})


@dataclass
class Session:
    """One client's session with one instance of the server.

    ``server``: the governance entry (tools and their classes); ``decide`` judges a tool call; ``log`` receives one
    record per decision and per dropped message (tool names and reasons, never argument values).
    """

    name: str
    server: Callable[[], McpServer]
    decide: Decide
    log: Callable[[Json], None]
    asked_by_client: dict[Identifier, str] = field(default_factory=dict)
    asked_by_server: set[Identifier] = field(default_factory=set)

    def from_client(self, line: bytes) -> list[Out]:
        """Judge one line of the client; return what to send to whom."""
        try:
            message = parse(line)
        except MessageInvalid as problem:
            self._note("client", "refused", str(problem))
            return [Out("client", _error(None, problem.code, str(problem)))]
        if "method" not in message:
            identifier = _identifier(message)
            if identifier not in self.asked_by_server:
                self._note("client", "dropped", "response to nothing that was asked")
                return []
            self.asked_by_server.discard(identifier)
            return [Out("server", encode(message))]
        method = str(message["method"])
        if "id" not in message:
            if method in CLIENT_NOTIFICATIONS:
                return [Out("server", encode(message))]
            self._note("client", "dropped", f"notification {method}")
            return []
        refusal = self._refuse_request(message, method)
        if refusal is not None:
            return [Out("client", refusal)]
        if method == "initialize":
            message = _without_client_capabilities(message)
        self.asked_by_client[_identifier(message)] = method
        return [Out("server", encode(message))]

    def _refuse_request(self, message: Json, method: str) -> bytes | None:
        identifier = _identifier(message)
        if identifier in self.asked_by_client:
            return _error(message["id"], INVALID_REQUEST, "this id is still outstanding; use another")
        if len(self.asked_by_client) >= MAX_OUTSTANDING:
            return _error(
                message["id"], INVALID_REQUEST, f"{MAX_OUTSTANDING} requests are outstanding; wait for answers"
            )
        if method not in CLIENT_REQUESTS:
            self._note("client", "refused", f"method {method}")
            return _error(message["id"], METHOD_NOT_FOUND, f"{method} is not allowed here; only tools are mediated")
        return self._refuse_call(message) if method == "tools/call" else None

    def _refuse_call(self, message: Json) -> bytes | None:
        params = message.get("params")
        tool = params.get("name") if isinstance(params, dict) else None
        arguments = params.get("arguments", {}) if isinstance(params, dict) else None
        if not isinstance(params, dict) or not isinstance(tool, str) or not isinstance(arguments, dict):
            return _error(message["id"], INVALID_PARAMS, "params must be {name: string, arguments: object}")
        if set(params) - {"name", "arguments", "_meta"}:
            return _error(message["id"], INVALID_PARAMS, "params may hold name, arguments and _meta only")
        decision = self.decide(tool, arguments)
        record: Json = {"event": "tool_call", "server": self.name, "tool": tool, "verdict": decision.verdict}
        self.log({**record, "reason": decision.reason, "rule": decision.rule, "action_class": decision.action_class})
        if decision.verdict == "allow":
            return None
        data: Json = {
            "error": "policy_denied",
            "layer": "mcp",
            "server": self.name,
            "tool": tool,
            "reason": decision.reason,
            "detail": decision.detail,
            "rule": decision.rule,
            "rule_missing": decision.rule_missing,
            "next_steps": list(decision.next_steps),
        }
        return _error(message["id"], POLICY_DENIED, f"denied by policy: {decision.detail or decision.reason}", data)

    def from_server(self, line: bytes) -> list[Out]:
        """Judge one line of the server; return what to send to whom."""
        try:
            message = parse(line)
        except MessageInvalid as problem:
            self._note("server", "dropped", str(problem))
            return []
        if "method" in message:
            return self._server_asks(message, str(message["method"]))
        method = self.asked_by_client.pop(_identifier(message), None)
        if method is None:
            self._note("server", "dropped", "response to nothing that was asked")
            return []
        if method == "tools/list":
            message = self._listed(message)
        elif method == "initialize":
            message = _without_server_capabilities(message)
        return [Out("client", encode(message))]

    def _server_asks(self, message: Json, method: str) -> list[Out]:
        if "id" not in message:
            if method in SERVER_NOTIFICATIONS:
                return [Out("client", encode(message))]
            self._note("server", "dropped", f"notification {method}")
            return []
        if method not in SERVER_REQUESTS or len(self.asked_by_server) >= MAX_OUTSTANDING:
            self._note("server", "refused", f"method {method}")
            return [Out("server", _error(message["id"], METHOD_NOT_FOUND, f"{method} is not offered here"))]
        self.asked_by_server.add(_identifier(message))
        return [Out("client", encode(message))]

    def _listed(self, message: Json) -> Json:
        result = message.get("result")
        tools = result.get("tools") if isinstance(result, dict) else None
        if not isinstance(result, dict) or not isinstance(tools, list):
            return message
        rules = self.server().tools
        named = [tool for tool in tools if isinstance(tool, dict) and isinstance(tool.get("name"), str)]
        allowed = [tool for tool in named if tool["name"] in rules and rules[tool["name"]].class_ != "deny"]
        self.log({"event": "tools_list", "server": self.name, "offered": len(tools), "allowed": len(allowed)})
        return {**message, "result": {**result, "tools": allowed}}

    def _note(self, side: str, what: str, why: str) -> None:
        self.log({"event": f"message_{what}", "server": self.name, "from": side, "reason": why[:300]})


def _without_client_capabilities(message: Json) -> Json:
    # Roots would let the client move the server's directories; sampling and elicitation let the server ask for more.
    params = message.get("params")
    return {**message, "params": {**params, "capabilities": {}}} if isinstance(params, dict) else message


def _without_server_capabilities(message: Json) -> Json:
    result = message.get("result")
    offered = result.get("capabilities") if isinstance(result, dict) else None
    if not isinstance(result, dict) or not isinstance(offered, dict):
        return message
    kept = {name: value for name, value in offered.items() if name in SERVER_CAPABILITIES}
    return {**message, "result": {**result, "capabilities": kept}}
