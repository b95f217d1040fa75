"""Debian's cryptsetup, systemd-cryptenroll and a virtual TPM do with a data disk what the code means them to do.

They run in a base tree, on a file: there is no device mapper here, so an attachment stands for the TPM giving the key out, and no
file system is made. A booted image does all of it in test_data_disk_boots.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from saw.datadisk import luks2, recovery, volume
from saw.datadisk.config import DataDiskConfig
from saw.datadisk.errors import DataDiskLocked, DataDiskRefused

ROOT = Path(__file__).resolve().parents[3]
TARS = sorted((ROOT / "build/cache").glob("base-*.tar"), key=lambda path: path.stat().st_mtime)
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="runs programs in another root"),
    pytest.mark.skipif(not TARS, reason="no base tree in build/cache: run `make workspace` once"),
]
STARTED = {7: "owner", 4: "image", 11: "image"}
"""What a start measures into which register; another value for a register stands for another start."""
PATIENCE = 60.0


class Machine:
    """A base tree with a disk (a file), and virtual TPMs by name."""

    def __init__(self, root: Path, keys: tuple[Path, Path], mapper: Path) -> None:
        self.root, self.keys, self.mapper = root, keys, mapper
        self.disk = root / "disk"
        with self.disk.open("wb") as stream:
            stream.truncate(64 * 1024 * 1024)
        self.config = DataDiskConfig(str(self.disk), (7,), keys[1].read_text(), "any")

    def start(self, tpm: str = "mine", once: str = "", **measured: str) -> volume.Opened:
        """Start the machine with a TPM, with ``r7``, ``r4`` and ``r11`` as what it measures, and have it open its disk."""
        (self.mapper / volume.NAME).unlink(missing_ok=True)
        with self.running(tpm, STARTED | {int(name[1:]): value for name, value in measured.items()}):
            return volume.open_disk(self.config, once, mapper=self.mapper)

    @contextmanager
    def running(self, tpm: str, measured: dict[int, str]) -> Iterator[None]:
        state, sock = self.root.parent / f"tpm-{tpm}", self.root / "tpm.sock"
        state.mkdir(exist_ok=True)
        control = Path(f"{sock}.ctrl")
        process = subprocess.Popen(
            ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--server", f"type=unixio,path={sock}",
             "--ctrl", f"type=unixio,path={control}", "--flags", "not-need-init,startup-clear"],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + PATIENCE
            while not (sock.exists() and control.exists()):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            for register, value in measured.items():
                extend = f"{register}:sha256={hashlib.sha256(value.encode()).hexdigest()}"
                subprocess.run(["tpm2_pcrextend", "-T", f"swtpm:path={sock}", extend], check=True)
            yield
        finally:
            process.kill()
            process.wait(PATIENCE)
            sock.unlink(missing_ok=True)
            control.unlink(missing_ok=True)

    def call(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program as :mod:`saw.datadisk.volume` does, in the tree and with the virtual TPM."""
        if argv[0] in {"udevadm", "mkfs.ext4", "fsck.ext4"} or argv[1] == "detach":
            return subprocess.CompletedProcess(argv, 0, "", "")
        opens = argv[:2] in {("systemd-cryptsetup", "attach"), ("cryptsetup", "open")}
        if argv[0] == "systemd-cryptsetup":
            argv = ("systemd-cryptenroll", "--unlock-tpm2-device=auto", "--recovery-key", argv[3])
        elif opens:
            argv = ("cryptsetup", "open", "--test-passphrase", "--key-file=-", argv[-2])
        words = [
            word.replace(f"{self.root}/", "/").replace("device=auto", "device=swtpm:path=/tpm.sock") for word in argv
        ]
        script = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(self.root), *words],
            input=stdin, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if opens and done.returncode == 0:
            (self.mapper / volume.NAME).touch()
        return done


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return recovery.make_keys(tmp_path_factory.mktemp("keys"), "disks")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("tree")
    root = place / "root"
    root.mkdir()
    left_out = [f"--exclude=./{name}" for name in ("boot", "usr/lib/modules", "usr/share", "var/lib/apt")]
    for tar in reversed(TARS):
        with tarfile.open(tar) as archive:
            names = {member.name for member in archive}
        if "./usr/bin/systemd-cryptsetup" in names:
            subprocess.run(["tar", "-xf", tar, "-C", root, *left_out], check=True)
            break
    else:
        pytest.skip("the base trees in build/cache are older than their lists of packages")
    yield root
    shutil.rmtree(place)


@pytest.fixture
def machine(tree: Path, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tree, keys, tmp_path)
    for left in tree.parent.glob("tpm-*"):
        shutil.rmtree(left)
    monkeypatch.setattr(volume, "_call", made.call)
    monkeypatch.setattr(volume, "RUNTIME", tree / "run")
    return made


def test_a_rebuild_opens_the_disk_and_another_owner_or_another_tpm_does_not(machine: Machine) -> None:
    assert machine.start() == volume.Opened(True, str(machine.disk), True, "tpm")
    assert machine.start() == volume.Opened(True, str(machine.disk), False, "tpm")
    assert machine.start(r4="another image", r11="another image").opened_by == "tpm"
    for refused in ({"r7": "another owner"}, {"tpm": "another"}):
        with pytest.raises(DataDiskLocked, match=r"does not open the data disk.*data_disk_recover"):
            machine.start(**refused)
        assert not (machine.mapper / volume.NAME).exists()
    assert machine.start().opened_by == "tpm"


def test_the_header_is_read_by_our_code_and_holds_the_recovery_key_for_the_operator(
    machine: Machine, tmp_path: Path
) -> None:
    machine.start()
    header = luks2.read_header(machine.disk)
    assert header is not None
    assert (header.label, header.data_offset) == ("saw-home", 16 * 1024 * 1024)
    assert {one["type"] for one in header.tokens.values()} >= {"saw-recovery", "systemd-tpm2"}
    sealed = next(one for one in header.tokens.values() if one["type"] == "systemd-tpm2")
    assert (sealed["tpm2-pcrs"], sealed["tpm2-pcr-bank"]) == ([7], "sha256")
    escrow = tmp_path / "escrow.json"
    escrow.write_bytes(msgspec.json.encode(recovery.escrow_of(header.uuid, header.tokens)))
    printed = subprocess.run(  # into a pipe, as docs/data-disk.md says
        [sys.executable, "-m", "saw.cli.main", "data-disk", "recovery-key", "--escrow", escrow, "--key", machine.keys[0]],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    key = printed.stdout
    test = ("cryptsetup", "open", "--key-file=-", str(machine.disk), volume.NAME)
    assert machine.call(*test, stdin=key).returncode == 0
    assert machine.call(*test, stdin=key + "\n").returncode == 2
    assert machine.call(*test, stdin="0" * 64).returncode == 2
    assert key.encode() not in machine.disk.read_bytes()


def test_the_recovery_key_seals_the_disk_to_what_runs_now_and_the_former_state_is_out(machine: Machine) -> None:
    machine.start()
    header = luks2.read_header(machine.disk)
    assert header is not None
    key = recovery.unseal(recovery.escrow_of(header.uuid, header.tokens), machine.keys[0].read_bytes())
    with pytest.raises(DataDiskLocked, match="recovery key does not open"):
        machine.start("another", once="0" * 64)
    assert machine.start("another", once=key).opened_by == "recovery"
    assert machine.start("another").opened_by == "tpm"
    with pytest.raises(DataDiskLocked):
        machine.start()
    after = luks2.read_header(machine.disk)
    assert after is not None
    assert sum(one["type"] == "systemd-tpm2" for one in after.tokens.values()) == 1
    assert recovery.escrow_of(after.uuid, after.tokens) == recovery.escrow_of(header.uuid, header.tokens)


def test_a_making_that_was_cut_off_is_made_anew_and_a_finished_volume_never(machine: Machine) -> None:
    machine.start()
    first = luks2.read_header(machine.disk)
    machine.call("cryptsetup", "config", str(machine.disk), "--label", volume.UNFINISHED)
    assert machine.start().made
    second = luks2.read_header(machine.disk)
    assert first is not None
    assert second is not None
    assert first.uuid != second.uuid
    machine.call("cryptsetup", "config", str(machine.disk), "--label", "somebody-elses")
    with pytest.raises(DataDiskRefused, match="holds crypto_LUKS labelled 'somebody-elses'"):
        machine.start()
    kept = luks2.read_header(machine.disk)
    assert kept is not None
    assert kept.uuid == second.uuid


@pytest.mark.parametrize("make", [("mkfs.ext4", "-q", "-F"), ("mkswap",), ("sfdisk", "-q")])
def test_what_others_put_on_a_disk_is_refused_and_stays(machine: Machine, make: tuple[str, ...]) -> None:
    table = "label: gpt\n" if make[0] == "sfdisk" else ""
    subprocess.run([*make, machine.disk], input=table, capture_output=True, text=True, check=True)
    before = hashlib.sha256(machine.disk.read_bytes()).hexdigest()
    with pytest.raises(DataDiskRefused, match="is not formatted over"):
        machine.start()
    assert hashlib.sha256(machine.disk.read_bytes()).hexdigest() == before


def test_an_erased_disk_opens_for_nobody(machine: Machine) -> None:
    machine.start()
    header = luks2.read_header(machine.disk)
    assert header is not None
    key = recovery.unseal(recovery.escrow_of(header.uuid, header.tokens), machine.keys[0].read_bytes())
    planned = luks2.plan(machine.disk)
    assert planned is not None
    found = luks2.erase(machine.disk, planned)
    assert (found.uuid, found.overwritten, found.read_back) == (header.uuid, header.data_offset, header.data_offset)
    assert (
        machine.call("cryptsetup", "open", "--key-file", "-", str(machine.disk), volume.NAME, stdin=key).returncode != 0
    )
