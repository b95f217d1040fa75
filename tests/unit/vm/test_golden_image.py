"""The file below a root disk is the image that was asked for: its digest is checked, and the check is not skipped by a change.

Real qemu-img; the far end is the service manager and, for a start, the emulator.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from saw.cli import vm as vm_cli
from saw.vm import golden, qemu
from saw.vm.spec import VmError, VmSpec, load_spec

Make = Callable[..., VmSpec]


def tamper(spec: VmSpec) -> str:
    """Change one byte in place, keep size and modification time, and return the new digest."""
    image = Path(spec.image)
    before = image.stat()
    with image.open("r+b") as stream:
        stream.seek(100_000)
        stream.write(b"!")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    return hashlib.sha256(image.read_bytes()).hexdigest()


def held(spec: VmSpec) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in spec.directory.iterdir() if path.is_file()}


@pytest.mark.control("P0-04")
def test_a_vm_is_not_made_on_an_image_of_another_digest(make_spec: Make) -> None:
    spec = make_spec()
    found = tamper(spec)
    with pytest.raises(golden.ImageRefusedError) as refused:
        qemu.create(spec)
    assert refused.value.message == f"image {spec.image} has SHA-256 {found}, wanted is {spec.image_sha256}"
    assert refused.value.details == {"image": spec.image, "found": found, "wanted": spec.image_sha256}
    assert refused.value.cure
    assert not spec.directory.exists()
    assert qemu.create(msgspec.structs.replace(spec, image_sha256=found))["changed"]


@pytest.mark.control("P0-04")
def test_a_rebuild_on_a_wrong_image_is_refused_and_the_old_disk_stays(make_spec: Make) -> None:
    spec, other = make_spec(tpm=True), make_spec(name="next")
    qemu.create(spec)
    before = held(spec)
    found = tamper(other)
    with pytest.raises(golden.ImageRefusedError, match=found):
        qemu.rebuild(spec, other.image, other.image_sha256)
    assert held(spec) == before
    qemu.startable(load_spec("ws-t"))
    assert qemu.rebuild(spec, other.image, found)["changed"]


@pytest.mark.control("P0-04")
def test_a_rebuild_reads_the_image_again_though_its_file_looks_unchanged(make_spec: Make) -> None:
    spec = make_spec(tpm=True)
    qemu.create(spec)
    found = tamper(spec)
    golden.remember(spec, golden.current(Path(spec.image), spec.image_sha256))
    qemu.startable(spec)
    with pytest.raises(golden.ImageRefusedError, match=found):
        qemu.rebuild(spec)


@pytest.mark.control("P0-04")
def test_an_image_that_was_changed_after_the_creation_is_not_started(
    make_spec: Make, hypervisor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(tpm=True, network=False, accel="tcg")
    qemu.create(spec)
    machine = hypervisor / "tools/qemu-system-x86_64"
    machine.write_text(f"#!/bin/sh\ntouch {hypervisor}/ran\necho hello > {spec.directory}/console.log\n")
    machine.chmod(0o755)
    assert qemu.start(spec)
    assert qemu.execute(spec) == 0
    assert (hypervisor / "ran").exists()
    qemu.power_off(spec)
    (hypervisor / "ran").unlink()
    found = tamper(spec)
    for step in (qemu.start, qemu.execute):
        with pytest.raises(golden.ImageRefusedError, match=found):
            step(spec)
    assert not (hypervisor / "ran").exists()
    assert not qemu.active(spec.id)


def test_an_unchanged_image_is_read_once_and_a_new_copy_of_it_again(
    make_spec: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(tpm=True)
    read: list[Path] = []
    real = golden.hash_image

    def counted(path: Path) -> golden.Hashed:
        read.append(path)
        return real(path)

    monkeypatch.setattr(golden, "hash_image", counted)
    qemu.create(spec)
    assert not qemu.create(spec)["changed"]
    qemu.startable(spec)
    assert len(read) == 1
    image = Path(spec.image)
    copy = image.with_name("copy")
    copy.write_bytes(image.read_bytes())
    copy.replace(image)
    qemu.startable(spec)
    qemu.startable(spec)
    assert len(read) == 2


@pytest.mark.parametrize("record", [b"", b"{", b'{"path": 1}', None])
def test_without_a_readable_record_the_image_is_read_again(make_spec: Make, record: bytes | None) -> None:
    spec = make_spec(tpm=True)
    qemu.create(spec)
    place = spec.directory / golden.RECORD
    place.unlink()
    if record is not None:
        place.write_bytes(record)
    golden.verify(spec)
    assert golden.recorded(spec) == golden.current(Path(spec.image), spec.image_sha256)
    assert place.stat().st_mode & 0o777 == 0o600


def test_an_image_that_lies_on_another_file_is_refused_and_a_whole_one_is_not(
    make_spec: Make, hypervisor: Path
) -> None:
    base = make_spec()
    layered = hypervisor / "layered.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.image, str(layered)], check=True
    )
    digest = hashlib.sha256(layered.read_bytes()).hexdigest()
    spec = msgspec.structs.replace(base, image=str(layered), image_sha256=digest)
    with pytest.raises(golden.ImageRefusedError, match="reads from another file") as refused:
        golden.verify(spec)
    assert refused.value.details["outside"] == base.image
    golden.verify(base)


def test_a_root_disk_that_was_not_finished_is_not_started(make_spec: Make) -> None:
    spec = make_spec(tpm=True)
    qemu.create(spec)
    qemu.startable(spec)
    (spec.directory / "root.image").unlink()
    with pytest.raises(VmError, match="the root disk of ws-t was not finished") as refused:
        qemu.startable(spec)
    assert "workspace_rebuild" in refused.value.cure
    assert qemu.create(spec)["changed"]
    qemu.startable(spec)


def test_a_rebuild_that_finds_no_space_keeps_the_old_root_disk(
    make_spec: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(tpm=True)
    qemu.create(spec)
    before = held(spec)
    real = qemu.run

    def full(*argv: str, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        if argv[:2] == ("qemu-img", "create"):
            raise VmError("`qemu-img create` failed (1): No space left on device")
        return real(*argv, timeout=timeout, check=check)

    with monkeypatch.context() as patch:
        patch.setattr(qemu, "run", full)
        with pytest.raises(VmError, match="No space left"):
            qemu.rebuild(spec)
    assert held(spec) == before
    qemu.startable(spec)
    assert qemu.rebuild(spec)["changed"]


@pytest.mark.control("LIF-03")
def test_an_image_is_found_by_its_digest_beside_those_in_use_or_at_its_place(
    make_spec: Make, hypervisor: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, other = make_spec(tpm=True), make_spec(name="next")
    qemu.create(spec)
    assert golden.find(other.image_sha256) == Path(other.image)
    place = hypervisor / "lib/images/older/image.qcow2"
    place.parent.mkdir(parents=True)
    Path(other.image).rename(place)
    assert golden.find(other.image_sha256, "older") == place
    assert vm_cli.main(["find-image", "--image-sha256", other.image_sha256, "--name", "older", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image"] == str(place)
    with pytest.raises(VmError, match="no file on this hypervisor is image workspace-7") as refused:
        golden.find("0" * 64, "workspace-7")
    assert refused.value.cure.endswith("lib/images/workspace-7/image.qcow2")
    assert str(place) in refused.value.details["looked_at"]
    place.write_bytes(place.read_bytes() + b"x")
    with pytest.raises(VmError, match="no file on this hypervisor"):
        golden.find(other.image_sha256, "older")


def test_the_file_with_the_name_is_read_first(
    make_spec: Make, hypervisor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = make_spec()
    for name in ("a", "b", "workspace-z", "c"):
        folder = hypervisor / "lib/images" / name
        folder.mkdir(parents=True)
        (folder / "image.qcow2").write_bytes(Path(wanted.image).read_bytes())
    read: list[Path] = []
    real = golden.hash_image
    monkeypatch.setattr(golden, "hash_image", lambda path: read.append(path) or real(path))
    assert golden.find(wanted.image_sha256, "workspace-z").parent.name == "workspace-z"
    assert len(read) == 1
