"""Folders for the keys of live sessions, in memory: one for each, 0700, which goes with its recorder, a killed one included."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from saw.errors import UnavailableError
from saw.files import locked

_PREFIX = "leg-"


@contextlib.contextmanager
def leg_folder(runtime: Path) -> Iterator[Path]:
    """Give a folder below ``runtime``, removed at the end; first remove those whose recorders are gone.

    A recorder holds a lock (flock(2)) on its folder. It ends with the process, however that ends, so what can be locked has no
    owner. Raises :class:`UnavailableError` when there is no room.
    """
    try:
        with locked(runtime):
            _sweep(runtime)
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=runtime))
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UnavailableError(
            f"there is no room for keys in {runtime}: {error.strerror}", cure="tell the operator"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _sweep(runtime: Path) -> None:
    for folder in runtime.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
