"""Repositories made with the real git, the bodies of pushes out of them, and hand-made packs that git would not write."""

from __future__ import annotations

import hashlib
import os
import subprocess
import zlib
from pathlib import Path

NONE = "0" * 40
_ENV = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.com",
    "GIT_AUTHOR_DATE": "1700000000 +0100",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.com",
    "GIT_COMMITTER_DATE": "1700000060 +0100",
}


class Repository:
    """A working copy; every commit has the same author and time."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.git("init", "-q", "-b", "main", *options)

    def git(self, *arguments: str, given: bytes = b"") -> str:
        return self.raw(*arguments, given=given).decode().strip()

    def raw(self, *arguments: str, given: bytes = b"") -> bytes:
        command = ["git", "-C", str(self.folder), *arguments]
        return subprocess.run(command, input=given, capture_output=True, check=True, env={**os.environ, **_ENV}).stdout

    def write(self, files: dict[str, bytes | str | None]) -> None:
        for name, content in files.items():
            path = self.folder / name
            if content is None:
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def commit(self, files: dict[str, bytes | str | None], message: str = "change") -> str:
        self.write(files)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def pack(self, *revisions: str, thin: bool = True) -> bytes:
        """Return the packfile that a push of these revisions (``new``, ``^old``) would send."""
        options = ["--thin"] if thin else []
        return self.raw(
            "pack-objects",
            "--stdout",
            "--revs",
            "--delta-base-offset",
            "-q",
            *options,
            given="\n".join(revisions).encode(),
        )

    def push(self, old: str, new: str, ref: str = "refs/heads/main", *have: str) -> bytes:
        """Return the body of a push that moves ``ref``; the far end has ``old`` and ``have``."""
        revisions = [new, *(f"^{one}" for one in (old, *have) if one.strip("0"))]
        return body((old, new, ref), pack=self.pack(*revisions) if new.strip("0") else b"")


def body(
    *commands: tuple[str, str, str], pack: bytes = b"", asks: str = "report-status", options: bytes = b""
) -> bytes:
    lines = [f"{old} {new} {ref}" + (f"\0 {asks}" if not at else "") for at, (old, new, ref) in enumerate(commands)]
    return b"".join(pkt(line.encode()) for line in lines) + b"0000" + options + pack


def pkt(payload: bytes) -> bytes:
    return f"{len(payload) + 4:04x}".encode() + payload


def entry(kind: int, content: bytes, *, size: int | None = None, base: bytes = b"", raw: bytes | None = None) -> bytes:
    """Return one object of a pack: ``size`` is what it declares, ``base`` what a delta has before its stream."""
    size = len(content) if size is None else size
    head, size = [kind << 4 | size & 15], size >> 4
    while size:
        head[-1] |= 0x80
        head.append(size & 0x7F)
        size >>= 7
    return bytes(head) + base + (zlib.compress(content) if raw is None else raw)


def pack_of(*entries: bytes, count: int | None = None, tail: bytes = b"", checksum: bytes | None = None) -> bytes:
    data = b"PACK" + (2).to_bytes(4, "big") + (len(entries) if count is None else count).to_bytes(4, "big")
    data += b"".join(entries) + tail
    return data + (hashlib.sha1(data, usedforsecurity=False).digest() if checksum is None else checksum)


def name_of(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def commit_of(tree: str, *parents: str, message: str = "made") -> bytes:
    lines = [f"tree {tree}", *(f"parent {one}" for one in parents)]
    lines += [f"{who} A <a@example.com> 1700000000 +0000" for who in ("author", "committer")]
    return ("\n".join(lines) + f"\n\n{message}\n").encode()


def tree_of(*entries: tuple[str, bytes, str]) -> bytes:
    return b"".join(mode.encode() + b" " + name + b"\0" + bytes.fromhex(oid) for mode, name, oid in entries)
