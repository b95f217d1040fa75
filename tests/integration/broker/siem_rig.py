"""The far end of the audit trail: Debian's rsyslog as docs/audit.md sets it up, with own certificates; and the forwarder."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from broker_rig import cli_here
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from saw.audit import ChainedEvent
from saw.audit.syslog import parse

ROOT = Path(__file__).resolve().parents[3]
RSYSLOGD = shutil.which("rsyslogd", path="/usr/sbin:/usr/bin:/sbin") or "rsyslogd is missing: run scripts/bootstrap.sh"
SERVER, CLIENT = "siem.example.com", "control.example.com"
BOUND_S = 120


def until(reached: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    """Wait until ``reached``; fail when ``process`` ends or two minutes have passed."""
    deadline = time.monotonic() + BOUND_S
    while not reached():
        assert time.monotonic() < deadline, what
        try:
            process.wait(timeout=0.02)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"{what}: the process ended with {process.returncode}")


class Certificates:
    """An authority and certificates by it, as PEM files in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {folder.name}")])
        self._write("ca", self._certificate(self._name, self._key, None), self._key)

    def issue(self, name: str) -> tuple[Path, Path]:
        """Return certificate and key for ``name``."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        return self._write(name, self._certificate(subject, key, name), key)

    def _certificate(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, name: str | None) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=name is None, path_length=None), critical=True)
        if name is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
        files = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
        return files


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Siem:
    """One rsyslog with the page's configuration, plus an input without TLS on ``plain_port``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.certificates = Certificates(folder / "saw")
        certificate, key = self.certificates.issue(SERVER)
        certificate.rename(folder / "saw/server.pem")
        key.rename(folder / "saw/server.key")
        self.client = self.certificates.issue(CLIENT)
        self.port, self.plain_port = free_port(), free_port()
        self.file = folder / "audit.log"
        page = (ROOT / "docs/audit.md").read_text(encoding="utf-8")
        [text] = re.findall(r"^```rsyslog\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        for shown, here in (
            ("/etc/rsyslog.d/saw", str(folder / "saw")),
            ("/var/log/saw/audit.log", str(self.file)),
            ('port="20514"', f'port="{self.port}"'),
        ):
            assert shown in text
            text = text.replace(shown, here)
        text += f'input(type="imrelp" port="{self.plain_port}" ruleset="saw")\n'
        (folder / "rsyslog.conf").write_text(f'global(workDirectory="{folder}")\n{text}')
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens."""
        arguments = [RSYSLOGD, "-n", "-f", str(self.folder / "rsyslog.conf"), "-i", str(self.folder / "rsyslog.pid")]
        with (self.folder / "rsyslog.log").open("ab") as log:
            self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(lambda: listens(self.port), self.process, "rsyslog does not listen")

    def kill(self) -> None:
        """End it as a crash would (SIGKILL)."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def lines(self) -> list[str]:
        """The whole lines of its file."""
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        return text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]

    def events(self) -> list[ChainedEvent]:
        """What it has, in the order in which it came."""
        return [parse(line) for line in self.lines()]

    def settings(self, lab: Any, state: Path, **receiver: Any) -> dict[str, Any]:
        """The configuration of a forwarder to it."""
        given = {"host": "127.0.0.1", "port": self.port, "name": SERVER, "ca_file": str(self.folder / "saw/ca.pem")}
        given |= {"certificate_file": str(self.client[0]), "key_file": str(self.client[1]), "timeout_s": 10}
        return {"socket": lab.config.audit_socket, "state_dir": str(state), "receiver": {**given, **receiver}}


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Forwarder:
    """``saw audit ship`` as a process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.state = Path(settings["state_dir"])
        self.state.mkdir(exist_ok=True)
        self.config = self.state.with_suffix(".json")
        self.config.write_text(json.dumps(settings))
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *more: str) -> list[str]:
        return [sys.executable, "-m", "saw.cli.main", "audit", "ship", "--config", str(self.config), *more]

    def start(self) -> None:
        with self.state.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(15)
            self.process = None

    def cursor(self) -> dict[str, Any]:
        file = self.state / "cursor.json"
        return dict(json.loads(file.read_text())) if file.exists() else {"position": 0}

    def health(self) -> dict[str, Any]:
        file = self.state / "health.json"
        return dict(json.loads(file.read_text())) if file.exists() else {"state": "never_ran", "error": None}

    def until(self, reached: Callable[[], bool], what: str) -> None:
        assert self.process is not None
        until(reached, self.process, what)

    def status(self) -> tuple[int, dict[str, Any]]:
        """Exit code and answer of ``saw audit ship --status --json``."""
        done = cli_here(*self.command("--status", "--json")[3:])
        return done.returncode, json.loads(done.stdout)
