"""Signed notes and checkpoints (C2SP ``signed-note``, ``tlog-checkpoint``, ``tlog-cosignature``), with Ed25519 keys.

A key has a name. Its public form is one line, ``NAME+ID+base64(type, key)``; its private form, as Go's notes have it, is the same
behind ``PRIVATE+KEY+``. Type 1 signs notes, type 4 is a witness's and signs them with the time. A log signs with the time too, by
the same Ed25519 key under type 4: what the two types sign begins with different lines, so neither signature is one of the other.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from saw.errors import ConfigError, SawError

Kind = Literal[1, 4]
LOG: Kind = 1
WITNESS: Kind = 4
_PRIVATE = "PRIVATE+KEY+"
_NAME = re.compile(r"[^\s+\x00-\x20\x7f]{1,200}")
_SIZE = re.compile(r"0|[1-9][0-9]{0,17}")
LONGEST_NOTE, _MOST_SIGNATURES = 65_536, 64


class NoteError(SawError):
    """A note, a key or a checkpoint is not valid. ``code`` says which kind of defect."""

    code = "note_invalid"


class PublicKey(msgspec.Struct, frozen=True):
    """A public key with its name; ``raw`` are its 32 bytes."""

    name: str
    kind: Kind
    raw: bytes

    @property
    def id(self) -> bytes:
        """The four bytes that mark its signatures."""
        return hashlib.sha256(self.name.encode() + b"\n" + bytes([self.kind]) + self.raw).digest()[:4]

    @property
    def line(self) -> str:
        """The public form, without the end of the line."""
        return f"{self.name}+{self.id.hex()}+{base64.b64encode(bytes([self.kind]) + self.raw).decode()}"

    @property
    def timed(self) -> PublicKey:
        """The same key of type 4, with which a log says when a checkpoint was its newest."""
        return PublicKey(self.name, WITNESS, self.raw)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the public form; raise :class:`NoteError`."""
        name, kind, raw, marked = _key_line(text.strip(), "public key")
        key = cls(name, kind, raw)
        if key.id != marked:
            raise NoteError(f"the id of public key {name} does not fit it", cure="copy the whole line again")
        return key

    @classmethod
    def read(cls, path: Path | str, kind: Kind) -> Self:
        """Read the key of a log (``LOG``) or a witness (``WITNESS``) from a file; raise ``ConfigError`` or :class:`NoteError`."""
        try:
            found = cls.parse(Path(path).read_bytes().decode("utf-8", "replace"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}", cure="check the path") from error
        if found.kind != kind:
            other = "log" if kind == WITNESS else "witness"
            raise ConfigError(f"{path} is the key of a {other}", cure="use the other file")
        return found

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Tell whether ``signature`` over ``message`` is by this key."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


class Signer:
    """A private key with its name."""

    def __init__(self, name: str, kind: Kind, seed: bytes) -> None:
        if not _NAME.fullmatch(name):
            raise NoteError(
                f"{name!r} cannot name a key", cure="use a name without spaces and +, as in trail.example.com"
            )
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self._seed = seed
        self.public = PublicKey(name, kind, self._key.public_key().public_bytes_raw())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the private form; raise :class:`NoteError`, which holds nothing of the key."""
        text = text.strip()
        if not text.startswith(_PRIVATE):
            raise NoteError("this is no private key of a note", cure="make one with saw audit key")
        name, kind, seed, marked = _key_line(text.removeprefix(_PRIVATE), "private key")
        signer = cls(name, kind, seed)
        if signer.public.id != marked:
            raise NoteError(f"the id of private key {name} does not fit it", cure="use the file as it was made")
        return signer

    def timed(self) -> Signer:
        """Return the same key of type 4, see :attr:`PublicKey.timed`."""
        return Signer(self.public.name, WITNESS, self._seed)

    def private_line(self) -> str:
        """Return the private form, without the end of the line."""
        raw = base64.b64encode(bytes([self.public.kind]) + self._seed).decode()
        return f"{_PRIVATE}{self.public.name}+{self.public.id.hex()}+{raw}"

    def sign(self, text: str, time: int = 0) -> str:
        """Return the signature line over ``text``, which ends in a newline; a witness's says ``time`` (seconds since 1970)."""
        if self.public.kind == WITNESS:
            signature = time.to_bytes(8, "big") + self._key.sign(_cosigned(text, time))
        else:
            signature = self._key.sign(text.encode())
        return f"— {self.public.name} {base64.b64encode(self.public.id + signature).decode()}\n"


class Checkpoint(msgspec.Struct, frozen=True):
    """A tree's origin, size and root."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """What is signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


class SignedCheckpoint(msgspec.Struct, frozen=True):
    """A checkpoint that its log signed. ``note``: the whole note. ``witnesses``: when each of those asked for signed (s)."""

    checkpoint: Checkpoint
    note: str
    witnesses: Mapping[str, int]


def sign_checkpoint(checkpoint: Checkpoint, signer: Signer, time: int | None = None) -> str:
    """Return the note of ``checkpoint``; with ``time`` (seconds since 1970) it says when this was the log's newest."""
    note = f"{checkpoint.text}\n{signer.sign(checkpoint.text)}"
    return note if time is None else note + signer.timed().sign(checkpoint.text, time)


def open_checkpoint(raw: bytes, log: PublicKey, witnesses: tuple[PublicKey, ...] = ()) -> SignedCheckpoint:
    """Return the checkpoint in a note that ``log`` signed for its own name; raise :class:`NoteError` naming what is wrong.

    A signature of ``log`` or of one of ``witnesses`` that does not verify refuses the note. Others' are not looked at.
    """
    text, signatures = _parts(raw)
    found: set[PublicKey] = set()
    times: dict[str, int] = {}
    for key in (log, *witnesses):
        for name, signature in signatures:
            if name != key.name or signature[:4] != key.id:
                continue
            if not _verified(key, text, signature[4:]):
                raise NoteError(f"the signature of {name} is not over this checkpoint", cure="take the original")
            found.add(key)
            if key.kind == WITNESS:
                times[name] = int.from_bytes(signature[4:12], "big")
    if log not in found:
        raise NoteError(
            f"{log.name} did not sign this checkpoint", cure="check the key, and where the checkpoint is from"
        )
    checkpoint = _checkpoint(text)
    if checkpoint.origin != log.name:
        raise NoteError(
            f"this checkpoint is of {checkpoint.origin}, the key of {log.name}", cure="use the key of that log"
        )
    return SignedCheckpoint(checkpoint, raw.decode(), times)


def _parts(raw: bytes) -> tuple[str, list[tuple[str, bytes]]]:
    wrong = NoteError("this is no signed note", cure="take the file as it was written")
    try:
        note = raw.decode() if len(raw) <= LONGEST_NOTE else ""
    except UnicodeDecodeError as error:
        raise wrong from error
    text, blank, lines = note.rpartition("\n\n")
    if not blank or not lines.endswith("\n") or any(mark < " " and mark != "\n" for mark in note):
        raise wrong
    signatures = []
    for line in lines[:-1].split("\n"):
        match line.split(" "):
            case ["—", name, value]:
                signatures.append((name, _decoded(value)))
            case _:
                raise wrong
    if len(signatures) > _MOST_SIGNATURES or any(len(signature) <= 4 for _, signature in signatures):
        raise wrong
    return text + "\n", signatures


def _checkpoint(text: str) -> Checkpoint:
    lines = text.split("\n")
    if len(lines) != 4 or not lines[0] or not _SIZE.fullmatch(lines[1]) or len(_decoded(lines[2])) != 32:
        raise NoteError("the note is no checkpoint", cure="take the file named checkpoint")
    return Checkpoint(lines[0], int(lines[1]), _decoded(lines[2]))


def _verified(key: PublicKey, text: str, signature: bytes) -> bool:
    if key.kind == LOG:
        return key.verify(text.encode(), signature)
    time = int.from_bytes(signature[:8], "big")
    return len(signature) == 72 and key.verify(_cosigned(text, time), signature[8:])


def _cosigned(text: str, time: int) -> bytes:
    return f"cosignature/v1\ntime {time}\n{text}".encode()


def _key_line(text: str, what: str) -> tuple[str, Kind, bytes, bytes]:
    name, marked, value = [*text.split("+", 2), "", ""][:3]
    raw = _decoded(value)
    if (
        not _NAME.fullmatch(name)
        or not re.fullmatch(r"[0-9a-f]{8}", marked)
        or len(raw) != 33
        or raw[0] not in (LOG, WITNESS)
    ):
        raise NoteError(f"this is no {what} of a log or a witness", cure="use a file of saw audit key")
    kind: Kind = 1 if raw[0] == LOG else 4
    return name, kind, raw[1:], bytes.fromhex(marked)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
