"""What an SFTP session does, read off its packets: which files, in which direction, how many bytes.

Version 3 of the protocol, which OpenSSH speaks (draft-ietf-secsh-filexfer-02). What is no SFTP is refused, so that nobody
brings a shell through the subsystem unseen.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from saw.errors import SawError

MAX_PACKET = 512 * 1024
"""Longest packet (OpenSSH sends at most 256 KiB)."""
_U32 = struct.Struct(">I")
_INIT, _OPEN, _CLOSE, _READ, _WRITE, _OPENDIR = 1, 3, 4, 5, 6, 11
_VERSION, _HANDLE, _DATA = 2, 102, 103
_NAMED = {9: "setstat", 13: "remove", 14: "mkdir", 15: "rmdir"}
_TWICE = {18: "rename", 20: "symlink"}
_EXTENDED = 200
_ASKED = frozenset({_INIT, *range(3, 21), _EXTENDED})
_ANSWERED = frozenset({_VERSION, 101, _HANDLE, _DATA, 104, 105, 201})


class NotSftp(SawError):
    """What goes through the subsystem is not SFTP."""

    code = "not_sftp"


@dataclass
class _File:
    path: str
    read: int = 0
    written: int = 0


class _Packets:
    """Cuts a stream into packets; of a long one only the beginning is kept."""

    _KEEP = 8192

    def __init__(self, kinds: frozenset[int]) -> None:
        self._kinds = kinds
        self._head = bytearray()
        self._length: int | None = None
        self._seen = 0

    def feed(self, piece: bytes) -> list[tuple[int, bytes, int]]:
        """Return the packets that are whole now: type, beginning of what follows it, and length of all that follows it."""
        found = []
        view = memoryview(piece)
        while view:
            if self._length is None:
                wanted = 5 - len(self._head)
                self._head += view[:wanted]
                view = view[wanted:]
                if len(self._head) < 5:
                    break
                self._length = _U32.unpack(self._head[:4])[0]
                self._seen = 1
                if not 1 <= self._length <= MAX_PACKET or self._head[4] not in self._kinds:
                    raise NotSftp("what goes through the subsystem is not SFTP", cure="use sftp, scp or rsync")
            taken = view[: self._length - self._seen]
            room = self._KEEP - (len(self._head) - 5)
            if room > 0:
                self._head += taken[:room]
            self._seen += len(taken)
            view = view[len(taken) :]
            if self._seen == self._length:
                found.append((self._head[4], bytes(self._head[5:]), self._length - 1))
                self._head.clear()
                self._length = None
        return found


class SftpLog:
    """Remarks about what is asked and answered."""

    def __init__(self) -> None:
        self._out, self._back = _Packets(_ASKED), _Packets(_ANSWERED)
        self._opening: dict[int, str] = {}
        self._reading: dict[int, bytes] = {}
        self._files: dict[bytes, _File] = {}

    def asked(self, piece: bytes) -> list[str]:
        """Take what the client sends; return remarks."""
        remarks: list[str] = []
        for kind, body, length in self._out.feed(piece):
            if kind == _INIT:
                continue
            number = _u32(body, 0)
            if kind in {_OPEN, _OPENDIR}:
                self._opening[number] = "" if kind == _OPENDIR else _text(body, 4)
            elif kind == _WRITE:
                handle = _string(body, 4)
                # type, id, handle, offset, length, data
                if (file := self._files.get(handle)) is not None:
                    file.written += max(0, length - 4 - 4 - len(handle) - 8 - 4)
            elif kind == _READ:
                self._reading[number] = _string(body, 4)
            elif kind == _CLOSE:
                file = self._files.pop(_string(body, 4), None)
                if file is not None and file.path:
                    remarks.append(_said(file))
            elif kind in _NAMED:
                remarks.append(f"sftp {_NAMED[kind]} {_text(body, 4)}")
            elif kind in _TWICE:
                first = _string(body, 4)
                remarks.append(f"sftp {_TWICE[kind]} {_show(first)} {_text(body, 8 + len(first))}")
            elif kind == _EXTENDED:
                remarks += _extended(body)
        return remarks

    def answered(self, piece: bytes) -> list[str]:
        """Take what the workspace sends; return remarks."""
        for kind, body, length in self._back.feed(piece):
            if kind == _VERSION:
                continue
            number = _u32(body, 0)
            path, handle = self._opening.pop(number, None), self._reading.pop(number, None)
            if kind == _HANDLE and path is not None:
                self._files[_string(body, 4)] = _File(path)
            elif kind == _DATA and handle is not None and (file := self._files.get(handle)) is not None:
                file.read += max(0, length - 8)
        return []

    def finish(self) -> list[str]:
        """Return remarks about files that were not closed."""
        return [f"{_said(file)} (not closed)" for file in self._files.values() if file.path]


def _extended(body: bytes) -> list[str]:
    name = _string(body, 4)
    if name not in {b"posix-rename@openssh.com", b"hardlink@openssh.com"}:
        return []
    first = _string(body, 8 + len(name))
    return [f"sftp {name.partition(b'@')[0].decode()} {_show(first)} {_text(body, 12 + len(name) + len(first))}"]


def _said(file: _File) -> str:
    return f"sftp file {file.path} read {file.read} written {file.written} bytes"


def _u32(body: bytes, at: int) -> int:
    if len(body) < at + 4:
        raise NotSftp("a packet of SFTP is cut", cure="use sftp, scp or rsync")
    return int(_U32.unpack_from(body, at)[0])


def _string(body: bytes, at: int) -> bytes:
    length = _u32(body, at)
    if len(body) < at + 4 + length:
        raise NotSftp("a name in a packet of SFTP is too long", cure="use sftp, scp or rsync")
    return body[at + 4 : at + 4 + length]


def _text(body: bytes, at: int) -> str:
    return _show(_string(body, at))


def _show(raw: bytes) -> str:
    """Return a name as text without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in raw.decode("utf-8", "replace"))
