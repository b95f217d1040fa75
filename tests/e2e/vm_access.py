"""Ways into a running workspace for tests: as the agent (``saw ssh``), and as root through an implant on the stopped disk.

The product offers no root in the VM. The implant is what an attacker who got root would leave: a unit that runs scripts
it finds in the agent's home. It is written into the stopped VM's root file system with debugfs, so that the boot itself,
and with it every measurement, stays what it was.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_shell import AgentShell, SessionGone

UNIT = """[Unit]
Description=implant
After=home.mount
[Service]
ExecStart=/bin/sh -c 'cd /home/agent; mkdir -p .implant; chown agent: .implant; while :; do \
for f in .implant/*.sh; do [ -e "$$f" ] || continue; n=$${f%%.sh}; sh "$$f" >$$n.tmp 2>&1; echo "rc=$$?" >>$$n.tmp; \
rm -f "$$f"; chmod 644 $$n.tmp; mv $$n.tmp $$n.out; done; sleep 0.3; done'
[Install]
WantedBy=multi-user.target
"""

PLACES = {
    "/etc/kept-by-attacker": "plain file",
    "/usr/local/bin/kept-by-attacker": "program",
    "/root/kept-by-attacker": "root's home",
    "/var/lib/kept-by-attacker": "state",
    "/opt/saw/kept-by-attacker": "our own runtime",
    "/etc/systemd/system/implant.service": "the implant's unit",
}
"""Where the attacker leaves something on the root disk."""

SHELLS: dict[str, AgentShell] = {}
"""The agent's session of each workspace, as long as it lasts."""


@dataclass
class Workspace:
    """The workspace ``id`` of the lab in ``checkout``."""

    checkout: Path
    id: str
    number: int
    svid: str = "/run/saw/svid"

    @property
    def folder(self) -> str:
        """Where the hypervisor keeps the VM."""
        return f"/var/lib/saw/vms/{self.id}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the ``saw`` command."""
        return {**os.environ, "SAW_CONTEXT": str(self.checkout / "build/lab/context.json")}

    def saw(
        self, *argv: str, check: bool = True, timeout: float = 300, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run the clone's ``saw``."""
        if argv[0] == "lab":  # the machine stops, starts or ends
            self.leave()
        done = subprocess.run(
            [str(self.checkout / ".venv/bin/saw"), *argv], cwd=self.checkout, env=self.environment, input=stdin,
            capture_output=True, text=True, errors="replace", timeout=timeout, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(
                f"saw {' '.join(argv)}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
        return done

    def show(self) -> dict[str, Any]:
        """What the broker holds."""
        return dict(json.loads(self.saw("workspace", "show", self.id, "--json").stdout))

    def sessions(self, *options: str) -> list[dict[str, Any]]:
        """The sessions with the workspace, the newest first."""
        return list(json.loads(self.saw("sessions", "--workspace", self.id, *options, "--json").stdout)["sessions"])

    def events(self, source: str = "broker", after: int = 0) -> list[dict[str, Any]]:
        """The audit chain of ``source`` (``broker``, or ``edge`` for the perimeter) behind sequence number ``after``."""
        answer = self.saw("audit", "export", "--source", source, "--after", str(after)).stdout
        return [json.loads(line) for line in answer.splitlines()]

    def last_seq(self, source: str = "broker") -> int:
        """The sequence number of the newest event of ``source``: what comes behind it happened afterwards."""
        chains = json.loads(self.saw("audit", "verify", "--json").stdout)["chains"]
        return next(int(chain["events"]) for chain in chains if chain["source"] == source)

    def agent(self, command: str, *, timeout: float = 300, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a shell command in the sandbox, in a session that is kept for the next one; 255 when there is none, as ssh says."""
        shell = SHELLS.get(self.id)
        if shell is None or not shell.answers(15):
            self.leave()
            argv = [str(self.checkout / ".venv/bin/saw"), "ssh", self.id, "--", "sh"]
            shell = SHELLS[self.id] = AgentShell(argv, self.environment)
        try:
            return shell.run(command, stdin, timeout)
        except SessionGone:
            return subprocess.CompletedProcess(command, 255, "", self.leave())
        except subprocess.TimeoutExpired:
            self.leave()
            raise

    def leave(self) -> str:
        """End the kept session, if there is one; return what it said on standard error."""
        shell = SHELLS.pop(self.id, None)
        return shell.close() if shell else ""

    def call(self, url: str = "https://api.example.com/v1/items", *options: str) -> tuple[int, dict[str, Any]]:
        """A governed call with curl in the sandbox: HTTP status and JSON body (empty when it is none)."""
        words = " ".join(
            shlex.quote(word) for word in ("curl", "-s", "-m", "20", "-w", "\\n%{http_code}", *options, url)
        )
        text, _, status = self.agent(words).stdout.strip().rpartition("\n")
        try:
            body = json.loads(text)
        except ValueError:
            body = {}
        return int(status or 0), body

    def direct(
        self,
        path: str = "/v1/items",
        *,
        host: str = "api.example.com",
        binary: str = "/usr/bin/curl",
        options: str = "",
    ) -> str:
        """Shell command for root in the VM: a call straight to ring 2 with the workspace's own identity, past ring 1."""
        return (
            f"curl -s -m 15 --cert {self.svid}/svid.pem --key {self.svid}/key.pem --cacert /run/saw/ca.pem "
            f"--resolve ring2.saw.internal:8443:10.210.{self.number}.1 -H 'Host: {host}' -H 'x-saw-scheme: https' "
            f"-H 'x-saw-port: 443' -H 'x-saw-binary: {binary}' -H 'x-saw-ring1: allow' "
            f"{options} -w '\\n%{{http_code}}' 'https://ring2.saw.internal:8443{path}'"
        )

    def counters(self) -> dict[str, int]:
        """What the perimeter host counted: nft's counters of table ``inet saw``, and the kernel's for the VM's link."""
        script = f"""
nft -j list counters table inet saw
cat /sys/class/net/sawtap{self.number}/statistics/rx_packets
cat /proc/net/netstat /proc/net/snmp
"""
        rules, received, *kernel = self.host("edge", script).strip().splitlines()
        counted = {
            item["counter"]["name"]: int(item["counter"]["packets"])
            for item in json.loads(rules)["nftables"]
            if "counter" in item
        }
        for names, values in zip(kernel[::2], kernel[1::2], strict=True):
            head, *rest = names.split()
            counted |= {f"{head}{name}": int(value) for name, value in zip(rest, values.split()[1:], strict=True)}
        return {**counted, "received": int(received)}

    def host(self, name: str, script: str, *, stdin: str = "", timeout: float = 300) -> str:
        """Run a shell script on a light host as root."""
        lab = self.checkout / "build/lab"
        address = {"control": "10.77.0.10", "edge": "10.77.0.20", "enterprise": "10.77.0.30"}[name]
        done = subprocess.run(
            ["ssh", "-i", str(lab / "ssh/controller"), "-o", f"UserKnownHostsFile={lab}/ssh/known_hosts", "-o", "BatchMode=yes",
             f"root@{address}", "sh", "-ec", shlex.quote(script)],
            input=stdin, capture_output=True, text=True, errors="replace", timeout=timeout, check=False,
        )  # fmt: skip
        if done.returncode:
            raise AssertionError(f"on {name}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return done.stdout

    def secrets(self) -> list[str]:
        """The real credentials that the perimeter injects."""
        return [path.read_text(encoding="ascii") for path in sorted((self.checkout / "build/lab/secrets").iterdir())]

    def open_root_disk(self) -> str:
        """Shell lines: in the VM's folder, make ``root.raw`` from its root disk; ``$offset`` is where the file system begins."""
        second_partition = "f.seek(1024 + 128 + 32); print(struct.unpack('<Q', f.read(8))[0] * 512)"
        return (
            f"cd {self.folder}\nqemu-img convert -O raw root.qcow2 root.raw\n"
            f"offset=$(python3 -c \"import struct; f = open('root.raw', 'rb'); {second_partition}\")"
        )

    def implant(self) -> None:
        """Write the implant into the stopped VM's root file system."""
        script = f"""
{self.open_root_disk()}
cat > /run/implant.service
cat > /run/implant.debugfs <<'END'
cd /etc/systemd/system
rm implant.service
write /run/implant.service implant.service
cd multi-user.target.wants
rm implant.service
symlink implant.service /etc/systemd/system/implant.service
END
debugfs -w -f /run/implant.debugfs "root.raw?offset=$offset"
qemu-img convert -O qcow2 root.raw root.qcow2.new
mv root.qcow2.new root.qcow2
rm root.raw
"""
        self.host("edge", script, stdin=UNIT)

    def home_file(self, path: str) -> str:
        """Read a file of the stopped VM's data disk; ``path`` is relative to /home."""
        return self.host(
            "edge", f"{self.settle_data_disk()}; debugfs -R 'cat {path}' {self.folder}/data.img 2>/dev/null"
        )

    def settle_data_disk(self) -> str:
        """Shell command: replay the journal of the stopped VM's data disk, as its next boot would (after a hard end)."""
        return f"e2fsck -p {self.folder}/data.img >/dev/null || [ $? -le 2 ]"

    def leave_script(self, name: str, script: str) -> None:
        """Put a script where the implant of the stopped VM finds and runs it at the next boot."""
        folder = "cd agent/.implant"
        self.host(
            "edge",
            f"{self.settle_data_disk()}; cat > /run/left.sh; printf '{folder}\\nwrite /run/left.sh {name}.sh\\n' | "
            f"debugfs -w -f - {self.folder}/data.img; rm /run/left.sh",
            stdin=script,
        )

    def root_python(self, program: str, *arguments: str, timeout: float = 240) -> str:
        """Run a Python program as root in the VM and return its output; fail the test when it fails."""
        words = " ".join(shlex.quote(word) for word in arguments)
        code, text = self.root(f"python3 - {words} <<'END_OF_PROGRAM'\n{program}\nEND_OF_PROGRAM\n", timeout=timeout)
        assert code == 0, text
        return text

    def root(self, script: str, *, timeout: float = 240) -> tuple[int, str]:
        """Run ``script`` as root in the VM through the implant; return its exit code and output."""
        name = f"/home/agent/.implant/{uuid.uuid4().hex}"
        command = (
            f"cat > {name}.part && mv {name}.part {name}.sh && "
            f"for i in $(seq {int(timeout * 3)}); do "
            f"if [ -e {name}.out ]; then cat {name}.out; exit 0; fi; sleep 0.3; done; exit 9"
        )
        done = self.agent(command, timeout=timeout + 60, stdin=script)
        if done.returncode:
            raise AssertionError(f"the implant gave no answer: {done.returncode} {done.stderr[-800:]}")
        text, _, code = done.stdout.rpartition("rc=")
        return int(code), text


def facts(event: dict[str, Any]) -> dict[str, Any]:
    """What the product itself noted in a chained event, beside the fields of OCSF."""
    return dict(event["event"].get("unmapped", {}).get("saw", {}))


def wait_until(what: str, condition: Callable[[], Any], *, patience: float, interval: float = 1.0) -> Any:
    """Return the first true value of ``condition()``; fail the test after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {patience:.0f} s")
        time.sleep(interval)
