"""The broker's verifier: decides from evidence whether a workspace is what its image and policy say.

Failures are collected, not thrown one by one, so that an operator sees all of them. Whatever goes wrong inside, the answer
is *not attested*.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from saw.attest import event_log
from saw.attest.credential import load_ek, make_credential
from saw.attest.messages import Evidence, EvidenceError, PolicyLogEntry, parse_evidence
from saw.attest.policy_log import POLICY_PCR, fold
from saw.attest.structures import Clock, Quote, parse_attestation_key, parse_quote, parse_signature
from saw.errors import SawError

__all__ = [
    "Evidence",
    "EvidenceError",
    "Expectation",
    "Failure",
    "PolicyLogEntry",
    "Verdict",
    "fold",
    "load_ek",
    "make_credential",
    "parse_attestation_key",
    "parse_evidence",
    "quote_binding",
    "verify_evidence",
    "verify_quote",
]

QUOTED_PCRS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14)
REPLAYED_PCRS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13)
#: 12 and 13 hold what the boot stub takes from outside the UKI: a changed command line, credentials, extensions. A golden
#: image has none, so a line that root or a hypervisor slips in next to the UKI shows.
RELEASED_PCRS = (0, 2, 3, 4, 7, 11, 12, 13)

#: After a reset the TPM clock may have lost this many milliseconds (Part 1, 36.3: the NV copy is at most that old).
CLOCK_LOSS_MS = 2**22

_ECDSA = ec.ECDSA(hashes.SHA256())


class Failure(msgspec.Struct, frozen=True):
    """One reason why evidence is not accepted. ``severity`` is ``critical`` when it may mean tampering, else ``error``."""

    code: str
    component: str
    severity: str
    detail: str


class Verdict(msgspec.Struct, frozen=True):
    """The outcome. ``policy_digest`` (last of the log) and ``clock`` are set only when ``ok``."""

    ok: bool
    failures: tuple[Failure, ...]
    policy_digest: str | None
    clock: Clock | None


class Expectation(msgspec.Struct, frozen=True):
    """What the broker knows: enrolled key, outstanding nonce, release record, released policies, last accepted clock.

    ``ak_pub`` is TPM2B_PUBLIC; ``pcrs`` maps PCR numbers to lower-case hex and must cover 0, 2, 3, 4, 7 and 11;
    ``released`` holds every digest ever released to the workspace's ring, ``current`` the one it must run now.
    """

    ak_pub: bytes
    nonce: bytes
    pcrs: Mapping[int, str]
    released: AbstractSet[str]
    current: str
    last_clock: int | None = None
    last_reset_count: int | None = None
    last_restart_count: int | None = None


class _Refused(SawError):
    code = "refused"


class _Findings:
    """Collects failures of independent checks."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []

    def add(self, code: str, component: str, detail: str, severity: str = "critical") -> None:
        self.failures.append(Failure(code, component, severity, detail))

    @contextmanager
    def check(self, component: str) -> Iterator[None]:
        """Turn any exception of one check into a failure of ``component``."""
        try:
            yield
        except SawError as error:
            self.add(error.code, component, error.message, "error")
        except Exception as error:  # noqa: BLE001 - any defect of a check must end as "not attested"
            self.add("verifier_exception", component, f"{type(error).__name__} while checking", "error")


def quote_binding(nonce: bytes, spki_der: bytes) -> bytes:
    """Return the qualifying data of a quote: SHA-256(nonce ‖ SHA-256(SubjectPublicKeyInfo DER))."""
    return hashlib.sha256(nonce + hashlib.sha256(spki_der).digest()).digest()


def verify_quote(ak_pub: bytes, quote: bytes, signature: bytes, extra_data: bytes, pcrs: Mapping[int, bytes]) -> Quote:
    """Check signature, kind, qualifying data, PCR selection and PCR digest of a quote; return it parsed.

    ``pcrs`` holds the claimed SHA-256 values. Raises a :class:`saw.errors.SawError` whose code names the first defect.
    """
    key = parse_attestation_key(ak_pub)
    try:
        key.public_key.verify(parse_signature(signature), quote, _ECDSA)
    except InvalidSignature as error:
        raise _refused("signature_invalid", "the enrolled attestation key did not sign this quote") from error
    parsed = parse_quote(quote)
    if not hmac.compare_digest(parsed.extra_data, extra_data):
        raise _refused("nonce_mismatch", "the quote is not bound to this nonce and this TLS key")
    if parsed.selection != QUOTED_PCRS:
        raise _refused("pcr_selection", f"the quote covers PCRs {list(parsed.selection)}")
    if tuple(sorted(pcrs)) != QUOTED_PCRS:
        raise _refused("pcr_values", f"values are given for PCRs {sorted(pcrs)}")
    if not hmac.compare_digest(hashlib.sha256(b"".join(pcrs[pcr] for pcr in QUOTED_PCRS)).digest(), parsed.pcr_digest):
        raise _refused("pcr_digest", "the PCR values given are not those quoted")
    return parsed


def verify_evidence(evidence: Evidence, expected: Expectation) -> Verdict:
    """Decide on ``evidence``; never raises. See the module's text and docs/attestation.md for what is checked."""
    findings = _Findings()
    quote: Quote | None = None
    pcrs: dict[int, bytes] = {}
    with findings.check("quote"):
        if not hmac.compare_digest(evidence.nonce, expected.nonce) or len(expected.nonce) < 16:
            raise _refused("nonce_mismatch", "the evidence answers another nonce")
        claimed = _pcr_values(evidence.pcrs)
        binding = quote_binding(evidence.nonce, _requested_key(evidence.csr_pem))
        quote = verify_quote(expected.ak_pub, evidence.quote, evidence.signature, binding, claimed)
        pcrs = claimed
    if quote is None:
        # Nothing else in the evidence is authentic without a good quote.
        if not findings.failures:  # pragma: no cover - a check that ends without result and without failure
            findings.add("verifier_exception", "quote", "no result", "error")
        return Verdict(ok=False, failures=tuple(findings.failures), policy_digest=None, clock=None)
    with findings.check("clock"):
        _check_clock(quote.clock, expected, findings)
    with findings.check("boot"):
        _check_release(pcrs, expected.pcrs, findings)
    with findings.check("event_log"):
        _check_event_log(evidence.event_log, pcrs, findings)
    with findings.check("policy"):
        _check_policy(evidence.policy_log, pcrs[POLICY_PCR], expected, findings)
    if findings.failures:
        return Verdict(ok=False, failures=tuple(findings.failures), policy_digest=None, clock=None)
    return Verdict(ok=True, failures=(), policy_digest=evidence.policy_log[-1].policy_digest, clock=quote.clock)


def _requested_key(csr_pem: str) -> bytes:
    """Return the SubjectPublicKeyInfo (DER) of an EC P-256 certificate request that its own key signed."""
    try:
        csr = x509.load_pem_x509_csr(csr_pem.encode())
        key, valid = csr.public_key(), csr.is_signature_valid
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise _refused("csr_invalid", "the certificate request is malformed") from error
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _refused("csr_invalid", "the certificate request is not one of an EC P-256 key, signed by that key")
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _pcr_values(pcrs: Mapping[str, str]) -> dict[int, bytes]:
    # Of at most two digits: int() refuses very many of them with an error of its own.
    numbered = {pcr: value for pcr, value in pcrs.items() if len(pcr) <= 2 and pcr.isdecimal()}
    values = {int(pcr): bytes.fromhex(value) for pcr, value in numbered.items() if pcr == str(int(pcr))}
    if len(values) != len(pcrs) or any(len(value) != 32 for value in values.values()):
        raise _refused("pcr_values", "a PCR number or value is malformed")
    return values


def _check_clock(clock: Clock, expected: Expectation, findings: _Findings) -> None:
    """Reset count, restart count and clock only move forward; a step back means an older TPM state was restored."""
    last_reset, last_restart, last_clock = expected.last_reset_count, expected.last_restart_count, expected.last_clock
    if last_reset is None or last_restart is None or last_clock is None:
        if not (last_reset is None and last_restart is None and last_clock is None):
            raise _refused("verifier_exception", "the last accepted clock is incomplete")
        return
    if clock.reset_count < last_reset:
        findings.add("reset_count_back", "clock", f"reset count {clock.reset_count} after {last_reset}")
    elif clock.reset_count > last_reset:
        if clock.clock + CLOCK_LOSS_MS < last_clock:
            findings.add("clock_back", "clock", f"clock {clock.clock} ms after {last_clock} ms, across a reset")
    elif clock.restart_count < last_restart:
        findings.add("restart_count_back", "clock", f"restart count {clock.restart_count} after {last_restart}")
    elif clock.clock <= last_clock:
        findings.add("clock_back", "clock", f"clock {clock.clock} ms after {last_clock} ms")


def _check_release(pcrs: Mapping[int, bytes], expected: Mapping[int, str], findings: _Findings) -> None:
    for pcr in RELEASED_PCRS:
        if pcr not in expected:
            findings.add("release_incomplete", "boot", f"the release record names no PCR {pcr}", "error")
        elif expected[pcr] != pcrs[pcr].hex():
            findings.add("pcr_mismatch", "boot", f"PCR {pcr} is {pcrs[pcr].hex()}, released is {expected[pcr]}")


def _check_event_log(raw: bytes, pcrs: Mapping[int, bytes], findings: _Findings) -> None:
    values = event_log.replay(event_log.parse(raw))
    for pcr in REPLAYED_PCRS:
        if values[pcr] != pcrs[pcr]:
            findings.add("event_log_mismatch", "event_log", f"the log does not lead to the quoted PCR {pcr}")


def _check_policy(log: tuple[PolicyLogEntry, ...], quoted: bytes, expected: Expectation, findings: _Findings) -> None:
    if fold(log) != quoted:
        findings.add("policy_pcr_mismatch", "policy", f"the policy log does not lead to the quoted PCR {POLICY_PCR}")
    if [entry.seq for entry in log] != list(range(1, len(log) + 1)):
        findings.add("policy_log_malformed", "policy", "the policy log is not numbered densely from 1", "error")
    for entry in log:
        if entry.policy_digest not in expected.released:
            findings.add("policy_not_released", "policy", f"entry {entry.seq} activated {entry.policy_digest}")
    if not log:
        findings.add("policy_missing", "policy", "no policy was activated since boot", "error")
    elif log[-1].policy_digest != expected.current:
        findings.add(
            "policy_not_current", "policy", f"{log[-1].policy_digest} runs, {expected.current} is released", "error"
        )


def _refused(code: str, message: str) -> _Refused:
    error = _Refused(message)
    error.code = code
    return error
