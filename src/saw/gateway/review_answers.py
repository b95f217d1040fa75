"""What the agent is told about a review: that its call waits, how it ended, and the same in the words of git."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from saw.gateway.envoy_parts import HOP_HEADERS
from saw.policy.gitproto import PushUnreadable, inflate, push_updates
from saw.policy.review_poll import REVIEWS_PATH
from saw.review.messages import ReviewedAnswer, ReviewView

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]

RETRY_AFTER_S = 10
"""How long an agent that does not wait with ``?wait=`` should leave between two questions (seconds)."""
RECEIVE_PACK_RESULT = "application/x-git-receive-pack-result"

_NEVER_BACK = frozenset({*HOP_HEADERS, "set-cookie", "set-cookie2", "alt-svc", "strict-transport-security"})
_ENDED = {
    "denied": (403, "review_denied", "a person decided against this write", "propose another change, or ask the reviewers why"),
    "expired": (403, "review_expired", "nobody decided in time", "make the call again; it opens a new review"),
    "cancelled": (403, "review_cancelled", "the review was called off", "ask the reviewers or the sponsor"),
    "failed": (
        502, "review_failed", "the call was approved but could not be sent; nothing reached the far end",
        "look at detail, then make the call again; it opens a new review",
    ),
    "unknown": (
        504, "review_unknown", "the call was approved and may have been sent; what came of it is not known",
        "read the state back from the far end before making the call again",
    ),
}  # fmt: skip


def in_json(status: int, body: dict[str, object], *headers: tuple[str, str]) -> Answer:
    """Return an answer of ours."""
    fields = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    fields += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    return status, fields, json.dumps(body).encode() + b"\n"


def problem(status: int, error: str, detail: str, *steps: str) -> Answer:
    """Return a refusal of the review service."""
    retry = (("retry-after", str(RETRY_AFTER_S)),) if status == 503 else ()
    return in_json(status, {"error": error, "layer": "review", "detail": detail, "next_steps": list(steps)}, *retry)


def waits(view: ReviewView, policy_digest: str) -> Answer:
    """Return the answer to a call that waits, and to every question about it until it has ended.

    ``policy_digest`` is the policy that the workspace is under now.
    """
    poll = f"{REVIEWS_PATH}{view.id}"
    body: dict[str, object] = {
        "review_id": view.id,
        "state": view.state,
        "opened_at": view.opened_at,
        "expires_at": view.expires_at,
        "approvals": view.approvals,
        "quorum": view.quorum,
        "request_digest": view.request_digest,
        "policy_digest": policy_digest,
        "poll": poll,
        "next_steps": [
            f"GET {poll}?wait=30 at the same host until it no longer answers 202; the answer is then that of the far end",
            "go on with other work meanwhile; the same call again gets the same review",
        ],
    }
    return in_json(202, body, ("location", poll), ("retry-after", str(RETRY_AFTER_S)))


def state_of(view: ReviewView, policy_digest: str) -> Answer:
    """Return the answer to a question about a review: it waits, the far end's stored answer, or why there is none."""
    if view.state == "done" and view.answer is not None:
        return _stored(view.answer, view.id)
    if view.state not in _ENDED:
        return waits(view, policy_digest)
    return in_json(_ENDED[view.state][0], ended(view))


def ended(view: ReviewView) -> dict[str, Any]:
    """Return why a review that has ended has no answer of the far end; ``view`` is in such a state."""
    _, error, detail, step = _ENDED[view.state]
    return {
        "error": error,
        "layer": "review",
        "review_id": view.id,
        "state": view.state,
        "detail": f"{detail}: {view.detail}" if view.detail else detail,
        "next_steps": [step],
    }


def _stored(answer: ReviewedAnswer, review: str) -> Answer:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in safe_headers(answer.headers)]
    headers += [(b"x-saw-review", b"done"), (b"x-saw-review-id", review.encode())]
    if answer.truncated:
        headers.append((b"x-saw-review-truncated", b"true"))
    return answer.status, headers, answer.body


def safe_headers(headers: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return what of a far end's answer is kept and shown: no hop-by-hop headers, cookies or control headers."""
    kept = [
        (name.lower(), value)
        for name, value in headers
        if name.lower() not in _NEVER_BACK
        and not name.lower().startswith(("x-saw-", "x-envoy-"))
        and len(name) <= 255
        and len(value) <= 8192
    ]
    return tuple(kept[:100])


def git_waits(view: ReviewView, body: bytes, encoding: str, policy_digest: str) -> Answer | None:
    """Return the answer to a push that waits, as ``git-receive-pack`` would refuse each ref, or None for no such push.

    ``body`` is the whole request body. git prints the message and the reason of each ref (gitprotocol-pack, report-status
    and side-band-64k).
    """
    try:
        updates = push_updates(body, complete=True, encoding=encoding)
    except PushUnreadable:
        return None
    capabilities = _capabilities(body, encoding)
    if not updates or not capabilities & {b"report-status", b"report-status-v2"}:
        return None
    report = _packet(b"unpack ok\n")
    report += b"".join(_packet(f"ng {update.ref} waiting for review {view.id}\n".encode()) for update in updates)
    report += b"0000"
    if b"side-band-64k" in capabilities or b"side-band" in capabilities:
        most = 65515 if b"side-band-64k" in capabilities else 995
        said = f"{view.id} is waiting for review until {view.expires_at}; see {REVIEWS_PATH}{view.id} at this host\n"
        content = _packet(b"\x02" + said.encode())
        content += b"".join(_packet(b"\x01" + report[at : at + most]) for at in range(0, len(report), most))
        content += b"0000"
    else:
        content = report
    fields = [(b"content-type", RECEIVE_PACK_RESULT.encode()), (b"cache-control", b"no-cache")]
    fields += [(b"x-saw-review", view.state.encode()), (b"x-saw-review-id", view.id.encode())]
    return 200, [*fields, (b"x-saw-policy-digest", policy_digest.encode())], content


def _packet(payload: bytes) -> bytes:
    return f"{len(payload) + 4:04x}".encode() + payload


def _capabilities(body: bytes, encoding: str) -> frozenset[bytes]:
    """Return what the client's first command says it understands."""
    data = inflate(body, encoding)
    first = data[4 : int(data[:4], 16)]
    while first.startswith(b"shallow "):
        data = data[int(data[:4], 16) :]
        first = data[4 : int(data[:4], 16)]
    return frozenset(first.partition(b"\x00")[2].split())
