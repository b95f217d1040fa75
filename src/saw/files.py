"""Atomic and private file writes, and strict JSON configuration reading."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TypeVar

import msgspec

from saw.errors import ConfigError

T = TypeVar("T")


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
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
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
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not valid: {error}", cure="correct the named field") from error
