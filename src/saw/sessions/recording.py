"""Recordings of sessions: chunks that are chained by hash and encrypted, each durable before its bytes are shown.

A file is the line ``saw-recording/1`` and frames: the length of a chunk (four bytes, most significant first) and the chunk,
AES-256-GCM under the key of this recording alone. The associated data of chunk *n* are the session, *n* and the chain up to
there, ``hash(n) = SHA-256(hash(n-1) ‖ sealed chunk n)``; so a chunk opens in its own place only, and the last hash, which
needs no key to compute, names the whole. The last chunk says how the session ended.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from saw.errors import SawError
from saw.identity.sealed import SealBroken, SealKey

MAGIC = b"saw-recording/1\n"
MAX_CHUNK = 1024 * 1024
"""Most bytes of one sealed chunk."""
_LENGTH = struct.Struct(">I")

Kind = Literal["o", "e", "i", "r", "m"]
"""Output, output on standard error, input, new size of the terminal, remark."""


class RecordingBroken(SawError):
    """A recording is not what was written: changed, cut, moved about, or of another session."""

    code = "recording_broken"


class RecordingFailed(SawError):
    """A recording cannot be written on; the session must not go on either."""

    code = "recording_failed"


class Header(msgspec.Struct, frozen=True):
    """Whose session it is. ``started`` is seconds since 1970, ``command`` is empty for a shell."""

    session: str
    workspace: str
    principal: str
    started: float
    command: str = ""
    terminal: bool = False
    columns: int = 80
    rows: int = 24
    term: str = ""


class Event(msgspec.Struct, frozen=True, array_like=True):
    """What went through at ``at`` (seconds since the start)."""

    at: float
    kind: Kind
    data: bytes


class Ending(msgspec.Struct, frozen=True):
    """How it ended, and what went through: bytes and their SHA-256 in both directions, recorded whole or not."""

    reason: str
    exit_code: int
    bytes_in: int
    bytes_out: int
    sha256_in: str
    sha256_out: str


class Chunk(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is sealed together. The first has the header, the last the ending."""

    header: Header | None = None
    events: tuple[Event, ...] = ()
    ending: Ending | None = None


class Summary(msgspec.Struct, frozen=True):
    """What a recording says of itself once all of it has been verified; ``ending`` is None when it was not finished."""

    header: Header
    ending: Ending | None
    digest: str
    chunks: int
    seconds: float


class Writer:
    """Writes one recording to an open file; every chunk is on the disk when :meth:`write` returns.

    ``limit`` is the most that the file may grow to (bytes).
    """

    def __init__(self, descriptor: int, session: str, key: SealKey, limit: int) -> None:
        self._descriptor = descriptor
        self._session = session
        self._key = key
        self._limit = limit
        self._size = 0
        self.chunks = 0
        self.digest = first_hash(session)
        self._put(MAGIC)

    @property
    def full(self) -> bool:
        """Whether nothing but an ending fits any more."""
        return self._size + MAX_CHUNK > self._limit

    def write(self, chunk: Chunk) -> None:
        """Seal and store ``chunk``; raise :class:`RecordingFailed` when it does not reach the disk."""
        sealed = self._key.seal(bound_to(self._session, self.chunks, self.digest), msgspec.msgpack.encode(chunk))
        self._put(_LENGTH.pack(len(sealed)) + sealed)
        self.digest = next_hash(self.digest, sealed)
        self.chunks += 1

    def _put(self, raw: bytes) -> None:
        try:
            done = 0
            while done < len(raw):
                done += os.write(self._descriptor, raw[done:])
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise RecordingFailed(
                f"the recording cannot be written: {error.strerror}", cure="tell the operator"
            ) from error
        self._size += len(raw)


def first_hash(session: str) -> str:
    """Return the hash that the chain of a session begins with."""
    return hashlib.sha256(MAGIC + session.encode()).hexdigest()


def next_hash(before: str, sealed: bytes) -> str:
    """Return the hash of the chain after one more chunk."""
    return hashlib.sha256(bytes.fromhex(before) + sealed).hexdigest()


def bound_to(session: str, place: int, before: str) -> bytes:
    """Return the associated data of the chunk at ``place`` (from 0)."""
    return f"saw-recording/1:{session}:{place}:{before}".encode()


def frames(stream: BinaryIO, *, unfinished: bool = False) -> Iterator[bytes]:
    """Yield the sealed chunks of a file; raise :class:`RecordingBroken` for one that is cut or no recording.

    With ``unfinished`` a last chunk of which a part is missing is left out.
    """
    if stream.read(len(MAGIC)) != MAGIC:
        raise RecordingBroken("this is no recording of a session", cure="give the file that the bastion wrote")
    place = 0
    while head := stream.read(_LENGTH.size):
        length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
        sealed = stream.read(length) if 0 < length <= MAX_CHUNK + 4096 else b""
        if unfinished and (len(head) < _LENGTH.size or (sealed and len(sealed) < length)):
            return
        if not sealed or len(sealed) != length:
            raise RecordingBroken(
                f"the recording is cut or changed at chunk {place + 1}", cure="compare it with a copy"
            )
        yield sealed
        place += 1


def digest_of(path: Path, session: str, *, unfinished: bool = False) -> str:
    """Return the hash that names a recording, without its key; with ``unfinished`` that of its whole chunks."""
    digest = first_hash(session)
    with path.open("rb") as stream:
        for sealed in frames(stream, unfinished=unfinished):
            digest = next_hash(digest, sealed)
    return digest


def read(stream: BinaryIO, session: str, key: SealKey, *, unfinished: bool = False) -> Iterator[tuple[Chunk, str]]:
    """Yield the chunks of a recording in order, each with the hash of the chain so far; raise :class:`RecordingBroken`."""
    digest = first_hash(session)
    over = False
    for place, sealed in enumerate(frames(stream, unfinished=unfinished)):
        try:
            chunk = msgspec.msgpack.decode(key.open(bound_to(session, place, digest), sealed), type=Chunk)
        except (SealBroken, msgspec.DecodeError) as error:
            raise RecordingBroken(
                f"chunk {place + 1} of the recording was changed, is out of its place or is of another session",
                cure="compare it with a copy; the audit trail has the recording's digest",
            ) from error
        if over or (place == 0) != (chunk.header is not None):
            raise RecordingBroken(
                f"chunk {place + 1} of the recording is out of its place", cure="compare it with a copy"
            )
        digest = next_hash(digest, sealed)
        over = chunk.ending is not None
        yield chunk, digest


def verify(path: Path, session: str, key: SealKey, *, digest: str | None = None, unfinished: bool = False) -> Summary:
    """Read all of a recording and return what it says of itself.

    ``digest`` is what the broker was told; a recording that ends elsewhere is refused. One without an ending is refused
    unless ``unfinished`` is set. Raises :class:`RecordingBroken`.
    """
    header, ending, found, chunks, seconds = None, None, first_hash(session), 0, 0.0
    with path.open("rb") as stream:
        for chunk, now in read(stream, session, key, unfinished=unfinished):
            header, ending, found = header or chunk.header, chunk.ending, now
            chunks += 1
            seconds = max((event.at for event in chunk.events), default=seconds)
    if header is None:
        raise RecordingBroken("the recording is empty", cure="compare it with a copy")
    if digest is not None and digest != found:
        raise RecordingBroken(
            f"the recording ends at chunk {chunks}, which is not where the audit trail says that it ends",
            cure="chunks are missing: compare it with a copy",
        )
    if ending is None and not unfinished:
        raise RecordingBroken(
            f"the recording is cut after chunk {chunks}: it does not say how the session ended",
            cure="the recorder was killed or the file was cut; --unfinished plays what is there",
        )
    return Summary(header, ending, found, chunks, seconds)


def events(path: Path, session: str, key: SealKey, *, unfinished: bool = False) -> Iterator[Event]:
    """Yield the events of a recording, which is verified on the way."""
    with path.open("rb") as stream:
        for chunk, _ in read(stream, session, key, unfinished=unfinished):
            yield from chunk.events
