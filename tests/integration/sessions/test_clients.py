"""``saw ssh`` through a bastion, and the part of ssh_config with which plain ssh, scp, rsync and Ansible do the same."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
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


def run(bastion: Bastion, *line: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SAW_SSH_KEYS": str(bastion.directory / "kept")}
    return subprocess.run(
        line, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
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


def test_ansible_reaches_a_workspace_with_it(bastion: Bastion, config: Path) -> None:
    ansible = Path(sys.executable).with_name("ansible")
    # One login is one session: connections are not shared.
    shared = f"-F {config} -o ControlMaster=no"
    done = run(
        bastion, str(ansible), "all", "-i", "ws-a,", "-m", "ansible.builtin.raw", "-a", "echo from-ansible",
        "-e", f"ansible_ssh_args='{shared}'",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from-ansible" in done.stdout


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
