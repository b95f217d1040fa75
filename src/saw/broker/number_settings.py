"""The part ``numbers`` of the broker's configuration: which numbers workspaces get (docs/scale.md)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import msgspec

from saw.addressing import DEFAULT_MOST, Band, Number


class NumberSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which numbers workspaces get (the part ``numbers`` of the broker's configuration, docs/scale.md).

    ``most``: the highest number of a workspace that is registered without a place. ``places``: bands of numbers kept for one
    perimeter each, by name; a workspace gets one of them by naming the place when it is registered, and in no other way.
    """

    most: Number = DEFAULT_MOST
    places: dict[str, Band] = {}

    def bands(self, place: str) -> Iterator[Band]:
        """Yield the numbers for ``place``, in order; empty: those up to ``most`` that no place has."""
        if place:
            yield self.places[place]
            return
        first = 1
        for band in sorted(self.places.values()):
            if band.first > first:
                yield Band(first, min(band.first - 1, self.most))
            first = max(first, band.last + 1)
            if first > self.most:
                return
        yield Band(first, self.most)


def problems_of_numbers(settings: NumberSettings) -> Iterator[str]:
    """Yield what is wrong with ``settings``, naming the field."""
    bands = sorted((band, name) for name, band in settings.places.items())
    for band, name in bands:
        if not name or len(name) > 64:
            yield "numbers.places must have names of 1 to 64 characters"
        if band.first > band.last:
            yield f"numbers.places.{name}: first is above last"
    for (one, name), (other, its) in pairwise(bands):
        if one.meets(other):
            yield f"numbers.places.{name} and numbers.places.{its} share numbers"
