"""What a page gets before it may open the connection of a terminal, and how many may be open at once. Kept in memory alone."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable

import msgspec

from saw.broker.errors import BusyError, ForbiddenError

TICKET_S = 30.0
"""How long a page has from the ticket to the connection, seconds."""
_MAX_TICKETS = 1024


class Ticket(msgspec.Struct, frozen=True):
    """For whom a ticket is: the sign-in (its id), and the workspace."""

    sign_in: str
    workspace: str


class Tickets:
    """Tickets that count once, for :data:`TICKET_S`. ``monotonic`` gives seconds, ``new_secret`` a text that nobody can guess."""

    def __init__(self, monotonic: Callable[[], float], new_secret: Callable[[], str]) -> None:
        self._now = monotonic
        self._new_secret = new_secret
        self._lock = threading.Lock()
        self._open: OrderedDict[str, tuple[Ticket, float]] = OrderedDict()

    def issue(self, ticket: Ticket) -> str:
        """Return the secret of a new ticket; the broker keeps its hash. Each sign-in has one at a time for each workspace."""
        secret = self._new_secret()
        with self._lock:
            for key in [key for key, (found, _) in self._open.items() if found == ticket]:
                del self._open[key]
            self._open[_digest(secret)] = ticket, self._now() + TICKET_S
            while len(self._open) > _MAX_TICKETS:
                self._open.popitem(last=False)
        return secret

    def take(self, secret: str, ticket: Ticket) -> None:
        """Use the ticket up; raise :class:`ForbiddenError` unless it was issued for exactly this and is young enough.

        Whoever shows the secret of a ticket for something else has used that ticket up too.
        """
        with self._lock:
            found, until = self._open.pop(_digest(secret), (None, 0.0))
        if found != ticket or self._now() >= until:
            raise ForbiddenError(
                "the ticket of this terminal was used, is too old or is somebody else's",
                cure="open the terminal from its page again",
                code="ticket_refused",
            )


class Places:
    """How many terminals are open: of each person and of all. Used in the event loop, and looked at elsewhere."""

    def __init__(self, per_person: int, in_all: int) -> None:
        self._per_person = per_person
        self._in_all = in_all
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    def look(self, person: str) -> None:
        """Raise :class:`BusyError` when there is no place for ``person``."""
        with self._lock:
            self._require(person)

    def take(self, person: str) -> None:
        """Take a place; raises as :meth:`look`."""
        with self._lock:
            self._require(person)
            self._held[person] += 1

    def give_back(self, person: str) -> None:
        """Free a place that was taken."""
        with self._lock:
            self._held[person] -= 1
            if not self._held[person]:
                del self._held[person]

    def _require(self, person: str) -> None:
        if self._held[person] >= self._per_person:
            raise BusyError(
                f"you have {self._per_person} terminals open", cure="close one of them", code="too_many_terminals"
            )
        if self._held.total() >= self._in_all:
            raise BusyError(
                f"{self._in_all} terminals are open, as many as may be",
                cure="use saw ssh, or try again later",
                code="too_many_terminals",
            )


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
