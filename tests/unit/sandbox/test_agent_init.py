"""Process 1 of an always-on agent: it starts the agent, reaps orphans and ends as the agent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

INIT = Path(__file__).parents[3] / "src/saw/runtime/agent_init.py"
NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def init(*command: str) -> list[str]:
    return [sys.executable, "-I", "-S", str(INIT), *command]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("/bin/sh", "-c", "exit 0"), 0),
        (("/bin/sh", "-c", "exit 7"), 7),
        (("/bin/sh", "-c", "kill -9 $$"), 137),
        (("/no/such/program",), 127),
        (("/etc/hostname",), 126),
        ((), 2),
    ],
)
def test_it_ends_as_the_agent_ends(command: tuple[str, ...], code: int) -> None:
    done = subprocess.run(init(*command), capture_output=True, check=False, timeout=60)
    assert done.returncode == code


def test_the_agent_meets_signals_in_their_ordinary_way() -> None:
    program = (
        "import signal; print(len(signal.pthread_sigmask(signal.SIG_BLOCK, ())), signal.getsignal(signal.SIGTERM).name)"
    )
    done = subprocess.run(init(sys.executable, "-c", program), capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["0", "SIG_DFL"]


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_as_process_1_it_is_ended_by_the_signal_that_its_agent_gets() -> None:
    """The twin without it: a program that is process 1 itself does not see the signal."""
    script = "import os, signal; assert os.getpid() == {pid}; os.kill(os.getpid(), signal.SIGTERM); print('alive')"
    alone = [*NAMESPACE, sys.executable, "-c", script.format(pid=1)]
    assert subprocess.run(alone, capture_output=True, text=True, check=False, timeout=60).stdout == "alive\n"
    below = [*NAMESPACE, *init(sys.executable, "-c", script.format(pid=2))]
    done = subprocess.run(below, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_it_waits_for_processes_that_lost_their_parent() -> None:
    script = """
import os, time
read, write = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.write(write, str(os.getpid()).encode())
    os._exit(0)
os.wait()
orphan = os.read(read, 20).decode()
while os.path.exists(f"/proc/{orphan}"):
    time.sleep(0.01)
print("reaped")
"""
    words = [*NAMESPACE, *init(sys.executable, "-c", script)]
    assert subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout == "reaped\n"
