"""The request body of a Git push taken apart: its commands, what the client asks for, its options, and its packfile."""

from __future__ import annotations

import zlib
from typing import Literal

import msgspec

from saw.policy.gitproto import PushUnreadable, push_updates

MAX_BODY = 16 * 1024 * 1024
"""Most bytes that a compressed body is unpacked to for showing it."""


class Command(msgspec.Struct, frozen=True):
    """One ref and its names before and after; no name is an empty text."""

    ref: str
    old: str
    new: str

    @property
    def operation(self) -> Literal["create", "update", "delete"]:
        """Return what happens to the ref."""
        return "create" if not self.old else "delete" if not self.new else "update"


class PushRequest(msgspec.Struct, frozen=True):
    """A push. ``asked`` is what the client says it understands, ``pack`` the bytes after everything else.

    ``problems`` are sentences about what is not as it must be.
    """

    commands: tuple[Command, ...]
    shallow: tuple[str, ...]
    asked: str
    options: tuple[str, ...]
    pack: bytes
    problems: tuple[str, ...] = ()


def read_push(body: bytes, coding: str) -> PushRequest:
    """Return what ``body`` asks for; ``coding`` is its content coding. Raises :class:`PushUnreadable`."""
    push_updates(body, complete=True, encoding=coding)
    data, problems = _unpacked(body, coding.strip().lower())
    commands, shallow, asked, at = [], [], "", 0
    while length := int(data[at : at + 4], 16):
        line, _, said = data[at + 4 : at + length].removesuffix(b"\n").partition(b"\0")
        at += length
        asked = asked or said.decode("utf-8", "backslashreplace").strip()
        old, _, rest = line.decode("ascii").partition(" ")
        new, _, ref = rest.partition(" ")
        if ref:
            commands.append(Command(ref, _name(old), _name(new)))
        else:
            shallow.append(new)
    at += 4
    options: list[str] = []
    if "push-options" in asked.split():
        options, at = _options(data, at)
    return PushRequest(tuple(commands), tuple(shallow), asked, tuple(options), data[at:], problems)


def _unpacked(body: bytes, coding: str) -> tuple[bytes, tuple[str, ...]]:
    if coding in {"", "identity"}:
        return body, ()
    stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        data = stream.decompress(body, MAX_BODY)
    except zlib.error as error:
        raise PushUnreadable("the body is not the gzip stream it claims to be") from error
    if not stream.eof:
        return data, (f"the body is compressed ({coding}): what is beyond its first {len(data)} bytes is NOT shown",)
    if stream.unused_data:
        return data, (f"{len(stream.unused_data)} bytes follow the compressed body and are NOT shown",)
    return data, ()


def _options(data: bytes, at: int) -> tuple[list[str], int]:
    options: list[str] = []
    while True:
        prefix = data[at : at + 4]
        if len(prefix) < 4 or any(byte not in b"0123456789abcdefABCDEF" for byte in prefix):
            raise PushUnreadable("the options of the push do not end")
        length = int(prefix, 16)
        if length == 0:
            return options, at + 4
        if length < 5 or at + length > len(data):
            raise PushUnreadable("an option of the push is cut")
        options.append(data[at + 4 : at + length].removesuffix(b"\n").decode("utf-8", "backslashreplace"))
        at += length


def _name(text: str) -> str:
    return text if text.strip("0") else ""
