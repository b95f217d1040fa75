"""The steps of docs/first-day.md at a command line, with their pictures: plain ssh to what goes on, and the proof elsewhere.

Real provider, broker, bastion, OpenSSH, and the programs of the workspace that keep its terminal, on one machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chromium import ROWS, Chromium, chromium
from page import ROOT
from people_rig import People, people
from sso_rig import until
from terminal_screen import at_prompt, draw

from saw.lab.attach import Terminal, leave, leave_mark

PAGE = (ROOT / "docs/first-day.md").read_text(encoding="utf-8")
RUNTIME = ROOT / "src/saw/runtime"
MARK = "5f0c2a"


@pytest.fixture(scope="module")
def there() -> Iterator[People]:
    with people("ws-demo") as made:
        yield made


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Chromium]:
    (tmp_path / "profile").mkdir()
    with chromium(tmp_path / "profile") as found:
        yield found


def written(line: str) -> str:
    """Return a line of the guide, which must stand there."""
    assert f"\n$ {line}\n" in PAGE, line
    return line


def take(screen: Chromium, name: str, height: int) -> None:
    if wanted := os.environ.get("SAW_PICTURES"):
        screen.picture(Path(wanted) / f"first-day-{name}.png", height)


def sign_in(there: People, person: str) -> dict[str, str]:
    """Sign ``person`` in at the command line as step 2 says; return the environment in which they are."""
    environment = {**there.environment, "XDG_CONFIG_HOME": str(there.desk / person)}
    context = {
        "broker": {"sign_in": True},
        "bastion": {"host": "127.0.0.1", "port": there.bastion.port, "user": "root", "sign_in": True},
    }
    Path(environment["SAW_CONTEXT"]).write_text(json.dumps(context))
    line = written("saw login --url https://saw.example.com:8445 --ca build/lab/people-tls/ca.pem")
    words = line.replace("https://saw.example.com:8445", there.lab.origin).split()
    words[-1] = str(there.desk / "ca.pem")
    with there.confirming(person):
        subprocess.run(words, env=environment, check=True, capture_output=True, timeout=120)
    return environment


def output(line: str, environment: dict[str, str], folder: Path | None = None) -> str:
    """Run a line and return what it prints."""
    done = subprocess.run(
        line.split(), cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def terminal_that_is_kept(there: People, folder: Path) -> Iterator[None]:
    """Let the workspace's SSH server force what its own does: into the terminal that the command daemon keeps."""
    folder.mkdir()
    run = f'#!/bin/sh\nexec {sys.executable} -I -S {RUNTIME}/shell_client.py --socket {folder}/exec.sock "$@"\n'
    (folder / "saw-run").write_text(run)
    shutil.copy(RUNTIME / "shell_attach.sh", folder / "saw-attach")
    for name in ("saw-run", "saw-attach"):
        (folder / name).chmod(0o755)
    server, config = there.bastion.servers[0], there.bastion.directory / "workspace/sshd.conf"
    before, log = config.read_text(), there.bastion.directory / "workspace.log"

    def load(text: str) -> None:
        """Have the server take ``text`` for its configuration, and wait until it listens with it."""
        told = log.read_text().count("Server listening")
        config.write_text(text)
        server.send_signal(signal.SIGHUP)
        until(lambda: log.read_text().count("Server listening") > told)

    named = ["unshare", "--uts", "sh", "-c", 'hostname ws-demo && exec "$@"', "sh"]
    daemon = [*named, sys.executable, "-I", "-S", str(RUNTIME / "shell_execd.py"), "--directory", str(folder)]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "SHELL": "/bin/sh", "LANG": "C.UTF-8"}
    with subprocess.Popen(daemon, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as kept:
        try:
            until((folder / "tmux.sock").exists)
            load(f"{before}ForceCommand {folder}/saw-attach\n")
            yield
        finally:
            subprocess.run(["tmux", "-S", str(folder / "tmux.sock"), "kill-server"], check=False, capture_output=True)
            kept.terminate()
            load(before)


@pytest.mark.thorough
@pytest.mark.control("ID-02")
def test_plain_ssh_finds_at_work_what_was_left_running(there: People, screen: Chromium, tmp_path: Path) -> None:
    environment = sign_in(there, "u-ada")
    line, _, _ = written("saw ssh --config ws-demo >> ~/.ssh/config").partition(" >>")
    config = tmp_path / "ssh_config"
    config.write_text(output(line, environment))
    program, workspace = written("ssh ws-demo").split()
    words = [str(shutil.which(program)), "-F", str(config), workspace]
    with terminal_that_is_kept(there, tmp_path / "kept"):
        with Terminal(words, environment) as first:
            leave_mark(first, MARK, 60)
            first.type(b"clear; while sleep 1; do echo at-work-$saw_mark; done\r")
            assert first.expect(f"at-work-{MARK}".encode(), 60), first.tail()
        [session] = there.lab.operator.request("GET", "/v1/sessions?workspace_id=ws-demo")["sessions"]
        assert there.bastion.closed(session["id"])["reason"] == "client_gone"
        with Terminal(words, environment) as again:
            assert again.expect(f"at-work-{MARK}".encode(), 60), again.tail()
            height = draw(screen, again.seen)
            assert f"at-work-{MARK}" in screen.run(ROWS)
            take(screen, "5-ssh", height)
            assert leave(again, 60)


@pytest.mark.thorough
@pytest.mark.control("AUD-02")
def test_the_trail_is_proved_where_there_is_no_broker(there: People, screen: Chromium, tmp_path: Path) -> None:
    control, elsewhere = tmp_path / "control", tmp_path / "elsewhere"
    for folder in (control, elsewhere):
        folder.mkdir()
    operator = {**there.environment, "SAW_CONTEXT": str(control / "context.json")}
    (control / "context.json").write_text(json.dumps({"broker": {"socket": there.lab.config.operator_socket}}))
    for line in (
        "saw audit key --name trail.example.com --out log.key",
        "saw audit checkpoint --tiles tiles --key log.key",
    ):
        output(written(line), operator, control)
    auditor = sign_in(there, "u-cleo")
    line, _, name = written("saw audit export > trail.jsonl").partition(" > ")
    trail = output(line, auditor)
    shutil.copytree(control / "tiles", elsewhere / "tiles")
    shutil.copy(control / "log.key.pub", elsewhere)
    (elsewhere / name).write_text(trail)
    lines = trail.splitlines(keepends=True)
    (elsewhere / "less.jsonl").write_text("".join(lines[:3] + lines[4:]))

    proof = written("saw audit verify --checkpoint tiles/checkpoint --key log.key.pub --tiles tiles --file trail.jsonl")
    alone = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(elsewhere)}
    behind = [str(shutil.which("unshare")), "--net"]
    got = at_prompt(elsewhere, alone, [proof, "echo $?", proof.replace(name, "less.jsonl"), "echo $?"], behind)
    height = draw(screen, got)
    shown = screen.run(ROWS)
    take(screen, "11-verify", height)
    rows = [row.strip() for row in shown.split("\n")]
    assert [row for row in rows if row in {"0", "1"}] == ["0", "1"], shown
