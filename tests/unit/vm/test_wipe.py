"""A VM that asks for a wipe is released after it alone: real files are overwritten and read back, and a signed record is left.

The kernel's ``reset`` of a PCI function is the far end: a plain file below a made ``/sys``.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from saw.cli.main import main as saw_main
from saw.errors import ConfigError
from saw.gpu.scratch import WipeFailed, read_zeros, wipe
from saw.gpu.wipe import RecordRefused, reset, verify, wipe_vm
from saw.policy.keys import create_key, key_id
from saw.vm import qemu
from saw.vm.spec import VmError, VmSpec, parse_spec
from saw.vm.wiped import NotWipedError, marker

pytestmark = pytest.mark.control("GPU-01")
Make = Callable[..., VmSpec]
GPU = "0000:3b:00.0"


def now() -> datetime:
    return datetime(2026, 11, 29, 12, 0, tzinfo=UTC)


def idle(name: str) -> bool:
    return name == "never"


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def bus(tmp_path: Path) -> Path:
    """A ``/sys`` with one GPU that can be reset."""
    device = tmp_path / "sys/bus/pci/devices" / GPU
    device.mkdir(parents=True)
    (device / "reset").write_text("")
    return tmp_path / "sys"


@pytest.fixture
def vm(make_spec: Make) -> VmSpec:
    """A made VM with a GPU, whose user left something on the data disk."""
    spec = make_spec(tpm=True, devices=(GPU,), wipe=True)
    qemu.create(spec)
    with (spec.directory / "data.img").open("r+b") as stream:
        stream.seek(1024 * 1024)
        stream.write(b"the user's secret")
    return spec


# --- scratch space -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 300_000), st.binary(min_size=1, max_size=5000)), max_size=6), st.integers(0, 4096)
)
def test_whatever_a_file_held_it_reads_back_as_zeros(pieces: list[tuple[int, bytes]], more: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "disk")
        path.touch()
        with path.open("r+b") as stream:
            for offset, content in pieces:
                stream.seek(offset)
                stream.write(content)
            stream.truncate(stream.seek(0, os.SEEK_END) + more)
        size = path.stat().st_size
        done = wipe(path)
        assert path.read_bytes() == bytes(size)
        assert (done.size, done.read_back) == (size, size)
        assert done.overwritten >= (1 if any(any(content) for _, content in pieces) else 0)


def test_links_and_folders_are_refused_and_what_they_lead_to_stays(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.write_bytes(b"kept")
    link.symlink_to(disk)
    for path in (link, tmp_path, Path("/dev/null"), tmp_path / "none"):
        with pytest.raises(WipeFailed):
            wipe(path)
    assert disk.read_bytes() == b"kept"
    assert wipe(disk).overwritten == 4


def test_a_disk_that_takes_no_zeros_is_not_wiped(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"x" * 20000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, hard))
    try:
        with pytest.raises(WipeFailed, match="was not wiped: File too large"):
            wipe(disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert wipe(disk).read_back == 20000


def test_a_byte_that_reads_back_otherwise_is_named(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(5000) + b"\x01" + bytes(10))
    with disk.open("rb") as stream:
        with pytest.raises(WipeFailed, match="at byte 5000"):
            read_zeros(disk, stream.fileno(), 5011)
        assert read_zeros(disk, stream.fileno(), 5000) == 5000


# --- the VM ------------------------------------------------------------------------------------------------------------------


def test_a_wiped_vm_leaves_a_record_that_its_key_signed_and_is_released(vm: VmSpec, bus: Path, key: Any) -> None:
    sealed = wipe_vm(vm, [key], "sponsor left", now, active=idle, sys_dir=bus)
    assert marker(vm).read_bytes() == sealed
    record, signers = verify(sealed, {key_id(key.public_key()): key.public_key()}, workspace=vm.id)
    assert (record.workspace, record.reason, signers) == (vm.id, "sponsor left", (key_id(key.public_key()),))
    assert [one.device for one in record.gpus] == [GPU]
    assert (bus / "bus/pci/devices" / GPU / "reset").read_text() == "1"
    names = {Path(one.path).name for one in record.disks}
    assert {"data.img", "root.qcow2", "vars.fd", "tpm2-00.permall"} <= names
    assert not any((vm.directory / "data.img").read_bytes())
    assert all(one.read_back == one.size for one in record.disks)
    assert qemu.destroy(vm)
    assert not vm.directory.exists()


def test_an_unwiped_vm_is_ended_and_not_released(vm: VmSpec, make_spec: Make) -> None:
    with pytest.raises(NotWipedError, match="has to be wiped"):
        qemu.destroy(vm)
    assert (vm.directory / "data.img").exists()
    without = msgspec.structs.replace(vm, devices=(), wipe=False)
    for wanted in (without, msgspec.structs.replace(vm, devices=())):
        with pytest.raises(NotWipedError):
            qemu.create(wanted)
    assert parse_spec((vm.directory / "spec.json").read_bytes()) == vm
    plain = make_spec(id="ws-plain", number=8, tpm=True)
    qemu.create(plain)
    assert qemu.destroy(plain)


def test_a_device_stays_with_the_vm_until_it_was_wiped(vm: VmSpec, make_spec: Make, bus: Path, key: Any) -> None:
    other = make_spec(id="ws-next", number=8, tpm=True, devices=(GPU,), wipe=True)
    with pytest.raises(VmError, match=f"device {GPU} belongs to VM ws-t"):
        qemu.create(other)
    wipe_vm(vm, [key], "sponsor left", now, active=idle, sys_dir=bus)
    qemu.destroy(vm)
    assert qemu.create(other)["changed"]


@pytest.mark.parametrize("broken", ["no device", "disk", "running", "no signer"])
def test_what_could_not_be_wiped_leaves_no_record_and_no_release(vm: VmSpec, bus: Path, key: Any, broken: str) -> None:
    signers, active = [key], idle
    if broken == "no device":
        (bus / "bus/pci/devices" / GPU / "reset").unlink()
    elif broken == "disk":
        (vm.directory / "data.img").unlink()
        (vm.directory / "data.img").symlink_to("/dev/zero")
    elif broken == "running":
        active = lambda name: name == vm.id  # noqa: E731
    else:
        signers = []
    with pytest.raises(WipeFailed):
        wipe_vm(vm, signers, "sponsor left", now, active=active, sys_dir=bus)
    assert not marker(vm).exists()
    with pytest.raises(NotWipedError):
        qemu.destroy(vm)


def test_a_vm_on_which_a_wipe_was_begun_does_not_start_again(vm: VmSpec, bus: Path, key: Any) -> None:
    assert qemu.start(vm)
    qemu.power_off(vm)
    (bus / "bus/pci/devices" / GPU / "reset").unlink()
    with pytest.raises(WipeFailed, match="was not reset"):
        wipe_vm(vm, [key], "sponsor left", now, active=idle, sys_dir=bus)
    for attempt in (lambda: qemu.start(vm), lambda: qemu.create(vm), lambda: qemu.rebuild(vm)):
        with pytest.raises(VmError, match="a wipe of VM ws-t was begun"):
            attempt()


def test_a_record_counts_for_its_workspace_and_under_a_known_key_alone(vm: VmSpec, bus: Path, key: Any) -> None:
    sealed = wipe_vm(vm, [key], "sponsor left", now, active=idle, sys_dir=bus)
    keys = {key_id(key.public_key()): key.public_key()}
    other = Ed25519PrivateKey.generate().public_key()
    with pytest.raises(RecordRefused, match="signatures are good"):
        verify(sealed, {key_id(other): other})
    with pytest.raises(RecordRefused, match="is of workspace ws-t, wanted is ws-u"):
        verify(sealed, keys, workspace="ws-u")
    with pytest.raises(RecordRefused):
        verify(sealed.replace(b'"payload":"ey', b'"payload":"fy'), keys)
    assert verify(sealed, keys)[0].workspace == "ws-t"


def test_only_a_device_that_is_there_is_reset(bus: Path) -> None:
    assert reset(GPU, bus).method == "pci-reset"
    with pytest.raises(WipeFailed, match=r"GPU 0000:3c:00.0 was not reset"):
        reset("0000:3c:00.0", bus)


# --- commands and specification ----------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "keys"
    create_key(folder, "host")
    create_key(folder, "other")
    return folder


def test_the_commands_wipe_and_verify(make_spec: Make, keys: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = make_spec(tpm=True, wipe=True)
    qemu.create(spec)
    assert saw_main(["vm", "destroy", spec.id, "--json"]) == 1
    assert msgspec.json.decode(capfd.readouterr().out)["error"]["code"] == "not_wiped"
    record = keys.parent / "record.json"
    words = ["--key", str(keys / "host.key"), "--reason", "sponsor left", "--out", str(record)]
    assert saw_main(["gpu", "wipe", spec.id, *words]) == 0
    assert "read back as zeros" in capfd.readouterr().out
    assert saw_main(["gpu", "verify", str(record), "--public", str(keys / "host.pub"), "--workspace", spec.id]) == 0
    assert f"{spec.id}: wiped on" in capfd.readouterr().out
    assert saw_main(["gpu", "verify", str(record), "--public", str(keys / "other.pub"), "--json"]) == 1
    assert msgspec.json.decode(capfd.readouterr().out)["error"]["code"] == "wipe_record_refused"
    assert saw_main(["vm", "destroy", spec.id, "--json"]) == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"devices": ("3b:00.0",), "wipe": True}, "is no PCI address"),
        ({"devices": (f"{GPU},x=y",), "wipe": True}, "is no PCI address"),
        ({"devices": (GPU, GPU), "wipe": True}, "one device twice"),
        ({"devices": (GPU,)}, "asks for no wipe"),
    ],
)
def test_devices_of_a_specification(make_spec: Make, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_spec(msgspec.json.encode(make_spec(**fields)))
    good = parse_spec(msgspec.json.encode(make_spec(devices=(GPU,), wipe=True)))
    good.runtime.mkdir(parents=True)
    words = qemu.command_line(good, "kvm")
    assert words[words.index(f"vfio-pci,host={GPU}") - 1] == "-device"
    plain = make_spec()
    assert not [word for word in qemu.command_line(plain, "kvm") if "vfio" in word]
