"""A clock that cannot be turned back to stretch a lease."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime


class Clock:
    """Wall-clock time held against a monotonic clock.

    ``wall`` and ``monotonic`` return seconds. :meth:`now` never runs backwards: when the wall clock is set back it goes
    on from the monotonic clock, and :attr:`doubt` says so once the step is larger than ``bound`` seconds. Only the
    broker's own time (:meth:`confirm`) ends the doubt.
    """

    def __init__(
        self, wall: Callable[[], float], monotonic: Callable[[], float], bound: float, *, not_before: float = 0.0
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._bound = bound
        self._anchor = (max(wall(), not_before), monotonic())
        self._behind = False

    def _expected(self) -> float:
        return self._anchor[0] + (self._monotonic() - self._anchor[1])

    def now(self) -> datetime:
        """Return the time to judge leases by (UTC): the later of the wall clock and what it must have reached."""
        wall, expected = self._wall(), self._expected()
        if wall > expected:
            self._anchor = (wall, self._monotonic())
            return datetime.fromtimestamp(wall, UTC)
        return datetime.fromtimestamp(expected, UTC)

    @property
    def doubt(self) -> str:
        """Return why the clock cannot be trusted to end a lease in time, or an empty text."""
        wall, expected = self._wall(), self._expected()
        if wall < expected - self._bound:
            return f"the clock was set back by {expected - wall:.0f} s"
        return "the clock is behind the broker's" if self._behind else ""

    def confirm(self, broker_now: datetime) -> None:
        """Compare with the time in the broker's answer; agreement makes the wall clock the reference again."""
        wall = self._wall()
        difference = broker_now.timestamp() - wall
        self._behind = difference > self._bound
        if abs(difference) <= self._bound:
            self._anchor = (wall, self._monotonic())
