"""Processes that the lab starts and ends: found again by pid *and* start time, never by name."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from saw.errors import SawError, UnavailableError
from saw.files import write_atomic


class CommandFailed(SawError):
    """A command of the system ended with an error."""

    code = "command_failed"


def run(*argv: str, input_text: str | None = None, timeout: float = 600, cure: str = "") -> str:
    """Run ``argv`` and return its standard output; raise :class:`CommandFailed` with the end of its error output."""
    try:
        done = subprocess.run(
            argv, input=input_text, capture_output=True, text=True, timeout=timeout, check=False, stdin=None
        )
    except FileNotFoundError as error:
        raise CommandFailed(
            f"{argv[0]} is not installed", cure=cure or "run `make workspace` as root so that it installs what it needs"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"`{' '.join(argv)}` did not end within {timeout:.0f} s", cure=cure) from error
    if done.returncode != 0:
        tail = (done.stderr or done.stdout).strip()[-800:]
        raise CommandFailed(f"`{' '.join(argv)}` failed ({done.returncode}): {tail}", cure=cure)
    return done.stdout


def start_time(pid: int) -> str | None:
    """Return the kernel's start time of ``pid`` in clock ticks since boot (proc(5), field 22), or None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def remember(pid_file: Path, pid: int) -> None:
    """Write ``pid`` and its start time, so that a later run can tell it from a stranger with the same number."""
    write_atomic(pid_file, f"{pid} {start_time(pid) or '-'}\n")


def recall(pid_file: Path) -> int | None:
    """Return the pid written by :func:`remember` when that very process is still alive."""
    try:
        pid_text, started = pid_file.read_text(encoding="ascii").split()
        pid = int(pid_text)
    except (OSError, ValueError):
        return None
    return pid if start_time(pid) == started else None


def command_line(pid: int) -> list[str]:
    """Return the words with which the process was started; none when it has ended."""
    try:
        told = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return told.split("\0")[:-1]


def stop(pid_file: Path, *, patience: float = 10.0, first: signal.Signals = signal.SIGTERM) -> None:
    """End the remembered process: ask first, then kill after ``patience`` seconds; forget it."""
    pid = recall(pid_file)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, first)
        if not gone(pid, patience):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            gone(pid, 10.0)
    pid_file.unlink(missing_ok=True)


def gone(pid: int, patience: float) -> bool:
    """Wait up to ``patience`` seconds until ``pid`` has ended."""
    started = start_time(pid)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        if start_time(pid) is None or start_time(pid) != started:
            return True
        time.sleep(0.05)
    return False


def wait_for(
    what: str, condition: Callable[[], object], *, patience: float, cure: str = "", interval: float = 0.2
) -> None:
    """Call ``condition()`` until it is true; raise :class:`UnavailableError` that names ``what`` after ``patience`` s."""
    deadline = time.monotonic() + patience
    while True:
        if condition():
            return
        if time.monotonic() > deadline:
            raise UnavailableError(f"{what} did not happen within {patience:.0f} s", cure=cure)
        time.sleep(interval)


def end_strays(marker: str, programs: tuple[str, ...]) -> int:
    """End what an earlier, killed run of ours left working: processes of ``programs`` that name ``marker`` as an argument.

    Call it only while holding the lock of the build directory ``marker`` lies in. Returns how many were ended.
    """
    ended = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:
            continue
        names = {Path(argument).name for argument in arguments[:2]}
        if names.intersection(programs) and any(marker in argument for argument in arguments):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.name), signal.SIGKILL)
                ended += 1
    return ended
