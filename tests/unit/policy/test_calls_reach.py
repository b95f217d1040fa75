"""The diff of reach over what bodies ask for: operations and fields, methods and tools, sizes and revisions."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from saw.policy.casefile import Call, as_request
from saw.policy.errors import PolicyError
from saw.policy.loader import Bundle, load_members
from saw.policy.model import Request
from saw.policy.reach_calls import gains
from saw.policy.reach_diff import diff_bundles
from saw.policy.reach_invariants import load_invariants
from saw.policy.reach_prove import prove
from saw.policy.reach_side import Side

pytestmark = pytest.mark.control("POL-01")

FIELDS = ["a", "ab", "b", "c"]
FIELD_GLOBS = ["a", "a*", "b", "*"]
METHODS = ["initialize", "tools/call", "tools/list", "ping", "x", "xy", "notifications/initialized"]
TOOLS = ["a", "ab", "b", "two words", "é"]
TOOL_GLOBS = ["a", "a*", "b", "*"]
VERSIONS = ["2025-03-26", "2025-11-25", "2024-11-05"]
HASHES = ["a" * 64, "b" * 64]
LIMITS = [1024, 2048]

GRAPHQL_MATCH = st.fixed_dictionaries(
    {"operation_type": st.sampled_from(["query", "mutation", "*"])},
    optional={
        "operation_name": st.sampled_from(["N", "N*", "*"]),
        "fields": st.lists(st.sampled_from(FIELD_GLOBS), min_size=1, max_size=2, unique=True),
    },
)
RPC_MATCH = st.fixed_dictionaries({"method": st.sampled_from([*METHODS, "*"])})
MCP_MATCH = st.one_of(
    st.fixed_dictionaries({"method": st.sampled_from([*METHODS, "tools/*", "*"])}),
    st.fixed_dictionaries({"method": st.just("tools/call"), "tool": st.sampled_from(TOOL_GLOBS)}),
    st.fixed_dictionaries({"tool": st.just({"any": ["a", "two words"]}), "method": st.just("tools/call")}),
)


def rules(match: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"rules": st.lists(match.map(lambda m: {"allow": m}), min_size=1, max_size=3)},
        optional={"deny_rules": st.lists(match, min_size=1, max_size=2)},
    )


@st.composite
def endpoint(draw: st.DrawFn) -> dict[str, Any]:
    protocol = draw(st.sampled_from(["graphql", "graphql", "json-rpc", "mcp", "mcp", "rest"]))
    value: dict[str, Any] = {"host": "x.example.org", "port": 443, "protocol": protocol}
    if protocol == "rest":
        return {**value, "access": draw(st.sampled_from(["read-only", "read-write", "full"]))}
    if protocol == "graphql":
        if draw(st.booleans()):
            value |= {"graphql_max_body_bytes": draw(st.sampled_from(LIMITS))}
        if draw(st.booleans()):
            known = {h: {"operation_type": "query", "fields": [draw(st.sampled_from(FIELDS))]} for h in HASHES}
            known[HASHES[0]]["operation_name"] = "N"
            value |= {"persisted_queries": "allow_registered", "graphql_persisted_queries": known}
        access = st.sampled_from(["read-only", "read-write", "full"]).map(lambda a: {"access": a})
        return value | draw(st.one_of(access, rules(GRAPHQL_MATCH)))
    if protocol == "json-rpc":
        return value | {"json_rpc": {"max_body_bytes": draw(st.sampled_from(LIMITS))}} | draw(rules(RPC_MATCH))
    options: dict[str, Any] = {"max_body_bytes": draw(st.sampled_from(LIMITS))}
    options["strict_tool_names"] = draw(st.booleans())
    options["allow_all_known_mcp_methods"] = draw(st.booleans())
    options["versions"] = draw(st.lists(st.sampled_from(VERSIONS), max_size=2, unique=True))
    return value | {"mcp": options} | draw(rules(MCP_MATCH))


CLASS = st.sampled_from(["auto", "review", "deny", "staged"])
ACTION = st.fixed_dictionaries(
    {
        "class": CLASS,
        "match": st.one_of(
            st.fixed_dictionaries({}, optional={"method": st.just(["POST"])}),
            st.fixed_dictionaries(
                {},
                optional={
                    "operation_type": st.just(["mutation"]),
                    "fields": st.lists(st.sampled_from(FIELD_GLOBS), min_size=1, max_size=2),
                },
            ).map(lambda m: {"graphql": m}),
            st.fixed_dictionaries({}, optional={"tool": st.lists(st.sampled_from(TOOL_GLOBS), min_size=1)}).map(
                lambda m: {"mcp": m}
            ),
            st.lists(st.sampled_from(METHODS), min_size=1, max_size=2).map(lambda m: {"mcp": {"method": m}}),
            st.lists(st.sampled_from([*METHODS, "x*"]), max_size=2).map(lambda m: {"json_rpc": {"method": m}}),
        ).map(lambda m: {"host": "x.example.org", **m}),
    }
)


RULES = [
    {"type": "integer", "min": 1, "max": 5},
    {"type": "integer", "min": 3},
    {"under": "/a"},
    {"under": "/a/b", "required": True},
    {"regex": "[ab]+"},
    {"enum": ["a", "c"]},
    {"max_length": 3},
    {"type": "array", "max_length": 1, "items": {"enum": ["a", "b"]}},
]
VALUES = [1, 3, 9, 2.5, True, None, "a", "ab", "cccc", "/a", "/a/b/c", "/a/../b", [], ["a"], ["a", "b"], ["c"], {}]
ARGUMENTS = st.dictionaries(st.sampled_from(["x", "y", "z"]), st.sampled_from(VALUES), max_size=2)
TOOL_RULES = st.dictionaries(
    st.sampled_from(["a", "ab"]),
    st.fixed_dictionaries(
        {
            "class": CLASS,
            "args": st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from(RULES), max_size=2),
        }
    ),
    max_size=2,
)


def bundle(
    endpoints: list[dict[str, Any]],
    actions: list[dict[str, Any]] = [],  # noqa: B006 - never changed
    tools: dict[str, Any] | None = None,
) -> Bundle:
    policy = {"version": 1, "network_policies": {"r": {"endpoints": endpoints, "binaries": [{"path": "/bin/a"}]}}}
    governance = {"schema": 1, "blueprint": {"name": "b", "version": "1.0.0", "owner": "o"}, "actions": actions}
    if tools is not None:
        server = {"transport": "http", "url": "https://x.example.org/p", "tools": tools}
        governance["mcp"] = {"servers": {"docs": server}}
    return load_members(
        {"policy.yaml": json.dumps(policy).encode(), "governance.yaml": json.dumps(governance).encode()}
    )


@st.composite
def bundles(draw: st.DrawFn) -> Bundle:
    endpoints = [draw(endpoint())]
    if draw(st.booleans()):
        endpoints.append(
            {**endpoints[0], **draw(rules({"graphql": GRAPHQL_MATCH}.get(endpoints[0]["protocol"], RPC_MATCH)))}
        )
        endpoints[1].pop("access", None)
    tools = None
    if endpoints[0]["protocol"] == "mcp" and draw(st.integers(0, 2)):
        tools = draw(TOOL_RULES)
    endpoints = [{**one, "path": "/p"} for one in endpoints] if tools is not None else endpoints
    try:
        return bundle(endpoints, draw(st.lists(ACTION, max_size=2)), tools)
    except PolicyError:
        assume(False)
        raise


def message(draw: st.DrawFn, number: int) -> dict[str, Any]:
    method = draw(st.sampled_from(METHODS))
    value: dict[str, Any] = {"jsonrpc": "2.0", "id": number, "method": method}
    if method == "tools/call":
        named = st.sampled_from(TOOLS).map(lambda t: {"name": t})
        sent = st.fixed_dictionaries({"name": st.sampled_from(TOOLS), "arguments": ARGUMENTS})
        value["params"] = draw(st.one_of(named, sent, st.just({}), st.just([])))
    elif method == "initialize":
        value["params"] = {"protocolVersion": draw(st.sampled_from([*VERSIONS, "other", None]))}
    elif draw(st.booleans()):
        value["params"] = draw(st.sampled_from([{}, []]))
    return value


def operation(draw: st.DrawFn) -> dict[str, Any]:
    if draw(st.integers(0, 4)) == 0:
        value: dict[str, Any] = {
            "extensions": {"persistedQuery": {"sha256Hash": draw(st.sampled_from([*HASHES, "c" * 64]))}}
        }
        return value | draw(st.sampled_from([{}, {"operationName": "N"}, {"operationName": "M"}]))
    kind = draw(st.sampled_from(["query", "mutation", "subscription"]))
    fields = draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3, unique=True))
    return {"query": f"{kind} {draw(st.sampled_from(['', 'N', 'NM', 'O']))}{{{' '.join(fields)}}}"}


@st.composite
def requests(draw: st.DrawFn) -> Request:
    form = draw(st.sampled_from(["graphql", "graphql", "rpc", "rpc", "get", "session", "plain"]))
    headers = {"content-type": "application/json"}
    if draw(st.booleans()):
        headers["mcp-protocol-version"] = draw(st.sampled_from([*VERSIONS, "other"]))
    if draw(st.integers(0, 3)) == 0:
        headers |= draw(
            st.sampled_from([{"mcp-method": "ping"}, {"mcp-method": "tools/call", "mcp-name": "a"}, {"mcp-name": "b"}])
        )
    method, path, body = "POST", "/p", b""
    size = draw(st.sampled_from([0, 0, 1500, 3000]))
    if form in {"graphql", "rpc"}:
        one = operation if form == "graphql" else message
        made = [one(draw, *([n] if form == "rpc" else [])) for n in range(draw(st.sampled_from([1, 1, 1, 2])))]  # type: ignore[operator]
        body = json.dumps(made if len(made) > 1 or draw(st.booleans()) else made[0]).encode().ljust(size)
    elif form == "get":
        method = draw(st.sampled_from(["GET", "HEAD"]))
        path = f"/p?query={quote(str(operation(draw).get('query', '{a}')), safe='')}"
    elif form == "session":
        method = draw(st.sampled_from(["GET", "DELETE"]))
        headers |= draw(st.sampled_from([{}, {"accept": "text/event-stream"}, {"mcp-session-id": "s"}]))
    else:
        method = draw(st.sampled_from(["GET", "POST", "PUT", "OPTIONS"]))
        body = draw(st.sampled_from([b"", b"x", b"{}", b"[]"]))
    return Request("https", "x.example.org", 443, method, path, "/bin/a", headers=headers, body=body or None)


def several(request: Request) -> bool:
    return (request.body or b"").count(b"jsonrpc") + (request.body or b"").count(b'"query"') + (
        request.body or b""
    ).count(b"sha256Hash") > 1


@pytest.mark.thorough
@given(bundles(), bundles(), st.lists(requests(), min_size=15, max_size=15))
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_everything_newly_allowed_is_reported_and_nothing_else(
    before: Bundle, after: Bundle, sampled: list[Request]
) -> None:
    diff = diff_bundles(before, after)
    old, new = Side(before), Side(after)
    for request in sampled:
        gained = gains(old.decide(request)[1], new.decide(request)[1])
        covered = diff.covers(request)
        if gained:
            assert covered, (request, gained)
        elif covered and all(item.exact for item in diff.gained):
            assert several(request), request
    for item in diff.gained:
        if item.exact and item.subject == "call":
            assert item.witness is not None and item.witness.call is not None
            example = as_request(item.witness.call)
            assert gains(old.decide(example)[1], new.decide(example)[1]) == item.kind
            assert diff.covers(example)


TOOLS_OF = "mcp: {servers: {docs: {transport: http, url: 'https://x.example.org/p', tools: {%s}}}}\n"
SERVED = "path: /p, protocol: mcp, mcp: {allow_all_known_mcp_methods: true}"
ANY_ARGUMENTS = [bundle([{"host": "x.example.org", "port": 443, "path": "/p", "protocol": "mcp",
                          "mcp": {"allow_all_known_mcp_methods": True}}], [], tools)
                 for tools in ({"a": {"class": "auto", "args": {"x": rule}}} for rule in RULES)]  # fmt: skip


@pytest.mark.control("RUN-05")
@given(st.sampled_from(ANY_ARGUMENTS), st.sampled_from(ANY_ARGUMENTS), st.lists(ARGUMENTS, min_size=30, max_size=30))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_arguments_that_are_newly_taken_lie_in_what_is_reported(
    before: Bundle, after: Bundle, sampled: list[dict[str, Any]]
) -> None:
    diff = diff_bundles(before, after)
    old, new = Side(before), Side(after)
    for arguments in sampled:
        sent = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "a", "arguments": arguments}}
        request = as_request(Call(url="https://x.example.org/p", method="POST", binary="/bin/a", json=sent))
        gained = gains(old.decide(request)[1], new.decide(request)[1])
        assert diff.covers(request) == bool(gained), (arguments, gained)
    assert diff.widening == any(item.region.argument == "x" for item in diff.gained)


def called(tools: str) -> Bundle:
    return written(SERVED, TOOLS_OF % tools)


WIDER_TOOLS = [
    ("a: {class: auto, args: {p: {under: /a/b}}}", "a: {class: auto, args: {p: {under: /a}}}", "p", "call"),
    ("a: {class: auto, args: {p: {enum: [x]}}}", "a: {class: auto, args: {p: {enum: [x, y]}}}", "p", "call"),
    ("a: {class: auto, args: {p: {regex: 'a+'}}}", "a: {class: auto, args: {p: {regex: '[ab]+'}}}", "p", "call"),
    (
        "a: {class: auto, args: {p: {type: integer, max: 5}}}",
        "a: {class: auto, args: {p: {type: integer, max: 6}}}",
        "p",
        "call",
    ),
    ("a: {class: auto, args: {p: {required: true}}}", "a: {class: auto, args: {p: {}}}", "p", "call"),
    ("a: {class: auto}", "a: {class: auto, args: {q: {max_length: 3}}}", "q", "call"),
    ("a: {class: review, args: {p: {under: /a/b}}}", "a: {class: review, args: {p: {under: /a}}}", "p", "review"),
    ("a: {class: review}", "a: {class: auto}", "", "review-lifted"),
    ("a: {class: auto}", "a: {class: auto}, b: {class: auto}", "", "call"),
    ("a: {class: deny}", "a: {class: auto}", "", "call"),
]


@pytest.mark.control("RUN-05")
@pytest.mark.parametrize(("narrow", "wide", "argument", "kind"), WIDER_TOOLS, ids=range(len(WIDER_TOOLS)))
def test_each_way_to_widen_a_tool_over_http_is_shown_with_a_call_and_its_undoing_is_none(
    narrow: str, wide: str, argument: str, kind: str
) -> None:
    diff = diff_bundles(called(narrow), called(wide))
    assert {(item.kind, item.region.argument) for item in diff.gained} == {(kind, argument)}
    for item in diff.gained:
        assert item.exact and item.witness is not None and item.witness.call is not None
        assert not argument or f"with other values of {argument}" in item.what
        example = as_request(item.witness.call)
        assert not Side(called(narrow)).decide(example)[0].allowed
    assert not diff_bundles(called(wide), called(narrow)).gained
    assert diff_bundles(called(narrow), written(SERVED)).widening, "no server says anything of arguments"
    assert not diff_bundles(written(SERVED), written(SERVED)).gained


def test_a_tool_over_http_is_never_called_with_arguments_that_an_invariant_forbids() -> None:
    text = INVARIANT.format(kind="tool_never", fields="tool: a, server: docs, args: {p: {under: /a/keys}}")
    invariants = load_invariants(text.encode(), "i.yaml")
    found = [
        prove(called(f"a: {{class: {class_}, args: {{p: {{under: {under}}}}}}}"), invariants)[0]
        for class_, under in (("auto", "/a"), ("review", "/a"), ("auto", "/a/open"), ("deny", "/a"))
    ]
    assert [one.verdict for one in found] == ["broken", "broken", "holds", "holds"]
    example = found[0].counter_example
    assert example is not None and example.call is not None
    assert '"p": "/a/keys"' in (example.call.body or "")
    assert Side(called("a: {class: auto, args: {p: {under: /a}}}")).decide(as_request(example.call))[0].allowed


QUERY_A, QUERY_B = "{allow: {operation_type: query, fields: [a]}}", "{allow: {operation_type: query, fields: [b]}}"
KNOWN = f"graphql_persisted_queries: {{{HASHES[0]}: {{operation_type: query, fields: [a]}}}}"
TOOL = "rules: [{allow: {method: tools/call, tool: '%s'}}]"
PING = "rules: [{allow: {method: ping}}]"
WIDER = [
    ("graphql, access: read-only", "graphql, access: read-write", "mutation"),
    (
        f"graphql, rules: [{QUERY_A}, {QUERY_B}]",
        "graphql, rules: [{allow: {operation_type: query, fields: [a, b]}}]",
        "query {a b}",
    ),
    (
        "graphql, access: full, deny_rules: [{operation_type: '*', fields: [pay]}]",
        "graphql, access: full",
        "pay",
    ),
    ("graphql, access: read-only, graphql_max_body_bytes: 2048", "graphql, access: read-only", "query"),
    (
        "graphql, access: read-only",
        f"graphql, access: read-only, persisted_queries: allow_registered, {KNOWN}",
        HASHES[0],
    ),
    (
        "json-rpc, rules: [{allow: {method: a}}]",
        "json-rpc, rules: [{allow: {method: a}}, {allow: {method: b}}]",
        '"b"',
    ),
    (f"mcp, {TOOL % 'search_*'}", f"mcp, {TOOL % '*'}", "tools/call"),
    (f"mcp, {PING}", "mcp, mcp: {allow_all_known_mcp_methods: true}", "tools/call"),
    (f"mcp, mcp: {{versions: ['2025-11-25']}}, {PING}", f"mcp, {PING}", "ping"),
    (
        "mcp, rules: [{allow: {method: tools/call}}]",
        "mcp, mcp: {strict_tool_names: false}, rules: [{allow: {method: tools/call}}]",
        "tools/call",
    ),
]


def written(fields: str, governance: str = "") -> Bundle:
    policy = (
        "version: 1\nnetwork_policies:\n  r:\n    binaries: [{path: /bin/a}]\n"
        f"    endpoints:\n      - {{host: x.example.org, port: 443, {fields}}}\n"
    )
    return load_members(
        {
            "policy.yaml": policy.encode(),
            "governance.yaml": f"schema: 1\nblueprint: {{name: b, version: 1.0.0, owner: o}}\n{governance}".encode(),
        }
    )


@pytest.mark.parametrize(("narrow", "wide", "shown"), WIDER)
def test_each_way_to_widen_is_shown_with_a_call_and_its_undoing_is_none(narrow: str, wide: str, shown: str) -> None:
    narrow, wide = f"protocol: {narrow}", f"protocol: {wide}"
    diff = diff_bundles(written(narrow), written(wide))
    assert diff.widening
    calls = [item.witness.call for item in diff.gained if item.witness is not None and item.witness.call is not None]
    assert any(shown in (call.body or "") for call in calls), calls
    assert not diff_bundles(written(wide), written(narrow)).gained
    assert not diff_bundles(written(wide), written(wide)).gained


def test_an_action_class_for_one_field_is_a_review_that_was_lifted() -> None:
    fields = "protocol: graphql, access: read-write"
    action = "actions:\n  - {match: {host: x.example.org, graphql: {fields: [note]}}, class: auto}\n"
    diff = diff_bundles(written(fields), written(fields, action))
    assert {(item.kind, item.risk) for item in diff.gained} == {("review-lifted", "critical")}
    assert "mutation {note}" in (diff.gained[0].witness.call.body or "")  # type: ignore[union-attr]
    assert not diff_bundles(written(fields, action), written(fields)).gained


def test_more_sets_of_fields_than_can_be_told_apart_are_possibly_gained() -> None:
    many = ", ".join(f"{{allow: {{operation_type: query, fields: [f{n}]}}}}" for n in range(12))
    diff = diff_bundles(written("protocol: graphql, access: read-only"), written(f"protocol: graphql, rules: [{many}]"))
    assert {item.kind for item in diff.gained} == {"possibly"}


INVARIANT = "schema: 1\ninvariants:\n  - {{id: one, kind: {kind}, why: x, {fields}}}\n"


@pytest.mark.parametrize(
    ("kind", "fields", "broken", "kept"),
    [
        (
            "no_write_without_review",
            "hosts: [x.example.org]",
            ("protocol: graphql, access: read-write", "graphql: {operation_type: [mutation]}"),
            ("protocol: graphql, access: read-write", "graphql: {operation_type: [query]}"),
        ),
        (
            "no_write_without_review",
            "hosts: [x.example.org]",
            ("protocol: mcp, mcp: {allow_all_known_mcp_methods: true}", "mcp: {tool: [a]}"),
            ("protocol: mcp, mcp: {allow_all_known_mcp_methods: true}", "mcp: {method: [tools/list]}"),
        ),
        (
            "no_write_without_review",
            "hosts: [x.example.org]",
            ("protocol: json-rpc, rules: [{allow: {method: a}}]", "json_rpc: {method: [a]}"),
            ("protocol: json-rpc, rules: [{allow: {method: a}}]", "json_rpc: {method: [b]}"),
        ),
        (
            "tool_never",
            "tool: 'delete_*'",
            ("protocol: mcp, rules: [{allow: {method: tools/call, tool: '*_all'}}]", "mcp: {tool: [a]}"),
            ("protocol: mcp, rules: [{allow: {method: tools/call, tool: 'search_*'}}]", "mcp: {tool: [a]}"),
        ),
        (
            "tool_never",
            "tool: 'delete_*', server: x.example.org",
            ("protocol: mcp, mcp: {allow_all_known_mcp_methods: true}", "mcp: {tool: [a]}"),
            (
                "protocol: mcp, mcp: {allow_all_known_mcp_methods: true}, deny_rules: [{tool: 'delete_*'}]",
                "mcp: {tool: [a]}",
            ),
        ),
    ],
)
def test_invariants_hold_for_what_bodies_ask_for(
    kind: str, fields: str, broken: tuple[str, str], kept: tuple[str, str]
) -> None:
    invariants = load_invariants(INVARIANT.format(kind=kind, fields=fields).encode(), "i.yaml")
    found = []
    for policy, match in (broken, kept):
        action = f"actions:\n  - {{match: {{host: x.example.org, {match}}}, class: auto}}\n"
        found.append(prove(written(policy, action), invariants)[0])
    assert [finding.verdict for finding in found] == ["broken", "holds"]
    example = found[0].counter_example
    assert example is not None and example.call is not None
    side = Side(written(broken[0], f"actions:\n  - {{match: {{host: x.example.org, {broken[1]}}}, class: auto}}\n"))
    assert side.decide(as_request(example.call))[1].level > 0
