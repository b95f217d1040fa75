"""The MCP servers over HTTP of a policy: which one a call goes to, and what its tools say of the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from saw.policy import globs
from saw.policy.actions import Classified
from saw.policy.calls import Reading
from saw.policy.governance import Governance
from saw.policy.mcp import decide_call, definition_changed
from saw.policy.mcp_answers import Definitions, ServerTools, usable
from saw.policy.mcp_http import CALL_TOOL, VERSION_HEADER, options
from saw.policy.model import Decision, Policy, Request
from saw.policy.tool_rules import HttpAddress, McpServer, Tool

_WITH_OTHERS = frozenset({"argument_not_allowed", "review_required"})
"""Why a tool without arguments is refused that may be called with others, or after a person agreed."""
_REFUSED = frozenset({"tool_not_allowed", "argument_not_allowed"})


class HttpServer(NamedTuple):
    """An MCP server over HTTP: its name and address, its rules, and the class that each of its tools has.

    ``revision`` is the newest of MCP that its endpoint lets be spoken, empty where that says nothing of it.
    """

    name: str
    address: HttpAddress
    rules: McpServer
    classes: Mapping[str, Classified]
    revision: str = ""

    def refusal(self, request: Request, reading: Reading) -> Decision | None:
        """Return the decision on the first call of ``reading`` that a tool refuses, or None; classes are not its business."""
        for asked, arguments in zip(reading.operations, reading.arguments, strict=True):
            if asked.kind != CALL_TOOL:
                continue
            decision = decide_call(self.name, self.rules, asked.name, arguments or {})
            if decision.reason in _REFUSED:
                missing = {
                    "host": request.host.lower(),
                    "port": request.port,
                    "protocol": "mcp",
                    "rpc_method": CALL_TOOL,
                    **(decision.rule_missing or {}),
                }
                return msgspec.structs.replace(decision, rule=f"mcp.servers.{self.name}", rule_missing=missing)
        return None

    def pins(self, decision: Decision) -> bool:
        """Tell whether a call of ``decision`` is of a tool whose definition is pinned."""
        tools = (self.rules.tools.get(asked.name) for asked in decision.operations if asked.kind == CALL_TOOL)
        return any(tool is not None and tool.definition for tool in tools)

    def redefined(self, decision: Decision, known: Definitions) -> Decision | None:
        """Return the refusal of an allowed call of a tool that the server is ``known`` to define anew, or None."""
        for asked in decision.operations:
            if asked.kind == CALL_TOOL and known.changed(asked.name, self.rules.tools.get(asked.name)):
                return msgspec.structs.replace(
                    definition_changed(self.name, asked.name, decision.action_class),
                    policy=decision.policy, rule=f"{decision.rule}; mcp.servers.{self.name}.tools.{asked.name}.definition",
                    protocol="mcp", operations=decision.operations, canonical_path=decision.canonical_path,
                )  # fmt: skip
        return None


def usable_tools(decide: Callable[[Request], Decision], request: Request, server: HttpServer) -> ServerTools:
    """Return the tools of ``server``; usable are those that ``decide`` lets a caller of ``request`` call or ask a person for."""
    found: dict[str, Tool] = {}
    headers = {name: value for name, value in request.headers.items() if name == VERSION_HEADER}
    for name, tool in usable(server.rules).items():
        params: dict[str, object] = {"name": name, "arguments": {}}
        asked = {"jsonrpc": "2.0", "id": 1, "method": CALL_TOOL, "params": params}
        call = msgspec.structs.replace(
            request, method="POST", body=msgspec.json.encode(asked), body_complete=True,
            headers={**headers, "content-type": "application/json"},
        )  # fmt: skip
        decision = decide(call)
        if decision.allowed or decision.reason in _WITH_OTHERS:
            found[name] = tool
    return ServerTools(found, server.rules.tools.keys())


def http_servers(policy: Policy, governance: Governance) -> dict[tuple[str, int, str], HttpServer]:
    """Return the servers over HTTP by host (lower case), port and path."""
    found: dict[tuple[str, int, str], HttpServer] = {}
    for name, server in governance.mcp.servers.items():
        address = server.address
        if address is not None:
            classes = {
                tool: Classified(rule.class_, f"mcp.servers.{name}.tools.{tool}", f"{CALL_TOOL} {tool}")
                for tool, rule in server.tools.items()
            }
            found[address.host, address.port, address.path] = HttpServer(
                name, address, server, classes, _revision(policy, address)
            )
    return found


def _revision(policy: Policy, address: HttpAddress) -> str:
    endpoints = (
        endpoint
        for rule in policy.network_policies.values()
        for endpoint in rule.endpoints
        if endpoint.protocol == "mcp" and address.port in endpoint.all_ports and endpoint.path == address.path
        if globs.host_glob(endpoint.host.lower()).fullmatch(address.host)
    )
    return max((version for endpoint in endpoints for version in options(endpoint).versions), default="")
