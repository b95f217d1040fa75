"""The one path under which a workspace asks for its own reviews, at any host that it may reach at all.

The path is answered by ring 2 itself and never sent on, so it needs no rule of its own: whoever may open a connection to the
host may ask there for reviews of its own workspace, and for nothing else.
"""

from __future__ import annotations

import re

import msgspec

from saw.policy.matcher import Matcher
from saw.policy.model import ALLOW, Decision, Request

REVIEWS_PATH = "/.well-known/saw/reviews/"
MAX_WAIT = 30
"""Longest time that an answer may be held back (seconds)."""
NOT_REACHED = frozenset({"host_not_allowed", "binary_not_allowed", "destination_blocked", "not_canonical"})
"""Reasons that say that no connection to the host may be opened at all; any other one is about what is asked there."""

_POLL = re.compile(re.escape(REVIEWS_PATH) + r"(rv-[0-9a-f]{32})(?:\?wait=([0-9]{1,3}))?\Z")


class Poll(msgspec.Struct, frozen=True):
    """A question about a review; ``wait`` is how long the answer may be held back (seconds, at most :data:`MAX_WAIT`)."""

    review: str
    wait: int


def poll_of(method: str, target: str) -> Poll | None:
    """Return the question that a request is, or None for every other request. ``target`` is the path with its query."""
    match = _POLL.match(target) if method == "GET" else None
    return Poll(match[1], min(int(match[2] or 0), MAX_WAIT)) if match else None


def may_poll(matcher: Matcher, request: Request) -> Decision:
    """Return whether the caller of ``request``, which :func:`poll_of` knows, may ask at this host.

    It may where a connection may be opened: policy names the host and port, in this scheme, for this executable.
    """
    decision = matcher.decide(msgspec.structs.replace(request, method="GET", path="/", headers={}, body=None))
    if decision.reason in NOT_REACHED:
        return decision
    return Decision(verdict=ALLOW, policy=decision.policy, rule="review poll", canonical_path=request.path)
