"""A verified root: its hash tree, what becomes of a tree, what opens it, and that one hash is built, signed and released."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import rfc8785
from uki_parts import PARTS, Golden, golden_folder, kernel, portable

from saw.attest.image_record import parse_record
from saw.image import compare_disk, disk, initrd, verified_root
from saw.image.build import ImageBuild, main
from saw.image.compare import compare
from saw.image.disk import MIB, Disk, ImageError, assemble
from saw.image.expected import expected_pcrs
from saw.image.ext4 import Ext4
from saw.image.identity import traces
from saw.image.record import make_record
from saw.image.settle import EPOCH
from saw.image.verity import BLOCK, partition_ids, write_tree
from saw.lab.nspawn import LabNetwork, LightHost

ROOT = Path(__file__).resolve().parents[3]
SALT = bytes(range(32))
UUID = uuid.UUID("7b0b9c1e-5a0e-5d3c-9d1c-6f9a4c1f2b3d")
BLOCKS = 129
"""More blocks than one block of the tree has hashes for, so that the tree has two levels."""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes a private mount namespace")


def content(blocks: int = BLOCKS) -> bytes:
    return b"".join(number.to_bytes(4, "little") * 1024 for number in range(blocks))


# --- the hash tree -----------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(content())
    return path


@pytest.mark.parametrize(
    ("blocks", "expected", "tree"),
    [
        (2, "2a324e94048f1b195c1a95c1a8a2aadeaca051dbf22f8d70524f34a54312dd1e", "fa073feaa67401af"),
        (128, "7304e50acd750ce7a62d37b9fd95234dbf7c4223c580c2ec355f5b12ad69424e", "cddaf786867ce5bd"),
        (129, "a631d09d288077d69a662e74788789b2494093c15687d050203f71c6b6757f6d", "e12005fc40601a5c"),
        (16385, "b439e96c0c64d937c58d3703498b6ab3c5eb12e418d7d895fbca032e243c0ed4", "c9da49f5a8e2477f"),
    ],
)
def test_root_hash_and_tree_are_those_that_veritysetup_makes(
    tmp_path: Path, blocks: int, expected: str, tree: str
) -> None:
    """``tree`` is the beginning of the SHA-256 of what ``veritysetup format`` wrote (cryptsetup 2.7.5)."""
    (tmp_path / "data").write_bytes(content(blocks))
    assert write_tree(tmp_path / "data", tmp_path / "tree", salt=SALT, identity=UUID) == expected
    assert hashlib.sha256((tmp_path / "tree").read_bytes()).hexdigest().startswith(tree)


@pytest.mark.skipif(not shutil.which("veritysetup"), reason="cryptsetup's veritysetup is not installed")
def test_veritysetup_verifies_the_tree_and_finds_one_flipped_bit(data: Path, tmp_path: Path) -> None:
    root_hash = write_tree(data, tmp_path / "tree", salt=SALT, identity=UUID)
    verify = ["veritysetup", "verify", str(data), str(tmp_path / "tree"), root_hash]
    assert subprocess.run(verify, capture_output=True, check=False).returncode == 0
    with data.open("r+b") as stream:
        stream.seek(BLOCK * 77 + 5)
        stream.write(b"\xff")
    assert subprocess.run(verify, capture_output=True, check=False).returncode != 0


def test_every_block_and_the_salt_decide_the_root_hash_and_the_identity_does_not(data: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    first = write_tree(data, tree, salt=SALT, identity=UUID)
    raw = tree.read_bytes()
    assert (raw[:8], raw[16:32], len(raw)) == (b"verity\0\0", UUID.bytes, BLOCK * (1 + 1 + 2))
    assert write_tree(data, tree, salt=SALT, identity=UUID) == first
    assert tree.read_bytes() == raw
    assert write_tree(data, tree, salt=SALT, identity=uuid.UUID(int=1)) == first
    assert write_tree(data, tree, salt=bytes(32), identity=UUID) != first
    for block in (0, 77, BLOCKS - 1):
        changed = bytearray(content())
        changed[block * BLOCK + 5] ^= 1
        data.write_bytes(changed)
        assert write_tree(data, tree, salt=SALT, identity=UUID) != first


@pytest.mark.parametrize(("size", "salt"), [(0, SALT), (BLOCK + 1, SALT), (BLOCK, b""), (BLOCK, bytes(257))])
def test_what_no_hash_tree_can_be_made_of_is_refused(tmp_path: Path, size: int, salt: bytes) -> None:
    (tmp_path / "data").write_bytes(bytes(size))
    with pytest.raises(ImageError, match=r"is no whole number of blocks|is none for a hash tree"):
        write_tree(tmp_path / "data", tmp_path / "tree", salt=salt, identity=UUID)
    assert not (tmp_path / "tree").exists()


# --- what becomes of a tree --------------------------------------------------------------------------------------------


def root_tree(root: Path) -> Path:
    """A root tree with something in /var."""
    for name in ("boot", "etc/ssh", "var/lib/saw-host", "usr/bin", "home"):
        (root / name).mkdir(parents=True)
    (root / "boot/vmlinuz-6.12.1").write_bytes(b"kernel")
    (root / "etc/machine-id").touch()
    (root / "usr/bin/program").write_bytes(b"program" * 1000)
    (root / "var/lib/state").write_text("as the image has it")
    return root


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a disk image with a verified root; boot program and initrd stand for themselves."""
    given: list[bytes] = []

    def boot_program(root: Path, output: Path, command_line: str, initrd: Path | None = None) -> None:
        assert initrd is not None
        given.append(initrd.read_bytes())
        output.write_bytes(f"{command_line}\n".encode() * 100)

    monkeypatch.setattr(disk, "build_uki", boot_program)
    monkeypatch.setattr(verified_root, "make_initrd", lambda _, target: target.write_bytes(b"initrd"))
    monkeypatch.setattr(verified_root, "SPARE_BYTES", 16 * MIB)

    def made(root: Path, output: Path, seed: str = "seed") -> Path:
        assemble(root, output, seed=seed, layout=verified_root.layout)
        assert given.pop() == b"initrd"
        return output

    return made


def described(image: Path) -> dict[str, str]:
    return dict(json.loads(image.with_suffix(".disk.json").read_text()))


def parts_of(image: Path, folder: Path) -> dict[str, tuple[compare_disk.Partition, bytes]]:
    with compare_disk.opened(image, folder / "raw") as raw:
        found = compare_disk.partitions(raw, image)[1]
        return {part.name: (part, bytes(raw[part.start : part.start + part.size])) for part in found}


@needs_root
@pytest.mark.control("IMG-01")
def test_a_tree_becomes_a_verified_root_and_a_var_that_can_be_written(
    tmp_path: Path, make: Callable[..., Path]
) -> None:
    image = make(root_tree(tmp_path / "tree"), tmp_path / "image.qcow2")
    parts, told = parts_of(image, tmp_path), described(image)
    assert list(parts) == ["esp", "root", "verity", "var"]
    ids = [str(guid) for guid in partition_ids(told["root_hash"])]
    assert [parts["root"][0].guid, parts["verity"][0].guid] == ids
    assert [parts[name][0].kind.upper() for name in ("root", "verity")] == [disk.ROOT_TYPE, verified_root.VERITY_TYPE]
    assert told["command_line"].split()[:4] == [
        f"roothash={told['root_hash']}", f"saw.var={parts['var'][0].guid}", "ro", "systemd.verity=no",
    ]  # fmt: skip
    assert verified_root.root_hash_of(told["command_line"]) == told["root_hash"]
    (tmp_path / "root").write_bytes(parts["root"][1])
    salt = hashlib.sha256(b"seed/salt").digest()
    identity = uuid.uuid5(uuid.NAMESPACE_OID, "seed/verity")
    assert write_tree(tmp_path / "root", tmp_path / "again", salt=salt, identity=identity) == told["root_hash"]
    assert parts["verity"][1].startswith((tmp_path / "again").read_bytes())
    root, var = (dict(Ext4(memoryview(parts[name][1])).walk()) for name in ("root", "var"))
    assert {path for path in root if path.startswith("/var")} == {"/var"}
    assert {"/usr/bin/program", "/etc/machine-id", "/home"} < root.keys()
    assert {"/lib/state", "/lib/saw-host"} < var.keys()
    assert stat.S_IMODE(root["/var"].mode) == 0o755
    assert {node.mtime // 10**9 for node in root.values()} == {EPOCH}


@needs_root
@pytest.mark.control("IMG-01")
def test_equal_trees_and_seeds_make_one_disk_and_another_byte_another_hash(
    tmp_path: Path, make: Callable[..., Path]
) -> None:
    one, same = (make(root_tree(tmp_path / name), tmp_path / f"{name}.qcow2") for name in ("a", "b"))
    assert one.read_bytes() == same.read_bytes()
    seed = make(root_tree(tmp_path / "c"), tmp_path / "c.qcow2", "another seed")
    tree = root_tree(tmp_path / "d")
    (tree / "usr/bin/program").write_bytes(b"Program" + b"program" * 999)
    changed = make(tree, tmp_path / "d.qcow2")
    hashes = {described(image)["root_hash"] for image in (one, seed, changed)}
    assert len(hashes) == 3
    tree = root_tree(tmp_path / "e")
    (tree / "var/lib/state").write_text("as another image has it")
    var = make(tree, tmp_path / "e.qcow2")
    assert described(var)["root_hash"] == described(one)["root_hash"]
    found = {each.where: each.how for each in compare(one, var).refused}
    assert found["var:/lib/state"] == ["content", "size"]
    found = {each.where: each.how for each in compare(one, changed).refused}
    assert found["root:/usr/bin/program"] == ["content"]
    assert found["verity"] == [compare_disk.REST]


def test_a_tree_that_needs_the_initrd_of_its_distribution_is_refused(tmp_path: Path) -> None:
    tree = root_tree(tmp_path / "tree")
    (tree / "boot/initrd.img-6.12.1").touch()
    with pytest.raises(ImageError, match="opens no verified root"):
        verified_root.layout(tree, tmp_path, "seed")


def test_without_the_option_the_root_is_one_partition_without_a_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "SPARE_BYTES", 16 * MIB)
    monkeypatch.setattr(disk, "build_uki", lambda _, output, *__: output.write_bytes(b"program"))
    made = assemble(root_tree(tmp_path / "tree"), tmp_path / "image.qcow2", seed="seed")
    assert list(parts_of(tmp_path / "image.qcow2", tmp_path)) == ["esp", "root"]
    assert (made.root_hash, verified_root.root_hash_of(made.command_line)) == ("", "")
    assert " rw rootfstype=ext4 " in made.command_line


def test_links_to_what_a_workspace_makes_itself_are_no_identity_and_what_they_lead_to_is(tmp_path: Path) -> None:
    tree = root_tree(tmp_path / "tree")
    for name in ("ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"):
        (tree / "etc/ssh" / name).symlink_to(f"/var/lib/saw-host/{name}")
    assert traces(tree) == []
    (tree / "var/lib/saw-host/ssh_host_ed25519_key").touch()
    assert [found.partition(":")[0] for found in traces(tree)] == ["var/lib/saw-host/ssh_host_ed25519_key"]
    (tree / "var/lib/saw-host/ssh_host_ed25519_key").unlink()
    (tree / "etc/ssh/ssh_host_rsa_key").symlink_to("/var/lib/saw-host/ssh_host_rsa_key")
    assert [found.partition(":")[0] for found in traces(tree)] == ["etc/ssh/ssh_host_rsa_key"]


# --- what opens it -----------------------------------------------------------------------------------------------------


def unpacked(raw: bytes, folder: Path) -> dict[str, tuple[int, ...]]:
    """Unpack an archive ("newc"); return the numbers in each header by path."""
    found: dict[str, tuple[int, ...]] = {}
    place = 0
    while True:
        assert raw[place : place + 6] == b"070701"
        head = tuple(int(raw[place + 6 + 8 * each : place + 14 + 8 * each], 16) for each in range(13))
        name = raw[place + 110 : place + 110 + head[11] - 1].decode()
        if name == "TRAILER!!!":
            return found
        begin = -(-(place + 110 + head[11]) // 4) * 4
        body = raw[begin : begin + head[6]]
        place = -(-(begin + head[6]) // 4) * 4
        found[name] = head
        if stat.S_ISDIR(head[1]):
            (folder / name).mkdir()
        elif stat.S_ISLNK(head[1]):
            (folder / name).symlink_to(body.decode())
        else:
            (folder / name).write_bytes(body)
            (folder / name).chmod(stat.S_IMODE(head[1]))


def test_an_archive_says_the_same_of_everything_and_has_folders_before_their_files(tmp_path: Path) -> None:
    raw = initrd.archive({"a/b/file": b"x" * 4097, "a/link": "b/file", "empty": None})
    found = unpacked(raw, tmp_path)
    assert list(found) == ["a", "a/b", "a/b/file", "a/link", "empty"]
    assert {head[5] for head in found.values()} == {EPOCH}
    assert {head[2:4] for head in found.values()} == {(0, 0)}
    assert (tmp_path / "a/link").read_bytes() == b"x" * 4097
    assert raw == initrd.archive({"empty": None, "a/link": "b/file", "a/b/file": b"x" * 4097})


def kernel_tree(root: Path) -> Path:
    """A tree with the lists of a kernel's modules, and those that the initrd needs."""
    tree = root_tree(root)
    folder = tree / "usr/lib/modules/6.12.1"
    (folder / "kernel/md").mkdir(parents=True)
    for name in ("dm-verity.ko", "dm-bufio.ko", "dm-mod.ko"):
        (folder / "kernel/md" / name).write_bytes(name.encode())
    (folder / "modules.dep").write_text(
        "kernel/md/dm-verity-other.ko:\nkernel/md/dm-mod.ko:\nkernel/md/dm-bufio.ko: kernel/md/dm-mod.ko\n"
        "kernel/md/dm-verity.ko: kernel/md/dm-bufio.ko kernel/md/dm-mod.ko\n"
    )
    (folder / "modules.builtin").write_text("kernel/crypto/sha256-ssse3.ko\n")
    return tree


def test_modules_come_after_those_that_they_need_and_a_kernel_without_one_is_refused(tmp_path: Path) -> None:
    tree = kernel_tree(tmp_path / "tree")
    found = [Path(path).name for path in initrd.kernel_modules(tree)]
    assert found == ["dm-mod.ko", "dm-bufio.ko", "dm-verity.ko"]
    (tree / "usr/lib/modules/6.12.1/modules.builtin").write_text("")
    with pytest.raises(ImageError, match="no module sha256-ssse3"):
        initrd.kernel_modules(tree)


def test_what_the_tree_lacks_or_takes_from_this_machine_is_refused(tmp_path: Path) -> None:
    tree = kernel_tree(tmp_path / "tree")
    (tmp_path / "outside").touch()
    for name, target in (("missing", "nothing"), ("absolute", "/etc/passwd"), ("above", "../../../outside")):
        (tree / "usr/bin" / name).symlink_to(target)
        with pytest.raises(ImageError, match=f"the tree has no usr/bin/{name}"):
            initrd.inside(tree, f"usr/bin/{name}")
    assert initrd.inside(tree, "usr/bin/program").read_bytes() == b"program" * 1000


@needs_root
def test_the_initrd_holds_programs_with_their_libraries_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = kernel_tree(tmp_path / "tree")
    placed(tree, "/bin/dash", "/bin/sleep", "/usr/bin/ldd", "/bin/bash")
    monkeypatch.setattr(initrd, "PROGRAMS", ("usr/bin/dash", "usr/bin/sleep"))
    for name in ("bin", "lib", "lib64"):
        if not (tree / name).exists():
            (tree / name).symlink_to(f"usr/{name}")
    initrd.make_initrd(tree, tmp_path / "one")
    (tmp_path / "unpacked").mkdir()
    found = unpacked((tmp_path / "one").read_bytes(), tmp_path / "unpacked")
    assert {"init", "dev", "sysroot", "modules/00-dm-mod.ko", "usr/bin/dash"} < found.keys()
    assert not any(name.startswith("usr/bin/bash") for name in found)
    done = subprocess.run(
        ["chroot", tmp_path / "unpacked", "/bin/sh", "-c", "sleep 0 && echo runs"], capture_output=True, check=True
    )
    assert done.stdout == b"runs\n"
    initrd.make_initrd(tree, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    (tree / "usr/bin/sleep").unlink()
    with pytest.raises(ImageError, match="the tree has no usr/bin/sleep"):
        initrd.make_initrd(tree, tmp_path / "three")


def placed(tree: Path, *programs: str) -> None:
    """Put programs of this machine with their libraries into ``tree``, below usr."""
    paths = set(programs)
    for program in programs:
        told = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
        paths |= {word for line in told.splitlines() for word in line.split() if word.startswith("/")}
    for path in sorted(paths):
        target = tree / (path.lstrip("/") if path.startswith("/usr/") else f"usr{path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        target.chmod(0o755)


HASH = "0123456789abcdef" * 4
VAR = "4e84e46e-4c55-5012-a0d8-6216f0b2c1dd"
FIRST = "01234567-89ab-cdef-0123-456789abcdef"
STUB = '#!/bin/sh\necho "${0##*/} $*" >>/calls\n'


class Starter:
    """The first program in a root of its own, where what it calls notes that it was called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("dev", "proc", "usr/sbin", "sysroot/var/lib/saw-host", "sysroot/etc", "modules"):
            (folder / name).mkdir(parents=True)
        placed(folder, "/bin/dash")
        for link in ("bin", "lib", "lib64"):
            (folder / link).symlink_to(f"usr/{link}")
        (folder / "usr/bin/sh").symlink_to("dash")
        (folder / "modules/00-dm-mod.ko").touch()
        shutil.copyfile(initrd.INIT, folder / "init")
        self.stub("mount", "insmod", "sleep", "switch_root", "veritysetup")
        self.stub("blkid", more="case $* in *=01*) echo /dev/nvme0n1p2 ;; *) echo /dev/nvme0n1p4 ;; esac")
        self.stub("e2fsck", more='echo "words of e2fsck"')
        self.stub("od", more='echo " 01020304 05060708 090a0b0c 0d0e0f10"')

    def stub(self, *names: str, more: str = "") -> None:
        for name in names:
            path = self.folder / "usr/sbin" / name
            path.write_text(f"{STUB}{more}\n")
            path.chmod(0o755)

    def start(self, line: str = f"roothash={HASH} saw.var={VAR} ro quiet") -> tuple[int, str, list[str]]:
        """Return how it ended, what it said on the console, and what it called."""
        (self.folder / "proc/cmdline").write_text(f"{line}\n")
        (self.folder / "calls").write_text("")
        (self.folder / "dev/null").touch()
        (self.folder / "dev/console").write_text("")
        done = subprocess.run(
            ["chroot", self.folder, "/bin/sh", "/init"], capture_output=True, check=False, timeout=300
        )
        calls = (self.folder / "calls").read_text().splitlines()
        return done.returncode, (self.folder / "dev/console").read_text(), calls

    @property
    def machine_id(self) -> Path:
        return self.folder / "sysroot/var/lib/saw-host/machine-id"


@pytest.fixture
def starter(tmp_path: Path) -> Starter:
    return Starter(tmp_path / "start")


@needs_root
@pytest.mark.control("IMG-01")
def test_the_root_is_opened_by_its_hash_before_anything_of_it_runs(starter: Starter) -> None:
    code, console, calls = starter.start()
    assert (code, console) == (0, "")
    first = FIRST.split("-")
    assert first[0] + "".join(first[1:]) == HASH[:32]
    guids = [call for call in calls if call.startswith("blkid")]
    assert [call.rpartition("=")[2] for call in guids] == [FIRST, FIRST, VAR]
    kept = [call for call in calls if call.split()[0] in {"insmod", "veritysetup", "e2fsck", "switch_root"}]
    assert kept == [
        "insmod /modules/00-dm-mod.ko",
        f"veritysetup open --panic-on-corruption /dev/nvme0n1p2 root /dev/nvme0n1p2 {HASH}",
        "e2fsck -p /dev/nvme0n1p4",
        "switch_root /sysroot /sbin/init",
    ]
    mounts = [call for call in calls if "/sysroot" in call and call.startswith("mount")]
    assert mounts == [
        "mount -t ext4 -o ro,noatime /dev/mapper/root /sysroot",
        "mount -t ext4 -o nosuid,nodev,noatime /dev/nvme0n1p4 /sysroot/var",
        "mount --bind /sysroot/var/lib/saw-host/machine-id /sysroot/etc/machine-id",
        "mount -o remount,bind,ro /sysroot/etc/machine-id",
    ]


@needs_root
def test_the_machine_id_is_made_once(starter: Starter) -> None:
    starter.start()
    assert starter.machine_id.read_text() == "0102030405060708090a0b0c0d0e0f10\n"
    starter.machine_id.write_text("f" * 32 + "\n")
    assert starter.start()[0] == 0
    assert starter.machine_id.read_text() == "f" * 32 + "\n"
    starter.machine_id.write_text("")  # cut off while it was written
    starter.start()
    assert starter.machine_id.read_text() == "0102030405060708090a0b0c0d0e0f10\n"


@needs_root
@pytest.mark.control("IMG-01")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"saw.var={VAR}", "its root hash is none"),
        (f"roothash={HASH[:63]} saw.var={VAR}", "its root hash is none"),
        (f"roothash={HASH[:63]}G saw.var={VAR}", "its root hash is none"),
        (f"roothash={HASH} saw.var={VAR} roothash={HASH[::-1]}", "its root hash is named twice"),
        (f"roothash={HASH} saw.var={VAR} saw.var={VAR}", "its partition for /var is named twice"),
        (f"roothash={HASH}", "its partition for /var is not named"),
    ],
)
def test_a_command_line_that_does_not_name_one_root_starts_nothing(starter: Starter, line: str, words: str) -> None:
    code, console, calls = starter.start(line)
    assert (code, console) == (1, f"saw: this image does not start: {words}\n")
    assert not any(call.startswith(("veritysetup", "switch_root")) for call in calls)


@needs_root
@pytest.mark.control("IMG-01")
@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("blkid", "echo /dev/nvme0n1p2; echo /dev/nvme1n1p2", f"there is more than one partition {FIRST}"),
        ("blkid", "exit 2", f"there is no partition {FIRST}"),
        ("veritysetup", "exit 1", "its root is not what its hash says"),
        ("mount", 'case $* in */dev/mapper/root*) exit 32 ;; esac', "its root cannot be mounted"),
        ("mount", "case $* in *sysroot/var) exit 32 ;; esac", "its /var cannot be mounted"),
        ("e2fsck", "echo bad; exit 4", "its /var is damaged, rebuild the workspace: bad"),
    ],
)  # fmt: skip
def test_what_is_missing_damaged_or_there_twice_ends_the_start(
    starter: Starter, name: str, more: str, words: str
) -> None:
    starter.stub(name, more=more)
    code, console, calls = starter.start()
    assert (code, console) == (1, f"saw: this image does not start: {words}\n")
    assert not any(call.startswith("switch_root") for call in calls)


@needs_root
def test_a_var_that_was_mended_starts(starter: Starter) -> None:
    starter.stub("e2fsck", more="exit 1")
    assert starter.start()[:2] == (0, "")


# --- build and record --------------------------------------------------------------------------------------------------


def test_a_verified_root_is_an_option_and_off_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "uv.lock").write_text("lock")
    plain, verified = (ImageBuild(tmp_path, tmp_path / "build", root_verity=each) for each in (False, True))
    assert (plain.options, verified.options) == ({}, {"root_verity": "sha256"})
    assert verified.sources().digest != plain.sources().digest
    assert verified_root.chosen({}) is verified_root.chosen({verified_root.VARIABLE: "0"}) is False
    assert verified_root.chosen({verified_root.VARIABLE: "1"}) is True
    monkeypatch.setenv(verified_root.VARIABLE, "yes")
    assert main(["image", "--repository", str(ROOT), "--build", str(tmp_path / "build")]) == 1
    assert "SAW_IMAGE_ROOT_VERITY=yes means nothing" in capsys.readouterr().err


@pytest.mark.parametrize("verified", [False, True])
def test_packer_is_told_and_hands_it_to_the_role_and_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verified: bool
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "packer").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/told\n')
    (tools / "packer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    build = ImageBuild(ROOT, tmp_path / "build", lambda _: None, root_verity=verified)
    build.build.mkdir()
    host = LightHost("image", "10.93.8.10", tmp_path / "lab", LabNetwork("sawunit", "10.93.8"), booted=False)
    build.packer(host, tmp_path, tmp_path, "seed", tmp_path / "image.qcow2")
    assert ("root_verity=true" in (tmp_path / "told").read_text().splitlines()) is verified
    text = (ROOT / "packer/build.pkr.hcl").read_text()
    assert text.count("--root-verity=${var.root_verity} ") == 2
    assert "workspace_converge_root_verity=${var.root_verity}" in text


@pytest.mark.parametrize(("value", "verified"), [("true", True), ("false", False)])
def test_the_disk_is_made_as_packer_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, verified: bool
) -> None:
    layouts: list[object] = []

    def made(root: Path, output: Path, **options: object) -> Disk:
        layouts.append(options["layout"])
        return Disk("x", "0" * 64, "0" * 64, "6.12", "")

    monkeypatch.setattr("saw.image.build.assemble", made)
    options = ["--root", str(tmp_path), "--output", "x", "--seed", "s", f"--root-verity={value}"]
    assert main(["assemble", *options]) == 0
    assert layouts == [verified_root.layout if verified else disk.writable_root]


def signed_for(root_hash: str) -> bytes:
    """A boot image that hands ``root_hash`` to the kernel."""
    line = f"roothash={root_hash} saw.var=1 ro\0".encode() if root_hash else PARTS[".cmdline"]
    return portable({**PARTS, ".cmdline": line, ".linux": kernel()})


def built(folder: Path, names: str, states: str) -> Golden:
    """An image whose boot image names one root hash and whose build states another."""
    golden = golden_folder(folder, signed_for(names))
    record = json.loads((folder / "build.json").read_text())
    (folder / "build.json").write_text(json.dumps({**record, "root_hash": states}))
    return golden


@pytest.mark.control("IMG-01")
def test_the_record_names_the_root_hash_that_the_boot_image_names(tmp_path: Path) -> None:
    golden = built(tmp_path / "image", HASH, HASH)
    made = make_record(golden.folder, lambda _: golden.answer(), lambda _: None)
    assert made.record["root_hash"] == HASH
    record = parse_record(rfc8785.dumps({**made.record, "not_after": "2099-01-01T00:00:00Z"}))
    assert (record.root_hash, record.missing(["root_verity"])) == (HASH, [])
    plain = built(tmp_path / "plain", "", "")
    record_of_plain = make_record(plain.folder, lambda _: plain.answer(), lambda _: None).record
    assert "root_hash" not in record_of_plain
    found = parse_record(rfc8785.dumps({**record_of_plain, "not_after": "2099-01-01T00:00:00Z"}))
    assert found.missing(["root_verity"]) == ["root_verity"]


@pytest.mark.control("IMG-01")
@pytest.mark.parametrize(
    ("names", "states"), [(HASH, HASH[::-1]), (HASH, ""), ("", HASH), (f"{HASH} roothash={HASH}", HASH)]
)
def test_a_build_that_states_another_root_hash_gets_no_record(tmp_path: Path, names: str, states: str) -> None:
    golden = built(tmp_path / "image", names, states)
    with pytest.raises(ImageError, match=r"names the root hash|names several root hashes"):
        make_record(golden.folder, lambda _: golden.answer(), lambda _: None)
    assert not (golden.folder / "release.json").exists()


@pytest.mark.control("IMG-01")
def test_another_root_hash_is_another_boot_measurement_and_makes_no_record(tmp_path: Path) -> None:
    golden = built(tmp_path / "image", HASH, HASH)
    other = {pcr: values[0] for pcr, values in expected_pcrs(signed_for(HASH[::-1])).items()}
    assert {pcr for pcr in other if other[pcr] != golden.expected[pcr]} == {"4", "11"}
    with pytest.raises(ImageError, match=r"PCR 4 is .*; PCR 11 is "):
        make_record(golden.folder, lambda _: golden.answer(**other), lambda _: None)
