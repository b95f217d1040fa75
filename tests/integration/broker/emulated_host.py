"""A hypervisor on this machine whose VMs run: real qemu, firmware and virtual TPM, in emulation, mounts and network of their own.

Its images hold no system but a script for the firmware's shell, which says on the console which image it is of and whether this
root disk was started before. In its place the test attests, with a copy of the VM's virtual TPM.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from attest_lab import boot_events, boot_pcrs, release
from broker_rig import Lab, image_record
from driver_host import DriverHost
from swtpm_lab import Machine, SwTpm
from test_broker_attestation import Agent
from worker_rig import until

UNITS = Path(__file__).resolve().parents[1] / "vm_units.py"
#: The installed command. Where there is a pipe with its name, a verb of `saw vm` waits for somebody who writes into that. On a
#: busy machine a VM that says nothing for long is not stuck.
COMMAND = """#!/bin/sh
[ "$1" = vm ] && [ -p {base}/gates/"$2" ] && cat {base}/gates/"$2"
exec {python} -c 'import sys
from saw.cli.main import main
from saw.vm import qemu
qemu.SILENCE = 900.0
sys.exit(main(sys.argv[1:]))' "$@"
"""
SYSTEMCTL = """#!/bin/sh
exec {python} {units} {base}/units "$@"
"""
#: Nothing of this machine's /run is seen or left there, and /sys shows the network of the namespace.
SETTLE = """mount -t tmpfs tmpfs /run
mount -t sysfs sysfs /sys
ip link set lo up
echo ready
exec sleep infinity
"""
GUEST = """@echo -off
fs0:
if exist been.txt then
  echo guest {image} again
else
  echo guest {image} first
  echo x > been.txt
endif
"""


class EmulatedHost(DriverHost):
    """``images`` are registered with the broker of ``lab``, under their names; the officers' root is pinned."""

    def __init__(self, base: Path, lab: Lab, context: Path, images: tuple[str, ...]) -> None:
        told = {"base": base, "python": sys.executable, "units": UNITS}
        super().__init__(base, str(context), command=COMMAND.format(**told), systemctl=SYSTEMCTL.format(**told))
        self.lab = lab
        for folder in ("units", "gates"):
            (base / folder).mkdir()
        pcrs = {str(pcr): value for pcr, value in release(boot_pcrs(boot_events())).items()}
        for image in images:
            lab.register_image(image_record(image, self._make(image), pcrs))
        self.holder = subprocess.Popen(
            [self.enter[0], "--net", *self.enter[1:], "sh", "-ec", SETTLE], stdout=subprocess.PIPE, text=True
        )
        try:
            assert self.holder.stdout is not None
            assert self.holder.stdout.readline() == "ready\n"
            self.enter = ("nsenter", "--target", str(self.holder.pid), "--mount", "--net")
            self.pin_root(images[0])
        except BaseException:
            self.end()
            raise

    def _make(self, image: str) -> str:
        """Make the image file; return its SHA-256."""
        raw, script = self.base / "raw", self.base / "startup.nsh"
        file = self.base / f"state/images/{image}.qcow2"
        script.write_text(GUEST.format(image=image).replace("\n", "\r\n"))
        with raw.open("wb") as stream:
            stream.truncate(48 * 2**20)
        for command in (
            ["mkfs.vfat", "-n", "ESP", str(raw)],
            ["mcopy", "-i", str(raw), str(script), "::/startup.nsh"],
            ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(file)],
        ):
            subprocess.run(command, check=True, capture_output=True)
        raw.unlink()
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def disks(self, workspace: str) -> Path:
        """Where the driver keeps the parts of a VM."""
        return self.base / "state/vms" / workspace

    def says(self, workspace: str, words: str) -> None:
        """Wait until the VM that runs now has said ``words`` on its console."""
        until(lambda: words.encode() in self.console(workspace), f"{workspace} says {words!r}", 600)

    def console(self, workspace: str) -> bytes:
        """What the VM that runs now, or ran last, has said; nothing before its first start."""
        with contextlib.suppress(FileNotFoundError):
            return (self.disks(workspace) / "console.log").read_bytes()
        return b""

    @contextlib.contextmanager
    def gate(self, verb: str) -> Iterator[str]:
        """Have ``saw vm VERB`` wait meanwhile; gives the command line of what waits."""
        gate = self.base / "gates" / verb
        os.mkfifo(gate)
        try:
            yield f"cat {gate} "
        finally:
            gate.unlink()

    def systemctl(self, *words: str) -> int:
        return self.inside(str(self.base / "bin/systemctl"), *words, check=False).returncode

    def main_process(self, workspace: str) -> int | None:
        """The id of the VM unit's main process while it runs."""
        unit = f"saw-vm@{workspace}.service"
        return None if self.systemctl("is-active", unit) else int((self.base / f"units/{unit}.pid").read_text())

    def log(self, workspace: str) -> str:
        """What the VM's unit printed, over all its starts."""
        return (self.base / f"units/saw-vm@{workspace}.service.log").read_text()

    def emulators(self) -> list[str]:
        """The names of the processes on this host that are VMs or virtual TPMs."""
        found, here = [], Path(f"/proc/{self.holder.pid}/ns/net").readlink()
        for process in Path("/proc").iterdir():
            if process.name.isdecimal():
                with contextlib.suppress(OSError):  # gone meanwhile
                    if (process / "ns/net").readlink() == here:
                        found.append((process / "comm").read_text().strip())
        return [name for name in found if name.startswith(("qemu", "swtpm"))]

    def end(self) -> None:
        """End every VM that runs still, and the host."""
        for file in self.base.glob("units/saw-vm@*.pid"):
            self.systemctl("stop", file.name.removesuffix(".pid"))
        self.holder.kill()
        self.holder.wait()
        if self.holder.stdout:
            self.holder.stdout.close()


def endorsement(tpm: Path) -> bytes:
    """The certificate of a virtual TPM's endorsement key."""
    return next(tpm.glob("ek-rsa2048.*")).read_bytes()


class Guest:
    """What attests in the workspace's name, each time with its PCRs as after a boot of a registered image."""

    def __init__(self, host: EmulatedHost, workspace: str, folder: Path) -> None:
        self.host, self.workspace, self.folder = host, workspace, folder
        self._boots = 0
        self.swtpm = SwTpm(folder, host.disks(workspace) / "tpm")

    def attest(self) -> None:
        """Start the TPM anew and show the broker a good quote."""
        self._boots += 1
        self.swtpm.reset()
        machine = Machine(self.swtpm, self.folder / f"boot-{self._boots}")
        digest = self.host.lab.digest
        machine.tpm.extend_policy(digest)
        with self.host.lab.tls() as client:
            agent = Agent(self.host.lab, machine, client, self.workspace)
            _, activated = agent.enrol()
            assert activated.status_code == 200, activated.text
            answer = agent.quote(agent.evidence(agent.nonce(), digest))
            assert answer.status_code == 200, answer.text
