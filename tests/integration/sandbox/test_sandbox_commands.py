"""Commands run by people and agents through ``saw-run`` land in the sandbox and behave like ordinary commands."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess

import pytest

from conftest import PYTHON, SOURCE, wait_until

CLIENT = str(SOURCE / "saw" / "runtime" / "shell_client.py")
EXECD = str(SOURCE / "saw" / "runtime" / "shell_execd.py")
SOCKET = "/run/saw/shell/exec.sock"


@pytest.fixture(scope="module")
def sandbox(networked, launch):
    """The running sandbox: launcher, then the command daemon with tmux."""
    words = (PYTHON, "-m", "saw.runtime.launcher", "--launch", launch, "--", PYTHON, "-I", "-S", EXECD)
    daemon = networked.start(*words, netns=True, user=True, direct=False, stderr=subprocess.DEVNULL)
    wait_until(lambda: networked.run("test", "-S", SOCKET).returncode == 0)
    yield networked
    daemon.terminate()
    daemon.wait(10)


def client(*arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-I", "-S", CLIENT, *arguments)


def test_exit_codes_and_streams_are_the_commands(sandbox):
    answer = sandbox.run(*client("--", "/bin/sh", "-c", "cat; echo problem >&2; exit 3"), input="given\n")
    assert (answer.returncode, answer.stdout, answer.stderr) == (3, "given\n", "problem\n")
    assert sandbox.run(*client("--", "/bin/sh", "-c", "kill -9 $$")).returncode == 137
    missing = sandbox.run(*client("--", "no-such-command"))
    assert (missing.returncode, "no-such-command" in missing.stderr) == (127, True)
    large = sandbox.run(*client("--", "head", "-c", "3000000", "/dev/zero"))
    assert len(large.stdout) == 3_000_000


@pytest.mark.control("RUN-03")
def test_root_runs_as_the_agent_and_confined(sandbox):
    script = "id -u; grep -h NoNewPrivs /proc/self/status; cat /etc/shadow; echo $GIT_TOKEN"
    answer = sandbox.run(*client("--", "/bin/sh", "-c", script))
    assert answer.stdout.split() == ["2000", "NoNewPrivs:", "1", "openshell:resolve:env:GIT_TOKEN"]
    assert "Permission denied" in answer.stderr


@pytest.mark.control("CRED-01")
def test_the_callers_environment_does_not_enter(sandbox):
    words = ["env", "SECRET=hunter2", "LC_ALL=C.UTF-8", *client("--", "env")]
    found = sandbox.run(*words).stdout
    assert "hunter2" not in found
    assert "LC_ALL=C.UTF-8" in found


@pytest.mark.control("RUN-02")
def test_a_directory_is_not_handed_in(sandbox):
    answer = sandbox.run("sh", "-c", 'exec "$@" 1</root', "sh", *client("--", "true"))
    assert (answer.returncode, "Is a directory" in answer.stderr) == (1, True)
    assert sandbox.run("sh", "-c", 'exec "$@" 1</dev/null', "sh", *client("--", "true")).returncode == 0


def test_signals_reach_the_command_and_hanging_up_ends_it(sandbox):
    running = sandbox.start(*client("--", "/bin/sh", "-c", "echo up; exec sleep 77"), stdout=subprocess.PIPE)
    assert running.stdout.readline() == "up\n"
    running.send_signal(signal.SIGTERM)
    assert running.wait(10) == 143
    running.stdout.close()
    running = sandbox.start(*client("--", "/bin/sh", "-c", "echo up; exec sleep 78"), stdout=subprocess.PIPE)
    assert running.stdout.readline() == "up\n"
    wait_until(lambda: sandbox.run("pgrep", "-f", "^sleep 78").returncode == 0)
    running.kill()
    running.wait(10)
    running.stdout.close()
    wait_until(lambda: sandbox.run("pgrep", "-f", "^sleep 78").returncode == 1)


@pytest.mark.control("RUN-03")
def test_another_user_may_not_connect(sandbox):
    other = ["setpriv", "--reuid=3000", "--regid=2000", "--clear-groups"]
    refused = sandbox.run(*other, *client("--", "echo", "ran"))
    assert (refused.returncode, refused.stdout) == (125, "")
    assert sandbox.run(*client("--", "true"), user=True).returncode == 0


def on_terminal(machine, *words: str) -> tuple[int, int]:
    """Start on a new pseudo-terminal; return process id and its master descriptor."""
    process, master = pty.fork()
    if process == 0:
        environment = {"PATH": os.environ["PATH"], "TERM": "xterm"}
        command = [*machine.prefix(direct=True), *words]
        os.execvpe(command[0], command, environment)  # noqa: S606
    return process, master


def finish(process: int, master: int) -> int:
    """Return the exit code of a client that is about to end; drains its terminal meanwhile."""
    ended: list[int] = []

    def over() -> bool:
        if select.select([master], [], [], 0.02)[0]:
            with contextlib.suppress(OSError):
                os.read(master, 4096)
        found, status = os.waitpid(process, os.WNOHANG)
        ended.extend([os.waitstatus_to_exitcode(status)] if found else [])
        return bool(found)

    try:
        wait_until(over)
    except AssertionError:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise
    finally:
        os.close(master)
    return ended[0]


def read_until(master: int, wanted: bytes, seconds: float = 20) -> bytes:
    found = b""
    while wanted not in found:
        assert select.select([master], [], [], seconds)[0], found
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        found += data
    return found


def test_a_terminal_of_its_own_with_size_job_control_and_exit_code(sandbox):
    import fcntl
    import struct
    import termios

    script = 'stty size; tty; read answer; echo "got $answer"; stty size; exit 5'
    process, master = on_terminal(
        sandbox, "sh", "-c", 'stty rows 33 cols 99; exec "$@"', "sh", *client("--", "sh", "-c", script)
    )
    assert b"33 99" in read_until(master, b"/dev/pts/")
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 44, 111, 0, 0))
    os.write(master, b"word\r")
    assert b"44 111" in read_until(master, b"44 111")
    assert finish(process, master) == 5


def test_attach_keeps_the_session_across_connections(sandbox):
    process, master = on_terminal(sandbox, *client("--attach"))
    read_until(master, b"[main]")
    os.write(master, b"kept=yes-$((40+2)); tmux detach\r")
    finish(process, master)
    process, master = on_terminal(sandbox, *client("--attach"))
    read_until(master, b"[main]")
    os.write(master, b"echo $kept\r")
    assert b"yes-42" in read_until(master, b"yes-42")
    os.write(master, b"tmux detach\r")
    finish(process, master)


def test_an_absent_sandbox_is_named(machine):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import shell_client as c; c.WAIT_S = 0; sys.exit(c.main(sys.argv[2:]))"
    words = (PYTHON, "-c", code, str(SOURCE / "saw" / "runtime"), "--socket", "/run/none.sock", "--", "true")
    answer = machine.run(*words)
    assert (answer.returncode, "does not answer" in answer.stderr) == (125, True)
