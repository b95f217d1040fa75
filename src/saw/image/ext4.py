"""Read an ext4 file system as ``mkfs.ext4`` lays one out, out of a file, without mounting it and without being root.

Only what images need: extents, directories (an index of one is skipped, its blocks hold the names all the same), symbolic links,
attributes in and outside of the inode, times in nanoseconds. Every number that is read is checked, so that a damaged or malicious
file ends in an :class:`NotExt4Error`. Layout: the kernel's documentation, filesystems/ext4.
"""

from __future__ import annotations

import hashlib
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from saw.errors import SawError

SUPER_OFFSET, SUPER_SIZE, MAGIC = 1024, 1024, 0xEF53
ROOT_INODE, FIRST_DATA_INODE = 2, 11
_EXTENTS, _INLINE = 0x80000, 0x10000000
_64BIT = 0x80
_XATTR_MAGIC = 0xEA020000
_PREFIXES = {
    0: "",
    1: "user.",
    2: "system.posix_acl_access",
    3: "system.posix_acl_default",
    4: "trusted.",
    6: "security.",
    7: "system.",
}
_SUPER_FIELDS = {
    "inodes": (0, "<I"), "blocks": (4, "<I"), "free blocks": (12, "<I"), "free inodes": (16, "<I"), "mounted at": (44, "<I"),
    "written at": (48, "<I"), "mounts": (52, "<H"), "checked at": (64, "<I"), "label": (120, "16s"), "uuid": (104, "16s"),
    "hash seed": (236, "16s"), "journal uuid": (208, "16s"), "made at": (264, "<I"), "kilobytes written": (376, "<Q"),
    "features": (92, "12s"), "flags": (352, "<I"), "last mounted on": (136, "64s"), "checksum seed": (624, "<I"),
}  # fmt: skip
LARGEST = 64 * 1024**3
"""Bytes that a file of an image holds at most, holes included: a number alone must not keep a reader busy for days."""
_DEEP = 5
"""Levels that a tree of extents may have (``EXT4_MAX_EXTENT_DEPTH``)."""


class NotExt4Error(SawError):
    """The bytes are no ext4 file system that this module can read."""

    code = "image_unreadable"

    def __init__(self, message: str) -> None:
        """Say what is wrong; there is one cure."""
        super().__init__(message, cure="name a whole image that this build made")


@dataclass(frozen=True)
class Inode:
    """One inode: what it is, whose, when (nanoseconds since 1970), its attributes and where its content lies."""

    number: int
    mode: int
    uid: int
    gid: int
    size: int
    links: int
    flags: int
    generation: int
    atime: int
    mtime: int
    ctime: int
    crtime: int
    raw: bytes = field(repr=False)
    """The 60 bytes of ``i_block``: extents, a short link's target, or a device's number."""
    attributes: dict[str, bytes] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Return the word for the file's type."""
        words = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link", stat.S_IFCHR: "character device",
                 stat.S_IFBLK: "block device", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}  # fmt: skip
        return words.get(stat.S_IFMT(self.mode), "unknown")


class Ext4:
    """A file system in ``data``, any buffer (a mapped file) that starts with its first byte."""

    def __init__(self, data: memoryview, names: str = "backslashreplace") -> None:
        """Read superblock and group descriptors; ``names`` says how names that are no UTF-8 are read (an error handler's name).

        Raises :class:`NotExt4Error`.
        """
        self.data = data
        self.errors = names
        self.super = bytes(data[SUPER_OFFSET : SUPER_OFFSET + SUPER_SIZE])
        if len(self.super) < SUPER_SIZE or self._u16(56) != MAGIC:
            raise NotExt4Error("there is no ext4 file system")
        if self._u32(24) > 6:
            raise NotExt4Error("the file system's blocks are larger than any")
        self.block = 1024 << self._u32(24)
        self.inode_size = self._u16(88)
        self.per_group, self.inodes = self._u32(40), self._u32(0)
        wide = bool(self._u32(96) & _64BIT)
        self.descriptor = self._u16(254) if wide else 32
        if not (128 <= self.inode_size <= self.block and self.per_group and self.descriptor in {32, 64}):
            raise NotExt4Error("the file system's superblock contradicts itself")
        self.first = self._u32(20)

    def fields(self) -> dict[str, str]:
        """Return what the superblock says, by words."""
        found = {}
        for name, (offset, form) in _SUPER_FIELDS.items():
            (value,) = struct.unpack_from(form, self.super, offset)
            found[name] = value.hex() if isinstance(value, bytes) else str(value)
        return found

    def walk(self) -> Iterator[tuple[str, Inode]]:
        """Yield every path (``/`` first, then in the order of names) with its inode; a folder that contains itself is refused."""
        open_: list[tuple[str, int]] = [("/", ROOT_INODE)]
        seen: set[int] = set()
        while open_:
            path, number = open_.pop()
            node = self.inode(number)
            yield path, node
            if node.kind != "folder":
                continue
            if number in seen:
                raise NotExt4Error(f"{path} is a folder that is there twice")
            seen.add(number)
            names = self.names(node)
            open_ += [(f"{path.rstrip('/')}/{name}", names[name]) for name in sorted(names, reverse=True)]

    def inode(self, number: int) -> Inode:
        """Return the inode ``number``."""
        if not 0 < number <= self.inodes:
            raise NotExt4Error(f"there is no inode {number}")
        group, index = divmod(number - 1, self.per_group)
        place = (self.first + 1) * self.block + group * self.descriptor
        low, high = self._read(place + 8, "<I"), self._read(place + 40, "<I") if self.descriptor == 64 else 0
        start = (low | high << 32) * self.block + index * self.inode_size
        raw = self._bytes(start, self.inode_size)
        (mode, uid, size, atime, ctime, mtime, _, gid, links, _, flags, _) = struct.unpack_from("<HHIIIIIHHIII", raw)
        generation, acl, size_high = struct.unpack_from("<III", raw, 100)
        uid_high, gid_high = struct.unpack_from("<HH", raw, 120)
        acl |= struct.unpack_from("<H", raw, 118)[0] << 32
        extra = struct.unpack_from("<H", raw, 128)[0] if self.inode_size > 128 else 0
        more = (*struct.unpack_from("<IIIII", raw, 132),) if extra >= 24 else (0, 0, 0, 0, 0)
        attributes = self._attributes(raw[128 + extra :], acl) if self.inode_size > 128 else {}
        return Inode(
            number, mode, uid | uid_high << 16, gid | gid_high << 16, size | size_high << 32, links, flags, generation,
            _time(atime, more[2]), _time(mtime, more[1]), _time(ctime, more[0]), _time(more[3], more[4]), raw[40:100], attributes,
        )  # fmt: skip

    def content(self, node: Inode) -> Iterator[bytes]:
        """Yield what a file, a folder or a link holds, piece by piece; a hole is zeros."""
        if node.kind == "link" and node.size < 60:
            yield node.raw[: node.size]
            return
        if node.size > LARGEST or node.flags & _INLINE or not node.flags & _EXTENTS:
            raise NotExt4Error(f"inode {node.number} holds its content in a way that images do not")
        place = 0
        for logical, length, physical in self._extents(node.raw, node.number, 0):
            begin = logical * self.block
            if begin < place:
                raise NotExt4Error(f"inode {node.number} has extents that overlap")
            yield from _zeros(min(begin, node.size) - place)
            place = min(begin, node.size)
            piece = min(length * self.block, node.size - place)
            if piece > 0:
                yield self._bytes(physical * self.block, piece)
                place += piece
        yield from _zeros(node.size - place)

    def digest(self, node: Inode) -> str:
        """Return the SHA-256 (hex) of what ``node`` holds; of a device, pipe or socket that of its raw bytes."""
        whole = hashlib.sha256()
        for piece in self.content(node) if node.kind in {"file", "link"} else (node.raw,):
            whole.update(piece)
        return whole.hexdigest()

    def names(self, node: Inode) -> dict[str, int]:
        """Return the names in a folder with their inodes, without ``.`` and ``..``."""
        if node.size > len(self.data):
            raise NotExt4Error(f"inode {node.number} is larger than its file system")
        found: dict[str, int] = {}
        raw, place = b"".join(self.content(node)), 0
        while place + 8 <= len(raw):
            number, length, size = struct.unpack_from("<IHB", raw, place)
            if length < 8 or size + 8 > length or place + length > len(raw):
                raise NotExt4Error(f"inode {node.number} is a damaged folder")
            name = raw[place + 8 : place + 8 + size].decode("utf-8", self.errors)
            place += length
            if not number or name in {".", ".."}:
                continue
            if "/" in name or "\0" in name or name in found:
                raise NotExt4Error(f"inode {node.number} is a folder with a name that cannot be")
            found[name] = number
        return found

    def _extents(self, raw: bytes, number: int, depth: int) -> Iterator[tuple[int, int, int]]:
        magic, entries, _, levels = struct.unpack_from("<HHHH", raw)
        if magic != 0xF30A or 12 * (entries + 1) > len(raw) or levels > _DEEP - depth:
            raise NotExt4Error(f"inode {number} has damaged extents")
        for place in range(12, 12 * (entries + 1), 12):
            if levels:
                _, low, high = struct.unpack_from("<IIH", raw, place)
                yield from self._extents(self._bytes((low | high << 32) * self.block, self.block), number, depth + 1)
                continue
            logical, length, high, low = struct.unpack_from("<IHHI", raw, place)
            if length <= 32768:  # more marks one that was reserved and never written: zeros
                yield logical, length, low | high << 32

    def _attributes(self, inside: bytes, block: int) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        if len(inside) >= 4 and struct.unpack_from("<I", inside)[0] == _XATTR_MAGIC:
            found |= _attribute_list(inside[4:], inside[4:])
        if block:
            raw = self._bytes(block * self.block, self.block)
            if struct.unpack_from("<I", raw)[0] != _XATTR_MAGIC:
                raise NotExt4Error("a block of attributes is damaged")
            found |= _attribute_list(raw[32:], raw)
        return found

    def _bytes(self, start: int, size: int) -> bytes:
        if start + size > len(self.data):
            raise NotExt4Error("the file system reaches past the end of its file")
        return bytes(self.data[start : start + size])

    def _read(self, place: int, form: str) -> int:
        return int(struct.unpack(form, self._bytes(place, struct.calcsize(form)))[0])

    def _u16(self, offset: int) -> int:
        return int(struct.unpack_from("<H", self.super, offset)[0])

    def _u32(self, offset: int) -> int:
        return int(struct.unpack_from("<I", self.super, offset)[0])


def _time(seconds: int, extra: int) -> int:
    """Join 32 bits of seconds and 32 bits of which 2 extend the seconds and 30 are nanoseconds."""
    signed = seconds - (1 << 32) if seconds >= 1 << 31 else seconds
    return (signed + ((extra & 3) << 32)) * 10**9 + (extra >> 2)


def _zeros(count: int) -> Iterator[bytes]:
    while count > 0:
        yield bytes(min(count, 1 << 20))
        count -= 1 << 20


def _attribute_list(entries: bytes, values: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    place = 0
    while place + 16 <= len(entries) and entries[place : place + 4] != b"\0\0\0\0":
        size, index, offset, inode, length = struct.unpack_from("<BBHII", entries, place)
        if inode or offset + length > len(values) or place + 16 + size > len(entries):
            raise NotExt4Error("the attributes of an inode are damaged")
        name = _PREFIXES.get(index, f"{index}.") + entries[place + 16 : place + 16 + size].decode(
            "utf-8", "backslashreplace"
        )
        found[name] = values[offset : offset + length]
        place += (16 + size + 3) & ~3
    return found
