"""When a rollout must stop: counts of last words and deny rates against the limits of the configuration. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from saw.broker.config import RolloutSettings


class Calls(msgspec.Struct, frozen=True):
    """Calls that ring 2 decided under one policy."""

    allowed: int = 0
    denied: int = 0

    @property
    def total(self) -> int:
        """How many calls were decided."""
        return self.allowed + self.denied

    @property
    def deny_rate(self) -> float:
        """The share of denied calls, 0 to 1; 0 without any call."""
        return self.denied / self.total if self.total else 0.0


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Last words on a release; ``silent`` are those of ``waiting``, ``offered`` and ``verified`` that are overdue."""

    waiting: int = 0
    offered: int = 0
    verified: int = 0
    loaded: int = 0
    refused: int = 0
    silent: int = 0

    @property
    def open(self) -> int:
        """How many workspaces have not come to an end."""
        return self.waiting + self.offered + self.verified


def count(words: Iterable[tuple[str, bool]]) -> Counts:
    """Count (last word, is silent) pairs."""
    held = list(words)
    found = Counter(word for word, _ in held)
    return Counts(**dict(found), silent=sum(1 for _, silent in held if silent))


def crossed(limits: RolloutSettings, counts: Counts, calls: Calls, before: Calls) -> tuple[str, ...]:
    """Return which limits are crossed, in words; empty when the rollout may go on.

    Deny rates are compared once each policy has decided ``min_calls`` calls: few calls say nothing.
    """
    found: list[str] = []
    if counts.refused > limits.max_refused:
        found.append(f"max_refused: {counts.refused} workspaces refused it, {limits.max_refused} may")
    if counts.silent:
        found.append(f"max_silent_s: {counts.silent} workspaces said nothing for {limits.max_silent_s} s")
    if min(calls.total, before.total) >= limits.min_calls:
        increase = calls.deny_rate - before.deny_rate
        if increase > limits.max_deny_rate_increase:
            found.append(
                f"max_deny_rate_increase: {calls.deny_rate:.1%} of {calls.total} calls are denied, "
                f"{before.deny_rate:.1%} of {before.total} were before"
            )
    return tuple(found)
