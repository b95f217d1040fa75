"""Test cases of a policy: calls and tool calls with the decision they must lead to.

The format (schema 1) serves ``saw policy test`` (``tests.yaml`` next to a policy) and the conformance vectors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec

from saw.policy.databases import UPGRADE
from saw.policy.decode import Checks, Decoder
from saw.policy.errors import PolicyError, Problem
from saw.policy.governance import Governance
from saw.policy.matcher import Matcher
from saw.policy.mcp import decide_tool
from saw.policy.mcp_http import CALL_TOOL, VERSION_HEADER
from saw.policy.mcp_servers import HttpServer
from saw.policy.model import Decision, Part, Request, says
from saw.policy.yamltree import parse

_ZERO = "0" * 40
_DEFAULT_PORTS = {"https": 443, "http": 80}
_STREAMS = {"wss": "https", "ws": "http"}
"""Schemes of WebSockets (RFC 6455), and those of the request that opens one."""
_SESSION_PORT = 5432
"""Port of a ``postgres:`` URL that names none."""


class Push(Part, frozen=True):
    """One ref of a push, turned into the body that Git would send."""

    ref: Annotated[str, says("Full name of the ref.", "refs/heads/agent/fix-1")]
    operation: Annotated[Literal["create", "update", "delete"], says("What happens to it.", "create")] = "update"


class Call(Part, frozen=True):
    """A request: its URL as the client would write it, and what the rings know about it."""

    url: Annotated[
        str,
        says(
            "Absolute URL, spelled as the client sends it; wss: and ws: open a WebSocket, postgres: a session.",
            "https://api.example.com/v1/items?page=2",
        ),
    ]
    method: Annotated[str, says("HTTP method.", "GET")] = "GET"
    binary: Annotated[str | None, says("Resolved path of the calling program.", "/usr/bin/curl")] = None
    ancestors: Annotated[tuple[str, ...], says("Resolved paths of its parents, nearest first.", ["/usr/bin/bash"])] = ()
    headers: Annotated[dict[str, str], says("Header fields.", {"accept": "application/json"})] = msgspec.field(
        default_factory=dict
    )
    body: Annotated[str | None, says("The body, as text.", '{"model": "demo-small"}')] = None
    json: Annotated[
        Any,
        says("The body as a value; it is sent as JSON and says so in its content-type.", {"query": "{viewer{login}}"}),
    ] = None
    body_complete: Annotated[bool, says("Whether that is the whole body.", True)] = True
    message: Annotated[
        Literal["", "text", "binary"],
        says("Asks whether the client may send such a message on the WebSocket that the call opens.", "text"),
    ] = ""
    push: Annotated[
        tuple[Push, ...],
        says("Refs of a push; they make the body that Git would send.", [{"ref": "refs/heads/main"}]),
    ] = ()


class ToolCall(Part, frozen=True):
    """A call of an MCP tool; of a server over HTTP it is the request that carries it."""

    server: Annotated[str, says("Name of the server in governance.yaml.", "files")]
    tool: Annotated[str, says("Name of the tool.", "read_file")]
    arguments: Annotated[dict[str, Any], says("Its arguments by name.", {"path": "/workspace/a.txt"})] = msgspec.field(
        default_factory=dict
    )
    binary: Annotated[
        str | None, says("Resolved path of the calling program, for a server over HTTP.", "/usr/bin/node")
    ] = None


class Expected(Part, frozen=True):
    """What the decision must be; fields that are not written are not compared."""

    verdict: Annotated[Literal["allow", "deny"], says("Whether the call passes.", "deny")]
    reason: Annotated[
        str | None, says("Why it is refused; the reasons are listed in docs/architecture.md.", "host_not_allowed")
    ] = None
    policy: Annotated[str | None, says("Name of the network rule or server that decides.", "api")] = None
    rule: Annotated[str | None, says("Which rule of it decides.", "endpoints[0].rules[0]")] = None
    action_class: Annotated[str | None, says("auto, staged, review or deny.", "review")] = None
    credential: Annotated[str | None, says("Id of the credential that is added.", "git-token")] = None
    inference: Annotated[str | None, says("Alias of the inference route.", "inference.local")] = None
    canonical_path: Annotated[str | None, says("Path and query that are sent on.", "/v1/items?page=2")] = None
    frames: Annotated[str | None, says("What may be sent on a WebSocket: none, text or any.", "text")] = None


class Case(Part, frozen=True):
    """One named case with either ``request`` or ``tool``."""

    name: Annotated[str, says("What the case shows, in words.", "another host")]
    expect: Annotated[Expected, says("What must be decided.", {"verdict": "deny", "reason": "host_not_allowed"})]
    request: Annotated[Call | None, says("An HTTP call or a push.", {"url": "https://example.org/"})] = None
    tool: Annotated[
        ToolCall | None,
        says("A call of an MCP tool.", {"server": "files", "tool": "read_file", "arguments": {"path": "/workspace/a"}}),
    ] = None


class CaseFile(Part, frozen=True):
    """A file of cases; vectors bring ``policy`` and ``governance`` as text, a policy's own tests do not."""

    schema: Annotated[Literal[1], says("Version of the format.", 1)]
    cases: Annotated[
        tuple[Case, ...],
        says(
            "The cases, run in order; none depends on another.",
            [
                {
                    "name": "another host",
                    "request": {"url": "https://example.org/"},
                    "expect": {"verdict": "deny", "reason": "host_not_allowed"},
                }
            ],
        ),
    ]
    policy: Annotated[str | None, says("Text of a policy.yaml, in vectors only.", "version: 1")] = None
    governance: Annotated[
        str | None,
        says(
            "Text of a governance.yaml, in vectors only.",
            "schema: 1\nblueprint: {name: x, version: 1.0.0, owner: team}",
        ),
    ] = None


class Outcome(msgspec.Struct, frozen=True):
    """A case and how it went; ``fault`` is empty when the decision was as expected."""

    name: str
    fault: str
    decision: Decision


def _message_of_a_websocket(call: Call, report: Any) -> None:
    if call.message and not opens_websocket(call.url):
        report("message", "only a WebSocket carries messages", "write wss: in place of https:, or remove message")


def _one_body(call: Call, report: Any) -> None:
    if (call.body is not None) + (call.json is not None) + bool(call.push) > 1:
        report("", "a call has one of body, json and push", "keep one of them")


def _one_subject(case: Case, report: Any) -> None:
    if (case.request is None) == (case.tool is None):
        report("", "a case has either a request or a tool", "write one of the two")


CASE_CHECKS = Checks(
    fields={},
    structures={Case: (_one_subject,), Call: (_message_of_a_websocket, _one_body)},
    unsupported={},
    keys={},
)


def load_cases(raw: bytes, name: str) -> CaseFile:
    """Return the cases in ``raw``; raise :class:`PolicyError` with all problems."""
    root, problems = parse(raw, name)
    decoder = Decoder(name, CASE_CHECKS)
    value = decoder.structure(root, CaseFile, "")
    problems += decoder.problems
    if problems or not isinstance(value, CaseFile):
        raise PolicyError(problems or [Problem(name, 1, 1, "", "no cases", "write cases")])
    return value


def push_body(refs: tuple[Push, ...]) -> bytes:
    """Return the start of a ``git-receive-pack`` request that changes ``refs`` (gitprotocol-pack)."""
    body = b""
    for index, push in enumerate(refs):
        old = _ZERO if push.operation == "create" else "a" * 40
        new = _ZERO if push.operation == "delete" else "b" * 40
        line = f"{old} {new} {push.ref}".encode() + (b"\x00 report-status side-band-64k" if index == 0 else b"")
        body += f"{len(line) + 4:04x}".encode() + line
    return body + b"0000PACK"


def split_url(url: str) -> tuple[str, str, int, str]:
    """Return scheme, host, port and target of ``url``; the target keeps its exact spelling.

    The scheme of a WebSocket is that of the request that opens it (see :func:`opens_websocket`).
    """
    parts = urlsplit(url)
    session = parts.scheme == UPGRADE
    scheme = "https" if session else _STREAMS.get(parts.scheme, parts.scheme)
    if scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError(f"{url!r} is not an http, https, ws, wss or postgres URL")
    target = url.split("://", 1)[1]
    cut = min((index for index in (target.find(mark) for mark in "/?#") if index >= 0), default=len(target))
    path = target[cut:]
    usual = _SESSION_PORT if session else _DEFAULT_PORTS[scheme]
    return scheme, parts.hostname, parts.port or usual, path or "/"


def upgrade_of(url: str) -> str:
    """Return what a request for ``url`` asks to switch to, empty for most."""
    if urlsplit(url).scheme == UPGRADE:
        return UPGRADE
    return "websocket" if opens_websocket(url) else ""


def opens_websocket(url: str) -> bool:
    """Return whether ``url`` is that of a WebSocket."""
    return urlsplit(url).scheme in _STREAMS


def as_request(call: Call) -> Request:
    """Return ``call`` as the request that a ring would decide on."""
    scheme, host, port, path = split_url(call.url)
    body = call.body.encode() if call.body is not None else None
    headers = {name.lower(): value for name, value in call.headers.items()}
    if call.push:
        body = push_body(call.push)
    elif call.json is not None:
        body = json.dumps(call.json).encode()
        headers.setdefault("content-type", "application/json")
    return Request(
        scheme=scheme,
        host=host,
        port=port,
        method=call.method,
        path=path,
        binary=call.binary,
        ancestors=call.ancestors,
        headers=headers,
        body=body,
        body_complete=call.body_complete and not call.push,
        upgrade=upgrade_of(call.url),
        message=call.message,
    )


def tool_request(server: HttpServer, call: ToolCall) -> Request:
    """Return the request by which ``call`` reaches ``server``."""
    address = server.address
    told = {VERSION_HEADER: server.revision} if server.revision else {}
    params = {"name": call.tool, "arguments": call.arguments}
    return Request(
        scheme=address.scheme,
        host=address.host,
        port=address.port,
        method="POST",
        path=address.path,
        binary=call.binary,
        headers={"content-type": "application/json", "accept": "application/json, text/event-stream", **told},
        body=json.dumps({"jsonrpc": "2.0", "id": 1, "method": CALL_TOOL, "params": params}).encode(),
    )


def _fault(expected: Expected, decision: Decision) -> str:
    wanted: Mapping[str, object] = msgspec.to_builtins(expected)
    differences = [
        f"{field} is {getattr(decision, field)!r} instead of {value!r}"
        for field, value in wanted.items()
        if value is not None and getattr(decision, field) != value
    ]
    return "; ".join(differences) + (f" ({decision.detail})" if differences and decision.detail else "")


def run_case(case: Case, matcher: Matcher, governance: Governance) -> Outcome:
    """Decide ``case`` and compare."""
    if case.tool is not None:
        server = matcher.mcp_server_named(case.tool.server)
        if server is not None:
            decision = matcher.decide(tool_request(server, case.tool))
        else:
            decision = decide_tool(governance, case.tool.server, case.tool.tool, case.tool.arguments)
    else:
        assert case.request is not None  # noqa: S101 - load_cases saw to it
        decision = matcher.decide(as_request(case.request))
    return Outcome(case.name, _fault(case.expect, decision), decision)
