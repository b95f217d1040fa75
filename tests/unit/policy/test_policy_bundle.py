"""A bundle counts only when enough different officers signed exactly this content, for now, and as a later revision."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from saw.policy.bundle import BundleRefused, add_signatures, build_manifest, policy_digest, sign, verify_bundle
from saw.policy.keys import key_id
from saw.policy.loader import Bundle

pytestmark = [pytest.mark.control("POL-01"), pytest.mark.control("POL-02")]

Make = Callable[..., bytes]
Keys = dict[str, Ed25519PublicKey]


def refusal(raw: bytes, keys: Keys, now: datetime, **more: int) -> str:
    with pytest.raises(BundleRefused) as caught:
        verify_bundle(raw, keys, 2, now, **more)
    return caught.value.code


def edit(raw: bytes, change: Callable[[dict], None]) -> bytes:
    document = json.loads(raw)
    change(document)
    return json.dumps(document).encode()


def test_a_bundle_of_two_officers_is_accepted(signed: Make, trusted: Keys, now: datetime) -> None:
    bundle = verify_bundle(signed(revision=7), trusted, 2, now, min_revision=7)
    assert (bundle.revision, bundle.blueprint, bundle.policy.version) == (7, "coding", 1)
    assert bundle.digest == policy_digest(bundle.manifest)
    assert rfc8785.dumps(json.loads(bundle.manifest)) == bundle.manifest
    assert len(bundle.signers) == 2


def test_unsigned(signed: Make, trusted: Keys, now: datetime) -> None:
    assert refusal(signed(signers=0), trusted, now) == "unsigned"


def test_wrong_key(coding: Bundle, trusted: Keys, now: datetime) -> None:
    strangers = [Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()]
    raw = sign(build_manifest(coding, 1, now, now + timedelta(days=1)), coding.members, strangers)
    assert refusal(raw, trusted, now) == "threshold"


def test_wrong_key_under_a_trusted_id(signed: Make, trusted: Keys, now: datetime) -> None:
    def forge(document: dict) -> None:
        stranger = Ed25519PrivateKey.generate()
        document["envelope"]["signatures"][1]["sig"] = base64.b64encode(stranger.sign(b"anything")).decode()

    assert refusal(edit(signed(), forge), trusted, now) == "threshold"


def test_too_few_and_then_enough(signed: Make, trusted: Keys, now: datetime, officers: list[Ed25519PrivateKey]) -> None:
    alone = signed(signers=1)
    assert refusal(alone, trusted, now) == "threshold"
    assert verify_bundle(add_signatures(alone, [officers[2]]), trusted, 2, now).revision == 1


def test_one_officer_twice_counts_once(
    signed: Make, trusted: Keys, now: datetime, officers: list[Ed25519PrivateKey]
) -> None:
    def repeat(document: dict) -> None:
        document["envelope"]["signatures"] *= 2

    assert refusal(edit(signed(signers=1), repeat), trusted, now) == "threshold"

    def under_another_id(document: dict) -> None:
        first = document["envelope"]["signatures"][0]
        document["envelope"]["signatures"].append({**first, "keyid": "another-id-of-the-same-key"})

    both = {**trusted, "another-id-of-the-same-key": officers[0].public_key()}
    assert refusal(edit(signed(signers=1), under_another_id), both, now) == "threshold"


def test_window(signed: Make, trusted: Keys, now: datetime) -> None:
    assert refusal(signed(start=now - timedelta(days=31)), trusted, now) == "expired"
    assert refusal(signed(start=now - timedelta(days=30)), trusted, now) == "expired"
    assert refusal(signed(start=now + timedelta(seconds=1)), trusted, now) == "not_yet_valid"
    assert verify_bundle(signed(start=now), trusted, 2, now).revision == 1


def test_rolled_back(signed: Make, trusted: Keys, now: datetime) -> None:
    assert refusal(signed(revision=4), trusted, now, min_revision=5) == "rolled_back"
    assert verify_bundle(signed(revision=5), trusted, 2, now, min_revision=5).revision == 5


@pytest.mark.parametrize("host", [b"bad.example.com", b"longer.example.com"])
def test_member_swapped(signed: Make, trusted: Keys, now: datetime, host: bytes) -> None:
    def swap(document: dict) -> None:
        members = document["members"]
        text = base64.b64decode(members["policy.yaml"]).replace(b"api.example.com", host)
        members["policy.yaml"] = base64.b64encode(text).decode()

    assert refusal(edit(signed(), swap), trusted, now) == "member_mismatch"


def test_member_added_or_removed(signed: Make, trusted: Keys, now: datetime) -> None:
    assert refusal(edit(signed(), lambda d: d["members"].update(extra="")), trusted, now) == "member_mismatch"
    assert refusal(edit(signed(), lambda d: d["members"].pop("governance.yaml")), trusted, now) == "member_mismatch"


def test_manifest_changed_after_signing(signed: Make, trusted: Keys, now: datetime) -> None:
    def raise_revision(document: dict) -> None:
        manifest = json.loads(base64.b64decode(document["envelope"]["payload"]))
        manifest["revision"] = 99
        document["envelope"]["payload"] = base64.b64encode(rfc8785.dumps(manifest)).decode()

    assert refusal(edit(signed(), raise_revision), trusted, now) == "threshold"


def test_a_manifest_that_is_not_canonical(
    coding: Bundle, trusted: Keys, now: datetime, officers: list[Ed25519PrivateKey]
) -> None:
    manifest = build_manifest(coding, 1, now, now + timedelta(days=1))
    loose = json.dumps(json.loads(manifest), indent=1).encode()
    assert refusal(sign(loose, coding.members, officers[:2]), trusted, now) == "malformed"
    assert verify_bundle(sign(manifest, coding.members, officers[:2]), trusted, 2, now).revision == 1


def test_a_signed_policy_that_does_not_load(
    coding: Bundle, trusted: Keys, now: datetime, officers: list[Ed25519PrivateKey]
) -> None:
    members = {**coding.members, "policy.yaml": b"version: 1\nunknown_field: 1\n"}
    bundle = Bundle(members, coding.policy, coding.governance)
    manifest = build_manifest(bundle, 1, now, now + timedelta(days=1))
    assert refusal(sign(manifest, members, officers[:2]), trusted, now) == "policy_invalid"


def test_duplicate_keys_in_the_envelope(signed: Make, trusted: Keys, now: datetime) -> None:
    raw = signed()
    assert refusal(raw.replace(b'{"envelope"', b'{"format":"saw-bundle/1","envelope"', 1), trusted, now) == "malformed"


def test_unknown_fields_in_the_envelope(signed: Make, trusted: Keys, now: datetime) -> None:
    assert refusal(edit(signed(), lambda d: d.update(note="x")), trusted, now) == "malformed"


def test_another_payload_type(signed: Make, trusted: Keys, now: datetime) -> None:
    assert (
        refusal(edit(signed(), lambda d: d["envelope"].update(payloadType="text/plain")), trusted, now) == "malformed"
    )


def test_no_threshold_accepts_nothing(signed: Make, trusted: Keys, now: datetime) -> None:
    with pytest.raises(BundleRefused) as caught:
        verify_bundle(signed(), trusted, 0, now)
    assert caught.value.code == "threshold"


def test_truncated_anywhere(signed: Make, trusted: Keys, now: datetime) -> None:
    raw = signed().rstrip()
    for cut in range(0, len(raw), 97):
        assert refusal(raw[:cut], trusted, now) == "malformed"


@given(data=st.binary(max_size=400))
@settings(max_examples=100, deadline=None)
def test_no_bytes_crash_the_verifier(data: bytes) -> None:
    with pytest.raises(BundleRefused):
        verify_bundle(data, {}, 2, datetime.fromisoformat("2026-01-01T00:00:00+00:00"))


@given(
    signers=st.lists(st.integers(0, 4), max_size=8),
    threshold=st.integers(1, 4),
    known=st.sets(st.integers(0, 4), min_size=1),
)
@settings(max_examples=60, deadline=None)
def test_the_threshold_counts_distinct_trusted_keys(
    coding: Bundle, signers: list[int], threshold: int, known: set[int]
) -> None:
    keys = [Ed25519PrivateKey.from_private_bytes(bytes([40 + number]) * 32) for number in range(5)]
    moment = datetime.fromisoformat("2026-01-01T00:00:00+00:00")
    manifest = build_manifest(coding, 1, moment, moment + timedelta(days=1))
    raw = sign(manifest, coding.members, [keys[number] for number in signers])
    trusted = {key_id(keys[number].public_key()): keys[number].public_key() for number in known}
    enough = len(set(signers) & known) >= threshold
    try:
        verify_bundle(raw, trusted, threshold, moment)
        accepted = True
    except BundleRefused as error:
        assert error.code in {"threshold", "unsigned"}
        accepted = False
    assert accepted == enough
