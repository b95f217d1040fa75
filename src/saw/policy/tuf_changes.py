"""The changes that officers make: the first root, officers coming and going, a ring's own officers, a step back.

Each function returns an unsigned :class:`saw.policy.tuf_draft.Draft`; nothing in the officers' copy changes until the
complete draft is published and adopted.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import msgspec

from saw.policy.bundle import build_manifest, check_signatures, describe, keep_signatures, read_content, sign, window
from saw.policy.errors import BundleRefused, RepositoryError
from saw.policy.keys import PublicKey, key_id
from saw.policy.tuf_delegation import with_ring, without_key, without_ring
from saw.policy.tuf_draft import DRAFT_FORMAT, Draft, Note
from saw.policy.tuf_metadata import (
    Metadata,
    Root,
    Targets,
    check_keys,
    check_root,
    parse,
    role_keys,
    sign_metadata,
    signing_key,
)
from saw.policy.tuf_reach import ReachDiff, bundle_diff, reach_between
from saw.policy.tuf_repository import OFFICER_LIFETIME, current_root, next_targets, target_file
from saw.policy.tuf_store import (
    State,
    current_releases,
    current_state,
    newest,
    read_role,
    read_target,
    ring_role,
    stated_reach,
    target_name,
)


class RootChange(msgspec.Struct, frozen=True):
    """What changes in the root; everything left out stays. Without any change the root is renewed for another year.

    ``remove`` are key ids; ``threshold`` is that of both officer roles; ``online`` replaces the broker's key.
    """

    add: tuple[PublicKey, ...] = ()
    remove: tuple[str, ...] = ()
    threshold: int | None = None
    online: PublicKey | None = None


def _note(kind: str, subject: str, now: datetime) -> Note:
    return Note(DRAFT_FORMAT, kind, subject, now.isoformat())


def _unsigned(signed: Root | Targets) -> bytes:
    return sign_metadata(Metadata(signed), [])


def first_root(officers: Sequence[PublicKey], threshold: int, online: PublicKey, now: datetime) -> Draft:
    """Return the draft of a new repository: root version 1 and empty targets, both of ``threshold`` of ``officers``."""
    root = Root(version=1, expires=now + OFFICER_LIFETIME, consistent_snapshot=True)
    for role in ("root", "targets"):
        for key in officers:
            root.add_key(signing_key(key), role)
        root.roles[role].threshold = threshold
    for role in ("snapshot", "timestamp"):
        root.add_key(signing_key(online), role)
    _check(root)
    targets = Targets(version=1, expires=now + OFFICER_LIFETIME)
    metadata = {"root.json": _unsigned(root), "targets.json": _unsigned(targets)}
    return Draft(_note("first-root", f"{threshold} of {len(officers)} officers", now), {}, metadata)


def _check(root: Root) -> None:
    for role in ("root", "targets", "snapshot", "timestamp"):
        try:
            check_keys(root.keys, root.roles[role], role)
        except RepositoryError as error:
            cure = "add officers, or lower the threshold with --threshold"
            raise RepositoryError("threshold", error.message, cure=cure) from error


def _base(directory: Path | str) -> tuple[dict[str, bytes], Root, State]:
    """Return the files that a change starts from, the root and the state of the officers' copy."""
    raw = current_root(directory)
    state = current_state(directory)
    if state is None:
        raise RepositoryError("not_found", f"{directory} has no targets.json", cure="give the officers' copy")
    files = {f"{role}.json": read_role(directory, role, version) for role, version in state.versions.items()}
    return {"root.json": raw, **files}, check_root(raw, None), state


def change_root(directory: Path | str, change: RootChange, now: datetime, *, kind: str = "rotate") -> Draft:
    """Return the draft of the next root; what the officers who go had signed is signed anew by those who stay.

    A key that is removed counts nowhere any more: not in root and targets, not for a ring, not on a bundle. Releases that
    would lack signatures without it come into the draft for new ones; their content and revision stay.
    """
    base, root, state = _base(directory)
    for keyid in change.remove:
        if keyid not in root.roles["root"].keyids and keyid not in root.roles["targets"].keyids:
            raise RepositoryError("not_found", f"no officer has the key {keyid[:16]}…", cure="see saw policy keys list")
    for role in ("root", "targets"):
        for keyid in set(change.remove) & set(root.roles[role].keyids):
            root.revoke_key(keyid, role)
        for key in change.add:
            if key_id(key) in change.remove:
                raise RepositoryError("malformed", "a key is added and removed", cure="name it once")
            root.add_key(signing_key(key), role)
        if change.threshold is not None:
            root.roles[role].threshold = change.threshold
    if change.online is not None:
        for role in ("snapshot", "timestamp"):
            for keyid in list(root.roles[role].keyids):
                root.revoke_key(keyid, role)
            root.add_key(signing_key(change.online), role)
    root.version, root.expires = root.version + 1, now + OFFICER_LIFETIME
    _check(root)
    draft = Draft(_note(kind, f"root version {root.version}", now), base, {**base, "root.json": _unsigned(root)})
    return _signed_anew(directory, draft, state, change, now)


def _signed_anew(directory: Path | str, draft: Draft, state: State, change: RootChange, now: datetime) -> Draft:
    """Add to ``draft`` what must be signed again under its root: targets metadata, rings, bundles."""
    root = draft.root
    keys, threshold = role_keys(root, "targets")
    bundles: dict[str, bytes] = {}
    for release in current_releases(directory):
        raw = read_target(directory, release.path)
        try:
            check_signatures(raw, keys, threshold)
        except BundleRefused:
            bundles[release.path] = keep_signatures(raw, keys)
    targets = next_targets(state.targets, now)
    delegations = targets.delegations
    for keyid in change.remove:
        if delegations is not None and any(keyid in role.keyids for role in (delegations.roles or {}).values()):
            delegations = without_key(delegations, keyid)
    targets.delegations = delegations
    successors = {"targets": targets, **{role: next_targets(ring, now) for role, ring in state.rings.items()}}
    for path, raw in bundles.items():
        digest, manifest, _ = describe(raw)
        owner = next(signed for signed in successors.values() if path in signed.targets)
        stated = stated_reach(path, owner.targets[path])
        owner.targets[path] = target_file(path, raw, digest, manifest.revision, stated)
    metadata = dict(draft.metadata)
    for role, signed in successors.items():
        named = any(path in signed.targets for path in bundles)
        # Metadata that officers made who are gone is made again, so that nothing of theirs is needed or served.
        if change.remove or named or (role == "targets" and change.threshold is not None):
            metadata[f"{role}.json"] = _unsigned(signed)
    return Draft(draft.note, draft.base, metadata, bundles)


def delegate_ring(directory: Path | str, ring: str, keys: Sequence[PublicKey], threshold: int, now: datetime) -> Draft:
    """Return the draft that gives ``ring`` to ``threshold`` of ``keys``, or, with no keys, back to the targets role.

    Releases of the ring stay what they are and move to the role that answers for them.
    """
    base, _, state = _base(directory)
    targets = next_targets(state.targets, now)
    role = ring_role(ring)
    prefix = target_name(ring, "any").removesuffix("any.bundle.json")
    metadata = dict(base)
    if keys:
        targets.delegations = with_ring(state.targets.delegations, ring, keys, threshold)
        version = newest(directory, role)
        held = state.rings.get(role) or (
            parse(Targets, read_role(directory, role, version), f"{role}.json").signed if version else None
        )
        own = next_targets(held, now)
        own.targets = {path: file for path, file in state.files.items() if path.startswith(prefix)}
        targets.targets = {path: file for path, file in targets.targets.items() if not path.startswith(prefix)}
        metadata[f"{role}.json"] = _unsigned(own)
    else:
        targets.delegations = without_ring(state.targets.delegations, ring)
        targets.targets |= state.rings[role].targets
        del metadata[f"{role}.json"]
    metadata["targets.json"] = _unsigned(targets)
    whom = f"{threshold} of {len(keys)} officers" if keys else "the targets role"
    return Draft(_note("delegate", f"ring {ring} to {whom}", now), base, metadata)


def roll_back(
    directory: Path | str,
    ring: str,
    blueprint: str,
    old: bytes,
    *,
    now: datetime,
    validity: timedelta,
    diff: ReachDiff | None = None,
) -> Draft:
    """Return the draft of the next revision in ``ring`` with the content of the bundle file ``old``.

    ``validity`` is how long the new revision counts from ``now``. The manifest states the reach against the release in
    force, so that signers see what going back allows again; ``diff`` computes it (the product's own unless given).
    """
    base, _, state = _base(directory)
    path = target_name(ring, blueprint)
    current = next((release for release in current_releases(directory) if release.path == path), None)
    if current is None:
        raise RepositoryError("not_found", f"{path} is not released", cure="publish it first")
    content = read_content(old)
    reach = reach_between(read_target(directory, path), content, diff or bundle_diff())
    revision = current.revision + 1
    manifest = build_manifest(content, revision, *window(now, validity), reach=reach)
    raw = sign(manifest, content.members, [])
    role = state.role_for(ring)
    successor = next_targets(state.targets if role == "targets" else state.rings[role], now)
    successor.targets[path] = target_file(path, raw, describe(raw)[0], revision)
    note = _note("rollback", f"{ring}/{blueprint} to revision {describe(old)[1].revision} as {revision}", now)
    return Draft(note, base, {**base, f"{role}.json": _unsigned(successor)}, {path: raw})
