"""Secrets of sign-ins at rest: encrypted under a key of the broker, bound to the row that they belong to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from saw.broker.config import BrokerConfig
from saw.identity.sealed import SealBroken, SealKey, make_key_file

__all__ = ["Seal", "SealBroken", "make_seal_key", "seal_file"]


def seal_file(config: BrokerConfig) -> Path:
    """Return the path of the key that encrypts refresh tokens and begun sign-ins."""
    return config.keys / "sso.key"


def make_seal_key(config: BrokerConfig, random: Callable[[int], bytes] = os.urandom) -> bool:
    """Make the key (32 bytes, 0600) when single sign-on is configured and there is none; return whether one was made."""
    return config.sso is not None and make_key_file(seal_file(config), random)


class Seal:
    """Encrypts secrets of sign-ins; the associated data say which row each is for."""

    def __init__(self, key: SealKey) -> None:
        self._key = key

    @classmethod
    def load(cls, config: BrokerConfig, random: Callable[[int], bytes]) -> Self:
        """Read the key file; raise :class:`saw.errors.ConfigError` when it is missing or no key."""
        again = "remove it; everybody signs in again"
        return cls(SealKey.load(seal_file(config), random, missing="run saw broker init", malformed=again))

    def close(self, row: str, raw: bytes) -> bytes:
        """Return ``raw`` encrypted for ``row``."""
        return self._key.seal(row.encode(), raw)

    def open(self, row: str, sealed: bytes) -> bytes:
        """Return what :meth:`close` was given; raise :class:`SealBroken` for anything else."""
        try:
            return self._key.open(row.encode(), sealed)
        except SealBroken as error:
            raise SealBroken("a stored secret of a sign-in cannot be opened", cure="sign in again") from error
