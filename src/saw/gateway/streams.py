"""Which workspaces may have WebSockets or gRPC calls open now, and what that rests on.

Both are decided when they are opened and then carry messages unasked. So that none outlives what allowed it, every change of
that changes a word in Envoy's listener for the workspace, and Envoy then ends the connections of the old one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import NamedTuple

import msgspec

from saw.gateway.delegations import NONE
from saw.gateway.view import View, offline_granted, release_for


class Standing(NamedTuple):
    """What a workspace may have open: ``rests_on`` is the word. ``websockets``, ``sessions``: it may be those too."""

    rests_on: str
    websockets: bool
    sessions: bool = False


def standing_streams(
    view: View,
    now: datetime,
    *,
    doubt: Callable[[float], str],
    offline: Callable[[float, datetime], float],
    release_grace_s: float,
) -> dict[int, Standing]:
    """Return, by the number of each workspace that may have WebSockets or gRPC calls open, a word for what that rests on.

    A workspace stands with everything that a call would need: it is active and its agent lives, it is under a lease, the
    broker can be relied on, its release counts and lets such a thing be opened at all. The word changes with the release, the
    agent, and the delegations that count.
    ``doubt`` and ``offline`` are those of :class:`saw.gateway.view.ViewKeeper`.
    """
    standing: dict[int, Standing] = {}
    for entry in view.workspaces.values():
        digest = entry.policy_digest or ""
        granted = offline_granted(view, entry.id, digest)
        longer = offline(granted, now) if granted else 0.0
        if entry.state != "active" or entry.agent_retired or doubt(longer):
            continue
        if entry.lease_expires_at is None or now >= entry.lease_expires_at + timedelta(seconds=longer):
            continue
        release = release_for(view, entry, digest, now, release_grace_s)
        if isinstance(release, str):
            continue
        matcher = release.matcher
        if not (matcher.opens_streams or matcher.opens_sessions or matcher.sends_unread):
            continue
        held = view.engagements.get(entry.id, NONE)
        counting = sorted(line.record.id for line in held.lines if line.not_before <= now < line.expires)
        rests_on = msgspec.json.encode([entry.id, digest, entry.agent, held.required, counting])
        word = hashlib.sha256(rests_on).hexdigest()[:16]
        standing[entry.number] = Standing(word, matcher.opens_streams, matcher.opens_sessions)
    return standing
