"""What is done to a data disk at a start: made when blank, opened when ours, refused otherwise; and where keys are seen.

The programs at the far end are small ones that note how they were called; a real volume is made and opened on a booted image
(tests/integration/vm/test_data_disk_boots.py).
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from saw.cli import data_disk as cli
from saw.datadisk import config as told
from saw.datadisk import recovery, volume
from saw.datadisk.config import DataDiskConfig
from saw.datadisk.errors import DataDiskError, DataDiskLocked, DataDiskRefused
from saw.errors import ConfigError

TOOL = """#!{python} -IS
import json, os, pathlib, sys
home = pathlib.Path({home!r})
name, rest = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
call = {{"argv": [name, *rest], "stdin": sys.stdin.read(), "env": sorted(os.environ)}}
for word in rest:
    if word.startswith("--unlock-key-file="):
        file = pathlib.Path(word.partition("=")[2])
        call["file"] = [file.read_text(), oct(file.stat().st_mode & 0o777), oct(file.parent.stat().st_mode & 0o777)]
with (home / "calls").open("a") as log:
    log.write(json.dumps(call) + "\\n")
says = json.loads((home / "says").read_text())
for said in says:
    if " ".join([name, *rest]).startswith(said[0]):
        print(said[2])
        sys.exit(said[1])
open_ = home / "mapper/saw-home"
if (name, rest[:1]) == ("systemd-cryptsetup", ["attach"]) or (name, rest[:1]) == ("cryptsetup", ["open"]):
    open_.touch()
if (name, rest[:1]) == ("systemd-cryptsetup", ["detach"]):
    open_.unlink(missing_ok=True)
"""
TOOLS = ("blkid", "cryptsetup", "fsck.ext4", "mkfs.ext4", "systemd-cryptenroll", "systemd-cryptsetup", "udevadm")
OURS = "DEVNAME=d\nLABEL=saw-home\nVERSION=2\nTYPE=crypto_LUKS"


class Rig:
    """A machine with a disk of 4 MiB."""

    def __init__(self, home: Path, keys: tuple[Path, Path]) -> None:
        self.home, self.keys = home, keys
        self.disk = home / "disk"
        with self.disk.open("wb") as stream:
            stream.truncate(4 * 1024 * 1024)
        (home / "mapper").mkdir()
        self.config = DataDiskConfig(str(self.disk), (7,), keys[1].read_text(), "any")
        self.says()

    def says(self, *answers: tuple[str, int, str]) -> None:
        """Have calls that begin so end so; others succeed and say nothing, but blkid finds nothing."""
        (self.home / "says").write_text(json.dumps([*answers, ("blkid", 2, "")]))

    def open(self, once: str = "", **changes: Any) -> volume.Opened:
        return volume.open_disk(msgspec.structs.replace(self.config, **changes), once, mapper=self.home / "mapper")

    def calls(self) -> list[dict[str, Any]]:
        log = self.home / "calls"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def names(self) -> list[str]:
        return [" ".join(one["argv"][:2]) for one in self.calls()]

    @property
    def is_open(self) -> bool:
        return (self.home / "mapper/saw-home").exists()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return recovery.make_keys(tmp_path_factory.mktemp("keys"), "disks")


@pytest.fixture
def rig(tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Rig:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).write_text(TOOL.format(python=sys.executable, home=str(tmp_path)))
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("PASSWORD", "guessed")
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setattr(volume, "RUNTIME", tmp_path / "run")
    monkeypatch.setattr(volume, "EFI_SECURE_BOOT", tmp_path / "SecureBoot")
    return Rig(tmp_path, keys)


def test_a_blank_disk_becomes_a_volume_whose_final_label_comes_last(rig: Rig) -> None:
    assert rig.open() == volume.Opened(True, str(rig.disk), True, "tpm")
    assert rig.is_open
    assert rig.names() == [
        "udevadm wait", "blkid -p", "cryptsetup luksFormat", "cryptsetup token",
        f"systemd-cryptenroll --unlock-key-file={rig.calls()[4]['argv'][1].partition('=')[2]}",
        "systemd-cryptsetup attach", "mkfs.ext4 -q", "cryptsetup config",
    ]  # fmt: skip
    made, labelled = rig.calls()[2]["argv"], rig.calls()[-1]["argv"]
    assert made[made.index("--label") + 1] == "saw-home-unfinished"
    assert labelled == ["cryptsetup", "config", str(rig.disk), "--label", "saw-home"]
    assert "--tpm2-pcrs=7" in rig.calls()[4]["argv"]
    assert rig.calls()[5]["argv"][-1] == "tpm2-device=auto,headless=true,tries=1,discard"


def test_the_recovery_key_is_on_no_command_line_and_in_no_environment_and_is_sealed_for_the_operator(rig: Rig) -> None:
    rig.open()
    made, token, enrolled = rig.calls()[2:5]
    key, name = made["stdin"], made["argv"][made["argv"].index("--uuid") + 1]
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    escrow = recovery.escrow_of(name, {"0": json.loads(token["stdin"])})
    assert recovery.unseal(escrow, rig.keys[0].read_bytes()) == key
    assert enrolled["file"] == [key, "0o600", "0o700"]
    assert all(key not in " ".join(one["argv"]) for one in rig.calls())
    assert {name for one in rig.calls() for name in one["env"]} <= {"PATH", "LC_ALL", "LC_CTYPE"}
    assert list((rig.home / "run").iterdir()) == []


def test_each_disk_gets_a_key_of_its_own(rig: Rig) -> None:
    rig.open()
    volume.close()
    rig.open()
    first, second = (one for one in rig.calls() if one["argv"][1] == "luksFormat")
    assert first["stdin"] != second["stdin"]


def test_a_volume_whose_making_was_cut_off_is_made_anew_and_ours_is_opened(rig: Rig) -> None:
    rig.says(("blkid", 0, OURS + "\nLABEL=saw-home-unfinished"))
    assert rig.open().made
    volume.close()
    rig.says(("blkid", 0, OURS))
    before = len(rig.calls())
    assert rig.open() == volume.Opened(True, str(rig.disk), False, "tpm")
    assert rig.names()[before:] == ["udevadm wait", "blkid -p", "systemd-cryptsetup attach", "fsck.ext4 -p"]
    assert rig.open() == volume.Opened(False, str(rig.disk), False, "nothing")


FOREIGN = {
    "ext4": (0, "LABEL=saw-home\nTYPE=ext4", "holds ext4 labelled 'saw-home'"),
    "a partition table": (0, "PTTYPE=gpt", "holds gpt "),
    "another volume": (0, "LABEL=data\nVERSION=2\nTYPE=crypto_LUKS", "holds crypto_LUKS labelled 'data'"),
    "an old volume": (0, "LABEL=saw-home\nVERSION=1\nTYPE=crypto_LUKS", "holds crypto_LUKS"),
    "two things": (8, "", "more than one thing"),
    "a failed look": (4, "", "nothing that can be read"),
}


@pytest.mark.parametrize("what", sorted(FOREIGN))
def test_a_disk_with_anything_else_is_refused_and_not_touched(rig: Rig, what: str) -> None:
    code, text, words = FOREIGN[what]
    rig.says(("blkid", code, text))
    with pytest.raises(DataDiskRefused, match=words):
        rig.open()
    assert rig.names() == ["udevadm wait", "blkid -p"]


MIB = 1024 * 1024


@pytest.mark.parametrize("holes", [True, False], ids=["the device names its holes", "the device names none"])
@pytest.mark.parametrize("at", [0, MIB - 1, 3 * MIB, 16 * MIB, 32 * MIB - 1])
def test_a_disk_with_unknown_bytes_anywhere_is_not_blank(
    rig: Rig, at: int, holes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not holes:
        monkeypatch.setattr(volume.os, "SEEK_DATA", 99)
    with rig.disk.open("r+b") as stream:
        stream.truncate(32 * MIB)
        assert volume.blank(rig.disk)
        stream.seek(at)
        stream.write(b"x")
    with pytest.raises(DataDiskRefused, match="is not blank"):
        rig.open()
    assert "cryptsetup luksFormat" not in rig.names()


def test_a_volume_whose_header_was_lost_is_not_formatted_over_and_holes_are_not_read(rig: Rig) -> None:
    with rig.disk.open("r+b") as stream:
        stream.write(bytes(MIB))
        stream.truncate(2**40)
        assert volume.blank(rig.disk)
        stream.seek(16 * MIB)
        stream.write(b"sealed")
    with pytest.raises(DataDiskRefused, match=r"is not blank.*docs/data-disk.md"):
        rig.open()
    assert rig.names() == ["udevadm wait", "blkid -p"]


def test_a_program_is_found_among_those_that_systemd_counts_as_its_own(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (tmp_path / "tools/systemd-cryptsetup").rename(own / "systemd-cryptsetup")
    monkeypatch.setattr(volume, "INTERNAL", "/nowhere")
    with pytest.raises(DataDiskError, match="systemd-cryptsetup is not installed"):
        rig.open()
    monkeypatch.setattr(volume, "INTERNAL", str(own))
    assert rig.open().made


@pytest.mark.parametrize("step", ["cryptsetup luksFormat", "cryptsetup token", "systemd-cryptenroll", "mkfs.ext4"])
def test_a_step_that_fails_leaves_nothing_open_and_no_final_label(rig: Rig, step: str) -> None:
    rig.says((step, 1, "it broke"))
    with pytest.raises(DataDiskError, match="it broke"):
        rig.open()
    assert not rig.is_open
    assert "cryptsetup config" not in rig.names()


def test_what_the_tpm_does_not_open_stays_locked_and_names_the_way_back(rig: Rig) -> None:
    rig.says(("blkid", 0, OURS), ("systemd-cryptsetup attach", 1, "Failed to unseal"))
    with pytest.raises(DataDiskLocked, match=r"Failed to unseal.*data_disk_recover") as error:
        rig.open()
    assert error.value.code == "data_disk_locked"
    assert not rig.is_open
    assert "cryptsetup open" not in rig.names()


def test_the_recovery_key_of_one_start_opens_it_and_seals_it_anew(rig: Rig) -> None:
    key = "ab" * 32
    rig.says(("blkid", 0, OURS), ("systemd-cryptsetup attach", 1, "no"))
    assert rig.open(key).opened_by == "recovery"
    opened, wiped, enrolled = rig.calls()[3:6]
    assert opened["argv"][:2] == ["cryptsetup", "open"]
    assert opened["stdin"] == key
    assert wiped["argv"] == ["systemd-cryptenroll", "--wipe-slot=tpm2", str(rig.disk)]
    assert enrolled["file"][0] == key
    assert all(key not in " ".join(one["argv"]) for one in rig.calls())


def test_a_recovery_key_is_not_used_where_the_tpm_opens_the_disk_nor_when_it_is_another(rig: Rig) -> None:
    rig.says(("blkid", 0, OURS))
    assert rig.open("ab" * 32).opened_by == "tpm"
    assert "cryptsetup open" not in rig.names()
    volume.close()
    rig.says(("blkid", 0, OURS), ("systemd-cryptsetup attach", 1, "no"), ("cryptsetup open", 2, "No key available"))
    with pytest.raises(DataDiskLocked, match="recovery key does not open"):
        rig.open("ab" * 32)
    rig.says(("blkid", 0, OURS), ("systemd-cryptsetup attach", 1, "no"), ("systemd-cryptenroll", 1, "no TPM"))
    with pytest.raises(DataDiskError, match="no TPM"):
        rig.open("ab" * 32)
    assert not rig.is_open


@pytest.mark.parametrize(("code", "good"), [(0, True), (1, True), (2, True), (4, False), (8, False)])
def test_a_file_system_that_fsck_cannot_mend_is_not_mounted(rig: Rig, code: int, good: bool) -> None:
    rig.says(("blkid", 0, OURS), ("fsck.ext4", code, "inode 12"))
    if good:
        assert rig.open().changed
    else:
        with pytest.raises(DataDiskError, match="needs a person: inode 12"):
            rig.open()
    assert rig.is_open is good


@pytest.mark.parametrize(
    ("state", "good"), [(b"\6\0\0\0\1", True), (b"\6\0\0\0\0", False), (b"", False), (None, False)]
)
def test_where_secure_boot_is_required_nothing_is_made_or_opened_without_it(
    rig: Rig, state: bytes | None, good: bool
) -> None:
    if state is not None:
        volume.EFI_SECURE_BOOT.write_bytes(state)
    if good:
        assert rig.open(secure_boot="required").changed
        return
    for found in (("blkid", 2, ""), ("blkid", 0, OURS)):
        rig.says(found)
        with pytest.raises(DataDiskLocked, match="secure boot is off"):
            rig.open(secure_boot="required")
    assert set(rig.names()) == {"udevadm wait"}


def test_without_trim_no_freed_block_is_told_to_the_disk(rig: Rig) -> None:
    rig.open(trim=False)
    assert not any("discard" in word for one in rig.calls() for word in one["argv"])


def test_the_credential_comes_before_the_file_and_neither_may_be_doubtful(rig: Rig, tmp_path: Path) -> None:
    file, folder = tmp_path / "data-disk.json", tmp_path / "credentials"
    folder.mkdir()
    pem = rig.keys[1].read_text()
    file.write_text('{"device": "/dev/disk/by-id/nvme-data"}')
    environ = {"CREDENTIALS_DIRECTORY": str(folder)}
    with pytest.raises(ConfigError, match="no public key"):
        told.read_config(file, environ)
    (folder / told.CREDENTIAL).write_text(json.dumps({"recovery_key": pem, "secure_boot": "any"}))
    assert told.read_config(file, environ) == (
        DataDiskConfig("/dev/disk/by-id/nvme-data", (7,), pem, "any", trim=True), ""
    )  # fmt: skip
    (folder / told.ONCE).write_text("ab" * 32 + "\n")
    assert told.read_config(file, environ)[1] == "ab" * 32
    (folder / told.ONCE).write_text("short")
    with pytest.raises(ConfigError, match="no recovery key"):
        told.read_config(file, environ)
    (folder / told.ONCE).unlink()
    (folder / told.CREDENTIAL).write_text('{"recovery_key": "", "more": 1}')
    with pytest.raises(ConfigError, match=r"credential saw\.data-disk is not valid"):
        told.read_config(file, environ)


@pytest.mark.parametrize(
    "text",
    [
        '{"device": "/dev/nvme1n1"}', '{"device": "/dev/disk/by-id/a b"}', '{"device": "/dev/disk/by-id/../../sda"}',
        '{"device": "/dev/disk/by-id/a", "pcrs": []}', '{"device": "/dev/disk/by-id/a", "pcrs": [16]}',
        '{"device": "/dev/disk/by-id/a", "secure_boot": "off"}', '{"device": "/dev/disk/by-id/a", "more": 1}', "{}",
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_meant_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "data-disk.json"
    file.write_text(text)
    with pytest.raises(ConfigError):
        cli.main(["check-config", str(file)])
    file.write_text('{"device": "/dev/disk/by-id/nvme-data", "pcrs": [7]}')
    assert cli.main(["check-config", str(file)]) == 0
