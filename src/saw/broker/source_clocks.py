"""Clocks of those who ship events: how far they are from the broker's, and a finding where that is too far to compare times.

Order never hangs on clocks. Within a source the chain's numbers count, across sources the order of arrival, and beside its own
time each event has that of its arrival by the broker's clock. What a wrong clock spoils is reading: a search by time misses, and
an event seems to come before its cause. So it is said, once an hour for each source and broker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial

import msgspec
from starlette.datastructures import Headers

from saw.audit import ChainedEvent
from saw.broker.context import Caller, Services
from saw.broker.errors import MalformedError
from saw.broker.store import Transaction

HEADER = "x-saw-time"
"""In a shipment: the sender's clock as it is sent, milliseconds since 1970 (UTC)."""
BOUND = timedelta(seconds=60)
"""How far a clock may be away; a lease is 120 seconds."""
EVERY = timedelta(hours=1)
KIND = "clock_skew"


class _Seen(msgspec.Struct, frozen=True):
    """Of one source: how many shipments in a row came from a clock that is behind, and when that was told."""

    behind: int = 0
    told: datetime | None = None


def sent_at(headers: Headers) -> int | None:
    """Return what :data:`HEADER` says, None without it; raise :class:`MalformedError` for what is no such time."""
    text = headers.get(HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise MalformedError(f"{HEADER} must be milliseconds since 1970", cure="leave it out, or send the time")
    return int(text)


class SourceClocks:
    """What this broker has seen of the clocks of sources; in memory, so a broker that was started again tells once more."""

    def __init__(self, services: Services) -> None:
        self._s = services
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()

    def judge(
        self, tx: Transaction, caller: Caller, source: str, events: tuple[ChainedEvent, ...], sent: int | None
    ) -> Callable[[], None]:
        """Record a finding in ``tx`` when the clock of ``source`` is more than :data:`BOUND` away.

        ``sent`` is its clock at sending, where it told; else only an event of the future gives it away, since old ones may have
        waited. A clock that is behind is believed to be so at the second shipment in a row: one may have been on its way, or
        the broker stood still. Call what is returned once ``tx`` has succeeded: until then nothing is remembered.
        """
        now = self._s.clock()
        present = int(now.timestamp() * 1000)
        newest = max((_time(item) for item in events), default=0)
        ahead = (newest if sent is None else sent) - present
        far = abs(ahead) > BOUND.total_seconds() * 1000 and (sent is not None or ahead > 0)
        with self._lock:
            before = self._seen.get(source, _Seen())
        behind = before.behind + 1 if far and ahead < 0 else 0
        if not far:
            return partial(self._keep, source, _Seen())
        if behind == 1 or (before.told is not None and timedelta(0) <= now - before.told < EVERY):
            return partial(self._keep, source, _Seen(behind, before.told))
        seconds, how = abs(ahead) // 1000, "ahead of" if ahead > 0 else "behind"
        tx.record(
            self._s.events.detection_finding(
                now,
                caller.subject(),
                kind=KIND,
                title=f"The clock of {source} is {seconds} seconds {how} the broker's",
                description="Times of its events cannot be compared with others; numbers and the order of arrival count.",
                severity="medium",
                detail={
                    "source": source,
                    "ahead_s": seconds if ahead > 0 else -seconds,
                    "by": "event" if sent is None else "sender",
                },
            )
        )
        return partial(self._keep, source, _Seen(behind, now))

    def _keep(self, source: str, seen: _Seen) -> None:
        with self._lock:
            self._seen[source] = seen


def _time(item: ChainedEvent) -> int:
    found = item.event.get("time", 0)
    return found if isinstance(found, int) else 0
