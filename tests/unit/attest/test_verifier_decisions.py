"""The verifier accepts exactly good evidence: each refusal here differs from the accepted evidence in one thing."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from attest_lab import CURRENT, EARLIER, NONCE, SoftTpm, entries, soft_evidence

from saw.attest import verifier
from saw.attest.structures import StructureError, parse_attestation_key
from saw.attest.verifier import CLOCK_LOSS_MS, Expectation, verify_evidence, verify_quote
from saw.identity.x509 import new_key_and_csr

pytestmark = pytest.mark.control("POL-03")
replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def tpm():
    return SoftTpm()


def codes(evidence, expected):
    verdict = verify_evidence(evidence, expected)
    assert verdict.ok is (not verdict.failures)
    assert (verdict.policy_digest is None) is (verdict.clock is None) is (not verdict.ok)
    return sorted({failure.code for failure in verdict.failures})


def test_good_evidence_is_attested(tpm):
    evidence, expected = soft_evidence(tpm)
    verdict = verify_evidence(evidence, expected)
    assert verdict.ok
    assert verdict.failures == ()
    assert verdict.policy_digest == CURRENT
    assert (verdict.clock.clock, verdict.clock.reset_count) == (5000, 7)


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"magic": 0xFF544348}, "structure_malformed"),
        ({"kind": 0x8017}, "structure_malformed"),
        ({"bank": 0x0004}, "structure_malformed"),
    ],
)
def test_a_signed_statement_of_another_kind_is_refused(tpm, changed, code):
    assert codes(*soft_evidence(tpm, **changed)) == [code]


def test_another_key_is_refused(tpm):
    evidence, expected = soft_evidence(tpm)
    assert codes(evidence, replace(expected, ak_pub=SoftTpm().ak_pub())) == ["signature_invalid"]


def test_a_replayed_quote_is_refused(tpm):
    evidence, expected = soft_evidence(tpm)
    assert codes(evidence, replace(expected, nonce=bytes(32))) == ["nonce_mismatch"]
    assert codes(replace(evidence, nonce=bytes(32)), replace(expected, nonce=bytes(32))) == ["nonce_mismatch"]


def test_a_quote_does_not_vouch_for_another_tls_key(tpm):
    evidence, expected = soft_evidence(tpm)
    _, csr = new_key_and_csr("ws-demo")
    assert codes(replace(evidence, csr_pem=csr.decode()), expected) == ["nonce_mismatch"]
    assert codes(replace(evidence, csr_pem="-----BEGIN"), expected) == ["csr_invalid"]


def test_an_empty_nonce_is_no_nonce(tpm):
    evidence, expected = soft_evidence(tpm)
    assert codes(replace(evidence, nonce=b""), replace(expected, nonce=b"")) == ["nonce_mismatch"]


@pytest.mark.parametrize(("changed"), [{16: bytes(32)}, {6: bytes(32)}, {14: None}, {11: None}])
def test_another_pcr_selection_is_refused(tpm, changed):
    evidence, expected = soft_evidence(tpm)
    pcrs = {int(pcr): bytes.fromhex(value) for pcr, value in evidence.pcrs.items()}
    for pcr, value in changed.items():
        pcrs.pop(pcr, None)
        if value is not None:
            pcrs[pcr] = value
    binding = verifier.quote_binding(NONCE, verifier._requested_key(evidence.csr_pem))
    attest = tpm.attest(binding, pcrs)
    forged = replace(
        evidence, quote=attest, signature=tpm.sign(attest), pcrs={str(p): value.hex() for p, value in pcrs.items()}
    )
    assert codes(forged, expected) == ["pcr_selection"]


def test_values_other_than_those_quoted_are_refused(tpm):
    evidence, expected = soft_evidence(tpm)
    assert codes(replace(evidence, pcrs=evidence.pcrs | {"4": "00" * 32}), expected) == ["pcr_digest"]
    assert codes(replace(evidence, pcrs=evidence.pcrs | {"16": "00" * 32}), expected) == ["pcr_values"]
    assert codes(replace(evidence, pcrs=evidence.pcrs | {"04": "00" * 32}), expected) == ["pcr_values"]
    assert codes(replace(evidence, pcrs=evidence.pcrs | {"²": "00" * 32}), expected) == ["pcr_values"]


@pytest.mark.parametrize("pcr", verifier.RELEASED_PCRS)
def test_a_boot_that_differs_from_the_release_is_refused(tpm, pcr):
    evidence, expected = soft_evidence(tpm)
    assert codes(evidence, replace(expected, pcrs={**expected.pcrs, pcr: "ab" * 32})) == ["pcr_mismatch"]
    without = {key: value for key, value in expected.pcrs.items() if key != pcr}
    assert codes(evidence, replace(expected, pcrs=without)) == ["release_incomplete"]


@pytest.mark.parametrize(
    ("last", "now", "code"),
    [
        ((4999, 7, 0), {"clock": 5000}, None),
        ((5000, 7, 0), {"clock": 5000}, "clock_back"),
        ((5001, 7, 0), {"clock": 5000}, "clock_back"),
        ((9000, 6, 3), {"clock": 5000}, None),  # a reset: the clock may have lost what was not yet saved
        ((CLOCK_LOSS_MS + 5001, 6, 0), {"clock": 5000}, "clock_back"),
        ((10, 8, 0), {"clock": 5000}, "reset_count_back"),
        ((10, 7, 1), {"clock": 5000}, "restart_count_back"),
    ],
)
def test_the_clock_only_moves_forward(tpm, last, now, code):
    evidence, expected = soft_evidence(tpm, **now)
    clock, resets, restarts = last
    after = replace(expected, last_clock=clock, last_reset_count=resets, last_restart_count=restarts)
    assert codes(evidence, after) == ([code] if code else [])


def test_an_incomplete_record_of_the_clock_is_no_pass(tpm):
    evidence, expected = soft_evidence(tpm)
    assert codes(evidence, replace(expected, last_clock=1)) == ["verifier_exception"]


def test_policy_log_must_lead_to_the_quoted_pcr(tpm):
    evidence, expected = soft_evidence(tpm)
    assert codes(replace(evidence, policy_log=entries(CURRENT)), expected) == ["policy_pcr_mismatch"]
    assert codes(replace(evidence, policy_log=()), expected) == ["policy_missing", "policy_pcr_mismatch"]


def test_every_activated_policy_must_have_been_released_and_the_last_be_current(tpm):
    assert codes(*soft_evidence(tpm, entries(CURRENT))) == []
    assert codes(*soft_evidence(tpm, entries(CURRENT, EARLIER))) == ["policy_not_current"]
    assert codes(*soft_evidence(tpm, entries("ab" * 32, CURRENT))) == ["policy_not_released"]
    assert codes(*soft_evidence(tpm, ())) == ["policy_missing"]
    gap = tuple(replace(entry, seq=entry.seq + 1) for entry in entries(CURRENT))
    assert codes(*soft_evidence(tpm, gap)) == ["policy_log_malformed"]


def test_independent_failures_are_reported_together(tpm):
    evidence, expected = soft_evidence(tpm)
    expected = replace(expected, pcrs={**expected.pcrs, 4: "ab" * 32}, current="cd" * 32)
    assert codes(replace(evidence, event_log=b""), expected) == [
        "event_log_malformed",
        "pcr_mismatch",
        "policy_not_current",
    ]


@pytest.mark.parametrize(
    "broken", ["verify_quote", "_check_clock", "_check_release", "_check_event_log", "_check_policy"]
)
@pytest.mark.regression("CVE-2022-3500")
def test_an_exception_inside_the_verifier_ends_not_attested(tpm, monkeypatch, broken):
    def explode(*_):
        raise RuntimeError("a defect")

    evidence, expected = soft_evidence(tpm)
    monkeypatch.setattr(verifier, broken, explode)
    assert codes(evidence, expected) == ["verifier_exception"]


@pytest.mark.parametrize("part", ["quote", "signature", "event_log"])
def test_no_truncation_and_no_padding_is_accepted(tpm, part):
    evidence, expected = soft_evidence(tpm)
    raw = getattr(evidence, part)
    for changed in (raw + b"\0", *(raw[:length] for length in range(0, len(raw), 7))):
        assert not verify_evidence(replace(evidence, **{part: changed}), expected).ok


@pytest.mark.parametrize(
    "changed",
    [
        {"attributes": 0x40072},  # not restricted: signs anything
        {"attributes": 0x50070},  # may leave the TPM
        {"attributes": 0x50052},  # made outside the TPM
        {"attributes": 0x70072},  # decrypts too
        {"scheme": b"\x00\x10"},
        {"scheme": b"\x00\x18\x00\x04"},
        {"curve": 4},
    ],
)
def test_an_unsuitable_attestation_key_is_refused(tpm, changed):
    assert parse_attestation_key(tpm.ak_pub()).name[:2] == b"\x00\x0b"
    with pytest.raises(StructureError):
        parse_attestation_key(tpm.ak_pub(**changed))


def test_an_attestation_key_off_the_curve_is_refused(tpm):
    raw = bytearray(tpm.ak_pub())
    raw[-1] ^= 1
    with pytest.raises(StructureError):
        parse_attestation_key(bytes(raw))


def test_verify_quote_checks_the_digest_of_the_values(tpm):
    evidence, expected = soft_evidence(tpm)
    pcrs = {int(pcr): bytes.fromhex(value) for pcr, value in evidence.pcrs.items()}
    binding = verifier.quote_binding(NONCE, verifier._requested_key(evidence.csr_pem))
    quote = verify_quote(expected.ak_pub, evidence.quote, evidence.signature, binding, pcrs)
    joined = b"".join(pcrs[pcr] for pcr in quote.selection)
    assert quote.pcr_digest == hashlib.sha256(joined).digest()
    assert isinstance(expected, Expectation)
