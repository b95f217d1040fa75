"""One run at a time on a build directory: the embedded default, and the image build that it shares with ``make image``."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from saw.errors import SawError, UnavailableError
from saw.lab.strays import MARK, clear_scratch, end_marked, mark_children


class LabBusy(SawError):
    """Another run holds the build directory."""

    code = "lab_busy"


@contextmanager
def exclusive(build: Path, say: Callable[[str], None] = print, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of ``build``; a second run ends with a message instead of a mess, or waits for the first with ``wait``.

    What a killed run left working is ended first, and its scratch removed, so that nobody else writes into what is made here.
    """
    try:
        build.mkdir(parents=True, exist_ok=True)
        lock = (build / ".lock").open("w", encoding="ascii")
    except OSError as error:
        raise UnavailableError(
            f"cannot write in {build}: {error.strerror}", cure="run it with sudo, and look at the disk's free space"
        ) from error
    with lock as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise LabBusy("another run uses this build directory", cure="wait for it, or end it") from error
            say(f"waiting for another run on {build}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        ended = end_marked(build)
        removed = clear_scratch(build)
        if ended or removed:
            say(f"an earlier run was cut off: {ended} processes of it ended, {len(removed)} scratch folders removed")
        before = os.environ.get(MARK)
        mark_children(build)
        try:
            yield
        finally:
            os.environ.pop(MARK)
            if before is not None:
                os.environ[MARK] = before
