"""Times as the broker stores and sends them: UTC, milliseconds, ``Z``; such texts sort in time order."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, date, datetime

from saw.broker.errors import MalformedError

Clock = Callable[[], datetime]
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")


def utc_now() -> datetime:
    """Return the present time; the one place where the broker reads the clock."""
    return datetime.now(UTC)


def iso(time: datetime) -> str:
    """Return ``2026-11-23T07:00:00.000Z`` for an aware ``time``."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_iso(text: str) -> datetime:
    """Read what :func:`iso` wrote."""
    return datetime.fromisoformat(text)


def days(first: str | None, last: str | None, now: datetime, most: int | None = None) -> tuple[str, str]:
    """Return the days (UTC) that somebody asks for: ``last`` is today unless it is named, ``first`` is ``last``.

    Raises :class:`saw.broker.errors.MalformedError` for a text that is no day of the calendar, and for more than ``most`` days.
    """
    last = last or iso(now)[:10]
    first = first or last
    asked = (_day(last) - _day(first)).days + 1
    if most is not None and asked > most:
        raise MalformedError(
            f"from {first} to {last} are {asked} days; {most} can be asked for at a time",
            cure=f"ask for up to {most} days, several times for more",
            code="too_many_days",
        )
    return first, last


def _day(text: str) -> date:
    try:
        if _DAY.match(text):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise MalformedError(f"{text[:20]!r} is not a day", cure="write it as 2026-11-29", code="day_malformed")
