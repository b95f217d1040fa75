"""What a publication must be, whoever sends it: signed by the right officers, on the present base, with good bundles."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import msgspec

from saw.policy.bundle import check_signatures, describe, read_content, verify_bundle
from saw.policy.errors import BundleRefused, PolicyError, RepositoryError
from saw.policy.keys import PublicKey
from saw.policy.loader import Bundle
from saw.policy.tuf_delegation import check_delegations
from saw.policy.tuf_metadata import Root, TargetFile, Targets, check_role, parse, policy_keys
from saw.policy.tuf_reach import ReachDiff, check_reach
from saw.policy.tuf_store import (
    Release,
    State,
    check_file,
    current_snapshot,
    current_state,
    metadata_dir,
    read_role,
    read_target,
    release_of,
    ring_of_role,
    split_target,
    stated_reach,
)


class Checked(msgspec.Struct, frozen=True):
    """A publication that holds: the state it leads to, the metadata that is new, and the releases that change.

    ``resigned`` are releases whose content stays and whose signatures are new.
    """

    state: State
    written: dict[str, bytes]
    changed: tuple[Release, ...]
    resigned: tuple[Release, ...]


class _Context(msgspec.Struct, frozen=True):
    """What every check of one publication needs."""

    store: Path
    keys: dict[str, PublicKey]
    threshold: int
    now: datetime
    rotated: bool
    diff: ReachDiff


def check_publication(
    store: Path,
    root: Root,
    metadata: Mapping[str, bytes],
    files: Mapping[str, bytes],
    now: datetime,
    *,
    rotated: bool,
    diff: ReachDiff,
) -> Checked:
    """Return what the publication leads to, or raise :class:`RepositoryError`; writes nothing.

    ``rotated`` tells that the root changes with it, so that what stays is judged again. Every new release must carry the
    signed diff of reach, as ``diff`` computes it.
    """
    keys, threshold = policy_keys(root)
    context = _Context(store, keys, threshold, now, rotated, diff)
    before = current_state(store)
    written: dict[str, bytes] = {}
    present = before.targets.version if before is not None else 0
    offered = metadata.get("targets.json")
    if offered is not None and _accompanies(store, metadata, offered, present):
        offered = None
    targets = _role(store, root, "targets", present=present, offered=offered, now=now, written=written)
    delegated = check_delegations(targets)
    stray = sorted(name for name in metadata if ring_of_role(name.removesuffix(".json")) and name[:-5] not in delegated)
    if stray:
        raise RepositoryError("malformed", f"{stray[0]} is of a ring that is not delegated", cure="leave it out")
    snapshot = current_snapshot(store)
    rings: dict[str, Targets] = {}
    for role in delegated:
        listed = snapshot.meta.get(f"{role}.json") if snapshot is not None else None
        version = listed.version if listed else 0
        own = metadata.get(f"{role}.json")
        rings[role] = _role(store, targets, role, present=version, offered=own, now=now, written=written)
        foreign = sorted(path for path in rings[role].targets if split_target(path)[0] != ring_of_role(role))
        if foreign:
            raise RepositoryError("malformed", f"{role} names {foreign[0]} of another ring", cure="stage it again")
    state = State(targets, rings)
    changed, resigned = _releases(context, before.files if before is not None else {}, state.files, files)
    return Checked(state, written, changed, resigned)


def _role(
    store: Path,
    parent: Root | Targets,
    role: str,
    *,
    present: int,
    offered: bytes | None,
    now: datetime,
    written: dict[str, bytes],
) -> Targets:
    """Return the metadata of ``role`` that counts after the publication, and note it in ``written`` when it is new."""
    held = read_role(store, role, present) if present else None
    if offered is None or (held is not None and _same_content(role, offered, held)):
        if held is None:
            raise RepositoryError("malformed", f"the publication has no {role}.json", cure="stage it again")
        # A ring that nobody touches may have expired: that is its own freeze, not everybody's.
        return check_role(parent, role, Targets, held, now if role == "targets" else None)
    signed = check_role(parent, role, Targets, offered, now)
    if present and signed.version != present + 1:
        reason = f"{role} version {signed.version} does not follow the present version {present}"
        raise RepositoryError("stale_base", reason, cure="run saw policy repository-update, then stage it again")
    if role != "targets" and signed.delegations is not None:
        raise RepositoryError("malformed", f"{role} delegates to other roles", cure="sign without delegations")
    written[role] = offered
    return signed


def _accompanies(store: Path, metadata: Mapping[str, bytes], offered: bytes, present: int) -> bool:
    """Tell whether ``offered`` is an earlier targets.json that merely comes along with a ring's own metadata.

    The officers of one ring need not start again because somebody released to another.
    """
    version = parse(Targets, offered, "targets.json").signed.version
    ring = any(ring_of_role(name.removesuffix(".json")) for name in metadata)
    held = metadata_dir(store) / f"{version}.targets.json"
    return ring and version < present and held.exists() and _same_content("targets", offered, held.read_bytes())


def _same_content(role: str, one: bytes, other: bytes) -> bool:
    """Tell whether two files of a role say the same, whoever signed them."""
    first, second = (parse(Targets, raw, f"{role}.json").signed_bytes for raw in (one, other))
    return first == second


def _releases(
    context: _Context, before: Mapping[str, TargetFile], after: Mapping[str, TargetFile], files: Mapping[str, bytes]
) -> tuple[tuple[Release, ...], tuple[Release, ...]]:
    """Return the releases that are new or newer, and those that are only signed anew."""
    gone = sorted(set(before) - set(after))
    if gone:
        raise RepositoryError("rollback", f"the publication drops {gone[0]}", cure="release a new revision instead")
    unlisted = sorted(set(files) - set(after))
    if unlisted:
        name = unlisted[0][:128]
        raise RepositoryError("malformed", f"{name} is not in targets.json", cure="send signed targets only")
    changed: list[Release] = []
    resigned: list[Release] = []
    for path, file in after.items():
        old = before.get(path)
        release = release_of(path, file)
        if set(file.hashes) != {"sha256"}:
            raise RepositoryError("malformed", f"{path} is not named by SHA-256 alone", cure="stage it again")
        if old is not None and old == file:
            if context.rotated:
                _check_signed(context, path, read_target(context.store, path))
            continue
        if path not in files:
            raise RepositoryError("malformed", f"the file of {path} is missing", cure="send the bundle too")
        check_file(path, file, files[path])
        if old is not None and release_of(path, old) == release:
            _check_same(context, release, files[path])
            resigned.append(release)
            continue
        _check_new(context, release, file, files[path], old)
        changed.append(release)
    return tuple(changed), tuple(resigned)


def _check_signed(context: _Context, path: str, raw: bytes) -> None:
    try:
        check_signatures(raw, context.keys, context.threshold)
    except BundleRefused as error:
        reason = f"{path} is not signed by enough officers of the root: {error.message}"
        cure = "sign it again in the publication that changes the root"
        raise RepositoryError("bundle", reason, cure=cure) from error


def _check_same(context: _Context, release: Release, raw: bytes) -> None:
    """Check a release that is signed anew: content, revision and window stay what they are, even past the window."""
    _check_signed(context, release.path, raw)
    try:
        digest = describe(raw)[0]
        read_content(raw)
    except (BundleRefused, PolicyError) as error:
        raise RepositoryError("bundle", f"{release.path}: {error.message}", cure="sign the release in force") from error
    if digest != release.policy_digest:
        reason = f"{release.path} has another content than revision {release.revision} in force"
        raise RepositoryError("bundle", reason, cure="give new content a new revision")


def _check_new(context: _Context, release: Release, file: TargetFile, raw: bytes, old: TargetFile | None) -> None:
    floor = release_of(release.path, old).revision + 1 if old is not None else 1
    try:
        bundle = verify_bundle(raw, context.keys, context.threshold, context.now, min_revision=floor)
    except BundleRefused as error:
        details = {"reason": error.code, **error.details}
        reason = f"{release.path} is refused: {error.message}"
        raise RepositoryError("bundle", reason, cure=error.cure, details=details) from error
    stated = (release.blueprint, release.policy_digest, release.revision)
    if stated != (bundle.blueprint, bundle.digest, bundle.revision):
        reason = f"{release.path} states another blueprint, digest or revision than the bundle has"
        raise RepositoryError("bundle", reason, cure="stage it again")
    base = read_target(context.store, release.path) if old is not None else None
    content = Bundle(bundle.members, bundle.policy, bundle.governance)
    check_reach(release.path, base, content, (bundle.reach, stated_reach(release.path, file)), context.diff)
