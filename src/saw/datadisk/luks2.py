"""The header of a LUKS2 volume, read without any program, and taken away so that no key opens the volume any more.

Layout: "LUKS2 On-Disk Format Specification" 1.1.4, chapters 2 and 3. A binary header of 4096 bytes is followed by JSON; both lie
on the disk twice, and one copy is enough. Key slots follow, then the data. Numbers are big-endian.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import struct
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec

from saw.datadisk.errors import DataDiskError

_BINARY = 4096
_COPIES = (0, 0x4000, 0x8000, 0x10000, 0x20000, 0x40000, 0x80000, 0x100000, 0x200000, 0x400000)
"""Where a header may begin: the first copy, and the second one behind headers of every size that the format knows."""
_MAGIC = (b"LUKS\xba\xbe", b"SKUL\xba\xbe")
_LARGEST = 0x400000
_CHUNK = 1024 * 1024


class Header(msgspec.Struct, frozen=True):
    """What a valid header says: UUID and label of the volume, key slots, tokens by number, and where the data begins (bytes)."""

    uuid: str
    label: str
    keyslots: tuple[str, ...]
    tokens: dict[str, dict[str, Any]]
    data_offset: int


class Erased(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Evidence of an erasure: which volume, what held its key, and the bytes overwritten and read back as zeros."""

    path: str
    kind: str
    uuid: str
    keyslots: tuple[str, ...]
    overwritten: int
    read_back: int


def read_header(path: Path) -> Header | None:
    """Return the header of the volume in ``path`` (a file or a block device), None when no copy of one is valid."""
    with _opened(path, os.O_RDONLY) as stream:
        return next((found for at in _COPIES if (found := _copy_at(stream, at)) is not None), None)


def erase(path: Path) -> Erased | None:
    """Overwrite headers and key slots of the volume in ``path``, and read them back; None when it holds no LUKS2 volume.

    The data stays as it is, and its key is gone: nobody reads it any more, whatever they know. What a file system below keeps of
    its own (snapshots, copies on write) is not reached. Raises :class:`DataDiskError` when a byte was not overwritten.
    """
    with _opened(path, os.O_RDWR) as stream:
        header = next((found for at in _COPIES if (found := _copy_at(stream, at)) is not None), None)
        if header is None:
            return None
        disk = stream.fileno()
        for fill in (os.urandom, bytes):
            at = 0
            while at < header.data_offset:
                at += os.pwrite(disk, fill(min(_CHUNK, header.data_offset - at)), at)
            os.fsync(disk)
        os.posix_fadvise(disk, 0, header.data_offset, os.POSIX_FADV_DONTNEED)
        read = 0
        while read < header.data_offset:
            piece = os.pread(disk, min(_CHUNK, header.data_offset - read), read)
            if not piece or any(piece):
                break
            read += len(piece)
    if read != header.data_offset:
        raise DataDiskError(
            f"{path} was overwritten and does not read back as zeros", cure="look at the disk; wipe or destroy it"
        )
    return Erased(str(path), "luks2-header", header.uuid, header.keyslots, header.data_offset, read)


def _opened(path: Path, flags: int) -> FileIO:
    """Open a regular file or block device; a link is followed for reading alone (stable names of devices are links)."""
    try:
        follow = 0 if flags == os.O_RDONLY else os.O_NOFOLLOW
        descriptor = os.open(path, flags | follow | os.O_CLOEXEC)
    except OSError as error:
        raise DataDiskError(f"{path} cannot be opened: {error.strerror}", cure="name the data disk") from error
    kind = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        os.close(descriptor)
        raise DataDiskError(f"{path} is no file and no block device", cure="name the data disk")
    return FileIO(descriptor, "r" if flags == os.O_RDONLY else "r+")


def _copy_at(stream: FileIO, at: int) -> Header | None:
    stream.seek(at)
    binary = stream.read(_BINARY)
    if len(binary) != _BINARY or binary[:6] != _MAGIC[bool(at)] or struct.unpack_from(">H", binary, 6)[0] != 2:
        return None
    size, lies_at = struct.unpack_from(">Q", binary, 8)[0], struct.unpack_from(">Q", binary, 256)[0]
    if lies_at != at or not 2 * _BINARY <= size <= _LARGEST or _text(binary, 72, 32) != "sha256":
        return None
    area = stream.read(size - _BINARY)
    found = hashlib.sha256(binary[:448] + bytes(64) + binary[512:] + area).digest()
    if len(area) != size - _BINARY or not hmac.compare_digest(found, binary[448:480]):
        return None
    try:
        said = msgspec.json.decode(area.partition(b"\0")[0], type=_Metadata)
        offset = min(int(one["offset"]) for one in said.segments.values())
    except (msgspec.DecodeError, KeyError, ValueError, TypeError):
        return None
    if not 2 * size <= offset <= 2**40:
        return None
    return Header(_text(binary, 168, 40), _text(binary, 24, 48), tuple(sorted(said.keyslots)), said.tokens, offset)


class _Metadata(msgspec.Struct, frozen=True):
    """The parts of the JSON that are used here."""

    keyslots: dict[str, Any]
    segments: dict[str, dict[str, Any]]
    tokens: dict[str, dict[str, Any]] = {}


def _text(raw: bytes, at: int, size: int) -> str:
    return raw[at : at + size].partition(b"\0")[0].decode("utf-8", "replace")
