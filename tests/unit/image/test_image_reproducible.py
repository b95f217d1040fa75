"""Equal trees and seeds make the same disk, bit by bit, whenever and wherever; and `saw image compare` names what differs."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from saw.cli.main import main
from saw.errors import SawError
from saw.image import compare_disk, disk
from saw.image.base import FORGET
from saw.image.build import ImageBuild
from saw.image.compare import DISK, Allowed, allowed_list, compare
from saw.image.disk import MIB, ImageError, assemble
from saw.image.ext4 import Ext4, NotExt4Error
from saw.image.settle import ENVIRONMENT, EPOCH, UnsettledError, settle_ext4, settle_tree, settled_umask, space_of
from saw.lab.nspawn import LabNetwork, LightHost

ROOT = Path(__file__).resolve().parents[3]
SEED = "seed of a test"
NAMES = ("b", "a", "Z", "ä", "_", "10", "9", "A")
"""Names whose order depends on the language."""


def program(text: bytes) -> bytes:
    """A small EFI program (PE) with the sections ``.cmdline`` and ``.linux``."""
    head = b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, 2, 0, 0, 0, 0, 0)
    first = 64 + 24 + 80
    for name, content, place in ((b".cmdline", text, first), (b".linux", b"kernel", first + len(text))):
        head += name.ljust(8, b"\0") + struct.pack("<IIIIIIHHI", 0, 0, len(content), place, 0, 0, 0, 0, 0)
    return head + text + b"kernel"


def tree(root: Path, *, order: int = 1) -> Path:
    """A root tree; the order in which it is made shows in the folders of this machine's file system."""
    (root / "boot").mkdir(parents=True)
    (root / "boot/vmlinuz-6.12.1").write_bytes(b"kernel")
    (root / "etc/many").mkdir(parents=True)
    (root / "etc/machine-id").touch()
    for name in NAMES[::order]:
        (root / "etc/many" / name).write_text(f"{name}\n")
    (root / "etc/large").write_bytes(b"x" * 5000 + bytes(200_000) + b"y")
    (root / "etc/link").symlink_to("many/a")
    (root / "etc/far").symlink_to("/" + "far/" * 30)
    os.link(root / "etc/large", root / "etc/twin")
    (root / "etc/old").write_text("old")
    os.utime(root / "etc/old", (EPOCH - 10**6, EPOCH - 10**6))
    (root / "etc/old").chmod(0o4750)
    return root


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a disk image of a tree; the boot program stands for itself."""
    words = {"text": b"command line"}

    def boot_program(root: Path, output: Path, command_line: str, initrd: Path | None) -> None:
        output.write_bytes(program(words["text"]))

    monkeypatch.setattr(disk, "build_uki", boot_program)
    monkeypatch.setattr(disk, "SPARE_BYTES", 32 * MIB)

    def made(root: Path, output: Path, seed: str = SEED, text: bytes = b"command line") -> Path:
        words["text"] = text
        assemble(root, output, seed=seed)
        return output

    return made


@pytest.mark.control("IMG-01")
def test_the_same_tree_makes_the_same_disk_at_another_time_in_another_place(
    tmp_path: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    one = make(tree(tmp_path / "one/root"), tmp_path / "one/image.qcow2")
    monkeypatch.setenv("TZ", "America/Anchorage")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    later = tree(tmp_path / "another/place/root", order=-1)
    for path in (later / "boot/vmlinuz-6.12.1", later / "etc/large", later / "etc/many"):
        os.utime(path, (EPOCH + 10**8, EPOCH + 10**8))
    os.utime(later / "etc/link", (EPOCH + 10**7, EPOCH + 10**7), follow_symlinks=False)
    before = os.umask(0o077)
    try:
        other = make(later, tmp_path / "another/place/image.qcow2")
    finally:
        os.umask(before)
    assert compare(one, other).differences == []
    assert one.read_bytes() == other.read_bytes()
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(one), str(raw)], check=True)
    with compare_disk.opened(raw, raw) as data:
        parts = {part.name: data[part.start : part.start + part.size] for part in compare_disk.partitions(data, raw)[1]}
        system = Ext4(parts["root"])
        assert {system.fields()[f"{what} at"] for what in ("made", "written", "checked")} == {str(EPOCH)}
        times = {at // 10**9 for _, node in system.walk() for at in (node.atime, node.mtime, node.ctime, node.crtime)}
        assert times == {EPOCH, EPOCH - 10**6}
        labels = bytes(parts["esp"]).split(b"ESP        \x08")[1:]
        assert [1980 + (struct.unpack_from("<H", label, 12)[0] >> 9) for label in labels] == [
            2015
        ]  # that of --invariant


def test_another_seed_makes_another_disk_and_it_is_said_where(tmp_path: Path, make: Callable[..., Path]) -> None:
    one, other = (
        make(tree(tmp_path / "a"), tmp_path / "1.qcow2"),
        make(tree(tmp_path / "b"), tmp_path / "2.qcow2", "else"),
    )
    found = {one.where: one.how for one in compare(one, other).refused}
    assert found["disk"] == ["identifier", "partitions"]
    assert found["esp"] == ["serial number"]
    assert {"uuid", "hash seed"} <= set(found["root"])


def test_every_way_in_which_a_file_can_differ_is_named(tmp_path: Path, make: Callable[..., Path]) -> None:
    one, other = tree(tmp_path / "a"), tree(tmp_path / "b")
    (other / "etc/many/a").write_text("b\n")
    (other / "etc/many/b").chmod(0o600)
    os.utime(other / "etc/old", (EPOCH - 10**5, EPOCH - 10**5))
    (other / "etc/link").unlink()
    (other / "etc/link").symlink_to("many/b")
    (other / "etc/far").unlink()
    (other / "etc/far").symlink_to("/" + "fer/" * 30)
    (other / "etc/many/9").unlink()
    (other / "etc/new").mkdir()
    (other / "etc/many/10").unlink()
    (other / "etc/many/10").mkdir()
    os.setxattr(other / "etc/many/A", "user.note", b"x")
    expected = {
        "root:/etc/many/a": ["content"],
        "root:/etc/many/b": ["mode"],
        "root:/etc/old": ["mtime"],
        "root:/etc/link": ["target"],
        "root:/etc/far": ["target"],
        "root:/etc/many/9": ["only in A"],
        "root:/etc/new": ["only in B"],
        "root:/etc/many/10": ["type"],
        "root:/etc/many/A": ["attributes"],
        "esp:/EFI/BOOT/BOOTX64.EFI": ["section .cmdline"],
    }
    if os.geteuid() == 0:
        os.chown(other / "etc/many/Z", 1000, 1001)
        expected["root:/etc/many/Z"] = ["owner", "group"]
    images = make(one, tmp_path / "1.qcow2"), make(other, tmp_path / "2.qcow2", text=b"another line")
    found = {one.where: one.how for one in compare(*images).refused}
    assert {where: how for where, how in found.items() if where in expected} == expected
    assert not any(where.startswith("esp:") and where not in expected for where in found)
    assert "root:/etc/large" not in found


def test_bytes_of_no_file_are_not_overlooked(tmp_path: Path, make: Callable[..., Path]) -> None:
    one = make(tree(tmp_path / "a"), tmp_path / "1.qcow2")
    raws = tmp_path / "1.raw", tmp_path / "2.raw"
    for raw in raws:
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(one), str(raw)], check=True)
    with raws[1].open("r+b") as stream:
        stream.seek(-3 * MIB, os.SEEK_END)
        stream.write(b"hidden")
    assert [(one.where, one.how) for one in compare(*raws).refused] == [("root", [compare_disk.REST])]
    with raws[1].open("r+b") as stream:
        stream.seek(-3 * MIB, os.SEEK_END)
        stream.write(bytes(6))
        stream.seek(440)
        stream.write(b"boot")
    assert [(one.where, one.how) for one in compare(*raws).refused] == [("disk", [compare_disk.REST])]
    assert [one.how for one in compare(one, raws[0]).refused] == [["layout of the file"]]


# --- the tree and its file system ----------------------------------------------------------------------------------------------


def test_only_what_is_newer_gets_the_one_time_and_no_link_is_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("x")
    before = outside.stat().st_mtime_ns
    root = tree(tmp_path / "root")
    (root / "out").symlink_to(outside)
    assert settle_tree(root) > 10
    assert outside.stat().st_mtime_ns == before
    assert {path.lstat().st_mtime for path in root.rglob("*")} == {EPOCH, EPOCH - 10**6}
    assert root.stat().st_mtime == EPOCH
    assert settle_tree(root) == 0


def test_the_space_of_a_tree_is_counted_from_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "root/folder").mkdir(parents=True)
    (tmp_path / "root/small").write_bytes(b"x")
    with (tmp_path / "root/hole").open("wb") as stream:
        stream.truncate(4097)
    os.link(tmp_path / "root/small", tmp_path / "root/twin")
    assert space_of(tmp_path / "root") == 4096 * (1 + 1 + 1 + 2)


def test_the_umask_of_a_build_is_its_own(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with settled_umask():
            (tmp_path / "inside").touch()
        (tmp_path / "after").touch()
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("inside", "after")] == [0o644, 0o600]
    assert ENVIRONMENT["SOURCE_DATE_EPOCH"] == str(EPOCH)


def test_what_provisions_the_tree_runs_in_the_one_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "packer").write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\n")
    (tools / "packer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    build = ImageBuild(ROOT, tmp_path / "build", lambda _: None)
    build.build.mkdir()
    host = LightHost("image", "10.93.8.10", tmp_path / "lab", LabNetwork("sawunit", "10.93.8"), booted=False)
    build.packer(host, tmp_path, tmp_path, "seed", tmp_path / "image.qcow2")
    found = set((tmp_path / "environment").read_text().splitlines())
    assert {f"{name}={value}" for name, value in ENVIRONMENT.items()} <= found


def test_a_base_tree_forgets_the_machine_that_made_it(tmp_path: Path) -> None:
    for name in (
        "etc/ssh/ssh_host_rsa_key",
        "etc/machine-id",
        "etc/hostname",
        "var/cache/ldconfig/aux-cache",
        "etc/hosts",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of the builder")
    (tmp_path / "etc/resolv.conf").symlink_to("/run/resolver-of-the-builder")
    subprocess.run(["sh", "-ec", FORGET, "sh", str(tmp_path)], check=True)
    left = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"etc/resolv.conf": "", "etc/hosts": "of the builder"}
    assert not (tmp_path / "etc/resolv.conf").is_symlink()


def file_system(tmp_path: Path) -> Path:
    """An ext4 file system with the tree, as this machine's mkfs makes it."""
    image = tmp_path / "fs.img"
    with image.open("wb") as stream:
        stream.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", str(tree(tmp_path / "root")), str(image)], check=True)
    return image


def test_a_file_system_is_read_as_the_tree_was(tmp_path: Path) -> None:
    image = file_system(tmp_path)
    system = Ext4(memoryview(image.read_bytes()))
    found = dict(system.walk())
    root = tmp_path / "root"
    paths = {f"/{path.relative_to(root)}": path for path in root.rglob("*")}
    assert found.keys() == {"/", "/lost+found", *paths}
    for where, path in paths.items():
        status, node = path.lstat(), found[where]
        assert (node.mode, node.uid, node.gid) == (status.st_mode, status.st_uid, status.st_gid)
        assert node.mtime // 10**9 == int(status.st_mtime)
        if path.is_symlink():
            assert b"".join(system.content(node)) == os.fsencode(os.readlink(path))  # noqa: PTH115 - as it is written
        elif path.is_file():
            assert b"".join(system.content(node)) == path.read_bytes()
            assert node.links == status.st_nlink
    assert found["/etc/large"].number == found["/etc/twin"].number


def test_a_file_system_whose_times_do_not_settle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = file_system(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "debugfs").write_text("#!/bin/sh\ncat >/dev/null\necho 'no such field' >&2\n")
    (tools / "debugfs").chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        with pytest.raises(UnsettledError, match="keeps its own times: no such field"):
            settle_ext4(image)
    with pytest.raises(UnsettledError):  # files that are newer than the one time: nobody settled the tree
        settle_ext4(image)


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (1024 + 56, b"\0\0", "no ext4"),
        (1024 + 24, b"\x09\0\0\0", "larger than any"),
        (1024 + 88, b"\x10\0", "contradicts itself"),
        (1024 + 40, b"\0\0\0\0", "contradicts itself"),
    ],
)
def test_a_damaged_file_system_is_refused(tmp_path: Path, offset: int, value: bytes, words: str) -> None:
    raw = bytearray(file_system(tmp_path).read_bytes())
    raw[offset : offset + len(value)] = value
    with pytest.raises(NotExt4Error, match=words):
        dict(Ext4(memoryview(raw)).walk())


def test_a_file_system_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    raw = file_system(tmp_path).read_bytes()
    with pytest.raises(NotExt4Error, match="past the end"):
        system = Ext4(memoryview(raw)[: len(raw) // 64])
        for _, node in system.walk():
            system.digest(node)


# --- the command and what it lets pass -----------------------------------------------------------------------------------------


def directory(path: Path, **changed: object) -> Path:
    """An image directory whose disk nobody looks into."""
    path.mkdir()
    (path / DISK).write_bytes(b"the same")
    record = {
        "name": "workspace-x",
        "created": "2026-01-01",
        "kernel": "6.12",
        "evidence": {"provenance.json": "a", "sbom/x": "b"},
    }
    (path / "build.json").write_text(json.dumps({**record, **changed}))
    return path


def test_only_what_the_list_names_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, same = directory(tmp_path / "a"), directory(tmp_path / "b")
    assert main(["image", "compare", str(one), str(same)]) == 0
    assert capsys.readouterr().out == "the disk images are the same, bit by bit\n"
    later = directory(tmp_path / "c", created="2026-02-02")
    assert main(["image", "compare", str(one), str(later), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert [(each["where"], each["how"]) for each in answer["differences"]] == [("build.json", ["/created"])]
    assert answer["differences"][0]["allowed"].startswith("when, how long")
    other = directory(
        tmp_path / "d", created="2026-02-02", kernel="6.13", evidence={"provenance.json": "a", "sbom/x": "c"}
    )
    assert main(["image", "compare", str(one), str(other)]) == 1
    assert "differs: build.json: /created, /evidence/sbom~1x, /kernel\n" in capsys.readouterr().out


def test_a_released_image_is_compared_with_a_fresh_build_and_with_another_released_one(tmp_path: Path) -> None:
    fresh, released, again = (directory(tmp_path / name) for name in ("a", "b", "c"))
    record = {"name": "workspace-x", "boot": {"pcrs": {"11": "0"}}, "evidence": {"provenance.json": "a"}}
    for number, folder in enumerate((released, again)):
        found = {"open": [{"cve": f"CVE-{number}"}], "database_sha256": f"{number}"}
        signed = {"payload": f"{number}", "payloadType": "x", "signatures": [{"sig": f"{number}"}]}
        reports = {f"vulnerabilities-{number:012x}.json": f"{number}", "baseline.dat": f"{number}"}
        reports[f"baseline-{number:012x}.dat"] = f"{number}"
        evidence = {**record["evidence"], **reports}  # type: ignore[dict-item]
        scored = {**record, "scan": found, "baseline": {"score": number}, "evidence": evidence}
        for name, content in (
            ("release.json", scored), ("release.signed.json", signed), (f"vulnerabilities-{number:012x}.json", found),
            ("measured.json", {"seconds": number, "pcrs": {"11": "0"}}), ("baseline.dat", number),
            (f"baseline-{number:012x}.dat", number),
        ):  # fmt: skip
            (folder / name).write_text(json.dumps(content))
    assert main(["image", "compare", str(fresh), str(released)]) == 0
    assert main(["image", "compare", str(released), str(again)]) == 0
    (again / "release.json").write_text(json.dumps({**record, "boot": {"pcrs": {"11": "1"}}}))
    (again / "measured.json").write_text(json.dumps({"seconds": 1, "pcrs": {"11": "1"}}))
    assert [one.where for one in compare(released, again).refused] == ["measured.json", "release.json"]
    (again / "vulnerabilities-of-mine.json").write_text("{}")
    (again / "baseline.of-mine.dat").write_text("{}")
    assert {"vulnerabilities-of-mine.json", "baseline.of-mine.dat"} <= {
        one.where for one in compare(released, again).refused
    }
    (again / "release.json").write_text(json.dumps(record))  # recorded, and neither searched nor scored
    assert "release.json" not in [one.where for one in compare(released, again).refused]


def test_the_list_says_where_and_how_and_why(tmp_path: Path) -> None:
    listed = allowed_list()
    assert all(one.where and one.how and one.why for one in listed)
    assert not [one for one in listed if one.where.startswith(("disk", "root", "esp", DISK))]
    one, other = directory(tmp_path / "a"), directory(tmp_path / "b", kernel="6.13")
    assert compare(one, other, [Allowed("build.json", ["/kernel"], "a test")]).refused == []
    assert len(compare(one, other, [Allowed("build.json", ["/created"], "a test")]).refused) == 1
    (other / "extra.txt").write_text("x")
    assert [item.where for item in compare(one, other, [Allowed("build.json", ["/kernel"], "a test")]).refused] == [
        "extra.txt"
    ]


def test_what_is_no_image_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = directory(tmp_path / "a")
    assert main(["image", "compare", str(one), str(tmp_path / "missing")]) == 2
    assert "not of one kind" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["image", "compare", str(one), str(tmp_path / "empty"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "image_failed"
    other = directory(tmp_path / "b")
    (other / DISK).write_bytes(b"y" * 100_000)
    (one / DISK).write_bytes(b"x" * 100_000)
    assert main(["image", "compare", str(one), str(other)]) == 2
    assert "no partition table" in capsys.readouterr().err


def test_a_disk_that_reads_another_file_is_refused(tmp_path: Path) -> None:
    below = tmp_path / "secret"
    below.write_bytes(b"s" * MIB)
    over = tmp_path / "over.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(below), "-F", "raw", str(over)], check=True)
    raw = tmp_path / "raw"
    shutil.copyfile(below, raw)
    with pytest.raises(ImageError, match="reads from another file"):
        compare(over, raw)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={raw}", str(over), "1M"], check=True)
    with pytest.raises(SawError, match="reads from another file"):
        compare(over, below)


def test_what_is_larger_than_any_image_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large, raw = tmp_path / "small", tmp_path / "large", tmp_path / "raw"
    small.write_bytes(bytes(MIB))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(large), "65G"], check=True)
    with raw.open("wb") as stream:
        stream.truncate(65 << 30)
    for name in (large, raw):
        with pytest.raises(ImageError, match="bytes, more than"):
            compare_disk.compare_disks(name, small)
    monkeypatch.setattr(compare_disk, "LARGEST_ESP", MIB)
    with pytest.raises(ImageError, match="an EFI system partition has"):
        compare_disk._unpacked(memoryview(bytes(MIB + 1)), tmp_path / "esp")
    assert not (tmp_path / "esp").exists()
