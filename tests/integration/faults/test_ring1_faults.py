"""Ring 1 killed, stopped, cut off from ring 2, and out of disk: nothing leaves, or it is refused with the reason."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault_room import MIB, Room, partitioned
from ring1_rig import GOVERNANCE, POLICY, PROXY, RING2_PORT, Rig, start_rig, until

from saw.runtime import generation

URL = "http://plain.example.com/things"
READ = "{host: plain.example.com, port: 80, protocol: rest, access: read-only}"
ELSEWHERE = READ.replace("access: read-only", 'rules: [{allow: {method: GET, path: "/elsewhere"}}]')
NO_ANSWER, REFUSED = 28, 7
"""What curl ends with: its time is up (``--max-time``); nobody listens."""
LONG = ("-m", "28")


@pytest.fixture(scope="module")
def running() -> Iterator[Rig]:
    """Ring 1 with an identity and the policy of the rig in force."""
    rig = start_rig("f")
    try:
        rig.issue_svid()
        rig.base = rig.activate()
        yield rig
    finally:
        rig.stop()


@pytest.fixture
def rig(running: Rig) -> Rig:
    until(lambda: running.curl(URL).status == 200, "a governed call gets through")
    return running


@contextmanager
def stopped(rig: Rig, name: str) -> Iterator[None]:
    rig.processes[name].send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        rig.processes[name].send_signal(signal.SIGCONT)


def killed(rig: Rig, name: str) -> None:
    process = rig.processes.pop(name)
    process.kill()
    process.wait(10)


def works_again(rig: Rig) -> None:
    until(lambda: rig.curl(URL).status == 200 or time.sleep(0.2), "calls get through again", 120)


def refused(rig: Rig, reason: str, words: str, url: str = URL) -> None:
    """A call is refused for that reason, and does not arrive."""
    before = len(rig.arrived())
    reply = rig.curl(*LONG, url)
    assert reply.json()["reason"] == reason, reply
    assert words in reply.json()["detail"]
    assert len(rig.arrived()) == before


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_without_the_proxy_nothing_leaves_and_what_waits_is_decided_by_the_policy_of_then(rig: Rig, how: str) -> None:
    before = len(rig.arrived())
    if how == "killed":
        killed(rig, "ring1")
        assert rig.curl(URL).code == REFUSED
        rig.start_envoy()
    else:
        try:
            with stopped(rig, "ring1"):
                assert rig.curl("-m", "3", URL).code == NO_ANSWER
                curl = ("curl", "-s", "-m", "60", "-x", PROXY, URL)
                with subprocess.Popen(["ip", "netns", "exec", rig.sandbox, *curl], stdout=subprocess.PIPE) as waiting:
                    narrower = rig.compile(POLICY.replace(READ, ELSEWHERE), GOVERNANCE, revision=2)
                    generation.switch(rig.generations, narrower)
                    until(lambda: (rig.decide_status() or {}).get("policy_digest") == narrower, "saw-decide follows")
                    rig.processes["ring1"].send_signal(signal.SIGCONT)
                    said = waiting.communicate(timeout=90)[0]
            assert b"method_or_path_not_allowed" in said, said
            until(lambda: rig.served() == narrower, "ring 1 follows")
            assert len(rig.arrived()) == before
        finally:
            generation.switch(rig.generations, rig.base)
    assert len(rig.arrived()) == before
    works_again(rig)


@pytest.mark.thorough
@pytest.mark.control("RUN-01")
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_without_the_decision_service_every_call_is_refused(rig: Rig, how: str) -> None:
    no_decision = ("gatekeeper_stale", "the decision service of ring 1 does not answer")
    if how == "killed":
        killed(rig, "decide")
        refused(rig, *no_decision)
        rig.start_decide()
    else:
        with stopped(rig, "decide"):
            refused(rig, *no_decision)
    works_again(rig)


@pytest.mark.thorough
@pytest.mark.control("RUN-01")
def test_a_call_on_a_way_to_ring_2_that_went_silent_ends_with_the_reason(rig: Rig) -> None:
    with partitioned(rig.vm, f"tcp dport {RING2_PORT}", f"tcp sport {RING2_PORT}"):
        # The first call goes on a connection that is open, so nobody knows what became of it; the second has to make one.
        refused(rig, "service_gave_no_answer", "the way ended before an answer came")
        refused(rig, "no_identity", "the perimeter is away")
    works_again(rig)


@pytest.mark.control("RUN-01")
def test_a_decision_that_cannot_be_written_down_is_a_refusal(rig: Rig) -> None:
    place = Path(tempfile.mkdtemp(prefix="saw-room-"))
    room = Room(place, MIB)
    killed(rig, "decide")
    own = rig.directory / "decide.log"
    own.rename(rig.directory / "decide.before.log")
    own.symlink_to(room.seen / "decide.log")
    try:
        rig.start_decide()
        works_again(rig)
        room.fill()
        until(lambda: rig.curl(URL).status != 200, "a refusal")
        refused(rig, "gatekeeper_stale", "cannot be written down")
        assert rig.processes["decide"].poll() is None
        room.free()
        works_again(rig)
    finally:
        killed(rig, "decide")
        own.unlink()
        rig.start_decide()
        room.close()
        place.rmdir()
    works_again(rig)
