"""Finds and ends every process of a run, wherever it has moved to: Ansible's own workers have sessions of their own.

Each is known by an environment variable that children inherit (proc(5), ``/proc/PID/environ``). Only processes of the same
account are seen.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

JOB_MARK = "SAW_JOB"
WORKER_MARK = "SAW_JOB_WORKER"
"""In the environment of a run: the id of its job, and of the worker that started it."""
GRACE_S = 5.0
END_WITHIN_S = 30.0


def marked(name: str, value: str) -> list[int]:
    """Return the process ids whose environment has ``name=value``, this process not among them."""
    wanted = f"{name}={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # gone, or of another account
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return sorted(found)


def send(name: str, value: str, number: signal.Signals) -> int:
    """Send a signal to every marked process and return how many there were; an id that was given anew meanwhile is not hit."""
    count = 0
    for pid in marked(name, value):
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(pid)
            try:
                if pid in marked_among(name, value, pid):
                    signal.pidfd_send_signal(handle, number)
                    count += 1
            finally:
                os.close(handle)
    return count


def marked_among(name: str, value: str, pid: int) -> list[int]:
    """Return ``[pid]`` when that process is marked, else nothing."""
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return []
    return [pid] if f"{name}={value}".encode() in environ.split(b"\0") else []


def end(name: str, value: str, *, grace_s: float = GRACE_S, pause: Callable[[float], None] = time.sleep) -> bool:
    """End every marked process: asked first, after ``grace_s`` seconds by force. Return whether none is left."""
    begun = time.monotonic()
    while time.monotonic() < begun + END_WITHIN_S:
        forced = time.monotonic() >= begun + grace_s
        if send(name, value, signal.SIGKILL if forced else signal.SIGTERM) == 0:
            return True
        pause(0.1)
    return not marked(name, value)


def guard(worker: str) -> None:
    """Wait until standard input ends, which it does with the worker however it ends; then end all that it had started."""
    while select.select([0], [], [])[0] and os.read(0, 64):
        continue
    end(WORKER_MARK, worker, grace_s=0)


if __name__ == "__main__":
    import sys

    guard(sys.argv[1])
