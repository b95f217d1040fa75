"""Signing keys: their kinds, files, passphrases and key ids.

Officers sign with Ed25519 (RFC 8032) or, for TPMs and tokens that lack it, with ECDSA on P-256 over SHA-256 (FIPS 186-5).
A private key is PEM PKCS#8 in ``<name>.key`` (0600, encrypted when a passphrase is given; Ed25519 only), its public half
PEM in ``<name>.pub``. A key id is the one python-tuf computes for the key, so bundles and TUF metadata name keys alike.
"""

from __future__ import annotations

import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]

from saw.files import write_atomic, write_private
from saw.policy.errors import KeyFileError

PrivateKey = Ed25519PrivateKey
PublicKey = Ed25519PublicKey | ec.EllipticCurvePublicKey
"""What verifies a signature: Ed25519, or an elliptic curve key that is on P-256 (see :func:`parse_public_key`)."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")


def public_pem(key: PublicKey) -> bytes:
    """Return the PEM form (SubjectPublicKeyInfo) of ``key``."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def raw_public(key: PublicKey) -> bytes:
    """Return the 32 bytes of an Ed25519 key or the 65 of an uncompressed point; equal for equal keys whatever their ids."""
    if isinstance(key, Ed25519PublicKey):
        return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


def key_id(key: PublicKey) -> str:
    """Return the TUF key id of ``key`` (64 hexadecimal digits)."""
    identifier: str = SSlibKey.from_crypto(key).keyid
    return identifier


def key_kind(key: PublicKey) -> str:
    """Return ``ed25519`` or ``ecdsa-p256``."""
    return "ed25519" if isinstance(key, Ed25519PublicKey) else "ecdsa-p256"


def signature_holds(key: PublicKey, signature: bytes, data: bytes) -> bool:
    """Tell whether ``signature`` over ``data`` is by ``key``; ECDSA signatures are DER and over SHA-256."""
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, data)
        else:
            key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def parse_public_key(raw: bytes, name: str) -> PublicKey:
    """Return the key in the PEM ``raw``; raise :class:`KeyFileError` for any other kind than the two that count."""
    try:
        key = serialization.load_pem_public_key(raw)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"the key {name} cannot be read", cure="give the .pub file (PEM)") from error
    if isinstance(key, Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    cure = "make one with saw policy keys create, or an ECDSA P-256 key in a TPM or token"
    raise KeyFileError(f"the key {name} is neither Ed25519 nor ECDSA on P-256", cure=cure)


def create_key(directory: Path | str, name: str, passphrase: bytes | None = None) -> Ed25519PrivateKey:
    """Make ``<name>.key`` and ``<name>.pub`` in ``directory``; raise :class:`KeyFileError` when they exist already."""
    folder = Path(directory)
    if not _NAME.match(name):
        raise KeyFileError(f"{name!r} is not a key name", cure="use lower-case letters, digits and dashes")
    private_path, public_path = folder / f"{name}.key", folder / f"{name}.pub"
    for path in (private_path, public_path):
        if path.exists():
            raise KeyFileError(f"{path} exists already", cure="choose another name or remove the old key yourself")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = Ed25519PrivateKey.generate()
    write_private(private_path, private_pem(key, passphrase))
    write_atomic(public_path, public_pem(key.public_key()))
    return key


def private_pem(key: Ed25519PrivateKey, passphrase: bytes | None = None) -> bytes:
    """Return the PEM form (PKCS#8) of a private key, encrypted when a passphrase is given."""
    protection: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    )
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)


def load_private_key(path: Path | str, passphrase: bytes | None = None) -> Ed25519PrivateKey:
    """Return the private key in ``path``; raise :class:`KeyFileError` that says why it cannot be used."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise KeyFileError(f"cannot read the key {path}: {error.strerror}", cure="check the path") from error
    return parse_private_key(raw, str(path), passphrase)


def parse_private_key(raw: bytes, path: str, passphrase: bytes | None = None) -> Ed25519PrivateKey:
    """Return the private key in the PEM ``raw``; raise :class:`KeyFileError` that says that it came from ``path``."""
    try:
        key = serialization.load_pem_private_key(raw, passphrase)
    except TypeError as error:
        cure = "leave out --passphrase-file" if passphrase else "give its passphrase with --passphrase-file"
        raise KeyFileError(f"the key {path} cannot be opened: {error}", cure=cure) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        cure = "check the passphrase, or whether this is a PEM private key"
        raise KeyFileError(f"the key {path} cannot be read", cure=cure) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"the key {path} is not Ed25519", cure="make one with saw policy keys create")
    return key


def read_passphrase(path: Path | str | None) -> bytes | None:
    """Return the first line of the passphrase file, or ``None`` without a file."""
    if path is None:
        return None
    try:
        line = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise KeyFileError(f"cannot read the passphrase file {path}: {error.strerror}", cure="check it") from error
    if not line or not line[0]:
        raise KeyFileError(f"the passphrase file {path} is empty", cure="write the passphrase in its first line")
    return line[0]


def load_public_key(path: Path | str) -> PublicKey:
    """Return the public key in the PEM file ``path``; raise :class:`KeyFileError` that says why it cannot be used."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise KeyFileError(f"cannot read the key {path}: {error.strerror}", cure="check the path") from error
    return parse_public_key(raw, str(path))
