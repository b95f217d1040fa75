"""Things at rest under a key of ours: AES-256-GCM, each bound to what it belongs to; and the files that hold such keys."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from saw.errors import ConfigError, SawError
from saw.files import write_private

KEY_BYTES = 32
_NONCE_BYTES = 12


class SealBroken(SawError):
    """What is stored was changed, belongs elsewhere, or another key encrypted it."""

    code = "seal_broken"


def make_key_file(path: Path, random: Callable[[int], bytes] = os.urandom) -> bool:
    """Make a key (32 bytes, 0600) at ``path`` when there is none; return whether one was made."""
    if path.exists():
        return False
    write_private(path, random(KEY_BYTES))
    return True


class SealKey:
    """Encrypts with a fresh nonce each time. The associated data say what the ciphertext belongs to."""

    def __init__(self, key: bytes, random: Callable[[int], bytes]) -> None:
        self._aead = AESGCM(key)
        self._random = random

    @classmethod
    def load(cls, path: Path, random: Callable[[int], bytes], *, missing: str, malformed: str) -> Self:
        """Read a key file; raise :class:`ConfigError` with the cure ``missing`` or ``malformed``."""
        try:
            key = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}", cure=missing) from error
        if len(key) != KEY_BYTES:
            raise ConfigError(f"{path} is not a key of {KEY_BYTES} bytes", cure=malformed)
        return cls(key, random)

    def seal(self, bound: bytes, raw: bytes) -> bytes:
        """Return ``raw`` encrypted for ``bound``: nonce, ciphertext, tag (28 bytes longer than ``raw``)."""
        nonce = self._random(_NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, raw, bound)

    def open(self, bound: bytes, sealed: bytes) -> bytes:
        """Return what :meth:`seal` was given for ``bound``; raise :class:`SealBroken` for anything else."""
        try:
            return self._aead.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], bound)
        except (InvalidTag, ValueError) as error:
            raise SealBroken(
                "something stored cannot be opened", cure="it was changed, or the key is another"
            ) from error
