"""Where a host is: in a workspace, which has an identity and a broker to report to, or elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from saw.edr.store import Way
from saw.errors import ConfigError
from saw.files import load_json
from saw.runtime.policyd_config import Workspace


class Reporting(Protocol):
    """What a part with a spool of findings is told: its spool, and where findings go."""

    @property
    def state(self) -> Path:
        """The spool's folder."""
        ...

    @property
    def spool_limit(self) -> int:
        """How many findings may wait."""
        ...

    @property
    def workspace(self) -> str:
        """The file that tells a workspace what it is."""
        ...

    @property
    def syslog(self) -> str:
        """The socket of the host's log, or empty."""
        ...


def workspace_of(config: Reporting) -> Workspace | None:
    """Return what the workspace was told at its creation, None on a host that is none (or is not told yet)."""
    if not Path(config.workspace).exists():
        return None
    try:
        return load_json(config.workspace, Workspace)
    except ConfigError:
        return None


def workspace_id(config: Reporting) -> str:
    """Return the workspace's id, empty elsewhere."""
    found = workspace_of(config)
    return found.workspace_id if found else ""


def ways_of(config: Reporting) -> tuple[Way, ...]:
    """Return the ways on which findings have to be delivered here."""
    ways: list[Way] = []
    if Path(config.workspace).exists():
        ways.append("broker")
    if config.syslog or not ways:
        ways.append("syslog")
    return tuple(ways)


__all__ = ["Reporting", "ways_of", "workspace_id", "workspace_of"]
