"""How one text becomes another, line by line: the same answer everywhere, in bounded work.

The method is E. Myers, "An O(ND) Difference Algorithm and Its Variations" (1986). It is not taken from the standard
library, because a reviewer signs the digest of what comes out, on a machine whose Python is another than the broker's.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_STEPS = 2_000_000
"""Most steps for all files of one push; where they are used up, the whole old text is shown as removed and the new as added."""
MAX_EDITS = 1000
"""Most lines by which two texts may differ to be compared by the method; beyond that as above."""
CONTEXT = 3
"""Unchanged lines that are shown around a change."""

Line = tuple[str, int]
"""``-`` and the index of an old line, ``+`` and the index of a new one, or a blank and the index of the old one."""


class Effort:
    """What is left of the work that one push may cause."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self.left = steps


def diff_lines(old: Sequence[bytes], new: Sequence[bytes], effort: Effort) -> list[Line]:
    """Return every line of both texts in order, unchanged ones once."""
    start = 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        start += 1
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    middle = _middle(old[start : len(old) - end], new[start : len(new) - end], effort)
    made: list[Line] = [(" ", at) for at in range(start)]
    made += [(sign, at + start) for sign, at in middle]
    return made + [(" ", at) for at in range(len(old) - end, len(old))]


def hunks(lines: Sequence[Line]) -> list[tuple[int, int]]:
    """Return the parts of ``lines`` (from, to) that hold changes, each with :data:`CONTEXT` unchanged lines around it."""
    found: list[tuple[int, int]] = []
    for at, (sign, _) in enumerate(lines):
        if sign == " ":
            continue
        begin, end = max(0, at - CONTEXT), min(len(lines), at + CONTEXT + 1)
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found


def _middle(old: Sequence[bytes], new: Sequence[bytes], effort: Effort) -> list[Line]:
    """Compare two texts whose first and last lines differ."""
    whole: list[Line] = [("-", at) for at in range(len(old))]
    whole += [("+", at) for at in range(len(new))]
    if not old or not new:
        return whole
    furthest = {1: 0}
    trace: list[dict[int, int]] = []
    for edits in range(min(len(old) + len(new), MAX_EDITS) + 1):
        trace.append(dict(furthest))
        for diagonal in range(-edits, edits + 1, 2):
            down = diagonal == -edits or (diagonal != edits and furthest[diagonal - 1] < furthest[diagonal + 1])
            x = furthest[diagonal + 1] if down else furthest[diagonal - 1] + 1
            y = x - diagonal
            begun = x
            while x < len(old) and y < len(new) and old[x] == new[y]:
                x, y = x + 1, y + 1
            furthest[diagonal] = x
            effort.left -= 1 + x - begun
            if x >= len(old) and y >= len(new):
                return _way_back(trace, len(old), len(new))
        # What is kept for the way back counts as well.
        effort.left -= edits
        if effort.left <= 0:
            break
    return whole


def _way_back(trace: list[dict[int, int]], x: int, y: int) -> list[Line]:
    found: list[Line] = []
    for edits in range(len(trace) - 1, -1, -1):
        furthest, diagonal = trace[edits], x - y
        down = diagonal == -edits or (diagonal != edits and furthest[diagonal - 1] < furthest[diagonal + 1])
        old_x = furthest[diagonal + 1 if down else diagonal - 1]
        old_y = old_x - (diagonal + 1 if down else diagonal - 1)
        while x > old_x and y > old_y:
            x, y = x - 1, y - 1
            found.append((" ", x))
        if edits:
            found.append(("+", old_y) if down else ("-", old_x))
        x, y = old_x, old_y
    found.reverse()
    return found
