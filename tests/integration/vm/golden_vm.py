"""Golden images that were built here, signed for owners of a test, and VMs on them as the driver makes them, under emulation."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boot_images
import pytest

from saw.image import secure_boot as image_secure_boot
from saw.image import uefi_keys
from saw.image.finished import GoldenImage, finished_in
from saw.vm import data_disk, qemu, released, secure_boot, spec
from saw.vm.spec import VmSpec

PATIENCE = 3000.0
"""Seconds that a boot may take: software emulation beside other tests."""
WORDS = b" quiet systemd.show_status=no systemd.firstboot=off panic=10"
"""What a golden image's command line ends with."""
PATIENT = b" systemd.firstboot=off systemd.default_timeout_start_sec=900"
"""What a busy machine needs in its place: guests whose services may take long, in as many letters."""
OTHER = PATIENT.replace(b"900", b"901")
"""What another image of the same owner has in place of :data:`PATIENT`, so that it measures something else."""


def built_here(wanted: Callable[[GoldenImage], object] = lambda _: True) -> list[GoldenImage]:
    """Return the ``wanted`` golden images of this checkout, the newest last; none without firmware for secure boot."""
    if any(not path.exists() for path in (secure_boot.FIRMWARE, uefi_keys.FACTORY)):
        return []
    found = (image for image, _ in finished_in(boot_images.ROOT / "build/images") if wanted(image))
    return sorted(found, key=lambda image: image.created)


@dataclass(frozen=True)
class Bench:
    """A golden image's disk as raw bytes in ``place``, where images for owners of the test are made of it."""

    place: Path
    start: dict[str, int]
    """Where the partitions begin, in bytes, by name."""
    program: bytes
    """Its boot program, not signed, with :data:`PATIENT` on the kernel's command line."""

    @property
    def raw(self) -> Path:
        return self.place / "raw"

    def signed(self, program: bytes, owner: str) -> bytes:
        """Return ``program`` signed by the owner of that name, who gets keys and a variable store when first named."""
        keys, uki = self.place / owner, self.place / "uki.efi"
        if not keys.exists():
            uefi_keys.make_keys(keys, owner)
            uefi_keys.enrol(keys / "PK.crt", [keys / "KEK.crt"], [keys / "db.crt"], self.place / f"{owner}.fd")
        uki.write_bytes(program)
        image_secure_boot.sign(uki, keys / "db.key", keys / "db.crt")
        return uki.read_bytes()

    def image(self, name: str, signed: bytes, owner: str) -> Path:
        """Write the disk with the boot program ``signed``, and the owner's store beside it; return the disk (qcow2)."""
        folder, uki = self.place / name, self.place / "uki.efi"
        folder.mkdir()
        uki.write_bytes(signed)
        boot_images.run("mcopy", "-o", "-i", f"{self.raw}@@{self.start['esp']}", str(uki), "::/EFI/BOOT/BOOTX64.EFI")
        boot_images.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(self.raw), str(folder / "image.qcow2"))
        shutil.copyfile(self.place / f"{owner}.fd", folder / secure_boot.TEMPLATE)
        return folder / "image.qcow2"


@contextmanager
def bench(image: GoldenImage, place: Path) -> Iterator[Bench]:
    """Take the disk of ``image`` apart in ``place``; all that was made there goes at the end."""
    raw, uki = place / "raw", place / "uki.efi"
    boot_images.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image.image, str(raw))
    table = json.loads(boot_images.run("sfdisk", "-J", str(raw)))["partitiontable"]["partitions"]
    start = {str(one["name"]): int(one["start"]) * 512 for one in table}
    boot_images.run("mcopy", "-i", f"{raw}@@{start['esp']}", "::/EFI/BOOT/BOOTX64.EFI", str(uki))
    program = uki.read_bytes()
    assert program.count(WORDS) == 1, "the test changes these words of the command line"
    yield Bench(place, start, program.replace(WORDS, PATIENT))
    shutil.rmtree(place)


@contextmanager
def driver(place: Path) -> Iterator[None]:
    """Let the driver keep its VMs in ``place`` and ask for no release records."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (spec, qemu, data_disk):
            patch.setattr(module, "STATE", place / "lib/vms")
        (place / "hypervisor.json").write_text('{"image_records": "unchecked"}')
        patch.setattr(released, "SETTINGS", place / "hypervisor.json")
        runtime = Path(f"/tmp/saw-{hashlib.sha256(str(place).encode()).hexdigest()[:12]}")
        patch.setattr(spec, "RUNTIME", runtime)
        yield
        shutil.rmtree(runtime, ignore_errors=True)


def blank(image: Path, **more: object) -> VmSpec:
    """Return what a VM on ``image`` is told, without a network; ``more`` is what else it is told."""
    told: dict[str, object] = {"memory_mib": 1024, "cpus": 2, "data_disk_mib": 256, **more}
    return VmSpec(
        id="ws-t", number=9, image=str(image), image_sha256=hashlib.sha256(image.read_bytes()).hexdigest(),
        network=False, accel="tcg", **told,
    )  # fmt: skip


def boot(vm: VmSpec, until: Callable[[str], object], off: Callable[[str], object] = lambda _: False) -> str:
    """Make the VM, or rebuild it onto its image, start it, and return its console once that satisfies ``until`` or the VM ended.

    Where the console satisfies ``off``, the VM is let go off by itself. It goes on with a root disk that lies on this image
    already.
    """
    qemu.create(vm)
    qemu.startable(vm)
    vm.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    sock, console = vm.runtime / "tpm.sock", vm.directory / "console.log"
    sock.unlink(missing_ok=True)
    console.unlink(missing_ok=True)
    state = f"dir={vm.directory}/tpm"
    tpm = subprocess.Popen(["swtpm", "socket", "--tpm2", "--tpmstate", state, "--ctrl", f"type=unixio,path={sock}"])
    machine = None
    try:
        wait(lambda: sock.exists() or tpm.poll() is not None)
        machine = subprocess.Popen(qemu.command_line(vm, "tcg"), stdin=subprocess.DEVNULL)
        wait(lambda: said(console) or machine.poll() is not None)
        data_disk.started(vm)  # as qemu.execute does
        wait(lambda: until(said(console)) or machine.poll() is not None)
        if off(said(console)):
            machine.wait(PATIENCE)
    finally:
        for process in filter(None, (machine, tpm)):
            process.kill()
            process.wait(60)
    return said(console)


def said(console: Path) -> str:
    """What the VM has printed so far."""
    return console.read_bytes().decode("utf-8", "replace").replace("\r", "") if console.exists() else ""


def wait(ready: Callable[[], object]) -> None:
    """Wait for ``ready`` as long as a boot may take."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline, "that took longer than any boot should"
        time.sleep(0.2)
