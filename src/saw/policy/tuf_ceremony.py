"""A key ceremony: officers sign one change after another, on machines without a network, and a transcript tells the tale.

The ceremony folder is a draft (:mod:`saw.policy.tuf_draft`) with ``transcript.json``: who signed what digest when, each
entry bound to the one before by its hash. Every step can be repeated; what is done already changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import msgspec
import rfc8785

from saw.errors import ConfigError
from saw.files import load_json, write_atomic
from saw.policy.bundle import describe, good_signers
from saw.policy.errors import RepositoryError
from saw.policy.keys import key_id
from saw.policy.signers import Signer
from saw.policy.tuf_draft import Draft, Owed, contribute, load_draft, owed, save_draft
from saw.policy.tuf_metadata import Root, Targets, check_root, parse, role_keys

TRANSCRIPT_FORMAT = "saw-ceremony/1"
_FILE = "transcript.json"
_START = "0" * 64


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step: when (UTC, ISO 8601), what, by whom, over which digests (item → hexadecimal SHA-256).

    ``prev`` is the hash of the entry before, sixty-four zeros for the first.
    """

    seq: int
    at: str
    action: str
    name: str
    key_id: str
    items: dict[str, str]
    prev: str

    @property
    def hash(self) -> str:
        """The SHA-256 of the entry in canonical form (RFC 8785)."""
        return hashlib.sha256(rfc8785.dumps(msgspec.to_builtins(self))).hexdigest()


class Transcript(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tale of a ceremony; ``officers`` maps key ids to the names that the ceremony was begun with."""

    format: str
    officers: dict[str, str]
    entries: tuple[Entry, ...]

    @property
    def head(self) -> str:
        """The hash of the last entry: written down by those present, it fixes all of them."""
        return self.entries[-1].hash if self.entries else _START

    def with_entry(self, action: str, identifier: str, items: Mapping[str, str], now: datetime) -> Transcript:
        """Return the transcript with one more entry."""
        name = self.officers.get(identifier, "")
        entry = Entry(len(self.entries) + 1, now.isoformat(), action, name, identifier, dict(items), self.head)
        return Transcript(self.format, self.officers, (*self.entries, entry))


class Ceremony(msgspec.Struct, frozen=True):
    """Where a ceremony stands: the draft, the transcript and what is still owed."""

    draft: Draft
    transcript: Transcript
    owed: tuple[Owed, ...]

    @property
    def complete(self) -> bool:
        """Tell whether everything is signed and the end is recorded."""
        return not self.owed and any(entry.action == "completed" for entry in self.transcript.entries)


def digests(draft: Draft) -> dict[str, str]:
    """Return the SHA-256 of what is signed for each item of the change; signatures do not change it."""
    found = {"root.json": _digest(parse(Root, draft.metadata["root.json"], "root.json").signed_bytes)}
    for path, raw in sorted(draft.targets.items()):
        found[path] = describe(raw)[0]
    for role in draft.roles:
        name = f"{role}.json"
        found[name] = _digest(parse(Targets, draft.metadata[name], name).signed_bytes)
    if draft.metadata["root.json"] == draft.base.get("root.json"):
        del found["root.json"]
    return found


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def begin(directory: Path | str, draft: Draft, officers: Mapping[str, str], now: datetime) -> Ceremony:
    """Begin a ceremony in ``directory``; the same change again is taken up where it stands, another one is refused."""
    folder = Path(directory)
    if (folder / _FILE).exists():
        present = resume(folder)
        if present.draft.note.subject != draft.note.subject or present.draft.note.kind != draft.note.kind:
            reason = f"{directory} holds the ceremony of another change ({present.draft.note.subject})"
            raise ConfigError(reason, cure="finish it, or choose an empty folder")
        return present
    transcript = Transcript(TRANSCRIPT_FORMAT, dict(officers), ()).with_entry("begun", "", digests(draft), now)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    save_draft(folder, draft)
    _save(folder, transcript)
    return Ceremony(draft, transcript, owed(draft))


def resume(directory: Path | str) -> Ceremony:
    """Return the ceremony in ``directory``; a transcript that was changed is refused (:class:`RepositoryError`)."""
    folder = Path(directory)
    transcript = load_json(folder / _FILE, Transcript)
    previous = _START
    for number, entry in enumerate(transcript.entries, start=1):
        if entry.seq != number or entry.prev != previous:
            reason = f"entry {number} of {folder / _FILE} does not follow the one before"
            raise RepositoryError("malformed", reason, cure="find the true copy; somebody changed this one")
        previous = entry.hash
    if transcript.format != TRANSCRIPT_FORMAT or not transcript.entries:
        raise ConfigError(f"{folder / _FILE} is of another form", cure="begin the ceremony again")
    draft = load_draft(folder)
    expected = transcript.entries[0].items.get("root.json")
    if expected is not None and digests(draft).get("root.json") != expected:
        reason = "the root is not the one that the ceremony was begun with"
        raise RepositoryError("malformed", reason, cure="find the true copy of the folder")
    return Ceremony(draft, transcript, owed(draft))


def take_part(directory: Path | str, signer: Signer, now: datetime, *, confirm: str | None = None) -> Ceremony:
    """Sign everything that ``signer`` may sign now and record it.

    ``confirm`` is the digest that the officer expects of the root (or, without a new root, of one of the items): another
    one is refused before anything is signed.
    """
    folder = Path(directory)
    present = resume(folder)
    items = digests(present.draft)
    shown = items.get("root.json")
    if confirm is not None and confirm not in ({shown} if shown else set(items.values())):
        reason = f"the digest to sign is {shown or ', '.join(items.values())}, not {confirm[:64]}"
        raise RepositoryError("mix_and_match", reason, cure="compare with the other officers; do not sign")
    draft = contribute(present.draft, [signer])
    if draft != present.draft:
        save_draft(folder, draft)
    identifier = key_id(signer.public_key())
    recorded = {
        (name, digest)
        for entry in present.transcript.entries
        if entry.key_id == identifier
        for name, digest in entry.items.items()
    }
    mine = {name: digest for name, digest in digests(draft).items() if _signed(draft, name, identifier)}
    fresh = {name: digest for name, digest in mine.items() if (name, digest) not in recorded}
    transcript = present.transcript
    if fresh:
        transcript = transcript.with_entry("signed", identifier, fresh, now)
        _save(folder, transcript)
    left = owed(draft)
    if not left and not any(entry.action == "completed" for entry in transcript.entries):
        check_root(draft.metadata["root.json"], now)
        transcript = transcript.with_entry("completed", "", digests(draft), now)
        _save(folder, transcript)
    return Ceremony(draft, transcript, left)


def _signed(draft: Draft, name: str, identifier: str) -> bool:
    if name in draft.targets:
        return identifier in good_signers(draft.targets[name], role_keys(draft.root, "targets")[0])
    raw = draft.metadata[name]
    if name == "root.json":
        return identifier in parse(Root, raw, name).signatures
    return identifier in parse(Targets, raw, name).signatures


def _save(folder: Path, transcript: Transcript) -> None:
    write_atomic(folder / _FILE, msgspec.json.format(msgspec.json.encode(transcript), indent=2) + b"\n")
