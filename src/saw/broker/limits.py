"""A token bucket for each key, against callers who fill the audit trail."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from saw.broker.errors import BusyError

_MAX_KEYS = 4096


class RateLimit:
    """At most ``burst`` calls at once and ``per_second`` on average for each key. ``monotonic`` gives seconds."""

    def __init__(self, burst: int, per_second: float, monotonic: Callable[[], float]) -> None:
        self._burst = burst
        self._rate = per_second
        self._now = monotonic
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str) -> None:
        """Count one call of ``key``; raise :class:`BusyError` when it exceeds its share."""
        now = self._now()
        with self._lock:
            tokens, since = self._buckets.pop(key, (float(self._burst), now))
            tokens = min(self._burst, tokens + (now - since) * self._rate)
            allowed = tokens >= 1
            self._buckets[key] = (tokens - 1 if allowed else tokens, now)
            while len(self._buckets) > _MAX_KEYS:
                self._buckets.popitem(last=False)
        if not allowed:
            raise BusyError("too many calls", cure="wait a few seconds and try again")
