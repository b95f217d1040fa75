"""Ring 2 when something is gone: the gatekeeper, the broker, or both."""

from __future__ import annotations

import signal

import pytest
from ring2_rig import Rig, wait_for


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
    rig.settle(lease_expires_at=4)
    rig.stop_gatekeeper()
    rig.broker.answering = False
    try:
        rig.start_gatekeeper()
        wait_for(lambda: rig.call().status == 200, "a call on the lease that was saved", 4)
        assert not rig.listens("10.210.2.1", 8443)
        wait_for(lambda: rig.call().outcome == (403, "lease_expired"), "the end of the lease", 10)
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
