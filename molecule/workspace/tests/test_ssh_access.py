"""Who gets in by SSH: real OpenSSH on both ends, with an authority made here in place of the broker's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

testinfra_hosts = ["guest"]
ADDRESS = "10.79.0.40"


def local(*argv):
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def authority(host, tmp_path_factory):
    """A user authority that the guest trusts while these tests run, and a workspace called ws-demo."""
    folder = tmp_path_factory.mktemp("authority")
    for name in ("ca", "other-ca", "user"):
        assert local("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name).returncode == 0
    workspace = json.dumps({"workspace_id": "ws-demo"})
    public = (folder / "ca.pub").read_text().strip()
    host.run_expect(
        [0],
        f"mkdir -p /run/saw/ssh && echo '{public}' > /run/saw/ssh/user-ca.pub && echo '{workspace}' > /run/saw/workspace.json",
    )
    yield folder
    host.run("rm -f /run/saw/ssh/user-ca.pub /run/saw/workspace.json")


def login(authority, *, ca="ca", principal="ws-demo", user="agent", validity="+5m", port="22", options=()):
    """Log in with a fresh certificate; return the finished ssh."""
    key = authority / "user"
    Path(f"{key}-cert.pub").unlink(missing_ok=True)
    if ca:
        signed = local(
            "ssh-keygen", "-q", "-s", authority / ca, "-I", "ses-1", "-n", principal, "-V", validity, f"{key}.pub"
        )
        assert signed.returncode == 0, signed.stderr
    strict = (
        "-o",
        "BatchMode=yes",
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        f"UserKnownHostsFile={authority}/known_hosts",
        "-o",
        "LogLevel=ERROR",
    )
    return local(
        "ssh",
        "-F",
        "/dev/null",
        "-i",
        key,
        "-o",
        "IdentitiesOnly=yes",
        "-p",
        port,
        *strict,
        *options,
        f"{user}@{ADDRESS}",
        "id -u; grep NoNewPrivs /proc/self/status",
    )


@pytest.mark.control("ID-02")
@pytest.mark.usefixtures("generation")
def test_a_certificate_for_this_workspace_enters_the_sandbox(authority):
    done = login(authority)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2000", "NoNewPrivs:", "1"], "the command ran, but not in the sandbox"


@pytest.mark.control("ID-02")
@pytest.mark.parametrize(
    "refused",
    [
        pytest.param({"principal": "ws-other"}, id="another workspace's certificate"),
        pytest.param({"ca": "other-ca"}, id="a foreign authority"),
        pytest.param({"ca": None}, id="a plain key"),
        pytest.param({"validity": "-10m:-5m"}, id="an expired certificate"),
        pytest.param({"user": "root"}, id="root"),
    ],
)
def test_anything_else_is_refused(authority, refused):
    done = login(authority, **refused)
    assert done.returncode == 255
    assert "Permission denied" in done.stderr


@pytest.mark.control("NET-02")
def test_the_controllers_own_key_no_longer_enters():
    """It does on the door that the tests keep, so the key itself is good."""
    key = Path(__file__).parents[3] / "build/molecule/ssh/controller"
    options = (
        "-F",
        "/dev/null",
        "-i",
        key,
        "-o",
        "BatchMode=yes",
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
    )
    assert local("ssh", *options, "-p", "2222", f"root@{ADDRESS}", "true").returncode == 0
    refused = local("ssh", *options, "-p", "22", f"root@{ADDRESS}", "true")
    assert refused.returncode == 255
    assert "Permission denied" in refused.stderr


@pytest.mark.control("ID-02")
def test_forwarding_is_off(host):
    effective = host.run("sshd -T").stdout
    for line in (
        "disableforwarding yes",
        "permitrootlogin no",
        "passwordauthentication no",
        "authorizedkeysfile none",
        "permituserrc no",
    ):
        assert line in effective


@pytest.mark.control("ID-02")
def test_a_certificate_for_a_port_runs_its_one_command_and_no_other_opens_that_account(authority):
    done = login(authority, user="saw-forward", principal="forward:ws-demo")
    assert (done.returncode, done.stdout) == (77, ""), done.stderr
    assert "no port that may be forwarded" in done.stderr
    for refused in (
        {"user": "saw-forward"},
        {"user": "saw-forward", "principal": "forward:ws-other"},
        {"principal": "forward:ws-demo"},
    ):
        assert login(authority, **refused).returncode == 255, refused
