"""Tools and arguments of MCP servers over HTTP: what a bundle may say of them, what a refusal tells, and who decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saw.cli.main import main
from saw.policy.actions import ReviewAsked
from saw.policy.casefile import Call, as_request
from saw.policy.errors import PolicyError
from saw.policy.explain import explain_call
from saw.policy.loader import Bundle, load_members
from saw.policy.matcher import Matcher
from saw.policy.model import Decision, Request
from saw.policy.openshell import export
from saw.policy.reach_diff import diff_bundles
from saw.policy.remedies import apply_changes
from saw.policy.tool_rules import Reviewers

pytestmark = [pytest.mark.control("RUN-05"), pytest.mark.control("POL-04")]

ENDPOINT = "{host: mcp.example.com, port: 443, path: /mcp, protocol: mcp, mcp: {allow_all_known_mcp_methods: true}}"
TOOLS = """\
          read: {class: auto, args: {path: {under: /srv/docs, required: true}, lines: {type: integer, min: 1, max: 9}}}
          publish: {class: review, args: {path: {under: /srv/docs}}}
          close: {class: auto, args: {state: {enum: [done, dropped]}}}
          erase: {class: deny}
"""
SERVER = f"""\
mcp:
  servers:
    docs:
      transport: http
      url: https://mcp.example.com/mcp
      tools:
{TOOLS}"""
GOVERNANCE = "schema: 1\nblueprint: {name: b, version: 1.0.0, owner: team}\n"


def bundle(governance: str = SERVER, *endpoints: str) -> Bundle:
    policy = "version: 1\nnetwork_policies:\n  docs:\n    binaries: [{path: /usr/bin/node}]\n    endpoints:\n"
    policy += "".join(f"      - {endpoint}\n" for endpoint in endpoints or (ENDPOINT,))
    return load_members({"policy.yaml": policy.encode(), "governance.yaml": (GOVERNANCE + governance).encode()})


def request(tool: str, **arguments: Any) -> Request:
    params = {"name": tool, "arguments": arguments}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    call = Call(url="https://mcp.example.com/mcp", method="POST", binary="/usr/bin/node", json=body)
    return as_request(call)


def decide(found: Bundle, tool: str, **arguments: Any) -> Decision:
    return Matcher.compile(found.policy, found.governance).decide(request(tool, **arguments))


OTHER = ENDPOINT.replace("/mcp,", "/other,")
DISAGREE = [
    (SERVER, (ENDPOINT, ENDPOINT.replace("path: /mcp, ", "")), "leads around the tools of the MCP server docs"),
    (SERVER, (ENDPOINT, ENDPOINT.replace("/mcp,", '"/mcp/**",')), "leads around the tools of the MCP server docs"),
    (SERVER, (ENDPOINT, OTHER), "leads around the tools of the MCP server docs"),
    (SERVER, (ENDPOINT, OTHER.replace("mcp.example.com", '"*.example.com"')), "leads around the tools"),
    (SERVER, (ENDPOINT, OTHER.replace("mcp.example.com", "MCP.Example.com")), "leads around the tools"),
    (SERVER, (ENDPOINT, OTHER.replace("port: 443", "ports: [80, 443]")), "leads around the tools"),
    (SERVER, (OTHER.replace("mcp.example.com", "x.example.com"),), "no endpoint with protocol mcp has exactly host"),
    (SERVER, (ENDPOINT.replace("443", "444"),), "no endpoint with protocol mcp has exactly host"),
    (SERVER, ("{host: mcp.example.com, port: 443, path: /mcp, protocol: rest, access: full}",), "no endpoint with"),
    ("plaintext: ['mcp.example.com:443']\n" + SERVER, (ENDPOINT,), "and the url says https"),
    (SERVER.replace("https:", "http:").replace(".com/", ".com:443/"), (ENDPOINT,), "and the url says http"),
    ("allow_audit: true\n" + SERVER, (ENDPOINT.replace("protocol", "enforcement: audit, protocol"),), "under audit"),
    (
        SERVER + "    more: {transport: http, url: 'https://MCP.example.com/mcp'}\n",
        (ENDPOINT,),
        "the server docs is called there too",
    ),
]


@pytest.mark.parametrize(("governance", "endpoints", "reason"), DISAGREE, ids=range(len(DISAGREE)))
def test_a_bundle_whose_endpoints_lead_around_the_tools_does_not_load(
    governance: str, endpoints: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        bundle(governance, *endpoints)
    assert reason in str(caught.value)


AGREE = [
    (SERVER, (ENDPOINT.replace("mcp.example.com", '"*.example.com"'),)),
    (SERVER, (ENDPOINT, OTHER.replace("mcp.example.com", "x.example.com"))),
    (SERVER, (ENDPOINT.replace("mcp.example.com", "MCP.Example.com"),)),
    (SERVER, (ENDPOINT, OTHER.replace("port: 443", "ports: [80, 444]"))),
    (SERVER, (ENDPOINT, "{host: mcp.example.com, port: 443, path: /v1, protocol: rest, access: read-only}")),
    (SERVER + "    more: {transport: http, url: 'https://mcp.example.com/other'}\n", (ENDPOINT, OTHER)),
    (
        "plaintext: ['mcp.example.com:443']\n" + SERVER.replace("https:", "http:").replace(".com/", ".com:443/"),
        (ENDPOINT,),
    ),
    ("", (ENDPOINT, OTHER)),
]


@pytest.mark.parametrize(("governance", "endpoints"), AGREE, ids=range(len(AGREE)))
def test_its_twin_loads(governance: str, endpoints: tuple[str, ...]) -> None:
    assert bundle(governance, *endpoints).governance.blueprint.owner == "team"


def test_a_refusal_names_tool_and_argument_and_what_would_pass_but_no_value() -> None:
    found = bundle()
    assert decide(found, "read", path="/srv/docs/a", lines=9).allowed
    outside = decide(found, "read", path="/srv/secret-value")
    assert (outside.reason, outside.protocol, outside.policy) == ("argument_not_allowed", "mcp", "docs")
    assert outside.detail == "read of docs: the argument 'path' is not under /srv/docs"
    assert outside.next_steps == ("send path as a value of type string, an absolute path at or below /srv/docs",)
    missing = outside.rule_missing or {}
    assert (missing["server"], missing["tool"], missing["argument"]) == ("docs", "read", "path")
    assert "secret-value" not in str(outside)
    absent = decide(found, "read")
    assert "the argument 'path' is missing" in absent.detail and "at or below /srv/docs" in absent.next_steps[0]
    unlisted = decide(found, "read", path="/srv/docs", mode="x")
    assert unlisted.next_steps == ("leave it out; arguments that may be sent: lines, path",)
    unknown = decide(found, "drop")
    assert unknown.reason == "tool_not_allowed"
    assert unknown.next_steps == ("use one of: close, publish, read",)
    assert decide(found, "erase").reason == "tool_not_allowed"


def test_the_stricter_class_of_tool_and_action_rule_counts_and_names_who_decides() -> None:
    lax = "actions: [{match: {host: mcp.example.com, mcp: {}}, class: auto}]\n"
    people = "{group: writers, quorum: 2}"
    asks = f"actions: [{{match: {{host: mcp.example.com, mcp: {{}}}}, class: review, reviewers: {people}}}]\n"
    never = "actions: [{match: {host: mcp.example.com, mcp: {tool: ['*']}}, class: deny}]\n"
    assert decide(bundle(), "close", state="done").action_class == "auto"
    assert decide(bundle(lax + SERVER), "close", state="done").action_class == "auto"
    for governance, tool, owner in ((SERVER, "publish", None), (lax + SERVER, "publish", None)):
        found = bundle(governance)
        matcher = Matcher.compile(found.policy, found.governance)
        asked = matcher.decide(request(tool, path="/srv/docs/a"))
        assert (asked.reason, asked.action_class) == ("review_required", "review")
        assert matcher.reviews(request(tool, path="/srv/docs/a")) == (
            ReviewAsked("mcp.servers.docs.tools.publish", owner),
        )
        assert matcher.decide(request(tool, path="/srv/docs/a"), approved=True).allowed
        assert matcher.decide(request(tool, path="/etc/x"), approved=True).reason == "argument_not_allowed"
    for tool in ("publish", "close"):
        found = bundle(asks + SERVER)
        matcher = Matcher.compile(found.policy, found.governance)
        assert matcher.decide(request(tool)).reason == "review_required"
        assert matcher.reviews(request(tool)) == (ReviewAsked("actions[0]", Reviewers("writers", 2)),)
    assert decide(bundle(never + SERVER), "close").reason == "action_denied"
    assert decide(bundle(never + SERVER), "publish").reason == "action_denied"


EXPLAINED = [
    ("close", {"state": "open"}, "mcp.servers.docs.tools.close.args.state", ("close", {"state": "other"})),
    (
        "read",
        {"path": "/srv/docs", "mode": "x"},
        "mcp.servers.docs.tools.read",
        ("read", {"path": "/srv", "mode": "x"}),
    ),
    ("publish", {"path": "/srv/docs/a"}, "mcp.servers.docs.tools.publish", ("publish", {"path": "/etc/x"})),
    ("erase", {}, "mcp.servers.docs.tools.erase", ("drop", {})),
    ("drop", {"all": True}, "mcp.servers.docs", ("drop", {"all": False})),
]


@pytest.mark.control("POL-01")
@pytest.mark.parametrize(("tool", "arguments", "place", "beside"), EXPLAINED)
def test_explain_shows_the_rule_and_what_would_allow_the_call_and_not_what_lies_beside(
    tool: str, arguments: dict[str, Any], place: str, beside: tuple[str, dict[str, Any]]
) -> None:
    found = explain_call(bundle(), request(tool, **arguments))
    assert not found.decision.allowed
    assert found.rules[-1].field == place
    changed = load_members(apply_changes(bundle().members, found.changes))
    assert decide(changed, tool, **arguments).allowed
    assert not decide(changed, beside[0], **beside[1]).allowed
    assert diff_bundles(bundle(), changed).covers(request(tool, **arguments))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [({"path": "/etc/x"}, "widen it by hand"), ({}, "lacks path"), ({"path": "/srv/docs", "lines": 10}, "by hand")],
)
def test_explain_says_why_no_rule_is_proposed(arguments: dict[str, Any], why: str) -> None:
    assert why in explain_call(bundle(), request("read", **arguments)).impossible


def test_the_commands_ask_about_a_tool_over_http_and_its_cases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in bundle().members.items():
        (tmp_path / name).write_bytes(content)
    tool = ["policy", "explain", str(tmp_path), "--tool", "read", "--args"]
    node = ["--binary", "/usr/bin/node"]
    assert main([*tool, '{"path": "/srv/docs/a"}', *node]) == 0
    assert main([*tool, '{"path": "/srv/docs/a"}', "--binary", "/usr/bin/curl"]) == 1
    assert "binary_not_allowed" in capsys.readouterr().out
    assert main([*tool, '{"path": "/etc/x"}', *node]) == 1
    shown = capsys.readouterr().out
    assert "argument_not_allowed" in shown and "mcp.servers.docs.tools.read.args.path" in shown
    good = {"server": "docs", "tool": "close", "arguments": {"state": "done"}, "binary": "/usr/bin/node"}
    cases = [
        {"name": "good", "tool": good, "expect": {"verdict": "allow", "policy": "docs"}},
        {
            "name": "bad",
            "tool": {**good, "arguments": {"state": "x"}},
            "expect": {"verdict": "deny", "reason": "argument_not_allowed"},
        },
        {"name": "nobody", "tool": {**good, "binary": "/usr/bin/curl"}, "expect": {"verdict": "deny"}},
    ]
    (tmp_path / "tests.yaml").write_text(json.dumps({"schema": 1, "cases": cases}))
    assert main(["policy", "test", str(tmp_path)]) == 0
    cases[1]["expect"] = {"verdict": "allow"}
    (tmp_path / "tests.yaml").write_text(json.dumps({"schema": 1, "cases": cases}))
    assert main(["policy", "test", str(tmp_path)]) == 1


def test_openshell_is_told_that_arguments_are_not_looked_at_there() -> None:
    lost = {finding.field: finding for finding in export(bundle()).findings}
    assert lost["governance.mcp.docs"].effect == "wider"
    assert "every argument passes" in lost["governance.mcp.docs"].reason
