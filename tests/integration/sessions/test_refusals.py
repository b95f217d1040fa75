"""What a bastion refuses, each beside what it allows: other logins, second logins, and everything but a session."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from broker_rig import Lab
from session_rig import RULES, Bastion, make_key, running
from sso_rig import free_port

from saw.broker.client import BrokerRefusal
from saw.identity.ssh import SshAuthority

pytestmark = pytest.mark.control("ID-02")
REFUSED = 77
"""Exit code of a login whose session the recorder refused."""


def allowed(bastion: Bastion, folder: Path, *extra: str) -> bool:
    """Whether a session runs a command."""
    return bastion.ssh(folder, "echo in-the-workspace", extra=extra).stdout == "in-the-workspace\n"


def permitted(bastion: Bastion) -> tuple[Path, str]:
    """A session whose certificate permits all that a certificate can, as ours never does: what refuses then is sshd alone."""
    folder, session = bastion.certify()
    authority = bastion.lab.config.keys / "ssh-sessions" / "ssh-user-ca"
    line = ["ssh-keygen", "-q", "-s", str(authority), "-I", session, "-n", session, "-V", "-1m:+5m"]
    subprocess.run([*line, str(folder / "key.pub")], check=True, capture_output=True)
    return folder, session


def test_a_certificate_logs_in_once(bastion: Bastion) -> None:
    folder, session = bastion.certify()
    assert allowed(bastion, folder)
    again = bastion.ssh(folder, "echo in-the-workspace")
    assert (again.returncode, again.stdout) == (REFUSED, "")
    assert f"{session} was used before" in again.stderr
    assert ("Logon", "Failure", "session_used") in bastion.audited(session)


def test_a_certificate_that_has_ended_does_not_log_in(bastion: Bastion) -> None:
    folder, session = bastion.certify()
    authority = SshAuthority.load(bastion.lab.config.keys / "ssh-sessions")
    public, then = (folder / "key.pub").read_text(), datetime.now(UTC) - timedelta(hours=1)
    good = (folder / "key-cert.pub").read_text()
    (folder / "key-cert.pub").write_text(authority.issue_user(public, session, session, then) + "\n")
    assert bastion.ssh(folder, "echo in-the-workspace").returncode == 255
    (folder / "key-cert.pub").write_text(good)
    assert allowed(bastion, folder)


def test_a_certificate_for_another_principal_or_of_another_authority_does_not_log_in(bastion: Bastion) -> None:
    folder, session = bastion.certify()
    good = (folder / "key-cert.pub").read_text()
    public = (folder / "key.pub").read_text()
    ours = SshAuthority.load(bastion.lab.config.keys / "ssh-sessions")
    workspaces = SshAuthority.load(bastion.lab.config.keys / "ssh")
    for certificate in (
        ours.issue_user(public, "ws-a", session, datetime.now(UTC)),
        ours.issue_user(public, "root", session, datetime.now(UTC)),
        workspaces.issue_user(public, session, session, datetime.now(UTC)),
        workspaces.issue_user(public, "ws-a", session, datetime.now(UTC)),
    ):
        (folder / "key-cert.pub").write_text(certificate + "\n")
        assert bastion.ssh(folder, "echo in-the-workspace").returncode == 255
    (folder / "key-cert.pub").write_text(good)
    assert allowed(bastion, folder)


def test_a_plain_key_and_a_host_certificate_do_not_log_in(bastion: Bastion, tmp_path: Path) -> None:
    folder, _ = bastion.certify()
    plain = tmp_path / "plain"
    plain.mkdir()
    make_key(plain / "key")
    shutil.copy(folder / "known_hosts", plain)
    (plain / "key-cert.pub").write_text("")
    assert bastion.ssh(plain, "echo in-the-workspace").returncode == 255
    for name in ("key", "key.pub", "key-cert.pub"):
        shutil.copy(bastion.directory / "host" / name.replace("key", "ssh_host_ed25519_key"), plain / name)
    assert bastion.ssh(plain, "echo in-the-workspace").returncode == 255
    assert allowed(bastion, folder)


@pytest.mark.regression("CVE-2026-46595")
def test_a_certificate_bound_to_an_address_does_not_log_in_from_another(bastion: Bastion) -> None:
    folder, session = bastion.certify(source_address="127.0.0.1")
    moved = bastion.ssh(folder, "echo in-the-workspace", extra=("-b", "127.0.0.2"))
    assert (moved.returncode, moved.stdout) == (255, "")
    assert allowed(bastion, folder, "-b", "127.0.0.1")
    assert bastion.closed(session)["from"] == "127.0.0.1"


def test_a_certificate_counts_from_the_configured_networks_alone_whatever_is_asked_for(tmp_path: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="saw-source-"))
    rules = msgspec.structs.replace(RULES, source_networks=("127.0.0.1/32", "127.0.0.8/30"))
    lab = Lab(directory, sessions=rules)
    try:
        lab.start()
        with running(lab, directory) as strict:
            folder, session = strict.certify()
            for other in ("127.0.0.2", "127.0.0.12"):
                refused = strict.ssh(folder, "echo in-the-workspace", extra=("-b", other))
                assert (refused.returncode, refused.stdout) == (255, "")
            assert strict.show(session)["state"] == "requested"
            assert allowed(strict, folder, "-b", "127.0.0.9")
            assert strict.closed(session)["from"] == "127.0.0.9"
            narrow, _ = strict.certify(source_address="127.0.0.9")
            assert not allowed(strict, narrow, "-b", "127.0.0.8")
            assert allowed(strict, narrow, "-b", "127.0.0.9")
            with pytest.raises(BrokerRefusal) as caught:
                strict.certify(source_address="127.0.0.0/8")
            assert caught.value.code == "source_address_outside"
    finally:
        lab.stop()
        shutil.rmtree(directory)


@pytest.mark.regression("CVE-2026-59999")
def test_no_port_is_forwarded_in_either_direction(bastion: Bastion) -> None:
    port = free_port()
    local, remote = f"{port}:127.0.0.1:{bastion.port}", f"{port}:127.0.0.1:22"
    for extra in (("-R", remote), ("-w", "any:any"), ("-R", f"{bastion.directory}/back.sock:127.0.0.1:22")):
        folder, session = permitted(bastion)
        assert not allowed(bastion, folder, *extra), extra
        assert bastion.show(session)["state"] == "requested"
    # A local listener is the client's own; what it is for is refused when somebody comes.
    folder, session = permitted(bastion)
    client = subprocess.Popen(
        bastion.line(folder, "echo ready; cat", extra=("-L", local)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert client.stdin is not None
    assert client.stdout is not None
    assert client.stdout.readline() == b"ready\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as through:
        through.settimeout(60)
        assert through.recv(64) == b""
    client.stdin.close()
    assert client.wait(60) == 0
    client.stdout.close()
    assert bastion.closed(session)["reason"] == "closed"


def test_nothing_goes_on_from_the_bastion_to_another_host(bastion: Bastion) -> None:
    folder, session = permitted(bastion)
    done = bastion.ssh(folder, extra=("-W", f"127.0.0.1:{bastion.base + 1}"))
    assert done.returncode != 0
    assert "SSH-2.0" not in done.stdout
    assert bastion.show(session)["state"] == "requested"
    assert allowed(bastion, folder)


def test_neither_agent_nor_screen_is_forwarded(bastion: Bastion, tmp_path: Path) -> None:
    agent = subprocess.run(
        ["ssh-agent", "-a", str(tmp_path / "agent"), "-s"], capture_output=True, text=True, check=True
    )
    number = int(agent.stdout.split("SSH_AGENT_PID=")[1].split(";")[0])
    folder, _ = permitted(bastion)
    line = bastion.line(folder, "echo ready; cat", extra=("-A", "-X"))
    environment = {**os.environ, "SSH_AUTH_SOCK": str(tmp_path / "agent"), "DISPLAY": "127.0.0.1:99"}
    client = subprocess.Popen(line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        # What sshd forwards, it tells the command that it runs: the recorder.
        [recorder] = bastion.recorders()
        names = {item.partition(b"=")[0] for item in Path(f"/proc/{recorder}/environ").read_bytes().split(b"\0")}
        assert b"SSH_CONNECTION" in names
        assert names & {b"SSH_AUTH_SOCK", b"DISPLAY"} == set()
        client.stdin.close()
        assert client.wait(60) == 0
        client.stdout.close()
    finally:
        os.kill(number, 15)
        if client.poll() is None:
            client.kill()
            client.wait()


def test_one_connection_is_one_session(bastion: Bastion, tmp_path: Path) -> None:
    folder, session = bastion.certify()
    shared = ("-o", "ControlMaster=auto", "-o", f"ControlPath={tmp_path}/m", "-o", "ControlPersist=30")
    try:
        assert allowed(bastion, folder, *shared)
        second = bastion.ssh(folder, "echo in-the-workspace", extra=shared)
        assert "in-the-workspace" not in second.stdout
    finally:
        subprocess.run(
            ["ssh", "-F", "/dev/null", "-O", "exit", "-o", f"ControlPath={tmp_path}/m", "root@127.0.0.1"],
            capture_output=True, check=False,
        )  # fmt: skip
    assert bastion.closed(session)["exit_code"] == 0


def test_a_session_that_was_ended_before_its_login_is_refused(bastion: Bastion) -> None:
    folder, session = bastion.certify()
    assert bastion.saw("session", "end", session, "--reason", "not needed").returncode == 0
    refused = bastion.ssh(folder, "echo in-the-workspace")
    assert (refused.returncode, refused.stdout) == (REFUSED, "")
    assert bastion.show(session)["state"] == "closed"


@pytest.mark.thorough
@pytest.mark.parametrize("broken", ["missing", "full", "broker", "keys"])
def test_what_cannot_be_recorded_is_not_opened(bastion: Bastion, tmp_path: Path, broken: str) -> None:
    changes = {
        "missing": {"recordings_dir": str(tmp_path / "nothing")},
        "full": {"recordings_dir": "/dev/full"},
        "broker": {"broker_url": f"https://127.0.0.1:{free_port()}"},
        "keys": {"runtime_dir": str(tmp_path / "nothing")},
    }
    folder, session = bastion.certify()
    bastion.configure(**changes[broken])
    try:
        refused = bastion.ssh(folder, "echo in-the-workspace")
    finally:
        bastion.configure()
    assert (refused.returncode, refused.stdout) == (REFUSED, ""), refused.stderr
    assert "saw: refused:" in refused.stderr
    # The certificate was not used up by that.
    assert bastion.show(session)["state"] == "requested"
    assert allowed(bastion, folder)
