"""The demonstration's reviewer: approves the push that waits, under a key of their own, and sees that it arrives once.

The agent asked for it with the engagement; policy lets the group ``maintainers`` decide.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saw.errors import SawError, UnavailableError
from saw.lab.demo import arrivals, finding, git_credential
from saw.lab.process import wait_for
from saw.policy.keys import create_key
from saw.review.messages import FINAL

if TYPE_CHECKING:
    from saw.lab.up import Bringup

REVIEWER, GROUP = "maintainer@example.com", "maintainers"
PUSH = ("git.example.com", "POST", "/team/project.git/git-receive-pack")
"""Host, method and path of the call that waits."""


def reviewer_key(job: Bringup) -> Path:
    """Return the reviewer's private key, made on the first call, and see that the broker knows the reviewer."""
    private = job.lab.keys_directory / "maintainer.key"
    public = private.with_suffix(".pub")
    if not public.exists():
        private.unlink(missing_ok=True)  # the other half of a pair that was cut short
        create_key(job.lab.keys_directory, private.stem)
    job.saw("review", "reviewer", "add", REVIEWER, "--group", GROUP, "--key", str(public))
    return private


def waiting_push(job: Bringup, workspace: str) -> dict[str, Any]:
    """Return the newest push of the workspace that waits for people; raise :class:`UnavailableError` when none does."""
    found = job.client().request("GET", f"/v1/reviews?state=pending&workspace_id={workspace}")["reviews"]
    for one in found:
        if (one["host"], one["method"], one["path"]) == PUSH:
            return dict(one)
    raise UnavailableError(f"no push of {workspace} waits for a person", cure="saw review list shows what does")


def approved_push(job: Bringup, workspace: str) -> dict[str, Any]:
    """Approve the push that waits; return the call of the report.

    ``allow``: the review is done, and exactly one such request, with the real credential, was recorded at the far end.
    """
    begin = time.monotonic()
    verdict, reason, digest = "error", "", ""
    try:
        review = waiting_push(job, workspace)
        digest = str(review["policy_digest"])
        before = len(_arrived(job))
        key = reviewer_key(job)
        _shown(job, str(review["id"]))
        job.saw("review", "approve", str(review["id"]), "--key", str(key), "--comment", "the demonstration", "--yes")
        state = _end_of(job, str(review["id"]))
        arrived = len(_arrived(job)) - before
        detail = f"review {review['id']} is {state}; {arrived} such pushes recorded at the far end since"
        if state == "done" and arrived == 1:
            verdict = "allow"
        else:
            reason = f"review_{state}"
    except SawError as error:
        reason, detail = error.code, error.message
    name = "push to main, after a review"
    call = finding(name, "REV-02", verdict, expected="allow", detail=detail, digest=digest)
    return {**call, "reason": reason, "ms": round((time.monotonic() - begin) * 1000)}


def _shown(job: Bringup, review: str) -> None:
    """Wait until the far end has told what the push would change: a decision is about the text that is shown."""

    def told() -> bool:
        return str(job.client().request("GET", f"/v1/reviews/{review}")["context_state"]) != "asked"

    wait_for(
        f"the state before the push of review {review}",
        told,
        patience=150,
        interval=0.5,
        cure="saw review show tells it",
    )


def _end_of(job: Bringup, review: str) -> str:
    """Wait until a review has ended; return how."""
    state = ""

    def ended() -> bool:
        nonlocal state
        state = str(job.client().request("GET", f"/v1/reviews/{review}")["state"])
        return state in FINAL

    cure = "saw review show tells where it stands"
    wait_for(f"the end of review {review}", ended, patience=150, interval=0.5, cure=cure)
    return state


def _arrived(job: Bringup) -> list[dict[str, Any]]:
    """Return the pushes that the far end recorded, each with the credential of the perimeter."""
    held = git_credential(job)
    seen = [item for item in arrivals(job) if (item["host"], item["method"], item["uri"]) == PUSH]
    return [item for item in seen if item["authorization"] == held and not item.get("saw_headers")]
