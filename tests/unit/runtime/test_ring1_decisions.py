"""What saw-decide makes of what Envoy tells it, and the clocks it trusts."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from saw.policy.model import Decision
from saw.runtime.attribution import Attribution
from saw.runtime.decide import ASK, Asked, Decider, Refused, Target, _answer, _asked, target_of
from saw.runtime.decide_state import Heartbeat, Lease

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def asked(stage: str = "tls", **facts: str) -> Asked:
    names = {"authority": "a.example.com", "connect": "a.example.com:443", "server_name": "a.example.com", **facts}
    return Asked(stage=stage, method="GET", path="/", **names)


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(
    ("question", "port"),
    [
        (asked(), 443),
        (asked(authority="A.example.com:443", server_name="A.EXAMPLE.com"), 443),
        (asked(connect="a.example.com:8443", authority="a.example.com:8443"), 8443),
        (asked("plain", authority="a.example.com"), 80),
        (asked("tunnel", connect="a.example.com:8080", server_name=""), 8080),
        (asked("connect", authority="a.example.com:443"), 443),
    ],
)
def test_one_destination_named_everywhere_is_taken(question, port):
    target = target_of(question)
    assert (target.host, target.port) == ("a.example.com", port)


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(
    "question",
    [
        asked(server_name="b.example.com"),
        asked(server_name=""),
        asked(authority="b.example.com"),
        asked(authority="a.example.com:444"),
        asked(connect=""),
        asked(connect="a.example.com"),
        asked("connect", authority="a.example.com"),
        asked("connect", authority="user@a.example.com:443"),
        asked("connect", authority="a.example.com:443:443"),
        asked("connect", authority="a.example.com:0"),
        asked("connect", authority="a.example.com:99999"),
        asked("connect", authority="ａ.example.com:443"),
        asked("plain", authority="a.example.com\\@b.example.com"),
        asked("plain", authority="a.example.com#"),
        asked("plain", authority=""),
        asked("", authority="a.example.com"),
    ],
)
def test_what_names_two_destinations_or_none_is_refused(question):
    if question.stage == "":
        question = asked("", connect="", authority=question.authority)
    with pytest.raises(Refused):
        target_of(question)


def test_ring_2_is_told_the_one_executable_that_is_granted_the_call():
    target = Target("https", "a.example.com", 443)
    decision = Decision(verdict="allow", canonical_path="/v1")
    answer = _answer(asked(), target, "/opt/my tool,x", decision, None)
    assert dict(answer.headers) == {
        "x-saw-ring1": "allow",
        "x-saw-scheme": "https",
        "x-saw-port": "443",
        "x-saw-i-to-authority": "a.example.com",
        "x-saw-i-to-path": "/v1",
        "x-saw-binary": "/opt/my%20tool,x",
    }
    assert "x-saw-binary" not in dict(_answer(asked(), target, None, decision, None).headers)


class Clock:
    wall = NOW
    boot = 100.0


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lease(tmp_path, clock):
    path = tmp_path / "lease.json"
    path.write_text(
        json.dumps({"expires_at": (NOW + timedelta(seconds=60)).isoformat(), "ttl_s": 60, "policy_digest": ""})
    )
    return Lease(path, lambda: clock.wall, lambda: clock.boot)


@pytest.mark.control("POL-05")
def test_a_lease_runs_until_its_end(lease, clock):
    assert lease.refusal() == ""
    clock.wall, clock.boot = NOW + timedelta(seconds=59), 159.0
    assert lease.refusal() == ""
    clock.wall, clock.boot = NOW + timedelta(seconds=60), 160.0
    assert "ended" in lease.refusal()


@pytest.mark.control("POL-05")
def test_setting_the_clock_back_does_not_lengthen_a_lease(lease, clock):
    assert lease.refusal() == ""
    clock.wall, clock.boot = NOW - timedelta(days=1), 161.0
    assert "ended" in lease.refusal()


@pytest.mark.control("POL-05")
def test_setting_the_clock_forward_ends_a_lease(lease, clock):
    clock.wall = NOW + timedelta(hours=1)
    assert lease.refusal()


@pytest.mark.control("POL-05")
@pytest.mark.parametrize("content", ["", "{}", '{"expires_at": 5}', '{"expires_at": "2026-11-23T13:00:00"}', "\x00"])
def test_a_lease_that_cannot_be_read_is_none(tmp_path, clock, content):
    path = tmp_path / "lease.json"
    path.write_text(content)
    assert Lease(path, lambda: clock.wall, lambda: clock.boot).refusal()


@pytest.mark.control("POL-05")
@pytest.mark.parametrize(("beat", "alive"), [(100.0, True), (90.0, True), (89.0, False), (101.0, False), (None, False)])
def test_a_heartbeat_counts_for_a_while(tmp_path, clock, beat, alive):
    path = tmp_path / "heartbeat"
    if beat is not None:
        path.write_text(json.dumps({"boottime": beat}))
    assert (Heartbeat(path, 10.0, lambda: clock.boot).refusal() == "") is alive


@pytest.mark.control("RUN-01")
def test_a_connection_is_attributed_to_the_process_that_holds_it():
    attribution = Attribution(Path("/proc/self/ns/net"))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        host, port = client.getsockname()
        caller = attribution.caller(f"{host}:{port}")
        assert caller is not None
        assert caller.binary == str(Path("/proc/self/exe").resolve())
        assert attribution.caller(f"{host}:{port}") == caller
        assert attribution.caller(f"127.0.0.2:{port}") is None
    assert attribution.caller(f"{host}:{port}") is None


@pytest.mark.parametrize("source", ["", "x:1", "127.0.0.1:0", "127.0.0.1:x", "1.2.3:4", "[::1]:5"])
def test_what_is_no_source_address_has_no_caller(source):
    assert Attribution(Path("/proc/self/ns/net")).caller(source) is None


def test_v4_mapped_sockets_are_found():
    attribution = Attribution(Path("/proc/self/ns/net"))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_INET6) as client:
        client.connect(("::ffff:127.0.0.1", server.getsockname()[1]))
        assert attribution.caller(f"127.0.0.1:{client.getsockname()[1]}") is not None


@pytest.mark.control("RUN-01")
def test_a_header_that_is_there_twice_is_worth_what_both_say() -> None:
    twice = [(b"host", b"a.example.com"), (b"content-type", b"application/json"), (b"content-type", b"text/plain")]
    asked = _asked({"method": "POST", "headers": twice}, b"{}")
    assert asked.headers["content-type"] == "application/json,text/plain"
    once = _asked({"method": "POST", "headers": twice[:2]}, b"{}")
    assert once.headers["content-type"] == "application/json"


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(
    ("kind", "complete"), [("application/json", True), ("application/grpc", False), ("Application/GRPC+x", False)]
)
def test_the_body_of_a_grpc_call_counts_as_not_seen(kind, complete):
    assert _asked({"method": "POST", "headers": [(b"content-type", kind.encode())]}, b"").body_complete is complete


class Matching:
    """A generation whose policy refuses everything, with the rule that is missing."""

    digest, revision, problem = "ab" * 32, 1, ""

    def __init__(self):
        self.matcher = self

    def get(self):
        return self

    def refusal(self):
        return ""

    def caller(self, _source):
        return None

    def add(self, *_arguments, **_named):
        pass

    def decide(self, request):
        missing = {"host": request.host, "path": request.path, "fields": [request.path] * 100}
        return Decision(
            verdict="deny", reason="method_or_path_not_allowed", rule_missing=missing, next_steps=("ask", request.path)
        )


@pytest.mark.control("RUN-01")
def test_what_the_sandbox_can_read_again_is_cut_at_every_depth_and_the_answer_is_whole():
    part = Matching()
    decider = Decider(part, part, part, part, part)
    path = "/" + "a" * 60_000
    answer = decider.decide(msgspec.structs.replace(asked(), path=path))
    assert json.loads(answer.body)["rule_missing"]["path"] == path
    (kept,) = decider._refused
    assert len(json.dumps(kept)) < 20_000
    (shown,) = decider.refusals()
    assert shown == kept
    assert (shown["path"], shown["rule_missing"]["path"]) == (path[:400], path[:400])
    assert shown["rule_missing"]["fields"] == [path[:400]] * 20
    assert shown["next_steps"] == ["ask", path[:400], ASK]
    decider.decide(asked())
    assert decider.refusals()[0]["rule_missing"]["path"] == "/"
