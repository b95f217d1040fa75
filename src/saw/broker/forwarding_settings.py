"""What of workspaces' ports may be granted to people: the part ``forwarding`` of the broker's configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from saw.mux import may_be_forwarded

MOST_HOURS = 24
"""Longest life of a grant."""
_RANGE = re.compile(r"([1-9][0-9]{3,4})(?:-([1-9][0-9]{3,4}))?")


class ForwardingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``ports``: ports that may be granted, as in ``3000`` or ``3000-3999``. ``max_hours``: the longest life of a grant, 1 to 24.

    ``blueprints``: of whose workspaces alone; absent means of all. The ports of ring 1 are never forwarded.
    """

    ports: tuple[str, ...]
    max_hours: int = 8
    blueprints: tuple[str, ...] | None = None

    def allows(self, port: int) -> bool:
        """Tell whether ``port`` may be granted."""
        return may_be_forwarded(port) and any(low <= port <= high for low, high in map(span_of, self.ports))

    def allows_blueprint(self, name: str) -> bool:
        """Tell whether ports of workspaces of this blueprint may be granted."""
        return self.blueprints is None or name in self.blueprints


def span_of(text: str) -> tuple[int, int]:
    """Return the first and the last port of ``3000`` or ``3000-3999``; what is neither holds no port: ``(1, 0)``."""
    found = _RANGE.fullmatch(text)
    if found is None:
        return 1, 0
    return int(found[1]), int(found[2] or found[1])


def problems_of_forwarding(settings: ForwardingSettings) -> Iterator[str]:
    """Yield what is wrong, naming the field."""
    if not settings.ports:
        yield "forwarding.ports must list ports"
    for text in settings.ports:
        low, high = span_of(text)
        if not 1024 <= low <= high <= 65535:
            yield f"forwarding.ports: {text!r} is no port or range from 1024 to 65535"
    if not 1 <= settings.max_hours <= MOST_HOURS:
        yield f"forwarding.max_hours must be 1 to {MOST_HOURS}"
    if settings.blueprints is not None and not all(settings.blueprints):
        yield "forwarding.blueprints must list names"
