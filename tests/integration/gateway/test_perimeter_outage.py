"""Ring 2 when something is gone: the gatekeeper, the broker, or both."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ring2_rig import Answer, Rig, wait_for

from saw.policy.bundle import describe


@pytest.mark.control("POL-04")
def test_without_the_gatekeeper_nothing_is_allowed(rig: Rig) -> None:
    assert rig.call().status == 200
    rig.stop_gatekeeper(signal.SIGKILL)
    try:
        answer = rig.call()
        assert answer.outcome == (403, "gatekeeper_unavailable")
        assert answer.json["layer"] == "ring2"
        assert len(rig.far.arrived) == 1
    finally:
        rig.start_gatekeeper()
    wait_for(lambda: rig.call().status == 200, "the gatekeeper's return")


@pytest.mark.control("LIF-02")
@pytest.mark.control("POL-05")
def test_a_restart_without_broker_keeps_kills_and_ends_leases(rig: Rig) -> None:
    rig.broker.put("ws-2", state="quarantined")
    rig.settle(lease_expires_at=45)  # on a slow machine two gatekeepers take long to start
    rig.stop_gatekeeper()
    rig.broker.answering = False
    try:
        rig.start_gatekeeper()
        wait_for(lambda: rig.call().status == 200, "a call on the lease that was saved")
        assert not rig.listens("10.210.2.1", 8443)
        wait_for(lambda: rig.call().outcome == (403, "lease_expired"), "the end of the lease", 120)
    finally:
        rig.broker.answering = True
    rig.settle(lease_expires_at=40, state="active")
    wait_for(lambda: rig.call().status == 200, "the return of the broker")


@pytest.mark.control("AUD-01")
def test_events_of_an_outage_of_the_broker_arrive_afterwards(rig: Rig) -> None:
    rig.broker.answering = False
    try:
        ids = {rig.call("DELETE", "/v1/things").json["request_id"] for _ in range(5)}
    finally:
        rig.broker.answering = True

    def arrived() -> bool:
        return ids <= {event.event["metadata"].get("correlation_uid") for event in list(rig.broker.events)}

    wait_for(arrived, "the events")


@contextmanager
def parted(rig: Rig, *offline: str) -> Iterator[list[str]]:
    """Nobody reaches the broker, leases end at once, and ``ws-1``, ``ws-2`` … are granted time offline; yields digests."""
    digests = []
    revision = describe(rig.bundle)[1].revision  # other modules' releases raised the floor
    for number, time in enumerate(offline, start=1):
        digest, bundle = rig.signer.release(revision, lease=f"{{ttl: 30s, offline_ttl: {time}}}")
        rig.broker.releases[digest] = bundle
        rig.broker.put(f"ws-{number}", policy_digest=digest, released_digest=digest, lease_expires_at=1)
        digests.append(digest)
    rig.settled()
    rig.part_broker()
    try:
        yield digests
    finally:
        rig.join_broker()


def call(rig: Rig, digest: str, number: int = 1) -> Answer:
    return rig.call(number=number, context=rig.svid(f"ws-{number}", digest=digest))


@pytest.mark.control("POL-05")
def test_time_offline_that_policy_grants_counts_in_an_outage_and_ends(rig: Rig) -> None:
    with parted(rig, "1s", "8m") as (short, long):
        wait_for(lambda: call(rig, short).outcome == (403, "lease_expired"), "the end of the shorter grant")
        wait_for(lambda: call(rig, long, 2).status == 200, "a call on time offline")
        rig.stop_gatekeeper(signal.SIGKILL)
        rig.start_gatekeeper()
        wait_for(lambda: call(rig, long, 2).status == 200, "a call on time offline after a restart")
        assert call(rig, short).outcome == (403, "lease_expired")
    wait_for(lambda: call(rig, long, 2).outcome == (403, "lease_expired"), "the end of the outage")

    def told() -> bool:
        said = [event.event.get("unmapped", {}).get("saw", {}) for event in list(rig.broker.events)]
        return any(one.get("offline") and one.get("verdict") == "allow" for one in said)

    wait_for(told, "the event of a call on time offline")


@pytest.mark.control("LIF-02")
@pytest.mark.control("POL-05")
def test_a_kill_in_an_outage_ends_time_offline_with_the_broker_s_first_answer(rig: Rig) -> None:
    with parted(rig, "8m") as (digest,):
        wait_for(lambda: call(rig, digest).status == 200, "a call")
        rig.broker.put("ws-1", state="quarantined", lease_expires_at=None)
    rig.settled()
    wait_for(lambda: not rig.listens("10.210.1.1", 8443), "the end of the workspace's listener")
    rig.part_broker()
    rig.stop_gatekeeper(signal.SIGKILL)
    try:
        rig.start_gatekeeper()
        wait_for(lambda: call(rig, rig.digest, 2).status == 200, "the gatekeeper's return")
        assert not rig.listens("10.210.1.1", 8443), "killed, also over a restart without the broker"
    finally:
        rig.join_broker()
    rig.reset()
    wait_for(lambda: rig.listens("10.210.1.1", 8443) and rig.call().status == 200, "the workspace's return")
