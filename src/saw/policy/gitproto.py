"""The refs that a Git push changes, read from the start of its request body.

Sources: Git's ``gitprotocol-pack`` (reference update request), ``gitprotocol-http`` and ``git-check-ref-format``. What is
not understood is refused, never skipped.
"""

from __future__ import annotations

import re
import zlib
from typing import Literal

import msgspec

MAX_COMMANDS = 512
"""Most refs in one push."""
MAX_INFLATED = 1 << 20
"""Most bytes that a compressed body is unpacked to."""

Operation = Literal["create", "update", "delete"]

_LENGTH = re.compile(rb"[0-9a-fA-F]{4}\Z")
_COMMAND = re.compile(rb"([0-9a-f]{40}|[0-9a-f]{64}) ([0-9a-f]{40}|[0-9a-f]{64}) ([^\x00\n]+)\Z")
_SHALLOW = re.compile(rb"shallow ([0-9a-f]{40}|[0-9a-f]{64})\Z")
_BAD_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(?:/|\Z)|\.\Z|/\Z")


class PushUnreadable(ValueError):
    """The push cannot be read; the text says why."""


class RefUpdate(msgspec.Struct, frozen=True):
    """One command of a push: the full ref name and what happens to it."""

    ref: str
    operation: Operation


def inflate(body: bytes, encoding: str) -> bytes:
    """Undo a gzip content coding (RFC 9110), at most :data:`MAX_INFLATED` bytes of it; raise :class:`PushUnreadable`."""
    encoding = encoding.strip().lower()
    if encoding in {"", "identity"}:
        return body
    if encoding not in {"gzip", "x-gzip"}:
        raise PushUnreadable(f"the content coding {encoding!r} is not read")
    try:
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(body, MAX_INFLATED)
    except zlib.error as error:
        raise PushUnreadable("the body is not the gzip stream it claims to be") from error


def _ref_name(raw: bytes) -> str:
    try:
        ref = raw.decode("ascii")
    except UnicodeDecodeError as error:
        raise PushUnreadable("a ref name is not ASCII") from error
    if not ref.startswith("refs/") or len(ref) > 512 or _BAD_REF.search(ref):
        raise PushUnreadable(f"the ref name {ref[:80]!r} is not one that Git accepts")
    return ref


def _command(line: bytes, first: bool) -> RefUpdate | None:
    """Return the update of one pkt-line, or ``None`` for a ``shallow`` line."""
    text = line.removesuffix(b"\n")
    if _SHALLOW.match(text):
        return None
    if text.startswith(b"push-cert"):
        raise PushUnreadable("signed pushes are not read")
    if first:
        text = text.partition(b"\x00")[0]
    match = _COMMAND.match(text)
    if match is None or len(match[1]) != len(match[2]):
        raise PushUnreadable("a line is not a reference update command")
    old, new = set(match[1]) == {0x30}, set(match[2]) == {0x30}
    if old and new:
        raise PushUnreadable("a command neither creates, updates nor deletes")
    operation: Operation = "create" if old else "delete" if new else "update"
    return RefUpdate(_ref_name(match[3]), operation)


def push_updates(body: bytes | None, *, complete: bool, encoding: str = "") -> tuple[RefUpdate, ...]:
    """Return the updates of a ``git-receive-pack`` request; empty for the flush packet clients probe with.

    ``body`` is the start of the request body, ``complete`` whether it is all of it, ``encoding`` its content coding. The
    whole command list, up to its flush packet, must lie within ``body``. Raises :class:`PushUnreadable`.
    """
    if body is None:
        raise PushUnreadable("the body of the push was not seen")
    data = inflate(body, encoding)
    if data == b"0000":
        if not complete:
            raise PushUnreadable("a probe is followed by more data")
        return ()
    updates: list[RefUpdate] = []
    names: set[str] = set()
    at = 0
    while True:
        prefix = data[at : at + 4]
        if not _LENGTH.match(prefix):
            reason = "the command list does not end within the part that was seen" if len(prefix) < 4 else "no pkt-line"
            raise PushUnreadable(reason)
        length = int(prefix, 16)
        if length == 0:
            break
        if length < 5 or at + length > len(data):
            raise PushUnreadable("a pkt-line is cut or has a length that is not allowed")
        update = _command(data[at + 4 : at + length], first=not updates)
        if update is not None:
            if update.ref in names:
                raise PushUnreadable(f"the ref {update.ref} appears twice")
            names.add(update.ref)
            updates.append(update)
            if len(updates) > MAX_COMMANDS:
                raise PushUnreadable(f"the push changes more than {MAX_COMMANDS} refs")
        at += length
    if not updates:
        raise PushUnreadable("the command list is empty")
    return tuple(updates)
