"""A scratch host for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from edr_rig import Host


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host that nothing watches yet."""
    made = Host(tmp_path)
    yield made
    made.close()
