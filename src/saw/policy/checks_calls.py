"""What an endpoint of each protocol may say: which fields belong to it, and what its rules may name."""

from __future__ import annotations

import re
from collections.abc import Iterator

from saw.policy import globs, websocket
from saw.policy.decode import Report, Steps, StructureReport
from saw.policy.governance import ActionMatch
from saw.policy.mcp_http import CALL_TOOL, options, tools_of
from saw.policy.model import BODY_LIMIT, CALL_PROTOCOLS, Endpoint, Match

SMALLEST_BODY = 1024
LARGEST_BODY = 524_288
"""Bounds of a body limit (bytes); both rings see more of a body than the larger one."""
MAX_CALL_RULES = 64
"""Most allow and deny rules of one endpoint whose calls are named in the body: they are tried one by one."""
MAX_NAMED = 256
"""Most globs of one such rule, and most registered queries."""

_HTTP_METHOD = re.compile(r"(?:\*|[A-Za-z][A-Za-z-]{0,31})\Z")
_RPC_METHOD = re.compile(r"[\x21-\x7e]{1,128}\Z")
_NAME = re.compile(r"[_A-Za-z][_0-9A-Za-z]{0,255}\Z")
_HASH = re.compile(r"[0-9a-f]{64}\Z")
_VERSION = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")
_DEFAULTS = {field: getattr(Match(), field) for field in Match.__struct_fields__}
_OF_PROTOCOL = {
    "graphql": frozenset({"operation_type", "operation_name", "fields"}),
    "json-rpc": frozenset({"method"}),
    "mcp": frozenset({"method", "tool", "params"}),
}
_OF_REST = frozenset({"method", "path", "query"})
_OPTIONS = {
    "graphql_max_body_bytes": "graphql",
    "persisted_queries": "graphql",
    "graphql_persisted_queries": "graphql",
    "mcp": "mcp",
    "json_rpc": "json-rpc",
}


def check_http_method(value: str, report: Report) -> None:
    """Report what is no HTTP method that a rule may name."""
    if value.upper() == websocket.TEXT:
        report(f"{value} is a message of a WebSocket", "write protocol: websocket for this endpoint")
    elif not _HTTP_METHOD.match(value):
        report(f"{value!r} is not an HTTP method", "write a method such as GET, or *")
    elif value.upper() in {"TRACE", "TRACK", "CONNECT"}:
        report(f"{value} reflects or tunnels requests", "remove the rule; it is always denied")


def _check_of_websocket(value: str, report: Report) -> None:
    if value.upper() not in websocket.RULE_METHODS:
        reason = f"{value} is no part of a WebSocket: GET opens it, {websocket.TEXT} is a text message"
        report(reason, f"write GET, {websocket.TEXT} or *, or an endpoint of its own with protocol: rest")


def _matches(endpoint: Endpoint) -> Iterator[tuple[Steps, Match, bool]]:
    for index, rule in enumerate(endpoint.rules or ()):
        yield ("rules", index, "allow"), rule.allow, True
    for index, match in enumerate(endpoint.deny_rules or ()):
        yield ("deny_rules", index), match, False


def fields_of_protocol(endpoint: Endpoint, report: StructureReport) -> None:
    """Report fields of a rule that another protocol has, and methods that are none."""
    protocol = endpoint.protocol
    known = _OF_PROTOCOL.get(protocol, _OF_REST)
    for steps, match, _ in _matches(endpoint):
        for field, default in _DEFAULTS.items():
            if field not in known and getattr(match, field) != default:
                reason = f"{field} has no meaning with {'protocol ' + protocol if protocol else 'no protocol'}"
                report((*steps, field), reason, f"use {', '.join(sorted(known))}")

        def at_method(reason: str, cure: str, place: Steps = (*steps, "method")) -> None:
            report(place, reason, cure)

        if "method" not in known:
            continue
        if protocol == websocket.PROTOCOL:
            _check_of_websocket(match.method, at_method)
        elif protocol not in CALL_PROTOCOLS:
            check_http_method(match.method, at_method)
        elif not _RPC_METHOD.match(match.method):
            at_method(f"{match.method[:40]!r} is not the name of a method", "write 1 to 128 characters without spaces")


def options_of_protocol(endpoint: Endpoint, report: StructureReport) -> None:
    """Report options of another protocol, and access or rules that do not go with this one."""
    protocol = endpoint.protocol
    for field, owner in _OPTIONS.items():
        value = getattr(endpoint, field)
        if owner != protocol and value not in (None, "deny", {}, BODY_LIMIT):
            report(field, f"{field} has no meaning with {protocol or 'no protocol'}", f"remove it, or use {owner}")
    if protocol not in CALL_PROTOCOLS:
        return
    if endpoint.access and protocol != "graphql":
        report("access", f"access cannot say which calls of {protocol} pass", "write rules")
    base = bool(endpoint.rules) or (protocol == "graphql" and bool(endpoint.access))
    if not base and not (protocol == "mcp" and options(endpoint).allow_all_known_mcp_methods):
        cure = "add access: read-only, or rules" if protocol == "graphql" else "add rules"
        report("protocol", f"a {protocol} endpoint needs something that it allows", cure)
    if len(endpoint.rules or ()) + len(endpoint.deny_rules or ()) > MAX_CALL_RULES:
        report("rules", f"more than {MAX_CALL_RULES} rules are tried one by one", "write fewer, broader ones")


def graphql(endpoint: Endpoint, report: StructureReport) -> None:
    """Report what a GraphQL endpoint may not say."""
    if endpoint.protocol != "graphql":
        return
    _limit(endpoint.graphql_max_body_bytes, ("graphql_max_body_bytes",), report)
    for steps, match, _ in _matches(endpoint):
        if match.operation_type is None:
            report((*steps, "operation_type"), "a graphql rule names the type of operation", "write query, or *")
        _globs(match.fields, (*steps, "fields"), report)
        _globs((match.operation_name,) if match.operation_name else (), (*steps, "operation_name"), report)
    known = endpoint.graphql_persisted_queries
    if (endpoint.persisted_queries == "allow_registered") != bool(known):
        reason = "persisted_queries: allow_registered and graphql_persisted_queries need each other"
        report("persisted_queries", reason, "write both or none")
    if len(known) > MAX_NAMED:
        report("graphql_persisted_queries", f"more than {MAX_NAMED} hashes", "split the endpoint by path")
    for key, query in known.items():
        at: Steps = ("graphql_persisted_queries", key)
        if not _HASH.match(key):
            report(at, f"{key[:80]!r} is not a SHA-256 in lower-case hexadecimal digits", "write the query's hash")
        if not query.fields:
            report(at, "the registered query selects no field", "list its root fields")
        names = [*query.fields, *([query.operation_name] if query.operation_name else [])]
        wrong = next((name for name in names if not _NAME.match(name)), None)
        if wrong is not None or len(query.fields) > MAX_NAMED:
            report(at, f"{str(wrong)[:80]!r} is not a name of GraphQL", "write root fields and names without wildcards")


def json_rpc(endpoint: Endpoint, report: StructureReport) -> None:
    """Report what a JSON-RPC endpoint may not say."""
    if endpoint.protocol != "json-rpc":
        return
    if endpoint.json_rpc is not None:
        _limit(endpoint.json_rpc.max_body_bytes, ("json_rpc", "max_body_bytes"), report)
    for steps, match, _ in _matches(endpoint):
        if "*" in match.method and match.method != "*":
            report((*steps, "method"), "a method of json-rpc is exact, or *", "list the methods")


def mcp(endpoint: Endpoint, report: StructureReport) -> None:
    """Report what an MCP endpoint may not say."""
    if endpoint.protocol != "mcp":
        return
    read_as = options(endpoint)
    _limit(read_as.max_body_bytes, ("mcp", "max_body_bytes"), report)
    for version in read_as.versions:
        if not _VERSION.match(version):
            report(("mcp", "versions"), f"{version[:40]!r} is not a revision of MCP", "write for example 2025-11-25")
    tools_named = any(tools_of(rule.allow) for rule in endpoint.rules or ())
    for steps, match, _ in _matches(endpoint):
        at = (*steps, "method")
        tools = tools_of(match)
        if match.tool is not None and match.params is not None:
            report((*steps, "params"), "tool and params.name say the same", "keep one of the two")
        _globs(tools, (*steps, "tool" if match.tool is not None else "params"), report)
        if any("*" in tool for tool in tools) and not read_as.strict_tool_names:
            report(steps, "wildcards in tool names need strict_tool_names", "list the tools, or remove the field")
        if match.method == "*" and not read_as.allow_all_known_mcp_methods:
            cure = "name the method, or set mcp.allow_all_known_mcp_methods"
            report(at, "an mcp rule names its method", cure)
        if "*" in match.method and match.method != "*" and not match.method.startswith("tools/"):
            report(at, "wildcards are for methods of tools/", "list the methods")
        if tools and match.method not in {"*", CALL_TOOL}:
            report(at, f"a tool is named by {CALL_TOOL}", f"write method: {CALL_TOOL}")
        broad = match.method == CALL_TOOL or ("*" in match.method and match.method.startswith("tools/"))
        if broad and not tools and tools_named and _covers_calls(match.method):
            reason = "it is about every tool, so that the rules for single tools would mean nothing"
            report(at, reason, "name the tools, or remove the rules that do")


def _covers_calls(method: str) -> bool:
    return globs.flat_glob(method).fullmatch(CALL_TOOL) is not None


def _limit(value: int, steps: Steps, report: StructureReport) -> None:
    if not SMALLEST_BODY <= value <= LARGEST_BODY:
        report(steps, f"{value} is outside {SMALLEST_BODY} to {LARGEST_BODY}", "write a number of bytes between them")


def _globs(found: tuple[str, ...], steps: Steps, report: StructureReport) -> None:
    if len(found) > MAX_NAMED:
        report(steps, f"more than {MAX_NAMED} globs", "write fewer, broader ones")
    for glob in found:
        try:
            globs.flat_glob(glob)
        except globs.GlobError as error:
            report(steps, str(error), "write literal text with * as the wildcard")
            continue
        if len(glob) > 128:
            report(steps, "a name or glob is longer than 128 characters", "shorten it")


def check_action_match(match: ActionMatch, report: StructureReport) -> None:
    """Report an action rule that is about several protocols at once, or whose globs are none."""
    named = [name for name in ("git", "graphql", "mcp", "json_rpc") if getattr(match, name) is not None]
    if len(named) > 1:
        report(named[1], f"{' and '.join(named)} exclude each other", "write one rule for each")
    if match.graphql is not None:
        _globs(match.graphql.fields, ("graphql", "fields"), report)
    if match.mcp is not None:
        _globs(match.mcp.method, ("mcp", "method"), report)
        _globs(match.mcp.tool, ("mcp", "tool"), report)
    if match.json_rpc is not None:
        _globs(match.json_rpc.method, ("json_rpc", "method"), report)
