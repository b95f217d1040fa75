"""A witness: another machine that remembers the last tree it signed, and signs none that is not its continuation."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from saw.audit import merkle
from saw.audit.note import Checkpoint, PublicKey, Signer, open_checkpoint
from saw.audit.tiles import Files, Tiles
from saw.errors import SawError
from saw.files import load_json, write_private


class WitnessRefusal(SawError):
    """The witness does not sign. ``code``: ``tree_shrunk``, ``split_view`` (same size, other root), ``tree_forked``, or
    ``tiles_differ`` (the tiles are not those of the signed root, so they say nothing of the log)."""

    code = "witness_refused"


class Seen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last tree that was signed; ``root`` is lower-case hex."""

    size: int
    root: str


class WitnessState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a witness remembers, by the line of the log's public key."""

    logs: dict[str, Seen] = msgspec.field(default_factory=dict)


def cosign(raw: bytes, log: PublicKey, files: Files, signer: Signer, state: Path, *, time: int) -> str:
    """Return the checkpoint ``raw`` with the signature of ``signer`` at ``time`` (seconds since 1970) added.

    ``files`` holds the tiles, which are not trusted. The new tree is remembered, durably, before the signature leaves, so no
    crash lets a fork be signed. Raises :class:`WitnessRefusal`, ``NoteError`` or ``TreeError``; then nothing is remembered.
    The first tree of a log is taken as it is, if its tiles are there.
    """
    signed = open_checkpoint(raw, log)
    new = signed.checkpoint
    with _alone(state):
        known = remembered(state)
        continues(known.logs.get(log.line), new, files)
        logs = {**known.logs, log.line: Seen(new.size, new.root.hex())}
        write_private(state, msgspec.json.encode(WitnessState(logs)))
    return signed.note + signer.sign(new.text, time)


def remembered(state: Path) -> WitnessState:
    """Return what the witness remembers; raise ``ConfigError`` for a damaged memory, which is no first time."""
    return load_json(state, WitnessState) if state.exists() else WitnessState()


def continues(seen: Seen | None, new: Checkpoint, files: Files) -> None:
    """Raise :class:`WitnessRefusal` or ``TreeError`` unless ``new``, whose tiles are ``files``, continues what was ``seen``."""
    tiles = Tiles(files, new.size)
    if seen is None or seen.size == 0 < new.size:  # no proof leads on from an empty tree
        if tiles.root() != new.root:
            raise _damaged()
    elif new.size < seen.size:
        raise refusal("tree_shrunk", f"the tree had {seen.size} leaves, this one has {new.size}")
    elif new.size == seen.size and new.root.hex() != seen.root:
        raise refusal("split_view", f"there are two trees of {new.size} leaves")
    elif new.size > seen.size:
        # Tiles are not signed. Only what they prove against the signed root shows a fork; all else is damage.
        before = merkle.root_of(seen.size, tiles.node)
        proof = merkle.consistency_proof(seen.size, new.size, tiles.node)
        if not merkle.verify_consistency(seen.size, new.size, proof, before, new.root):
            raise _damaged()
        if before.hex() != seen.root:
            raise refusal("tree_forked", f"this tree of {new.size} does not continue the one of {seen.size}")


def _damaged() -> WitnessRefusal:
    return refusal("tiles_differ", "the tiles are not those of the checkpoint", cure="restore the tiles, all of them")


def refusal(
    code: str,
    text: str,
    cure: str = "keep both checkpoints and find out who changed the trail; a restored backup needs a new key",
) -> WitnessRefusal:
    """Return the error with its ``code``."""
    error = WitnessRefusal(f"not signed: {text}", cure=cure)
    error.code = code
    return error


@contextmanager
def _alone(state_file: Path) -> Iterator[None]:
    """Hold the lock beside ``state_file``: two runs at once must not both sign."""
    handle = os.open(state_file.with_name(f".{state_file.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
