"""A golden image with a verified root runs of it and of nothing else: real firmware, signatures, kernel and dm-verity, emulated.

The image that was built here with ROOT_VERITY=1 is signed for an owner of this test: as it is, as "another image" of the same
owner (its command line says something else), with one bit of its root changed, with another root hash, and with another root hash
that nobody signed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from saw.image.expected import differences, expected_pcrs

sys.path.insert(0, str(Path(__file__).resolve().parent))
import golden_vm
from golden_vm import OTHER, PATIENT

IMAGES = golden_vm.built_here(lambda image: image.root_hash)
pytestmark = [
    pytest.mark.skipif(
        not IMAGES,
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
say links 'find / -xdev -type l -exec readlink -m {} + | grep ^/var/ | sort -u'
say paths 'systemd-analyze unit-paths'
say starts 'grep -rlE "^Exec[A-Za-z]*=[^ ]*/var/" /etc/systemd /usr/lib/systemd'
say extensions 'for name in systemd-sysext systemd-confext systemd-logind cron; do systemctl is-enabled $name.service; done'
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
    with golden_vm.bench(IMAGES[-1], tmp_path_factory.mktemp("root")) as bench:
        right = IMAGES[-1].root_hash.encode()
        assert bench.program.count(right) == 1
        wrong = right[:-1] + (b"0" if right[-1:] != b"0" else b"1")
        ours = bench.signed(bench.program, "us")
        programs = {
            "ours": ours, "next": bench.signed(bench.program.replace(PATIENT, OTHER), "us"),
            "other": bench.signed(bench.program.replace(right, wrong), "us"), "unsigned": ours.replace(right, wrong),
        }  # fmt: skip
        images = {name: bench.image(name, program, "us") for name, program in programs.items()}
        flip(bench.raw, bench.start["root"])
        images["changed"] = bench.image("changed", ours, "us")
        bench.raw.unlink()
        yield Shop(images, expected_pcrs(ours))


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
        told = {
            "root.script": SCRIPT.replace("$NOTE", image),
            "systemd.extra-unit.root-report.service": REPORT,
            "systemd.unit-dropin.multi-user.target": "[Unit]\nWants=root-report.service\n",
        }
        vm = golden_vm.blank(self.shop.images[image], credentials=told)
        return golden_vm.boot(vm, ended, off=lambda console: "ROOT last=done" in console)


def ended(console: str) -> bool:
    words = ("ROOT last=done", "Kernel panic", "Access Denied", "Security Violation")
    return any(word in console for word in words)


def report(console: str) -> dict[str, str]:
    found = dict(re.findall(r"^ROOT ([a-z]+)=(.*?) *$", console, re.MULTILINE))
    assert found.get("last") == "done", console[-3000:]
    return found


@pytest.fixture(scope="module")
def machine(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with golden_vm.driver(tmp_path_factory.mktemp("vm")):
        yield Machine(shop)


@pytest.fixture(scope="module")
def boots(machine: Machine) -> tuple[dict[str, str], dict[str, str]]:
    """What the first boot and a restart reported, whatever is booted after them."""
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


def test_nothing_in_the_image_starts_what_lies_in_var(first: dict[str, str]) -> None:
    assert sorted(first["links"].split()) == [
        "/var/lib/saw-host/ssh_host_ed25519_key",
        "/var/lib/saw-host/ssh_host_ed25519_key.pub",
    ]
    assert "/etc/systemd/system" in first["paths"].split()
    assert [path for path in first["paths"].split() if path.startswith("/var")] == []
    assert first["starts"] == ""
    assert first["extensions"] == "disabled disabled masked not-found"


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
