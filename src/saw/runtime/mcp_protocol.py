"""The rules by which one MCP session over stdio is mediated, free of input and output.

Framing and messages: Model Context Protocol, "stdio" transport, and JSON-RPC 2.0. Every message is parsed strictly and written
anew before it is passed on, so that the far side cannot read something else than was judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from saw.policy.mcp import definition_changed
from saw.policy.mcp_answers import (
    INITIALIZE,
    SERVER_NOTIFICATIONS,
    Definitions,
    Listed,
    judge_answer,
    usable,
    without_client_capabilities,
)
from saw.policy.mcp_messages import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    MAX_MESSAGE,
    MAX_OUTSTANDING,
    METHOD_NOT_FOUND,
    POLICY_DENIED,
    Identifier,
    Json,
    MessageInvalid,
    encode,
    error_message,
    identifier_of,
    parse,
)
from saw.policy.model import Decision
from saw.policy.tool_rules import McpServer
from saw.review.tool import MAX_PARAMS, params_of

__all__ = ["MAX_MESSAGE", "Held", "Json", "Out", "Session"]

CLIENT_REQUESTS = frozenset({INITIALIZE, "ping", "tools/list", "tools/call", "logging/setLevel"})
CANCELLED = "notifications/cancelled"
CLIENT_NOTIFICATIONS = frozenset({"notifications/initialized", CANCELLED, "notifications/progress"})
SERVER_REQUESTS = frozenset({"ping"})

_NO_REVIEWS = "ask the policy's owner for another class: this mediator cannot ask people"
_TOO_LONG = "send shorter arguments: people must be shown all of them"
_REFUSED_STEPS = {
    "outside_delegation": "ask the sponsor for a delegation that lets you write",
    "too_many_reviews": "wait for the calls that you asked for before",
    "policy_changed": "call the tool again: another policy is in force now",
}
Decide = Callable[[str, Json], Decision]
"""(tool, arguments) → decision."""


class Out(NamedTuple):
    """One message to send: ``to`` is ``client`` or ``server``, ``line`` includes the newline."""

    to: str
    line: bytes


def _error(identifier: object, code: int, text: str, data: Json | None = None) -> bytes:
    return encode(error_message(identifier, code, text, data))


class Held(NamedTuple):
    """A call that waits for people: the number of its request, the tool, its arguments, and the bytes that are reviewed."""

    number: int | str
    tool: str
    arguments: Json
    params: bytes

    @property
    def identifier(self) -> Identifier:
        """The number as what tells it apart from others."""
        return (type(self.number), self.number)


@dataclass
class Session:
    """One client's session with one instance of the server.

    ``server``: the governance entry (tools and their classes); ``decide`` judges a tool call; ``log`` receives one
    record per decision and per dropped message (tool names and reasons, never argument values). ``hold`` takes a call that
    people must decide on, which is then waiting until :meth:`release`, :meth:`tell` or :meth:`refuse`; without it such calls are
    refused. ``shows``: whether the client is told of a tool of the policy, which its agent may be handed or not.
    """

    name: str
    server: Callable[[], McpServer]
    decide: Decide
    log: Callable[[Json], None]
    hold: Callable[[Held], None] | None = None
    held: dict[Identifier, Held] = field(default_factory=dict)
    asked_by_client: dict[Identifier, str] = field(default_factory=dict)
    asked_by_server: set[Identifier] = field(default_factory=set)
    definitions: Definitions = field(default_factory=Definitions)
    shows: Callable[[str], bool] = lambda _: True

    def from_client(self, line: bytes) -> list[Out]:
        """Judge one line of the client; return what to send to whom."""
        try:
            message = parse(line)
        except MessageInvalid as problem:
            self._note("client", "refused", str(problem))
            return [Out("client", _error(None, problem.code, str(problem)))]
        if "method" not in message:
            identifier = identifier_of(message)
            if identifier not in self.asked_by_server:
                self._note("client", "dropped", "response to nothing that was asked")
                return []
            self.asked_by_server.discard(identifier)
            return [Out("server", encode(message))]
        method = str(message["method"])
        if "id" not in message:
            if self._takes_back(message, method):
                return []
            if method in CLIENT_NOTIFICATIONS:
                return [Out("server", encode(message))]
            self._note("client", "dropped", f"notification {method}")
            return []
        refusal = self._refuse_request(message, method)
        if refusal is not None:
            return [Out("client", refusal)]
        if identifier_of(message) in self.held:
            return []
        if method == INITIALIZE:
            message = without_client_capabilities(message)
        self.asked_by_client[identifier_of(message)] = method
        return [Out("server", encode(message))]

    def _refuse_request(self, message: Json, method: str) -> bytes | None:
        identifier = identifier_of(message)
        if identifier in self.asked_by_client or identifier in self.held:
            return _error(message["id"], INVALID_REQUEST, "this id is still outstanding; use another")
        if len(self.asked_by_client) + len(self.held) >= MAX_OUTSTANDING:
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
        decision = self._decide(tool, arguments)
        steps = decision.next_steps
        if decision.reason == "review_required":
            if self._wait_for_people(message, tool, arguments):
                return None
            steps = (_NO_REVIEWS if self.hold is None else _TOO_LONG,)
        self._called(tool, decision)
        if decision.verdict == "allow":
            return None
        return self._denied(message["id"], tool, msgspec.structs.replace(decision, next_steps=steps))

    def _decide(self, tool: str, arguments: Json) -> Decision:
        decision = self.decide(tool, arguments)
        if decision.verdict != "allow" and decision.reason != "review_required":
            return decision
        if self.definitions.changed(tool, self.server().tools.get(tool)):
            return definition_changed(self.name, tool, decision.action_class)
        return decision

    def _wait_for_people(self, message: Json, tool: str, arguments: Json) -> bool:
        """Have the call held; tell whether it is."""
        params = params_of(tool, arguments)
        number = message["id"]
        if self.hold is None or len(params) > MAX_PARAMS or not isinstance(number, int | str):
            return False
        found = Held(number, tool, arguments, params)
        self.held[found.identifier] = found
        self.hold(found)
        return True

    def _takes_back(self, message: Json, method: str) -> bool:
        """Tell whether a notification takes back a call that is held; nobody else has heard of that one."""
        params = message.get("params")
        number = params.get("requestId") if method == CANCELLED and isinstance(params, dict) else None
        return isinstance(number, int | str) and self.held.pop((type(number), number), None) is not None

    def release(self, held: Held, review: str) -> Out | None:
        """Return the call to be written to the server, once people agreed; None when it is not to be made any more.

        It was taken back or refused meanwhile, or policy or the tool's definition no longer let it through. The server gets the
        reviewed bytes, without ``_meta``.
        """
        if self.held.get(held.identifier) is not held:
            return None
        decision = self._decide(held.tool, held.arguments)
        if decision.verdict != "allow" and decision.reason != "review_required":
            return None
        del self.held[held.identifier]
        self._called(
            held.tool, Decision(verdict="allow", rule=held.tool, action_class=decision.action_class), review=review
        )
        self.asked_by_client[held.identifier] = "tools/call"
        number = encode({"id": held.number})[1:-2]
        return Out("server", b'{"jsonrpc":"2.0",' + number + b',"method":"tools/call","params":' + held.params + b"}\n")

    def tell(self, held: Held, result: Json) -> Out | None:
        """Return ``result`` as the answer to a call that is held; None when nobody waits for one."""
        if self.held.get(held.identifier) is not held:
            return None
        del self.held[held.identifier]
        return Out("client", encode({"jsonrpc": "2.0", "id": held.number, "result": result}))

    def refuse(self, held: Held, reason: str, detail: str, cure: str = "") -> Out | None:
        """Return the refusal of a call that is held; None when nobody waits for one."""
        if self.held.get(held.identifier) is not held:
            return None
        del self.held[held.identifier]
        decision = Decision(
            verdict="deny",
            reason=reason,
            detail=detail,
            policy=self.name,
            rule=held.tool,
            action_class="review",
            next_steps=(_REFUSED_STEPS.get(reason) or cure or "go on without this call",),
        )
        self._called(held.tool, decision)
        return Out("client", self._denied(held.number, held.tool, decision))

    def _called(self, tool: str, decision: Decision, **more: object) -> None:
        record: Json = {"event": "tool_call", "server": self.name, "tool": tool, "verdict": decision.verdict}
        record |= {"reason": decision.reason, "rule": decision.rule, "action_class": decision.action_class}
        self.log({**record, **more})

    def _denied(self, number: object, tool: str, decision: Decision) -> bytes:
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
        return _error(number, POLICY_DENIED, f"denied by policy: {decision.detail or decision.reason}", data)

    def from_server(self, line: bytes) -> list[Out]:
        """Judge one line of the server; return what to send to whom."""
        try:
            message = parse(line)
        except MessageInvalid as problem:
            self._note("server", "dropped", str(problem))
            return []
        if "method" in message:
            return self._server_asks(message, str(message["method"]))
        method = self.asked_by_client.pop(identifier_of(message), None)
        if method is None:
            self._note("server", "dropped", "response to nothing that was asked")
            return []
        tools = usable(self.server())
        answered = judge_answer(method, message, tools, layer="mcp", shows=self.shows)
        if answered.withheld:
            self._note("server", "refused", answered.withheld)
        if answered.listed is not None:
            self.definitions.note(answered.listed, tools)
            self._listed(answered.listed)
        return [Out("client", encode(answered.message))]

    def _server_asks(self, message: Json, method: str) -> list[Out]:
        if "id" not in message:
            if method in SERVER_NOTIFICATIONS:
                return [Out("client", encode(message))]
            self._note("server", "dropped", f"notification {method}")
            return []
        if method not in SERVER_REQUESTS or len(self.asked_by_server) >= MAX_OUTSTANDING:
            self._note("server", "refused", f"method {method}")
            return [Out("server", _error(message["id"], METHOD_NOT_FOUND, f"{method} is not offered here"))]
        self.asked_by_server.add(identifier_of(message))
        return [Out("client", encode(message))]

    def _listed(self, listed: Listed) -> None:
        record: Json = {
            "event": "tools_list",
            "server": self.name,
            "offered": listed.offered,
            "allowed": listed.allowed,
        }
        self.log({**record, **({"changed": dict(listed.changed)} if listed.changed else {})})

    def _note(self, side: str, what: str, why: str) -> None:
        self.log({"event": f"message_{what}", "server": self.name, "from": side, "reason": why[:300]})
