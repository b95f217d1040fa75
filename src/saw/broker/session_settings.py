"""The part ``sessions`` of the broker's configuration: how people get into workspaces (docs/sessions.md)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

import msgspec

LONGEST_SOURCE = 256
"""Longest list of networks that a certificate counts from (characters)."""


class SessionRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How people get into workspaces (docs/sessions.md).

    ``recorded_only``: certificates that lead to a workspace past the bastion are refused. ``max_duration_s``: how long a
    session may last, seconds. ``lease_s``: how long one goes on without the broker, seconds. ``leg_source``: addresses from
    which bastions reach workspaces, when that is not the perimeter's side of each link. ``source_networks``: networks from
    which bastions see people; certificates count from there alone. Empty: from the address that the broker sees, where it sees
    one. ``max_recording_bytes``: the largest recording that is taken from a bastion. ``keep_recordings_days``: recordings and
    their keys are removed that long after the session; 0 keeps them for ever.
    """

    recorded_only: bool = False
    max_duration_s: int = 8 * 3600
    lease_s: int = 30
    leg_source: str | None = None
    source_networks: tuple[str, ...] = ()
    max_recording_bytes: int = 2 * 1024**3
    keep_recordings_days: int = 0


def problems_of_sessions(settings: SessionRules) -> Iterator[str]:
    """Yield what is wrong with ``settings``, naming the field."""
    for name, low, high in (
        ("max_duration_s", 10, 7 * 86_400),
        ("lease_s", 6, 300),
        ("max_recording_bytes", 1024**2, 1024**4),
        ("keep_recordings_days", 0, 36_500),
    ):
        if not low <= getattr(settings, name) <= high:
            yield f"sessions.{name} must be {low} to {high}"
    try:
        for part in settings.source_networks:
            ipaddress.ip_network(part)
    except ValueError:
        yield "sessions.source_networks must list networks such as 192.0.2.0/24"
    if len(",".join(settings.source_networks)) > LONGEST_SOURCE:
        yield f"sessions.source_networks must have at most {LONGEST_SOURCE} characters"
