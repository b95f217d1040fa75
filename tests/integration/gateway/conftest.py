"""The rig of ring 2, started once for a module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from ring2_rig import DRAIN_S, Rig


@pytest.fixture(scope="session")
def ring2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Return real Envoy and a real gatekeeper, with two active workspaces.

    ``SAW_RING2_REPLICAS=2`` in the environment has all these tests go through that many gatekeepers.
    """
    with ExitStack() as stack:
        replicas = int(os.environ.get("SAW_RING2_REPLICAS", "1"))
        yield Rig(stack, Path(tmp_path_factory.mktemp("ring2")), replicas, drain_s=DRAIN_S)


@pytest.fixture
def rig(ring2: Rig) -> Rig:
    """Return the rig as new: everything active under a fresh lease (other modules' tests may have taken minutes)."""
    ring2.name_hosts()
    ring2.reset()
    ring2.settled()
    return ring2


@pytest.fixture(autouse=True)
def _nothing_arrived(request: pytest.FixtureRequest) -> None:
    if "rig" in request.fixturenames:
        far: Rig = request.getfixturevalue("ring2")
        far.far.arrived.clear()
        far.trap.arrived.clear()
        far.far.respond = None
        far.broker.reviews.clear()
