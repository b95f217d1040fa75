"""One-time tickets: how the gatekeeper recognises its own decision when Envoy brings the call that it was about.

A ticket is 32 random bytes, kept in memory only, good once, for seconds, and for one method, authority and target.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Generic, TypeVar

from saw.errors import SawError

LIFE_S = 15.0
"""How long a ticket is good (seconds); Envoy brings it back at once."""
MOST = 1024
"""How many tickets may be out at a time."""

T = TypeVar("T")
Bound = tuple[str, str, str]
"""Method, authority and target (path with query)."""


class TicketsOut(SawError):
    """Too many calls are between decision and service."""

    code = "gatekeeper_unavailable"


class Tickets(Generic[T]):
    """The tickets that are out, each for a value of ``T``. ``monotonic`` returns seconds, ``random`` so many secret bytes."""

    def __init__(
        self, monotonic: Callable[[], float], random: Callable[[int], bytes] = secrets.token_bytes, most: int = MOST
    ) -> None:
        self._monotonic = monotonic
        self._random = random
        self._most = most
        self._out: dict[bytes, tuple[str, Bound, float, T]] = {}

    def issue(self, bound: Bound, value: T) -> str:
        """Return a new ticket (43 characters of URL-safe base64); raise :class:`TicketsOut` when too many are out."""
        now = self._monotonic()
        if len(self._out) >= self._most:
            self._out = {key: item for key, item in self._out.items() if now < item[2]}
        if len(self._out) >= self._most:
            raise TicketsOut(f"{self._most} tickets are out", cure="try again shortly")
        ticket = base64.urlsafe_b64encode(self._random(32)).rstrip(b"=").decode()
        self._out[_key(ticket)] = (ticket, bound, now + LIFE_S, value)
        return ticket

    def redeem(self, ticket: str, bound: Bound) -> T | None:
        """Return what the ticket was issued for, or None; whatever the outcome, the ticket is spent."""
        found = self._out.pop(_key(ticket), None)
        if found is None:
            return None
        issued, wanted, ends, value = found
        same = hmac.compare_digest(issued.encode(), ticket.encode("utf-8", "surrogatepass"))
        same &= all(
            hmac.compare_digest(a.encode("utf-8", "surrogatepass"), b.encode("utf-8", "surrogatepass"))
            for a, b in zip(wanted, bound, strict=True)
        )
        return value if same and self._monotonic() < ends else None

    def drop(self, ticket: str) -> bool:
        """Take a ticket back; return whether it was still out, which means that nobody used it."""
        return self._out.pop(_key(ticket), None) is not None


def _key(ticket: str) -> bytes:
    return hashlib.sha256(ticket.encode("utf-8", "surrogatepass")).digest()
