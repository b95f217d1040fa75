"""Reads a Git packfile that somebody hostile may have written: within bounds, by content, and naming what it leaves out.

Source: Git's ``gitformat-pack``. An object's name is computed from its bytes, never believed. Nothing is inflated beyond its
declared size, and the declared size is compared with the bounds before anything is inflated.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from typing import Literal

import msgspec

from saw.review.line_diff import Effort

MAX_OBJECTS = 20_000
"""Most objects that are read of one pack."""
MAX_OBJECT = 8 * 1024 * 1024
"""Largest object that is kept (bytes); of a larger one that is no delta its name and size are known."""
MAX_KEPT = 64 * 1024 * 1024
"""Most bytes of objects that are kept of one push, with its context."""
MAX_INFLATED = 256 * 1024 * 1024
"""Most bytes that are inflated of one push, with its context, also where they are not kept."""
MAX_CHAIN = 256
"""Most deltas between an object and the whole one that it is made from."""
MAX_STEPS = 4_000_000
"""Most instructions of deltas that are followed for one push, with its context."""
_PIECE = 64 * 1024

Kind = Literal["commit", "tree", "blob", "tag"]
_KINDS: dict[int, Kind] = {1: "commit", 2: "tree", 3: "blob", 4: "tag"}
_OFS_DELTA, _REF_DELTA = 6, 7


class Damaged(ValueError):
    """The pack is not well-formed from here on; the text says why."""


class Object(msgspec.Struct, frozen=True):
    """One object: ``size`` in bytes, and its content where it is kept."""

    kind: Kind
    size: int
    data: bytes | None


class Store:
    """Objects by name (lower-case hex), and what is left of the bounds that all packs of a push share.

    ``hash_name`` is ``sha1`` or ``sha256``, by the repository's object format.
    """

    def __init__(self, hash_name: Literal["sha1", "sha256"] = "sha1") -> None:
        self.objects: dict[str, Object] = {}
        self.kept_left = MAX_KEPT
        self.inflated_left = MAX_INFLATED
        self.effort = Effort(MAX_STEPS)
        self.hash_name = hash_name
        self.hash_size = hashlib.new(hash_name).digest_size

    def data(self, name: str, kind: Kind) -> bytes | None:
        """Return the bytes of an object of that kind; None when it is not there, not kept, or of another kind."""
        found = self.objects.get(name)
        return found.data if found is not None and found.kind == kind else None

    def add(self, kind: Kind, data: bytes) -> str:
        """Keep a whole object whose size is accounted for, and return its name."""
        name = self.name(kind, data)
        self.objects.setdefault(name, Object(kind, len(data), data))
        return name

    def name(self, kind: Kind, data: bytes) -> str:
        """Return the name of an object."""
        digest = hashlib.new(self.hash_name, f"{kind} {len(data)}\0".encode())
        digest.update(data)
        return digest.hexdigest()


class Pack(msgspec.Struct):
    """What was read of one pack: the names of its objects, the names of delta bases that are not there, and what is wrong.

    ``problems`` are sentences for people without a character from the pack. ``left_out`` counts objects that were not read or
    not resolved.
    """

    names: dict[str, None] = msgspec.field(default_factory=dict)
    bases: dict[str, None] = msgspec.field(default_factory=dict)
    problems: list[str] = msgspec.field(default_factory=list)
    declared: int = 0
    left_out: int = 0


class _Delta(msgspec.Struct, frozen=True):
    at: int
    base: int | str
    data: bytes


def read_pack(data: bytes, store: Store) -> Pack:
    """Read ``data``, a whole packfile with its trailer, into ``store``; never raises for what is in it.

    A delta against an object of ``store`` is resolved, so read what the far end has first.
    """
    end = len(data) - store.hash_size
    if end < 12 or data[:4] != b"PACK" or int.from_bytes(data[4:8], "big") not in {2, 3}:
        return Pack(problems=[f"the {len(data)} bytes after the commands are no packfile"])
    reader = _Reader(data, end, store)
    pack = reader.pack
    if hashlib.new(store.hash_name, data[:end]).digest() != data[end:]:
        pack.problems.append("the checksum of the packfile does not hold")
    pack.declared = int.from_bytes(data[8:12], "big")
    count, at = min(pack.declared, MAX_OBJECTS), 12
    for number in range(count):
        try:
            at = reader.read(at)
        except (Damaged, zlib.error) as error:
            why = str(error) if isinstance(error, Damaged) else "its bytes cannot be inflated"
            pack.problems.append(f"object {number + 1} of {pack.declared} cannot be read: {why}")
            pack.left_out += pack.declared - number
            break
    else:
        if pack.declared > count:
            pack.problems.append(f"the packfile has {pack.declared} objects, more than the {MAX_OBJECTS} that are read")
            pack.left_out += pack.declared - count
        elif at != end:
            pack.problems.append(f"{end - at} bytes follow the last object")
    _resolve(reader.deltas, reader.offsets, store, pack)
    return pack


class _Reader:
    """Reads the entries of one pack in their order. ``offsets`` are the names of whole objects by where they begin."""

    def __init__(self, data: bytes, end: int, store: Store) -> None:
        self.pack = Pack()
        self.offsets: dict[int, str] = {}
        self.deltas: list[_Delta] = []
        self._data = data
        self._end = end
        self._store = store
        self._starts: set[int] = set()

    def read(self, start: int) -> int:
        """Read the object at ``start`` and return where the next one begins; raise :class:`Damaged` or ``zlib.error``."""
        store, data = self._store, self._data
        number, size, at = _head(data, start, self._end)
        base: int | str = ""
        if number == _OFS_DELTA:
            back, at = _offset(data, at, self._end)
            base = start - back
            if base not in self._starts:
                raise Damaged("it is a delta against something that does not begin an object")
        elif number == _REF_DELTA:
            base, at = data[at : at + store.hash_size].hex(), at + store.hash_size
        elif number not in _KINDS:
            raise Damaged(f"its type {number} does not exist")
        self._starts.add(start)
        if size > store.inflated_left:
            raise Damaged(f"it has {size} bytes, and no more than {MAX_INFLATED} bytes of a push are inflated")
        store.inflated_left -= size
        keep = size <= min(MAX_OBJECT, store.kept_left)
        kind = _KINDS.get(number)
        digest = hashlib.new(store.hash_name, f"{kind} {size}\0".encode())
        whole = bytearray()
        for piece in _inflated(data, at, self._end, size):
            if isinstance(piece, int):
                at = piece
            elif keep:
                whole += piece
            else:
                digest.update(piece)
        if keep:
            store.kept_left -= size
        if kind is not None:
            name = store.add(kind, bytes(whole)) if keep else digest.hexdigest()
            store.objects.setdefault(name, Object(kind, size, None))
            self.offsets[start] = name
            self.pack.names[name] = None
        elif keep:
            self.deltas.append(_Delta(start, base, bytes(whole)))
        else:
            self.pack.left_out += 1
            self.pack.problems.append(f"a delta of {size} bytes is beyond the bounds and NOT applied")
        return at


def _head(data: bytes, at: int, end: int) -> tuple[int, int, int]:
    """Return type and declared size of an entry, and where it goes on."""
    if at >= end:
        raise Damaged("the packfile ends before it")
    byte = data[at]
    at += 1
    number, size, shift = byte >> 4 & 7, byte & 15, 4
    while byte & 0x80:
        if at >= end or shift > 60:
            raise Damaged("its size cannot be read")
        byte = data[at]
        at += 1
        size |= (byte & 0x7F) << shift
        shift += 7
    return number, size, at


def _offset(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Return how far back the base of a delta lies, and where the entry goes on."""
    value = -1
    for _ in range(9):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value = (value + 1) << 7 | byte & 0x7F
        if not byte & 0x80:
            return value, at
    raise Damaged("the place of its base cannot be read")


def _inflated(data: bytes, at: int, end: int, size: int) -> Iterator[bytes | int]:
    """Yield the inflated bytes at ``at`` in pieces, exactly ``size`` of them, and then where the stream ended."""
    stream, have = zlib.decompressobj(), 0
    step = min(_PIECE, size + 64)
    while not stream.eof:
        if at >= end:
            raise Damaged("the packfile ends within it")
        given = data[at : min(at + step, end)]
        at += len(given)
        step = _PIECE
        while True:
            piece = stream.decompress(given, min(_PIECE, size - have + 1))
            have += len(piece)
            if have > size:
                raise Damaged(f"it has more than the {size} bytes that it declares")
            if piece:
                yield piece
            given = stream.unconsumed_tail
            if stream.eof or (not given and len(piece) < _PIECE):
                break
    if have != size:
        raise Damaged(f"it has {have} bytes and declares {size}")
    yield at - len(stream.unused_data)


def _resolve(deltas: list[_Delta], offsets: dict[int, str], store: Store, pack: Pack) -> None:
    """Apply what can be applied, bases first; deltas in a circle, or without a base, stay and are counted."""
    waiting: dict[int | str, list[_Delta]] = {}
    for delta in deltas:
        waiting.setdefault(delta.base, []).append(delta)
    ready: list[tuple[int | str, str, int]] = [(at, name, 0) for at, name in offsets.items()]
    ready += [(name, name, 0) for name in [*store.objects] if name in waiting]
    refused = 0
    while ready:
        key, base, depth = ready.pop()
        for delta in waiting.pop(key, []):
            name = _applied(store, base, delta) if depth < MAX_CHAIN else None
            if name is None:
                refused += 1
                continue
            pack.names[name] = None
            ready += [(delta.at, name, depth + 1), (name, name, depth + 1)]
    if refused:
        pack.problems.append(f"{refused} deltas are damaged or beyond the bounds and NOT applied")
    left = sum(len(found) for found in waiting.values())
    pack.left_out += refused + left
    pack.bases = {key: None for key in waiting if isinstance(key, str)}
    if left:
        pack.problems.append(f"{left} objects are deltas against what is not here, and are NOT resolved")


def _applied(store: Store, base: str, delta: _Delta) -> str | None:
    found = store.objects[base]
    if found.data is None:
        return None
    try:
        made = apply_delta(found.data, delta.data, min(MAX_OBJECT, store.kept_left), store.effort)
    except Damaged:
        return None
    store.kept_left -= len(made)
    return store.add(found.kind, made)


def apply_delta(base: bytes, delta: bytes, most: int, effort: Effort) -> bytes:
    """Return what ``delta`` makes of ``base``, ``most`` bytes at most; each instruction counts as a step of ``effort``.

    Raises :class:`Damaged`.
    """
    source, at = _varint(delta, 0)
    target, at = _varint(delta, at)
    if source != len(base) or target > most:
        raise Damaged("the sizes of a delta do not fit")
    made = bytearray()
    while at < len(delta):
        code = delta[at]
        at += 1
        effort.left -= 1
        if effort.left < 0:
            raise Damaged("there are too many instructions")
        if code & 0x80:
            numbers = [0] * 7
            for bit in range(7):
                if code >> bit & 1:
                    if at >= len(delta):
                        raise Damaged("a delta is cut")
                    numbers[bit] = delta[at]
                    at += 1
            start = int.from_bytes(bytes(numbers[:4]), "little")
            size = int.from_bytes(bytes(numbers[4:]), "little") or 0x10000
            if start + size > len(base):
                raise Damaged("a delta copies what is not there")
            piece = base[start : start + size]
        elif code:
            piece = delta[at : at + code]
            at += code
            if len(piece) != code:
                raise Damaged("a delta is cut")
        else:
            raise Damaged("a delta has an instruction that does not exist")
        if len(made) + len(piece) > target:
            raise Damaged("a delta makes more than it declares")
        made += piece
    if len(made) != target:
        raise Damaged("a delta makes less than it declares")
    return bytes(made)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift <= 60:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, at
    raise Damaged("a size in a delta cannot be read")
