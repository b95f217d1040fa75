from __future__ import annotations

import pytest
from policyd_lab import Lab


@pytest.fixture
def lab():
    """A workspace whose repository is empty yet."""
    made = Lab()
    yield made
    made.stop()
