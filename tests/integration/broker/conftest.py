from __future__ import annotations

import sys
from pathlib import Path

import pytest
from broker_rig import encode, running_broker

# The attestation tests' real TPM in software.
sys.path[:0] = [str(Path(__file__).parents[1] / "attest"), str(Path(__file__).parents[2] / "unit" / "attest")]
sys.path.append(str(Path(__file__).parents[1] / "docs"))
sys.path.append(str(Path(__file__).parents[2] / "unit/jobs"))
# Repositories made with the real git.
sys.path.append(str(Path(__file__).parents[2] / "unit/review"))
# A bastion with a workspace, and the settings of a terminal in the browser.
sys.path.append(str(Path(__file__).parents[1] / "sessions"))
# A broker without network whose clock the test moves.
sys.path.append(str(Path(__file__).parents[2] / "unit/broker"))


@pytest.fixture(scope="session")
def broker():
    """A running broker with revision 1 released to the ring ``stable``; tests use workspaces of their own."""
    with running_broker(operator_group="daemon") as lab:
        lab.digest, publication = lab.officers.publication(1)
        lab.operator.request("POST", "/v1/policy/publish", encode(publication))
        yield lab


@pytest.fixture
def own_broker():
    """A running broker without any policy, for one test alone."""
    with running_broker() as lab:
        yield lab
