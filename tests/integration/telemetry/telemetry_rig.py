"""One host in a folder: a real journal that the test writes, the service as a process, and what its spool holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saw.audit import ChainedEvent, validate, verify_chain
from saw.telemetry.config import TelemetryConfig, read_config
from saw.telemetry.spool import Spool

BOUND_S = 120.0
REMOTE = "/lib/systemd/systemd-journal-remote"
BOOT = "b" * 32
#: 2026-11-30 00:00 UTC, in microseconds: the first entry's time.
START_US = 1_795_996_800_000_000


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for ``condition`` and return what it says."""
    end = time.monotonic() + BOUND_S
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {BOUND_S:.0f} s: {what}")


class Journal:
    """A journal of real files, written by systemd-journal-remote as if this host's journald had stated its fields."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.count = 0
        self._file = 0

    def rotate(self) -> None:
        """Go on in another file, and forget all earlier ones."""
        self._file += 1
        for old in self.folder.iterdir():
            old.unlink()

    def write(self, entries: Sequence[dict[str, str]], messages: Sequence[bytes] = ()) -> None:
        """Append the entries, each with the next time; the last one has ``messages`` too, as bytes."""
        text = ""
        for entry in entries:
            self.count += 1
            stamp = {
                "__REALTIME_TIMESTAMP": str(START_US + self.count * 1000),
                "__MONOTONIC_TIMESTAMP": str(self.count * 1000),
            }
            fields = {**stamp, "_BOOT_ID": BOOT, "_TRANSPORT": "syslog", "_UID": "0", "_PID": "77", **entry}
            text += "".join(f"{name}={value}\n" for name, value in fields.items()) + "\n"
        done = subprocess.run(
            [REMOTE, f"--output={self.folder}/part{self._file}.journal", "-"],
            input=text.encode()[: -1 if messages else None]
            + b"".join(b"MESSAGE\n" + len(one).to_bytes(8, "little") + one + b"\n" for one in messages)
            + (b"\n" if messages else b""),
            capture_output=True,
            timeout=BOUND_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()

    def sign_ins(self, count: int, first: int = 0) -> list[str]:
        """Append so many sign-ins; return their users."""
        users = [f"user{number}" for number in range(first, first + count)]
        self.write(
            [ssh(f"Accepted publickey for {user} from 10.0.0.9 port 4022 ssh2: ED25519 SHA256:abc") for user in users]
        )
        return users


def ssh(text: str, **more: str) -> dict[str, str]:
    """An entry of sshd."""
    return {
        "SYSLOG_IDENTIFIER": "sshd",
        "_EXE": "/usr/sbin/sshd",
        "_COMM": "sshd",
        "PRIORITY": "6",
        "MESSAGE": text,
        **more,
    }


class Host:
    """The scratch host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = Journal(folder / "journal")
        self.config_file = folder / "telemetry.json"
        self.configure()

    def configure(self, **changes: Any) -> TelemetryConfig:
        """Write the configuration with ``changes``."""
        values: dict[str, Any] = {
            "state_dir": str(self.folder / "state"),
            "run_dir": str(self.folder / "run"),
            "workspace": str(self.folder / "workspace/workspace.json"),
            "journal": str(self.journal.folder),
            "first": "all",
            "host": "host-1",
        }
        self.config_file.write_text(json.dumps({**values, **changes}))
        return read_config(self.config_file)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "saw.cli.main", "telemetry", "--config", str(self.config_file), *words]

    def saw(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run ``saw telemetry`` as people do."""
        return subprocess.run(self.command(*words), capture_output=True, text=True, timeout=BOUND_S, check=False)

    def spool(self) -> Spool:
        config = read_config(self.config_file)
        return Spool(Path(config.state_dir), config.spool_bytes, "host-1")

    def chain(self) -> list[ChainedEvent]:
        """What the spool holds: a chain without a defect, of valid events."""
        if not (self.folder / "state/spool.db").exists():
            return []
        spool = self.spool()
        try:
            found = spool.newest(100_000)
        finally:
            spool.close()
        for one in found:
            validate(one.event)
        return found

    def events(self, class_uid: int) -> list[dict[str, Any]]:
        return [one.event for one in self.chain() if one.event["class_uid"] == class_uid]

    def findings(self, kind: str) -> list[dict[str, Any]]:
        return [one for one in self.events(2004) if one["finding_info"]["types"] == [kind]]

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run the service as its unit does."""
        log = (self.folder / "service.log").open("ab")
        before = self._beaten()
        process = subprocess.Popen(
            self.command("run"), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        log.close()
        try:
            until(lambda: self._beaten() > before or process.poll() is not None, "a sign of life")
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            code = process.wait(BOUND_S)
            assert code in {0, -signal.SIGKILL}, (self.folder / "service.log").read_text()

    def _beaten(self) -> float:
        beat = self.folder / "run/beat.json"
        return float(json.loads(beat.read_text())["time"]) if beat.exists() else 0.0

    @staticmethod
    def kill(process: subprocess.Popen[bytes]) -> None:
        """End the service and its journalctl as a crash of the machine would."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(BOUND_S)


def users_of(chain: Sequence[ChainedEvent]) -> list[str]:
    """Who signed in, in the order of the chain."""
    return [one.event["user"]["name"] for one in chain if one.event["class_uid"] == 3002]


def whole(chain: Sequence[ChainedEvent]) -> bool:
    """Whether the chain is whole from its first event on."""
    return verify_chain(chain).complete
