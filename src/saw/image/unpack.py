"""A root tree out of a disk image, without mounting it: contents, modes, owners, attributes, times, hard links, device nodes.

The disk is that of a machine which roles ran on, so it is read as something that may hold anything: names and numbers are
checked by :mod:`saw.image.ext4`, nothing is written through a link, and a file system that was not put down whole is refused.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import tempfile
from pathlib import Path

from saw.image.compare_disk import opened, partitions
from saw.image.disk import ImageError
from saw.image.ext4 import Ext4, Inode

_STATE, _WHOLE, _ERRORS = 58, 1, 2
_INCOMPATIBLE, _RECOVER = 96, 4
_SPECIAL_FLAGS = 0x10 | 0x20
"""``chattr +i`` and ``+a``."""
_ACL = "system."


def unpack_disk(disk: Path, root: Path) -> int:
    """Write the partition ``root`` of ``disk`` (raw or qcow2) below ``root``, a folder that is empty or not there.

    Returns how many paths were written. Raises :class:`ImageError`, and NotExt4Error for a damaged file system.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".unpack-", dir=disk.parent) as scratch,
        opened(disk, Path(scratch, "raw")) as data,
    ):
        parts = [part for part in partitions(data, disk)[1] if part.name == "root"]
        if len(parts) != 1:
            raise ImageError(f"{disk} has {len(parts)} partitions with the name root", cure="build it again")
        system = Ext4(data[parts[0].start : parts[0].start + parts[0].size], names="surrogateescape")
        _refuse_unclean(system, disk)
        return _write(system, root)


def _refuse_unclean(system: Ext4, disk: Path) -> None:
    (state,) = struct.unpack_from("<H", system.super, _STATE)
    (incompatible,) = struct.unpack_from("<I", system.super, _INCOMPATIBLE)
    if not state & _WHOLE or state & _ERRORS or incompatible & _RECOVER:
        raise ImageError(
            f"the file system of {disk} was not put down whole: the machine was cut off",
            cure="build it again, and read packer.log where that comes again",
        )


def _write(system: Ext4, root: Path) -> int:
    seen: dict[int, Path] = {}
    folders: list[tuple[Path, Inode]] = []
    count = 0
    for name, node in system.walk():
        path = root / name[1:] if name != "/" else root
        count += 1
        if node.flags & _SPECIAL_FLAGS:
            raise ImageError(
                f"{name} may not be changed or only grow (chattr)", cure="have the role leave that to units"
            )
        if node.kind == "folder":
            if path != root:
                path.mkdir(mode=0o700)
            folders.append((path, node))
            continue
        if node.links > 1 and node.number in seen:
            os.link(seen[node.number], path, follow_symlinks=False)
            continue
        seen[node.number] = path
        _make(system, path, name, node)
        _dress(path, name, node)
    for path, node in reversed(folders):
        _dress(path, str(path), node)
    return count


def _make(system: Ext4, path: Path, name: str, node: Inode) -> None:
    if node.kind == "file":
        with path.open("xb") as stream:
            for piece in system.content(node):  # zeros too: a hole would show in what mkfs.ext4 says that it wrote
                stream.write(piece)
    elif node.kind == "link":
        path.symlink_to(os.fsdecode(b"".join(system.content(node))))
    elif node.kind in {"character device", "block device", "pipe", "socket"}:
        os.mknod(path, stat.S_IFMT(node.mode) | 0o600, _device(node.raw))
    else:
        raise ImageError(f"{name} is a file of an unknown type", cure="build it again")


def _dress(path: Path, name: str, node: Inode) -> None:
    """Give ``path`` owner, mode, attributes and time of ``node``; the owner first, since it takes set-user-id bits away."""
    os.chown(path, node.uid, node.gid, follow_symlinks=False)
    if node.kind != "link":
        path.chmod(stat.S_IMODE(node.mode))
    for attribute, value in node.attributes.items():
        if attribute.startswith(_ACL):
            raise ImageError(f"{name} has an access control list", cure="have the role set modes and owners")
        try:
            os.setxattr(path, attribute, value, follow_symlinks=False)
        except OSError as error:
            word = errno.errorcode.get(error.errno or 0, str(error.errno))
            raise ImageError(
                f"{path} cannot have the attribute {attribute} here: {word}", cure="build as root"
            ) from error
    os.utime(path, ns=(node.mtime, node.mtime), follow_symlinks=False)


def _device(raw: bytes) -> int:
    """Return a device's number: ext4 keeps old 16-bit ones in the first word, others in the second."""
    old, new = struct.unpack_from("<II", raw)
    if old:
        return os.makedev(old >> 8 & 0xFF, old & 0xFF)
    return os.makedev((new & 0xFFF00) >> 8, (new & 0xFF) | (new >> 12 & 0xFFF00))
