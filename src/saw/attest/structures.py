"""TPM 2.0 structures, read by hand (TPM 2.0 Library, Part 2: Structures).

Every parser consumes its whole input; a byte left over, a length that runs past the end or an unexpected constant raises
:class:`StructureError`. Integers are big-endian.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from saw.errors import SawError

TPM_GENERATED = 0xFF544347
TPM_ST_ATTEST_QUOTE = 0x8018
TPM_ALG_SHA256 = 0x000B
TPM_ALG_NULL = 0x0010
TPM_ALG_ECDSA = 0x0018
TPM_ALG_ECC = 0x0023
TPM_ECC_NIST_P256 = 0x0003

# TPMA_OBJECT (Part 2, 8.3)
FIXED_TPM = 1 << 1
FIXED_PARENT = 1 << 4
SENSITIVE_DATA_ORIGIN = 1 << 5
RESTRICTED = 1 << 16
DECRYPT = 1 << 17
SIGN = 1 << 18
_REQUIRED = {
    "fixedTPM": FIXED_TPM,
    "fixedParent": FIXED_PARENT,
    "sensitiveDataOrigin": SENSITIVE_DATA_ORIGIN,
    "restricted": RESTRICTED,
    "sign": SIGN,
}


class StructureError(SawError):
    """A TPM structure is malformed or not of the kind expected."""

    code = "structure_malformed"


class Reader:
    """A cursor over big-endian TPM data."""

    def __init__(self, raw: bytes, what: str) -> None:
        self._raw = raw
        self._at = 0
        self._what = what

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        end = self._at + count
        if end > len(self._raw):
            raise StructureError(f"{self._what} is cut short at byte {self._at}", cure="send the TPM's own output")
        piece = self._raw[self._at : end]
        self._at = end
        return piece

    def integer(self, size: int) -> int:
        """Return the next unsigned integer of ``size`` bytes."""
        return int.from_bytes(self.take(size), "big")

    def sized(self, limit: int = 1024) -> bytes:
        """Return the content of the next TPM2B of at most ``limit`` bytes."""
        size = self.integer(2)
        if size > limit:
            raise StructureError(f"{self._what} holds a field of {size} bytes", cure="send the TPM's own output")
        return self.take(size)

    def expect(self, size: int, value: int, name: str) -> None:
        """Consume an integer that must equal ``value``."""
        found = self.integer(size)
        if found != value:
            raise StructureError(
                f"{self._what} has {name} {found:#x}, not {value:#x}", cure="make key and quote as documented"
            )

    def end(self) -> None:
        """Check that everything was consumed."""
        if self._at != len(self._raw):
            raise StructureError(f"{self._what} has bytes behind its end", cure="send the TPM's own output")


class Clock(msgspec.Struct, frozen=True):
    """TPMS_CLOCK_INFO: milliseconds, resets and restarts (resumes); ``safe`` is false after an unorderly stop."""

    clock: int
    reset_count: int
    restart_count: int
    safe: bool


class Quote(msgspec.Struct, frozen=True):
    """The parts of a TPMS_ATTEST of type quote. ``selection`` lists the SHA-256 PCRs quoted, ascending."""

    signer: bytes
    extra_data: bytes
    clock: Clock
    firmware_version: int
    selection: tuple[int, ...]
    pcr_digest: bytes


class AttestationKey(msgspec.Struct, frozen=True):
    """An attestation key: its verifying key and its TPM name (algorithm ‖ SHA-256 of TPMT_PUBLIC)."""

    public_key: ec.EllipticCurvePublicKey
    name: bytes


def parse_quote(raw: bytes) -> Quote:
    """Parse TPMS_ATTEST (Part 2, 10.12.12) of type quote over SHA-256 PCRs only."""
    reader = Reader(raw, "the quote")
    reader.expect(4, TPM_GENERATED, "magic")
    reader.expect(2, TPM_ST_ATTEST_QUOTE, "type")
    signer = reader.sized(68)
    extra_data = reader.sized(64)
    clock = Clock(
        clock=reader.integer(8),
        reset_count=reader.integer(4),
        restart_count=reader.integer(4),
        safe=bool(reader.integer(1)),
    )
    firmware_version = reader.integer(8)
    reader.expect(4, 1, "number of PCR banks")
    reader.expect(2, TPM_ALG_SHA256, "PCR bank")
    bitmap = reader.take(reader.integer(1))
    selection = tuple(8 * byte + bit for byte, bits in enumerate(bitmap) for bit in range(8) if bits >> bit & 1)
    pcr_digest = reader.sized(64)
    reader.end()
    return Quote(signer, extra_data, clock, firmware_version, selection, pcr_digest)


def parse_signature(raw: bytes) -> bytes:
    """Parse TPMT_SIGNATURE (Part 2, 11.3.4), ECDSA with SHA-256 only; return it as an ASN.1 signature."""
    reader = Reader(raw, "the signature")
    reader.expect(2, TPM_ALG_ECDSA, "scheme")
    reader.expect(2, TPM_ALG_SHA256, "hash")
    r, s = int.from_bytes(reader.sized(32), "big"), int.from_bytes(reader.sized(32), "big")
    reader.end()
    return encode_dss_signature(r, s)


@lru_cache(maxsize=8192)
def parse_attestation_key(raw: bytes) -> AttestationKey:
    """Parse TPM2B_PUBLIC (Part 2, 12.2.5) of an attestation key.

    Required: ECC P-256, ECDSA with SHA-256, name algorithm SHA-256, fixedTPM, fixedParent, sensitiveDataOrigin,
    restricted, sign, and not decrypt: only such a key signs nothing but what the TPM itself made.
    """
    outer = Reader(raw, "the attestation key")
    public = outer.sized()
    outer.end()
    reader = Reader(public, "the attestation key")
    reader.expect(2, TPM_ALG_ECC, "type")
    reader.expect(2, TPM_ALG_SHA256, "name algorithm")
    attributes = reader.integer(4)
    missing = [name for name, bit in _REQUIRED.items() if not attributes & bit]
    if missing or attributes & DECRYPT:
        raise StructureError(
            f"the attestation key has unsuitable attributes ({', '.join(missing) or 'decrypt'})",
            cure="create a restricted signing key that is fixed to the TPM",
        )
    reader.sized(64)
    reader.expect(2, TPM_ALG_NULL, "symmetric algorithm")
    reader.expect(2, TPM_ALG_ECDSA, "scheme")
    reader.expect(2, TPM_ALG_SHA256, "scheme hash")
    reader.expect(2, TPM_ECC_NIST_P256, "curve")
    reader.expect(2, TPM_ALG_NULL, "key derivation")
    x, y = int.from_bytes(reader.sized(32), "big"), int.from_bytes(reader.sized(32), "big")
    reader.end()
    try:
        key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except ValueError as error:
        raise StructureError("the attestation key is no point of P-256", cure="send the TPM's own output") from error
    return AttestationKey(public_key=key, name=TPM_ALG_SHA256.to_bytes(2, "big") + hashlib.sha256(public).digest())
