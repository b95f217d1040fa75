"""Processes are found again by pid and start time, and ended with bounded patience."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from saw.errors import UnavailableError
from saw.lab.process import CommandFailed, gone, recall, remember, run, start_time, stop, wait_for

STUBBORN = (
    "import signal,sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); sys.stdin.read()"
)
POLITE = "import sys; print('ready', flush=True); sys.stdin.read()"


class Child:
    """A process that has said that it is ready."""

    def __init__(self, program: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.pid = self.process.pid

    def close(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def polite() -> Iterator[Child]:
    child = Child(POLITE)
    yield child
    child.close()


@pytest.fixture
def stubborn() -> Iterator[Child]:
    child = Child(STUBBORN)
    yield child
    child.close()


def test_a_remembered_process_is_recalled_and_a_reused_pid_is_not(polite: Child, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    remember(note, polite.pid)
    assert recall(note) == polite.pid
    note.write_text(f"{polite.pid} {int(start_time(polite.pid) or 0) - 1}\n")
    assert recall(note) is None


def test_a_stranger_with_the_remembered_pid_is_not_ended(polite: Child, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    note.write_text(f"{polite.pid} 1\n")
    stop(note, patience=0.2)
    assert start_time(polite.pid) is not None
    assert not note.exists()


@pytest.mark.parametrize("content", ["", "12", "many words in here", "abc 12", "999999999 -"])
def test_a_damaged_pid_file_is_no_process(tmp_path: Path, content: str) -> None:
    note = tmp_path / "pid"
    note.write_text(content)
    assert recall(note) is None
    stop(note)
    assert not note.exists()


def test_a_zombie_has_ended(polite: Child, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    remember(note, polite.pid)
    polite.process.send_signal(signal.SIGKILL)
    wait_for("the end", lambda: start_time(polite.pid) is None, patience=60, interval=0.01)
    assert recall(note) is None


def test_stop_asks_and_that_is_enough(polite: Child, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    remember(note, polite.pid)
    stop(note, patience=60)
    assert start_time(polite.pid) is None
    assert not note.exists()


def test_stop_kills_what_does_not_listen_and_not_before_its_patience_is_over(stubborn: Child, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    remember(note, stubborn.pid)
    begin = time.monotonic()
    assert not gone(stubborn.pid, 0.05)
    stop(note, patience=0.3)
    assert time.monotonic() - begin >= 0.3
    assert start_time(stubborn.pid) is None


def test_run_says_what_failed_and_why() -> None:
    assert run("cat", input_text="hello") == "hello"
    with pytest.raises(CommandFailed, match=r"failed \(3\): no such thing") as failed:
        run("sh", "-c", "echo no such thing >&2; exit 3", cure="make the thing")
    assert failed.value.cure == "make the thing"
    with pytest.raises(CommandFailed, match="not-a-program is not installed") as missing:
        run("not-a-program")
    assert "make workspace" in missing.value.cure
    with pytest.raises(CommandFailed, match="did not end within"):
        run("sleep", "60", timeout=0.1)


def test_waiting_is_bounded_and_names_what_did_not_happen() -> None:
    answers = iter([False, False, True])
    wait_for("the third time", lambda: next(answers), patience=60, interval=0.001)
    with pytest.raises(UnavailableError, match="rain did not happen within 0 s") as refused:
        wait_for("rain", lambda: False, patience=0.05, interval=0.01, cure="wait for autumn")
    assert refused.value.cure == "wait for autumn"
