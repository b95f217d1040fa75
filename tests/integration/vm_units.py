"""A service manager for the two units of a VM alone: it starts and ends what the templates of the role hypervisor say.

    python vm_units.py FOLDER VERB UNIT …

A unit runs as long as its main process holds the unit's lock in FOLDER. It is started in a session of its own and with nothing of
the caller's environment, as by systemd, so it is no part of the job that asked for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

TEMPLATES = Path(__file__).resolve().parents[2] / "roles/hypervisor/templates"
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
PATIENCE_S = 60.0


class Unit:
    """One instance, such as ``saw-vm@ws-1.service``."""

    def __init__(self, folder: Path, name: str) -> None:
        kind, _, instance = name.removesuffix(".service").partition("@")
        self.folder, self.name = folder, name
        self.instance = instance
        self._text = (TEMPLATES / f"{kind}@.service.j2").read_text().replace("%i", instance)
        self._lock, self._pid = folder / f"{name}.lock", folder / f"{name}.pid"

    def said(self, key: str) -> list[str]:
        """The values of a setting, which has its own line."""
        return re.findall(rf"^{key}=(.+)$", self._text, re.MULTILINE)

    def active(self) -> bool:
        with self._lock.open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def start(self) -> None:
        for name in self.said("BindsTo"):
            Unit(self.folder, name).start()
        if self.active():
            return
        (runtime,) = self.said("RuntimeDirectory")
        Path("/run", runtime).mkdir(mode=0o700, parents=True, exist_ok=True)
        for command in self.said("ExecStartPre"):
            subprocess.run(shlex.split(command), check=True, env=ENVIRONMENT)
        (command,) = self.said("ExecStart")
        with self._lock.open("a") as lock, (self.folder / f"{self.name}.log").open("ab") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)
            process = subprocess.Popen(
                shlex.split(command), env=ENVIRONMENT, cwd="/", start_new_session=True, pass_fds=[lock.fileno()],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self._pid.write_text(str(process.pid))
        for command in self.said("ExecStartPost"):
            subprocess.run(shlex.split(command), check=True, env=ENVIRONMENT)

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self.active():
                break
            with contextlib.suppress(ProcessLookupError):  # ended since
                os.kill(int(self._pid.read_text()), number)
            deadline = time.monotonic() + PATIENCE_S
            while self.active() and time.monotonic() < deadline:
                time.sleep(0.1)
        for other in TEMPLATES.glob("saw-*@.service.j2"):
            part = Unit(self.folder, other.name.removesuffix(".j2").replace("@.", f"@{self.instance}."))
            if self.name in part.said("PartOf"):
                part.stop()


def main(folder: str, verb: str, *words: str) -> int:
    """Do what systemctl does for this verb."""
    for name in (word for word in words if not word.startswith("-")):
        unit = Unit(Path(folder), name)
        if verb == "is-active" and not unit.active():
            return 3
        if verb in {"start", "stop"}:
            getattr(unit, verb)()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
