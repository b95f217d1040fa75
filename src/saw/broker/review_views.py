"""What the calls about reviews answer: the types that are told to programs (:mod:`saw.broker.openapi`)."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from saw.review.gate import GateRequest
from saw.review.messages import ReviewedCall, ReviewState
from saw.review.tool import ReviewedTool


class Review(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a list says of a review. Times are RFC 3339; what is null was not yet, or is not asked for.

    ``approved_by`` and ``break_glass_by`` are those whose word counts now, while it waits; ``held_up_by`` is the review whose
    overdue after-review holds it up. ``context_…`` is what the far end was asked before, ``read_back…`` what was found of a call
    whose end is not known, ``after_…`` the review that a broken glass owes.
    """

    id: str
    kind: Literal["call", "gate", "tool"]
    workspace_id: str
    agent_id: str
    sponsor: str
    perimeter: str
    policy_digest: str
    request_digest: str
    group: str
    quorum: int
    rule: str
    delegation: str
    binary: str
    request_id: str
    method: str
    scheme: str
    host: str
    port: int
    path: str
    state: ReviewState
    detail: str
    opened_at: str
    expires_at: str
    approved_at: str | None
    claimed_at: str | None
    claim_ends_at: str | None
    ended_at: str | None
    answer_status: int | None
    answer_sha256: str | None
    read_back: Literal["asked", "arrived", "not_arrived", "undecided"] | None
    read_back_detail: str | None
    read_back_at: str | None
    read_back_since: str | None
    context_state: Literal["asked", "read", "unreadable"] | None
    context_detail: str | None
    context_at: str | None
    broken_at: str | None
    broken_keys: int | None
    after_state: Literal["owed", "overdue", "upheld", "rejected"] | None
    after_due_at: str | None
    after_at: str | None
    approved_by: tuple[str, ...]
    break_glass_by: tuple[str, ...]
    held_up_by: str | None


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A decision as it was signed: ``statement`` with ``signature``, by a registered key or a passkey."""

    approver: str
    decision: str
    comment: str
    not_after: str
    decided_at: str
    signed_with: str
    key_sha256: str
    statement: str
    signature: str


class ShownReview(Review, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A review with what people are shown (null when the bytes are no longer kept), its digest, and every decision."""

    rendering: str | None
    render_digest: str | None
    decisions: tuple[Decision, ...]


class ChangedReview(ShownReview, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A review after a call, and whether the call changed it."""

    changed: bool


class ReviewPage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Reviews, the newest first; ``next`` is the ``after`` of the page that follows, null at the end."""

    reviews: tuple[Review, ...]
    next: str | None


class ReviewBytes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What exactly is asked for: a ``call`` with the ``context`` that the far end told, a ``gate`` or the call of a ``tool``."""

    id: str
    workspace_id: str
    call: ReviewedCall | msgspec.UnsetType = msgspec.UNSET
    context: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET
    gate: GateRequest | msgspec.UnsetType = msgspec.UNSET
    tool: ReviewedTool | msgspec.UnsetType = msgspec.UNSET


class SignedReceipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A receipt as a compact JWS; ``saw review verify`` checks it."""

    id: str
    outcome: ReviewState
    receipt: str


class Nonce(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one decision is bound to until ``expires_at``, and until when at most the other kinds of decisions may count."""

    review: str
    approver: str
    nonce: str
    expires_at: str
    after_review_until: str
    break_glass_until: str | msgspec.UnsetType = msgspec.UNSET


class AskedBack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """That the far end is asked again what became of a call."""

    id: str
    read_back: Literal["asked"]
