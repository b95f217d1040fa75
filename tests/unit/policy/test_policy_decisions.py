"""Decisions on calls: the vectors, pushes, inference, tools, and what the matcher tells the rings."""

from __future__ import annotations

import contextlib
import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw.policy.casefile import Push, load_cases, push_body, run_case
from saw.policy.gitproto import PushUnreadable, push_updates
from saw.policy.inference import price_of
from saw.policy.loader import Bundle, load_bundle_folder, load_members
from saw.policy.matcher import Matcher
from saw.policy.mcp import decide_tool
from saw.policy.model import Decision, Request

ROOT = Path(__file__).parents[3]
VECTORS = sorted((ROOT / "tests" / "conformance" / "vectors").glob("*.yaml"))
GIT = {"binary": "/usr/lib/git-core/git-remote-http"}


def every_case() -> list[object]:
    found = []
    for path in [*VECTORS, ROOT / "policies" / "coding" / "tests.yaml"]:
        file = load_cases(path.read_bytes(), path.name)
        if file.policy is None or file.governance is None:
            bundle = load_bundle_folder(path.parent)
        else:
            bundle = load_members({"policy.yaml": file.policy.encode(), "governance.yaml": file.governance.encode()})
        matcher = Matcher.compile(bundle.policy, bundle.governance)
        found += [pytest.param(case, matcher, bundle, id=f"{path.stem}: {case.name}") for case in file.cases]
    return found


@pytest.mark.control("RUN-01")
@pytest.mark.control("NET-01")
@pytest.mark.parametrize(("case", "matcher", "bundle"), every_case())
def test_case(case, matcher: Matcher, bundle: Bundle) -> None:
    assert run_case(case, matcher, bundle.governance).fault == ""


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_vectors_refuse_for_a_reason_and_allow_beside_it(path: Path) -> None:
    cases = load_cases(path.read_bytes(), path.name).cases
    assert [case.name for case in cases if case.expect.verdict == "deny" and case.expect.reason is None] == []
    assert len({case.name for case in cases}) == len(cases)
    verdicts = [case.expect.verdict for case in cases]
    assert {"allow", "deny"} == set(verdicts)


def push(matcher: Matcher, body: bytes | None, **more: object) -> Decision:
    return matcher.decide(
        Request("https", "git.example.com", 443, "POST", "/team/app.git/git-receive-pack", body=body, **GIT, **more)
    )


AGENT = Push(ref="refs/heads/agent/x", operation="create")
MAIN = Push(ref="refs/heads/main")


@pytest.mark.control("RUN-01")
def test_push_bodies(matcher: Matcher) -> None:
    good = push_body((AGENT,))
    assert push(matcher, good).action_class == "staged"
    assert push(matcher, good, body_complete=False).allowed
    assert push(matcher, gzip.compress(good), headers={"content-encoding": "gzip"}).action_class == "staged"
    assert push(matcher, b"0000").allowed
    assert push(matcher, push_body((AGENT, MAIN))).reason == "review_required"
    gzipped = gzip.compress(push_body((MAIN,)))
    assert push(matcher, gzipped, headers={"content-encoding": "gzip"}).reason == "review_required"
    for body, more in (
        (None, {}),
        (b"", {}),
        (b"0000", {"body_complete": False}),
        (b"0000" + good, {}),
        (good[:60], {"body_complete": False}),
        (good[:-8], {"body_complete": False}),
        (good, {"headers": {"content-encoding": "br"}}),
        (good, {"headers": {"content-encoding": "gzip"}}),
        (gzipped, {}),
        (b"0011push-cert\0caps" + b"0000", {}),
        (push_body((AGENT, AGENT)), {}),
        (b"zzzz", {}),
    ):
        decision = push(matcher, body, **more)
        assert (decision.verdict, decision.reason, decision.credential) == ("deny", "action_denied", None), body


@pytest.mark.parametrize(
    "ref", ["refs/heads/agent/../main", "main", "refs/heads/a b", "refs/heads/x.lock", "refs/heads/agent/\x7f", "HEAD"]
)
def test_refs_that_git_would_refuse(matcher: Matcher, ref: str) -> None:
    assert push(matcher, push_body((Push(ref=ref),))).reason == "action_denied"


@given(st.binary(max_size=300), st.booleans(), st.sampled_from(["", "gzip"]))
@settings(max_examples=examples(300), deadline=None)
def test_no_push_crashes_the_parser(body: bytes, complete: bool, encoding: str) -> None:
    for data in (body, push_body((AGENT,))[: len(body)] + body):
        with contextlib.suppress(PushUnreadable):
            push_updates(data, complete=complete, encoding=encoding)


def model(matcher: Matcher, body: bytes | None, **more: object) -> Decision:
    return matcher.decide(Request("https", "inference.local", 443, "POST", "/v1/chat/completions", body=body, **more))


@pytest.mark.control("INF-01")
def test_models(matcher: Matcher) -> None:
    good = b'{"model": "demo-1", "messages": [{"role": "user"}]}'
    allowed = model(matcher, good)
    assert (allowed.verdict, allowed.inference, allowed.credential) == ("allow", "inference.local", "model-key")
    for body in (
        None,
        b"",
        b"[]",
        b'{"messages": []}',
        b'{"model": 1}',
        b'{"model": "other"}',
        b'{"model": "demo-1", "model": "other"}',
        b'{"model": "demo-1", "Model": "other"}',
        b'{"model": "demo-1", "x": NaN}',
        b'{"model": "demo-1", "x": {"a": 1, "a": 2}}',
        b'\xef\xbb\xbf{"model": "demo-1"}',
        '{"model": "demo-1"}'.encode("utf-16"),
        b"[" * 100_000,
    ):
        assert model(matcher, body).reason == "model_not_allowed", body
    assert model(matcher, good, body_complete=False).reason == "model_not_allowed"
    assert model(matcher, good, headers={"content-encoding": "gzip"}).reason == "model_not_allowed"


@pytest.mark.control("RUN-05")
@pytest.mark.parametrize(
    ("tool", "arguments", "reason"),
    [
        ("read_text_file", {"path": "/home/agent/project/a.py"}, ""),
        ("read_text_file", {"path": "/home/agent/project"}, ""),
        ("read_text_file", {"path": "/home/agent/project/a.py", "head": 10}, ""),
        ("read_text_file", {"path": "/home/agent/project/a.py", "head": 0}, "argument_not_allowed"),
        ("read_text_file", {"path": "/home/agent/project/a.py", "head": True}, "argument_not_allowed"),
        ("read_text_file", {"path": "/home/agent/project/a.py", "head": "1"}, "argument_not_allowed"),
        ("read_text_file", {"path": "/home/agent/project2/a.py"}, "argument_not_allowed"),
        ("read_text_file", {"path": "/home/agent/project/../x"}, "argument_not_allowed"),
        ("read_text_file", {"path": "a.py"}, "argument_not_allowed"),
        ("read_text_file", {"path": "~/project/a.py"}, "argument_not_allowed"),
        ("read_text_file", {"path": "/home/agent/project/a\x00b"}, "argument_not_allowed"),
        ("read_text_file", {"path": ["/home/agent/project/a"]}, "argument_not_allowed"),
        ("read_text_file", {"path": None}, "argument_not_allowed"),
        ("read_text_file", {}, "argument_not_allowed"),
        ("read_text_file", {"path": "/home/agent/project/a", "mode": "x"}, "argument_not_allowed"),
        ("write_file", {"path": "/home/agent/project/src/a", "content": "x"}, ""),
        ("write_file", {"path": "/home/agent/project/a", "content": "x"}, "argument_not_allowed"),
        ("write_file", {"path": "/home/agent/project/src/a", "content": "x" * 2_000_000}, "argument_not_allowed"),
        ("move_file", {}, "tool_not_allowed"),
        ("READ_TEXT_FILE", {"path": "/home/agent/project/a.py"}, "tool_not_allowed"),
    ],
)
def test_tools(coding: Bundle, tool: str, arguments: dict[str, object], reason: str) -> None:
    assert decide_tool(coding.governance, "files", tool, arguments).reason == reason


@pytest.mark.control("RUN-05")
def test_argument_rules() -> None:
    text = """\
schema: 1
blueprint: {name: x, version: 1.0.0, owner: team}
mcp:
  servers:
    s:
      transport: stdio
      command: [x]
      tools:
        t:
          class: auto
          args:
            id: {regex: "[A-Z]+-[0-9]{1,5}"}
            kind: {enum: [a, b]}
            many: {type: array, max_length: 2, items: {under: /srv/tree}}
            share: {type: number, min: 0, max: 1}
        held: {class: review}
        no: {class: deny}
"""
    bundle = load_members({"policy.yaml": b"version: 1", "governance.yaml": text.encode()})

    def reason(tool: str, **arguments: object) -> str:
        return decide_tool(bundle.governance, "s", tool, arguments).reason

    assert reason("t", id="AB-12", kind="a", many=["/srv/tree/x", "/srv/tree"], share=0.5) == ""
    for arguments in (
        {"id": "AB-12x"},
        {"id": "ab-12"},
        {"kind": "c"},
        {"many": ["/srv/tree/x", "/etc"]},
        {"many": ["/srv/tree"] * 3},
        {"share": 1.5},
        {"share": float("nan")},
    ):
        assert reason("t", **arguments) == "argument_not_allowed", arguments
    assert reason("held") == "review_required"
    assert reason("no") == "tool_not_allowed"
    assert decide_tool(bundle.governance, "other", "t", {}).reason == "tool_not_allowed"


@pytest.mark.control("RUN-01")
def test_what_a_denied_agent_is_told(matcher: Matcher) -> None:
    decision = matcher.decide(Request("https", "example.org", 443, "get", "/a?b", binary="/usr/bin/curl"))
    assert decision.rule_missing == {
        "host": "example.org",
        "port": 443,
        "method": "GET",
        "path": "/a",
        "binary": "/usr/bin/curl",
    }
    assert decision.next_steps


@pytest.mark.control("NET-01")
@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "track", "GET\r\nX: y", "", "G E T"])
def test_methods_that_never_pass(matcher: Matcher, method: str) -> None:
    request = Request("https", "api.example.com", 443, method, "/v1/x", binary="/usr/bin/curl")
    assert not matcher.decide(request).allowed


@pytest.mark.control("NET-01")
def test_override_headers_do_not_pass(matcher: Matcher) -> None:
    def decide(headers: dict[str, str]) -> Decision:
        return matcher.decide(
            Request("https", "api.example.com", 443, "GET", "/v1/x", binary="/usr/bin/curl", headers=headers)
        )

    assert decide({"accept": "*/*"}).allowed
    for name in ("x-http-method-override", "x-original-url", "x-rewrite-url"):
        assert not decide({name: "DELETE"}).allowed


@pytest.mark.control("NET-01")
def test_scheme_and_port_must_fit(matcher: Matcher) -> None:
    def decide(scheme: str, port: int) -> bool:
        return matcher.decide(Request(scheme, "api.example.com", port, "GET", "/v1/x", binary="/usr/bin/curl")).allowed

    assert decide("https", 443)
    assert not decide("http", 443) and not decide("https", 8443) and not decide("http", 80)


def test_an_ancestor_counts_as_the_caller(matcher: Matcher) -> None:
    def decide(binary: str | None, *ancestors: str) -> str:
        request = Request("https", "api.example.com", 443, "GET", "/v1/x", binary=binary, ancestors=ancestors)
        return matcher.decide(request).reason

    assert decide("/usr/bin/sh", "/usr/bin/curl") == ""
    assert decide("/usr/bin/sh", "/usr/bin/bash") == "binary_not_allowed"
    assert decide(None) == "binary_not_allowed"
    assert decide("/usr/bin/../bin/curl") == "binary_not_allowed"


def test_what_the_rings_ask_the_matcher(matcher: Matcher) -> None:
    assert [(e.host, e.port, e.tls) for e in matcher.endpoints()] == [
        ("api.example.com", 443, True),
        ("git.example.com", 443, True),
        ("inference.local", 443, True),
    ]
    assert matcher.host_declared_exactly("API.example.com")
    assert matcher.host_declared_exactly("models.example.com")
    assert not matcher.host_declared_exactly("other.example.com")
    assert matcher.allowed_ips("api.example.com", 443) == ()


REQUESTS = st.builds(
    Request,
    scheme=st.sampled_from(["https", "http", ""]),
    host=st.sampled_from(["api.example.com", "git.example.com", "inference.local", "127.0.0.1", ""])
    | st.text(max_size=20),
    port=st.sampled_from([443, 80, 0, -1]),
    method=st.sampled_from(["GET", "POST", "get", ""]) | st.text(max_size=8),
    path=st.sampled_from(["/v1/x", "/v1/admin/x", "/team/a/git-receive-pack"]) | st.text(max_size=30),
    binary=st.sampled_from(["/usr/bin/curl", "/usr/bin/git"]),
    body=st.none() | st.binary(max_size=60),
)


@given(request=REQUESTS)
@settings(max_examples=examples(400), deadline=None)
def test_no_request_crashes_the_matcher(matcher: Matcher, request: Request) -> None:
    decision = matcher.decide(request)
    assert decision.verdict in {"allow", "deny"}
    assert decision.allowed == (not decision.reason)
    if decision.allowed:
        assert request.scheme == "https" and (request.host.lower(), 443) in {
            (e.host, e.port) for e in matcher.endpoints()
        }
    else:
        assert decision.credential is None


@pytest.mark.control("INF-01")
def test_a_route_whose_budget_nobody_counts_is_shut() -> None:
    def decide(budgets: str, budget: str) -> Decision:
        governance = (
            "schema: 1\nblueprint: {name: x, version: 1.0.0, owner: team}\n"
            f"inference: {{routes: [{{alias: i.local, models: ['*'], upstream: 'https://m.example.com/v1'{budget}}}]}}\n"
            f"{budgets}"
        )
        bundle = load_members({"policy.yaml": b"version: 1\n", "governance.yaml": governance.encode()})
        body = b'{"model": "m"}'
        request = Request("https", "i.local", 443, "POST", "/v1/chat/completions", body=body)
        return Matcher.compile(bundle.policy, bundle.governance).decide(request)

    limit = "budgets: [{id: b, scope: workspace, period: day, limit: {currency: USD, amount: '20.00'}}]\n"
    asks = limit.replace("period: day,", "period: day, on_exhaust: review,")
    told = limit.replace("period: day,", "period: day, on_exhaust: report,")
    prices = ", budget: b, prices: [{models: [m], input: '1', output: '2'}]"
    assert decide("", "").allowed
    refused = decide(limit, ", budget: b")
    assert (refused.verdict, refused.reason, refused.credential) == ("deny", "budget_unenforced", None)
    assert "calls are not metered" in refused.detail
    assert decide(asks, ", budget: b").reason == "budget_unenforced"
    # What is counted at the perimeter passes here: what was spent is not this decision's.
    assert decide(limit, prices).allowed
    assert decide(told, prices).allowed
    assert decide(asks, prices).allowed


@pytest.mark.control("INF-01")
def test_a_model_without_a_price_is_refused_by_name_where_a_budget_pays() -> None:
    governance = """
schema: 1
blueprint: {name: x, version: 1.0.0, owner: team}
inference:
  routes:
    - alias: i.local
      models: ["*"]
      upstream: "https://m.example.com/v1"
      budget: b
      prices: [{models: [small-free], input: "0", output: "0"}, {models: ["small-*"], input: "1", output: "2"}]
budgets: [{id: b, scope: workspace, period: day, limit: {currency: USD, amount: "20.00"}}]
"""
    bundle = load_members({"policy.yaml": b"version: 1\n", "governance.yaml": governance.encode()})
    matcher = Matcher.compile(bundle.policy, bundle.governance)

    def decide(method: str, path: str, body: bytes) -> Decision:
        return matcher.decide(Request("https", "i.local", 443, method, path, body=body))

    assert decide("POST", "/v1/messages", b'{"model": "small-1"}').allowed
    assert decide("GET", "/v1/models", b"").allowed
    refused = decide("POST", "/v1/messages", b'{"model": "large-1"}')
    assert (refused.verdict, refused.reason) == ("deny", "price_unknown")
    assert "'large-1' has no price" in refused.detail
    route = bundle.governance.route("i.local", 443)
    assert [getattr(price_of(route, name), "input", None) for name in ("small-free", "small-x", "x")] == [
        "0",
        "1",
        None,
    ]
