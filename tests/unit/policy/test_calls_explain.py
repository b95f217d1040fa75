"""``explain``, ``learn`` and test cases on calls that are named in the body."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saw.cli.main import main
from saw.policy.casefile import Call, as_request, load_cases
from saw.policy.errors import PolicyError
from saw.policy.explain import explain_call
from saw.policy.loader import Bundle, load_members
from saw.policy.matcher import Matcher
from saw.policy.reach_diff import diff_bundles
from saw.policy.remedies import apply_changes

pytestmark = pytest.mark.control("POL-01")

POLICY = """\
version: 1
network_policies:
  api:
    endpoints:
      - host: a.example.com
        port: 443
        path: /rules
        protocol: graphql
        rules: [{allow: {operation_type: query, fields: [viewer]}}]
        deny_rules: [{operation_type: "*", fields: [secret]}]
      - {host: a.example.com, port: 443, path: /access, protocol: graphql, access: read-only}
      - {host: a.example.com, port: 443, path: /rpc, protocol: json-rpc, rules: [{allow: {method: list}}]}
      - {host: a.example.com, port: 443, path: /mcp, protocol: mcp, rules: [{allow: {method: tools/call, tool: search}}]}
    binaries: [{path: /usr/bin/curl}]
"""
GOVERNANCE = "schema: 1\nblueprint: {name: x, version: 1.0.0, owner: team}\nactions: []\n"


def bundle() -> Bundle:
    return load_members({"policy.yaml": POLICY.encode(), "governance.yaml": GOVERNANCE.encode()})


def asked(path: str, value: Any) -> Call:
    return Call(url=f"https://a.example.com{path}", method="POST", binary="/usr/bin/curl", json=value)


def rpc(method: str, **params: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


@pytest.mark.parametrize(
    ("path", "value", "beside"),
    [
        ("/rules", {"query": "{viewer rate}"}, {"query": "{viewer other}"}),
        ("/rules", {"query": "mutation{add}"}, {"query": "mutation{drop}"}),
        ("/access", {"query": "mutation{add}"}, {"query": "mutation{drop}"}),
        ("/access", {"query": "subscription{add}"}, {"query": "subscription{drop}"}),
        ("/rpc", rpc("make"), rpc("drop")),
        ("/rpc", rpc("list"), rpc("drop")),
        ("/mcp", rpc("tools/call", name="search"), rpc("tools/call", name="drop")),
        ("/mcp", rpc("tools/call", name="note"), rpc("tools/call", name="drop")),
        ("/mcp", rpc("vendor/extra"), rpc("vendor/other")),
        ("/rpc", [rpc("make"), {**rpc("list"), "id": 2}], rpc("drop")),
    ],
)
def test_what_would_allow_it_allows_it_and_not_what_lies_beside(path: str, value: Any, beside: Any) -> None:
    found = explain_call(bundle(), as_request(asked(path, value)))
    assert not found.decision.allowed and found.rules and found.changes, found
    changed = load_members(apply_changes(bundle().members, found.changes))
    matcher = Matcher.compile(changed.policy, changed.governance)
    assert matcher.decide(as_request(asked(path, value))).allowed
    assert matcher.decide(as_request(asked(path, beside))).reason == "operation_not_allowed"
    assert diff_bundles(bundle(), changed).covers(as_request(asked(path, value)))


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("/rules", {"query": "{secret}"}, "a deny rule"),
        ("/rules", {"query": "{viewer"}, "cannot be read"),
        ("/rules", [], "a batch of 0"),
        ("/rpc", rpc("a*b"), "holds a *"),
    ],
)
def test_where_no_rule_could_it_says_why(path: str, value: Any, why: str) -> None:
    found = explain_call(bundle(), as_request(asked(path, value)))
    assert not found.changes and why in found.impossible


def test_the_command_takes_body_and_headers_and_shows_what_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "governance.yaml").write_text(GOVERNANCE)
    (tmp_path / "body.json").write_text(json.dumps({"query": "query Q{viewer}"}))
    command = ["policy", "explain", str(tmp_path), "POST", "https://a.example.com/rules", "--binary", "/usr/bin/curl"]
    assert main([*command, "--body-file", str(tmp_path / "body.json")]) == 0
    assert "asks for: query Q { viewer }" in capsys.readouterr().out
    assert main([*command, "--body-file", str(tmp_path / "body.json"), "--header", "Content-Type: text/plain"]) == 1
    assert "deny: body_unreadable" in capsys.readouterr().out
    assert main([*command, "--header", "no colon"]) == 1
    assert "is not a header" in capsys.readouterr().err
    stream = ["policy", "explain", str(tmp_path), "GET", "https://a.example.com/mcp", "--binary", "/usr/bin/curl"]
    assert main([*stream, "--header", "Accept: text/event-stream"]) == 0
    assert main([*stream, "--json"]) == 1


def test_a_case_has_one_body() -> None:
    good = b"schema: 1\ncases:\n  - {name: a, request: {url: 'https://a/', json: {query: '{a}'}}, expect: {verdict: deny}}\n"
    case = load_cases(good, "t.yaml").cases[0]
    assert case.request is not None
    request = as_request(case.request)
    assert (request.body, request.headers) == (b'{"query": "{a}"}', {"content-type": "application/json"})
    with pytest.raises(PolicyError, match="one of body, json and push"):
        load_cases(good.replace(b"json: {query: '{a}'}", b"json: {a: 1}, body: x"), "t.yaml")
