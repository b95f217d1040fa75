"""The bastion on the perimeter host: an SSH server that runs the recorder, for certificates of sessions alone."""

from __future__ import annotations

import subprocess
from pathlib import Path
from uuid import uuid4

import pytest

testinfra_hosts = ["edge"]


def test_the_bastion_runs_enabled_and_its_configuration_is_good(host):
    service = host.service("saw-bastion")
    assert service.is_running, host.run("journalctl -u saw-bastion --no-pager -n 50").stdout
    assert service.is_enabled
    assert host.run("/opt/saw/bin/saw session check").rc == 0


def test_recordings_and_the_key_to_the_broker_are_for_the_recorder_alone(host):
    for folder in ("/var/lib/saw/bastion/recordings", "/run/saw/bastion"):
        assert (host.file(folder).user, host.file(folder).mode) == ("saw-session", 0o700)
    key = host.file("/etc/saw/bastion-tls/key.pem")
    assert (key.user, key.mode) == ("saw-session", 0o400)
    assert host.user("saw-session").shell == "/opt/saw/libexec/saw-session"


def test_its_host_key_is_certified_under_the_one_name_that_clients_look_for(host):
    shown = host.run("ssh-keygen -L -f /etc/saw/bastion-ssh/ssh_host_ed25519_key-cert.pub").stdout
    assert "host certificate" in shown
    assert "saw-bastion" in shown


def certificate(folder: Path, session: str) -> Path:
    """A key in ``folder`` with a certificate for ``session`` of an authority that nobody here knows; returns the key."""
    key, authority = folder / "key", folder / "ca"
    for file in (key, authority):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    subprocess.run(["ssh-keygen", "-q", "-s", str(authority), "-I", session, "-n", session, f"{key}.pub"], check=True)
    return key


@pytest.mark.control("ID-02")
def test_sshd_refuses_a_key_and_a_certificate_of_another_authority(tmp_path):
    """From outside, so the packet filter admits people at its port: a refusal of sshd is an answer."""
    key = certificate(tmp_path, f"ses-{uuid4().hex}")
    for _ in range(2):
        refused = subprocess.run(
            ["ssh", "-p", "2222", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no",
             "-o", "UserKnownHostsFile=/dev/null", "-i", str(key), "saw-session@10.79.0.20", "id"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert (refused.returncode, "Permission denied" in refused.stderr) == (255, True), refused.stderr
        (tmp_path / "key-cert.pub").unlink(missing_ok=True)


@pytest.mark.control("ID-02")
def test_the_recorder_lets_nobody_through_whose_session_the_broker_does_not_know(host, tmp_path):
    """Past sshd, as the account itself: the recorder asks the broker with the bastion's own certificate."""
    certificate(tmp_path, f"ses-{uuid4().hex}")
    shown = f"publickey {(tmp_path / 'key-cert.pub').read_text().strip()}"
    refused = host.run(
        "echo %s >/run/saw/bastion/shown && SSH_USER_AUTH=/run/saw/bastion/shown SSH_ORIGINAL_COMMAND=id "
        "SSH_CONNECTION='10.79.0.1 1 10.79.0.20 2222' setpriv --reuid saw-session --regid saw-session --clear-groups "
        "/opt/saw/libexec/saw-session; code=$?; rm -f /run/saw/bastion/shown; exit $code",
        shown,
    )
    assert refused.rc != 0
    assert "uid=" not in refused.stdout
    assert "there is no such session" in refused.stderr
    assert host.run("ls -A /run/saw/bastion /var/lib/saw/bastion/recordings | grep -v :").stdout.strip() == ""
