"""How many calls ring 1 allowed and denied under each policy, for the policy agent to report.

Kept in memory since the service started, of the two newest policies that decided something. Reasons are ours, so their number
is bounded; nothing of a call itself is kept.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

import msgspec

from saw.policy.model import Decision

_KEPT = 2


class Counted(msgspec.Struct, frozen=True):
    """Calls decided under one policy: how many were allowed, and how many denied by reason."""

    allowed: int = 0
    denied: dict[str, int] = {}

    def since(self, before: Counted) -> Counted:
        """Return what was added since ``before``."""
        denied = {reason: number - before.denied.get(reason, 0) for reason, number in self.denied.items()}
        return Counted(self.allowed - before.allowed, {reason: number for reason, number in denied.items() if number})

    @property
    def any(self) -> bool:
        """Tell whether anything was counted."""
        return bool(self.allowed or self.denied)


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """``GET /counts`` of the decision service; ``started`` (boot clock, seconds) tells one start from the next."""

    started: float
    policies: dict[str, Counted]


class Counts:
    """Counts decisions by policy; ``started`` is the time of the service's start on the boot clock."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._allowed: Counter[str] = Counter()
        self._denied: OrderedDict[str, Counter[str]] = OrderedDict()

    def add(self, digest: str, decision: Decision, *, tunnel: bool) -> None:
        """Count a decision under the policy ``digest``. An allowed ``tunnel`` is no call yet: what is asked inside is."""
        if not digest or (decision.allowed and tunnel):
            return
        if digest not in self._denied:
            self._denied[digest] = Counter()
            while len(self._denied) > _KEPT:
                gone, _ = self._denied.popitem(last=False)
                del self._allowed[gone]
        if decision.allowed:
            self._allowed[digest] += 1
        else:
            self._denied[digest][decision.reason] += 1

    def totals(self) -> Totals:
        """Return everything that was counted since the start."""
        policies = {digest: Counted(self._allowed[digest], dict(denied)) for digest, denied in self._denied.items()}
        return Totals(started=self._started, policies=policies)
