"""How long the trail and ended jobs are kept: the part ``audit`` of the broker's configuration, and lengths in days."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

_DAYS = re.compile(r"([1-9][0-9]{0,4})d")
LEAST_DAYS = 35
"""Least retention of the trail: longer than the longest period of a budget and the life of a delegation, so that whatever is
still counted or in force has its events."""
MOST_DAYS = 36_500


class AuditSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``retention``: events older than this lose their content, as in ``400d``.

    Only what a signed ``checkpoint`` covers goes: the file as ``saw audit checkpoint`` or ``saw audit witness`` wrote it.
    ``key`` is the log's public key, ``witnesses`` are public keys of those who have to have signed too. ``shipped``: the
    ``cursor.json`` of ``saw audit ship``; only what its receiver has acknowledged goes.
    """

    retention: str
    checkpoint: str
    key: str
    witnesses: tuple[str, ...] = ()
    shipped: str | None = None

    @property
    def days(self) -> int:
        """The retention in days."""
        return days_of(self.retention) or MOST_DAYS


def days_of(text: str) -> int | None:
    """Return the days of a text such as ``400d``, None for anything else."""
    found = _DAYS.fullmatch(text)
    return int(found[1]) if found else None


def problems_of_audit(settings: AuditSettings, *, ships: bool) -> Iterator[str]:
    """Yield what is wrong, naming the field; ``ships``: whether the audit socket can only be for ``saw audit ship``."""
    days = days_of(settings.retention)
    if days is None or not LEAST_DAYS <= days <= MOST_DAYS:
        yield f"audit.retention must be {LEAST_DAYS}d to {MOST_DAYS}d"
    files = (settings.checkpoint, settings.key, *settings.witnesses, settings.shipped or "/")
    if not all(Path(name).is_absolute() for name in files):
        yield "files of audit must be absolute paths"
    if ships and settings.shipped is None:
        yield "audit.shipped must name the cursor of saw audit ship, because audit_socket is set"
