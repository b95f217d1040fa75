"""``saw policy explain`` names the rule that decided, and its snippet allows exactly the call it was made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saw.cli.main import main
from saw.policy.casefile import Call, Push, as_request
from saw.policy.explain import Explanation, explain_call, explain_tool
from saw.policy.loader import Bundle, load_bundle_folder, load_members
from saw.policy.matcher import Matcher
from saw.policy.mcp import decide_tool
from saw.policy.model import Request
from saw.policy.reach_diff import diff_bundles
from saw.policy.remedies import apply_changes
from saw.policy.yamltree import parse

pytestmark = pytest.mark.control("POL-01")

ROOT = Path(__file__).resolve().parents[3]
CODING = ROOT / "policies/coding"
CURL = "/usr/bin/curl"

POLICY = b"""\
version: 1
network_policies:
  api:
    endpoints:
      - host: api.example.com
        port: 443
        protocol: rest
        rules:
          - allow: {method: GET, path: "/v1/**"}
        deny_rules:
          - {method: GET, path: "/v1/secret/**"}
      - {host: "*.cdn.example.com", port: 443, protocol: rest, access: read-only}
      - {host: git.example.com, port: 443, protocol: rest, access: full}
      - {host: news.example.com, port: 443, protocol: websocket, access: read-only}
      - {host: chat.example.com, port: 443, protocol: websocket, access: read-write}
    binaries: [{path: /usr/bin/curl}]
"""
GOVERNANCE = b"""\
schema: 1
blueprint: {name: x, version: 1.0.0, owner: team}
actions:
  - match: {host: git.example.com, git: {service: receive-pack, ref: "refs/heads/agent/**"}}
    class: staged
  - match: {host: git.example.com, method: [DELETE]}
    class: deny
inference:
  routes:
    - {alias: i.local, models: [small], upstream: "https://m.example.com/v1"}
    - {alias: j.local, models: [small], upstream: "https://m.example.com/v1", budget: spend}
    - alias: k.local
      models: [small, large]
      upstream: "https://m.example.com/v1"
      budget: spend
      prices: [{models: [small], input: "1", output: "2"}]
budgets:
  - {id: spend, scope: workspace, period: day, limit: {currency: USD, amount: "5"}}
mcp:
  servers:
    files:
      transport: stdio
      command: [/usr/bin/files]
      tools:
        read:
          class: auto
          args: {path: {under: /work, required: true}, mode: {enum: [text]}}
        drop: {class: deny, args: {path: {under: /work}}}
        ask: {class: review}
"""


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_members({"policy.yaml": POLICY, "governance.yaml": GOVERNANCE})


def applied(bundle: Bundle, found: Explanation) -> Bundle:
    return load_members(apply_changes(bundle.members, found.changes))


def allows(bundle: Bundle, request: Request) -> bool:
    return Matcher.compile(bundle.policy, bundle.governance).decide(request).allowed


def call(method: str, url: str, binary: str | None = CURL, **more: Any) -> Request:
    return as_request(Call(url=url, method=method, binary=binary, **more))


@pytest.mark.parametrize(
    ("request_", "reason", "places", "operations"),
    [
        (call("GET", "https://new.example.org/a?b=c"), "host_not_allowed", [], ["add"]),
        (call("GET", "http://new.example.org/a"), "host_not_allowed", [], ["add", "append"]),
        (call("PUT", "https://new.example.org/a"), "host_not_allowed", [], ["add", "first"]),
        (call("GET", "wss://new.example.org/a"), "host_not_allowed", [], ["add"]),
        (call("GET", "wss://new.example.org/a?b=c", message="text"), "host_not_allowed", [], ["add", "first"]),
        (call("GET", "wss://new.example.org/a", message="binary"), "host_not_allowed", [], ["add", "first"]),
        (call("GET", "wss://api.example.com/v1/a"), "method_or_path_not_allowed", [(5, "endpoints[0]")], ["add"]),
        (
            call("GET", "wss://news.example.com/a", message="text"),
            "method_or_path_not_allowed",
            [(14, "endpoints[3].access")],
            ["add", "first"],
        ),
        (
            call("GET", "wss://chat.example.com/a"),
            "action_denied",
            [(15, "endpoints[4].access")],
            ["first"],
        ),
        (call("GET", "https://api.example.com/v2"), "method_or_path_not_allowed", [(5, "endpoints[0]")], ["add"]),
        (
            call("GET", "https://api.example.com/v1/a", "/usr/bin/wget"),
            "binary_not_allowed",
            [(5, "endpoints[0]")],
            ["add"],
        ),
        (
            call("GET", "https://api.example.com/v1/secret/a"),
            "deny_rule",
            [(11, "endpoints[0].deny_rules[0]")],
            ["add"],
        ),
        (
            call("POST", "https://a.cdn.example.com/x"),
            "method_or_path_not_allowed",
            [(12, "endpoints[1]")],
            ["add", "first"],
        ),
        (call("POST", "https://git.example.com/x"), "review_required", [(13, "endpoints[2].access")], ["first"]),
        (
            call("DELETE", "https://git.example.com/x"),
            "action_denied",
            [(13, "endpoints[2].access"), (6, "actions[1]")],
            ["first"],
        ),
    ],
)
def test_a_refused_call_is_explained_and_its_snippet_allows_it(
    bundle: Bundle, request_: Request, reason: str, places: list[tuple[int, str]], operations: list[str]
) -> None:
    found = explain_call(bundle, request_)
    assert (found.decision.reason, found.impossible) == (reason, "")
    assert [(place.line, place.field.removeprefix("network_policies.api.")) for place in found.rules] == places
    assert [change.operation for change in found.changes] == operations
    assert not allows(bundle, request_)
    assert allows(applied(bundle, found), request_)


def test_an_allowed_call_needs_nothing(bundle: Bundle) -> None:
    found = explain_call(bundle, call("GET", "https://api.example.com/v1/a"))
    assert found.decision.allowed
    assert (found.changes, found.impossible) == ((), "")
    assert [place.field for place in found.rules] == ["network_policies.api.endpoints[0].rules[0]"]


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (call("GET", "http://169.254.169.254/latest"), "blocked whatever a policy says"),
        (call("GET", "https://api.example.com/v1/..%2fx"), "two parsers"),
        (call("TRACE", "https://api.example.com/v1/x"), "never allowed"),
        (call("GET", "http://api.example.com:443/v1/x"), "is not what"),
        (call("GET", "https://new.example.org/x", None), "say which with --binary"),
        (call("GET", "https://new.example.org/a*b"), "holds a *"),
        (call("GET", "https://new.example.org/a?b=*"), "holds a *"),
        (call("GET", "https://new.example.org/a?b=1;c"), "more than one way"),
        (call("GET", "https://a..example.com/x"), "cannot stand in this bundle"),
        (call("GET", "https://new.example.org/x?a="), "cannot be written as a rule"),
        (call("DELETE", "https://i.local/v1/models", None), "takes no other calls"),
        (call("POST", "https://i.local/v1/chat/completions", None, body="{}"), "does not name one model"),
        (call("POST", "https://git.example.com/a/git-receive-pack", body="nonsense"), "cannot be read"),
        (call("GET", "https://new.example.org/a", headers={"X-HTTP-Method-Override": "PUT"}), "no rule allows"),
    ],
)
def test_where_no_snippet_may_be_the_reason_is_said(bundle: Bundle, request_: Request, why: str) -> None:
    found = explain_call(bundle, request_)
    assert not found.decision.allowed
    assert found.changes == ()
    assert why in found.impossible


def test_a_push_names_only_the_refs_that_waited(bundle: Bundle) -> None:
    pushed = (Push(ref="refs/heads/agent/a"), Push(ref="refs/heads/main"), Push(ref="refs/tags/v1", operation="create"))
    request = call("POST", "https://git.example.com/app.git/git-receive-pack", push=pushed)
    found = explain_call(bundle, request)
    assert [change.value["match"]["git"]["ref"] for change in found.changes] == ["refs/heads/main", "refs/tags/v1"]
    changed = applied(bundle, found)
    assert allows(changed, request)
    other = call("POST", "https://git.example.com/app.git/git-receive-pack", push=(Push(ref="refs/heads/other"),))
    deletion = (Push(ref="refs/heads/main", operation="delete"),)
    assert not allows(changed, other)
    assert not allows(changed, call("POST", "https://git.example.com/app.git/git-receive-pack", push=deletion))
    assert not allows(changed, call("POST", "https://git.example.com/b.git/git-receive-pack", push=pushed))


def test_a_model_and_a_budget(bundle: Bundle) -> None:
    def chat(alias: str, model: str) -> Request:
        return call("POST", f"https://{alias}/v1/chat/completions", None, body=json.dumps({"model": model}))

    found = explain_call(bundle, chat("i.local", "large"))
    assert [(place.line, place.field) for place in found.rules] == [(10, "inference.routes[0].models")]
    changed = applied(bundle, found)
    assert [allows(changed, chat("i.local", name)) for name in ("large", "small", "huge")] == [True, True, False]
    found = explain_call(bundle, chat("j.local", "small"))
    assert [(place.line, place.field) for place in found.rules] == [(11, "inference.routes[1].budget")]
    assert allows(applied(bundle, found), chat("j.local", "small"))
    assert "nothing would limit" in " ".join(found.notes)
    assert allows(bundle, chat("k.local", "small"))
    found = explain_call(bundle, chat("k.local", "large"))
    assert [(place.line, place.field) for place in found.rules] == [(16, "inference.routes[2].prices")]
    assert "only the owner knows" in found.impossible


@pytest.mark.parametrize(
    ("tool", "arguments", "reason", "field"),
    [
        ("new", {"a": "x", "n": 3, "f": 0.5, "b": True, "l": ["p", "q"]}, "tool_not_allowed", ""),
        ("new", {}, "tool_not_allowed", ""),
        ("drop", {"path": "/work/a"}, "tool_not_allowed", ".tools.drop"),
        ("ask", {}, "review_required", ".tools.ask"),
        ("read", {"path": "/work/a", "mode": "raw"}, "argument_not_allowed", ".tools.read.args.mode"),
        ("read", {"path": "/work/a", "tail": 5}, "argument_not_allowed", ".tools.read"),
    ],
)
def test_a_tool_call_is_explained_and_its_snippet_allows_it_alone(
    bundle: Bundle, tool: str, arguments: dict[str, Any], reason: str, field: str
) -> None:
    found = explain_tool(bundle, "files", tool, arguments)
    assert (found.decision.reason, found.impossible) == (reason, "")
    assert [place.field for place in found.rules] == [f"mcp.servers.files{field}"]
    changed = applied(bundle, found).governance
    assert decide_tool(changed, "files", tool, arguments).allowed
    for name, value in arguments.items():
        if name != "path":
            other = {
                **arguments,
                name: value + "x" if isinstance(value, str) else ["z"] if isinstance(value, list) else 99,
            }
            assert not decide_tool(changed, "files", tool, other).allowed


@pytest.mark.parametrize(
    ("server", "tool", "arguments", "why"),
    [
        ("none", "x", {}, "how to start it is not known"),
        ("files", "new", {"a": {"b": 1}}, "no rule can name the value"),
        ("files", "new", {"a": None}, "no rule can name the value"),
        ("files", "read", {"path": "/etc/x"}, "widen it by hand"),
        ("files", "read", {}, "the call lacks path"),
        ("files", "bad name", {}, "no tool name"),
    ],
)
def test_a_tool_call_that_no_snippet_may_allow(
    bundle: Bundle, server: str, tool: str, arguments: dict[str, Any], why: str
) -> None:
    found = explain_tool(bundle, server, tool, arguments)
    assert found.changes == ()
    assert why in found.impossible


_SEGMENTS = st.lists(st.sampled_from(["v1", "secret", "a", "b%2Dc", "git-upload-pack"]), max_size=3)
_CALLS = st.builds(
    lambda method, host, segments, query, binary: call(method, f"https://{host}/{'/'.join(segments)}{query}", binary),
    st.sampled_from(["GET", "HEAD", "POST", "DELETE", "PATCH"]),
    st.sampled_from(
        ["api.example.com", "a.cdn.example.com", "git.example.com", "new.example.org", "new.example.org:8443"]
    ),
    _SEGMENTS,
    st.sampled_from(["", "?a=1", "?a=1&a=2&b=x"]),
    st.sampled_from([CURL, "/usr/bin/wget"]),
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(_CALLS)
def test_a_snippet_gains_that_call_and_nothing_beside_it(bundle: Bundle, request_: Request) -> None:
    found = explain_call(bundle, request_)
    if found.decision.allowed:
        return
    assert found.impossible == ""
    changed = applied(bundle, found)
    assert allows(changed, request_)
    diff = diff_bundles(bundle, changed)
    assert diff.widening
    assert diff.covers(request_)
    path = found.decision.canonical_path.partition("?")[0]
    methods = {request_.method, "HEAD"} if request_.method == "GET" else {request_.method}
    for item in diff.gained:
        assert (item.subject, item.exact) == ("call", True)
        assert item.witness is not None
        assert item.witness.call is not None
        seen = as_request(item.witness.call)
        assert (seen.host, seen.port) == (request_.host, request_.port)
        if item.kind == "addresses":
            assert "may resolve to private addresses" in " ".join(found.notes)
            continue
        assert seen.path.partition("?")[0] == path
        assert set(item.region.methods) <= methods
    if found.decision.reason == "host_not_allowed":
        assert diff.lost == ()


def test_the_command_takes_folders_and_signed_bundles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["https://git.example.com/team/app.git", "--push", "refs/heads/main", "--binary", "/usr/bin/git"]
    assert main(["policy", "explain", str(CODING), *asked]) == 1
    out = capsys.readouterr().out
    line = next(
        n for n, text in enumerate((CODING / "governance.yaml").read_text().splitlines(), 1) if "receive-pack}}" in text
    )
    assert f"decided at: {CODING}/governance.yaml:{line}:5 actions[1]" in out
    assert "# governance.yaml: put first under actions" in out
    assert "class: staged" in out
    main(["policy", "keys", "create", "--dir", str(tmp_path), "--name", "ada"])
    signed = str(tmp_path / "coding.bundle.json")
    options = ["--key", str(tmp_path / "ada.key"), "--revision", "1", "--valid-for", "1d", "--out", signed]
    assert main(["policy", "sign", str(CODING), *options]) == 0
    capsys.readouterr()
    assert main(["policy", "explain", signed, *asked, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["rules"][-1]["line"] == line
    assert answer["changes"][0]["operation"] == "first"
    tree, problems = parse(answer["changes"][0]["yaml"].encode(), "snippet")
    assert problems == []
    assert list(tree.pairs) == ["actions"]


def test_the_command_takes_models_and_tools(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "explain", str(CODING), "https://inference.local", "--model", "demo-small"]) == 0
    assert main(["policy", "explain", str(CODING), "https://inference.local", "--model", "other"]) == 1
    assert "append to inference.routes[0].models" in capsys.readouterr().out
    arguments = json.dumps({"path": "/home/agent/project/README.md"})
    assert main(["policy", "explain", str(CODING), "--tool", "read_text_file", "--args", arguments]) == 0
    assert main(["policy", "explain", str(CODING), "--tool", "remove", "--args", "{}", "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["changes"][0]["at"][-1] == "remove"
    assert main(["policy", "explain", str(CODING), "GET", "http://169.254.169.254/"]) == 1
    assert "no rule would allow it: the destination is blocked" in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked",
    [[], ["GET"], ["GET", "nowhere"], ["https://g.example.com", "--push", "a:burn"], ["--tool", "x", "--args", "[]"]],
)
def test_a_question_that_is_none(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "explain", str(CODING), *asked]) == 1
    assert capsys.readouterr().err
    load_bundle_folder(CODING)
