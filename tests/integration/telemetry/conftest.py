"""A scratch host for each test, and a collector: Debian's rsyslog as docs/audit.md sets it up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from telemetry_rig import Host

sys.path.append(str(Path(__file__).parents[1] / "broker"))
from siem_rig import Siem


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host whose telemetry does not run yet."""
    return Host(tmp_path)


@pytest.fixture
def siem(tmp_path: Path) -> Iterator[Siem]:
    """A collector that runs."""
    siem = Siem(tmp_path / "siem")
    siem.start()
    try:
        yield siem
    finally:
        if siem.process is not None:
            siem.kill()
