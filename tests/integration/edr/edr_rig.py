"""One host in a folder: its files are a scratch tree, its processes and programs are the machine's own."""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from saw.audit import validate
from saw.edr.config import EdrConfig, read_config
from saw.edr.forward import kind_of
from saw.edr.store import Found, Store

#: The standard test file of the anti-malware industry, in two pieces so that no scanner takes this file for it.
EICAR = b"X5O!P%@AP[4\\PZX54(P^)7CC)7}" + b"$EICAR-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*"
BOUND_S = 60.0


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for ``condition`` and return what it says."""
    end = time.monotonic() + BOUND_S
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {BOUND_S:.0f} s: {what}")


class LogSocket:
    """The host's log: what arrives on a Unix datagram socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self._lines: list[str] = []

    def lines(self) -> list[str]:
        """All lines so far."""
        while True:
            try:
                self._lines.append(self._socket.recv(1 << 20).decode())
            except BlockingIOError:
                return self._lines

    def close(self) -> None:
        self._socket.close()


class Host:
    """The scratch host; ``root`` is its tree."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.folder = folder
        for name in ("etc/systemd/system", "etc/cron.d", "etc/audit/rules.d", "usr/bin", "home/ann", "tmp"):
            (self.root / name).mkdir(parents=True)
        (self.root / "usr/bin/tool").write_bytes(Path("/bin/true").read_bytes())
        (self.root / "usr/bin/tool").chmod(0o755)
        (self.root / "usr/bin/known-setuid").write_bytes(b"#!")
        (self.root / "usr/bin/known-setuid").chmod(0o4755)
        (self.root / "etc/systemd/system/known.service").write_text("[Service]\nExecStart=/bin/true\n")
        (self.root / "etc/audit/rules.d/saw.rules").write_text("-w /etc/passwd -p wa\n")
        (self.root / "etc/audit/auditd.conf").write_text("log_file = /var/log/audit/audit.log\n")
        database = folder / "signatures"
        database.mkdir()
        digest = hashlib.md5(EICAR, usedforsecurity=False).hexdigest()
        (database / "test.hdb").write_text(f"{digest}:{len(EICAR)}:Test.Eicar\n")
        self.aide_config = folder / "aide.conf"
        self.aide_config.write_text(f"{self.root}/usr/bin p+u+g+ftype+sha256\n")
        self.config_file = folder / "edr.json"
        self.log = LogSocket(folder / "log")
        self.configure()

    def configure(self, **changes: Any) -> EdrConfig:
        """Write the configuration with ``changes``."""
        root = self.root
        values: dict[str, Any] = {
            "state_dir": str(self.folder / "state"),
            "run_dir": str(self.folder / "run"),
            "workspace": str(self.folder / "workspace/workspace.json"),
            "syslog": str(self.folder / "log"),
            "shells_s": 0.1,
            "watch_s": 0.1,
            "setuid_s": 0.1,
            "persistence": [f"{root}/etc/systemd/system", f"{root}/etc/cron.*", f"{root}/home/*/.config/systemd/user"],
            "protected": [f"{root}/etc/audit"],
            "setuid_roots": [str(root)],
            "malware": {"paths": [f"{root}/home", f"{root}/tmp"], "database": str(self.folder / "signatures")},
            "integrity": {"config": str(self.aide_config), "database": str(self.folder / "integrity/aide.db")},
        }
        self.config_file.write_text(json.dumps({**values, **changes}))
        return read_config(self.config_file)

    @property
    def config(self) -> EdrConfig:
        return read_config(self.config_file)

    def saw(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run ``saw edr`` as people do."""
        command = [sys.executable, "-m", "saw.cli.main", "edr", "--config", str(self.config_file), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False)

    def found(self, kind: str = "") -> list[Found]:
        """Findings in the spool, each checked against OCSF."""
        store = Store(self.config.state, self.config.spool_limit)
        try:
            found = store.newest()
        finally:
            store.close()
        for one in found:
            validate(one.event)
            assert one.event["class_uid"] == 2004
        return [one for one in found if not kind or kind_of(one.event) == kind]

    def subjects(self, kind: str) -> list[str]:
        """What findings of a kind are about, relative to the tree."""
        told = [one.event["unmapped"]["saw"]["subject"] for one in self.found(kind)]
        return [name.removeprefix(str(self.root)) for name in told]

    def beats(self) -> float:
        """The time of the watcher's newest sign of life."""
        try:
            return float(msgspec.json.decode(self.config.beat.read_bytes())["time"])
        except FileNotFoundError:
            return 0.0

    def looked_again(self) -> None:
        """Wait until the watcher has begun and ended another look of each kind."""
        before = self._looks()
        until(lambda: all(count > before[name] + 1 for name, count in self._looks().items()), "a look of the watcher")

    def _looks(self) -> dict[str, int]:
        return dict(msgspec.json.decode(self.config.beat.read_bytes())["looks"])

    @contextmanager
    def watching(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run the watcher as its unit does; it is ready when it has looked at everything once."""
        command = [sys.executable, "-m", "saw.cli.main", "edr", "--config", str(self.config_file), "watch"]
        with (self.folder / "watcher.log").open("ab") as log:
            before = self.beats()
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            until(lambda: self.beats() > before or process.poll() is not None, "the watcher")
            assert process.poll() is None, (self.folder / "watcher.log").read_text()
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            assert process.wait(BOUND_S) in {0, -signal.SIGKILL}, (self.folder / "watcher.log").read_text()

    def close(self) -> None:
        self.log.close()
