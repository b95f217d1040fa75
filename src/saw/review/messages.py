"""What perimeter and broker say to each other about a reviewed write (``/v1/perimeter/reviews``).

The perimeter holds the call's bytes only while it hands them over; the broker keeps them, takes the decisions and gives
the one claim; the perimeter that gets the claim sends exactly these bytes, once, and tells what came back.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

MAX_REVIEWED_BODY = 8 * 1024 * 1024
"""Largest body of a call that can wait for a review (bytes)."""
MAX_REVIEWED_ANSWER = 1024 * 1024
"""How much of a far end's answer is kept (bytes); what is longer is cut and marked so."""
MAX_CONTEXT = 8 * 1024 * 1024
"""How much of the state before a push is read at a time (bytes); a longer answer counts as none."""

ReviewState = Literal["pending", "approved", "executing", "done", "failed", "unknown", "denied", "expired", "cancelled"]
"""``pending`` waits for decisions; ``approved`` for its one claim; ``executing`` is claimed and has not ended; ``done``: the
far end answered; ``failed``: nothing was sent; ``unknown``: it was sent, or may have been, and no answer is known."""
FINAL = frozenset({"done", "failed", "unknown", "denied", "expired", "cancelled"})

SPONSORS = "sponsors"
"""The group of those who hand out tasks: it decides where a delegation asks for a person, and in it alone the sponsor of a
workspace may approve what its own agent asks for."""

BEYOND_BUDGET = "budgets "
"""How the rule of a review begins that lets one call pass a budget; its id follows, and after a colon what is missing."""

Name = Annotated[str, msgspec.Meta(max_length=255)]
Header = tuple[Name, Annotated[str, msgspec.Meta(max_length=8192)]]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
ReviewId = Annotated[str, msgspec.Meta(pattern=r"^rv-[0-9a-f]{32}\Z")]
ObjectName = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})\Z")]
Secret = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{43}\Z")]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything here: unknown fields are refused."""


class ReviewedCall(Message, frozen=True):
    """The call as the agent made it. ``headers`` are the agent's own, lower case, in order, without hop-by-hop headers,
    ``host``, ``content-length``, control headers and credentials; ``body`` are the exact bytes (base64 in JSON)."""

    method: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{1,16}\Z")]
    scheme: Literal["https", "http"]
    host: Name
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    path: Annotated[str, msgspec.Meta(pattern=r"^/", max_length=8192)]
    headers: Annotated[tuple[Header, ...], msgspec.Meta(max_length=100)] = ()
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_REVIEWED_BODY)] = b""


class OpenReview(Message, frozen=True):
    """``POST /v1/perimeter/reviews``: a call that policy lets a person decide on. The broker answers :class:`ReviewView`.

    The same call of the same workspace under the same policy opens no second review while the first is not final: the
    answer is the first one's. ``rule`` is the policy rule that asks, ``delegation`` the id of the delegation that does.
    ``readable``: policy lets the workspace ``GET`` the same URL, so that what is there now can be shown beside a write.
    """

    workspace_id: Annotated[str, msgspec.Meta(max_length=64)]
    call: ReviewedCall
    policy_digest: Digest
    group: Name
    quorum: Annotated[int, msgspec.Meta(ge=1, le=16)]
    expires_in_s: Annotated[int, msgspec.Meta(ge=60, le=30 * 86400)]
    rule: Annotated[str, msgspec.Meta(max_length=256)] = ""
    delegation: Annotated[str, msgspec.Meta(max_length=64)] = ""
    binary: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    request_id: Annotated[str, msgspec.Meta(max_length=64)] = ""
    readable: bool = False


class ReviewedAnswer(Message, frozen=True):
    """What the far end answered. ``truncated`` says that ``body`` is only its beginning."""

    status: Annotated[int, msgspec.Meta(ge=100, le=599)]
    headers: Annotated[tuple[Header, ...], msgspec.Meta(max_length=100)] = ()
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_REVIEWED_ANSWER)] = b""
    truncated: bool = False


class ReviewView(Message, frozen=True):
    """A review as its workspace may see it: ``GET /v1/perimeter/reviews/{id}?workspace_id=…&wait=SECONDS``.

    ``wait`` holds the answer back until the review is final or that many seconds (at most 30) have passed. Another workspace's
    review is ``unknown_review``, as one that does not exist.
    """

    id: ReviewId
    workspace_id: str
    state: ReviewState
    request_digest: Digest
    opened_at: str
    expires_at: str
    approvals: int = 0
    quorum: int = 1
    detail: str = ""
    answer: ReviewedAnswer | None = None


class ClaimReview(Message, frozen=True):
    """``POST /v1/perimeter/reviews/claim``: ask for one approved call of a workspace of this perimeter; ``wait`` as above.

    The broker answers :class:`ClaimAnswer`. A claim is given once: the review is ``executing`` before the answer is sent.
    ``claim`` is a secret for the one attempt; asked with it again, because no answer came, the broker gives the same call again.
    A perimeter that got one takes another secret. Without it the broker chooses one, and an answer that is lost leaves the review
    ``unknown``.
    """

    wait: Annotated[int, msgspec.Meta(ge=0, le=30)] = 0
    claim: Secret | None = None


class Claimed(Message, frozen=True, omit_defaults=True):
    """An approved call with the right to send it once. ``claim`` proves the right when the result is told; whoever is not
    done by ``claim_ends_at`` has lost it, and the review is ``unknown``. ``binary`` and ``rule`` are those of
    :class:`OpenReview`: policy judges the call again before it is sent, and only what asked for a person is settled.

    ``rule`` is told only where it lets the call pass a budget (:data:`BEYOND_BUDGET`): a perimeter that does not know the field
    refuses it, and opens no such reviews.
    """

    id: ReviewId
    claim: Secret
    claim_ends_at: str
    workspace_id: str
    policy_digest: Digest
    request_digest: Digest
    call: ReviewedCall
    binary: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    rule: Annotated[str, msgspec.Meta(max_length=256)] = ""


class PushContext(Message, frozen=True):
    """What the far end of a push was asked about the state that it would change.

    ``packs`` are Git packfiles; ``read`` with a ``detail`` was read in part. ``asked``: a perimeter is reading.
    """

    state: Literal["asked", "read", "unreadable"]
    detail: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    packs: Annotated[tuple[bytes, ...], msgspec.Meta(max_length=8)] = ()


class StateContext(Message, frozen=True):
    """What the far end of a write was asked about the state that it would change: a ``GET`` of the same URL.

    ``status`` is the answer's: 404 and 410 mean that nothing is there. ``body`` is JSON, ``etag`` its entity tag if it has one.
    """

    state: Literal["asked", "read", "unreadable"]
    detail: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    status: Annotated[int, msgspec.Meta(ge=0, le=599)] = 0
    etag: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_REVIEWED_ANSWER)] = b""


Context = PushContext | StateContext
"""What people see beside a call: a push has the one, a write of JSON the other (:func:`saw.review.render.context_kind`)."""


class ReadBack(Message, frozen=True):
    """A call that may have been sent, and whose end is not known: the perimeter looks at the far end what became of it."""

    id: ReviewId
    workspace_id: str
    policy_digest: Digest
    call: ReviewedCall
    binary: Annotated[str, msgspec.Meta(max_length=4096)] = ""


class FarEnd(Message, frozen=True, kw_only=True):
    """What a question of the perimeter's own to a far end is about: a review, and where its call goes."""

    id: ReviewId
    workspace_id: str
    policy_digest: Digest
    scheme: Literal["https", "http"]
    host: Name
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    binary: Annotated[str, msgspec.Meta(max_length=4096)] = ""


class ReadContext(FarEnd, frozen=True, kw_only=True):
    """What the perimeter shall read of a far end for people who look at a push: the objects ``wants`` of ``repository``.

    ``step`` 1 asks for commits with what they hold, 2 for contents and whatever else was missing.
    """

    repository: Annotated[str, msgspec.Meta(pattern=r"^(/|\Z)", max_length=8192)]
    wants: Annotated[tuple[ObjectName, ...], msgspec.Meta(min_length=1, max_length=512)]
    step: Literal[1, 2]


class ReadState(FarEnd, frozen=True, kw_only=True):
    """What the perimeter shall ask a far end by ``GET`` for people who look at a write: the state that it would change."""

    path: Annotated[str, msgspec.Meta(pattern=r"^/", max_length=8192)]


class ClaimAnswer(Message, frozen=True):
    """``claimed`` is None when nothing is approved at the moment; ``read_back`` is something to be looked for then, and
    ``read_context`` or ``read_state`` something to be read."""

    claimed: Claimed | None = None
    read_back: ReadBack | None = None
    read_context: ReadContext | None = None
    read_state: ReadState | None = None


class ContextResult(Message, frozen=True):
    """``POST /v1/perimeter/reviews/{id}/context``: a Git packfile or, of a :class:`ReadState`, the far end's answer, or why there
    is none; ``unreached`` is asked again later."""

    step: Literal[1, 2]
    outcome: Literal["read", "unreadable", "unreached"]
    detail: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    pack: Annotated[bytes, msgspec.Meta(max_length=MAX_CONTEXT)] = b""
    answer: ReviewedAnswer | None = None


class ReadBackResult(Message, frozen=True):
    """``POST /v1/perimeter/reviews/{id}/read-back``: what was found; ``unreached`` is asked again later."""

    outcome: Literal["arrived", "not_arrived", "undecided", "unreached"]
    detail: Annotated[str, msgspec.Meta(max_length=1024)] = ""


class ReviewResult(Message, frozen=True):
    """``POST /v1/perimeter/reviews/{id}/result``: how the one attempt ended.

    ``done`` needs ``answer``; ``failed`` is said only when certainly nothing reached the far end; anything else is ``unknown``.
    """

    claim: Secret
    outcome: Literal["done", "failed", "unknown"]
    answer: ReviewedAnswer | None = None
    detail: Annotated[str, msgspec.Meta(max_length=1024)] = ""
