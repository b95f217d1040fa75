"""A private folder of files: 0700 and 0600, no symbolic link followed, each write atomic and synced.

Every component below the root is opened on its own (``openat(2)`` with ``O_NOFOLLOW``), so that a link, or a folder that is open
to others, is refused wherever it lies.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saw.secrets.store import MAX_VALUE, SecretError, SecretExists, is_name, missing

#: What sealing may add to a value.
_MORE = 256
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LEFT = re.compile(r"\.[a-z0-9][a-z0-9._-]{0,80}\.[a-z0-9_]{8}")


class Folder:
    """The folder ``root``, made with the first write. ``suffix`` ends the names of its files and is part of no secret's name."""

    def __init__(self, root: Path, suffix: str = "") -> None:
        self.root = root
        self._suffix = suffix

    def path(self, name: str) -> Path:
        """Return where the file of a secret lies."""
        return self.root / f"{name}{self._suffix}"

    def read(self, name: str) -> bytes:
        """Return the content of a file; raise :class:`saw.secrets.store.SecretMissing` or :class:`SecretError`."""
        path = self.path(name)
        try:
            with self._parent(name) as folder:
                descriptor = os.open(
                    path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder
                )
                with os.fdopen(descriptor, "rb") as stream:
                    found = os.fstat(descriptor)
                    if not stat.S_ISREG(found.st_mode):
                        raise _refused(path, "is no file", "put the file itself there")
                    _check(path, found, "chmod 0600")
                    raw = stream.read(MAX_VALUE + _MORE + 1)
        except FileNotFoundError as error:
            raise missing(name, str(self.root)) from error
        except OSError as error:
            raise _unusable(path, error) from error
        if len(raw) > MAX_VALUE + _MORE:
            raise _refused(path, "is too long for a secret", "put it back from the backup")
        return raw

    def write(self, name: str, raw: bytes, *, new: bool) -> None:
        """Write a file (0600); with ``new`` raise :class:`SecretExists` when it is there."""
        path = self.path(name)
        try:
            with self._parent(name, make=True) as folder:
                self._write(folder, path, raw, new=new)
        except FileExistsError as error:
            raise SecretExists(
                f"{path} is there already", cure="nothing was written", details={"secret": name}
            ) from error
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
                error.filename = str(path)
                raise
            raise _unusable(path, error) from error

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""
        path = self.path(name)
        try:
            with self._parent(name) as folder:
                os.unlink(path.name, dir_fd=folder)
                os.fsync(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unusable(path, error) from error

    def names(self) -> list[str]:
        """Return the names of what lies there, sorted."""
        return sorted(name for name in self._walk() if is_name(name))

    def sweep(self) -> None:
        """Remove what writes that were killed have left. Nobody may write meanwhile."""
        for name in self._walk(left=True):
            (self.root / name).unlink(missing_ok=True)

    def _walk(self, *, left: bool = False) -> Iterator[str]:
        """Yield relative names of files, of temporary ones with ``left``."""
        for folder, folders, files in os.walk(self.root, followlinks=False):
            folders.sort()
            for file in files:
                place = Path(folder, file)
                if place.is_symlink():
                    continue
                if left and _LEFT.fullmatch(file):
                    yield str(place.relative_to(self.root))
                elif not left and file.endswith(self._suffix):
                    yield str(place.relative_to(self.root)).removesuffix(self._suffix)

    @staticmethod
    def _write(folder: int, path: Path, raw: bytes, *, new: bool) -> None:
        temporary = f".{path.name}.{secrets.token_hex(4)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(raw)
                stream.flush()
                os.fchmod(stream.fileno(), 0o600)
                os.fsync(stream.fileno())
            if new:
                os.link(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            else:
                os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
        os.fsync(folder)

    @contextmanager
    def _parent(self, name: str, *, make: bool = False) -> Iterator[int]:
        """Open the folder in which the file of ``name`` lies, having looked at each on the way."""
        if make:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = self.root
        descriptor = self._enter(place, None)
        try:
            for part in name.split("/")[:-1]:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, 0o700, dir_fd=descriptor)
                        os.fsync(descriptor)
                place /= part
                inner = self._enter(place, descriptor)
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        finally:
            os.close(descriptor)

    @staticmethod
    def _enter(place: Path, above: int | None) -> int:
        descriptor = os.open(place if above is None else place.name, _DIRECTORY, dir_fd=above)
        try:
            _check(place, os.fstat(descriptor), "chmod 0700")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _check(path: Path, found: os.stat_result, cure: str) -> None:
    """Raise :class:`SecretError` when others than the owner may use ``path``, or the owner is neither us nor root."""
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise _refused(path, "is open to group or others", f"{cure} {path}")
    if os.geteuid() not in {0, found.st_uid}:
        raise _refused(path, "belongs to another account", "give it back to the account of the service")


def _unusable(path: Path, error: OSError) -> SecretError:
    if error.errno in {errno.ELOOP, errno.ENOTDIR}:
        return _refused(
            path, "is, or lies behind, a symbolic link or something that is no folder", "put the file itself there"
        )
    return _refused(path, f"cannot be used: {error.strerror}", "check owner and mode of the file and its folders")


def _refused(path: Path, reason: str, cure: str) -> SecretError:
    return SecretError(f"{path} {reason}", cure=cure, details={"path": str(path)})
