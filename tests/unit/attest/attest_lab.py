"""Builders shared by the attestation tests: crypto-agile event logs and a TPM in software that signs what it is told to."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from saw.attest.messages import Evidence, PolicyLogEntry
from saw.attest.policy_log import fold
from saw.attest.verifier import QUOTED_PCRS, RELEASED_PCRS, Expectation, quote_binding
from saw.identity.x509 import new_key_and_csr

SHA1, SHA256 = 0x0004, 0x000B
EV_NO_ACTION, EV_SEPARATOR, EV_IPL = 3, 4, 13
CURRENT = hashlib.sha256(b"current policy").hexdigest()
EARLIER = hashlib.sha256(b"earlier policy").hexdigest()
NONCE = bytes(range(32))
AK_ATTRIBUTES = 0x50072  # fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, restricted, sign

Event = tuple[int, int, bytes]  # PCR, type, measured data


def boot_events() -> list[Event]:
    """Firmware, option ROMs, configuration, boot loader, secure boot state and kernel image of a pretended boot."""
    events = [(pcr, EV_IPL, f"boot stage {pcr}.{step}".encode()) for pcr in (0, 1, 2, 4, 7, 9, 11) for step in range(3)]
    return events + [(pcr, EV_SEPARATOR, bytes(4)) for pcr in range(8)]


def log_header(banks: Iterable[tuple[int, int]] = ((SHA1, 20), (SHA256, 32))) -> bytes:
    banks = list(banks)
    inner = b"Spec ID Event03\0" + struct.pack("<I4BI", 0, 0, 2, 0, 2, len(banks))
    inner += b"".join(struct.pack("<HH", *bank) for bank in banks) + b"\0"
    return struct.pack("<II20sI", 0, EV_NO_ACTION, bytes(20), len(inner)) + inner


def log_event(event: Event) -> bytes:
    pcr, kind, data = event
    digests = struct.pack("<H", SHA1) + hashlib.sha1(data, usedforsecurity=False).digest()
    digests += struct.pack("<H", SHA256) + hashlib.sha256(data).digest()
    return struct.pack("<III", pcr, kind, 2) + digests + struct.pack("<I", len(data)) + data


def event_log(events: Iterable[Event]) -> bytes:
    return log_header() + b"".join(log_event(event) for event in events)


def boot_pcrs(events: Iterable[Event]) -> dict[int, bytes]:
    """The quoted PCRs after ``events``, policy PCR at zeros; computed apart from the code under test."""
    values = dict.fromkeys(QUOTED_PCRS, bytes(32))
    for pcr, kind, data in events:
        if pcr in values and kind != EV_NO_ACTION:
            values[pcr] = hashlib.sha256(values[pcr] + hashlib.sha256(data).digest()).digest()
    return values


def release(pcrs: Mapping[int, bytes]) -> dict[int, str]:
    return {pcr: pcrs[pcr].hex() for pcr in RELEASED_PCRS}


def entries(*digests: str) -> tuple[PolicyLogEntry, ...]:
    return tuple(PolicyLogEntry(index, digest, index) for index, digest in enumerate(digests, 1))


def sized(content: bytes) -> bytes:
    return struct.pack(">H", len(content)) + content


class SoftTpm:
    """An attestation key in software. No TPM: it signs any statement, which is what the refusal tests need."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())

    def ak_pub(self, *, attributes: int = AK_ATTRIBUTES, scheme: bytes = b"\x00\x18\x00\x0b", curve: int = 3) -> bytes:
        numbers = self.key.public_key().public_numbers()
        public = struct.pack(">HHI", 0x23, SHA256, attributes) + sized(b"") + b"\x00\x10" + scheme
        public += (
            struct.pack(">HH", curve, 0x10)
            + sized(numbers.x.to_bytes(32, "big"))
            + sized(numbers.y.to_bytes(32, "big"))
        )
        return sized(public)

    @staticmethod
    def attest(
        extra_data: bytes,
        pcrs: Mapping[int, bytes],
        *,
        magic: int = 0xFF544347,
        kind: int = 0x8018,
        bank: int = SHA256,
        clock: int = 5000,
        resets: int = 7,
        restarts: int = 0,
    ) -> bytes:
        bitmap = sum(1 << pcr for pcr in pcrs).to_bytes(3, "little")
        digest = hashlib.sha256(b"".join(pcrs[pcr] for pcr in sorted(pcrs))).digest()
        return (
            struct.pack(">IH", magic, kind)
            + sized(b"\x00\x0b" + bytes(32))
            + sized(extra_data)
            + struct.pack(">QIIBQ", clock, resets, restarts, 1, 1)
            + struct.pack(">IHB", 1, bank, 3)
            + bitmap
            + sized(digest)
        )

    def sign(self, attest: bytes) -> bytes:
        r, s = decode_dss_signature(self.key.sign(attest, ec.ECDSA(hashes.SHA256())))
        return struct.pack(">HH", 0x18, SHA256) + sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big"))


def spki(csr_pem: bytes) -> bytes:
    key = x509.load_pem_x509_csr(csr_pem).public_key()
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def soft_evidence(
    tpm: SoftTpm, log: tuple[PolicyLogEntry, ...] | None = None, **quote: int
) -> tuple[Evidence, Expectation]:
    """Good evidence and the expectation that accepts it; ``quote`` changes what the key signs."""
    log = entries(EARLIER, CURRENT) if log is None else log
    pcrs = boot_pcrs(boot_events()) | {14: fold(log)}
    _, csr = new_key_and_csr("ws-demo")
    attest = tpm.attest(quote_binding(NONCE, spki(csr)), pcrs, **quote)
    evidence = Evidence(
        workspace_id="ws-demo",
        nonce=NONCE,
        quote=attest,
        signature=tpm.sign(attest),
        pcrs={str(pcr): value.hex() for pcr, value in pcrs.items()},
        event_log=event_log(boot_events()),
        policy_log=log,
        csr_pem=csr.decode(),
    )
    expected = Expectation(
        ak_pub=tpm.ak_pub(), nonce=NONCE, pcrs=release(pcrs), released={EARLIER, CURRENT}, current=CURRENT
    )
    return evidence, expected
