"""Contact with the broker, and the time that signed policy grants a workspace without it (``lease.offline_ttl``).

The grant prolongs what ends in an outage, the lease and the freshness of the state, and nothing else: it needs a question to
the broker that found nobody. A broker that answers anything ends it at once, so what it says, a kill above all, counts.
"""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec

from saw.errors import ConfigError
from saw.files import load_json, write_private
from saw.gateway.replicas import named

LOG = logging.getLogger("saw.gateway")


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``contact.json``: when the broker last answered, and the latest moment of the outage that was seen."""

    format: Literal["saw-perimeter-contact/1"] = "saw-perimeter-contact/1"
    heard_at: datetime
    seen_at: datetime


class Contact:
    """Whether the broker can be reached, and since when not; survives a restart of the gatekeeper.

    ``stale_after_s`` is how long silence is borne without a grant (seconds). ``saved_at`` is when the state in the cache was
    taken in, if there is one: the broker answered then. Times are those of the gatekeeper's clock, which never runs back.
    Each ``replica`` has a file of its own: what one heard says nothing of what another one knows.
    """

    def __init__(self, directory: Path, stale_after_s: float, saved_at: datetime | None, replica: int = 1) -> None:
        self._path = directory / f"{named('contact', replica)}.json"
        self._stale_after_s = stale_after_s
        self._lost = False
        kept = self._load()
        saved = [saved_at] if saved_at else []
        self._heard_at = max([*saved, *([kept.heard_at] if kept else [])], default=None)
        self.not_before = max([*saved, *([kept.seen_at] if kept else [])], default=None)
        """The latest moment that an earlier run of the gatekeeper saw: the clock may not start before it."""

    def _load(self) -> _Kept | None:
        try:
            kept = load_json(self._path, _Kept)
        except ConfigError:
            return None
        return kept if kept.heard_at.tzinfo and kept.seen_at.tzinfo else None

    def heard(self, now: datetime) -> None:
        """Note a state that was taken in at ``now``."""
        self._lost, self._heard_at = False, now

    def reached(self) -> None:
        """Note that the broker answered, whatever it answered: no outage, no time offline."""
        self._lost = False

    def lost(self, now: datetime) -> None:
        """Note that a question found nobody. What cannot be kept on disk does not count, and there is no time offline."""
        if self._heard_at is None:
            return
        try:
            write_private(self._path, msgspec.json.encode(_Kept(heard_at=self._heard_at, seen_at=now)))
        except OSError:
            LOG.exception("the outage of the broker cannot be kept in %s, so nobody gets time offline", self._path)
            self._lost = False
            return
        self._lost = True

    def offline_s(self, granted_s: float, now: datetime) -> float:
        """Return by how many seconds lease and freshness are prolonged at ``now`` under a grant of ``granted_s``.

        It is the whole grant, or 0 while the broker answers and once silence has lasted longer than the grant allows.
        """
        if not self._lost or self._heard_at is None:
            return 0.0
        silence = (now - self._heard_at).total_seconds()
        return granted_s if silence <= self._stale_after_s + granted_s else 0.0
