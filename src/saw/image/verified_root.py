"""A root file system that nothing changes: read-only, and every block of it checked against a hash that is signed and measured.

Chosen by ``make image ROOT_VERITY=1`` or the environment variable below; off by default. Three partitions take the place of one:

    root     ext4 for reading, the tree but for what lies in /var
    verity   the hash tree over it (:mod:`saw.image.verity`)
    var      ext4 for writing, what lies in /var; with the root disk it stays over restarts and goes with a rebuild

The root hash stands on the kernel's command line, which is part of the boot image: its signature covers it, and PCR 4 and 11 have
it. docs/decisions/0083 says why so.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from saw.image.disk import MIB, ROOT_TYPE, SPARE_BYTES, WORDS, ImageError, Part, Roots, kernel_release, make_ext4
from saw.image.initrd import make_initrd
from saw.image.settle import space_of
from saw.image.verity import BLOCK, partition_ids, write_tree

VARIABLE = "SAW_IMAGE_ROOT_VERITY"
"""Environment variable: 1 for a verified root."""
OPTION = "root_verity"
"""Name of the option in the records of a build."""
VERITY_TYPE = "2C7357ED-EBD2-46D9-AEC1-23D437EC2BF5"  # hash tree of a root, x86-64 (the same specification)
VAR_TYPE = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"  # data of Linux: the type for /var is bound to one machine's id
_INODE = 256
_OWN_BYTES = 16 * MIB
"""What the root's file system needs for itself, besides inodes and a twentieth of what it holds."""


def chosen(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the environment asks for a verified root; raises :class:`ImageError` for a value that means nothing."""
    value = (os.environ if environment is None else environment).get(VARIABLE, "")
    if value not in {"", "0", "1"}:
        raise ImageError(f"{VARIABLE}={value} means nothing", cure="give 1, or leave it out")
    return value == "1"


def layout(root: Path, work: Path, seed: str) -> Roots:
    """Make the three partitions of a tree, and the initial file system that opens them; raises :class:`ImageError`."""
    if (root / "boot" / f"initrd.img-{kernel_release(root)}").exists():
        raise ImageError(
            "the kernel of this tree needs the initrd of its distribution, which opens no verified root",
            cure="take another base system, or leave ROOT_VERITY out",
        )
    data, tree, var, initrd = work / "root.img", work / "verity.img", work / "var.img", work / "initrd"
    make_initrd(root, initrd)
    inodes = _paths(root) - _paths(root / "var") + 1024
    size = (space_of(root) - space_of(root / "var")) * 21 // 20 + inodes * _INODE + _OWN_BYTES
    make_ext4(
        root, data, size, _derived(seed, "root"), "saw-root", "-m", "0", "-b", str(BLOCK), "-I", str(_INODE), "-N", str(inodes),
        "-O", "^has_journal,^resize_inode", hide="var",
    )  # fmt: skip
    salt = hashlib.sha256(f"{seed}/salt".encode()).digest()
    root_hash = write_tree(data, tree, salt=salt, identity=_derived(seed, "verity"))
    os.truncate(tree, -(-tree.stat().st_size // MIB) * MIB)
    guids, var_id = partition_ids(root_hash), _derived(seed, "var")
    make_ext4(root / "var", var, space_of(root / "var") * 6 // 5 + SPARE_BYTES, var_id, "saw-var", "-m", "1")
    parts = (
        Part(data, ROOT_TYPE, str(guids[0]), "root"),
        Part(tree, VERITY_TYPE, str(guids[1]), "verity"),
        Part(var, VAR_TYPE, str(var_id), "var"),
    )
    # systemd finds the root open and would only try to open it once more.
    return Roots(parts, f"roothash={root_hash} saw.var={var_id} ro systemd.verity=no {WORDS}", initrd, root_hash)


def root_hash_of(command_line: str) -> str:
    """Return the root hash on a kernel's command line, empty where there is none; raise :class:`ImageError` for several."""
    found = [word.partition("=")[2] for word in command_line.split() if word.startswith("roothash=")]
    if len(found) > 1:
        raise ImageError("the boot image names several root hashes", cure="build the image again")
    return found[0] if found else ""


def _derived(seed: str, name: str) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{seed}/{name}")


def _paths(folder: Path) -> int:
    return 1 + sum(len(folders) + len(files) for _, folders, files in os.walk(folder))
