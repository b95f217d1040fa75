"""Secrets of sign-ins at rest: encrypted under a key of the broker, bound to the row that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from saw.broker.secret_place import SIGN_INS, load_seal_key
from saw.identity.sealed import SealBroken, SealKey
from saw.secrets.store import SecretStore

__all__ = ["Seal", "SealBroken"]


class Seal:
    """Encrypts secrets of sign-ins; the associated data say which row each is for."""

    def __init__(self, key: SealKey) -> None:
        self._key = key

    @classmethod
    def load(cls, secrets: SecretStore, random: Callable[[int], bytes]) -> Self:
        """Read the key; raise :class:`saw.errors.ConfigError` when it is missing or no key."""
        again = "remove it; everybody signs in again"
        return cls(load_seal_key(secrets, SIGN_INS, random, absent="run saw broker init", malformed=again))

    def close(self, row: str, raw: bytes) -> bytes:
        """Return ``raw`` encrypted for ``row``."""
        return self._key.seal(row.encode(), raw)

    def open(self, row: str, sealed: bytes) -> bytes:
        """Return what :meth:`close` was given; raise :class:`SealBroken` for anything else."""
        try:
            return self._key.open(row.encode(), sealed)
        except SealBroken as error:
            raise SealBroken("a stored secret of a sign-in cannot be opened", cure="sign in again") from error
