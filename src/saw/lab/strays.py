"""What a killed run leaves working: found by a mark in the environment that every child inherits, and ended.

``kill -9`` of the main job ends its leader alone; package installers, builders, ansible and ssh go on, and would write into
what the next run makes. The mark names the build directory, so another checkout's run is never touched. A light host is
started without the mark: it is meant to stay, and is found by its pid file and its control group instead.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from saw.errors import UnavailableError

MARK = "SAW_LAB_RUN"


def mark_children(build: Path) -> None:
    """Make every process that is started from here on carry the mark of ``build``."""
    os.environ[MARK] = str(build)


def unmarked(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return ``environment`` without the mark, for what is meant to outlive the run."""
    return {name: value for name, value in environment.items() if name != MARK}


def marked(build: Path) -> Iterator[tuple[int, int]]:
    """Yield pid and pidfd of every other process that carries the mark of ``build``; the caller closes the pidfd.

    The pidfd is taken before the environment is read, so a signal through it can only meet the process that was read.
    """
    wanted = f"{MARK}={build}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        pid = int(entry.name)
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            environment = []
        if wanted in environment:
            yield pid, descriptor
        else:
            os.close(descriptor)


def end_marked(build: Path, *, patience: float = 20.0) -> int:
    """Kill all that an earlier run on ``build`` left working, children of children included; return how many.

    Call it only while holding the lock of ``build``, and before anything of the present run is started. Raises
    :class:`UnavailableError` when one does not end within ``patience`` seconds.
    """
    ended, deadline = 0, time.monotonic() + patience
    while True:
        found = list(marked(build))
        if not found:
            return ended
        try:
            for _, descriptor in found:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            for pid, descriptor in found:
                # A pidfd becomes readable when its process has ended, be it a zombie of somebody else's.
                left = max(0.0, deadline - time.monotonic())
                if not select.select([descriptor], [], [], left)[0]:
                    raise UnavailableError(
                        f"process {pid} of an earlier run on {build} does not end",
                        cure=f"look at it (ps {pid}), end it, then run it again",
                    )
                ended += 1
        finally:
            for _, descriptor in found:
                os.close(descriptor)


def clear_scratch(build: Path) -> list[str]:
    """Remove the scratch folders that a killed run's package installer left in ``build``; return their names.

    One with something mounted below it stays, and is named in the error.
    """
    removed = []
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    for folder in sorted((build / "cache").glob(".mmdebstrap-*")):
        busy = [mount for mount in mounts if mount.startswith(f"{folder.resolve()}/")]
        if busy:
            raise UnavailableError(f"{busy[0]} is still mounted below {folder}", cure=f"umount {busy[0]}")
        shutil.rmtree(folder)
        removed.append(folder.name)
    return removed
