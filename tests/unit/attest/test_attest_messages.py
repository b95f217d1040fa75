"""The wire form of evidence: strict and bounded."""

from __future__ import annotations

import json

import msgspec
import pytest
from attest_lab import SoftTpm, soft_evidence
from hypothesis import given
from hypothesis import strategies as st

from saw.attest.credential import kdfa, load_ek, make_credential
from saw.attest.messages import MAX_EVIDENCE, EvidenceError, parse_evidence
from saw.attest.structures import StructureError, parse_attestation_key, parse_quote, parse_signature

pytestmark = pytest.mark.control("POL-03")
GOOD, _ = soft_evidence(SoftTpm())


def test_evidence_survives_the_wire_in_the_documented_form():
    raw = msgspec.json.encode(GOOD)
    assert parse_evidence(raw) == GOOD
    assert set(json.loads(raw)) == {
        "workspace_id",
        "nonce_b64",
        "quote_b64",
        "signature_b64",
        "pcrs",
        "event_log_b64",
        "policy_log",
        "csr_pem",
        "ssh_host_pub",
    }


@pytest.mark.parametrize(
    "change",
    [
        {"more": 1},
        {"workspace_id": "../x"},
        {"nonce_b64": "A" * 200},
        {"quote_b64": "not base64!"},
        {"event_log_b64": "AAAA" * 200_000},
        {"pcrs": {"0": "AB" * 32}},
        {"pcrs": {str(n): "ab" * 32 for n in range(30)}},
        {"policy_log": [{"seq": 0, "policy_digest": "ab" * 32, "revision": 1}]},
        {"policy_log": [{"seq": 1, "policy_digest": "ab", "revision": 1}]},
        {"csr_pem": "x" * 9000},
    ],
    ids=lambda change: next(iter(change)),
)
def test_malformed_or_oversize_evidence_is_refused(change):
    document = json.loads(msgspec.json.encode(GOOD)) | change
    with pytest.raises(EvidenceError):
        parse_evidence(json.dumps(document).encode())


def test_oversize_evidence_is_refused_before_it_is_parsed():
    with pytest.raises(EvidenceError, match="too long"):
        parse_evidence(b" " * (MAX_EVIDENCE + 1))


@given(st.binary(max_size=200))
def test_tpm_structures_parse_or_are_refused(raw):
    for parse in (parse_quote, parse_signature, parse_attestation_key):
        with pytest.raises(StructureError):
            parse(raw)


def test_kdfa_gives_what_sp_800_108_in_counter_mode_gives():
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

    reference = KBKDFHMAC(
        algorithm=hashes.SHA256(),
        mode=Mode.CounterMode,
        length=16,
        rlen=4,
        llen=4,
        location=CounterLocation.BeforeFixed,
        label=b"STORAGE",
        context=b"name",
        fixed=None,
    )
    assert kdfa(b"k" * 32, b"STORAGE", b"name", b"", 128) == reference.derive(b"k" * 32)


@pytest.mark.parametrize("secret", [b"", b"x" * 33])
def test_make_credential_refuses_secrets_of_other_sizes(secret):
    with pytest.raises(StructureError, match="bytes"):
        make_credential("", SoftTpm().ak_pub(), secret)


def test_an_endorsement_key_must_be_rsa_2048():
    from cryptography.hazmat.primitives import serialization

    for raw in (
        "no key",
        SoftTpm()
        .key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
    ):
        with pytest.raises(StructureError):
            load_ek(raw)
