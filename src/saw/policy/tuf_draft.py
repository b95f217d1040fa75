"""A change of the repository under way: what it contains, what is still unsigned, and by whom.

A draft is a folder that officers hand to each other, offline if they like. It holds the metadata that the change starts
from (``base/``), the new root and targets metadata (``metadata/``) and the bundles (``targets/``). Bundles are signed
before the metadata that names them by hash. A complete draft is a publication that ``saw policy publish`` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from saw.errors import ConfigError
from saw.files import load_json, write_atomic
from saw.policy.bundle import add_signatures, describe, good_signers
from saw.policy.errors import RepositoryError
from saw.policy.keys import PublicKey, key_id
from saw.policy.signers import Signer
from saw.policy.tuf_delegation import check_delegations
from saw.policy.tuf_metadata import Metadata, Root, Targets, check_keys, parse, role_keys, sign_metadata
from saw.policy.tuf_repository import Publication, target_file
from saw.policy.tuf_store import ring_of_role, stated_reach

DRAFT_FORMAT = "saw-draft/1"
_NOTE = "draft.json"
_MAX_FILES = 512


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a draft is for: its kind, a line for people, and when it was begun (UTC, ISO 8601)."""

    format: str
    kind: str
    subject: str
    begun: str


class Draft(msgspec.Struct, frozen=True):
    """A change under way. ``base`` and ``metadata`` are files by name, ``targets`` bundles by target path."""

    note: Note
    base: dict[str, bytes]
    metadata: dict[str, bytes]
    targets: dict[str, bytes] = {}

    @property
    def publication(self) -> Publication:
        """The draft as a publication; the broker takes it once nothing is owed."""
        return Publication(self.metadata, self.targets)

    @property
    def old_root(self) -> Root | None:
        """The root that the change starts from, ``None`` when it makes the first."""
        raw = self.base.get("root.json")
        return parse(Root, raw, "root.json").signed if raw is not None else None

    @property
    def root(self) -> Root:
        """The root that counts after the change."""
        return parse(Root, self.metadata["root.json"], "root.json").signed

    @property
    def roles(self) -> dict[str, tuple[dict[str, PublicKey], int]]:
        """Keys and threshold of each role whose targets metadata this change makes anew, by role name."""
        targets = parse(Targets, self.metadata["targets.json"], "targets.json").signed
        holders = {"targets": role_keys(self.root, "targets"), **check_delegations(targets)}
        return {role: holders[role] for role in holders if self._is_new(f"{role}.json")}

    def _is_new(self, name: str) -> bool:
        return name in self.metadata and self.metadata[name] != self.base.get(name)


class Owed(msgspec.Struct, frozen=True):
    """Signatures that an item still lacks: ``by`` are the key ids that signed, ``may`` those that can still sign."""

    item: str
    threshold: int
    by: tuple[str, ...]
    may: tuple[str, ...]

    def __str__(self) -> str:
        missing = self.threshold - len(self.by)
        ids = ", ".join(f"{keyid[:16]}…" for keyid in self.may)
        return f"{self.item}: {len(self.by)} of {self.threshold} signatures; {missing} more of {ids}"


def _holders(root: Root, role: str = "root") -> tuple[dict[str, PublicKey], int]:
    return check_keys(root.keys, root.roles[role], role), root.roles[role].threshold


def _owed(item: str, by: Sequence[str], keys: Mapping[str, PublicKey], threshold: int) -> list[Owed]:
    may = tuple(sorted(set(keys) - set(by)))
    return [Owed(item, threshold, tuple(sorted(by)), may)] if len(by) < threshold else []


def _signed_by(parent: Root | Targets, role: str, metadata: Metadata[Root] | Metadata[Targets]) -> list[str]:
    """Return the ids of the keys of ``role`` whose signature on ``metadata`` holds."""
    result = parent.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    return sorted(result.signed)


def owed(draft: Draft) -> tuple[Owed, ...]:
    """Return what is still unsigned, in the order in which it is signed; empty when the draft is complete."""
    found: list[Owed] = []
    new = parse(Root, draft.metadata["root.json"], "root.json")
    if draft.metadata["root.json"] != draft.base.get("root.json"):
        for title, root in (("officers before", draft.old_root), ("officers after", new.signed)):
            if root is not None:
                keys, threshold = _holders(root)
                item = f"root version {new.signed.version} ({title})"
                found += _owed(item, _signed_by(root, "root", new), keys, threshold)
    keys, threshold = role_keys(new.signed, "targets")
    for path, raw in sorted(draft.targets.items()):
        found += _owed(f"bundle {path}", good_signers(raw, keys), keys, threshold)
    targets = parse(Targets, draft.metadata["targets.json"], "targets.json").signed
    for role, (holders, needed) in draft.roles.items():
        metadata = parse(Targets, draft.metadata[f"{role}.json"], f"{role}.json")
        by = _signed_by(new.signed if role == "targets" else targets, role, metadata)
        found += _owed(f"{role} version {metadata.signed.version}", by, holders, needed)
    return tuple(found)


def contribute(draft: Draft, signers: Sequence[Signer]) -> Draft:
    """Return the draft with everything signed that ``signers`` may sign now.

    Targets metadata is signed only when the bundles that it names have their signatures. Raises :class:`RepositoryError`
    (``not_an_officer``) for a signer who has no part in this change.
    """
    metadata, targets = dict(draft.metadata), dict(draft.targets)
    roots = [root for root in (draft.old_root, draft.root) if root is not None]
    new_root = metadata["root.json"] != draft.base.get("root.json")
    policy, threshold = role_keys(draft.root, "targets")
    roles = draft.roles
    for signer in signers:
        identifier = key_id(signer.public_key())
        signs_root = new_root and any(identifier in root.roles["root"].keyids for root in roots)
        if not signs_root and not any(identifier in keys for keys in (policy, *(pair[0] for pair in roles.values()))):
            reason = f"the key {identifier[:16]}… may sign nothing in this change"
            raise RepositoryError("not_an_officer", reason, cure="sign with an officer's key; see saw policy keys list")
        parsed = parse(Root, metadata["root.json"], "root.json")
        if signs_root and identifier not in parsed.signatures:
            metadata["root.json"] = sign_metadata(parsed, [signer])
        for path, raw in targets.items():
            good = good_signers(raw, policy)
            if identifier in policy and identifier not in good and len(good) < threshold:
                targets[path] = add_signatures(raw, [signer])
    _name_bundles(metadata, targets, roles)
    if all(len(good_signers(raw, policy)) >= threshold for raw in targets.values()):
        for role, (keys, _) in roles.items():
            name = f"{role}.json"
            for signer in signers:
                listed = parse(Targets, metadata[name], name)
                identifier = key_id(signer.public_key())
                if identifier in keys and identifier not in listed.signatures:
                    metadata[name] = sign_metadata(listed, [signer])
    return Draft(draft.note, draft.base, metadata, targets)


def _name_bundles(metadata: dict[str, bytes], targets: Mapping[str, bytes], roles: Mapping[str, object]) -> None:
    """Let the metadata name the bundles as they are now; signatures over other bytes are dropped."""
    for role in roles:
        name = f"{role}.json"
        parsed = parse(Targets, metadata[name], name)
        changed = False
        for path, raw in targets.items():
            present = parsed.signed.targets.get(path)
            if present is None:
                continue
            digest, manifest, _ = describe(raw)
            file = target_file(path, raw, digest, manifest.revision, stated_reach(path, present))
            if file != present:
                parsed.signed.targets[path] = file
                changed = True
        if changed:
            parsed.signatures.clear()
            metadata[name] = sign_metadata(parsed, [])


def is_draft(directory: Path | str) -> bool:
    """Tell whether ``directory`` holds a draft."""
    return (Path(directory) / _NOTE).is_file()


def save_draft(directory: Path | str, draft: Draft) -> None:
    """Write the draft; its note goes last, so a folder with a note is whole."""
    folder = Path(directory)
    for part, files in (("base", draft.base), ("targets", draft.targets), ("metadata", draft.metadata)):
        for name, raw in files.items():
            path = folder / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, raw)
    write_atomic(folder / _NOTE, msgspec.json.format(msgspec.json.encode(draft.note), indent=2) + b"\n")


def load_draft(directory: Path | str) -> Draft:
    """Read the draft in ``directory``; raise :class:`ConfigError` or :class:`RepositoryError` when it is none."""
    folder = Path(directory)
    if not is_draft(folder):
        raise ConfigError(f"{directory} holds no change under way", cure="begin one, or give its folder")
    note = load_json(folder / _NOTE, Note)
    parts = {part: _files(folder / part) for part in ("base", "metadata", "targets")}
    if note.format != DRAFT_FORMAT or not {"root.json", "targets.json"} <= set(parts["metadata"]):
        raise ConfigError(f"{directory} is a draft of another form", cure="begin it again with this version")
    for name in parts["metadata"]:
        if name not in {"root.json", "targets.json"} and ring_of_role(name.removesuffix(".json")) is None:
            raise ConfigError(f"{directory}/metadata/{name[:64]} is no part of a draft", cure="remove it")
    return Draft(note, **parts)


def _files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*.json") if path.is_file() and not path.is_symlink())
    if len(paths) > _MAX_FILES:
        raise ConfigError(f"{folder} has more than {_MAX_FILES} files", cure="check what lies there")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
