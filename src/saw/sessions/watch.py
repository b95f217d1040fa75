"""Waits beside a live session for the broker's word that it must end, and keeps how long ago the broker last answered."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

from saw.errors import SawError
from saw.sessions.link import BrokerLink

_RETRY_S = 0.2
_RETRY_MOST_S = 2.0
_LONGEST_WAIT_S = 10


class Watch:
    """A thread with a long-poll. ``wake`` is a descriptor to which a byte is written when there is news."""

    def __init__(
        self, link: BrokerLink, session: str, lease_s: float, wake: int, monotonic: Callable[[], float]
    ) -> None:
        self._link = link
        self._session = session
        self._lease = lease_s
        self._wake = wake
        self._now = monotonic
        self._stop = threading.Event()
        self.heard_at = monotonic()
        self.reason = ""
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to wait."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._stop.set()

    @property
    def lease_left_s(self) -> float:
        """How long the session may go on without another answer (seconds)."""
        return self.heard_at + self._lease - self._now()

    def _run(self) -> None:
        wait = max(1, min(_LONGEST_WAIT_S, int(self._lease / 3)))
        pause = _RETRY_S
        while not self._stop.is_set():
            try:
                found = self._link.watch(self._session, wait, wait + self._lease / 3)
            except SawError:
                # Whatever the broker refuses, it did not say that the session goes on: the lease runs out.
                self._stop.wait(pause)
                pause = min(pause * 2, _RETRY_MOST_S)
                continue
            pause = _RETRY_S
            if found.state == "ended":
                self.reason = found.reason or "ended"
                with contextlib.suppress(OSError):
                    os.write(self._wake, b"!")
                return
            self.heard_at = self._now()
