"""Atomic and private file writes, strict JSON configuration reading, and words for a file system that takes no more."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from saw import jsontext
from saw.errors import ConfigError, SawError

T = TypeVar("T")
_MIB = 1024 * 1024
_TAKES_NO_MORE = {
    errno.ENOSPC: ("is full", "free space on it"),
    errno.EDQUOT: ("is over this user's quota", "remove files of this user on it, or raise the quota"),
    errno.EROFS: ("is read-only", "look in the kernel's log why, and mount it for writing again"),
}


class StorageError(SawError):
    """A file system takes no more: it is full, over quota or read-only."""

    code = "storage_refused"


def write_atomic(path: Path | str, data: bytes | str, *, mode: int = 0o644) -> None:
    """Replace ``path`` with ``data`` so that a reader, or a crash, sees the old or the new content and nothing between.

    The temporary file lies in the same directory with mode 0600 until the final mode is set; file and directory are
    synced. Raises ``OSError`` (for example a full disk) and leaves the old file in place.
    """
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not say to which file
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_private(path: Path | str, data: bytes | str) -> None:
    """Like :func:`write_atomic`, readable by the owner alone (0600)."""
    write_atomic(path, data, mode=0o600)


def load_json(path: Path | str, kind: type[T]) -> T:
    """Read ``path`` as JSON into the msgspec type ``kind``; raise :class:`ConfigError` that names file, reason and cure."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", cure="check that the file exists and is readable by this user"
        ) from error
    try:
        return jsontext.decode(raw, kind=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not valid: {error}", cure="correct the named field") from error


def storage_error(error: OSError, *places: Path | str) -> StorageError | None:
    """Return ``error`` in words that name file system, cause and cure; None when it is not about a full file system.

    The file system is that of the file in ``error``. An error without one (a write to an open file) is put down to the
    first of ``places`` whose file system is as the error says.
    """
    said = _TAKES_NO_MORE.get(error.errno or 0)
    if said is None:
        return None
    what, cure = said
    if error.filename:
        place = Path(os.fsdecode(error.filename))
        message = f"{describe_file_system(place)} {what}: cannot write {place}"
    else:
        found = next((Path(place) for place in places if takes_no_more(Path(place), error.errno or 0)), None)
        message = f"{describe_file_system(found)} {what}" if found else f"a file system that was written to {what}"
    return StorageError(message, cure=f"{cure}, or use a directory on another disk; then run it again")


def describe_file_system(place: Path) -> str:
    """Return mount point, type and free space of the file system that ``place`` lies, or would lie, on."""
    there = _existing(place)
    points = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:  # noqa: PTH123 - proc(5)
        for line in table:
            before, _, after = line.partition(" - ")
            points.append((before.split()[4].encode().decode("unicode_escape"), after.split()[0]))
    holding = [(point, kind) for point, kind in points if there.is_relative_to(point)]
    point, kind = max(holding, key=lambda item: len(item[0]), default=("/", "unknown"))
    room = os.statvfs(there)
    free, whole = (blocks * room.f_frsize // _MIB for blocks in (room.f_bavail, room.f_blocks))
    return f"the file system {point} ({kind}, {free} of {whole} MiB and {room.f_favail} files free)"


def takes_no_more(place: Path, number: int = errno.ENOSPC) -> bool:
    """Tell whether the file system of ``place`` is full (less than 1 MiB or no file free), or read-only for ``EROFS``."""
    room = os.statvfs(_existing(place))
    if number == errno.EROFS:
        return bool(room.f_flag & os.ST_RDONLY)
    return room.f_blocks > 0 and (room.f_bavail * room.f_frsize < _MIB or (room.f_files > 0 and room.f_favail == 0))


def _existing(place: Path) -> Path:
    place = place.absolute()
    return next(folder for folder in (place, *place.parents) if folder.exists()).resolve()


@contextmanager
def locked(directory: Path | str) -> Iterator[None]:
    """Let one process at a time into ``directory``, by a lock (flock(2)) that ends with whoever holds it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
