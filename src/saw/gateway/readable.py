"""Whether policy lets a workspace read what its own write would change, so that people can be shown it."""

from __future__ import annotations

from datetime import datetime

from saw.gateway.judge import Verdict
from saw.gateway.view import View, release_for
from saw.policy.model import Request
from saw.review.messages import ReviewedCall


def may_read(view: View, now: datetime, grace_s: float, verdict: Verdict, question: ReviewedCall) -> bool:
    """Tell whether ``question`` would be let through without a person, by policy alone and free of charge.

    It is judged whole when it is asked: this only spares questions that policy refuses.
    """
    entry = view.workspaces.get(verdict.workspace_id)
    if entry is None:
        return False
    release = release_for(view, entry, verdict.policy_digest, now, grace_s)
    if isinstance(release, str):
        return False
    request = Request(
        scheme=question.scheme,
        host=question.host,
        port=question.port,
        method=question.method,
        path=question.path,
        binary=verdict.call.binary or None,
        ancestors=verdict.call.ancestors,
        headers=dict(question.headers),
        body=b"",
        body_complete=True,
    )
    return release.matcher.decide(request).allowed
