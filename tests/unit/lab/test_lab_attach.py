"""Attaching to a persistent terminal: a real tmux, on real pseudo-terminals."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from saw.errors import UnavailableError
from saw.lab.attach import Terminal, attach_thrice, leave
from saw.lab.process import start_time

TMUX = shutil.which("tmux") or ""
pytestmark = pytest.mark.skipif(not TMUX, reason="needs tmux")


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with a home of its own; the tmux servers that a test started are ended."""
    yield {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SHELL": "/bin/bash", "LC_ALL": "C.UTF-8"}
    for server in tmp_path.glob("*.sock"):
        subprocess.run([TMUX, "-S", server, "kill-server"], check=False, capture_output=True)


def session(tmp_path: Path, name: str = "kept") -> list[str]:
    """What a workspace's forced command runs for an attachment."""
    return [TMUX, "-f", "/dev/null", "-S", str(tmp_path / f"{name}.sock"), "new-session", "-A", "-s", "main"]


@pytest.mark.thorough
def test_what_the_first_attachment_left_is_there_after_detaching_and_after_a_hang_up(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    seen = attach_thrice(session(tmp_path), environment, "m4711", patience=60)
    assert seen == {"detached": True, "kept": True, "kept_after_hangup": True}


def test_a_terminal_that_starts_anew_each_time_is_told_from_a_persistent_one(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    script = f"n=$(mktemp -u {tmp_path}/XXXXXX.sock); exec {TMUX} -f /dev/null -S $n new-session -A -s main"
    seen = attach_thrice(["/bin/sh", "-c", script], environment, "m4711", patience=12)
    assert seen == {"detached": True, "kept": False, "kept_after_hangup": False}


def test_leaving_is_tried_again_until_it_is_heard(environment: dict[str, str]) -> None:
    deaf = "stty raw -echo; echo ready; dd bs=1 count=6 of=/dev/null 2>/dev/null"
    with Terminal(["/bin/sh", "-c", deaf], environment) as terminal:
        assert terminal.expect(b"ready", 60)
        assert leave(terminal, 60, again=0.1)
    with Terminal(["/bin/sh", "-c", "stty raw -echo; echo ready; exec sleep 60"], environment) as terminal:
        assert terminal.expect(b"ready", 60)
        assert not leave(terminal, 0.5, again=0.1)


def test_a_login_that_is_refused_says_what_was_shown(environment: dict[str, str]) -> None:
    argv = ["/bin/sh", "-c", "echo Permission denied; exit 255"]
    with pytest.raises(UnavailableError, match="Permission denied"):
        attach_thrice(argv, environment, "m4711", patience=3)


def test_waiting_is_bounded_and_nothing_stays_behind(environment: dict[str, str]) -> None:
    argv = ["/bin/sh", "-c", "trap '' HUP; echo silence; sleep 60"]
    with Terminal(argv, environment) as terminal:
        assert terminal.expect(b"silence", 5)
        assert not terminal.expect(b"never", 0.3)
        assert not terminal.ended(0.3)
        child = terminal.pid
        assert start_time(child) is not None
    assert start_time(child) is None
