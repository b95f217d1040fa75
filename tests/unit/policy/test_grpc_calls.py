"""gRPC calls are judged without their body: whatever needs it is refused, and so is a call that would wait for a person."""

from __future__ import annotations

from typing import Any

import pytest

from saw.policy.grpc_calls import goes_unread, is_grpc, unread_route
from saw.policy.loader import load_members
from saw.policy.matcher import Matcher
from saw.policy.model import Request

POLICY = """
version: 1
network_policies:
  all:
    endpoints:
      - {host: grpc.example.com, port: 443, protocol: rest, rules: [
          {allow: {method: POST, path: "/demo.Greeter/*"}}, {allow: {method: POST, path: "/demo.Held/*"}}]}
      - {host: calls.example.com, port: 443, path: /graphql, protocol: graphql, access: full}
      - {host: calls.example.com, port: 443, path: /rpc, protocol: json-rpc, rules: [{allow: {method: list}}]}
      - {host: calls.example.com, port: 443, path: /mcp, protocol: mcp, rules: [{allow: {method: tools/list}}]}
      - {host: git.example.com, port: 443, protocol: rest, rules: [{allow: {method: POST, path: "/team/**"}}]}
    binaries: [{path: /usr/bin/client}]
"""
GOVERNANCE = """
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team}
inference:
  routes: [{alias: inference.local, models: ["demo-*"], upstream: "https://models.example.com/v1"}]
actions:
  - {match: {host: grpc.example.com, method: [POST], path: "/demo.Greeter/*"}, class: auto}
  - {match: {host: calls.example.com, json_rpc: {}}, class: auto}
  - {match: {host: calls.example.com, mcp: {}}, class: auto}
  - {match: {host: calls.example.com, graphql: {}}, class: auto}
  - {match: {host: git.example.com, git: {service: receive-pack, ref: "refs/heads/agent/**"}}, class: staged}
  - {match: {host: git.example.com, git: {service: receive-pack}}, class: deny}
"""
GRPC, OTHER = {"content-type": "application/grpc"}, {"content-type": "application/json"}


@pytest.fixture(scope="module")
def compiled() -> Matcher:
    bundle = load_members({"policy.yaml": POLICY.encode(), "governance.yaml": GOVERNANCE.encode()})
    return Matcher.compile(bundle.policy, bundle.governance)


def asked(host: str, path: str, headers: dict[str, str], body: bytes | None = None, **more: Any) -> Request:
    return Request("https", host, 443, "POST", path, binary="/usr/bin/client", headers=headers, body=body, **more)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("application/grpc", True), ("application/grpc+proto", True), ("application/grpc;a=b", True),
        ("APPLICATION/gRPC", True), (" application/grpc", True), ("application/grpc-web", True),
        ("application/json", False), ("x-application/grpc", False), ("", False),
    ],
)  # fmt: skip
def test_what_envoy_may_not_have_collected(kind: str, expected: bool) -> None:
    assert is_grpc({"content-type": kind}) is expected


def test_a_route_without_collected_bodies_is_for_grpc_alone() -> None:
    route = unread_route({"match": {"prefix": "/"}, "route": {"cluster": "a"}})
    assert route["match"]["headers"] == [
        {"name": ":method", "string_match": {"exact": "POST"}},
        {"name": "content-type", "string_match": {"prefix": "application/grpc"}},
    ]
    assert route["route"] == {"cluster": "a"}


@pytest.mark.control("RUN-01")
def test_a_call_of_class_auto_is_allowed_without_its_body(compiled: Matcher) -> None:
    assert compiled.decide(asked("grpc.example.com", "/demo.Greeter/Hello", GRPC, body_complete=False)).allowed
    refused = compiled.decide(asked("grpc.example.com", "/demo.Other/Hello", GRPC, body_complete=False))
    assert refused.reason == "method_or_path_not_allowed"


@pytest.mark.control("REV-01")
def test_a_call_that_would_wait_for_a_person_is_refused_with_a_way_on(compiled: Matcher) -> None:
    call = ("grpc.example.com", "/demo.Held/Hello")
    refused = compiled.decide(asked(*call, GRPC, body_complete=False))
    assert (refused.verdict, refused.reason, refused.action_class) == ("deny", "action_denied", "review")
    assert "cannot wait" in refused.detail
    assert "class auto" in refused.next_steps[0]
    assert compiled.decide(asked(*call, OTHER, b"{}")).reason == "review_required"


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(
    ("host", "path", "body"),
    [
        ("calls.example.com", "/graphql", b'{"query": "{a}"}'),
        ("calls.example.com", "/rpc", b'{"jsonrpc": "2.0", "id": 1, "method": "list"}'),
        ("calls.example.com", "/mcp", b'{"jsonrpc": "2.0", "id": 1, "method": "tools/list"}'),
        ("inference.local", "/v1/chat/completions", b'{"model": "demo-1"}'),
    ],
)
@pytest.mark.parametrize("seen", [None, b""])
def test_what_must_be_read_is_refused_unread(
    compiled: Matcher, host: str, path: str, body: bytes, seen: bytes | None
) -> None:
    allowed = compiled.decide(asked(host, path, OTHER, body))
    assert allowed.allowed, allowed
    refused = compiled.decide(asked(host, path, GRPC, seen, body_complete=False))
    assert (refused.verdict, bool(refused.reason)) == ("deny", True), refused


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize("seen", [None, b""])
def test_a_push_is_refused_unread(compiled: Matcher, seen: bytes | None) -> None:
    line = f"{'0' * 40} {'1' * 40} refs/heads/agent/x\0report-status".encode()
    body = f"{len(line) + 4:04x}".encode() + line + b"0000"
    headers = {"content-type": "application/x-git-receive-pack-request"}
    path = "/team/app.git/git-receive-pack"
    assert compiled.decide(asked("git.example.com", path, headers, body)).action_class == "staged"
    assert not compiled.decide(asked("git.example.com", path, GRPC, seen, body_complete=False)).allowed


@pytest.mark.parametrize(
    ("method", "headers", "expected"),
    [("POST", GRPC, True), ("post", GRPC, True), ("GET", GRPC, False), ("PUT", GRPC, False), ("POST", OTHER, False)],
)
def test_only_a_post_goes_on_while_its_client_sends(method: str, headers: dict[str, str], expected: bool) -> None:
    assert goes_unread(method, headers) is expected


def sends_unread(policy: str, governance: str) -> bool:
    bundle = load_members({"policy.yaml": policy.encode(), "governance.yaml": governance.encode()})
    return Matcher.compile(bundle.policy, bundle.governance).sends_unread


@pytest.mark.control("POL-05")
def test_a_policy_tells_whether_a_grpc_call_may_be_opened_at_all() -> None:
    rule = '  - {match: {host: grpc.example.com, method: [POST], path: "/demo.Greeter/*"}, class: auto}\n'
    assert rule in GOVERNANCE
    assert sends_unread(POLICY, GOVERNANCE)
    for other in (
        rule.replace("auto", "staged"),
        rule.replace(", method: [POST]", ""),
        rule.replace("grpc.example.com", '"*.example.com"'),
    ):
        assert sends_unread(POLICY, GOVERNANCE.replace(rule, other)), other
    for other in (
        "",
        rule.replace("class: auto", "class: review"),
        rule.replace("POST", "PUT"),
        rule.replace("grpc.", "calls."),
    ):
        assert not sends_unread(POLICY, GOVERNANCE.replace(rule, other)), other
    assert not sends_unread(POLICY.replace("allow: {method: POST", "allow: {method: GET"), GOVERNANCE)
