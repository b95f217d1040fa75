"""The gatekeeper stopped, cut off from the broker, and out of disk: calls are refused, or made on the lease that is left."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from fault_room import MIB, Room, RoomNamespace, partitioned
from ring2_rig import BROKER, Answer, Rig, wait_for

from saw.audit.chain import verify_chain


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Room]]:
    """Ring 2 whose state, spool, ledger and Envoy's files lie on a disk of 16 MiB."""
    directory = Path(tmp_path_factory.mktemp("faults"))
    with ExitStack() as stack:
        room = Room(directory / "disk", 16 * MIB)
        stack.callback(room.close)
        yield Rig(stack, directory, namespace=RoomNamespace("faults", room), disk=(room.place, room.seen)), room


@pytest.fixture
def rig(small: tuple[Rig, Room]) -> Rig:
    """The rig as new: everything active under a fresh lease."""
    rig, _ = small
    rig.name_hosts()
    rig.reset()
    rig.settled()
    wait_for(lambda: rig.call().status == 200, "an allowed call")
    refused = rig.call("DELETE", "/v1/things").json["request_id"]
    wait_for(lambda: refused in verdicts(rig), "the events up to here")
    rig.far.arrived.clear()
    return rig


@contextmanager
def stopped(rig: Rig) -> Iterator[None]:
    """The gatekeeper's process is there and does nothing."""
    assert rig.gatekeeper is not None
    rig.gatekeeper.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        rig.gatekeeper.send_signal(signal.SIGCONT)


def then(rig: Rig, reason: str, what: str) -> Answer:
    """Call until that is refused for ``reason``; return the answer to another call, which did not arrive."""
    wait_for(lambda: rig.call().outcome == (403, reason) or time.sleep(0.2), what)
    before = len(rig.far.arrived)
    answer = rig.call()
    assert (answer.outcome, len(rig.far.arrived)) == ((403, reason), before)
    return answer


def verdicts(rig: Rig) -> dict[str, str]:
    """What the broker was told of each call: verdict by request id."""
    found = {}
    for row in list(rig.broker.events):
        said = row.event.get("unmapped", {}).get("saw", {})
        if "verdict" in said:
            found[row.event["metadata"].get("correlation_uid", "")] = said["verdict"]
    return found


@pytest.mark.control("POL-04")
@pytest.mark.control("POL-05")
def test_a_stopped_gatekeeper_refuses_and_goes_on_where_the_state_is_by_then(rig: Rig) -> None:
    assert rig.call().status == 200
    rig.broker.put("ws-2", lease_expires_at=2)
    rig.settled()
    with stopped(rig):
        answer = rig.call()
        assert answer.outcome == (403, "gatekeeper_unavailable")
        assert "did not answer" in answer.json["detail"]
    assert len(rig.far.arrived) == 1
    wait_for(lambda: rig.call().status == 200, "a call after it goes on")
    assert rig.call(number=2, context=rig.svid("ws-2")).outcome == (403, "lease_expired"), "time went on meanwhile"
    last = rig.call("DELETE", "/v1/things").json["request_id"]
    wait_for(lambda: last in verdicts(rig), "the events up to here")
    assert verdicts(rig).get(answer.json["request_id"]) != "allow", "what Envoy gave up is no allowed call"


@pytest.mark.thorough
@pytest.mark.control("POL-05")
@pytest.mark.control("AUD-01")
def test_without_a_way_to_the_broker_a_lease_is_used_up_and_not_exceeded(rig: Rig) -> None:
    rig.settle(lease_expires_at=20)
    with partitioned(rig.namespace.name, f"ip daddr {BROKER}", f"ip saddr {BROKER}"):
        ids = {rig.call("DELETE", "/v1/things").json["request_id"]}
        assert rig.call().status == 200, "on the lease that is left"
        # Nobody learns of this before the two are joined again; the lease bounds how long that matters.
        rig.broker.put("ws-1", lease_expires_at=3600)
        ids.add(then(rig, "lease_expired", "the end of the lease").json["request_id"])
    wait_for(lambda: rig.call().status == 200, "a call after the two are joined")
    wait_for(lambda: ids <= verdicts(rig).keys(), "the events of the time between")


@pytest.mark.control("POL-04")
@pytest.mark.control("LIF-02")
@pytest.mark.control("AUD-01")
def test_on_a_full_disk_nothing_is_allowed_that_is_not_recorded_and_a_kill_counts_for_good(
    rig: Rig, small: tuple[Rig, Room]
) -> None:
    room = small[1]
    assert rig.gatekeeper is not None
    before, allowed = room.names(), list(verdicts(rig).values()).count("allow")
    rig.broker.answering = False
    ids = {rig.call("DELETE", "/v1/things").json["request_id"] for _ in range(3)}
    room.fill()
    try:
        answer = then(rig, "gatekeeper_unavailable", "a refusal for want of disk")
        assert "cannot write its audit record" in answer.json["detail"]
        rig.broker.put("ws-2", state="quarantined")
        rig.broker.answering = True  # the events are taken, and that cannot be noted
        wait_for(lambda: ids <= verdicts(rig).keys(), "the events that were recorded before")
        wait_for(lambda: not rig.listens("10.210.2.1", 8443), "the end of the killed workspace's listener")
        room.fill()  # what the listener left behind
        then(rig, "gatekeeper_unavailable", "a refusal for want of disk")
        assert rig.gatekeeper.poll() is None, "it goes on by itself when there is room"
    finally:
        rig.broker.answering = True
        room.free()
    wait_for(lambda: rig.call().status == 200, "a call once there is room")
    last = rig.call("DELETE", "/v1/things").json["request_id"]
    wait_for(lambda: last in verdicts(rig), "the events up to here")
    assert answer.json["request_id"] not in verdicts(rig), "neither allowed nor recorded"
    assert list(verdicts(rig).values()).count("allow") == allowed + len(rig.far.arrived), "what arrived is recorded"
    report = verify_chain(rig.broker.events)
    assert report.complete, report.findings
    rig.settled()
    assert room.names() - before <= {"contact.json"}, "no part of a file is left"
    with partitioned(rig.namespace.name, f"ip daddr {BROKER}", f"ip saddr {BROKER}"):
        rig.stop_gatekeeper(signal.SIGKILL)
        rig.start_gatekeeper()
        wait_for(lambda: rig.call().status == 200, "a call on what was kept")
        assert not rig.listens("10.210.2.1", 8443), "the kill is on the disk"
