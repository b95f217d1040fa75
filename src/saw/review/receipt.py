"""What is left of a review for good: the broker's signed word about it, with every decision as it was signed.

A receipt is a statement of the broker (:mod:`saw.identity.statement`). Reviewers' signatures are inside and are verified
again, so the broker alone cannot make up an approval by a key that it does not have.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from datetime import datetime
from typing import Annotated, Literal

import msgspec

from saw import jsontext
from saw.identity.statement import MAX_STATEMENT, Statement, verify_statement
from saw.policy.errors import KeyFileError
from saw.policy.keys import parse_public_key, raw_public
from saw.review.messages import Digest, ReviewId
from saw.review.passkey import Assertion, verify_by_passkey
from saw.review.statement import ReviewStatement, StatementRefused, Time, verify_review

RECEIPT_TYPE = "saw-review-receipt+jws"
FEWEST_KEYS = 2
"""Fewest people who can break the glass."""
SENT = frozenset({"done", "failed", "unknown"})
"""Outcomes of reviews that were approved and claimed."""

Text = Annotated[str, msgspec.Meta(max_length=1024)]


class SignedDecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A decision as its reviewer signed it, with the key that was registered then: ``signature`` by a key, or ``passkey``."""

    statement: Annotated[str, msgspec.Meta(max_length=8192)]
    signature: Annotated[str, msgspec.Meta(max_length=512)] = ""
    public_key: Annotated[str, msgspec.Meta(max_length=4096)]
    decided_at: Time
    passkey: Assertion | None = None


class BrokenGlass(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """That ``keys`` people stood in for the group's approvals, and what was said of it afterwards."""

    at: Time
    keys: Annotated[int, msgspec.Meta(ge=FEWEST_KEYS, le=8)]
    after: Literal["owed", "overdue", "upheld", "rejected"]
    after_at: Time | None


class Receipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A review that has ended. ``answer_sha256`` is over status, headers and body of the far end's answer."""

    format: Literal["saw-review-receipt/1"] = "saw-review-receipt/1"
    id: ReviewId
    workspace: Text
    agent: Text
    sponsor: Text
    policy_digest: Digest
    request_digest: Digest
    method: Text
    host: Text
    group: Text
    quorum: Annotated[int, msgspec.Meta(ge=1, le=16)]
    rule: Text
    delegation: Text
    opened_at: Time
    claimed_at: Time | None
    ended_at: Time
    outcome: Literal["done", "failed", "unknown", "denied", "expired", "cancelled"]
    detail: Text
    answer_status: int | None
    answer_sha256: Digest | None
    decisions: Annotated[tuple[SignedDecision, ...], msgspec.Meta(max_length=32)]
    issued_at: Time
    break_glass: BrokenGlass | msgspec.UnsetType = msgspec.UNSET


class Decided(msgspec.Struct, frozen=True):
    """A verified decision, and the SHA-256 of the reviewer's key to compare with a list of one's own.

    ``origin`` is the page on which a passkey was used; empty for a registered key.
    """

    said: ReviewStatement
    key_sha256: str
    decided_at: str
    origin: str = ""


class Verified(msgspec.Struct, frozen=True):
    """A verified receipt, who signed it, and every decision in it."""

    receipt: Receipt
    signer: str
    decisions: tuple[Decided, ...]


def verify_receipt(token: str, ca_pem: bytes) -> Verified:
    """Return the receipt in ``token`` (a compact JWS) with everything in it verified.

    The broker's certificate must have counted when the receipt was issued. Raises :class:`saw.identity.names.IdentityError`
    for the broker's signature and :class:`StatementRefused` for what is inside.
    """
    issued = _decode(_payload(token)).issued_at
    signed: Statement = verify_statement(token, RECEIPT_TYPE, ca_pem, datetime.fromisoformat(issued))
    receipt = _decode(signed.payload)
    decisions = tuple(_decision(receipt, item) for item in receipt.decisions)
    if receipt.outcome in SENT:
        _require_approved(receipt, decisions)
    if isinstance(receipt.break_glass, BrokenGlass):
        _require_after_review(receipt, receipt.break_glass, decisions)
    if receipt.outcome == "denied" and not any(one.said.decision == "deny" for one in decisions):
        raise _refused(receipt, "nobody denied it")
    return Verified(receipt, signed.signer, decisions)


def _require_approved(receipt: Receipt, decisions: tuple[Decided, ...]) -> None:
    claimed = receipt.claimed_at or ""
    if any(one.said.decision == "deny" for one in decisions):
        raise _refused(receipt, "somebody denied it")
    counted = [one for one in decisions if one.decided_at <= claimed < one.said.not_after]
    approved = _people([one for one in counted if one.said.decision == "approve"])
    if approved >= receipt.quorum:
        return
    if not isinstance(receipt.break_glass, BrokenGlass):
        raise _refused(receipt, f"{approved} of {receipt.quorum} approvals counted when it was sent")
    broken = _people([one for one in counted if one.said.decision == "break_glass"])
    if broken < receipt.break_glass.keys:
        raise _refused(receipt, f"{broken} of {receipt.break_glass.keys} keys broke the glass when it was sent")


def _require_after_review(receipt: Receipt, glass: BrokenGlass, decisions: tuple[Decided, ...]) -> None:
    """Refuse an after-review that those who broke the glass, or too few others, have decided."""
    breakers = {one.said.approver for one in decisions if one.said.decision == "break_glass"}
    others = [one for one in decisions if one.said.approver not in breakers]
    if glass.after == "upheld":
        upheld = _people([one for one in others if one.said.decision == "uphold"])
        if upheld < receipt.quorum:
            raise _refused(receipt, f"{upheld} of {receipt.quorum} upheld it afterwards")
    if glass.after == "rejected" and not any(one.said.decision == "reject" for one in others):
        raise _refused(receipt, "nobody rejected it afterwards")


def _people(decisions: list[Decided]) -> int:
    """Return how many people with as many different keys made ``decisions``."""
    return min(len({one.said.approver for one in decisions}), len({one.key_sha256 for one in decisions}))


def _decision(receipt: Receipt, item: SignedDecision) -> Decided:
    try:
        key = parse_public_key(item.public_key.encode(), "of a reviewer")
    except KeyFileError as error:
        raise _refused(receipt, "the key of a reviewer cannot be read") from error
    if item.passkey is None:
        said = verify_review(item.statement.encode(), item.signature, key)
    else:
        said, _ = verify_by_passkey(item.statement.encode(), item.passkey, key)
    if (said.review, said.request_digest, said.policy_digest) != (
        receipt.id,
        receipt.request_digest,
        receipt.policy_digest,
    ):
        raise _refused(receipt, f"the decision of {said.approver} is about something else")
    return Decided(
        said, hashlib.sha256(raw_public(key)).hexdigest(), item.decided_at, item.passkey.origin if item.passkey else ""
    )


def _refused(receipt: Receipt, reason: str) -> StatementRefused:
    return StatementRefused(f"the receipt of {receipt.id} does not hold: {reason}", cure="ask the broker's operator")


def _payload(token: str) -> bytes:
    parts = token.split(".")
    if len(token) > MAX_STATEMENT or len(parts) != 3:
        raise StatementRefused("this is no receipt", cure="give what saw review receipt printed")
    try:
        return base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
    except (binascii.Error, ValueError) as error:
        raise StatementRefused("this is no receipt", cure="give what saw review receipt printed") from error


def _decode(raw: bytes) -> Receipt:
    try:
        return jsontext.decode(raw, kind=Receipt)
    except msgspec.DecodeError as error:
        raise StatementRefused(f"the receipt is not valid: {error}", cure="present it as it was issued") from error
