"""The hypervisor hands an encrypted data disk over blank, keeps no key of it, and takes its key slots away at the end."""

from __future__ import annotations

import base64
import io
import itertools
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from saw.cli import vm as vm_cli
from saw.datadisk import luks2, recovery
from saw.datadisk.config import CREDENTIAL, ONCE
from saw.errors import ConfigError
from saw.vm import data_disk, qemu, secure_boot
from saw.vm.spec import VmError, VmSpec, parse_spec

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "datadisk"))
import luks2_parts

Make = Callable[..., VmSpec]
KEY = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return recovery.make_keys(tmp_path_factory.mktemp("keys"), "disks")


@pytest.fixture
def encrypted(make_spec: Make, keys: tuple[Path, Path]) -> VmSpec:
    return make_spec(tpm=True, data_disk_recovery_key=keys[1].read_text(), data_disk_secure_boot=False)


def used(spec: VmSpec, keys: tuple[Path, Path]) -> Path:
    """Have the guest make the volume, as far as the hypervisor sees it."""
    token = msgspec.to_builtins(recovery.seal(KEY, luks2_parts.UUID, keys[1].read_text()))
    return luks2_parts.volume(spec.directory / "data.img", luks2_parts.metadata({"0": token}))


def credentials(spec: VmSpec) -> dict[str, str]:
    """What the guest is told, out of the files behind qemu's options."""
    spec.runtime.mkdir(parents=True, exist_ok=True)
    found = {}
    for option, value in itertools.pairwise(qemu.command_line(spec, "tcg")):
        if option == "-smbios":
            path = Path(value.partition("path=")[2])
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            name, _, content = path.read_text().removeprefix("io.systemd.credential.binary:").partition("=")
            found[name] = base64.b64decode(content).decode()
    return found


def test_an_encrypted_disk_is_handed_over_blank_and_a_plain_one_is_not(encrypted: VmSpec, make_spec: Make) -> None:
    assert qemu.create(encrypted)["changed"]
    assert (encrypted.directory / "data.img").read_bytes() == bytes(64 * 1024 * 1024)
    assert not qemu.create(encrypted)["changed"]
    plain = make_spec(id="plain", number=8)
    plain.directory.mkdir()
    assert data_disk.make(plain)
    done = subprocess.run(
        ["blkid", "-p", "-o", "value", "-s", "LABEL", plain.directory / "data.img"], capture_output=True, check=True
    )
    assert done.stdout.strip() == b"saw-home"


def test_the_guest_is_told_by_a_credential_and_of_a_plain_disk_nothing(
    encrypted: VmSpec, make_spec: Make, keys: tuple[Path, Path]
) -> None:
    qemu.create(encrypted)
    told = json.loads(credentials(encrypted)[CREDENTIAL])
    assert told == {"recovery_key": keys[1].read_text(), "secure_boot": "any"}
    required = msgspec.structs.replace(encrypted, data_disk_secure_boot=True)
    assert json.loads(credentials(required)[CREDENTIAL])["secure_boot"] == "required"
    assert {CREDENTIAL, ONCE} & credentials(make_spec(id="plain", number=8)).keys() == set()


def test_a_disk_does_not_change_from_plain_to_encrypted_or_back(encrypted: VmSpec) -> None:
    plain = msgspec.structs.replace(encrypted, data_disk_recovery_key="")
    qemu.create(plain)
    with pytest.raises(VmError, match="data disk of ws-t is plain, asked for is encrypted"):
        qemu.create(encrypted)
    assert not qemu.create(plain)["changed"]
    qemu.destroy(plain)
    qemu.create(encrypted)
    with pytest.raises(VmError, match="is encrypted, asked for is plain"):
        qemu.create(plain)
    with pytest.raises(VmError, match="is encrypted, asked for is plain"):
        qemu.create(plain, renew=True)
    assert qemu.rebuild(encrypted)["changed"]


def test_another_recovery_key_is_refused_once_there_is_a_disk(encrypted: VmSpec, tmp_path: Path) -> None:
    other = recovery.make_keys(tmp_path / "other", "disks")[1].read_text()
    changed = msgspec.structs.replace(encrypted, data_disk_recovery_key=other)
    qemu.create(encrypted)
    with pytest.raises(VmError, match=r"is for the recovery key [0-9a-f]{16}, asked for is") as refused:
        qemu.create(changed)
    assert refused.value.cure == "leave the recovery key as it was, or create another workspace"
    assert not qemu.create(encrypted)["changed"]
    respelt = msgspec.structs.replace(encrypted, data_disk_recovery_key=encrypted.data_disk_recovery_key + "\n")
    assert qemu.create(respelt)["changed"], "the same key"
    (encrypted.directory / "data.img").unlink()
    assert qemu.create(changed)["changed"], "no disk holds the former key"


def test_a_disk_for_signed_images_needs_an_image_with_its_owners_keys(encrypted: VmSpec) -> None:
    required = msgspec.structs.replace(encrypted, data_disk_secure_boot=True)
    with pytest.raises(VmError, match="its image has no owner's keys"):
        qemu.create(required)
    assert not (required.directory / "data.img").exists()
    Path(required.image).with_name(secure_boot.TEMPLATE).write_bytes(b"store")
    assert qemu.create(required)["changed"]


def test_a_specification_takes_a_public_key_alone_and_the_drivers_credentials_from_nobody(
    encrypted: VmSpec, keys: tuple[Path, Path]
) -> None:
    assert parse_spec(msgspec.json.encode(encrypted)) == encrypted
    for pem in ("x", keys[0].read_text()):
        with pytest.raises(ConfigError, match="is no public key"):
            parse_spec(msgspec.json.encode(msgspec.structs.replace(encrypted, data_disk_recovery_key=pem)))
    for name in (CREDENTIAL, ONCE):
        with pytest.raises(ConfigError, match="is the driver's own"):
            parse_spec(msgspec.json.encode(msgspec.structs.replace(encrypted, credentials={name: "x"})))


def command(*argv: str, stdin: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    capsys.readouterr()
    assert vm_cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_escrow_is_read_from_the_disk_and_the_recovery_key_goes_to_one_start(
    encrypted: VmSpec, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    qemu.create(encrypted)
    with pytest.raises(VmError, match="has no encrypted data disk yet"):
        data_disk.escrow(encrypted)
    used(encrypted, keys)
    shown = command("escrow", "ws-t", stdin="", monkeypatch=monkeypatch, capsys=capsys)
    key = recovery.unseal(msgspec.convert(shown, recovery.Escrow), keys[0].read_bytes())
    assert key == KEY
    assert command("unlock", "ws-t", stdin=KEY + "\n", monkeypatch=monkeypatch, capsys=capsys)["changed"]
    waiting = encrypted.directory / data_disk.ONE_START
    assert stat.S_IMODE(waiting.stat().st_mode) == 0o600
    assert credentials(encrypted)[ONCE] == KEY
    data_disk.started(encrypted)
    assert not waiting.exists()
    assert ONCE not in credentials(encrypted)


def test_the_recovery_key_is_gone_from_the_hypervisor_once_the_guest_runs(
    encrypted: VmSpec, keys: tuple[Path, Path], hypervisor: Path
) -> None:
    qemu.create(encrypted)
    used(encrypted, keys)
    data_disk.unlock(encrypted, KEY)
    machine = hypervisor / "tools/qemu-system-x86_64"
    console, kept = encrypted.directory / "console.log", qemu.credential_file(encrypted, ONCE)
    script = f"""#!/bin/sh
[ -e {kept} ] || exit 9
echo boot >{console}
for i in $(seq 600); do [ -e {kept} ] || exec test ! -e {encrypted.directory / data_disk.ONE_START}; sleep 0.1; done
exit 8
"""
    subprocess.run(["install", "-m", "755", "/dev/stdin", machine], check=True, text=True, input=script)
    offline = msgspec.structs.replace(encrypted, network=False, accel="tcg")
    assert qemu.execute(offline) == 0
    encoded = base64.b64encode(KEY.encode())
    for folder in (encrypted.directory, encrypted.runtime):
        for path in folder.rglob("*"):
            assert not path.is_file() or not {KEY.encode(), encoded} & set(path.read_bytes().split(b"=")), path


@pytest.mark.parametrize("machine", ["#!/bin/sh\nexit 1\n", None], ids=["it ended at once", "there is none"])
def test_a_start_that_never_ran_leaves_the_recovery_key_for_the_next_one(
    encrypted: VmSpec, keys: tuple[Path, Path], hypervisor: Path, machine: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu.create(encrypted)
    used(encrypted, keys)
    data_disk.unlock(encrypted, KEY)
    offline = msgspec.structs.replace(encrypted, network=False, accel="tcg")
    seen: list[bool] = []
    real = qemu.command_line
    monkeypatch.setattr(
        qemu,
        "command_line",
        lambda *args: (real(*args), seen.append(qemu.credential_file(encrypted, ONCE).exists()))[0],
    )
    if machine:
        place = hypervisor / "tools/qemu-system-x86_64"
        subprocess.run(["install", "-m", "755", "/dev/stdin", place], check=True, text=True, input=machine)
        assert qemu.execute(offline) == 1
    else:
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(FileNotFoundError):
            qemu.execute(offline)
    assert seen == [True]
    assert not qemu.credential_file(encrypted, ONCE).exists()
    assert credentials(encrypted)[ONCE] == KEY


def test_a_start_that_said_something_and_ended_has_used_the_recovery_key_up(
    encrypted: VmSpec, keys: tuple[Path, Path], hypervisor: Path
) -> None:
    qemu.create(encrypted)
    used(encrypted, keys)
    data_disk.unlock(encrypted, KEY)
    script = f"#!/bin/sh\necho boot >{encrypted.directory / 'console.log'}\n"
    place = hypervisor / "tools/qemu-system-x86_64"
    subprocess.run(["install", "-m", "755", "/dev/stdin", place], check=True, text=True, input=script)
    assert qemu.execute(msgspec.structs.replace(encrypted, network=False, accel="tcg")) == 0
    assert ONCE not in credentials(encrypted)


@pytest.mark.parametrize("key", ["", "short", KEY.upper(), KEY + "0"])
def test_what_is_no_recovery_key_is_not_kept(encrypted: VmSpec, keys: tuple[Path, Path], key: str) -> None:
    qemu.create(encrypted)
    used(encrypted, keys)
    with pytest.raises(VmError, match="no recovery key"):
        data_disk.unlock(encrypted, key)
    assert not (encrypted.directory / data_disk.ONE_START).exists()


def test_a_plain_disk_has_no_escrow_and_takes_no_key(make_spec: Make) -> None:
    plain = make_spec(tpm=True)
    qemu.create(plain)
    for act in (data_disk.escrow, lambda spec: data_disk.unlock(spec, KEY)):
        with pytest.raises(VmError, match=r"has no encrypted data disk \(nothing"):
            act(plain)


def test_destroying_erases_the_key_slots_first_and_keeps_the_evidence(
    encrypted: VmSpec, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    qemu.create(encrypted)
    disk = used(encrypted, keys)
    seen: list[luks2.Header | None] = []
    real = qemu.network_down
    monkeypatch.setattr(qemu, "network_down", lambda spec: (seen.append(luks2.read_header(disk)), real(spec)))
    answer = command("destroy", "ws-t", stdin="", monkeypatch=monkeypatch, capsys=capsys)
    assert seen == [None], "nothing was removed yet"
    found = answer["erased"]
    assert (found["format"], found["workspace"], found["erased"]["uuid"]) == ("saw-erasure/1", "ws-t", luks2_parts.UUID)
    assert (
        found["erased"]["overwritten"]
        == found["erased"]["read_back"]
        == found["erased"]["extent"]
        == 2 * luks2_parts.OFFSET
    )
    assert (found["state"], found["erased"]["kind"]) == ("erased", "luks2-header")
    assert found["erased"]["keyslots"] == ["0", "1"]
    place = data_disk.evidence_of(encrypted)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert msgspec.json.decode(place.read_bytes(), type=data_disk.Erasure).workspace == "ws-t"
    assert not encrypted.directory.exists()


def test_a_disk_that_cannot_be_erased_is_not_removed(
    encrypted: VmSpec, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu.create(encrypted)
    used(encrypted, keys)
    monkeypatch.setattr(luks2.os, "pwrite", lambda _disk, data, _at: len(data))
    with pytest.raises(luks2.DataDiskError, match="does not read back"):
        qemu.destroy(encrypted)
    assert (encrypted.directory / "data.img").exists()
    assert kept(encrypted).state == "erasing"


def kept(spec: VmSpec) -> data_disk.Erasure:
    return msgspec.json.decode(data_disk.evidence_of(spec).read_bytes(), type=data_disk.Erasure)


@pytest.mark.parametrize("cut", ["before the first byte", "behind the first pieces", "before the reading back"])
def test_an_erasure_that_was_cut_off_is_known_and_the_next_one_goes_on(
    encrypted: VmSpec, keys: tuple[Path, Path], cut: str
) -> None:
    qemu.create(encrypted)
    disk = used(encrypted, keys)
    left = {"before the first byte": 0, "behind the first pieces": 3, "before the reading back": 4}[cut]
    calls, real = itertools.count(), luks2.os.pwrite

    def killed(*args: Any) -> int:
        if next(calls) >= left:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(luks2.os, "pwrite", killed)
        if cut == "before the reading back":
            patch.setattr(luks2, "_zeros", lambda *_: killed())
        with pytest.raises(KeyboardInterrupt):
            qemu.destroy(encrypted)
    begun = kept(encrypted)
    assert (begun.state, begun.erased.uuid, begun.erased.overwritten, begun.erased.read_back) == (
        "erasing", luks2_parts.UUID, 0, 0,
    )  # fmt: skip
    assert (luks2.read_header(disk) is None) is (left > 0)
    done = data_disk.erase(encrypted)
    assert done is not None
    assert kept(encrypted) == done
    assert (done.state, done.erased.kind, done.erased.uuid, done.erased.keyslots) == (
        "erased", "luks2-header", luks2_parts.UUID, ("0", "1"),
    )  # fmt: skip
    assert done.erased.overwritten == done.erased.read_back == begun.erased.extent
    assert disk.read_bytes() == bytes(2 * luks2_parts.OFFSET)
    assert data_disk.erase(encrypted) == done, "what was finished stays as it was written down"


def test_an_encrypted_disk_without_a_readable_header_loses_the_place_of_its_key_slots(encrypted: VmSpec) -> None:
    qemu.create(encrypted)
    disk = encrypted.directory / "data.img"
    mib = 1024 * 1024
    disk.write_bytes(b"K" * 20 * mib)
    done = data_disk.erase(encrypted)
    assert done is not None
    assert (done.erased.kind, done.erased.uuid, done.erased.read_back) == ("luks2-unreadable", "", 16 * mib)
    assert disk.read_bytes() == bytes(16 * mib) + b"K" * 4 * mib
    disk.write_bytes(b"K" * 20 * mib)
    assert data_disk.erase(encrypted) is not None
    assert luks2.zeros(disk, 16 * mib), "an old record is no evidence about other bytes"


def test_a_plain_disk_is_removed_without_evidence(make_spec: Make) -> None:
    plain = make_spec(tpm=True)
    qemu.create(plain)
    before = (plain.directory / "data.img").read_bytes()
    assert data_disk.erase(plain) is None
    assert (plain.directory / "data.img").read_bytes() == before
    assert qemu.destroy(plain)
    assert data_disk.evidence(plain) == {}
