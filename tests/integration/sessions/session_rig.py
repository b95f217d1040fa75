"""A broker, a bastion and a workspace's SSH server, all real, on loopback; and OpenSSH's client with a session's certificate.

The bastion's sshd runs the configuration that the role installs. Both servers log in to the account that runs the tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import shutil
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from broker_rig import Lab
from sso_rig import free_port, until

from databases import beside
from saw.broker.config import SessionRules
from saw.identity.ssh import SshAuthority

ROOT = Path(__file__).resolve().parents[3]
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") or "/usr/sbin/sshd"
RULES = SessionRules(lease_s=60, leg_source="127.0.0.0/8")
AS_ROOT = ["-o", "PermitRootLogin=prohibit-password"]
"""In place of the account that the role makes; servers run as root."""


class Bastion:
    """The bastion of a running lab, whose workspaces are all one SSH server on loopback."""

    def __init__(self, lab: Lab, directory: Path, port: int | None = None) -> None:
        self.lab = lab
        self.directory = directory
        self.recordings = directory / "recordings"
        self.port, self.base = port or free_port(), 0
        self.servers: list[subprocess.Popen[bytes]] = []
        self.forwarder: socket.socket | None = None
        for folder in (self.recordings, directory / "legs", directory / "host"):
            folder.mkdir()
        self.config = directory / "bastion.json"
        self._keys = 0

    def start(self, workspace: str, number: int) -> None:
        self._serve_workspace(workspace, number)
        run = [sys.executable, "-m", "saw.cli.main", "session"]
        tls = [*run, "init", "--directory", str(self.directory / "host"), "--name", "edge"]
        subprocess.run(tls, check=True, capture_output=True)
        body = {"csr_pem": (self.directory / "host/key.csr").read_text(), "kind": "bastion", "name": "edge"}
        issued = self.lab.operator.request("POST", "/v1/certificates/x509", body)
        (self.directory / "host/cert.pem").write_text(issued["certificate"])
        self.configure()
        made = [*run, "host", "--config", str(self.config), "--directory", str(self.directory / "host")]
        subprocess.run(made, check=True, capture_output=True)
        text = jinja2.Template((ROOT / "roles/bastion/templates/sshd.conf.j2").read_text()).render(
            ansible_managed="test",
            bastion_port=self.port,
            bastion_listen_address="127.0.0.1",
            bastion_host_directory=self.directory / "host",
            bastion_user="root",
            bastion_command=f"{' '.join(run)} record --config {self.config}",
        )
        (self.directory / "sshd.conf").write_text(text)
        self._serve([*AS_ROOT, "-f", str(self.directory / "sshd.conf")], self.port, "bastion.log")

    def configure(self, **changes: Any) -> None:
        """Write the recorder's configuration; it counts for sessions from then on."""
        told = {
            "broker_url": f"https://127.0.0.1:{self.lab.port}",
            "ca_file": str(self.lab.ca_file),
            "cert_file": str(self.directory / "host/cert.pem"),
            "key_file": str(self.directory / "host/key.pem"),
            "recordings_dir": str(self.recordings),
            "runtime_dir": str(self.directory / "legs"),
            "workspace_user": "root",
            "forward_user": "root",
            "ingress": {"host": "127.0.0.1", "base_port": self.base},
            **changes,
        }
        new = self.config.with_suffix(".new")
        new.write_text(json.dumps(told))
        new.replace(self.config)

    @contextmanager
    def breaking(self, times: int) -> Iterator[list[int]]:
        """The way to the workspace breaks off the first ``times`` connections; yields how often it was asked."""
        asked = [0]
        number = 1  # of ws-a
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port, real = listener.getsockname()[1], self.base

            def serve() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        client, _ = listener.accept()
                        asked[0] += 1
                        if asked[0] <= times:
                            client.close()
                            continue
                        far = socket.create_connection(("127.0.0.1", real + number))
                        for one, other in ((client, far), (far, client)):
                            threading.Thread(target=_copy, args=(one, other), daemon=True).start()

            threading.Thread(target=serve, daemon=True).start()
            self.configure(ingress={"host": "127.0.0.1", "base_port": port - number})
            try:
                yield asked
            finally:
                self.configure()
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        if self.forwarder is not None:
            self.forwarder.shutdown(socket.SHUT_RDWR)
            self.forwarder.close()
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            server.wait(15)

    def certify(self, workspace: str = "ws-a", **more: Any) -> tuple[Path, str]:
        """Request a session as ``saw ssh`` does; return the folder of its key, and its id."""
        self._keys += 1
        folder = self.directory / f"keys{self._keys}"
        folder.mkdir()
        make_key(folder / "key")
        body = {"workspace_id": workspace, "public_key": (folder / "key.pub").read_text(), **more}
        given = self.lab.operator.request("POST", "/v1/sessions", body)
        (folder / "key-cert.pub").write_text(given["certificate"] + "\n")
        (folder / "known_hosts").write_text(f"@cert-authority * {given['host_ca']}\n")
        return folder, str(given["session_id"])

    def options(self, folder: Path) -> list[str]:
        """Options of OpenSSH's clients; nothing in them keeps the client from asking for more than it may."""
        options = {
            "IdentityFile": folder / "key",
            "CertificateFile": folder / "key-cert.pub",
            "UserKnownHostsFile": folder / "known_hosts",
            "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": "saw-bastion",
            "StrictHostKeyChecking": "yes",
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "ExitOnForwardFailure": "yes",
        }
        return ["-F", "/dev/null", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]

    def line(self, folder: Path, *command: str, extra: tuple[str, ...] = ()) -> list[str]:
        return ["ssh", *self.options(folder), "-p", str(self.port), *extra, "root@127.0.0.1", *command]

    def ssh(
        self, folder: Path, *command: str, extra: tuple[str, ...] = (), text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Log in and run ``command`` to its end."""
        return subprocess.run(
            self.line(folder, *command, extra=extra),
            input=text,
            stdin=None if text is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={name: value for name, value in os.environ.items() if name != "SSH_AUTH_SOCK"},
        )

    def sql(self, statement: str, *values: str) -> None:
        """Change the broker's database beside it."""
        with beside(self.lab.config) as store:
            store.execute(statement, values)

    def show(self, session: str) -> dict[str, Any]:
        return self.lab.operator.request("GET", f"/v1/sessions/{session}")

    def closed(self, session: str) -> dict[str, Any]:
        """Return the session once its bastion has reported its end and handed in its recording."""

        def over() -> dict[str, Any] | None:
            found = self.show(session)
            whole = found["recording"] is None or found["recording_stored_at"] is not None
            return found if found["state"] == "closed" and whole else None

        return dict(until(over, 60))

    def stored(self, session: str) -> Path:
        """Where the broker keeps the recording of ``session``."""
        return self.lab.config.state / "recordings" / f"{session}.sawrec"

    def audited(self, session: str) -> list[tuple[str, str, str]]:
        """Activity, outcome and reason of every event about a session, in order."""
        found = []
        for item in self.lab.events():
            event = item["event"]
            own = event["unmapped"]["saw"].get("session") or event.get("session", {}).get("uid")
            if own == session:
                name = event.get("api", {}).get("operation") or event["activity_name"]
                found.append((name, event.get("status", ""), event.get("status_detail") or event.get("message", "")))
        return found

    def saw(self, *arguments: str, **context: Any) -> subprocess.CompletedProcess[str]:
        """Run ``saw`` with a context that names the bastion."""
        file = self.directory / "context.json"
        told = {
            "broker": {"socket": self.lab.config.operator_socket, "ssh": None},
            "bastion": {"host": "127.0.0.1", "port": self.port, "user": "root", **context},
        }
        file.write_text(json.dumps(told))
        return subprocess.run(
            [sys.executable, "-m", "saw.cli.main", *arguments],
            env={**os.environ, "SAW_CONTEXT": str(file), "SAW_SSH_KEYS": str(self.directory / "kept")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def recorders(self) -> set[int]:
        """The processes of live recorders."""
        found = set()
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (place / "cmdline").read_bytes().split(b"\0")
                if words[0].endswith(b"python") and b"record" in words and str(self.config).encode() in words:
                    found.add(int(place.name))
        return found

    def log(self) -> str:
        return (self.directory / "bastion.log").read_text(errors="replace")

    def _serve_workspace(self, workspace: str, number: int) -> None:
        port = free_port()
        self.base = port - number
        folder = self.directory / "workspace"
        folder.mkdir()
        make_key(folder / "host")
        authority = SshAuthority.load(self.lab.config.keys / "ssh")
        host = authority.issue_host((folder / "host.pub").read_text(), [workspace], datetime.now(UTC), 3600)
        (folder / "host-cert.pub").write_text(host + "\n")
        (folder / "user_ca").write_text(authority.user_ca + "\n")
        # In place of the account for forwarded ports and of its forced command; the unit's socket is ours.
        (folder / "forward.sh").write_text(
            f"#!/bin/sh\nexec {sys.executable} -c 'import os, sys; from saw.runtime.forward import enter; "
            f'sys.exit(enter(os.environ, "{folder}/forward.sock"))\'\n'
        )
        (folder / "forward.sh").chmod(0o755)
        (folder / "principals").write_text(f'{workspace}\ncommand="{folder}/forward.sh" forward:{workspace}\n')
        self._serve_ports(folder / "forward.sock")
        (folder / "sshd.conf").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nHostCertificate {folder}/host-cert.pub\n"
            f"TrustedUserCAKeys {folder}/user_ca\nAuthorizedPrincipalsFile {folder}/principals\nAuthorizedKeysFile none\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nPidFile none\nStrictModes no\n"
            "Subsystem sftp internal-sftp\nPrintMotd no\nPrintLastLog no\n"
        )
        self._serve([*AS_ROOT, "-f", str(folder / "sshd.conf")], port, "workspace.log")

    def _serve_ports(self, place: Path) -> None:
        """Do what ``saw-forward.socket`` does: one service for each connection."""
        self.forwarder = listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(place))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    line = [sys.executable, "-m", "saw.cli.main", "sandbox", "forward-serve"]
                    self.servers.append(subprocess.Popen(line, stdin=client, stdout=client))
                    client.close()

        threading.Thread(target=serve, daemon=True).start()

    def _serve(self, options: list[str], port: int, log: str) -> None:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        with (self.directory / log).open("ab") as stderr:
            server = subprocess.Popen([SSHD, "-D", "-e", *options], stderr=stderr, stdin=subprocess.DEVNULL)
        self.servers.append(server)

        def listens() -> bool:
            assert server.poll() is None, (self.directory / log).read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
            return False

        until(listens)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True)


def activate(lab: Lab, name: str) -> int:
    """Make a workspace that counts as attested; return its number."""
    number = int(lab.workspace(name)["number"])
    with beside(lab.config) as store:
        store.execute("UPDATE workspaces SET state = 'active' WHERE id = ?", (name,))
    return number


@contextmanager
def running(lab: Lab, directory: Path, port: int | None = None) -> Iterator[Bastion]:
    """The bastion of ``lab``, with the active workspace ``ws-a`` behind it; ``port`` is one that the lab was told before."""
    bastion = Bastion(lab, directory, port)
    try:
        bastion.start("ws-a", activate(lab, "ws-a"))
        yield bastion
    finally:
        bastion.stop()


class Terminal:
    """A client on a terminal of its own, as somebody in front of a screen has it."""

    def __init__(self, line: list[str], columns: int = 100, rows: int = 30) -> None:
        self._master, slave = pty.openpty()
        self.resize(columns, rows)
        environment = {**os.environ, "TERM": "xterm"}
        environment.pop("SSH_AUTH_SOCK", None)
        # ssh reads the size of its terminal when it is told that it changed, which the kernel tells the foreground only.
        self.process = subprocess.Popen(
            line, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.seen = b""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, wanted: str, wait_s: float = 60) -> None:
        """Read until ``wanted`` was shown."""
        deadline = time.monotonic() + wait_s
        while wanted.encode() not in self.seen:
            readable, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert readable, self.seen
            try:
                piece = os.read(self._master, 65536)
            except OSError:
                piece = b""
            assert piece, self.seen
            self.seen += piece

    def ends(self, wait_s: float = 60) -> int:
        """Read what is left until the client has ended; return its exit code."""
        deadline = time.monotonic() + wait_s
        while True:
            readable, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert readable, self.seen
            try:
                piece = os.read(self._master, 65536)
            except OSError:
                break
            self.seen += piece
        os.close(self._master)
        return self.process.wait(wait_s)
