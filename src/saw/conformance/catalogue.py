"""Every case and every twin, by id."""

from __future__ import annotations

from functools import cache

from saw.conformance import (
    catalogue_bodies,
    catalogue_far,
    catalogue_host,
    catalogue_mcp,
    catalogue_network,
    catalogue_persistence,
    catalogue_protocol,
    catalogue_web,
)
from saw.conformance.case import SUITES, Case
from saw.errors import ConfigError

_PARTS = (
    catalogue_network,
    catalogue_host,
    catalogue_persistence,
    catalogue_web,
    catalogue_bodies,
    catalogue_mcp,
    catalogue_protocol,
    catalogue_far,
)


@cache
def attacks() -> tuple[Case, ...]:
    """Return the attacks, in the order of the suites."""
    found = [case for part in _PARTS for case in part.cases()]
    return tuple(sorted(found, key=lambda case: SUITES.index(case.suite)))


@cache
def twins() -> dict[str, Case]:
    """Return the allowed twins by id."""
    return {case.id: case for part in _PARTS for case in part.twins()}


def select(suites: list[str]) -> tuple[Case, ...]:
    """Return the attacks of the named suites (none: of all); raise :class:`ConfigError` for an unknown name."""
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise ConfigError(f"there is no suite {unknown[0]!r}", cure=f"name one of {', '.join(SUITES)}")
    return tuple(case for case in attacks() if not suites or case.suite in suites)
