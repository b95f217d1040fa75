"""Calls and answers of reviews at rest: AES-256-GCM under a key of the broker, bound to the review that they belong to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self, TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from saw.broker.config import BrokerConfig
from saw.errors import ConfigError, SawError
from saw.files import write_private

T = TypeVar("T")
_KEY_BYTES = 32
_NONCE_BYTES = 12
What = Literal["call", "answer"]


class BytesChanged(SawError):
    """What is stored of a review is not what was stored, or another key encrypted it."""

    code = "bytes_changed"


def vault_file(config: BrokerConfig) -> Path:
    """Return the path of the key that encrypts reviewed calls at rest."""
    return config.keys / "reviews.key"


def make_vault_key(config: BrokerConfig, random: Callable[[int], bytes] = os.urandom) -> bool:
    """Make the key (32 bytes, 0600) when there is none; return whether one was made."""
    path = vault_file(config)
    if path.exists():
        return False
    write_private(path, random(_KEY_BYTES))
    return True


class Vault:
    """Encrypts with a fresh nonce each time; the associated data are the review's id and what of it is encrypted."""

    def __init__(self, key: bytes, random: Callable[[int], bytes]) -> None:
        self._aead = AESGCM(key)
        self._random = random

    @classmethod
    def load(cls, config: BrokerConfig, random: Callable[[int], bytes]) -> Self:
        """Read the key file; raise :class:`ConfigError` when it is missing or no key."""
        path = vault_file(config)
        try:
            key = path.read_bytes()
        except OSError as error:
            cure = "run saw broker init; after a restore, put back the key of the backup"
            raise ConfigError(f"cannot read {path}: {error.strerror}", cure=cure) from error
        if len(key) != _KEY_BYTES:
            raise ConfigError(f"{path} is not a key of {_KEY_BYTES} bytes", cure="put back the key of the backup")
        return cls(key, random)

    def seal(self, review: str, what: What, value: msgspec.Struct) -> bytes:
        """Return ``value`` encrypted: nonce, ciphertext, tag."""
        nonce = self._random(_NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, msgspec.msgpack.encode(value), _bound(review, what))

    def open(self, review: str, what: What, sealed: bytes, kind: type[T]) -> T:
        """Return what :meth:`seal` was given; raise :class:`BytesChanged` for anything else."""
        try:
            raw = self._aead.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _bound(review, what))
            return msgspec.msgpack.decode(raw, type=kind)
        except (InvalidTag, ValueError, msgspec.DecodeError) as error:
            raise BytesChanged(
                f"the stored {what} of {review} cannot be opened",
                cure="the database was changed, or keys/reviews.key is not the one of this database",
            ) from error


def _bound(review: str, what: What) -> bytes:
    return f"saw-review/1:{review}:{what}".encode()
