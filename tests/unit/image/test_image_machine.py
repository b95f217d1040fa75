"""The source qemu: what the machine gets, that it ends with the build, and that its disk becomes the tree it holds."""

from __future__ import annotations

import os
import re
import signal
import stat
import struct
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from saw.errors import SawError
from saw.image import build as image_build
from saw.image import machine
from saw.image.compare_disk import partitions
from saw.image.disk import MIB, ImageError, lay_out
from saw.image.ext4 import Ext4
from saw.image.machine import Machine, prepare, provision, source_of, take_over
from saw.image.settle import EXT4_ENVIRONMENT
from saw.image.unpack import unpack_disk
from saw.lab.nspawn import LabNetwork, LightHost
from saw.lab.process import wait_for
from saw.vm.accel import Acceleration

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners, device nodes and namespaces need root")
ROOT = Path(__file__).resolve().parents[3]
OLD_NS = 1_600_000_000 * 10**9
BOUND_S = 120.0


def tree(root: Path) -> Path:
    """A tree with one of each kind of thing that a disk can hold."""
    (root / "etc/deep").mkdir(parents=True)
    (root / "boot").mkdir()
    (root / "boot/vmlinuz-6.12.1").write_bytes(b"kernel")
    (root / "etc/file").write_bytes(b"words\n")
    (root / "etc/empty").touch()
    (root / "etc/large").write_bytes(b"x" * 5000 + bytes(300_000) + b"y")
    os.link(root / "etc/large", root / "etc/deep/twin")
    (root / "etc/link").symlink_to("deep/twin")
    (root / "etc/out").symlink_to("/" + "far/" * 30)
    (root / "etc/program").write_bytes(b"#!")
    os.chown(root / "etc/program", 70_000, 8)
    (root / "etc/program").chmod(0o4751)
    os.setxattr(root / "etc/program", "user.note", b"\0\1")
    os.setxattr(root / "etc/deep", "user.folder", b"yes")
    os.mkfifo(root / "etc/pipe", 0o620)
    (root / os.fsdecode(b"etc/\xff\\x2d")).write_text("no UTF-8")
    (root / "etc/deep").chmod(0o1777)
    for path in (root / "etc/file", root / "etc/link", root / "etc/deep"):
        os.utime(path, ns=(OLD_NS, OLD_NS), follow_symlinks=False)
    return root


def disk_of(root: Path, folder: Path, *changes: str) -> Path:
    """A disk with ``root``, and with ``changes`` made to its file system by debugfs."""
    control, ext4, disk = folder / "control.img", folder / "root.img", folder / "disk.raw"
    control.write_bytes(bytes(MIB))
    with ext4.open("wb") as stream:
        stream.truncate(24 * MIB)
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", root, ext4],
        check=True,
        env={**os.environ, **EXT4_ENVIRONMENT},
    )
    for change in changes:
        subprocess.run(["debugfs", "-w", "-R", change, ext4], check=True, capture_output=True)
    lay_out(disk, control, ext4, str(uuid.uuid4()), str(uuid.uuid4()))
    return disk


def seen(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything about every path below ``root`` that an image has; times in seconds, as mkfs.ext4 takes them over."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            names = os.listxattr(path, follow_symlinks=False)
            holds = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
            links = 0 if path.is_dir() else status.st_nlink
            found[str(path.relative_to(root))] = (
                oct(status.st_mode), status.st_uid, status.st_gid, links, int(status.st_mtime), holds,
                {name: os.getxattr(path, name, follow_symlinks=False) for name in names}, status.st_rdev,
            )  # fmt: skip
    return found


def test_a_disk_becomes_the_tree_that_it_was_made_of(tmp_path: Path) -> None:
    made = tree(tmp_path / "made")
    disk = disk_of(made, tmp_path)
    root = tmp_path / "root"
    count = take_over(disk, root)
    read = seen(root)
    assert read.pop("lost+found")[0] == "0o40700"
    assert read == seen(made)
    assert count == len(read) + 2, "the root and lost+found"
    assert (root / "etc/large").stat().st_ino == (root / "etc/deep/twin").stat().st_ino
    assert not list(tmp_path.glob(".unpack-*"))


def test_a_tree_out_of_a_disk_makes_the_same_file_system_as_the_one_that_went_in(tmp_path: Path) -> None:
    """Zeros are written, not left out: how much mkfs.ext4 wrote stands in the superblock."""
    made = tree(tmp_path / "made")
    take_over(disk_of(made, tmp_path), tmp_path / "root")
    (tmp_path / "root/lost+found").rmdir()
    fields = []
    for number, root in enumerate((made, tmp_path / "root")):
        image = tmp_path / f"{number}.img"
        with image.open("wb") as stream:
            stream.truncate(24 * MIB)
        run_mkfs = ["mkfs.ext4", "-q", "-F", "-U", "00000000-0000-0000-0000-000000000001", "-d", str(root), str(image)]
        subprocess.run(run_mkfs, check=True, env={**os.environ, **EXT4_ENVIRONMENT})
        told = Ext4(memoryview(image.read_bytes())).fields()
        fields.append({name: told[name] for name in ("free blocks", "free inodes", "kilobytes written")})
    assert fields[0] == fields[1]


def test_a_device_keeps_its_number(tmp_path: Path) -> None:
    made = tree(tmp_path / "made")
    try:
        os.mknod(made / "small", stat.S_IFCHR | 0o600, os.makedev(5, 1))
        os.mknod(made / "large", stat.S_IFBLK | 0o600, os.makedev(259, 70000))
    except PermissionError:
        pytest.skip("this machine lets nobody make device nodes")
    unpack_disk(disk_of(made, tmp_path), tmp_path / "root")
    numbers = [(tmp_path / "root" / name).lstat() for name in ("small", "large")]
    assert [(os.major(one.st_rdev), os.minor(one.st_rdev)) for one in numbers] == [(5, 1), (259, 70000)]
    assert [stat.S_IFMT(one.st_mode) for one in numbers] == [stat.S_IFCHR, stat.S_IFBLK]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("set_super_value state 0", "was not put down whole"),
        ("set_super_value state 3", "was not put down whole"),
        ("feature needs_recovery", "was not put down whole"),
        ("set_inode_field /etc/file flags 0x80010", "may not be changed or only grow"),
        ("set_inode_field /etc/file mode 0170644", "unknown type"),
    ],
)
def test_what_cannot_be_taken_over_as_it_is_is_refused(tmp_path: Path, change: str, words: str) -> None:
    disk = disk_of(tree(tmp_path / "made"), tmp_path, change)
    with pytest.raises(SawError, match=words):
        unpack_disk(disk, tmp_path / "root")


def test_an_access_control_list_is_refused(tmp_path: Path) -> None:
    made = tree(tmp_path / "made")
    entries = (
        (1, 6, -1),
        (2, 4, 7),
        (4, 4, -1),
        (16, 4, -1),
        (32, 4, -1),
    )  # acl(5): owner, user 7, group, mask, others
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(made / "etc/file", "system.posix_acl_access", value)
    except OSError as error:
        pytest.skip(f"no access control lists here: {error}")
    with pytest.raises(ImageError, match="/etc/file has an access control list"):
        unpack_disk(disk_of(made, tmp_path), tmp_path / "root")


def test_a_tree_is_never_mixed_with_another_one(tmp_path: Path) -> None:
    disk = disk_of(tree(tmp_path / "made"), tmp_path)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/etc").symlink_to(tmp_path)
    with pytest.raises(ImageError, match="is not empty"):
        take_over(disk, tmp_path / "root")
    assert not (tmp_path / "file").exists()


def test_a_disk_without_a_root_is_refused(tmp_path: Path) -> None:
    disk = disk_of(tree(tmp_path / "made"), tmp_path)
    raw = disk.read_bytes().replace("root".encode("utf-16-le"), "boot".encode("utf-16-le"))
    disk.write_bytes(raw)
    with pytest.raises(ImageError, match="has 0 partitions with the name root"):
        unpack_disk(disk, tmp_path / "root")


# --- the machine ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> LightHost:
    found = LightHost(
        "image", "10.93.9.10", tmp_path / "lab", LabNetwork("sawunit", "10.93.9"), booted=False, environment=("TZ=UTC",)
    )
    tree(found.root)
    return found


def prepared(host: LightHost, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> Machine:
    monkeypatch.setattr(machine, "SPARE_BYTES", 24 * MIB)
    monkeypatch.setattr(machine, "probe", lambda *_: Acceleration(name, "because", "" if name == "kvm" else "get KVM"))
    return prepare(host, folder / "machine", folder / "accel.json", said.append)


@pytest.mark.parametrize(("name", "processor"), [("kvm", "host"), ("tcg", "max")])
def test_the_machine_has_the_tree_and_what_its_first_process_needs(
    tmp_path: Path, host: LightHost, monkeypatch: pytest.MonkeyPatch, name: str, processor: str
) -> None:
    said: list[str] = []
    before = seen(host.root)
    made = prepared(host, tmp_path, name, monkeypatch, said)
    assert said == [f"  machine under {name}: because{'' if name == 'kvm' else ' (get KVM)'}"]
    assert not host.root.exists(), "one copy is enough"
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
    assert not (made.folder / "control").exists()
    values = made.variables()
    assert (values["machine_accelerator"], values["machine_cpu"]) == (name, processor)
    assert (values["machine_disk"], values["machine_disk_checksum"]) == (made.disk, "none")
    assert made.kernel.read_bytes() == b"kernel"
    identity = re.search(r"root=PARTUUID=(\S+)", made.command_line)
    table = subprocess.run(["sfdisk", "-l", "-o", "UUID", made.disk], check=True, capture_output=True, text=True).stdout
    assert identity is not None
    assert table.split()[-1].lower() == identity[1]
    raw = memoryview(made.disk.read_bytes())
    first = partitions(raw, made.disk)[1][0]
    control = Ext4(raw[first.start : first.start + first.size])
    files = {path: node for path, node in control.walk() if node.kind == "file"}
    text = {path: b"".join(control.content(node)) for path, node in files.items()}
    assert text["/init"] == machine.INIT.read_bytes()
    assert text["/environment"] == b"SYSTEMD_OFFLINE=1 TZ=UTC\n"
    assert text["/login"].startswith(b"ssh-ed25519 ")
    assert b"PRIVATE KEY" in text["/host"]
    assert stat.S_IMODE(files["/host"].mode) == 0o600
    take_over(made.disk, host.root)
    after = seen(host.root)
    del after["lost+found"]
    assert after == before


@pytest.mark.parametrize("kernels", [(), ("6.12.1", "6.12.2")])
def test_a_tree_without_the_one_kernel_makes_no_machine(
    tmp_path: Path, host: LightHost, monkeypatch: pytest.MonkeyPatch, kernels: tuple[str, ...]
) -> None:
    (host.root / "boot/vmlinuz-6.12.1").unlink()
    for kernel in kernels:
        (host.root / f"boot/vmlinuz-{kernel}").touch()
    with pytest.raises(ImageError, match="expected one kernel"):
        prepared(host, tmp_path, "tcg", monkeypatch, [])


def stand_in(folder: Path) -> Machine:
    (folder / "out").mkdir()
    return Machine(folder / "disk", folder / "kernel", "", "tcg", folder)


def run(folder: Path, script: str, said: list[str]) -> None:
    provision(
        ["sh", "-c", script], folder / "log", said.append, stand_in(folder), environment=dict(os.environ), folder=folder
    )


def test_each_step_is_said_and_a_failure_ends_with_the_log(tmp_path: Path) -> None:
    said: list[str] = []
    line = "1: ==> machine: TASK [secure_agent.workspace.egress : Install ring 1] ***"
    with pytest.raises(ImageError, match=r"packer failed \(3\):\n(?s:.*)the end"):
        run(tmp_path, f"echo '{line}'; echo the end; exit 3", said)
    assert said == ["    egress : Install ring 1"]
    (tmp_path / "out").rmdir()
    run(tmp_path, f"echo '{line}'", said)
    assert len(said) == 2


def test_a_machine_whose_kernel_gave_up_ends_the_build_with_what_it_printed(tmp_path: Path) -> None:
    console = tmp_path / "out/console.log"
    with pytest.raises(ImageError, match="kernel gave up: no init\nKernel panic - not syncing"):
        run(tmp_path, f"printf 'no init\\nKernel panic - not syncing' > {console}; exec sleep 600", [])


CALLER = """
import os, sys
from pathlib import Path
from saw.image.machine import Machine, provision
folder = Path(sys.argv[1])
machine = Machine(folder / "disk", folder / "kernel", "", "tcg", folder)
script = 'sleep 601 & setsid sleep 602 & echo up > "$1/up"; wait'
provision(["sh", "-c", script, "sh", str(folder)], folder / "log", print, machine, environment=dict(os.environ), folder=folder)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_packer_and_the_machine_end_with_the_build(tmp_path: Path, number: signal.Signals) -> None:
    caller = subprocess.Popen([sys.executable, "-c", CALLER, str(tmp_path)], start_new_session=True)
    try:
        wait_for("the machine", (tmp_path / "up").exists, patience=BOUND_S)
        mine = below(caller.pid)
        assert len(mine) >= 4, mine
    finally:
        caller.send_signal(number)
        caller.wait(BOUND_S)
    wait_for("the end of all", lambda: not any(alive(pid) for pid in mine), patience=BOUND_S)


def below(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(tuple(map(int, line.split())) for line in listed.splitlines())
    found, open_ = [], [pid]
    while open_:
        here = open_.pop()
        children = [child for child, parent in parents.items() if parent == here]
        found += children
        open_ += children
    return found


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- the choice ----------------------------------------------------------------------------------------------------------


def test_the_source_is_one_of_two(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert [source_of(word) for word in ("", "tree", "qemu")] == ["tree", "tree", "qemu"]
    options = ["image", "--repository", str(ROOT), "--build", str(tmp_path / "build"), "--source", "cloud"]
    assert image_build.main(options) == 1
    assert "there is no source 'cloud' of images (take one of: tree, qemu)" in capsys.readouterr().err
    assert not (tmp_path / "build/images").exists()
