"""Tells the broker which calls ring 1 denied under the policy in force, so that a policy that is too narrow halts its ring.

A call that ring 1 refuses never reaches ring 2, so nobody outside could count it. Only counts by reason are told, no call.
"""

from __future__ import annotations

from collections.abc import Callable

import httpx
import msgspec

from saw import jsontext
from saw.runtime.decide_counts import Counted, Totals

Tell = Callable[[str, Counted, float], None]
"""(policy digest, calls since the last time, seconds since then); raises ``SawError`` when it was not delivered."""


class CallReports:
    """Reads the decision service's counts and tells what was added, at most every ``every`` seconds.

    ``boottime`` is a clock in seconds. What could not be delivered is told the next time.
    """

    def __init__(self, decide_socket: str, tell: Tell, boottime: Callable[[], float], every: float) -> None:
        self._socket = decide_socket
        self._tell = tell
        self._boottime = boottime
        self._every = every
        self._told: dict[str, Counted] = {}
        self._started = 0.0
        self._at = boottime()

    def report(self, digest: str) -> None:
        """Tell what was denied under ``digest`` since the last time; nothing when nothing was. Raises as ``tell``."""
        now = self._boottime()
        if now - self._at < self._every:
            return
        totals = self._totals()
        if totals is None:
            return
        if totals.started != self._started:
            self._told, self._started = {}, totals.started
        self._told = {known: told for known, told in self._told.items() if known in totals.policies}
        counted = totals.policies.get(digest, Counted())
        added = counted.since(self._told.get(digest, Counted()))
        if added.denied:
            self._tell(digest, added, now - self._at)
        self._told[digest] = counted
        self._at = now

    def _totals(self) -> Totals | None:
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=self._socket), timeout=5) as client:
                return jsontext.decode(client.get("http://decide/counts").content, kind=Totals)
        except (httpx.HTTPError, msgspec.MsgspecError):
            return None
