"""What all kinds of events have in common: whose word an entry is, which host it is of, and what is never carried.

Events hold names of people, programs, units and addresses. They hold no command line, no environment and no working directory:
those may hold secrets. The words of an entry are carried only where the configuration says so, and those of the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from saw.audit.events import EventFactory, Subject
from saw.audit.ocsf import validate
from saw.edr.detection import printable
from saw.telemetry.journal import Entry, words

#: Programs that speak of sign-ins and accounts and that others than root start: they are root only by their setuid bit.
_SETUID = frozenset(
    {
        "/usr/bin/sudo",
        "/usr/bin/su",
        "/usr/bin/passwd",
        "/usr/bin/gpasswd",
        "/usr/bin/chsh",
        "/usr/bin/chage",
        "/usr/bin/chfn",
    }
)
_TEXT = 300


class Claims:
    """Counts entries that speak as somebody else: anybody may write any number, which must not fill the spool."""

    def __init__(self, most: int = 30) -> None:
        """``most`` are told in a minute of the journal."""
        self._most = most
        self._minute = self._told = self._left_out = 0

    def take(self, entry: Entry) -> int | None:
        """Return how many were left out since the last one that was told; None when this one is left out too."""
        minute = int(entry.time_us) // 60_000_000
        if minute != self._minute:
            self._minute, self._told = minute, 0
        if self._told >= self._most:
            self._left_out += 1
            return None
        self._told += 1
        left_out, self._left_out = self._left_out, 0
        return left_out


class Host:
    """The host whose journal it is, and how its events are built."""

    def __init__(self, factory: EventFactory, name: str, workspace: str = "", claims: Claims | None = None) -> None:
        self.claims = claims or Claims()
        self.factory = factory
        self.name = name
        self.workspace = workspace

    def subject(self, principal: str = "", address: str = "") -> Subject:
        """Who an event is about; an address is where somebody came from."""
        return Subject(principal=principal, workspace=self.workspace, address=address)

    def finished(self, event: dict[str, Any], entry: Entry, **changes: Any) -> dict[str, Any]:
        """Return ``event`` with the host, the place in the journal and ``changes``, validated."""
        device = event.get("device", {"type_id": 0, "type": "Unknown"}) | {"hostname": self.name}
        metadata = event["metadata"] | {"log_name": entry.transport or "journal"}
        told = {**event, **changes, "device": device, "metadata": metadata}
        validate(told)
        return told


def time_of(entry: Entry) -> datetime:
    """When journald received the entry."""
    return datetime.fromtimestamp(int(entry.time_us) / 1_000_000, UTC)


def proven(entry: Entry) -> bool:
    """Whether the entry is the word of root or of a setuid program of sign-ins, as journald states it."""
    return entry.uid == "0" or words(entry.exe).removesuffix(" (deleted)") in _SETUID


def priority_of(entry: Entry) -> int:
    """The priority, 6 (informational) where there is none."""
    text = words(entry.priority)
    return int(text) if text.isdecimal() and len(text) == 1 else 6


def short(text: str, limit: int = _TEXT) -> str:
    """Return ``text`` as it may stand in an event: one line, printable, not long."""
    return printable(text.strip(), limit)


def origin(entry: Entry) -> Mapping[str, object]:
    """Return who wrote the entry, as journald states it."""
    facts = {"unit": entry.systemd_unit, "pid": entry.pid, "uid": entry.uid, "program": words(entry.exe)}
    return {name: short(value) for name, value in facts.items() if value}


__all__ = ["Claims", "Host", "origin", "priority_of", "proven", "short", "time_of"]
