"""``saw ssh`` through a bastion, and the part of ssh_config with which plain ssh, scp, rsync and Ansible do the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from session_rig import Bastion

pytestmark = pytest.mark.control("ID-02")


@pytest.fixture
def config(bastion: Bastion, tmp_path: Path) -> Path:
    """An ssh_config of which the printed part is all."""
    printed = bastion.saw("ssh", "--config", "ws-a")
    assert printed.returncode == 0, printed.stderr
    file = tmp_path / "config"
    file.write_text(printed.stdout)
    return file


def run(bastion: Bastion, *line: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SAW_SSH_KEYS": str(bastion.directory / "kept")}
    return subprocess.run(
        line, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
    )


def newest(bastion: Bastion) -> dict[str, object]:
    return dict(bastion.lab.operator.request("GET", "/v1/sessions?workspace_id=ws-a")["sessions"][0])


def test_saw_ssh_goes_through_the_bastion_that_the_context_names_and_leaves_no_key(bastion: Bastion) -> None:
    done = bastion.saw("ssh", "ws-a", "--", "echo in-the-workspace; exit 5")
    assert (done.returncode, done.stdout) == (5, "in-the-workspace\n"), done.stderr
    assert newest(bastion)["command"] == "echo in-the-workspace; exit 5"
    bound = bastion.saw("ssh", "ws-a", "--", "true", source_address="192.0.2.1")
    assert bound.returncode == 255
    assert bastion.saw("ssh", "ws-a", "--", "true", source_address="127.0.0.1").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM], ids=["hang-up", "request to end"])
def test_saw_ssh_that_is_ended_from_outside_leaves_no_key_either(bastion: Bastion, tmp_path: Path, number: int) -> None:
    bastion.saw("sessions")  # writes the context file
    environment = {**os.environ, "SAW_CONTEXT": str(bastion.directory / "context.json"), "TMPDIR": str(tmp_path)}
    line = [sys.executable, "-m", "saw.cli.main", "ssh", "ws-a", "--", "echo live; sleep 600"]
    with subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"live\n"
        assert list(tmp_path.rglob("key"))
        for _ in range(5):  # a terminal that closes, and whoever ended it
            client.send_signal(number)
        assert client.wait(60) == 128 + number
    assert list(tmp_path.iterdir()) == []
    assert bastion.closed(str(newest(bastion)["id"]))["reason"] == "client_gone"


def test_plain_ssh_gets_a_certificate_for_each_connection(bastion: Bastion, config: Path) -> None:
    for word in ("one", "two"):
        done = run(bastion, "ssh", "-F", str(config), "ws-a", f"echo {word}")
        assert (done.returncode, done.stdout) == (0, f"{word}\n"), done.stderr
        assert newest(bastion)["command"] == f"echo {word}"
    kept = bastion.directory / "kept" / "ws-a"
    assert kept.stat().st_mode & 0o777 == 0o700
    [key] = kept.glob("*/key")  # of the second one: what the first one left went before
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700


def test_connections_that_begin_together_have_a_certificate_each(
    bastion: Bastion, config: Path, tmp_path: Path
) -> None:
    # Neither goes on before all of them have their certificate.
    held = tmp_path / "held"
    held.write_text(
        '#!/bin/sh\n"$@" || exit\n'
        f": > {tmp_path}/at-$$\n"
        f'until [ "$(ls {tmp_path}/at-* | wc -l)" -ge 3 ]; do sleep 0.05; done\n'
    )
    held.chmod(0o755)
    saw = Path(sys.executable).with_name("saw")
    text = config.read_text()
    assert f"exec {saw} " in text
    config.write_text(text.replace(f"exec {saw} ", f"exec {held} {saw} "))
    environment = {**os.environ, "SAW_SSH_KEYS": str(bastion.directory / "kept")}
    clients = [
        subprocess.Popen(
            ["ssh", "-F", str(config), "ws-a", f"echo {word}"],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for word in ("one", "two", "three")
    ]  # fmt: skip
    ends = [(*client.communicate(timeout=120), client.returncode) for client in clients]
    assert [(out, code) for out, _, code in ends] == [("one\n", 0), ("two\n", 0), ("three\n", 0)], ends


def test_the_part_of_before_still_finds_its_key(bastion: Bastion, config: Path) -> None:
    kept = bastion.directory / "kept" / "ws-a"
    text = (
        config.read_text().replace(" --process $PPID", "").replace(f"Include {kept}/*.conf", f"IdentityFile {kept}/key")
    )
    files = f"    CertificateFile {kept}/key-cert.pub\n    UserKnownHostsFile {kept}/known_hosts\n"
    config.write_text(text + files)
    done = run(bastion, "ssh", "-F", str(config), "ws-a", "echo as-before")
    assert (done.returncode, done.stdout) == (0, "as-before\n"), done.stderr


def test_scp_and_rsync_use_the_same_part(bastion: Bastion, config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    done = run(bastion, "scp", "-F", str(config), str(tmp_path / "file"), f"ws-a:{tmp_path}/by-scp")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "by-scp").read_text() == "content"
    if shutil.which("rsync"):
        shell = f"ssh -F {config}"
        done = run(bastion, "rsync", "-e", shell, str(tmp_path / "file"), f"ws-a:{tmp_path}/by-rsync")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "by-rsync").read_text() == "content"


def play(
    bastion: Bastion, config: Path, folder: Path, *more: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the playbook of ``folder`` as docs/sessions.md says; return how it ended, and the commands of its sessions."""
    before = sessions(bastion)
    told = {"ansible_ssh_args": f"-F {config} -o ControlMaster=no", "ansible_remote_tmp": str(folder / "far")}
    words = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "ws-a,", "-e", json.dumps(told), *more]
    done = run(bastion, "env", "ANSIBLE_NOCOLOR=1", *words, str(folder / "play.yml"), timeout=600)
    return done, [command for one, command in sessions(bastion).items() if one not in before]


def sessions(bastion: Bastion) -> dict[str, str]:
    """Return the command of each session."""
    found = bastion.lab.operator.request("GET", "/v1/sessions?workspace_id=ws-a")["sessions"]
    return {str(one["id"]): str(one["command"]) for one in found}


@pytest.mark.thorough
def test_an_ordinary_play_changes_a_file_once_and_shows_it_first(
    bastion: Bastion, config: Path, tmp_path: Path
) -> None:
    there = tmp_path / "notes.txt"
    copy = {"content": "of November\n", "dest": str(there), "mode": "0600"}
    tasks = [
        {"ansible.builtin.ping": {}, "tags": "ping"},
        {"ansible.builtin.copy": copy, "tags": "copy"},
    ]
    (tmp_path / "play.yml").write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    piped = ("-e", "ansible_pipelining=true")

    shown, _ = play(bastion, config, tmp_path, *piped, "--tags=copy", "--check", "--diff")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "+of November" in shown.stdout
    assert not there.exists()
    first, taken = play(bastion, config, tmp_path, *piped, "--tags=copy")
    assert "changed=1 " in first.stdout, first.stdout + first.stderr
    assert (there.read_text(), there.stat().st_mode & 0o777) == ("of November\n", 0o600)
    assert "sftp" in taken
    second, taken = play(bastion, config, tmp_path, *piped)
    assert "ok=2 " in second.stdout, second.stdout + second.stderr
    assert "changed=0 " in second.stdout
    assert "sftp" not in taken


@pytest.mark.thorough
@pytest.mark.parametrize(("pipelining", "taken"), [(False, 7), (True, 2)])
def test_a_module_takes_as_many_sessions_as_the_page_says(
    bastion: Bastion, config: Path, tmp_path: Path, pipelining: bool, taken: int
) -> None:
    before = sessions(bastion)
    told: dict[str, object] = {"ansible_ssh_args": f"-F {config} -o ControlMaster=no"}
    # Ansible looks for Python as by default, and finds the system's.
    told["ansible_interpreter_python_fallback"] = ["/usr/bin/python3"]
    told |= {"ansible_pipelining": True} if pipelining else {}
    bare = ("env", "--unset=ANSIBLE_CONFIG", f"--chdir={tmp_path}")  # where no ansible.cfg is
    words = (str(Path(sys.executable).with_name("ansible")), "all", "-i", "ws-a,", "-m", "ping", "-e", json.dumps(told))
    done = run(bastion, *bare, *words, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = [command for one, command in sessions(bastion).items() if one not in before]
    assert len(commands) == taken, commands
    assert ("sftp" in commands) is not pipelining


SERVER = """
import sys
while head := sys.stdin.buffer.readline():
    sys.stdin.buffer.readline()
    body = sys.stdin.buffer.read(int(head.split(b":")[1]))
    sys.stdout.buffer.write(b"Content-Length: %d\\r\\n\\r\\n" % len(body) + body[::-1])
    sys.stdout.buffer.flush()
print("ended", file=sys.stderr)
"""
"""In the place of the part of an editor that runs on the far side: frames as language servers have them, answered backwards."""


def test_an_editor_uploads_its_server_and_talks_to_it_over_standard_input(
    bastion: Bastion, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    far = tmp_path / "far"
    batch = tmp_path / "batch"
    batch.write_text(f"mkdir {far}\nput {tmp_path}/server.py {far}/server.py\nchmod 700 {far}/server.py\n")
    uploaded = run(bastion, "sftp", "-b", str(batch), "-F", str(config), "ws-a")
    assert uploaded.returncode == 0, uploaded.stderr
    environment = {**os.environ, "SAW_SSH_KEYS": str(bastion.directory / "kept")}
    line = ["ssh", "-T", "-F", str(config), "ws-a", f"exec {sys.executable} {far}/server.py"]
    with subprocess.Popen(
        line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as editor:
        deadline = threading.Timer(240, editor.kill)
        deadline.start()
        assert editor.stdin is not None
        assert editor.stdout is not None
        for size in (1, 1 << 18, 7):  # not only what fits into one packet, and every byte
            body = bytes(range(256)) * (size // 256) or b"\xff\x00\r\n\x03\x04~"[:size]
            editor.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            editor.stdin.flush()
            assert editor.stdout.readline() == b"Content-Length: %d\r\n" % len(body)
            assert editor.stdout.readline() == b"\r\n"
            assert editor.stdout.read(len(body)) == body[::-1]
        # its second connection, while the first one lives
        beside = run(bastion, "ssh", "-F", str(config), "ws-a", f"ls {far}")
        assert (beside.returncode, beside.stdout) == (0, "server.py\n"), beside.stderr
        _, said = editor.communicate()
        deadline.cancel()
        assert (editor.returncode, said) == (0, b"ended\n")


@pytest.mark.thorough
def test_a_part_that_comes_first_keeps_connections_from_being_shared(
    bastion: Bastion, config: Path, tmp_path: Path
) -> None:
    part = config.read_text()
    sockets = Path(tempfile.mkdtemp())  # a name in it may have 107 bytes
    shared = f"Host *\n    ControlMaster auto\n    ControlPersist 30\n    ControlPath {sockets}/%C\n"
    line = ("ssh", "-F", str(config), "ws-a", "echo in-the-workspace")
    config.write_text(part + shared)
    for _ in range(2):
        done = run(bastion, *line)
        assert (done.returncode, done.stdout) == (0, "in-the-workspace\n"), done.stderr
    assert list(sockets.iterdir()) == []
    # what stands before it counts first: the second command wants the certificate of the first again
    config.write_text(shared + part)
    try:
        run(bastion, *line)
        refused = run(bastion, *line)
    finally:
        run(bastion, "ssh", "-F", str(config), "-O", "exit", "ws-a")
        shutil.rmtree(sockets)
    assert (refused.returncode, refused.stdout) == (77, ""), refused.stderr
    assert "was used before" in refused.stderr


def test_ansible_reaches_every_workspace_of_the_inventory(bastion: Bastion, tmp_path: Path) -> None:
    bastion.saw("sessions")  # writes the context file
    link = tmp_path / "ansible_collections/secure_agent/workspace"
    link.parent.mkdir(parents=True)
    link.symlink_to(Path(__file__).parents[3])
    file = tmp_path / "fleet.broker.yml"
    file.write_text(f"plugin: secure_agent.workspace.broker\ncontext: {bastion.directory / 'context.json'}\n")
    line = [
        str(Path(sys.executable).with_name("ansible")),
        "saw_workspaces",
        "-i",
        str(file),
        "-m",
        "ansible.builtin.raw",
    ]
    done = run(bastion, "env", f"ANSIBLE_COLLECTIONS_PATH={tmp_path}", *line, "-a", "echo from-the-inventory")
    assert "from-the-inventory" in done.stdout, done.stdout + done.stderr
    assert "echo from-the-inventory" in str(newest(bastion)["command"])
    # A host that gets no certificate is not connected to under its own name.
    [config] = (bastion.directory / "kept").glob("fleet-*.conf")
    refused = run(bastion, "ssh", "-F", str(config), "ws-none", "true")
    assert refused.returncode == 255
    assert "unknown_workspace" in refused.stderr or "there is no workspace" in refused.stderr
    assert "no-certificate.saw.invalid" in refused.stderr


def test_without_a_bastion_there_is_nothing_to_print(bastion: Bastion, tmp_path: Path) -> None:
    file = tmp_path / "context.json"
    file.write_text("{}")
    done = bastion.saw("ssh", "--config", "ws-a", "--context", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert "names no bastion" in done.stderr
    odd = tmp_path / "it's"
    odd.write_text('{"bastion": {"host": "127.0.0.1"}}')
    assert "special characters" in bastion.saw("ssh", "--config", "ws-a", "--context", str(odd)).stderr
