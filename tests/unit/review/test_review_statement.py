"""What a reviewer signs: every bit of the call and of the decision is in it, and only its own key's signature counts."""

from __future__ import annotations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from saw.review.digest import request_digest
from saw.review.messages import ReviewedCall
from saw.review.statement import (
    ReviewStatement,
    StatementRefused,
    encode_statement,
    parse_statement,
    render_digest,
    sign_review,
    verify_review,
)

CALL = ReviewedCall(
    method="POST",
    scheme="https",
    host="api.example.com",
    port=443,
    path="/v1/notes",
    headers=(("content-type", "text/plain"), ("x-a", "1")),
    body=b"hello",
)


def statement(**changes: str) -> ReviewStatement:
    fields = {
        "review": "rv-" + "a" * 32,
        "request_digest": request_digest("ws-a", CALL),
        "render_digest": render_digest("shown\n"),
        "policy_digest": "c" * 64,
        "decision": "approve",
        "approver": "ada@example.com",
        "nonce": "n" * 43,
        "not_after": "2026-11-26T10:00:00.000Z",
        "comment": "looked at it",
    }
    return msgspec.convert(fields | changes, ReviewStatement)


@pytest.mark.control("REV-02")
def test_a_signed_statement_is_verified_and_every_change_of_it_is_not() -> None:
    key = Ed25519PrivateKey.generate()
    signature = sign_review(statement(), key)
    assert verify_review(encode_statement(statement()), signature, key.public_key()) == statement()
    for name, value in {
        "review": "rv-" + "b" * 32,
        "request_digest": "d" * 64,
        "render_digest": "d" * 64,
        "policy_digest": "d" * 64,
        "decision": "deny",
        "approver": "ben@example.com",
        "nonce": "m" * 43,
        "not_after": "2027-11-26T10:00:00.000Z",
        "comment": "",
    }.items():
        with pytest.raises(StatementRefused, match="not by the key"):
            verify_review(encode_statement(statement(**{name: value})), signature, key.public_key())
    with pytest.raises(StatementRefused, match="not by the key"):
        verify_review(encode_statement(statement()), signature, Ed25519PrivateKey.generate().public_key())


@pytest.mark.control("REV-02")
def test_the_bare_bytes_signed_as_something_else_do_not_count() -> None:
    key = Ed25519PrivateKey.generate()
    raw = encode_statement(statement())
    with pytest.raises(StatementRefused, match="not by the key"):
        verify_review(raw, key.sign(raw).hex(), key.public_key())


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw + b" ",
        lambda raw: raw.replace(b'"deny"', b'"approve"').replace(b'"approve"', b'"maybe"'),
        lambda raw: raw.replace(b"}", b',"more":1}'),
        lambda raw: raw.replace(b',"comment":"looked at it"', b"").replace(b'"comment":"looked at it",', b""),
        lambda raw: raw.replace(b"saw-review-statement/1", b"saw-review-statement/2"),
        lambda raw: raw.replace(b"looked", b"l" * 9000),
        lambda raw: raw.replace(b"looked", b"looked\\n"),
    ],
)
def test_only_the_one_canonical_form_is_read(change) -> None:
    raw = encode_statement(statement())
    assert parse_statement(raw) == statement()
    with pytest.raises(StatementRefused):
        parse_statement(change(raw))


def test_a_signature_that_is_no_hexadecimal_is_refused() -> None:
    key = Ed25519PrivateKey.generate()
    for text in ("", "zz" * 64, "abc", "A" * 128):
        with pytest.raises(StatementRefused):
            verify_review(encode_statement(statement()), text, key.public_key())
