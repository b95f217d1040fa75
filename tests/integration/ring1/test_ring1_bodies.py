"""Calls that are named in the body, through ring 1: what is allowed arrives as it was judged, its twins arrive nowhere."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator

import pytest
from ring1_rig import POLICY, Rig, until

pytestmark = [pytest.mark.control("NET-01"), pytest.mark.control("RUN-01")]

URL = "https://calls.example.com"
SPOKEN = f"""{POLICY}  calls:
    binaries: [{{path: /usr/bin/curl}}]
    endpoints:
      - {{host: calls.example.com, port: 443, path: /graphql, protocol: graphql, access: read-only}}
      - host: calls.example.com
        port: 443
        path: /fields
        protocol: graphql
        graphql_max_body_bytes: 2048
        rules: [{{allow: {{operation_type: query, fields: [viewer]}}}}]
      - {{host: calls.example.com, port: 443, path: /rpc, protocol: json-rpc, rules: [{{allow: {{method: reports.list}}}}]}}
      - host: calls.example.com
        port: 443
        path: /v1/stream
        protocol: mcp
        mcp: {{versions: ["2025-11-25"]}}
        rules: [{{allow: {{method: tools/call, tool: "search_*"}}}}, {{allow: {{method: tools/list}}}}]
      - host: calls.example.com
        port: 443
        path: /mcp
        protocol: mcp
        rules: [{{allow: {{method: tools/call, tool: "search_*"}}}}, {{allow: {{method: tools/list}}}}]
"""
ACTIONS = """
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team}
plaintext: ["plain.example.com:80"]
mcp:
  servers:
    stream: {transport: http, url: "https://calls.example.com/v1/stream", tools: {search_web: {class: auto}}}
    web:
      transport: http
      url: https://calls.example.com/mcp
      tools:
        search_web: {class: auto, args: {query: {max_length: 20}, sites: {type: array, items: {enum: [docs, wiki]}}}}
        search_all: {class: review}
actions:
  - {match: {host: calls.example.com, json_rpc: {}}, class: auto}
  - {match: {host: calls.example.com, mcp: {}}, class: auto}
"""


@pytest.fixture(scope="module")
def spoken(running: Rig) -> Iterator[Rig]:
    """Ring 1 with a policy of endpoints that look into bodies; put back afterwards."""
    running.activate(SPOKEN, ACTIONS, revision=2)
    yield running
    running.activate()


def post(rig: Rig, path: str, value: object, *more: str):
    body = value if isinstance(value, str) else json.dumps(value)
    return rig.curl(f"{URL}{path}", "--header", "content-type: application/json", "--data-binary", body, *more)


def call(method: str, number: int | None = 1, **params: object) -> dict[str, object]:
    value = {"jsonrpc": "2.0", "method": method, "params": params}
    return value if number is None else {**value, "id": number}


TOOL = call("tools/call", name="search_web")
ALLOWED = [
    ("/graphql", {"query": "{viewer{login}}"}),
    ("/graphql", [{"query": "{viewer}"}, {"query": "query B{other}"}]),
    ("/fields", {"query": "{secret: viewer ...F} fragment F on Query{viewer}"}),
    ("/rpc", call("reports.list")),
    ("/rpc", [call("reports.list", 1), call("reports.list", None)]),
    ("/mcp", TOOL),
    ("/mcp", [TOOL, call("tools/list", 2)]),
    ("/mcp", call("tools/call", name="search_web", arguments={"query": "disk", "sites": ["docs"]})),
]


@pytest.mark.parametrize(("path", "value"), ALLOWED)
def test_what_a_rule_names_arrives_as_it_was_sent(spoken: Rig, path: str, value: object) -> None:
    before = len(spoken.arrived())
    reply = post(spoken, path, value)
    assert reply.status == 200, reply
    method, at, headers, body = spoken.arrived()[before]
    assert (method, at, json.loads(body)) == ("POST", path, value)
    assert headers["x-saw-ring1"] == "allow"


HASH = {"extensions": {"persistedQuery": {"version": 1, "sha256Hash": "a" * 64}}}
REFUSED = [
    ("/graphql", {"query": "mutation{drop}"}, "operation_not_allowed", "graphql"),
    ("/graphql", [{"query": "{viewer}"}, {"query": "mutation{drop}"}], "operation_not_allowed", "graphql"),
    ("/graphql", HASH, "body_unreadable", "graphql"),
    ("/graphql", '{"query": "{viewer}", "query": "mutation{drop}"}', "body_unreadable", "graphql"),
    ("/graphql?query=mutation%7Bdrop%7D", {"query": "{viewer}"}, "body_unreadable", "graphql"),
    ("/fields", {"query": "{viewer: secret}"}, "operation_not_allowed", "graphql"),
    ("/fields", {"query": "{viewer ...F} fragment F on Query{secret}"}, "operation_not_allowed", "graphql"),
    ("/fields", {"query": "{viewer}", "variables": {"a": "x" * 2048}}, "body_too_large", "graphql"),
    ("/rpc", call("reports.drop"), "operation_not_allowed", "json-rpc"),
    ("/rpc", [call("reports.list", 1), call("reports.drop", 2)], "operation_not_allowed", "json-rpc"),
    ("/rpc", {"jsonrpc": "2.0", "id": 1, "result": {}}, "body_unreadable", "json-rpc"),
    ("/mcp", call("tools/call", name="drop"), "operation_not_allowed", "mcp"),
    ("/mcp", [TOOL, call("tools/call", 2, name="drop")], "operation_not_allowed", "mcp"),
    ("/mcp", json.dumps(TOOL)[:-2] + ', "name": "drop"}}', "body_unreadable", "mcp"),
]


@pytest.mark.parametrize(("path", "value", "reason", "protocol"), REFUSED)
def test_its_twin_is_refused_with_a_body_to_act_on_and_arrives_nowhere(
    spoken: Rig, path: str, value: object, reason: str, protocol: str
) -> None:
    before = spoken.arrived()
    reply = post(spoken, path, value)
    assert reply.status == 403, reply
    told = reply.json()
    assert (told["layer"], told["reason"], told["protocol"]) == ("ring1", reason, protocol)
    assert told["next_steps"]
    if reason == "operation_not_allowed":
        assert {"operation_type", "rpc_method"} & set(told["rule_missing"])
    assert spoken.arrived() == before


@pytest.mark.control("RUN-05")
@pytest.mark.parametrize(
    ("tool", "arguments", "reason", "argument"),
    [
        ("search_web", {"query": "x" * 21}, "argument_not_allowed", "query"),
        ("search_web", {"query": "disk", "sites": ["docs", "secret"]}, "argument_not_allowed", "sites"),
        ("search_web", {"query": "disk", "deep": True}, "argument_not_allowed", "deep"),
        ("search_all", {"query": "disk"}, "argument_not_allowed", "query"),
        ("search_other", {}, "tool_not_allowed", ""),
    ],
)
def test_a_tool_with_other_arguments_is_refused_by_name_and_arrives_nowhere(
    spoken: Rig, tool: str, arguments: dict[str, object], reason: str, argument: str
) -> None:
    before = spoken.arrived()
    reply = post(spoken, "/mcp", call("tools/call", name=tool, arguments=arguments))
    told = reply.json()
    assert (reply.status, told["reason"], told["layer"]) == (403, reason, "ring1")
    missing = told["rule_missing"]
    assert (missing["server"], missing["tool"], missing.get("argument", "")) == ("web", tool, argument)
    assert told["next_steps"]
    assert spoken.arrived() == before


@pytest.mark.control("RUN-05")
def test_a_tool_that_waits_for_a_person_goes_on_to_ring_2_which_alone_can_let_it_wait(spoken: Rig) -> None:
    before = len(spoken.arrived())
    assert post(spoken, "/mcp", call("tools/call", name="search_all")).status == 200
    assert spoken.arrived()[before][2]["x-saw-ring1"] == "review"


def test_a_body_that_is_longer_than_ring_1_sees_is_refused_and_one_that_only_looks_short_too(
    spoken: Rig, tmp_path
) -> None:
    before = spoken.arrived()
    for size in (70_000, 1_048_576, 3_000_000):
        long = tmp_path / "long.json"
        long.write_text('{"query": "{viewer}"}'.ljust(size))
        for more in ((), ("--header", "transfer-encoding: chunked")):

            def reason(sent: tuple[str, ...] = (f"@{long}", *more)) -> str:
                # A client that still sends may find the connection closed before it reads the answer.
                reply = post(spoken, "/graphql", *sent)
                return str(reply.json()["reason"]) if reply.body else ""

            assert until(reason, "a refusal that can be read") == "body_too_large", (size, more)
    assert spoken.arrived() == before


def test_a_compressed_body_is_refused_and_plain_it_passes(spoken: Rig, tmp_path) -> None:
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(b'{"query": "{viewer}"}'))
    reply = post(spoken, "/graphql", f"@{packed}", "--header", "content-encoding: gzip")
    assert (reply.status, reply.json()["reason"]) == (403, "body_unreadable")
    assert post(spoken, "/graphql", {"query": "{viewer}"}).status == 200
    assert post(spoken, "/graphql", '{"query": "{viewer}"}', "--header", "transfer-encoding: chunked").status == 200


@pytest.mark.thorough
def test_a_stream_of_a_session_flows_and_needs_its_headers(spoken: Rig) -> None:
    """The answer comes piece by piece: the first line is there although the far end never ends the stream."""
    accept = ("--header", "accept: text/event-stream")
    version = ("--header", "mcp-protocol-version: 2025-11-25")
    script = ("curl", "-s", "-N", "-m", "20", *accept, *version, f"{URL}/v1/stream")
    first = spoken.inside("sh", "-c", " ".join(f"'{word}'" for word in script) + " | head -n 1").stdout
    assert first == "first\n"
    for headers in (accept, version, (*accept, "--header", "mcp-protocol-version: 2024-11-05")):
        refused = spoken.curl(f"{URL}/v1/stream", *headers)
        assert (refused.status, refused.json()["reason"]) == (403, "body_unreadable")
    ended = spoken.curl(f"{URL}/mcp", "--request", "DELETE", "--header", "mcp-session-id: abc")
    assert (ended.status, ended.json()["headers"]["mcp-session-id"]) == (200, "abc")
    assert spoken.curl(f"{URL}/mcp", "--request", "DELETE").status == 403
    assert spoken.curl(f"{URL}/mcp", "--request", "PUT").json()["reason"] == "method_or_path_not_allowed"


def test_a_query_by_get_passes_and_a_mutation_by_get_does_not(spoken: Rig) -> None:
    assert spoken.curl(f"{URL}/graphql?query=%7Bviewer%7D").status == 200
    before = spoken.arrived()
    refused = spoken.curl(f"{URL}/graphql?query=mutation%7Bdrop%7D")
    assert (refused.status, refused.json()["reason"]) == (403, "body_unreadable")
    assert spoken.arrived() == before
