"""TPM2_MakeCredential in software (TPM 2.0 Library, Part 1, section 24 "Credential Protection", and 11.4.10.2 KDFa).

Only a TPM that holds the private endorsement key *and* an object with exactly the given name can recover the secret. That
is what binds an attestation key to the workspace whose endorsement key was recorded at creation.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from saw.attest.structures import StructureError, parse_attestation_key

_MAX_SECRET = 32


def load_ek(ek_pub_pem: bytes | str) -> rsa.RSAPublicKey:
    """Return the endorsement key of a PEM (SubjectPublicKeyInfo); it must be RSA 2048 with exponent 65537."""
    raw = ek_pub_pem.encode() if isinstance(ek_pub_pem, str) else ek_pub_pem
    try:
        key = serialization.load_pem_public_key(raw)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StructureError("the endorsement key is malformed", cure="send its public part as PEM") from error
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != 2048 or key.public_numbers().e != 65537:
        raise StructureError("the endorsement key is not RSA 2048", cure="use the TPM's default RSA endorsement key")
    return key


def make_credential(
    ek_pub_pem: bytes | str, ak_pub: bytes, secret: bytes, random: Callable[[int], bytes] = os.urandom
) -> tuple[bytes, bytes]:
    """Protect ``secret`` (1–32 bytes) for the TPM with this endorsement key and attestation key (TPM2B_PUBLIC).

    Returns TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET. Assumes the default endorsement key template: name algorithm
    SHA-256 and AES-128-CFB (TCG EK Credential Profile, template L-1).
    """
    if not 1 <= len(secret) <= _MAX_SECRET:
        raise StructureError(f"a secret of {len(secret)} bytes cannot be protected", cure="use 1 to 32 bytes")
    name = parse_attestation_key(ak_pub).name
    seed = random(hashlib.sha256().digest_size)
    encrypted_seed = load_ek(ek_pub_pem).encrypt(
        seed, padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=b"IDENTITY\0")
    )
    encryptor = Cipher(algorithms.AES(kdfa(seed, b"STORAGE", name, b"", 128)), CFB(bytes(16))).encryptor()
    identity = encryptor.update(_sized(secret)) + encryptor.finalize()
    integrity = hmac.digest(kdfa(seed, b"INTEGRITY", b"", b"", 256), identity + name, "sha256")
    return _sized(_sized(integrity) + identity), _sized(encrypted_seed)


def kdfa(key: bytes, label: bytes, context_u: bytes, context_v: bytes, bits: int) -> bytes:
    """KDFa with HMAC-SHA-256 (SP 800-108 counter mode) for up to 256 ``bits``, a multiple of eight."""
    message = (1).to_bytes(4, "big") + label + b"\0" + context_u + context_v + bits.to_bytes(4, "big")
    return hmac.digest(key, message, "sha256")[: bits // 8]


def _sized(content: bytes) -> bytes:
    return len(content).to_bytes(2, "big") + content
