"""Whether files are as their Debian packages say; an explanation for a change, and no proof: root can write these records too."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

RECORDS = Path("/var/lib/dpkg/info")
_MERGED = ("/usr/bin/", "/usr/sbin/", "/usr/lib/", "/usr/lib64/")


def packages_of(paths: Iterable[str], records: Path = RECORDS) -> dict[str, str]:
    """Return path → package for those of ``paths`` whose content now has the MD5 sum that a package records for it.

    The records are ``*.md5sums`` of dpkg, which hold no configuration files. /usr was merged, and some packages still say /bin.
    """
    wanted: dict[bytes, str] = {}
    for path in paths:
        for name in (path, path.removeprefix("/usr")) if path.startswith(_MERGED) else (path,):
            wanted[os.fsencode(name).removeprefix(b"/")] = path
    found: dict[str, str] = {}
    if not wanted:
        return found
    sums: dict[str, str] = {}
    for record in sorted(records.glob("*.md5sums")):
        for line in record.read_bytes().splitlines():
            digest, _, name_of = line.partition(b"  ")
            path = wanted.get(name_of, "")
            if path and digest.decode("ascii", "replace") == (sums.get(path) or sums.setdefault(path, md5_of(path))):
                found[path] = record.stem
    return found


def md5_of(path: str) -> str:
    """Return the MD5 sum of a file as dpkg records it, or a word when it cannot be read."""
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError:
        return "unreadable"


__all__ = ["packages_of"]
