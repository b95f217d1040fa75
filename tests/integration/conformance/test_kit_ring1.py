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
      - {host: second.example.com, port: 443, protocol: rest, rules: [{allow: {method: GET, path: "/v1/**"}}]}
    binaries: [{path: "/**/python3*"}]
"""
GOVERNANCE = """
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team}
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
        )
    finally:
        rig.stop()


@pytest.mark.control("RUN-01")
@pytest.mark.control("NET-03")
def test_every_request_is_refused_for_the_right_reason_and_none_arrives(ring1):
    assert ring1.findings() == []
    assert ring1.code == 0, ring1.text
    assert set(ring1.by(suite="addressing").values()) | set(ring1.by(suite="http").values()) == {"refused"}
    arrived = {
        suite: {c["arrived"] for c in ring1.report["cases"] if c["suite"] == suite} for suite in ("addressing", "http")
    }
    assert arrived == {"addressing": {None}, "http": {False}}  # a CONNECT carries nothing that a far end could log


def test_the_allowed_twin_arrives_at_the_far_end(ring1):
    twins = {(case["twin"]["id"], case["twin"]["result"]) for case in ring1.report["cases"]}
    assert twins == {("twin.http.get", "works")}


def test_a_tunnel_inside_a_tunnel_is_refused_with_words_that_say_so(ring1):
    case = ring1.case("http.connect-inside")
    assert case["evidence"]["refused_by"] == "method_or_path_not_allowed"
