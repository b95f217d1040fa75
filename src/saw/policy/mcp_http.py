"""What a request to an MCP server over HTTP asks for, and which methods and tools a rule is about.

Forms: Model Context Protocol, "Streamable HTTP" transport, revisions 2025-03-26 to 2025-11-25. A GET opens the stream of the
session, a DELETE ends it, both without a body; a POST carries JSON-RPC messages. The headers in which the revision 2026-07-28
repeats method and name must say what the body says, whatever the revision.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from saw.policy.calls import BodyRefused, CallRule, Reading, lookalikes, no_body, patterns, texts
from saw.policy.jsonrpc import Message, messages
from saw.policy.model import Endpoint, Match, McpOptions, Operation, Request

CALL_TOOL = "tools/call"
VERSION_HEADER = "mcp-protocol-version"
SESSION_HEADER = "mcp-session-id"
METHOD_HEADER = "mcp-method"
NAME_HEADER = "mcp-name"
ASSUMED_VERSION = "2025-03-26"
"""The revision that a server assumes where no header names one."""
TOOL = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")
"""What the name of a tool may be where names are strict."""
MAX_TOOL = 128
"""Longest name of a tool (characters), strict or not."""

READ_METHODS = frozenset(
    {
        "initialize",
        "ping",
        "tools/list",
        "resources/list",
        "resources/read",
        "resources/templates/list",
        "resources/subscribe",
        "resources/unsubscribe",
        "prompts/list",
        "prompts/get",
        "completion/complete",
        "logging/setLevel",
        "notifications/initialized",
        "notifications/cancelled",
        "notifications/progress",
        "notifications/roots/list_changed",
    }
)
"""Methods that set up, list and read; by default they are ``auto``."""
KNOWN_METHODS = READ_METHODS | {CALL_TOOL}
"""The methods of a client that ``allow_all_known_mcp_methods`` stands for."""

_SESSION = re.compile(r"[\x21-\x7e]{1,256}\Z")
_NAMED_BY = {CALL_TOOL: "name", "prompts/get": "name", "resources/read": "uri"}
_PARAMS = frozenset({"name", "arguments", "_meta", "task"})


def options(endpoint: Endpoint) -> McpOptions:
    """Return how ``endpoint`` is read."""
    return endpoint.mcp or McpOptions()


def tools_of(match: Match) -> tuple[str, ...]:
    """Return the tool globs of a rule; empty where it names none."""
    return texts(match.tool) or (texts(match.params.name) if match.params else ())


def mcp_rule(label: str, match: Match, endpoint: Endpoint) -> CallRule:
    """Return a rule of an MCP endpoint; without a method it is about tools, or about every known method."""
    tools = tools_of(match)
    names = patterns(tools) if tools else None
    if match.method != "*":
        if "*" in match.method:
            return CallRule(label, frozenset(), patterns((match.method,)), names)
        return CallRule(label, frozenset({match.method}), names=names)
    return CallRule(label, frozenset({CALL_TOOL}) if tools else _profile(endpoint), names=names)


def _profile(endpoint: Endpoint) -> frozenset[str]:
    """Return the methods that pass without a rule of their own: tools only where no rule names one."""
    named = any(tools_of(rule.allow) for rule in endpoint.rules or ())
    return KNOWN_METHODS - {CALL_TOOL} if named else KNOWN_METHODS


def profile_rules(endpoint: Endpoint) -> tuple[CallRule, ...]:
    """Return what an MCP endpoint allows beyond its rules."""
    if not options(endpoint).allow_all_known_mcp_methods:
        return ()
    return (CallRule("mcp.allow_all_known_mcp_methods", _profile(endpoint)),)


def mcp_reader(endpoint: Endpoint) -> Callable[[Request, str], Reading]:
    """Return how requests to an MCP ``endpoint`` are read."""
    read_as = options(endpoint)
    versions = frozenset(read_as.versions)

    def read(request: Request, query: str) -> Reading:
        method = request.method.upper()
        if method in {"GET", "DELETE"}:
            form = session_form(request, method, query)
            _version(request, versions, first=False)
            return Reading((), form)
        found = messages(request, query, read_as.max_body_bytes)
        first = any(message.method == "initialize" for message in found)
        if first and len(found) > 1:
            raise BodyRefused("initialize is never part of a batch")
        repeated(request, found)
        _version(request, versions, first=first)
        operations = tuple(_operation(message, versions, strict=read_as.strict_tool_names) for message in found)
        return Reading(operations, arguments=tuple(map(arguments_of, found)))

    return read


def arguments_of(message: Message) -> dict[str, object] | None:
    """Return the arguments of a tool that is called, an empty object where none are sent; None for any other message."""
    if message.method != CALL_TOOL or not isinstance(message.params, dict):
        return None
    arguments = message.params.get("arguments")
    return arguments if isinstance(arguments, dict) else {}


def repeated(request: Request, found: tuple[Message, ...]) -> None:
    """Raise :class:`BodyRefused` where a header names another method, or another name, than the one message of the body."""
    method, name = request.headers.get(METHOD_HEADER), request.headers.get(NAME_HEADER)
    if method is None and name is None:
        return
    if len(found) != 1 or (method is not None and method != found[0].method):
        raise BodyRefused("Mcp-Method is not what the body calls")
    params = found[0].params
    key = _NAMED_BY.get(found[0].method)
    if name is not None and (key is None or not isinstance(params, dict) or params.get(key) != name):
        raise BodyRefused("Mcp-Name is not what the body names")


def session_form(request: Request, method: str, query: str) -> str:
    """Return what a GET or DELETE without a message is for; raise :class:`BodyRefused` when it is for nothing."""
    no_body(request)
    repeated(request, ())
    if query:
        raise BodyRefused("a session has no query in its URL")
    if method == "GET":
        kinds = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")]
        if "text/event-stream" not in kinds:
            raise BodyRefused("a GET opens the stream of a session and accepts text/event-stream")
        return "the stream of the session"
    if not _SESSION.match(request.headers.get(SESSION_HEADER, "")):
        raise BodyRefused("a DELETE ends a session and names it in Mcp-Session-Id")
    return "the end of the session"


def _version(request: Request, versions: frozenset[str], *, first: bool) -> None:
    if not versions:
        return
    told = request.headers.get(VERSION_HEADER)
    if told is None and not first:
        told = ASSUMED_VERSION
    if told is not None and told not in versions:
        raise BodyRefused(f"the revision {told[:40]!r} of MCP is not one of {', '.join(sorted(versions))}")


def _operation(message: Message, versions: frozenset[str], *, strict: bool) -> Operation:
    params = message.params
    if params is not None and not isinstance(params, dict):
        raise BodyRefused("the params of MCP are an object")
    if message.method == "initialize":
        wanted = (params or {}).get("protocolVersion")
        if not isinstance(wanted, str) or (versions and wanted not in versions):
            raise BodyRefused(f"initialize asks for the revision {str(wanted)[:40]!r}, which is not listed")
    if message.method != CALL_TOOL:
        return Operation(message.method)
    found = params or {}
    lookalikes(found, _PARAMS)
    name, arguments = found.get("name"), found.get("arguments")
    if set(found) - _PARAMS or not isinstance(name, str) or not isinstance(arguments, dict | None):
        raise BodyRefused("tools/call takes a name and an object of arguments")
    if not 1 <= len(name) <= MAX_TOOL or (strict and not TOOL.match(name)):
        raise BodyRefused(f"the tool's name {name[:40]!r} is not 1 to 128 of letters, digits and _ . -")
    return Operation(CALL_TOOL, name)
