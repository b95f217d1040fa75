"""What a reviewer signs: one decision about one call, bound to the exact bytes, to what was shown, and to the policy.

The statement is RFC 8785 JSON; the signature covers it together with its type (the pre-authentication encoding of DSSE 1.0),
so that what a key signed as something else never counts as a decision.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Annotated, Any, Literal

import msgspec
import rfc8785
from securesystemslib.dsse import Envelope

from saw import jsontext
from saw.errors import SawError
from saw.policy.keys import PublicKey, signature_holds
from saw.policy.signers import Signer, signature_of
from saw.review.messages import Digest, ReviewId, Secret

STATEMENT_TYPE = "application/vnd.saw.review-statement+json"
"""Media type of a statement; it is part of what is signed."""
MAX_STATEMENT = 8 * 1024
"""Longest statement that is read (bytes)."""
MAX_COMMENT = 256
"""Longest comment of a reviewer (characters)."""

Time = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z\Z")]
Decision = Literal["approve", "deny", "break_glass", "uphold", "reject"]
"""``break_glass`` stands in for the approvals of a group that cannot be reached; ``uphold`` and ``reject`` come afterwards."""
AFTER = frozenset({"uphold", "reject"})
"""Decisions about a glass that was broken."""
_SIGNATURE = re.compile(r"[0-9a-f]{16,512}\Z")


class StatementRefused(SawError):
    """A statement is not what it must be, or its signature does not hold."""

    code = "statement_refused"


class ReviewStatement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One decision. ``nonce`` is the broker's for this review and approver, ``not_after`` when the decision ceases to count."""

    format: Literal["saw-review-statement/1"] = "saw-review-statement/1"
    review: ReviewId
    request_digest: Digest
    render_digest: Digest
    policy_digest: Digest
    decision: Decision
    approver: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    nonce: Secret
    not_after: Time
    comment: Annotated[str, msgspec.Meta(max_length=MAX_COMMENT)] = ""


def render_digest(rendering: str) -> str:
    """Return the digest (hex SHA-256) of the text that a reviewer is shown."""
    return hashlib.sha256(rendering.encode()).hexdigest()


def encode_statement(statement: ReviewStatement) -> bytes:
    """Return the canonical form of ``statement``: RFC 8785 of all of its fields."""
    fields: dict[str, Any] = msgspec.to_builtins(statement)
    return rfc8785.dumps(fields)


def parse_statement(raw: bytes) -> ReviewStatement:
    """Read a statement **without verifying** its signature; raise :class:`StatementRefused` unless it is in canonical form."""
    if len(raw) > MAX_STATEMENT:
        raise StatementRefused(f"the statement has {len(raw)} bytes", cure=f"keep it below {MAX_STATEMENT}")
    try:
        statement = jsontext.decode(raw, kind=ReviewStatement)
        canonical = encode_statement(statement)
    except (msgspec.DecodeError, UnicodeError, rfc8785.CanonicalizationError) as error:
        raise StatementRefused(f"the statement is not valid: {error}", cure="sign what saw review shows") from error
    if not hmac.compare_digest(canonical, raw):
        raise StatementRefused("the statement is not in canonical form", cure="write it by RFC 8785, every field")
    if not statement.comment.isprintable():
        raise StatementRefused("the comment has characters that are not printable", cure="write one line of text")
    return statement


def sign_review(statement: ReviewStatement, signer: Signer) -> str:
    """Return the signature (hex) of ``signer`` over ``statement``, verified before it is returned."""
    return signature_of(signer, signed_bytes(encode_statement(statement))).hex()


def verify_review(raw: bytes, signature: str, key: PublicKey) -> ReviewStatement:
    """Return the statement in ``raw``; raise :class:`StatementRefused` unless ``signature`` (hex) over it is by ``key``."""
    statement = parse_statement(raw)
    if not _SIGNATURE.match(signature) or len(signature) % 2:
        raise StatementRefused("the signature is not hexadecimal", cure="sign again")
    if not signature_holds(key, bytes.fromhex(signature), signed_bytes(raw)):
        raise StatementRefused(
            f"the signature is not by the key of {statement.approver}", cure="sign with the key that is registered"
        )
    return statement


def signed_bytes(raw: bytes) -> bytes:
    """Return what is signed of a statement in canonical form: it, together with its type."""
    encoded: bytes = Envelope(raw, STATEMENT_TYPE, {}).pae()
    return encoded
