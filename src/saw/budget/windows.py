"""The calendar periods that a limit counts in, in UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Literal

Period = Literal["day", "week", "month"]


def window(period: Period, time: datetime) -> tuple[datetime, datetime]:
    """Return the start and the end (exclusive) of the calendar period in UTC that holds ``time``; weeks start on Monday."""
    day = time.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return day, day + timedelta(days=1)
    if period == "week":
        start = day - timedelta(days=day.weekday())
        return start, start + timedelta(days=7)
    start = day.replace(day=1)
    return start, (start + timedelta(days=32)).replace(day=1)
