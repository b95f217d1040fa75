"""Times as the broker stores and sends them: UTC, milliseconds, ``Z``; such texts sort in time order."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the present time; the one place where the broker reads the clock."""
    return datetime.now(UTC)


def iso(time: datetime) -> str:
    """Return ``2026-11-23T07:00:00.000Z`` for an aware ``time``."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_iso(text: str) -> datetime:
    """Read what :func:`iso` wrote."""
    return datetime.fromisoformat(text)
