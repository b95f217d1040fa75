"""Two machines on one golden image, alike in all that is given from outside, share nothing that identifies them."""

from __future__ import annotations

import fnmatch
import hashlib
import mmap
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from image_pair import IMAGES

from saw.image.compare import DISK
from saw.image.compare_disk import partitions
from saw.image.disk import digest_of
from saw.image.ext4 import Ext4
from saw.image.identity import TRACES
from saw.vm import data_disk, qemu
from saw.vm.spec import VmSpec

PATIENCE = 1800.0
"""Seconds for one machine to boot, report and go off; without KVM two at once take minutes."""
ATTEMPTS = 3
"""An emulated machine that gets too little of the processors may find no clock and end before its kernel has mounted a disk."""
REPORT = """\
[Unit]
Description=Report what identifies this machine
After=sshd-keygen.service systemd-random-seed.service basic.target
SuccessAction=poweroff
FailureAction=poweroff

[Service]
Type=oneshot
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
ExecStart=-/bin/sh /run/credentials/@system/clone.script
"""
SCRIPT = r"""
say() { echo "CLONE $1=$(eval "$2" 2>&1 | tr '\n' ' ')"; }
echo
say machine-id 'cat /etc/machine-id'
say dhcp-duid 'systemd-id128 machine-id --app-specific=a50ad112bf604577a2fb741ab1955b03'
say boot-id 'cat /proc/sys/kernel/random/boot_id'
say journal-file 'journalctl --header | grep -m 1 "File ID"'
say journal-folder 'ls /run/log/journal /var/log/journal | grep -E "^[0-9a-f]{32}$"'
say ssh-host-key 'ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub | cut -d" " -f2'
say credential-secret 'systemd-creds setup >/dev/null 2>&1; sha256sum /var/lib/systemd/credential.secret'
say random-numbers 'od -An -tx1 -N16 /dev/urandom'
export TPM2TOOLS_TCTI=device:/dev/tpm0
say tpm-endorsement-key 'tpm2_createek -Q -c /run/ek.ctx -G rsa -u /run/ek.pub && sha256sum /run/ek.pub'
say name 'hostname'
say cloud-init 'ls -d /var/lib/cloud /run/cloud-init /etc/cloud 2>/dev/null | wc -l'
say dbus-id 'cat /var/lib/dbus/machine-id 2>/dev/null || echo none'
say last '. /etc/os-release; echo $ID'
"""
UNIQUE = {
    "machine-id", "dhcp-duid", "boot-id", "journal-file", "journal-folder", "ssh-host-key", "credential-secret", "random-numbers",
    "tpm-endorsement-key",
}  # fmt: skip
SHAPES = {
    "machine-id": r"[0-9a-f]{32}", "dhcp-duid": r"[0-9a-f]{32}", "boot-id": r"[0-9a-f-]{36}",
    "journal-file": r"File ID: [0-9a-f]{32}", "journal-folder": r"[0-9a-f]{32}", "ssh-host-key": r"SHA256:\S{43}",
    "credential-secret": r"[0-9a-f]{64}  \S+", "random-numbers": r"( ?[0-9a-f]{2}){16}",
    "tpm-endorsement-key": r"[0-9a-f]{64}  \S+",
}  # fmt: skip


class Clone(VmSpec, frozen=True, forbid_unknown_fields=True):
    """A machine of the driver's making whose parts lie in ``place``."""

    place: str = ""

    @property
    def directory(self) -> Path:
        """Its disks."""
        return Path(self.place)

    @property
    def runtime(self) -> Path:
        """Its sockets."""
        return Path(self.place)


def boot(place: Path) -> dict[str, str]:
    """Boot one machine on the image, without a network, and return what it reports of itself; it is off afterwards."""
    place.mkdir()
    image = (IMAGES[0] / DISK).resolve()
    credentials = {
        "clone.script": SCRIPT,
        "systemd.extra-unit.clone-report.service": REPORT,
        "systemd.unit-dropin.multi-user.target": "[Unit]\nWants=clone-report.service\n",
    }
    spec = Clone(
        id="clone", number=250, image=str(image), image_sha256="0" * 64, data_disk_mib=64, credentials=credentials, network=False,
        place=str(place),
    )  # fmt: skip
    qemu.make_root_disk(spec)
    data_disk.make(spec)
    qemu.copy(qemu.FIRMWARE_VARS, place / "vars.fd")
    (place / "tpm").mkdir()
    for _ in range(ATTEMPTS):
        console = one_boot(spec, place)
        found = dict(re.findall(r"^CLONE ([a-z-]+)=(.*?) *$", console, re.MULTILINE))
        if found:
            break
    assert found.get("last") == "debian", console[-2000:]
    return found


def one_boot(spec: Clone, place: Path) -> str:
    """Run the machine and its TPM until it goes off; return its console."""
    control = f"type=unixio,path={place / 'tpm.sock'}"
    with ExitStack() as stack:
        tpm = subprocess.Popen(["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={place / 'tpm'}", "--ctrl", control])
        stack.callback(ended, tpm)
        wait((place / "tpm.sock").exists, tpm, 60)
        machine = subprocess.Popen(qemu.command_line(spec, "tcg"), stdin=subprocess.DEVNULL)
        stack.callback(ended, machine)
        machine.wait(PATIENCE)
    (place / "tpm.sock").unlink(missing_ok=True)
    return (place / "console.log").read_bytes().decode("utf-8", "replace").replace("\r", "")


def wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], patience: float) -> None:
    """Wait until ``ready()`` holds."""
    deadline = time.monotonic() + patience
    while not ready():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(process: subprocess.Popen[bytes]) -> None:
    """End a process that this test started."""
    if process.poll() is None:
        process.kill()
    process.wait()


@pytest.fixture(scope="module")
def clones(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], list[Path]]:
    """What two machines reported, and their folders once they are off."""
    top = tmp_path_factory.mktemp("clones")
    places = [top / "one", top / "two"]
    return [boot(place) for place in places], places


@pytest.mark.control("IMG-01")
def test_two_machines_on_one_image_share_nothing_that_identifies(
    clones: tuple[list[dict[str, str]], list[Path]],
) -> None:
    one, other = clones[0]
    assert one["name"] == other["name"] == "clone", "they are alike in what is given from outside"
    for name in sorted(UNIQUE):
        for found in (one, other):
            assert re.fullmatch(SHAPES[name], found[name]), f"{name}: {found[name]}"
        assert one[name] != other[name], name
    assert one["cloud-init"] == other["cloud-init"] == "0"
    assert one["dbus-id"] in {"none", one["machine-id"]}


@pytest.mark.control("IMG-01")
def test_what_lies_on_their_disks_afterwards_is_each_ones_own(
    clones: tuple[list[dict[str, str]], list[Path]], tmp_path: Path
) -> None:
    """The image at rest holds none of it; each machine made its own, and no file that both wrote is equal."""
    image = held(IMAGES[0] / DISK, tmp_path)
    known = {
        path: digest for path, digest in image.items() if any(fnmatch.fnmatchcase(path[1:], one) for one in TRACES)
    }
    assert known == {"/etc/machine-id": hashlib.sha256().hexdigest()}
    written = []
    for report, place in zip(*clones, strict=True):
        files = {
            path: digest for path, digest in held(place / "root.qcow2", tmp_path).items() if image.get(path) != digest
        }
        written.append({path.replace(report["machine-id"], "ID"): digest for path, digest in files.items()})
    one, other = written
    assert {"/etc/machine-id", "/etc/ssh/ssh_host_ed25519_key", "/var/lib/systemd/credential.secret"} <= one.keys()
    assert {"/var/lib/systemd/random-seed", "/var/log/journal/ID/system.journal"} <= one.keys()
    assert [path for path in sorted(one.keys() & other.keys()) if one[path] == other[path]] == []


def held(image: Path, scratch: Path) -> dict[str, str]:
    """Return path → SHA-256 of every file on a disk."""
    raw = scratch / "raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(raw)], check=True)
    with raw.open("rb") as stream:
        data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        root = {part.name: part for part in partitions(data, raw)[1]}["root"]
        system = Ext4(data[root.start : root.start + root.size])
        found = {path: system.digest(node) for path, node in system.walk() if node.kind == "file"}
    raw.unlink()
    return found


def test_the_image_was_not_written_to_by_either(clones: tuple[list[dict[str, str]], list[Path]]) -> None:
    assert clones[0]
    assert digest_of(IMAGES[0] / DISK) == digest_of(IMAGES[1] / DISK)
