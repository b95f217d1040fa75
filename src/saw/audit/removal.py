"""What retention removes from the trail, and how it says so: a removed event leaves its place, number and hash behind.

An event without content is an empty object. Its hash still links its neighbours and is still a leaf of the tree; that nobody
else emptied it is known from a later event of the broker's chain that names it (control AUD-02).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec

from saw.audit.chain import ChainedEvent, ChainError, event_hash

#: The operation of the event that tells of a removal, and the chain in which alone it counts.
OPERATION = "audit.retention.remove"
TELLER = "broker"
LATEST = 253_402_300_800_000
"""The year 10000, milliseconds since 1970: no date says it, or anything later."""
_Number = Annotated[int, msgspec.Meta(ge=1)]


class Ranges(msgspec.Struct, frozen=True):
    """Numbers of one chain, first and last of each range."""

    source: str
    ranges: tuple[tuple[_Number, _Number], ...]


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """What one event says that retention removed.

    ``chains``: which events. ``count``: how many. ``first`` and ``last``: times of the oldest and the youngest of them,
    ``before``: younger ones were left (all milliseconds since 1970 UTC). ``days``: the retention. ``size`` and ``root``: the
    signed tree that holds all of them (root in lower-case hex).
    """

    chains: tuple[Ranges, ...]
    count: _Number
    first: int
    last: int
    before: int
    days: int
    size: _Number
    root: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Removals:
    """All removals that a trail tells of."""

    def __init__(self, told: Iterable[ChainedEvent] = ()) -> None:
        self._ranges: dict[str, list[tuple[int, int]]] = {}
        #: What was told, in order, without what is not clear.
        self.told: list[Removal] = []
        self._sorted = True
        for item in told:
            self.add(item)

    def add(self, item: ChainedEvent) -> None:
        """Note what ``item`` tells, if it does: an unchanged event of the broker's chain, about events before it."""
        found = removal_of(item.source, item.event)
        if found is None or not _unchanged(item):
            return
        for chain in found.chains:
            # What comes after an event is not told by it.
            last = item.seq - 1 if chain.source == TELLER else 2**63
            kept = self._ranges.setdefault(chain.source, [])
            kept.extend((first, min(end, last)) for first, end in chain.ranges if first <= min(end, last))
            self._sorted = False
        self.told.append(found)

    def tell(self, source: str, seq: int) -> bool:
        """Tell whether a removal names the event ``seq`` of ``source``."""
        if not self._sorted:
            for kept in self._ranges.values():
                kept.sort()
            self._sorted = True
        ranges = self._ranges.get(source, [])
        # Retention removes nothing twice, so ranges do not overlap; where somebody made them, fewer are found, not more.
        place = bisect_right(ranges, (seq, 2**63)) - 1
        return place >= 0 and ranges[place][0] <= seq <= ranges[place][1]

    def span(self) -> tuple[int, int] | None:
        """Return the times of the oldest and the youngest event that was removed, None when none was."""
        if not self.told:
            return None
        return min(one.first for one in self.told), max(one.last for one in self.told)


def moment(milliseconds: int) -> str:
    """Return a time in milliseconds since 1970 as RFC 3339 in UTC; what no date can say becomes the nearest."""
    time = datetime.fromtimestamp(max(0, min(milliseconds, LATEST - 1)) / 1000, UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_removed(item: ChainedEvent) -> bool:
    """Tell whether the content of ``item`` is gone."""
    return not item.event


def removal_of(source: str, event: Mapping[str, Any]) -> Removal | None:
    """Return what ``event`` of the chain ``source`` says of a removal, None when it says nothing clear."""
    if source != TELLER or not isinstance(api := event.get("api"), Mapping) or api.get("operation") != OPERATION:
        return None
    unmapped = event.get("unmapped")
    ours = unmapped.get("saw") if isinstance(unmapped, Mapping) else None
    try:
        return msgspec.convert(ours.get("removed") if isinstance(ours, Mapping) else None, Removal)
    except msgspec.ValidationError:
        return None


def ranges_of(places: Iterable[tuple[str, int]]) -> tuple[Ranges, ...]:
    """Return chains and numbers of ``places`` as ranges, in order."""
    found: dict[str, list[tuple[int, int]]] = {}
    for source, seq in sorted(places):
        ranges = found.setdefault(source, [])
        if ranges and ranges[-1][1] == seq - 1:
            ranges[-1] = (ranges[-1][0], seq)
        else:
            ranges.append((seq, seq))
    return tuple(Ranges(source, tuple(ranges)) for source, ranges in found.items())


def _unchanged(item: ChainedEvent) -> bool:
    try:
        return event_hash(item.source, item.seq, item.prev, item.event) == item.hash
    except ChainError:
        return False
