"""Findings leave the box: to the broker from a workspace, and as RFC 5424 lines to the host's log everywhere.

A finding is struck off when it arrived, so that it arrives at least once; its ``metadata.uid`` tells two sights of one apart.
"""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec

from saw.edr.place import Reporting, workspace_of
from saw.edr.store import Found, Store
from saw.errors import UnavailableError

if TYPE_CHECKING:
    from saw.runtime.policyd_broker import PolicyBroker

#: The broker keeps details up to 8 KiB.
_MOST_DETAIL = 8000
_FACILITY_AUTHPRIV = 10
#: OCSF severity id → severity of RFC 5424 (2 critical, 3 error, 4 warning, 5 notice, 6 informational).
_LEVEL = {1: 6, 2: 5, 3: 4, 4: 3, 5: 2}


class Unsent(UnavailableError):
    """A finding did not arrive."""

    code = "finding_unsent"


class Destination(Protocol):
    """Somewhere that findings go."""

    def send(self, found: Found) -> None:
        """Deliver it, or raise :class:`saw.errors.UnavailableError`."""
        ...

    def close(self) -> None:
        """Let go of the connection."""
        ...


class BrokerDestination:
    """The broker, which writes each report into its own chained trail as a Detection Finding of this workspace."""

    def __init__(self, broker: PolicyBroker) -> None:
        self._broker = broker

    @classmethod
    def of(cls, config: Reporting) -> Self | None:
        """Return the broker of this workspace, None on a host that is none."""
        # It brings an HTTP client, which a host that is none does not need.
        from saw.runtime.policyd_broker import PolicyBroker

        workspace = workspace_of(config)
        return None if workspace is None else cls(PolicyBroker(workspace, Path(config.workspace).parent))

    def send(self, found: Found) -> None:
        """Report the finding under the workspace's identity, or unverified while it has none."""
        self._broker.report("finding", "", reason=kind_of(found.event), detail=_detail(found.event))

    def close(self) -> None:
        """Close the connections."""
        self._broker.close()


class SyslogDestination:
    """A socket of the host's log (journald or a syslog daemon), one RFC 5424 line for each finding."""

    def __init__(self, path: str, host: str) -> None:
        self._path = path
        self._host = host

    def send(self, found: Found) -> None:
        """Write the line."""
        line = rfc5424(found.event, self._host, os.getpid())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.settimeout(5)
                channel.connect(self._path)
                channel.send(line)
        except OSError as error:
            raise Unsent(f"{self._path}: {error.strerror}", cure="check that the host's log runs") from error

    def close(self) -> None:
        """Nothing is open between two lines."""


def rfc5424(event: dict[str, Any], host: str, pid: int) -> bytes:
    """Return the line of RFC 5424: the OCSF event in JSON as its message, kind and uid as structured data."""
    time = datetime.fromtimestamp(event["time"] / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    priority = _FACILITY_AUTHPRIV * 8 + _LEVEL.get(event["severity_id"], 4)
    data = f'[saw@61509 kind="{kind_of(event)}" uid="{event["metadata"]["uid"]}"]'
    head = f"<{priority}>1 {time} {host or '-'} {event['metadata']['product']['name']} {pid} finding {data} "
    return head.encode("ascii", "replace") + msgspec.json.encode(event)


def deliver(store: Store, way: Any, destination: Destination) -> int:
    """Deliver what waits on one way, oldest first; return how many arrived, or raise ``UnavailableError`` at one that did not."""
    count = 0
    while found := store.pending(way):
        for one in found:
            destination.send(one)
            store.delivered(way, one.seq)
            count += 1
    return count


def kind_of(event: dict[str, Any]) -> str:
    """Return the kind of a finding."""
    return str(event["finding_info"]["types"][0])


def _detail(event: dict[str, Any]) -> dict[str, Any]:
    if len(msgspec.json.encode(event)) <= _MOST_DETAIL:
        return {"event": event}
    said = {"uid": event["metadata"]["uid"], "title": event["finding_info"]["title"], "severity": event["severity"]}
    return {"cut": said}


def close_all(destinations: dict[Any, Destination]) -> None:
    """Close every destination."""
    for one in destinations.values():
        with contextlib.suppress(OSError):
            one.close()


__all__ = [
    "BrokerDestination",
    "Destination",
    "SyslogDestination",
    "Unsent",
    "close_all",
    "deliver",
    "kind_of",
    "rfc5424",
]
