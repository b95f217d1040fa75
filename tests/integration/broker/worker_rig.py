"""A real worker of a real broker, with an inventory and playbooks of its own: small ones, on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broker_rig import Lab

from saw.jobs.processes import JOB_MARK, marked

SECRET = "correct-horse-battery"

#: Every kind begins like this: what it was told is written down.
HEAD = """\
- name: {name}
  hosts: hypervisors
  gather_facts: false
  tasks:
    - name: Take its lease away
      ansible.builtin.copy:
        content: "{{{{ workspace_id }}}}: {{{{ workspace_reason | default('-') }}}}"
        dest: "{base}/told-{kind}"
"""
TASKS = {
    "stop": """\
    - name: Use a secret
      ansible.builtin.command: {{argv: [echo, "{secret}"]}}
      changed_when: true
      no_log: true
    - name: Look for the power switch
      ansible.builtin.command: {{argv: [cat, "{base}/switch"]}}
      changed_when: false
""",
    # As long as the pipe is there, this waits for somebody who writes into it.
    "rebuild": """\
    - name: Wait at the gate
      ansible.builtin.command:
        argv: [cat, "{base}/gate"]
        removes: "{base}/gate"
""",
}


def until(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """Return the first true result of ``condition``; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds} s: {what}")


def commands(job: str) -> list[str]:
    """The command lines of every process of a job."""
    found = []
    for pid in marked(JOB_MARK, job):
        try:
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " "))
        except OSError:
            continue
    return found


class WorkerRig:
    """One worker at a time, and the folder that its playbooks write to."""

    def __init__(self, lab: Lab, base: Path) -> None:
        self.lab, self.base = lab, base
        playbooks = base / "playbooks"
        playbooks.mkdir()
        for kind in ("create", "start", "stop", "rebuild", "destroy", "kill"):
            text = HEAD.format(name=f"{kind.title()} a workspace", kind=kind, base=base)
            (playbooks / f"workspace_{kind}.yml").write_text(
                text + TASKS.get(kind, "").format(base=base, secret=SECRET)
            )
        inventory = base / "inventory"
        inventory.mkdir()
        (inventory / "hosts.yml").write_text(
            json.dumps({"hypervisors": {"hosts": {"edge": {
                "ansible_connection": "local", "ansible_python_interpreter": sys.executable,
            }}}})
        )  # fmt: skip
        self.context = base / "context.json"
        self.context.write_text(json.dumps({"broker": {"socket": lab.config.operator_socket}}))
        self.config = base / "worker.json"
        self.process: subprocess.Popen[bytes] | None = None
        self.enter: tuple[str, ...] = ()
        """What stands before the worker's command, for one on a host of its own; ``environment`` is what it has there."""
        self.environment: dict[str, str] = {**os.environ}
        self.configure(ansible={"inventory": str(inventory), "playbooks": str(playbooks)})

    def configure(self, **executor: Any) -> None:
        """Have the worker run jobs another way from its next start on."""
        assert self.lab.config.jobs is not None
        socket = self.lab.config.jobs.worker_socket
        told = {"state_dir": str(self.base / "state"), "broker_socket": socket, "slots": 1, **executor}
        self.config.write_text(json.dumps(told))

    def start(self) -> None:
        command = [*self.enter, sys.executable, "-m", "saw.cli.main", "worker", "serve", "--config", str(self.config)]
        log = (self.base / "worker.log").open("ab")
        self.process = subprocess.Popen(command, stderr=log, env=self.environment)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(60)
        self.process = None
        return code

    def log(self) -> str:
        return (self.base / "worker.log").read_text()

    def state(self, job: str) -> str:
        return str(self.job(job)["state"])

    def job(self, job: str) -> dict[str, Any]:
        return dict(self.lab.operator.request("GET", f"/v1/jobs/{job}"))

    def ask(self, kind: str, workspace: str, **parameters: Any) -> str:
        body = {"kind": kind, "workspace": workspace, "parameters": parameters}
        body["idempotency_key"] = os.urandom(8).hex()
        return str(self.lab.operator.request("POST", "/v1/jobs", body)["id"])

    def ended(self, job: str) -> dict[str, Any]:
        """The job once it has ended."""

        def over() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log()
            return self.state(job) not in {"queued", "running"}

        until(over, f"{job} ends: {self.log()}")
        return self.job(job)
