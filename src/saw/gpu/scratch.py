"""Wiping scratch space: every allocated byte is overwritten with zeros, read again through the disk, and given back.

What is promised: the file or block device, as the operating system shows it, holds nothing but zeros afterwards. What is not:
copies that a drive, an array or a copy-on-write file system below keeps by itself. There, encrypt, and forget the key.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec

from saw.gpu.modules import GpuError

CHUNK = 4 * 1024 * 1024
_BLKGETSIZE64 = 0x80081272
_BLKDISCARD = 0x1277
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02


class WipeFailed(GpuError):
    """Something that had to be wiped was not; the workspace it belongs to is not released."""

    code = "wipe_failed"


class Wiped(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that was wiped: its size, how many bytes were overwritten, and how many were read back as zeros."""

    path: str
    kind: str
    size: int
    overwritten: int
    read_back: int


def wipe(path: Path) -> Wiped:
    """Wipe the regular file or block device ``path`` in place; raise :class:`WipeFailed` when a byte of it could not be.

    A link is not followed. A block device that something has mounted or open for itself is refused (``O_EXCL``).
    """
    try:
        kind = path.lstat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            raise WipeFailed(f"{path} is no regular file and no block device", cure="name the disk itself")
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_EXCL if stat.S_ISBLK(kind) else 0)
        descriptor = os.open(path, flags)
    except OSError as error:
        busy = error.errno == errno.EBUSY
        raise WipeFailed(
            f"{path} cannot be wiped: {error.strerror}",
            cure="unmount it, and end what has it open" if busy else "look at the file and its disk",
        ) from error
    try:
        return _wipe(path, descriptor, block=stat.S_ISBLK(kind))
    except OSError as error:
        raise WipeFailed(f"{path} was not wiped: {error.strerror}", cure="look at the disk, then again") from error
    finally:
        os.close(descriptor)


def _wipe(path: Path, descriptor: int, *, block: bool) -> Wiped:
    size = _size(descriptor, block=block)
    overwritten = 0
    for begin, end in _allocated(descriptor, size, block=block):
        for offset in range(begin, end, CHUNK):
            overwritten += _zero(descriptor, offset, min(CHUNK, end - offset))
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read, not this machine's memory
    read_back = read_zeros(
        path, descriptor, size
    )  # before the space is given back: a hole reads as zeros whatever was written
    _give_back(descriptor, size, block=block)
    os.fsync(descriptor)
    return Wiped(str(path), "block device" if block else "file", size, overwritten, read_back)


def read_zeros(path: Path, descriptor: int, size: int) -> int:
    """Read ``size`` bytes back; raise :class:`WipeFailed` that names the first one that is not zero."""
    zeros = bytes(CHUNK)
    for offset in range(0, size, CHUNK):
        wanted = min(CHUNK, size - offset)
        found = os.pread(descriptor, wanted, offset)
        if found != zeros[:wanted]:
            at = next((index for index, byte in enumerate(found) if byte), len(found))
            raise WipeFailed(f"{path} does not read back as zeros at byte {offset + at}", cure="replace that disk")
    return size


def _size(descriptor: int, *, block: bool) -> int:
    if not block:
        return os.fstat(descriptor).st_size
    return int(struct.unpack("Q", fcntl.ioctl(descriptor, _BLKGETSIZE64, b"\0" * 8))[0])


def _allocated(descriptor: int, size: int, *, block: bool) -> Iterator[tuple[int, int]]:
    """Yield the parts of a file that have data on the disk; of a block device, all of it."""
    if block:
        yield 0, size
        return
    offset = 0
    while offset < size:
        try:
            begin = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        offset = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, offset


def _zero(descriptor: int, offset: int, length: int) -> int:
    done = 0
    while done < length:
        done += os.pwrite(descriptor, bytes(length - done), offset + done)
    return done


def _give_back(descriptor: int, size: int, *, block: bool) -> None:
    """Tell what lies below that the space is free; where it cannot, the zeros that were written count."""
    if size == 0:
        return
    with contextlib.suppress(OSError):
        if block:
            fcntl.ioctl(descriptor, _BLKDISCARD, struct.pack("QQ", 0, size))
        else:
            _punch(descriptor, size)


def _punch(descriptor: int, size: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if libc.fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, 0, size):
        raise OSError(ctypes.get_errno(), "fallocate")
