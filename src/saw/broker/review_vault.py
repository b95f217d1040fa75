"""Calls and answers of reviews at rest: encrypted under a key of the broker, bound to the review that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self, TypeVar

import msgspec

from saw.broker.secret_place import REVIEWS, load_seal_key
from saw.errors import SawError
from saw.identity.sealed import SealBroken, SealKey
from saw.secrets.store import SecretStore

T = TypeVar("T")
What = Literal["call", "answer", "context"]


class BytesChanged(SawError):
    """What is stored of a review is not what was stored, or another key encrypted it."""

    code = "bytes_changed"


class Vault:
    """Encrypts what a review holds; the associated data are the review's id and what of it is encrypted."""

    def __init__(self, key: SealKey) -> None:
        self._key = key

    @classmethod
    def load(cls, secrets: SecretStore, random: Callable[[int], bytes]) -> Self:
        """Read the key; raise :class:`saw.errors.ConfigError` when it is missing or no key."""
        return cls(load_seal_key(secrets, REVIEWS, random))

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
