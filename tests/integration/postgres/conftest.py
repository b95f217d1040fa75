from __future__ import annotations

import sys
from pathlib import Path

import pytest
from postgres_rig import running_postgres

# The broker of the reviews' tests, whose clock the test moves; and the processes of the broker's.
_INTEGRATION = Path(__file__).parents[1]
sys.path[:0] = [str(_INTEGRATION.parent / "unit" / "broker"), str(_INTEGRATION / "broker"), str(_INTEGRATION / "docs")]


@pytest.fixture(scope="session")
def postgres():
    """One server for all tests of the folder; each has databases of its own."""
    with running_postgres() as server:
        yield server
