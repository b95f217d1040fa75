from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from broker_rig import Lab, encode

# The attestation tests' real TPM in software.
sys.path[:0] = [str(Path(__file__).parents[1] / "attest"), str(Path(__file__).parents[2] / "unit" / "attest")]
sys.path.append(str(Path(__file__).parents[1] / "docs"))


@pytest.fixture(scope="session")
def broker():
    """A running broker with revision 1 released to the ring ``stable``; tests use workspaces of their own."""
    directory = Path(tempfile.mkdtemp(prefix="saw-broker-"))
    lab = Lab(directory, operator_group="daemon")
    try:
        lab.start()
        lab.digest, publication = lab.officers.publication(1)
        lab.operator.request("POST", "/v1/policy/publish", encode(publication))
        yield lab
    finally:
        lab.stop()
        shutil.rmtree(directory)


@pytest.fixture
def own_broker():
    """A running broker without any policy, for one test alone."""
    directory = Path(tempfile.mkdtemp(prefix="saw-broker-"))
    lab = Lab(directory)
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()
        shutil.rmtree(directory)
