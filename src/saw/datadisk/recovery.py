"""The recovery key of a data disk, sealed for the operator: whoever has their private key opens the disk without its TPM.

The machine makes the recovery key itself, seals it for the operator's public key and forgets it. The sealed form lies as a token
in the header of the volume, so it goes where the disk goes, and no service has to keep it. RSA-OAEP with SHA-256 (RFC 8017, 7.1);
its label names the volume, so that one volume's token says nothing about another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from pathlib import Path
from typing import Any, Literal

import msgspec
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from saw.datadisk.errors import DataDiskError
from saw.errors import ConfigError
from saw.files import write_atomic, write_private

TOKEN = "saw-recovery"  # noqa: S105 - a type, no secret
"""Type of the token in the header (LUKS2, 3.5)."""
KEY = re.compile(r"[0-9a-f]{64}")
"""A recovery key: 256 random bits in lower-case hex, which is what the key slot takes, as text."""
_BITS = 4096
_SMALLEST = 3072
_CURE = "make one with saw data-disk keys create"


class Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sealed recovery key as it lies in the header; ``key_id`` is the SHA-256 of the operator's public key (DER)."""

    type: Literal["saw-recovery"]
    keyslots: tuple[str, ...]
    key_id: str
    sealed: str


class Escrow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token and the UUID of its volume: all that the operator needs besides their private key."""

    uuid: str
    token: Token


def seal(key: str, uuid: str, public_pem: str, *, keyslot: str = "0") -> Token:
    """Return the token that hands ``key`` to whoever has the private key of ``public_pem``."""
    public = load_public(public_pem)
    sealed = public.encrypt(_checked(key).encode("ascii"), _padding(uuid))
    return Token("saw-recovery", (keyslot,), key_id(public), base64.b64encode(sealed).decode("ascii"))


def unseal(escrow: Escrow, private_pem: bytes) -> str:
    """Return the recovery key; raise :class:`DataDiskError` when the private key is another one or the token was changed."""
    try:
        private = serialization.load_pem_private_key(private_pem, None)
    except (ValueError, TypeError) as error:
        raise ConfigError("the private key cannot be read", cure="name the .key file, without a passphrase") from error
    if not isinstance(private, rsa.RSAPrivateKey) or key_id(private.public_key()) != escrow.token.key_id:
        raise DataDiskError(
            f"the recovery key is sealed for another key, {escrow.token.key_id[:16]}", cure="use that one's private key"
        )
    try:
        key = private.decrypt(base64.b64decode(escrow.token.sealed, validate=True), _padding(escrow.uuid))
        return _checked(key.decode("ascii"))
    except (ValueError, binascii.Error) as error:
        raise DataDiskError(
            f"the sealed recovery key of volume {escrow.uuid} is damaged or of another volume",
            cure="read it from the disk again: saw vm escrow",
        ) from error


def escrow_of(uuid: str, tokens: dict[str, dict[str, Any]]) -> Escrow:
    """Return what the header of volume ``uuid`` holds for the operator; raise :class:`DataDiskError` when it holds nothing."""
    for _, token in sorted(tokens.items()):
        if token.get("type") == TOKEN:
            try:
                return Escrow(uuid, msgspec.convert(token, Token))
            except msgspec.ValidationError as error:
                raise DataDiskError(f"the recovery token of volume {uuid} is not valid: {error}") from error
    raise DataDiskError(f"volume {uuid} has no recovery token", cure="only its own TPM opens it")


def load_public(pem: str) -> rsa.RSAPublicKey:
    """Return the operator's public key; raise :class:`ConfigError` unless it is RSA of 3072 bits or more."""
    try:
        public = serialization.load_pem_public_key(pem.encode())
    except (ValueError, TypeError) as error:
        raise ConfigError("the recovery key of the data disk is no public key (PEM)", cure=_CURE) from error
    if not isinstance(public, rsa.RSAPublicKey) or public.key_size < _SMALLEST:
        raise ConfigError(f"the recovery key of the data disk is not RSA of {_SMALLEST} bits or more", cure=_CURE)
    return public


def key_id(public: rsa.RSAPublicKey) -> str:
    """Return the SHA-256 (hex) of the DER form of ``public``."""
    raw = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(raw).hexdigest()


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Make ``NAME.key`` (0600) and ``NAME.pub`` in ``folder``; raise :class:`ConfigError` when there is one already."""
    private_file, public_file = folder / f"{name}.key", folder / f"{name}.pub"
    if private_file.exists() or public_file.exists():
        raise ConfigError(f"{private_file} is there already", cure="choose another name; disks may depend on this one")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = rsa.generate_private_key(public_exponent=65537, key_size=_BITS)
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    write_private(private_file, key.private_bytes(serialization.Encoding.PEM, form, plain))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    write_atomic(public_file, public)
    return private_file, public_file


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise ValueError("a recovery key has 64 lower-case hex digits")
    return key


def _padding(uuid: str) -> padding.OAEP:
    label = f"saw data disk recovery/1 {uuid}".encode()
    return padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), label)
