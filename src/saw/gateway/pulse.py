"""Whether the process stood still for a while: stopped, starved or swapped out, with calls waiting that Envoy has given up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

EVERY_S = 0.5
"""How often the pulse is taken (seconds)."""
STILL_S = 2.0
"""A gap this long is no ordinary load (seconds). Envoy gives up a call after ``AUTHZ_TIMEOUT``, which is longer."""
AFTER_S = 2.0
"""For how long after it calls that had waited may still come to their turn (seconds)."""


class Pulse:
    """``monotonic`` returns seconds."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._at = monotonic()
        self._still_at: float | None = None

    def beat(self) -> None:
        """Note that the process is running."""
        now = self._monotonic()
        if now - self._at > STILL_S:
            self._still_at = now
        self._at = now

    def stood_still(self) -> bool:
        """Return whether what is to be done now may have waited since before a standstill."""
        now = self._monotonic()
        return now - self._at > STILL_S or (self._still_at is not None and now - self._still_at <= AFTER_S)

    async def run_forever(self) -> None:
        """Beat until cancelled."""
        while True:
            self.beat()
            await asyncio.sleep(EVERY_S)
