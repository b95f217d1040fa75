"""The kit through OpenSSH to a host: the probe runs there, and what it sends is seen here."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin") or ""
CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
PidFile none
AuthorizedKeysFile {folder}/known.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """Return a folder with the keys ``known`` and ``stranger``, and the port of a real sshd that knows the first."""
    if os.geteuid() != 0 or not SSHD:
        pytest.skip("an SSH server needs root and openssh-server")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "known", "stranger"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True, timeout=60
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(CONFIG.format(folder=folder, port=port), encoding="ascii")
    key = (folder / "host.pub").read_text(encoding="ascii")
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {key}", encoding="ascii")
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, "sshd does not listen"
                time.sleep(0.02)
        yield folder, port
    finally:
        server.terminate()
        server.wait(20)


def target(host: tuple[Path, int], key: str) -> str:
    folder, port = host
    options = {"IdentitiesOnly": "yes", "UserKnownHostsFile": folder / "known_hosts", "StrictHostKeyChecking": "yes"}
    words = ["-F", "none", "-p", str(port), "-i", str(folder / key)]
    words += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return "ssh:" + shlex.join([*words, "root@127.0.0.1"])


def test_through_ssh_the_kit_tries_a_host_and_sees_what_arrives(kit, host):
    words = (
        "--recorder",
        "127.0.0.1",
        "--case",
        "net.tcp.high",
        "--case",
        "process.ptrace",
        "--case",
        "files.write.usr",
    )
    found = kit("--target", target(host, "known"), *words)
    assert found.report["problems"] == [], found.text
    arrived = found.case("net.tcp.high")
    assert (found.code, arrived["result"], arrived["arrived"]) == (1, "allowed", True), arrived
    assert found.case("files.write.usr")["result"] == "allowed"  # it is a host, and no sandbox
    assert [found.case(name)["twin"]["result"] for name in ("files.write.usr", "process.ptrace")] == ["works", "works"]


def test_a_host_that_does_not_let_the_kit_in_is_named_and_leaves_no_report(kit, host):
    found = kit("--target", target(host, "stranger"), "--case", "process.ptrace")
    assert (found.code, found.report) == (1, {})
    assert "Permission denied" in found.text
    assert "the probe did not run in ssh:" in found.text
