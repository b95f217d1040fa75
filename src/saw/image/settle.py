"""One moment stands for every time in an image, and one environment for every program that makes it.

A build that says when and where it ran cannot be repeated. So its programs get ``SOURCE_DATE_EPOCH`` (reproducible-builds.org),
one time zone, one language and one umask; times that are later than :data:`EPOCH` become it, and so does what a file system
records of its own making.
"""

from __future__ import annotations

import mmap
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saw.errors import SawError
from saw.image.ext4 import Ext4, Inode

EPOCH = 1767225600
"""The moment (seconds since 1970): 2026-01-01T00:00:00Z. It says nothing of when an image was made; its provenance does."""
MOMENT = "2026-01-01T00:00:00Z"
"""The same in words (RFC 3339), as it stands in bills of materials."""
UMASK = 0o022
ENVIRONMENT = {"SOURCE_DATE_EPOCH": str(EPOCH), "TZ": "UTC", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"}
"""What every program of a build gets, on this machine and in the tree."""
EXT4_ENVIRONMENT = {**ENVIRONMENT, "LC_ALL": "C", "E2FSPROGS_FAKE_TIME": str(EPOCH)}
"""For e2fsprogs, which sorts names by the language's rules and knows ``SOURCE_DATE_EPOCH`` from 1.47.1 on only."""


_NS = EPOCH * 10**9


class UnsettledError(SawError):
    """A tree or a file system cannot be given the times of a reproducible image."""

    code = "image_unsettled"


@contextmanager
def settled_umask() -> Iterator[None]:
    """Have files made with the modes that :data:`UMASK` leaves, whatever the caller's is."""
    before = os.umask(UMASK)
    try:
        yield
    finally:
        os.umask(before)


def settle_tree(root: Path) -> int:
    """Give everything below ``root`` that is newer than :data:`EPOCH` that time; return how much was newer.

    Links are not followed, and nothing outside of the tree's own file system is touched.
    """
    device, newer = root.lstat().st_dev, 0
    for folder, folders, files in os.walk(root, topdown=False):
        for name in (*files, *folders, ""):
            path = Path(folder, name) if name else Path(folder)
            status = path.lstat()
            if status.st_dev == device and status.st_mtime > EPOCH:
                os.utime(path, ns=(_NS, _NS), follow_symlinks=False)
                newer += 1
    return newer


def space_of(root: Path, block: int = 4096) -> int:
    """Return the bytes that what lies below ``root`` takes in blocks of ``block`` bytes.

    It is counted from the sizes of files: what they take on this machine depends on its file system, and on the moment.
    """
    seen: set[int] = set()
    total = block
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            status = Path(folder, name).lstat()
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                regular = stat.S_ISREG(status.st_mode)
                total += -(-status.st_size // block) * block if regular else block
    return total


def settle_ext4(image: Path) -> int:
    """Give every inode of the file system in ``image`` times that repeat; return how many had others.

    ``mkfs.ext4 -d`` takes over when an inode was changed and read on this machine, which nobody can set in a tree. Raises
    :class:`UnsettledError` when a time is still later than :data:`EPOCH` afterwards.
    """
    late = {number: node for number, node in _inodes(image).items() if node.ctime != _NS or node.atime != _NS}
    script = "".join(
        f"set_inode_field <{number}> {field} @{EPOCH}\n" for number in sorted(late) for field in ("ctime", "atime")
    )
    done = subprocess.run(
        ["debugfs", "-w", "-f", "-", str(image)],
        input=script, capture_output=True, text=True, check=False, env={**os.environ, **EXT4_ENVIRONMENT},
    )  # fmt: skip
    for number, node in _inodes(image).items():
        if (node.ctime, node.atime) != (_NS, _NS) or max(node.mtime, node.crtime) > _NS:
            words = done.stderr.strip()[-300:]
            raise UnsettledError(
                f"inode {number} of the image keeps its own times: {words}", cure="install e2fsprogs 1.46 or later"
            )
    return len(late)


def _inodes(image: Path) -> dict[int, Inode]:
    with image.open("rb") as stream:
        system = Ext4(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))
        return {node.number: node for _, node in system.walk()}
