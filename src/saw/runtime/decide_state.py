"""What a decision of ring 1 rests on: the generation in force, the lease, and the life of policyd.

All three are read from files that others replace; each is checked for every request, and what cannot be read counts as
absent. Absence refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import msgspec

from saw import jsontext
from saw.errors import SawError
from saw.runtime import generation

Clock = Callable[[], datetime]
Monotonic = Callable[[], float]
_RETRY_AFTER = 1.0


class LeaseFile(msgspec.Struct, frozen=True):
    """``lease.json`` as far as ring 1 reads it; ``expires_at`` is the broker's, RFC 3339 with zone."""

    expires_at: datetime


class HeartbeatFile(msgspec.Struct, frozen=True):
    """``heartbeat``: when policyd last went round, in seconds of the boot clock (counts suspends, cannot be set)."""

    boottime: float


class Generations:
    """Holds the compiled generation in force and follows ``current``.

    A generation that does not verify is not loaded: the one before stays in memory, and ``problem`` says why.
    """

    def __init__(self, root: Path, monotonic: Monotonic) -> None:
        self._root = root
        self._monotonic = monotonic
        self._seen: str | None = None
        self._failed_at = 0.0
        self.loaded: generation.Loaded | None = None
        self.problem = ""

    def get(self) -> generation.Loaded | None:
        """Return the generation to decide with now, loading a new one when ``current`` moved."""
        name = generation.current(self._root)
        if name == self._seen and not (self.problem and self._monotonic() - self._failed_at >= _RETRY_AFTER):
            return self.loaded
        self._seen = name
        self.problem = ""
        if name is None or name == generation.CLOSED:
            self.loaded = None
            return None
        if self.loaded is not None and self.loaded.digest == name:
            return self.loaded
        try:
            self.loaded = generation.load(self._root, name)
        except (SawError, OSError, ValueError, KeyError, AttributeError, TypeError, msgspec.MsgspecError) as error:
            self.problem = str(error)
            self._failed_at = self._monotonic()
        return self.loaded


class Watched:
    """A small JSON file, decoded again only when it was replaced or rewritten."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._raw: bytes | None = None

    def read(self) -> tuple[bytes | None, bool]:
        """Return the content (None when unreadable) and whether it is new since the last call."""
        try:
            state = self._path.stat()
            stamp = (state.st_ino, state.st_mtime_ns, state.st_size)
            if stamp == self._stamp:
                return self._raw, False
            self._raw = self._path.read_bytes()
            self._stamp = stamp
        except OSError:
            self._raw = self._stamp = None
        return self._raw, True


class Lease:
    """Says whether the workspace's lease runs.

    Its end is kept on two clocks from the moment the file appears: setting the wall clock back does not lengthen it.
    """

    def __init__(self, path: Path, wall: Clock, boottime: Monotonic) -> None:
        self._file = Watched(path)
        self._wall = wall
        self._boottime = boottime
        self._expires_at: datetime | None = None
        self._deadline = 0.0

    def refusal(self) -> str:
        """Return why nothing may be allowed now, or an empty string."""
        raw, new = self._file.read()
        if new:
            self._expires_at = None
            if raw is not None:
                try:
                    self._expires_at = jsontext.decode(raw, kind=LeaseFile).expires_at
                    self._deadline = self._boottime() + (self._expires_at - self._wall()).total_seconds()
                except (msgspec.MsgspecError, TypeError):
                    self._expires_at = None
        if self._expires_at is None:
            return "this workspace holds no lease: it has not been attested, or attestation was refused"
        if self._wall() >= self._expires_at or self._boottime() >= self._deadline:
            return f"the lease ended at {self._expires_at.isoformat()} and was not renewed"
        return ""


class Heartbeat:
    """Says whether policyd has gone round its loop within ``limit`` seconds."""

    def __init__(self, path: Path, limit: float, boottime: Monotonic) -> None:
        self._file = Watched(path)
        self._limit = limit
        self._boottime = boottime
        self._last: float | None = None

    def refusal(self) -> str:
        """Return why nothing may be allowed now, or an empty string."""
        raw, new = self._file.read()
        if new:
            try:
                self._last = None if raw is None else jsontext.decode(raw, kind=HeartbeatFile).boottime
            except msgspec.MsgspecError:
                self._last = None
        now = self._boottime()
        if self._last is None or not 0 <= now - self._last <= self._limit:
            return "the policy agent of this workspace is not running, so the policy cannot be shown to be current"
        return ""
