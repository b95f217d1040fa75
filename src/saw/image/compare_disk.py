"""What differs between two disk images, file by file, without mounting them and without being root.

A disk is a GPT with an EFI system partition, which mtools reads, and ext4 for root and /var, which :mod:`saw.image.ext4` reads
(UEFI specification, "GUID Partition Table"). What differs and belongs to no file is named as such: nothing that differs goes
unsaid.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from saw.image.disk import ImageError, run
from saw.image.ext4 import Ext4, Inode

SECTOR = 512
QCOW2 = b"QFI\xfb"
LARGEST = 64 << 30
"""Bytes: no image is larger. Where a disk is converted a damaged or foreign one must not fill this machine."""
LARGEST_ESP = 1 << 30
REST = "bytes of no file"
"""Said of a place whose bytes differ although everything that can be named there is equal."""
Found = dict[str, list[str]]
"""Where (``root:/etc/fstab``, ``esp:/EFI/BOOT/BOOTX64.EFI``, ``disk``) → how it differs, in words."""


@dataclass(frozen=True)
class Partition:
    """One partition: name, type and identifier (GUIDs), first byte and size in bytes."""

    name: str
    kind: str
    guid: str
    start: int
    size: int


def compare_disks(one: Path, other: Path) -> Found:
    """Return what differs between two disks (raw or qcow2); empty when they hold the same bytes. Raises :class:`ImageError`."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix=".saw-compare-")))
        left, right = (stack.enter_context(opened(path, scratch / name)) for path, name in ((one, "a"), (other, "b")))
        if same(left, right):
            return {}
        found: Found = {}
        tables = partitions(left, one), partitions(right, other)
        _differ(found, "disk", {"size": (len(left), len(right)), "identifier": (tables[0][0], tables[1][0])})
        _differ(found, "disk", {"partitions": (tables[0][1], tables[1][1])})
        names = {part.name: part for part in tables[0][1]}, {part.name: part for part in tables[1][1]}
        for name in names[0].keys() & names[1].keys():
            parts = _part(left, names[0][name]), _part(right, names[1][name])
            if same(*parts):
                continue
            here: Found = {}
            if name in {"root", "var"}:
                here = _files(name, *parts)
            elif name == "esp":
                here = _esp(*parts, scratch)
            found |= here or {name: [REST]}
        return found or {"disk": [REST]}


def _part(data: memoryview, part: Partition) -> memoryview:
    return data[part.start : part.start + part.size]


def same(one: memoryview, other: memoryview) -> bool:
    """Tell whether two buffers hold the same bytes."""
    step = 1 << 24
    return len(one) == len(other) and all(
        bytes(one[place : place + step]) == bytes(other[place : place + step]) for place in range(0, len(one), step)
    )


def _differ(found: Found, where: str, pairs: dict[str, tuple[object, object]]) -> None:
    for how, (one, other) in pairs.items():
        if one != other:
            found.setdefault(where, []).append(how)


@contextmanager
def opened(path: Path, raw: Path) -> Iterator[memoryview]:
    """Open a disk as raw bytes. One that reads from further files is refused: they would be any file of this machine."""
    try:
        head = path.open("rb").read(104)
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}", cure="name a readable image") from error
    if head[:4] == QCOW2:
        backing, incompatible = (
            struct.unpack_from(">Q", head, 8)[0],
            struct.unpack_from(">Q", head.ljust(80, b"\0"), 72)[0],
        )
        if backing or (head[4:8] != b"\0\0\0\2" and incompatible & 4):
            raise ImageError(f"{path} reads from another file", cure="make it whole: qemu-img convert -O qcow2")
        (virtual,) = struct.unpack_from(">Q", head.ljust(80, b"\0"), 24)
        if virtual > LARGEST:
            raise ImageError(
                f"{path} has {virtual} bytes, more than {LARGEST}", cure="name an image that this build made"
            )
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw))
        path = raw
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > LARGEST:
            raise ImageError(f"{path} has {size} bytes, more than {LARGEST}", cure="name an image that this build made")
        if size < 68 * SECTOR:
            raise ImageError(f"{path} is no disk image", cure="name an image directory, or its image.qcow2")
        yield memoryview(mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ))  # goes with its last slice


def partitions(data: memoryview, path: Path) -> tuple[str, list[Partition]]:
    """Return the disk's GUID and its partitions."""
    header = bytes(data[SECTOR : SECTOR + 92])
    (entries,) = struct.unpack_from("<Q", header, 72)
    count, size = struct.unpack_from("<II", header, 80)
    if header[:8] != b"EFI PART" or not 0 < count <= 128 or size != 128 or entries * SECTOR + count * size > len(data):
        raise ImageError(f"{path} has no partition table (GPT)", cure="name an image that this build made")
    parts: list[Partition] = []
    for place in range(entries * SECTOR, entries * SECTOR + count * size, size):
        kind, guid, first, last, _, name = struct.unpack("<16s16sQQQ72s", data[place : place + size])
        if not any(kind):
            continue
        if not first <= last < len(data) // SECTOR:
            raise ImageError(f"{path} has a partition that reaches past its end", cure="copy the image again, whole")
        text = name.decode("utf-16-le", "replace").rstrip("\0")
        parts.append(Partition(text, _guid(kind), _guid(guid), first * SECTOR, (last - first + 1) * SECTOR))
    return _guid(header[56:72]), parts


def _guid(raw: bytes) -> str:
    return str(uuid.UUID(bytes_le=raw))


def _files(name: str, one: memoryview, other: memoryview) -> Found:
    """Compare two ext4 file systems: superblock, then every path."""
    systems = Ext4(one), Ext4(other)
    found: Found = {}
    fields = systems[0].fields(), systems[1].fields()
    _differ(found, name, {field: (fields[0][field], fields[1][field]) for field in fields[0]})
    trees = dict(systems[0].walk()), dict(systems[1].walk())
    for path in sorted(trees[0].keys() | trees[1].keys()):
        where = f"{name}:{path}"
        left, right = trees[0].get(path), trees[1].get(path)
        if left is None or right is None:
            found[where] = ["only in B" if left is None else "only in A"]
            continue
        _differ(found, where, _node(left, right))
        if left.kind == right.kind and systems[0].digest(left) != systems[1].digest(right):
            found.setdefault(where, []).insert(0, "target" if left.kind == "link" else "content")
    return found


def _node(left: Inode, right: Inode) -> dict[str, tuple[object, object]]:
    if left.kind != right.kind:
        return {"type": (left.kind, right.kind)}
    return {
        "mode": (left.mode, right.mode),
        "owner": (left.uid, right.uid),
        "group": (left.gid, right.gid),
        "size": (left.size, right.size),
        "hard links": (left.links, right.links),
        "attributes": (left.attributes, right.attributes),
        "mtime": (left.mtime, right.mtime),
        "atime": (left.atime, right.atime),
        "ctime": (left.ctime, right.ctime),
        "birth time": (left.crtime, right.crtime),
        "flags": (left.flags, right.flags),
        "generation": (left.generation, right.generation),
    }


def _esp(one: memoryview, other: memoryview, scratch: Path) -> Found:
    """Compare two FAT file systems: serial number and label, then every file with its time of change."""
    found: Found = {}
    heads = bytes(one[:90]), bytes(other[:90])
    _differ(
        found, "esp", {"serial number": (heads[0][67:71], heads[1][67:71]), "label": (heads[0][71:82], heads[1][71:82])}
    )
    trees = [_unpacked(data, scratch / f"esp-{number}") for number, data in enumerate((one, other))]
    for path in sorted(trees[0].keys() | trees[1].keys()):
        where = f"esp:/{path}"
        left, right = trees[0].get(path), trees[1].get(path)
        if left is None or right is None:
            found[where] = ["only in B" if left is None else "only in A"]
            continue
        _differ(found, where, {"mtime": (left.stat().st_mtime, right.stat().st_mtime)})
        if left.is_file() and right.is_file() and left.read_bytes() != right.read_bytes():
            found.setdefault(where, [])[:0] = _programs(left.read_bytes(), right.read_bytes())
    return found


def _unpacked(data: memoryview, folder: Path) -> dict[str, Path]:
    if len(data) > LARGEST_ESP:
        raise ImageError(
            f"an EFI system partition has {len(data)} bytes, more than {LARGEST_ESP}",
            cure="name an image that this build made",
        )
    folder.mkdir()
    image = folder.with_suffix(".img")
    image.write_bytes(data)
    run(
        "mcopy",
        "-s",
        "-m",
        "-n",
        "-Q",
        "-i",
        str(image),
        "::/",
        str(folder),
        env={"TZ": "UTC", "MTOOLS_SKIP_CHECK": "1"},
    )
    return {str(path.relative_to(folder)): path for path in folder.rglob("*")}


def _programs(one: bytes, other: bytes) -> list[str]:
    """Say in which sections two EFI programs (PE) differ; "content" where one of them is no such program."""
    parts = _sections(one), _sections(other)
    if not parts[0] or not parts[1]:
        return ["content"]
    names = sorted(parts[0].keys() | parts[1].keys())
    return [f"section {name}" for name in names if parts[0].get(name) != parts[1].get(name)] or ["content"]


def _sections(program: bytes) -> dict[str, str]:
    """Return name → SHA-256 of every section, of the ``headers`` before them, and of the ``end`` (a signature)."""
    try:
        start = struct.unpack_from("<I", program, 0x3C)[0]
        count, optional = (
            struct.unpack_from("<H", program, start + 6)[0],
            struct.unpack_from("<H", program, start + 20)[0],
        )
        if program[:2] != b"MZ" or program[start : start + 4] != b"PE\0\0":
            return {}
        first = start + 24 + optional
        pieces, end = {"headers": program[: first + 40 * count]}, 0
        for place in range(first, first + 40 * count, 40):
            size, offset = struct.unpack_from("<II", program, place + 16)
            pieces[program[place : place + 8].rstrip(b"\0").decode("latin-1")] = program[offset : offset + size]
            end = max(end, offset + size)
        pieces["end"] = program[end:]
    except struct.error:
        return {}
    return {name: hashlib.sha256(piece).hexdigest() for name, piece in pieces.items()}
