from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# The rigs of a real broker, and of one with a sign-in.
sys.path.append(str(Path(__file__).parents[1] / "broker"))


@pytest.fixture(scope="session")
def bastion():
    """A broker with its bastion and the active workspace ``ws-a``; tests use sessions of their own."""
    from broker_rig import Lab
    from session_rig import RULES, running

    directory = Path(tempfile.mkdtemp(prefix="saw-bastion-"))
    lab = Lab(directory, sessions=RULES)
    try:
        lab.start()
        with running(lab, directory) as made:
            yield made
    finally:
        lab.stop()
        shutil.rmtree(directory)
