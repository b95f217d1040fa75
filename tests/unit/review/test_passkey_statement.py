"""A statement signed with a passkey holds for anyone with the public key, and for that statement alone."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from webauthn.helpers import encode_cbor

from saw.review.passkey import Assertion, PasskeyRefused, challenge_of, cose_key, public_key_of, verify_by_passkey
from saw.review.statement import ReviewStatement, StatementRefused, encode_statement, sign_review

STATEMENT = ReviewStatement(
    review="rv-" + "1" * 32, request_digest="a" * 64, render_digest="b" * 64, policy_digest="c" * 64, decision="approve",
    approver="ben@example.com", nonce="n" * 43, not_after="2026-11-26T18:00:00.000Z", comment="is right",
)  # fmt: skip
RAW = encode_statement(STATEMENT)
CURVE = ec.generate_private_key(ec.SECP256R1())
EDWARDS = Ed25519PrivateKey.generate()
ORIGIN = "https://saw.example.com:8445"


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def answer(key: Any = CURVE, raw: bytes = RAW, flags: int = 0x05, count: int = 1, **changes: str) -> Assertion:
    said = {"type": "webauthn.get", "challenge": b64(challenge_of(raw)), "origin": ORIGIN, **changes}
    client = json.dumps(said).encode()
    data = hashlib.sha256(b"saw.example.com").digest() + bytes([flags]) + count.to_bytes(4, "big")
    signed = data + hashlib.sha256(client).digest()
    signature = key.sign(signed) if key is EDWARDS else key.sign(signed, ec.ECDSA(hashes.SHA256()))
    return Assertion(
        credential_id=b64(b"id" * 8), authenticator_data=b64(data), client_data=b64(client), signature=b64(signature),
        rp_id="saw.example.com", origin=ORIGIN,
    )  # fmt: skip


@pytest.mark.control("REV-02")
@pytest.mark.parametrize("key", [CURVE, EDWARDS], ids=["P-256", "Ed25519"])
def test_it_holds_under_its_key_and_no_other(key: Any) -> None:
    assert verify_by_passkey(RAW, answer(key), key.public_key()) == (STATEMENT, 1)
    for other in (ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()):
        with pytest.raises(StatementRefused):
            verify_by_passkey(RAW, answer(key), other.public_key())


@pytest.mark.control("REV-02")
@pytest.mark.parametrize(
    "changed",
    [
        answer(type="webauthn.create"),
        answer(challenge=b64(hashlib.sha256(RAW).digest())),
        answer(origin="https://evil.example"),
        answer(flags=0x01),
        answer(flags=0x04),
        msgspec.structs.replace(answer(), rp_id="example.com"),
        msgspec.structs.replace(answer(), signature=answer(count=2).signature),
        msgspec.structs.replace(answer(), client_data="AAAA"),
        msgspec.structs.replace(answer(), authenticator_data="AAAA"),
    ],
)
def test_what_was_signed_for_something_else_does_not_hold(changed: Assertion) -> None:
    with pytest.raises(StatementRefused):
        verify_by_passkey(RAW, changed, CURVE.public_key())
    assert verify_by_passkey(RAW, answer(), CURVE.public_key())[0] == STATEMENT


def test_the_counter_goes_up_where_there_is_one() -> None:
    assert verify_by_passkey(RAW, answer(count=8), CURVE.public_key(), sign_count=7)[1] == 8
    assert verify_by_passkey(RAW, answer(count=0), CURVE.public_key(), sign_count=0)[1] == 0
    for count in (0, 6, 7):
        with pytest.raises(StatementRefused, match="count"):
            verify_by_passkey(RAW, answer(count=count), CURVE.public_key(), sign_count=7)


@pytest.mark.control("REV-02")
@given(st.sampled_from(ReviewStatement.__struct_fields__), st.data())
def test_a_statement_that_was_changed_is_another_one(name: str, data: st.DataObject) -> None:
    values = {
        "decision": "deny", "approver": "ada@example.com", "comment": "other", "not_after": "2026-11-27T18:00:00.000Z",
        "review": "rv-" + "2" * 32, "nonce": "m" * 43, "format": "saw-review-statement/1",
    }  # fmt: skip
    value = values.get(name, data.draw(st.text("0123456789abcdef", min_size=64, max_size=64)))
    other = msgspec.structs.replace(STATEMENT, **{name: value})
    if other == STATEMENT:
        return
    with pytest.raises(StatementRefused):
        verify_by_passkey(encode_statement(other), answer(), CURVE.public_key())


def test_a_signature_by_a_registered_key_is_no_answer_of_a_passkey_and_the_other_way_round() -> None:
    signature = sign_review(STATEMENT, EDWARDS)
    forged = msgspec.structs.replace(answer(EDWARDS), signature=b64(bytes.fromhex(signature)))
    with pytest.raises(StatementRefused):
        verify_by_passkey(RAW, forged, EDWARDS.public_key())


def test_keys_go_to_their_form_in_webauthn_and_back_and_other_kinds_do_not_count() -> None:
    for key in (CURVE.public_key(), EDWARDS.public_key()):
        assert public_key_of(cose_key(key)) == key
    numbers = rsa.generate_private_key(65537, 2048).public_key().public_numbers()
    modulus = numbers.n.to_bytes(256, "big")
    for cose in (
        encode_cbor({1: 3, 3: -257, -1: modulus, -2: b"\x01\x00\x01"}),
        encode_cbor({1: 2, 3: -7}),
        b"\xa0",
        b"\x04",
    ):
        with pytest.raises(PasskeyRefused):
            public_key_of(cose)
