"""RFC 6962 word by word, tiles in memory, and a small log."""

from __future__ import annotations

import hashlib

from saw.audit.note import Signer, sign_checkpoint
from saw.audit.tiles import Leaf, TreeWriter

EMPTY = hashlib.sha256(b"").digest()


def mth(leaves: list[bytes]) -> bytes:
    """The Merkle tree hash of RFC 6962, section 2.1."""
    if not leaves:
        return EMPTY
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = split(len(leaves))
    return hashlib.sha256(b"\1" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def split(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def path(m: int, leaves: list[bytes]) -> list[bytes]:
    """PATH of section 2.1.1."""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    return [*path(m, leaves[:k]), mth(leaves[k:])] if m < k else [*path(m - k, leaves[k:]), mth(leaves[:k])]


def proof(m: int, leaves: list[bytes]) -> list[bytes]:
    """PROOF of section 2.1.2."""
    return subproof(m, leaves, True)


def subproof(m: int, leaves: list[bytes], known: bool) -> list[bytes]:
    if m == len(leaves):
        return [] if known else [mth(leaves)]
    k = split(len(leaves))
    if m <= k:
        return [*subproof(m, leaves[:k], known), mth(leaves[k:])]
    return [*subproof(m - k, leaves[k:], False), mth(leaves[:k])]


class Memory(dict):
    """Tiles in memory. ``fail`` ends the write after so many, as a crash would."""

    fail: int | None = None

    def read(self, path: str) -> bytes | None:
        return self.get(path)

    def write(self, path: str, data: bytes) -> None:
        if self.fail is not None:
            self.fail -= 1
            if self.fail < 0:
                raise KeyboardInterrupt
        self[path] = data

    def drop(self, path: str) -> None:
        for name in [name for name in self if name.startswith(path + "/")]:
            del self[name]


def leaf(number: int, salt: str = "") -> Leaf:
    return Leaf("edge", number + 1, hashlib.sha256(f"{number}{salt}".encode()).hexdigest())


class Log:
    """A log in memory with its key."""

    def __init__(self, name: str = "trail.example.com", seed: bytes = b"1" * 32) -> None:
        self.signer = Signer(name, 1, seed)
        self.files = Memory()
        self.size, self.root = 0, EMPTY

    def grow(self, leaves) -> bytes:
        """Append and return the signed checkpoint."""
        writer = TreeWriter(self.files, self.signer.public.name, self.size, self.root)
        writer.add(leaves)
        new = writer.finish()
        self.size, self.root = new.size, new.root
        return sign_checkpoint(new, self.signer).encode()
