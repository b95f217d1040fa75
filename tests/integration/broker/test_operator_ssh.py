"""``saw ssh`` and the operator client over SSH, against a real OpenSSH server that trusts the broker's authority."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from broker_rig import running_broker

from databases import beside
from saw.broker.client import BrokerContext, Context, OperatorClient, SshJump
from saw.broker.config import SessionRules
from saw.errors import UnavailableError
from saw.identity.ssh import SshAuthority


@pytest.fixture(scope="module")
def broker():
    """A broker whose workspaces are reached from loopback, as the SSH server of these tests is."""
    with running_broker(operator_group="daemon", sessions=SessionRules(leg_source="127.0.0.0/8")) as lab:
        yield lab


@pytest.fixture
def sshd(broker):
    """An sshd on a port of its own; certificates for ``ws-ssh`` may log in, and one key for the operator's forwarding."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("needs the OpenSSH server (package openssh-server)")
    with tempfile.TemporaryDirectory(prefix="saw-sshd-") as name:
        directory = Path(name)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for key in ("host", "operator"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / key)], check=True)
        ssh = SshAuthority.load(broker.config.keys / "ssh")
        host = ssh.issue_host((directory / "host.pub").read_text(), ["ws-ssh"], datetime.now(UTC), 600)
        (directory / "host-cert.pub").write_text(host + "\n")
        (directory / "user_ca").write_text(ssh.user_ca + "\n")
        (directory / "principals").write_text("ws-ssh\n")
        (directory / "authorized_keys").write_text((directory / "operator.pub").read_text())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (directory / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\nHostCertificate {directory}/host-cert.pub\n"
            f"TrustedUserCAKeys {directory}/user_ca\nAuthorizedPrincipalsFile {directory}/principals\n"
            f"AuthorizedKeysFile {directory}/authorized_keys\nPermitRootLogin prohibit-password\nUsePAM no\n"
            f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\nStrictModes no\n"
        )
        (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {(directory / 'host.pub').read_text()}")
        server = subprocess.Popen(
            [program, "-D", "-e", "-f", str(directory / "sshd_config")], stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert server.poll() is None, "sshd ended while starting"
            yield directory, port
        finally:
            server.terminate()
            server.wait(10)


@pytest.mark.control("ID-02")
def test_saw_ssh_attaches_with_a_certificate_for_one_workspace_and_leaves_no_key(broker, sshd) -> None:
    directory, port = sshd
    made = broker.workspace("ws-ssh")
    broker.workspace("ws-other")
    with beside(broker.config) as database:
        database.execute("UPDATE workspaces SET state = 'active' WHERE id IN ('ws-ssh', 'ws-other')")

    def attach(workspace: str, number: int, *command: str) -> subprocess.CompletedProcess[str]:
        context = directory / "context.json"
        context.write_text(
            json.dumps(
                {
                    "broker": {"socket": broker.config.operator_socket, "ssh": None},
                    "ingress": {"host": "127.0.0.1", "base_port": port - number, "user": "root", "known_hosts": None},
                }
            )
        )
        return subprocess.run(
            [sys.executable, "-m", "saw.cli.main", "ssh", workspace, "--context", str(context), "--", *command],
            env={**os.environ, "TMPDIR": str(directory)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    good = attach("ws-ssh", made["number"], "echo attached; exit 7")
    assert (good.returncode, good.stdout) == (7, "attached\n"), good.stderr
    number = broker.operator.request("GET", "/v1/workspaces/ws-other")["number"]
    refused = attach("ws-other", number, "echo attached")
    assert refused.returncode == 255
    assert "attached" not in refused.stdout
    assert not list(directory.glob("saw-ssh-*"))
    sessions = [event["event"] for event in broker.events() if event["event"].get("auth_protocol") == "ssh-certificate"]
    assert [event["device"]["uid"] for event in sessions][-2:] == ["ws-ssh", "ws-other"]


def test_the_operator_client_reaches_the_socket_over_ssh_and_cleans_up(broker, sshd, monkeypatch) -> None:
    directory, port = sshd
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    jump = SshJump("127.0.0.1", port, "root", str(directory / "operator"), str(directory / "known_hosts"))
    client = OperatorClient(Context(BrokerContext(broker.config.operator_socket, jump)))
    assert client.request("GET", "/v1/trust")["trust_domain"] == "saw.example"
    (directory / "known_hosts").write_text("")
    with pytest.raises(UnavailableError, match="ssh cannot reach"):
        client.request("GET", "/v1/trust")
    assert not list(directory.glob("saw-*"))
