"""Whom a call waits for: the reviewers of the policy's action rule, or else those who own the blueprint."""

from __future__ import annotations

import msgspec

from saw.gateway.releases import Release
from saw.policy.gitproto import PushUnreadable
from saw.policy.model import Decision, Request
from saw.review.messages import SPONSORS

MIN_OPEN_S, MAX_OPEN_S = 60, 30 * 86400
"""Bounds of the time for which a review stays open (seconds)."""
DEFAULT_OPEN_S = 86400
"""How long a review stays open where no rule says (seconds)."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What a review of a call asks for: how many of which group, within how many seconds, and by which rule or delegation."""

    group: str
    quorum: int
    expires_in_s: int
    rule: str = ""
    delegation: str = ""


def held_by(release: Release, request: Request, asked: Decision, delegation: str) -> tuple[Held | None, str]:
    """Return what the review of ``request`` asks for, or None and the reason why there can be no single review.

    ``asked`` is policy's decision; ``delegation`` is the id of the delegation that wants a review, if one does. Where policy
    wants one and no rule names reviewers, the owners of the blueprint decide. A push whose refs are for different people to
    decide on is nobody's to decide on as a whole.
    """
    group, quorum, expires = SPONSORS, 1, DEFAULT_OPEN_S
    if not asked.allowed:
        group = release.governance.blueprint.owner
        try:
            reviews = release.matcher.reviews(request)
        except PushUnreadable as error:
            return None, f"the push cannot be read: {error}"
        if len(reviews) != 1 and asked.protocol:
            return None, "what this body asks for is for different people to decide on: send it one at a time"
        if len(reviews) != 1:
            return None, "the refs of this push are for different people to decide on: push them one at a time"
        expires = reviews[0].expires_s
        if reviews[0].reviewers is not None:
            group, quorum = reviews[0].reviewers.group, reviews[0].reviewers.quorum
    return Held(
        group=group,
        quorum=quorum,
        expires_in_s=min(max(expires, MIN_OPEN_S), MAX_OPEN_S),
        rule="" if asked.allowed else asked.rule[:256],
        delegation=delegation,
    ), ""
