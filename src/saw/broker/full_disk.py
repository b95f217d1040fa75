"""When the disk under the SQLite file is full: a refusal that says so, and room that was set aside for kills."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import OperationalError

from saw.broker.errors import StorageFull
from saw.files import takes_no_more

RESERVE = 1024 * 1024
"""How much is set aside (bytes): a kill writes far less."""

logger = logging.getLogger("saw.broker")


#: What SQLite says beside ``SQLITE_FULL`` where room is missing, for its shared memory and when files are written through.
_PERHAPS_FULL = frozenset({sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_FSYNC})


@contextmanager
def translated(place: Path) -> Iterator[None]:
    """Turn SQLite's words for a full disk within the block into a refusal; other errors stay faults.

    An error of a write counts where the folder ``place`` takes no more.
    """
    try:
        yield
    except OperationalError as error:
        code = getattr(error.orig, "sqlite_errorcode", 0) if isinstance(error.orig, sqlite3.Error) else 0
        if code == sqlite3.SQLITE_FULL or (code in _PERHAPS_FULL and takes_no_more(place)):
            logger.error("the disk under the database is full")  # noqa: TRY400 - the line says all there is
            raise StorageFull from error
        raise


class Reserve:
    """A file that holds room on the disk, and is removed when a kill finds none."""

    def __init__(self, path: Path, size: int = RESERVE) -> None:
        self._path = path
        self._size = size

    def keep(self) -> None:
        """Set the room aside, as far as there is any; what is there already is left alone."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, self._size)
            finally:
                os.close(descriptor)
        except OSError as error:
            logger.warning("no room can be set aside for kills in %s: %s", self._path, error.strerror)

    def spend(self) -> bool:
        """Give the room back to the disk; tell whether there was any."""
        try:
            self._path.unlink()
        except OSError:
            return False
        logger.warning("the disk is full: the room that was set aside for kills is used now")
        return True
