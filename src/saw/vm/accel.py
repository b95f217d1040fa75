"""Find out whether KVM truly works here: a device node that opens proves nothing, a kernel that prints a line does."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import msgspec

from saw import jsontext
from saw.files import write_atomic
from saw.vm.spec import VmError

SLOWER = "software emulation runs the machine's programs about five times slower"
"""Measured: docs/performance.md, "From boot to attested"."""
NESTED = (
    "turn virtualisation on in the firmware and load kvm_intel or kvm_amd; on a virtual machine let its host pass "
    "virtualisation on (kvm_intel.nested=1 or kvm_amd.nested=1); or run on hardware"
)


class Acceleration(msgspec.Struct, frozen=True):
    """The accelerator to use, why, and what would make it faster (empty for KVM)."""

    name: str
    reason: str
    cure: str = ""


def emulation(why: str, cure: str = NESTED) -> Acceleration:
    """Return software emulation with the reason ``why`` KVM is not used and the ``cure``."""
    return Acceleration("tcg", f"{why}: software emulation", f"{SLOWER}; for KVM {cure}")


def boot_id() -> str:
    """Return the kernel's boot id: a probe's answer holds for one boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def probe(kernel: Path, cache: Path, *, patience: float = 20.0) -> Acceleration:
    """Boot ``kernel`` under KVM for at most ``patience`` seconds and look for its first line on the serial port.

    The answer is cached for this boot of the machine in ``cache``. Raises :class:`VmError` when qemu is missing.
    """
    try:
        known = jsontext.decode(cache.read_bytes(), kind=dict[str, str])
        if known["boot_id"] == boot_id():
            return Acceleration(known["name"], known["reason"], known["cure"])
    except (OSError, msgspec.DecodeError, KeyError):
        pass
    found = try_kvm(kernel, patience)
    if not kernel.exists():
        return found  # says nothing about this machine: the next image may bring a kernel
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(cache, msgspec.json.encode({"boot_id": boot_id(), **msgspec.structs.asdict(found)}))
    return found


def try_kvm(kernel: Path, patience: float) -> Acceleration:
    """The probe itself, without the cache."""
    if not Path("/dev/kvm").exists():
        return emulation("/dev/kvm is missing", f"{NESTED}; give a container the device /dev/kvm")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return emulation(
            "/dev/kvm may not be read and written by this user", "give the user, or the container, the device"
        )
    if not kernel.exists():
        return emulation(f"no kernel to probe KVM with at {kernel}", "build the image again")
    with tempfile.TemporaryDirectory(prefix="saw-kvm-") as scratch:
        console = Path(scratch, "console")
        console.touch()
        command = [
            "qemu-system-x86_64", "-machine", "q35,accel=kvm", "-cpu", "host", "-m", "256", "-display", "none", "-nodefaults",
            "-no-reboot", "-serial", f"file:{console}", "-kernel", str(kernel),
            "-append", "console=ttyS0 earlyprintk=serial panic=-1",
        ]  # fmt: skip
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except FileNotFoundError as error:
            raise VmError(f"{command[0]} is not installed", cure="run the hypervisor role on this host") from error
        try:
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                if b"Linux version" in console.read_bytes():
                    return Acceleration("kvm", "a kernel booted under KVM")
                if child.poll() is not None:
                    return emulation(f"/dev/kvm is there, but qemu under KVM ended with {child.returncode}")
                time.sleep(0.1)
        finally:
            child.kill()
            child.wait()
    return emulation(f"/dev/kvm opens, but a kernel printed nothing within {patience:.0f} s")
