"""The way to a port of the sandbox: what the forced command takes, and that units, server and programs name the same things."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from configparser import RawConfigParser
from pathlib import Path

import jinja2
import pytest

from saw.identity.ssh import FORWARD
from saw.mux import read_port
from saw.runtime import forward
from saw.runtime.sandbox_units import NETNS_PATH
from saw.sessions.config import BastionConfig

pytestmark = pytest.mark.control("ID-02")
ROLES = Path(__file__).resolve().parents[3] / "roles"
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin")
BAD = (
    *("", "80", "1023", "3128", "9901", "65536", "03000", "3000 ", "-3000", "+3000"),
    *("3000;id", "$(id)", "127.0.0.1:3000", "\u0663000"),
)


def unit(name: str) -> RawConfigParser:
    found = RawConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read_string((ROLES / "sandbox/templates" / name).read_text())
    return found


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_port_reaches_nothing(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert read_port(text) is None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.setblocking(False)
        assert forward.enter({"SSH_ORIGINAL_COMMAND": text}, str(tmp_path / "s")) == 77
        assert "no port that may be forwarded" in capfd.readouterr().err
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_port_is_handed_on_and_both_ends_are_relayed(tmp_path: Path) -> None:
    place, seen = tmp_path / "s", []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as client, client.makefile("rb") as stream:
                seen.append(stream.readline())
                seen.append(stream.read())
                client.sendall(b"answer")

        thread = threading.Thread(target=answer)
        thread.start()
        code = "import os, sys; from saw.runtime.forward import enter; sys.exit(enter(os.environ, sys.argv[1]))"
        done = subprocess.run(
            [sys.executable, "-c", code, str(place)], env={"SSH_ORIGINAL_COMMAND": "3000"}, input=b"frames", capture_output=True,
            timeout=60, check=False,
        )  # fmt: skip
        thread.join(60)
    assert (done.returncode, done.stdout, seen) == (0, b"answer", [b"3000\n", b"frames"])


def test_without_the_service_it_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert forward.enter({"SSH_ORIGINAL_COMMAND": "3000"}, str(tmp_path / "none")) == 1
    assert "cannot be reached" in capfd.readouterr().err


def test_the_units_are_the_programs_and_only_their_account_reaches_the_socket() -> None:
    listens, service = unit("saw-forward.socket.j2")["Socket"], unit("saw-forward@.service.j2")["Service"]
    assert (listens["ListenStream"], listens["SocketMode"], listens["Accept"]) == (forward.SOCKET, "0600", "yes")
    assert service["NetworkNamespacePath"] == NETNS_PATH
    assert (service["IPAddressDeny"], service["IPAddressAllow"]) == ("any", forward.LOOPBACK)
    assert service["ExecStart"].endswith(" sandbox forward-serve")
    account = listens["SocketUser"]
    bastion = BastionConfig(broker_url="https://b", ca_file="/c", cert_file="/d", key_file="/e")
    assert account == service["User"] == bastion.forward_user
    assert re.search(rf"^u {account} ", (ROLES / "sandbox/templates/sysusers.conf.j2").read_text(), re.MULTILINE)


@pytest.mark.skipif(SSHD is None or os.geteuid() != 0, reason="sshd says its configuration to root alone")
def test_each_account_of_a_workspace_has_its_own_certificates_and_its_own_command(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    text = jinja2.Template((ROLES / "ssh_access/templates/sshd.conf.j2").read_text()).render(
        ssh_access_user="agent", ssh_access_system={"penalties": True}
    )
    # Host keys are the image's, and older servers know no penalties.
    lines = [line for line in text.splitlines() if not line.startswith(("Host", "PerSource"))]
    (tmp_path / "sshd.conf").write_text("\n".join(lines) + "\n")
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)

    def told(user: str) -> dict[str, str]:
        line = [str(SSHD), "-T", "-f", str(tmp_path / "sshd.conf"), "-h", str(tmp_path / "key")]
        done = subprocess.run(
            [*line, "-C", f"user={user},host=x,addr=10.210.1.1"], check=True, capture_output=True, text=True
        )
        return dict(one.split(" ", 1) for one in done.stdout.splitlines() if " " in one)

    agent, port = told("agent"), told("saw-forward")
    assert (agent["forcecommand"], port["forcecommand"]) == (
        "/opt/saw/libexec/saw-attach",
        "/opt/saw/bin/saw sandbox forward",
    )
    assert FORWARD not in agent["authorizedprincipalscommand"]
    assert f"'{FORWARD}' + json.load" in port["authorizedprincipalscommand"]
    assert port["permittty"] == "no"
    for found in (agent, port):
        kept = (
            "disableforwarding",
            "allowtcpforwarding",
            "allowagentforwarding",
            "x11forwarding",
            "authorizedkeysfile",
        )
        assert [found[name] for name in kept] == ["yes", "no", "no", "no", "none"]
