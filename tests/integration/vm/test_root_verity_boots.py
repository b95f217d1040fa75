"""A golden image with a verified root runs of it and of nothing else: real firmware, signatures, kernel and dm-verity, emulated.

The image that was built here with ROOT_VERITY=1 is signed for an owner of this test: as it is, as "another image" of the same
owner (its command line says something else), with one bit of its root changed, with another root hash, and with another root hash
that nobody signed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from saw.image import secure_boot as image_secure_boot
from saw.image import uefi_keys
from saw.image.expected import differences, expected_pcrs
from saw.image.finished import finished_in
from saw.vm import data_disk, qemu, released, secure_boot, spec
from saw.vm.spec import VmSpec

sys.path.insert(0, str(Path(__file__).resolve().parent))
import boot_images
from boot_images import PATIENCE, PATIENT, WORDS

IMAGES = sorted(
    (image for image, _ in finished_in(boot_images.ROOT / "build/images") if image.root_hash),
    key=lambda image: image.created,
)
pytestmark = [
    pytest.mark.skipif(
        not IMAGES or any(not path.exists() for path in (secure_boot.FIRMWARE, uefi_keys.FACTORY)),
        reason="no golden image with a verified root was built here (make image ROOT_VERITY=1), or the package ovmf is missing",
    ),
    pytest.mark.control("IMG-01"),
]
REPORT = """\
[Unit]
Description=Report what the root file system is, and go off
After=multi-user.target sshd-keygen.service
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
Type=oneshot
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
ExecStart=-/bin/sh /run/credentials/@system/root.script
"""
SCRIPT = r"""
say() { echo "ROOT $1=$(eval "$2" 2>&1 | tr '\n' ' ')"; }
dmesg -n 1
echo
say root 'findmnt -no SOURCE,FSTYPE,OPTIONS /'
say var 'findmnt -no FSTYPE,OPTIONS /var'
say verity 'dmsetup table root'
say status 'dmsetup status root'
say usr 'touch /usr/bin/mine'
say etc 'touch /etc/mine'
say again 'mount -o remount,rw / && touch /etc/mine'
say block 'dd if=/dev/zero of=/dev/mapper/root bs=4096 count=1'
say id 'cat /etc/machine-id'
say key 'cat /etc/ssh/ssh_host_ed25519_key.pub'
say failed 'systemctl list-units --failed --plain --no-legend'
say pcrs 'tpm2_pcrread -T device:/dev/tpmrm0 sha256:4,11'
say home 'cat /home/note'
say state 'cat /var/lib/note'
echo "$NOTE" >/home/note; echo "$NOTE" >/var/lib/note; sync
say last 'echo done'
"""


@dataclass(frozen=True)
class Shop:
    """Images by what they are: ``ours``, ``next``, ``changed`` (a byte of the root), ``other`` (root hash), ``unsigned``."""

    images: dict[str, Path]
    expected: dict[str, tuple[str, ...]]
    """What a boot of ``ours`` has to measure, computed from its boot image."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    place = tmp_path_factory.mktemp("root")
    raw, uki, store, keys = place / "raw", place / "uki.efi", place / "owner.fd", place / "keys"
    boot_images.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", IMAGES[-1].image, str(raw))
    table = json.loads(boot_images.run("sfdisk", "-J", str(raw)))["partitiontable"]["partitions"]
    start = {str(one["name"]): int(one["start"]) * 512 for one in table}
    boot_images.run("mcopy", "-i", f"{raw}@@{start['esp']}", "::/EFI/BOOT/BOOTX64.EFI", str(uki))
    uefi_keys.make_keys(keys, "us")
    uefi_keys.enrol(keys / "PK.crt", [keys / "KEK.crt"], [keys / "db.crt"], store)
    ours = uki.read_bytes()
    assert ours.count(WORDS) == 1, "the test changes these words of the command line"
    ours = ours.replace(WORDS, PATIENT)
    right = IMAGES[-1].root_hash.encode()
    assert ours.count(right) == 1
    wrong = right[:-1] + (b"0" if right[-1:] != b"0" else b"1")
    programs = {
        "ours": ours, "next": ours.replace(PATIENT, PATIENT.replace(b"900", b"901")), "changed": ours,
        "other": ours.replace(right, wrong), "unsigned": ours,
    }  # fmt: skip
    images, expected = {}, {}
    for name, program in programs.items():
        uki.write_bytes(program)
        image_secure_boot.sign(uki, keys / "db.key", keys / "db.crt")
        if name == "ours":
            expected = expected_pcrs(uki.read_bytes())
        if name == "unsigned":
            uki.write_bytes(uki.read_bytes().replace(right, wrong))
        boot_images.run("mcopy", "-o", "-i", f"{raw}@@{start['esp']}", str(uki), "::/EFI/BOOT/BOOTX64.EFI")
        if name == "changed":
            flip(raw, start["root"])
        folder = place / name
        folder.mkdir()
        boot_images.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(folder / "image.qcow2"))
        if name == "changed":
            flip(raw, start["root"])
        shutil.copyfile(store, folder / secure_boot.TEMPLATE)
        images[name] = folder / "image.qcow2"
    raw.unlink()
    yield Shop(images, expected)
    shutil.rmtree(place)


def flip(raw: Path, place: int) -> None:
    """Flip one bit of the first block of the root, in the part of it that the file system does not use."""
    with raw.open("r+b") as stream:
        stream.seek(place + 100)
        byte = stream.read(1)
        stream.seek(place + 100)
        stream.write(bytes([byte[0] ^ 1]))


@dataclass(frozen=True)
class Machine:
    """A VM of the driver's making, without a network."""

    shop: Shop

    def boot(self, image: str) -> str:
        """Make the VM on ``image`` or rebuild it onto that, start it, and return the console when it has ended.

        It goes on with its root disk where that lies on this image already.
        """
        path = self.shop.images[image]
        told = {
            "root.script": SCRIPT.replace("$NOTE", image),
            "systemd.extra-unit.root-report.service": REPORT,
            "systemd.unit-dropin.multi-user.target": "[Unit]\nWants=root-report.service\n",
        }
        vm = VmSpec(
            id="ws-t", number=9, image=str(path), image_sha256=hashlib.sha256(path.read_bytes()).hexdigest(), memory_mib=1024,
            cpus=2, data_disk_mib=256, network=False, accel="tcg", credentials=told,
        )  # fmt: skip
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
            wait(sock.exists)
            machine = subprocess.Popen(qemu.command_line(vm, "tcg"), stdin=subprocess.DEVNULL)
            wait(lambda: ended(said(console)) or machine.poll() is not None)
            if "ROOT last=done" in said(console):
                machine.wait(PATIENCE)
        finally:
            for process in filter(None, (machine, tpm)):
                process.kill()
                process.wait(60)
        return said(console)


def ended(console: str) -> bool:
    words = ("ROOT last=done", "Kernel panic", "Access Denied", "Security Violation")
    return any(word in console for word in words)


def said(console: Path) -> str:
    return console.read_bytes().decode("utf-8", "replace").replace("\r", "") if console.exists() else ""


def wait(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline, "that took longer than any boot should"
        time.sleep(0.2)


def report(console: str) -> dict[str, str]:
    found = dict(re.findall(r"^ROOT ([a-z]+)=(.*?) *$", console, re.MULTILINE))
    assert found.get("last") == "done", console[-3000:]
    return found


@pytest.fixture(scope="module")
def machine(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    place = tmp_path_factory.mktemp("vm")
    with pytest.MonkeyPatch.context() as patch:
        for module in (spec, qemu, data_disk):
            patch.setattr(module, "STATE", place / "lib/vms")
        (place / "hypervisor.json").write_text('{"image_records": "unchecked"}')
        patch.setattr(released, "SETTINGS", place / "hypervisor.json")
        runtime = Path(f"/tmp/saw-{hashlib.sha256(str(place).encode()).hexdigest()[:12]}")
        patch.setattr(spec, "RUNTIME", runtime)
        yield Machine(shop)
        shutil.rmtree(runtime, ignore_errors=True)


@pytest.fixture(scope="module")
def boots(machine: Machine) -> tuple[dict[str, str], dict[str, str]]:
    """What the first boot and a restart reported."""
    return report(machine.boot("ours")), report(machine.boot("ours"))


@pytest.fixture(scope="module")
def first(boots: tuple[dict[str, str], dict[str, str]]) -> dict[str, str]:
    """What the first boot reported."""
    return boots[0]


def test_it_runs_of_a_root_that_is_verified_and_that_root_cannot_change(first: dict[str, str]) -> None:
    source, kind, options = first["root"].split()
    assert (source, kind, options.split(",")[0]) == ("/dev/mapper/root", "ext4", "ro")
    assert first["verity"].split()[2] == "verity"
    assert IMAGES[-1].root_hash in first["verity"]
    assert "panic_on_corruption" in first["verity"]
    assert first["status"].split()[-1] == "V"
    for name in ("usr", "etc"):
        assert "Read-only file system" in first[name]
    assert re.search(r"read-only|write-protected", first["again"])
    assert re.search(r"not permitted|denied|Read-only", first["block"])


def test_what_it_measures_follows_from_the_boot_image_that_names_the_root(shop: Shop, first: dict[str, str]) -> None:
    measured = {number: value.lower() for number, value in re.findall(r"(\d+) *: 0x([0-9A-F]{64})", first["pcrs"])}
    assert differences(shop.expected, measured) == []


def test_what_a_workspace_writes_goes_to_var_and_every_unit_starts(first: dict[str, str]) -> None:
    kind, options = first["var"].split()
    assert kind == "ext4"
    assert {"rw", "nosuid", "nodev"} <= set(options.split(","))
    assert re.fullmatch(r"[0-9a-f]{32}", first["id"])
    assert first["key"].startswith("ssh-ed25519 ")
    assert first["failed"] == ""


def test_a_restart_keeps_what_identifies_the_workspace_and_a_rebuild_keeps_the_home_alone(
    machine: Machine, boots: tuple[dict[str, str], dict[str, str]]
) -> None:
    first, again = boots
    assert (again["id"], again["key"]) == (first["id"], first["key"])
    assert (again["home"], again["state"]) == ("ours", "ours")
    rebuilt = report(machine.boot("next"))
    assert rebuilt["home"] == "ours"
    assert "No such file" in rebuilt["state"]
    assert rebuilt["id"] != first["id"]
    assert rebuilt["key"] != first["key"]


def test_one_flipped_bit_of_the_root_ends_the_start(machine: Machine) -> None:
    console = machine.boot("changed")
    assert "Linux version" in console
    assert re.search(r"Kernel panic - not syncing: dm-verity device .*corrupted", console), console[-3000:]
    assert "ROOT" not in console


def test_another_root_hash_starts_nothing_even_when_the_owner_signed_it(machine: Machine) -> None:
    console = machine.boot("other")
    assert "saw: this image does not start: there is no partition" in console, console[-3000:]
    assert "ROOT" not in console


def test_another_root_hash_that_nobody_signed_is_refused_by_the_firmware(machine: Machine) -> None:
    console = machine.boot("unsigned")
    assert "Linux version" not in console
    assert any(word in console for word in ("Access Denied", "Security Violation")), console[-2000:]
