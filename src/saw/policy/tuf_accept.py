"""The broker's side of the TUF repository: verify a publication completely, add snapshot and timestamp, write it.

The timestamp is written last, so a reader or a crash sees the old state or the new one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from saw.files import locked, write_atomic
from saw.policy.errors import RepositoryError
from saw.policy.tuf_check import check_publication
from saw.policy.tuf_metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    Timestamp,
    check_root,
    check_successor,
    parse,
    sign_metadata,
    signing_key,
)
from saw.policy.tuf_reach import ReachDiff, bundle_diff
from saw.policy.tuf_store import (
    Release,
    current_root,
    current_state,
    metadata_dir,
    read_file,
    read_role,
    ring_of_role,
    stored_target,
)

SNAPSHOT_LIFETIME = timedelta(days=7)
TIMESTAMP_LIFETIME = timedelta(hours=1)
"""How long a timestamp counts: the longest time a client can be kept from news without noticing."""

_NUMBERED_ROOT = re.compile(r"(?:([1-9][0-9]{0,8})\.)?root\.json\Z")
MOST_ROOTS = 999_999_999
"""The highest version of a root: the name of its file has nine digits at most."""


class Accepted(msgspec.Struct, frozen=True):
    """What an accepted publication led to.

    ``changed`` holds the targets that are new or newer, ``resigned`` those whose signatures alone are new.
    """

    root_version: int
    targets_version: int
    snapshot_version: int
    changed: tuple[Release, ...]
    resigned: tuple[Release, ...] = ()


def _serves(root: Root, online_key: Ed25519PrivateKey) -> None:
    identifier = signing_key(online_key.public_key()).keyid
    for role in ("snapshot", "timestamp"):
        if identifier not in root.roles[role].keyids or root.roles[role].threshold != 1:
            reason = f"the root does not give {role} to this broker's online key alone"
            raise RepositoryError("online_key", reason, cure="make the root with this broker's online public key")


def install_root(directory: Path | str, raw: bytes, online_key: Ed25519PrivateKey, now: datetime) -> int:
    """Take ``raw`` as the first root of an empty store and return its version; raise when there is one already."""
    root = check_root(raw, now)
    if root.version > MOST_ROOTS:
        reason = f"a first root of version {root.version}"
        raise RepositoryError("malformed", reason, cure=f"number roots from 1 on, up to {MOST_ROOTS}")
    _serves(root, online_key)
    folder = metadata_dir(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (Path(directory) / "targets").mkdir(exist_ok=True)
    with locked(directory):
        if any(folder.glob("[1-9]*.root.json")):
            raise RepositoryError("exists", "a root is installed already", cure="publish a signed successor of it")
        write_atomic(folder / f"{root.version}.root.json", raw)
    return root.version


def _roots(metadata: Mapping[str, bytes], present: bytes, now: datetime) -> list[bytes]:
    """Return the new roots of a publication in order, each verified by its predecessor and by itself."""
    offered: list[tuple[int, bytes]] = []
    for name, raw in metadata.items():
        if _NUMBERED_ROOT.match(name):
            offered.append((parse(Root, raw, name).signed.version, raw))
    chain: list[bytes] = []
    trusted = present
    for version, raw in sorted(offered, key=lambda pair: pair[0]):
        newest = parse(Root, trusted, "root.json").signed.version
        if raw == trusted or version <= newest:
            if version == newest and raw != trusted:
                reason = f"root version {version} is installed with another content"
                raise RepositoryError("threshold", reason, cure="base the new root on the installed one")
            continue
        check_successor(trusted, raw)
        chain.append(raw)
        trusted = raw
    check_root(trusted, now)
    return chain


def accept_publication(
    store_dir: Path | str,
    metadata: Mapping[str, bytes],
    targets: Mapping[str, bytes],
    online_key: Ed25519PrivateKey,
    now: datetime,
    *,
    timestamp_lifetime: timedelta = TIMESTAMP_LIFETIME,
    diff: ReachDiff | None = None,
) -> Accepted:
    """Verify everything about a publication, then sign snapshot and timestamp and write it; or raise and change nothing.

    ``metadata`` holds ``targets.json``, ``ring-<ring>.json`` for delegated rings and, when the root changes, ``root.json``
    or ``<N>.root.json``. Every new release must carry the signed diff of reach; ``diff`` computes it
    (:func:`saw.policy.tuf_reach.bundle_diff` unless given). Refusals are :class:`RepositoryError`: ``threshold``, ``stale_base``,
    ``rollback``, ``freeze`` (expired), ``bundle``, ``unsigned_widening``, ``reach_undecided``, ``malformed``,
    ``online_key``, ``no_root``.
    """
    store = Path(store_dir)
    compared = diff or bundle_diff()
    for name in metadata:
        officers = name == "targets.json" or ring_of_role(name.removesuffix(".json")) is not None
        if not officers and not _NUMBERED_ROOT.match(name):
            raise RepositoryError("malformed", f"{name[:64]!r} is not metadata that officers sign", cure="leave it out")
    with locked(store):
        present = current_root(store)
        chain = _roots(metadata, present, now)
        root = parse(Root, chain[-1] if chain else present, "root.json").signed
        _serves(root, online_key)
        checked = check_publication(store, root, metadata, targets, now, rotated=bool(chain), diff=compared)
        folder = metadata_dir(store)
        for release in (*checked.changed, *checked.resigned):
            path = stored_target(store, release.path, checked.state.files[release.path])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, targets[release.path])
        for raw in chain:
            write_atomic(folder / f"{parse(Root, raw, 'root.json').signed.version}.root.json", raw)
        versions = checked.state.versions
        for role, raw in checked.written.items():
            write_atomic(folder / f"{versions[role]}.{role}.json", raw)
        snapshot_version = sign_online(store, versions, online_key, now, timestamp_lifetime)
    return Accepted(root.version, versions["targets"], snapshot_version, checked.changed, checked.resigned)


def _current_snapshot(folder: Path) -> Metadata[Snapshot] | None:
    path = folder / "timestamp.json"
    if not path.exists():
        return None
    version = parse(Timestamp, read_file(path), "timestamp.json").signed.snapshot_meta.version
    return parse(Snapshot, read_role(folder.parent, "snapshot", version), "snapshot.json")


def sign_online(
    store: Path, versions: Mapping[str, int], online_key: Ed25519PrivateKey, now: datetime, lifetime: timedelta
) -> int:
    """Write a snapshot of ``versions`` (by role) and a timestamp, and return the snapshot's version.

    The present snapshot stays when it says the same, is signed by this key, and does not age.
    """
    folder = metadata_dir(store)
    held = _current_snapshot(folder)
    listed = dict(held.signed.meta) if held is not None else {}
    # A client refuses a snapshot that forgets a file, so a ring that lost its own role stays listed.
    meta = {**listed, **{f"{role}.json": MetaFile(version) for role, version in versions.items()}}
    identifier = signing_key(online_key.public_key()).keyid
    if (
        held is None
        or held.signed.expires <= now + SNAPSHOT_LIFETIME / 2
        or meta != listed
        or identifier not in held.signatures
    ):
        number = (held.signed.version if held is not None else 0) + 1
        held = Metadata(Snapshot(version=number, expires=now + SNAPSHOT_LIFETIME, meta=meta))
        write_atomic(folder / f"{number}.snapshot.json", sign_metadata(held, [online_key]))
    path = folder / "timestamp.json"
    version = parse(Timestamp, read_file(path), "timestamp.json").signed.version if path.exists() else 0
    current = held.signed.version
    timestamp = Timestamp(version=version + 1, expires=now + lifetime, snapshot_meta=MetaFile(current))
    write_atomic(path, sign_metadata(Metadata(timestamp), [online_key]))
    return current


def resign_timestamp(
    directory: Path | str,
    online_key: Ed25519PrivateKey,
    now: datetime,
    *,
    timestamp_lifetime: timedelta = TIMESTAMP_LIFETIME,
) -> None:
    """Renew the timestamp (and an ageing snapshot) of the repository, so that clients can tell it from a frozen one."""
    with locked(directory):
        state = current_state(directory)
        if state is None:
            raise RepositoryError("not_found", f"{directory} has no publication yet", cure="publish a policy first")
        sign_online(Path(directory), state.versions, online_key, now, timestamp_lifetime)
