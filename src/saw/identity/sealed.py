"""Things at rest under a key of ours: AES-256-GCM, each bound to what it belongs to."""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from saw.errors import SawError

KEY_BYTES = 32
_NONCE_BYTES = 12


class SealBroken(SawError):
    """What is stored was changed, belongs elsewhere, or another key encrypted it."""

    code = "seal_broken"


class SealKey:
    """Encrypts with a fresh nonce each time. The associated data say what the ciphertext belongs to."""

    def __init__(self, key: bytes, random: Callable[[int], bytes]) -> None:
        self._aead = AESGCM(key)
        self._random = random

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
