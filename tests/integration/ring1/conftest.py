from __future__ import annotations

from datetime import timedelta

import pytest
from ring1_rig import start_rig, until

from saw.runtime import generation


@pytest.fixture(scope="session")
def running():
    """Ring 1 with an identity and the policy of the rig in force."""
    rig = start_rig("a")
    try:
        rig.issue_svid()
        rig.base = rig.activate()
        # The identity arrives through a watched file: wait for the first call that gets through.
        until(lambda: rig.curl("https://api.example.com/v1/ready").status == 200, "a governed call gets through")
        yield rig
    finally:
        rig.stop()


@pytest.fixture
def rig(running):
    """The running ring 1; whatever a test changed is put back."""
    running.lease(timedelta(hours=1))
    running.heartbeat()
    yield running
    running.lease(timedelta(hours=1))
    running.heartbeat()
    if "ring2" not in running.processes:
        running.start_ring2_proxy()
    if generation.current(running.generations) != running.base:
        running.activate()
