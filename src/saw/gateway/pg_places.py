"""How many sessions of PostgreSQL there may be at a time, and how many connections that may still become one.

What comes is counted before it is read, by workspace, so that no workspace keeps the sessions of others out by saying nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MOST, MOST_EACH = 512, 64
"""How many sessions may be open at a time, of all workspaces and of one."""
STARTING_EACH = 32
"""How many connections of a workspace may be there that have not said yet how they start."""
ROOM, ROOM_EACH = 64, 8
"""How many of those are taken beside as many sessions as may be open: what cancels a statement comes on one of its own."""


class Places:
    """The connections that are there: ``starting`` those that have said nothing yet or cancel, ``open`` sessions."""

    def __init__(self) -> None:
        self.starting: Counter[str] = Counter()
        self.open: Counter[str] = Counter()

    def full(self, workspace: str) -> bool:
        """Return whether no further connection of this workspace is taken."""
        starting, all_ = self.starting[workspace], self.starting.total() + self.open.total()
        beside = starting + self.open[workspace]
        return starting >= STARTING_EACH or beside >= MOST_EACH + ROOM_EACH or all_ >= MOST + ROOM

    def closed(self, workspace: str) -> bool:
        """Return whether no further session of this workspace is opened."""
        return self.open[workspace] >= MOST_EACH or self.open.total() >= MOST

    @contextmanager
    def start(self, workspace: str) -> Iterator[Callable[[], None]]:
        """Count a connection until the end: as one that starts, and as a session once what is given is called."""
        counter = self.starting
        counter[workspace] += 1

        def opened() -> None:
            nonlocal counter
            _less(counter, workspace)
            counter = self.open
            counter[workspace] += 1

        try:
            yield opened
        finally:
            _less(counter, workspace)


def _less(counter: Counter[str], workspace: str) -> None:
    counter[workspace] -= 1
    if not counter[workspace]:
        del counter[workspace]
