"""Calls and answers of reviews at rest: encrypted under a key of the broker, bound to the review that they belong to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self, TypeVar

import msgspec

from saw.broker.config import BrokerConfig
from saw.errors import SawError
from saw.identity.sealed import SealBroken, SealKey, make_key_file

T = TypeVar("T")
What = Literal["call", "answer", "context"]


class BytesChanged(SawError):
    """What is stored of a review is not what was stored, or another key encrypted it."""

    code = "bytes_changed"


def vault_file(config: BrokerConfig) -> Path:
    """Return the path of the key that encrypts reviewed calls at rest."""
    return config.keys / "reviews.key"


def make_vault_key(config: BrokerConfig, random: Callable[[int], bytes] = os.urandom) -> bool:
    """Make the key (32 bytes, 0600) when there is none; return whether one was made."""
    return make_key_file(vault_file(config), random)


class Vault:
    """Encrypts what a review holds; the associated data are the review's id and what of it is encrypted."""

    def __init__(self, key: SealKey) -> None:
        self._key = key

    @classmethod
    def load(cls, config: BrokerConfig, random: Callable[[int], bytes]) -> Self:
        """Read the key file; raise :class:`saw.errors.ConfigError` when it is missing or no key."""
        backup = "put back the key of the backup"
        missing = f"run saw broker init; after a restore, {backup}"
        return cls(SealKey.load(vault_file(config), random, missing=missing, malformed=backup))

    def seal(self, review: str, what: What, value: msgspec.Struct) -> bytes:
        """Return ``value`` encrypted."""
        return self._key.seal(_bound(review, what), msgspec.msgpack.encode(value))

    def open(self, review: str, what: What, sealed: bytes, kind: type[T]) -> T:
        """Return what :meth:`seal` was given; raise :class:`BytesChanged` for anything else."""
        try:
            return msgspec.msgpack.decode(self._key.open(_bound(review, what), sealed), type=kind)
        except (SealBroken, msgspec.DecodeError) as error:
            raise BytesChanged(
                f"the stored {what} of {review} cannot be opened",
                cure="the database was changed, or keys/reviews.key is not the one of this database",
            ) from error


def _bound(review: str, what: What) -> bytes:
    return f"saw-review/1:{review}:{what}".encode()
