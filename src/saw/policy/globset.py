"""Many globs against one text at once: the cost grows with the segments of the text and hardly with the number of globs.

The globs become one automaton over whole segments, whose set of states is the bits of one integer (bit-parallel simulation,
Baeza-Yates and Gonnet 1992). A glob is a sequence of segments; each has one bit, behind a start bit of its own. It accepts at
its last bit, so those bits, in the order of the globs, name the globs that matched. Meaning: :mod:`saw.policy.globs`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

from saw.policy import globs

BORDER = "//"
"""A segment that stands between a host and a path, and equals nothing in either."""
_DENSE_SHARE = 256


def path_segments(glob: str) -> list[str]:
    """Return the segments of a path glob, or of a path."""
    return glob.split("/")[1:]


def address_segments(host: str, path: str) -> list[str]:
    """Return the segments of a host glob, the border, and those of a path glob."""
    return [*host.split("."), BORDER, *path_segments(path)]


def is_mixed(segment: str) -> bool:
    """Return whether a wildcard stands beside literal text in ``segment``; only these are tried one by one."""
    return "*" in segment and segment not in {"*", "**"}


def mixed_key(segment: str) -> tuple[str, str]:
    """Return the longest text that every match of a mixed ``segment`` has, and where: ``head``, ``tail`` or ``middle``."""
    head, *middle, tail = segment.split("*")
    places = [("head", head), ("tail", tail), *(("middle", literal) for literal in middle)]
    return max(places, key=lambda place: len(place[1]))


class BitTable:
    """The bits that belong to each key. Keys with few bits keep their places, so that memory stays linear."""

    __slots__ = ("_dense", "_sparse", "base")

    def __init__(self, places: Mapping[Hashable, Sequence[int]], width: int, base: int = 0) -> None:
        self.base = base
        self._dense: dict[Hashable, int] = {}
        self._sparse: dict[Hashable, tuple[int, ...]] = {}
        for key, found in places.items():
            if len(found) * _DENSE_SHARE > width:
                self._dense[key] = base | bits_of(found, width)
            else:
                self._sparse[key] = tuple(found)

    def get(self, key: Hashable) -> int:
        """Return the bits of ``key``, and those that every key has."""
        dense = self._dense.get(key)
        if dense is not None:
            return dense
        mask = self.base
        for place in self._sparse.get(key, ()):
            mask |= 1 << place
        return mask


def bits_of(places: Iterable[int], width: int) -> int:
    """Return the integer with these bits, in time linear in ``width`` and the number of places."""
    raw = bytearray(width // 8 + 1)
    for place in places:
        raw[place >> 3] |= 1 << (place & 7)
    return int.from_bytes(raw, "little")


def places_of(mask: int) -> Iterator[int]:
    """Yield the places of the bits in ``mask``, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class GlobSet:
    """Globs, given as segments.

    ``start`` is the state before the first segment; ``accepts[i]`` the place of glob ``i`` when all of it matched,
    ``borders[i]`` when its host did, ``accepting`` all bits of ``accepts``; ``width`` how many places there are.
    """

    __slots__ = (
        "_border",
        "_final",
        "_literal",
        "_loop",
        "_mixed",
        "_mixed_bits",
        "_mixed_keys",
        "_mixed_lengths",
        "_nonempty",
        "accepting",
        "accepts",
        "borders",
        "start",
        "width",
    )

    def __init__(self, patterns: Sequence[Sequence[str]]) -> None:
        literal: dict[Hashable, list[int]] = {}
        start: list[int] = []
        loop: list[int] = []
        final: list[int] = []
        nonempty: list[int] = []
        border: list[int] = []
        mixed: list[tuple[int, str]] = []
        self._mixed: dict[int, re.Pattern[str]] = {}
        self.accepts: list[int] = []
        self.borders = border
        place = 0
        for segments in patterns:
            start.append(place)
            for index, segment in enumerate(segments):
                following = segments[index + 1] if index + 1 < len(segments) else None
                if segment == "**" and following is not None and BORDER not in segments[index:]:
                    loop.append(place)  # any number of segments may pass before the next one
                    continue
                place += 1
                if segment == "**":
                    # The last of a path takes any segment; the first of a host none that is empty.
                    (final if following is None else nonempty).append(place)
                    loop.append(place)
                elif segment == BORDER:
                    border.append(place)
                elif segment == "*":
                    nonempty.append(place)
                elif is_mixed(segment):
                    self._mixed[place] = globs.segment_glob(segment)
                    mixed.append((place, segment))
                else:
                    literal.setdefault(segment, []).append(place)
            self.accepts.append(place)
            place += 1
        self.width = place
        self.start = bits_of(start, place)
        self.accepting = bits_of(self.accepts, place)
        self._loop = bits_of(loop, place)
        self._final = bits_of(final, place)
        self._nonempty = self._final | bits_of(nonempty, place)
        self._border = bits_of(border, place)
        self._mixed_bits = bits_of(self._mixed, place)
        keys: dict[Hashable, list[int]] = {}
        for at, text in mixed:
            keys.setdefault(mixed_key(text), []).append(at)
        self._mixed_keys = BitTable(keys, place)
        lengths = {(kind, len(literal)) for kind, literal in (mixed_key(text) for _, text in mixed)}
        self._mixed_lengths = tuple(sorted(lengths))
        self._literal = BitTable(literal, place, self._nonempty)

    def walk(self, state: int, segments: Iterable[str]) -> int:
        """Return the state after ``segments``; zero when no glob can match any more."""
        for segment in segments:
            if not state:
                return 0
            ahead = state << 1
            if segment == BORDER:
                state = ahead & self._border
                continue
            found = ahead & (self._literal.get(segment) if segment else self._empty())
            live = ahead & self._mixed_bits
            if live:
                for place in places_of(live & self._promising(segment)):
                    if self._mixed[place].fullmatch(segment):
                        found |= 1 << place
            state = found | (state & self._loop)
        return state

    def _promising(self, segment: str) -> int:
        """Return the bits of the mixed segments of which ``segment`` has the literal text of their key."""
        found = 0
        for kind, length in self._mixed_lengths:
            if kind == "head":
                found |= self._mixed_keys.get((kind, segment[:length]))
            elif kind == "tail":
                found |= self._mixed_keys.get((kind, segment[-length:]))
            else:
                for at in range(len(segment) - length + 1):
                    found |= self._mixed_keys.get((kind, segment[at : at + length]))
        return found

    def _empty(self) -> int:
        """Return the bits that take an empty segment."""
        return (self._literal.get("") ^ self._nonempty) | self._final
