"""The provider ``sealed``: each secret a file under AES-256-GCM (NIST SP 800-38D), all under one key that lies elsewhere.

A file is :data:`HEADER`, eight bytes that tell which key sealed it, a nonce of 12 bytes, ciphertext and tag. Header, key id and
the secret's name are authenticated with it, so that a file cannot take another's place. What this does not show is age: an
older file of the same name under the same key opens too.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from pathlib import Path

from saw.identity.sealed import KEY_BYTES, SealBroken, SealKey
from saw.secrets.folder import Folder
from saw.secrets.store import SecretBroken, SecretError, check_name, check_value

HEADER = b"saw-sealed/1\n"
_ID_BYTES = 8
SUFFIX = ".sealed"
"""Ends the names of sealed files."""


class SealedStore:
    """Secrets in files that open with ``key`` (32 bytes) alone."""

    kind = "sealed"

    def __init__(self, root: Path, key: bytes, random: Callable[[int], bytes] = os.urandom) -> None:
        if len(key) != KEY_BYTES:
            raise SecretError(f"a sealing key of {len(key)} bytes", cure=f"it has {KEY_BYTES}")
        self.folder = Folder(root, SUFFIX)
        self.place = str(root)
        self._key = SealKey(key, random)
        self._head = HEADER + hmac.digest(key, b"saw-sealed/1 key id", hashlib.sha256)[:_ID_BYTES]

    def read(self, name: str) -> bytes:
        """Return a secret; raise :class:`SecretBroken`, which names the file, when it does not open."""
        raw = self.folder.read(check_name(name))
        path = self.folder.path(name)
        if not raw.startswith(HEADER):
            raise _broken(name, path, "is no sealed secret of this version", "put it back from the backup")
        if not hmac.compare_digest(raw[: len(self._head)], self._head):
            raise _broken(name, path, "was sealed under another key", "hand over the key of this installation")
        try:
            return self._key.open(self._bound(name), raw[len(self._head) :])
        except SealBroken as error:
            words = "was changed, cut, or belongs to another secret"
            raise _broken(name, path, words, "put it back from the backup; look for who changed it") from error

    def write(self, name: str, value: bytes, *, new: bool = False) -> None:
        """Store a secret under a fresh nonce."""
        sealed = self._head + self._key.seal(self._bound(check_name(name)), check_value(name, value))
        self.folder.write(name, sealed, new=new)

    def remove(self, name: str) -> None:
        """Remove a secret."""
        self.folder.remove(check_name(name))

    def names(self) -> list[str]:
        """Return the names of all sealed files."""
        return self.folder.names()

    def close(self) -> None:
        """Nothing is held."""

    def _bound(self, name: str) -> bytes:
        return self._head + name.encode()


def _broken(name: str, path: Path, reason: str, cure: str) -> SecretBroken:
    return SecretBroken(f"{path} {reason}", cure=cure, details={"secret": name, "path": str(path)})
