"""What an endpoint reads of a body: no bytes make it raise, take long, or let through what a plainer reader would refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from examples import examples
from saw.policy.errors import PolicyError
from saw.policy.loader import Bundle, load_governance, load_members, load_policy
from saw.policy.matcher import Matcher
from saw.policy.model import Decision, Operation, Request

pytestmark = [pytest.mark.control("RUN-01"), pytest.mark.control("NET-01")]

GOVERNANCE = "schema: 1\nblueprint: {name: x, version: 1.0.0, owner: team}\n"
POLICY = """\
version: 1
network_policies:
  api:
    binaries: [{path: /usr/bin/curl}]
    endpoints:
      - host: a.example.com
        port: 443
        path: /graphql
        protocol: graphql
        rules: [{allow: {operation_type: query, fields: [ok]}}]
      - {host: a.example.com, port: 443, path: /rpc, protocol: json-rpc, rules: [{allow: {method: ok}}]}
      - host: a.example.com
        port: 443
        path: /mcp
        protocol: mcp
        rules: [{allow: {method: ping}}, {allow: {method: tools/call, tool: ok}}]
"""


def loaded(policy: str = POLICY, governance: str = "") -> Bundle:
    members = {"policy.yaml": policy.encode(), "governance.yaml": (GOVERNANCE + governance).encode()}
    return load_members(members)


MATCHER = Matcher.compile(loaded().policy, loaded(governance="actions: []\n").governance)


def ask(path: str, body: bytes | None, method: str = "POST", matcher: Matcher = MATCHER, **headers: str) -> Decision:
    sent = {"content-type": "application/json", **headers}
    return matcher.decide(
        Request("https", "a.example.com", 443, method, path, "/usr/bin/curl", headers=sent, body=body)
    )


READABLE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
MEMBERS = st.dictionaries(
    st.sampled_from(
        ["query", "operationName", "variables", "extensions", "jsonrpc", "id", "method", "params", "result", "Query"]
    ),
    st.one_of(
        READABLE, st.sampled_from(["{ok}", "mutation{ok}", "{bad}", "2.0", "ok", "tools/call", "ping", {"name": "ok"}])
    ),
)


@given(
    st.sampled_from(["/graphql", "/rpc", "/mcp"]),
    st.one_of(
        st.binary(max_size=200),
        MEMBERS.map(lambda value: json.dumps(value).encode()),
        st.lists(MEMBERS, max_size=3).map(lambda value: json.dumps(value).encode()),
        st.text(alphabet="{}()[]:,!|=@$&#\"' \n\\.abokquerymutationfragment...on1_-", max_size=80).map(
            lambda text: json.dumps({"query": text}).encode()
        ),
    ),
    st.sampled_from(["POST", "GET", "DELETE", "PUT", "HEAD"]),
)
@example("/graphql", b'{"query":"{ok}","query":"{bad}"}', "POST")
@example("/graphql", b'{"query":"{ok ...on Q{bad}}"}', "POST")
@example("/rpc", b'[{"jsonrpc":"2.0","id":1,"method":"ok"},{"jsonrpc":"2.0","id":2,"method":"bad"}]', "POST")
@example("/mcp", b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"ok","name":"bad"}}', "POST")
@settings(max_examples=examples(250), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_bytes_come_the_answer_is_a_decision_and_only_what_rules_name_passes(
    path: str, body: bytes, method: str
) -> None:
    decision = ask(path, body, method)
    assert decision.reason != "" or decision.allowed
    if decision.allowed or decision.reason == "review_required":
        assert decision.operations
        for asked in decision.operations:
            assert (
                asked
                in {
                    "/graphql": {Operation("query", asked.name, ("ok",))},
                    "/rpc": {Operation("ok")},
                    "/mcp": {Operation("ping"), Operation("tools/call", "ok")},
                }[path]
            )


NESTED = [
    ("/graphql", json.dumps({"query": "{ok" * 20000}).encode()),
    ("/graphql", json.dumps({"query": "{ok(a:" + "[" * 30000 + "])}"}).encode()),
    ("/graphql", json.dumps({"query": "query($a:" + "[" * 3000 + "Int" + "]" * 3000 + "){ok}"}).encode()),
    ("/graphql", json.dumps({"query": "{ok}" + "#" * 60000}).encode()),
    ("/graphql", json.dumps({"query": "{" + "ok " * 20000 + "}"}).encode()),
    (
        "/graphql",
        json.dumps(
            {"query": "{...F0}" + "".join(f"fragment F{n} on Q{{...F{n + 1} ok}}" for n in range(400))}
        ).encode(),
    ),
    ("/graphql", json.dumps([{"query": "{ok}"}] * 33).encode()),
    ("/graphql", b'{"query":"{ok}","variables":{"a":' + b"[" * 30000 + b"]" * 30000 + b"}}"),
    ("/rpc", b"[" * 60000),
    ("/rpc", json.dumps([{"jsonrpc": "2.0", "id": n, "method": "ok"} for n in range(65)]).encode()),
    ("/mcp", b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":' + b"[" * 100 + b"]" * 100 + b"}}"),
    ("/mcp", b'{"jsonrpc":"2.0","id":' + b"9" * 5000 + b',"method":"ping"}'),
    ("/mcp", b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"\\ud800"}}'),
]


@pytest.mark.parametrize(("path", "body"), NESTED, ids=range(len(NESTED)))
def test_what_is_nested_long_or_many_is_refused_in_bounded_time(path: str, body: bytes) -> None:
    if body == json.dumps({"query": "{ok}" + "#" * 60000}).encode():
        assert ask(path, body).allowed, "a long comment is no harm"
        return
    assert ask(path, body).reason in {"body_unreadable", "operation_not_allowed"}


def test_the_queries_of_a_batch_share_what_may_be_read() -> None:
    long = {"query": "{" + "ok " * 1900 + "}"}
    assert ask("/graphql", json.dumps([long, long]).encode()).allowed
    assert (
        ask("/graphql", json.dumps([long, long, {"query": "{" + "ok " * 300 + "}"}]).encode()).reason
        == "body_unreadable"
    )


def test_a_body_at_the_limit_is_read_and_one_byte_more_is_not() -> None:
    body = b'{"query":"{ok}"}'
    assert ask("/graphql", body.ljust(65536)).allowed
    assert ask("/graphql", body.ljust(65537)).reason == "body_too_large"


def test_a_refusal_says_what_was_asked_for_in_the_words_of_a_rule() -> None:
    refused = ask("/graphql", b'{"query":"mutation M{x: drop}"}')
    assert (refused.reason, refused.protocol) == ("operation_not_allowed", "graphql")
    assert refused.rule_missing is not None
    assert {k: refused.rule_missing[k] for k in ("protocol", "operation_type", "operation_name", "fields")} == {
        "protocol": "graphql",
        "operation_type": "mutation",
        "operation_name": "M",
        "fields": ["drop"],
    }
    refused = ask("/mcp", b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"drop"}}')
    assert refused.rule_missing is not None
    assert (refused.rule_missing["rpc_method"], refused.rule_missing["tool"]) == ("tools/call", "drop")
    assert ask("/rpc", b"x").protocol == "json-rpc" and ask("/rpc", b"x").next_steps


AUDIT = POLICY.replace("protocol: graphql", "protocol: graphql\n        enforcement: audit")


def test_audit_lets_pass_what_no_rule_allows_and_what_cannot_be_read() -> None:
    bundle = loaded(
        AUDIT, "allow_audit: true\nactions:\n  - {match: {host: a.example.com, path: /graphql}, class: auto}\n"
    )
    matcher = Matcher.compile(bundle.policy, bundle.governance)
    for body in (b'{"query":"{bad}"}', b"x"):
        decision = ask("/graphql", body, matcher=matcher)
        assert decision.allowed and decision.rule == "endpoints[0].enforcement: audit"
        assert not ask("/graphql", body).allowed


REGISTERED = (
    "persisted_queries: allow_registered, graphql_persisted_queries: {abc: {operation_type: query, fields: [a]}}"
)
REFUSED_FIELDS = [
    ("protocol: graphql, rules: [{allow: {method: GET}}]", "method has no meaning with protocol graphql"),
    ("protocol: graphql, rules: [{allow: {fields: [a]}}]", "names the type of operation"),
    ("protocol: graphql, rules: [{allow: {operation_type: query, tool: a}}]", "tool has no meaning"),
    ("protocol: graphql, rules: [{allow: {operation_type: query, fields: ['a?']}}]", "are wildcards"),
    ("protocol: graphql, rules: [{allow: {operation_type: read}}]", "expected|write one of"),
    ("protocol: graphql, rules: [{allow: {operation_type: query, path: /x}}]", "path has no meaning"),
    ("protocol: graphql", "needs something that it allows"),
    ("protocol: graphql, access: full, graphql_max_body_bytes: 100", "outside 1024 to 524288"),
    ("protocol: graphql, access: full, graphql_max_body_bytes: 1048576", "outside 1024 to 524288"),
    ("protocol: graphql, access: full, persisted_queries: allow_registered", "need each other"),
    ("protocol: graphql, access: full, mcp: {}", "mcp has no meaning with graphql"),
    (
        f"protocol: graphql, access: full, {REGISTERED}",
        "is not a SHA-256",
    ),
    ("protocol: rest, access: full, json_rpc: {max_body_bytes: 1024}", "json_rpc has no meaning with rest"),
    ("protocol: rest, rules: [{allow: {method: tools/call}}]", "is not an HTTP method"),
    ("protocol: rest, rules: [{allow: {fields: [a]}}]", "fields has no meaning"),
    ("protocol: json-rpc, access: full", "access cannot say"),
    ("protocol: json-rpc, rules: [{allow: {method: 'a*'}}]", "exact, or"),
    ("protocol: json-rpc, rules: [{allow: {method: 'a b'}}]", "is not the name of a method"),
    ("protocol: json-rpc, rules: [{allow: {method: a, path: /x}}]", "path has no meaning"),
    ("protocol: mcp, access: read-only", "access cannot say"),
    ("protocol: mcp", "needs something that it allows"),
    ("protocol: mcp, rules: [{allow: {tool: a}}]", "names its method"),
    ("protocol: mcp, rules: [{allow: {method: tools/list, tool: a}}]", "a tool is named by"),
    ("protocol: mcp, rules: [{allow: {method: 'resources/*'}}]", "wildcards are for methods of tools/"),
    (
        "protocol: mcp, rules: [{allow: {method: tools/call, tool: a}}, {allow: {method: 'tools/*'}}]",
        "would mean nothing",
    ),
    (
        "protocol: mcp, rules: [{allow: {method: tools/call, tool: a}}], deny_rules: [{method: tools/call}]",
        "would mean nothing",
    ),
    ("protocol: mcp, rules: [{allow: {method: tools/call, tool: a, params: {name: a}}}]", "say the same"),
    ("protocol: mcp, rules: [{allow: {method: tools/call, tool: {any: []}}}]", "the list is empty"),
    (
        "protocol: mcp, mcp: {strict_tool_names: false}, rules: [{allow: {method: tools/call, tool: 'a*'}}]",
        "wildcards in tool names need strict_tool_names",
    ),
    ("protocol: mcp, mcp: {versions: [new]}, rules: [{allow: {method: ping}}]", "is not a revision"),
]  # fmt: skip


def endpoint(fields: str) -> bytes:
    return (
        "version: 1\nnetwork_policies:\n  r:\n    binaries: [{path: /bin/a}]\n"
        f"    endpoints:\n      - {{host: x.example.org, port: 443, {fields}}}\n"
    ).encode()


@pytest.mark.control("POL-02")
@pytest.mark.parametrize(("fields", "reason"), REFUSED_FIELDS, ids=[fields[:60] for fields, _ in REFUSED_FIELDS])
def test_what_a_protocol_has_no_use_for_is_refused_by_name(fields: str, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        load_policy(endpoint(fields))


GOOD_FIELDS = [
    "protocol: graphql, rules: [{allow: {operation_type: '*', operation_name: 'A*', fields: ['a*', b]}}]",
    "protocol: graphql, access: full, graphql_max_body_bytes: 524288",
    "protocol: json-rpc, rules: [{allow: {method: '*'}}], deny_rules: [{method: a}]",
    "protocol: mcp, mcp: {allow_all_known_mcp_methods: true}",
    "protocol: mcp, mcp: {allow_all_known_mcp_methods: true}, deny_rules: [{tool: 'a*'}]",
    "protocol: mcp, mcp: {versions: ['2025-11-25']}, rules: [{allow: {method: tools/call, params: {name: {any: [a, b]}}}}]",
]


@pytest.mark.parametrize("fields", GOOD_FIELDS)
def test_what_it_has_a_use_for_loads(fields: str) -> None:
    assert load_policy(endpoint(fields)).network_policies["r"].endpoints[0].protocol


@pytest.mark.control("POL-02")
@pytest.mark.parametrize("more", ["graphql_max_body_bytes: 2048, access: full", "access: full, enforcement: audit"])
def test_endpoints_for_the_same_call_agree_on_how_its_body_is_read(more: str) -> None:
    both = (
        endpoint("protocol: graphql, access: read-only")
        + f"      - {{host: x.example.org, port: 443, protocol: graphql, {more}}}\n".encode()
    )
    with pytest.raises(PolicyError, match=r"overlaps .* and differs in"):
        load_policy(both)
    agreeing = both.replace(more.encode(), b"access: full")
    assert len(load_policy(agreeing).network_policies["r"].endpoints) == 2


def test_rules_of_several_endpoints_for_the_same_call_add_up() -> None:
    both = endpoint("protocol: graphql, access: read-only") + (
        b"      - {host: x.example.org, port: 443, protocol: graphql, access: full, "
        b"deny_rules: [{operation_type: '*', fields: [no]}]}\n"
    )
    matcher = Matcher.compile(load_policy(both), load_governance(GOVERNANCE.encode()))

    def asked(text: str) -> str:
        body = json.dumps({"query": text}).encode()
        request = Request("https", "x.example.org", 443, "POST", "/", "/bin/a", headers=JSON, body=body)
        return matcher.decide(request).reason

    assert [asked("{a}"), asked("mutation{a}"), asked("{no}")] == ["", "review_required", "deny_rule"]


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("match", "reason"),
    [
        ("{host: h.example.com, graphql: {}, mcp: {}}", "exclude each other"),
        ("{host: h.example.com, graphql: {fields: ['a?']}}", "wildcards"),
        ("{host: h.example.com, mcp: {tool: ['[a]']}}", "wildcards"),
        ("{host: h.example.com, json_rpc: {method: ['']}}", "is empty"),
        ("{host: h.example.com, graphql: {operation_type: [read]}}", "one of"),
    ],
)
def test_action_rules_about_several_protocols_or_bad_globs_are_refused(match: str, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        load_governance(f"{GOVERNANCE}actions: [{{match: {match}, class: auto}}]\n".encode())


@pytest.mark.parametrize(
    ("fields", "body", "own"),
    [
        ("protocol: rest, access: full", b"{}", "{method: [POST]}"),
        ("protocol: graphql, access: full", b'{"query":"mutation{a}"}', "{graphql: {}}"),
        (
            "protocol: json-rpc, rules: [{allow: {method: a}}]",
            b'{"jsonrpc":"2.0","id":1,"method":"a"}',
            "{json_rpc: {}}",
        ),
        ("protocol: mcp, rules: [{allow: {method: a}}]", b'{"jsonrpc":"2.0","id":1,"method":"a"}', "{mcp: {}}"),
    ],
)
def test_an_action_rule_about_one_protocol_says_nothing_of_the_others(fields: str, body: bytes, own: str) -> None:
    others = [match for match in ("{graphql: {}}", "{json_rpc: {}}", "{mcp: {}}") if match != own]

    def reason(*matches: str) -> str:
        rules = ", ".join(
            f"{{match: {match.replace('{', '{host: x.example.org, ', 1)}, class: auto}}" for match in matches
        )
        governance = load_governance(f"{GOVERNANCE}actions: [{rules}]\n".encode())
        matcher = Matcher.compile(load_policy(endpoint(fields)), governance)
        return matcher.decide(
            Request("https", "x.example.org", 443, "POST", "/", "/bin/a", headers=JSON, body=body)
        ).reason

    assert reason(*others) == "review_required"
    assert reason(*others, own) == ""


def test_reviewers_of_different_operations_are_told_apart() -> None:
    governance = (
        "actions:\n"
        "  - {match: {host: x.example.org, graphql: {fields: [a]}}, class: review, reviewers: {group: one}}\n"
        "  - {match: {host: x.example.org, graphql: {fields: [b]}}, class: review, reviewers: {group: two}}\n"
    )
    matcher = Matcher.compile(
        load_policy(endpoint("protocol: graphql, access: full")), load_governance((GOVERNANCE + governance).encode())
    )

    def groups(text: str) -> list[Any]:
        body = json.dumps({"query": text}).encode()
        asked = matcher.reviews(Request("https", "x.example.org", 443, "POST", "/", "/bin/a", headers=JSON, body=body))
        return [one.reviewers.group if one.reviewers else None for one in asked]

    assert groups("mutation{a}") == ["one"]
    assert groups("mutation{a b}") == ["one", "two"]
    assert groups("mutation{c}") == [None]
    assert groups("{c a}") == ["one"]


def test_the_grammar_is_loaded_only_where_a_policy_speaks_graphql() -> None:
    code = (
        "import sys; from saw.policy.loader import load_members; from saw.policy.matcher import Matcher; "
        "import saw.cli.main, saw.policy.reach_diff; "
        "b = load_members({{'policy.yaml': {policy!r}, 'governance.yaml': {governance!r}}}); "
        "Matcher.compile(b.policy, b.governance); print('graphql' in sys.modules)"
    )
    for fields, expected in (("protocol: rest, access: full", "False"), ("protocol: graphql, access: full", "True")):
        script = code.format(policy=endpoint(fields), governance=GOVERNANCE.encode())
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_endpoints_that_the_loader_would_refuse_are_refused_at_a_call_too() -> None:
    policy = load_policy(endpoint("protocol: graphql, access: full"))
    rule = policy.network_policies["r"]
    other = msgspec.structs.replace(rule.endpoints[0], protocol="rest")
    for endpoints in ((rule.endpoints[0], other), (other, rule.endpoints[0])):
        rules = {"r": msgspec.structs.replace(rule, endpoints=endpoints)}
        matcher = Matcher(msgspec.structs.replace(policy, network_policies=rules), load_governance(GOVERNANCE.encode()))
        body = b'{"query":"{a}"}'
        request = Request("https", "x.example.org", 443, "POST", "/", "/bin/a", headers=JSON, body=body)
        assert matcher.decide(request).reason == "body_unreadable"
