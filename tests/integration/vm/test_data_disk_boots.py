"""A golden image encrypts its blank data disk and opens it with its TPM's key: real firmware, kernel and TPM, emulated.

The image that was built here is signed for an owner of this test, once as it is and once as "another image" of the same owner
(its command line says something else, so PCR 4 and 11 differ), and once for another owner. A boot ends as soon as /home is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from saw.datadisk import luks2, recovery
from saw.vm import data_disk
from saw.vm.spec import VmSpec

sys.path.insert(0, str(Path(__file__).resolve().parent))
import boot_images
import golden_vm
from golden_vm import OTHER, PATIENT

IMAGES = golden_vm.built_here()
pytestmark = pytest.mark.skipif(
    not IMAGES, reason="no golden image was built here (make image), or the package ovmf (with secboot) is missing"
)
REPORT = """\
[Unit]
Description=Report what became of the data disk, and go off
DefaultDependencies=no
RequiresMountsFor=/home
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
Type=oneshot
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
ExecStart=-/bin/sh /run/credentials/@system/disk.script
"""
SCRIPT = r"""
say() { echo "DISK $1=$(eval "$2" 2>&1 | tr '\n' ' ')"; }
dmesg -n 1
echo
say mounted 'findmnt -no SOURCE,OPTIONS /home'
say cipher 'lsblk -no TYPE /dev/mapper/saw-home'
say before 'cat /home/note'
say key 'grep -rlE "[0-9a-f]{64}" /run/saw-data-disk'
say logged 'journalctl -b -u saw-data-disk -o cat'
say again 'CREDENTIALS_DIRECTORY=/run/credentials/@system /opt/saw/bin/saw data-disk open --json'
say pcrs 'tpm2_pcrread -T device:/dev/tpmrm0 sha256:4,7,11'
say luks 'cryptsetup luksDump /dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_data | grep -E "systemd-tpm2|saw-recovery|tpm2-hash-pcrs"'
say trim 'fstrim -v /home'
echo "$NOTE" >/home/note; sync
say last 'echo done'
"""


@dataclass(frozen=True)
class Shop:
    """Images by what they are (``ours``, ``next``: another of the same owner, ``theirs``), and the operator's keys."""

    images: dict[str, Path]
    private: bytes
    public: str


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with golden_vm.bench(IMAGES[-1], tmp_path_factory.mktemp("disk")) as bench:
        ours, other = bench.program, bench.program.replace(PATIENT, OTHER)
        images = {
            name: bench.image(name, bench.signed(program, owner), owner)
            for name, program, owner in (("ours", ours, "us"), ("next", other, "us"), ("theirs", ours, "them"))
        }
        bench.raw.unlink()
        private, public = recovery.make_keys(bench.place / "operator", "disks")
        yield Shop(images, private.read_bytes(), public.read_text())


@dataclass(frozen=True)
class Machine:
    """A VM of the driver's making, without a network."""

    shop: Shop
    folder: Path

    def spec(self, image: str) -> VmSpec:
        told = {
            "disk.script": SCRIPT.replace("$NOTE", image),
            "systemd.extra-unit.disk-report.service": REPORT,
            "systemd.unit-dropin.local-fs.target": "[Unit]\nWants=disk-report.service\n",
        }
        return golden_vm.blank(self.shop.images[image], credentials=told, data_disk_recovery_key=self.shop.public)

    def boot(self, image: str, until: str = r"DISK last=done") -> str:
        """Make the VM on ``image`` or rebuild it onto that, start it, and return the console once it says ``until``."""
        text = golden_vm.boot(
            self.spec(image), lambda console: re.search(until, console), off=lambda console: "DISK last=done" in console
        )
        assert re.search(until, text), text[-3000:]
        return text

    @property
    def disk(self) -> Path:
        return self.spec("ours").directory / data_disk.DISK


def report(console: str) -> dict[str, str]:
    return dict(re.findall(r"^DISK ([a-z-]+)=(.*?) *$", console, re.MULTILINE))


@pytest.fixture(scope="module")
def machine(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    place = tmp_path_factory.mktemp("vm")
    with golden_vm.driver(place):
        yield Machine(shop, place)


@pytest.fixture(scope="module")
def first(machine: Machine) -> dict[str, str]:
    """What the first boot reported."""
    return report(machine.boot("ours"))


def test_the_first_start_makes_an_encrypted_home_of_a_blank_disk(machine: Machine, first: dict[str, str]) -> None:
    assert first["mounted"].startswith("/dev/mapper/saw-home ")
    assert {"nosuid", "nodev", "noatime"} <= set(first["mounted"].split()[1].split(","))
    assert first["cipher"] == "crypt"
    assert "systemd-tpm2" in first["luks"]
    assert "saw-recovery" in first["luks"]
    assert re.search(r"tpm2-hash-pcrs: +7\b", first["luks"])
    assert json.loads(first["again"]) == {
        "ok": True, "changed": False, "device": "/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_data", "made": False, "opened_by": "nothing",
    }  # fmt: skip
    assert "trimmed" in first["trim"]
    header = luks2.read_header(machine.disk)
    assert header is not None
    assert header.label == "saw-home"


def test_no_key_of_it_lies_or_was_said_anywhere(machine: Machine, first: dict[str, str]) -> None:
    key = recovery.unseal(data_disk.escrow(machine.spec("ours")), machine.shop.private)
    assert first["key"] == ""
    for place in machine.folder.rglob("*"):
        if place.is_file() and place.suffix != ".fd":
            assert key.encode() not in place.read_bytes(), place
    assert not re.search(r"[0-9a-f]{64}", first["logged"])


def test_a_rebuild_onto_another_image_of_the_owner_keeps_the_home(machine: Machine, first: dict[str, str]) -> None:
    found = report(machine.boot("next"))
    assert found["before"] == "ours"
    now, then = (dict(re.findall(r"(\d+) *: 0x([0-9A-F]{64})", one["pcrs"])) for one in (found, first))
    assert [number for number in ("4", "7", "11") if now[number] == then[number]] == ["7"]


def test_an_image_of_another_owner_is_not_given_the_key_and_says_so(machine: Machine, first: dict[str, str]) -> None:
    assert first
    before = header_bytes(machine.disk)
    text = machine.boot("theirs", until=r"the TPM of this machine does not open the data disk")
    assert "DISK mounted=/dev/mapper" not in text
    assert header_bytes(machine.disk) == before


def test_another_tpm_is_refused_until_the_recovery_key_seals_the_disk_to_it(
    machine: Machine, first: dict[str, str]
) -> None:
    assert first
    vm = machine.spec("ours")
    old = data_disk.escrow(vm)
    shutil.move(vm.directory / "tpm", machine.folder / "tpm.old")
    machine.boot("ours", until=r"the TPM of this machine does not open the data disk")
    escrow = msgspec.json.decode(msgspec.json.encode(old), type=recovery.Escrow)
    data_disk.unlock(vm, recovery.unseal(escrow, machine.shop.private))
    found = report(machine.boot("ours"))
    assert found["before"] in {"ours", "next"}
    assert "was opened with the recovery key" in found["logged"]
    again = report(machine.boot("ours"))
    assert "recovery" not in again["logged"]
    assert again["mounted"].startswith("/dev/mapper/saw-home ")


def test_a_disk_with_something_on_it_is_refused_and_stays_as_it_is(machine: Machine, first: dict[str, str]) -> None:
    assert first
    kept = machine.disk.with_suffix(".kept")
    os.replace(machine.disk, kept)
    try:
        with machine.disk.open("wb") as stream:
            stream.truncate(256 * 1024 * 1024)
        boot_images.run("mkfs.ext4", "-q", "-F", "-L", "saw-home", str(machine.disk))
        before = hashlib.sha256(machine.disk.read_bytes()).hexdigest()
        text = machine.boot("ours", until=r"holds ext4 labelled 'saw-home' and is not formatted over")
        assert "DISK mounted=/dev/" not in text
        assert hashlib.sha256(machine.disk.read_bytes()).hexdigest() == before
    finally:
        os.replace(kept, machine.disk)


def test_erasing_takes_every_key_away(machine: Machine, first: dict[str, str]) -> None:
    assert first
    vm = machine.spec("ours")
    found = data_disk.erase(vm)
    assert found is not None
    assert found.erased.overwritten == found.erased.read_back >= 16 * 1024 * 1024
    assert luks2.read_header(machine.disk) is None


def header_bytes(disk: Path) -> bytes:
    with disk.open("rb") as stream:
        return stream.read(16 * 1024 * 1024)
