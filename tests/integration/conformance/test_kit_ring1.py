"""The kit's requests against the real ring 1: what is refused never reaches the far end, which logs what arrives."""

from __future__ import annotations

import shlex

import pytest
from ring1_rig import PROXY, start_rig

POLICY = """
version: 1
landlock: {compatibility: hard_requirement}
network_policies:
  web:
    endpoints:
      - {host: web.example.com, port: 443, protocol: rest, rules: [{allow: {method: GET, path: "/v1/**"}}]}
      - {host: graphql.example.com, port: 443, path: /graphql, protocol: graphql,
         rules: [{allow: {operation_type: query, fields: [__typename]}}]}
      - {host: mcp.example.com, port: 443, path: /mcp, protocol: mcp, rules: [{allow: {method: tools/call, tool: note}}]}
      - {host: second.example.com, port: 443, protocol: rest, rules: [{allow: {method: GET, path: "/v1/**"}}]}
    binaries: [{path: "/**/python3*"}]
"""
GOVERNANCE = """
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team}
mcp:
  servers:
    notes:
      transport: http
      url: https://mcp.example.com/mcp
      tools: {note: {class: auto, args: {text: {max_length: 20, required: true}}}}
"""


@pytest.fixture(scope="module")
def ring1(kit, tmp_path_factory):
    log = tmp_path_factory.mktemp("far-end") / "arrived.log"
    log.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAR_END_LOG", str(log))
        rig = start_rig("kit")
    try:
        rig.issue_svid()
        rig.issue_svid(rig.activate(POLICY, GOVERNANCE))
        prefix = ["ip", "netns", "exec", rig.sandbox, "env", f"https_proxy={PROXY}", f"SSL_CERT_FILE={rig.ca_bundle}"]
        yield kit(
            *(
                "--target",
                f"cmd:{shlex.join(prefix)}",
                "--ours",
                "--python",
                "/usr/bin/python3",
                "--arrivals",
                str(log),
            ),
            *("--proxy", "10.200.0.1:3128", "--allowed-url", "https://web.example.com/v1/things"),
            *("--second-url", "https://second.example.com/v1/x", "--suite", "addressing", "--suite", "http"),
            *("--graphql-url", "https://graphql.example.com/graphql", "--mcp-url", "https://mcp.example.com/mcp"),
            *("--redirect-url", "https://web.example.com/v1/redirect-to"),
        )
    finally:
        rig.stop()


@pytest.mark.control("RUN-01")
@pytest.mark.control("NET-03")
def test_every_request_is_refused_for_the_right_reason_and_none_arrives(ring1):
    assert ring1.findings() == []
    assert ring1.code == 0, ring1.text
    tried = [case for case in ring1.report["cases"] if case["result"] != "not_applicable"]
    assert {case["result"] for case in tried} == {"refused"}
    arrived = {suite: {case["arrived"] for case in tried if case["suite"] == suite} for suite in ("addressing", "http")}
    assert arrived == {
        "addressing": {None},
        "http": {False},
    }  # nobody records at the addresses that tunnels are asked to


def test_what_is_not_tried_needs_a_far_end_or_a_recorder_that_is_not_here(ring1):
    why = {c["id"]: c["evidence"]["problem"] for c in ring1.report["cases"] if c["result"] == "not_applicable"}
    assert {name for name in why if not name.startswith(("address.outside", "address.name-", "http.websocket."))} == {
        "http.forged"
    }
    assert all("--" in text or text.startswith("no recorder") for text in why.values())


def test_ring_1_says_of_what_it_read_that_it_refused_it(ring1):
    layers = {case["id"]: (case["layer"], case["layer_ok"]) for case in ring1.report["cases"]}
    assert {
        layers[name] for name in ("address.metadata", "http.method.delete", "http.graphql.alias", "http.mcp.long")
    } == {("ring1", True)}
    assert False not in {ok for _, ok in layers.values()}


def test_the_allowed_twin_arrives_at_the_far_end(ring1):
    twins = {(case["twin"]["id"], case["twin"]["result"]) for case in ring1.report["cases"]}
    works = {(f"twin.http.{name}", "works") for name in ("get", "graphql", "mcp", "h2", "redirect")}
    assert {twin for twin in twins if twin[1] != "not_applicable"} == works


@pytest.mark.control("RUN-01")
def test_bodies_are_refused_for_what_they_ask_and_not_for_how_they_came(ring1):
    found = {case["id"]: case["evidence"]["refused_by"] for case in ring1.report["cases"] if ".graphql." in case["id"]}
    assert len(found) == 28
    assert found["http.graphql.alias"] == found["http.graphql.batch"] == "operation_not_allowed"
    assert found["http.graphql.key-twice"] == found["http.graphql.compressed"] == "body_unreadable"
    assert found["http.graphql.bomb"] == "body_unreadable"  # nothing is unpacked
    assert found["http.graphql.large"] == "body_too_large"


@pytest.mark.control("RUN-05")
def test_calls_of_tools_are_refused_for_their_arguments(ring1):
    found = {case["id"]: case["evidence"]["refused_by"] for case in ring1.report["cases"] if ".mcp." in case["id"]}
    assert len(found) == 23
    assert found["http.mcp.long"] == found["http.mcp.batch"] == found["http.mcp.more"] == "argument_not_allowed"
    assert found["http.mcp.text-twice"] == found["http.mcp.header"] == "body_unreadable"
    assert found["http.mcp.large"] == "body_too_large"


@pytest.mark.control("NET-03")
def test_a_redirect_is_followed_through_the_proxy_and_refused_there(ring1):
    found = {case["id"]: case["evidence"]["refused_by"] for case in ring1.report["cases"] if ".redirect." in case["id"]}
    assert found.pop("http.redirect.unlisted") == "host_not_allowed"
    assert len(found) == 4
    assert set(found.values()) == {"destination_blocked"}


@pytest.mark.control("RUN-01")
def test_header_lists_of_http_2_are_refused_before_or_by_the_policy(ring1):
    found = {case["id"]: case["evidence"]["refused_by"] for case in ring1.report["cases"] if ".h2." in case["id"]}
    assert len(found) == 26
    assert found["http.h2.method"] == found["http.h2.method-connect"] == "method_or_path_not_allowed"
    assert found["http.h2.authority"] == found["http.h2.authority-only-host"] == "host_not_allowed"
    assert set(found.values()) == {"closed", "method_or_path_not_allowed", "host_not_allowed"}


def test_headers_that_never_end_are_ended_by_time_while_another_call_passes(ring1):
    assert ring1.case("http.slow.headers")["evidence"]["refused_by"] == "status:408"


def test_a_tunnel_inside_a_tunnel_is_refused_with_words_that_say_so(ring1):
    case = ring1.case("http.connect-inside")
    assert case["evidence"]["refused_by"] == "method_or_path_not_allowed"
