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

from saw import jsontext
from saw.datadisk.errors import DataDiskError

_BINARY = 4096
_COPIES = (0, 0x4000, 0x8000, 0x10000, 0x20000, 0x40000, 0x80000, 0x100000, 0x200000, 0x400000)
"""Where a header may begin: the first copy, and the second one behind headers of every size that the format knows."""
_MAGIC = (b"LUKS\xba\xbe", b"SKUL\xba\xbe")
_LARGEST = 0x400000
_JSON = 0x80000
"""Most bytes of a header's JSON that are read; cryptsetup's own are 12 KiB."""
_KEYS = 16 * 1024 * 1024
"""Where cryptsetup lets the data begin. Headers and key slots lie before it, whatever a header that was tampered with says."""
_CHUNK = 1024 * 1024
_UNREADABLE = (msgspec.DecodeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
"""What parsing raises; the guest's root writes what is parsed."""


class Header(msgspec.Struct, frozen=True):
    """What a valid header says: UUID and label of the volume, key slots, tokens by number, and where the data begins (bytes)."""

    uuid: str
    label: str
    keyslots: tuple[str, ...]
    tokens: dict[str, dict[str, Any]]
    data_offset: int


class Erased(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Evidence of an erasure: which volume, what held its key, and the bytes overwritten and read back as zeros.

    ``extent`` is how many bytes from the start have to go. ``kind`` is ``luks2-header``, or ``luks2-unreadable`` where no copy of
    a header is valid; UUID and key slots are unknown then.
    """

    path: str
    kind: str
    uuid: str
    keyslots: tuple[str, ...]
    overwritten: int
    read_back: int
    extent: int = 0


def read_header(path: Path) -> Header | None:
    """Return the header of the volume in ``path`` (a file or a block device), None when no copy of one is valid."""
    with _opened(path, os.O_RDONLY) as stream:
        return _header(stream)


def plan(path: Path, *, unreadable: bool = False) -> Erased | None:
    """Return what :func:`erase` is to do, with nothing done yet; None for a disk without a valid header, unless ``unreadable``.

    At least the first 16 MiB go, and never more than there is: the header is the guest's word.
    """
    with _opened(path, os.O_RDONLY) as stream:
        header, size = _header(stream), _size(stream)
    if header is None:
        return Erased(str(path), "luks2-unreadable", "", (), 0, 0, min(size, _KEYS)) if unreadable else None
    extent = min(size, max(header.data_offset, _KEYS))
    return Erased(str(path), "luks2-header", header.uuid, header.keyslots, 0, 0, extent)


def zeros(path: Path, extent: int) -> bool:
    """Tell whether the first ``extent`` bytes of ``path`` are there and zeros."""
    with _opened(path, os.O_RDONLY) as stream:
        return _zeros(stream.fileno(), extent) == extent


def erase(path: Path, planned: Erased) -> Erased:
    """Overwrite headers and key slots of the volume in ``path`` as ``planned``, and read them back.

    The data behind them stays as it is, and its key is gone: nobody reads it any more, whatever they know. What a file system
    below keeps of its own (snapshots, copies on write) is not reached. Raises :class:`DataDiskError` when a byte was not
    overwritten.
    """
    with _opened(path, os.O_RDWR) as stream:
        disk, extent = stream.fileno(), min(planned.extent, _size(stream))
        for fill in (os.urandom, bytes):
            at = 0
            while at < extent:
                at += os.pwrite(disk, fill(min(_CHUNK, extent - at)), at)
            os.fsync(disk)
        os.posix_fadvise(disk, 0, extent, os.POSIX_FADV_DONTNEED)
        read = _zeros(disk, extent)
    if read != extent:
        raise DataDiskError(
            f"{path} was overwritten and does not read back as zeros", cure="look at the disk; wipe or destroy it"
        )
    return msgspec.structs.replace(planned, path=str(path), overwritten=extent, read_back=read, extent=extent)


def _header(stream: FileIO) -> Header | None:
    size = _size(stream)
    return next((found for at in _COPIES if (found := _copy_at(stream, at, size)) is not None), None)


def _size(stream: FileIO) -> int:
    return stream.seek(0, os.SEEK_END)


def _zeros(disk: int, extent: int) -> int:
    """Return how many bytes from the start of ``disk`` are zeros, in whole pieces and up to ``extent``."""
    read = 0
    while read < extent:
        piece = os.pread(disk, min(_CHUNK, extent - read), read)
        if not piece or piece != bytes(len(piece)):
            break
        read += len(piece)
    return read


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


def _copy_at(stream: FileIO, at: int, disk_size: int) -> Header | None:
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
    text = area.partition(b"\0")[0]
    if len(text) > _JSON:
        return None
    try:
        said = jsontext.decode(text, kind=_Metadata)
        offset = min(int(one["offset"]) for one in said.segments.values())
    except _UNREADABLE:
        return None
    if not 2 * size <= offset <= disk_size:
        return None
    return Header(_text(binary, 168, 40), _text(binary, 24, 48), tuple(sorted(said.keyslots)), said.tokens, offset)


class _Metadata(msgspec.Struct, frozen=True):
    """The parts of the JSON that are used here."""

    keyslots: dict[str, Any]
    segments: dict[str, dict[str, Any]]
    tokens: dict[str, dict[str, Any]] = {}


def _text(raw: bytes, at: int, size: int) -> str:
    return raw[at : at + size].partition(b"\0")[0].decode("utf-8", "replace")
