"""The hash tree over a read-only file system, by which the kernel checks every block of it when it is read (dm-verity).

Own code, as for what a boot measures (:mod:`saw.image.expected`): it needs no device, no root rights and no further program on
the builder, and a test holds it against cryptsetup's ``veritysetup``. Format: the kernel's documentation, admin-guide/
device-mapper/verity, version 1 with a superblock (cryptsetup, "DMVerity"); SHA-256, blocks of 4096 bytes for data and hashes.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import uuid
from pathlib import Path

from saw.image.disk import ImageError

BLOCK = 4096


def write_tree(data: Path, target: Path, *, salt: bytes, identity: uuid.UUID) -> str:
    """Write the hash tree of ``data`` to ``target``, its superblock first; return the root hash (lower-case hex).

    Equal bytes, salt and identity give an equal tree. Raises :class:`ImageError` for what is no whole number of blocks.
    """
    with data.open("rb") as stream:
        size = stream.seek(0, 2)
        if not size or size % BLOCK:
            raise ImageError(f"{data} is no whole number of blocks of {BLOCK} bytes", cure="build the image again")
        if not 0 < len(salt) <= 256:
            raise ImageError(f"a salt of {len(salt)} bytes is none for a hash tree", cure="take 1 to 256 bytes")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held, memoryview(held) as content:
            levels = [_hashes(content, salt)]
    while len(levels[-1]) > BLOCK:
        levels.append(_hashes(memoryview(levels[-1]), salt))
    head = struct.pack(
        "<8sII16s32sIIQH6x256s168x",
        b"verity\0\0", 1, 1, identity.bytes, b"sha256", BLOCK, BLOCK, size // BLOCK, len(salt), salt,
    )  # fmt: skip
    with target.open("wb") as stream:
        stream.write(head.ljust(BLOCK, b"\0"))
        for level in reversed(levels):  # the root's block comes first
            stream.write(level)
    return hashlib.sha256(salt + levels[-1]).hexdigest()


def partition_ids(root_hash: str) -> tuple[uuid.UUID, uuid.UUID]:
    """Return the GUIDs of the partitions with the data and with the hash tree: the two halves of the root hash.

    So says the Discoverable Partitions Specification; whoever knows the root hash finds both.
    """
    return uuid.UUID(root_hash[:32]), uuid.UUID(root_hash[32:])


def _hashes(content: memoryview, salt: bytes) -> bytes:
    """Return the hashes of all blocks of ``content``, in whole blocks."""
    salted, found = hashlib.sha256(salt), bytearray()
    for place in range(0, len(content), BLOCK):
        one = salted.copy()
        one.update(content[place : place + BLOCK])
        found += one.digest()
    return bytes(found).ljust(-(-len(found) // BLOCK) * BLOCK, b"\0")
