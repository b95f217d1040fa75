"""The TUF repository of policy: what officers sign, and the door to the broker's side.

``root`` and ``targets`` belong to the officers (M of N), ``snapshot`` and ``timestamp`` to the broker's online key. A ring
may have officers of its own (see :mod:`saw.policy.tuf_delegation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from saw.files import write_atomic
from saw.policy.bundle import Reach, verify_bundle
from saw.policy.errors import RepositoryError
from saw.policy.keys import PublicKey, key_id
from saw.policy.signers import Signer
from saw.policy.tuf_accept import (
    TIMESTAMP_LIFETIME,
    Accepted,
    accept_publication,
    install_root,
    resign_timestamp,
    sign_online,
)
from saw.policy.tuf_delegation import check_delegations
from saw.policy.tuf_metadata import (
    Metadata,
    Root,
    TargetFile,
    Targets,
    check_root,
    parse,
    role_keys,
    sign_metadata,
    signing_key,
    trusted_policy_keys,
)
from saw.policy.tuf_store import (
    Release,
    State,
    current_releases,
    current_root,
    current_state,
    metadata_dir,
    newest,
    read_role,
    read_target,
    split_target,
    stored_target,
    target_name,
)

__all__ = [
    "Accepted",
    "Publication",
    "Release",
    "accept_publication",
    "adopt_publication",
    "cosign_publication",
    "current_releases",
    "current_root",
    "init_repository",
    "install_root",
    "read_target",
    "resign_timestamp",
    "stage_publication",
    "target_name",
    "trusted_policy_keys",
]

OFFICER_LIFETIME = timedelta(days=365)
"""How long root and targets count after signing."""


class Publication(msgspec.Struct, frozen=True):
    """What officers hand to the broker: metadata by file name, and bundles by target path."""

    metadata: dict[str, bytes]
    targets: dict[str, bytes]


def init_repository(
    directory: Path | str,
    officer_keys: Sequence[Signer],
    online_key: Ed25519PrivateKey | PublicKey,
    threshold: int = 2,
    *,
    now: datetime,
    further_officers: Sequence[PublicKey] = (),
) -> bytes:
    """Make root and empty targets in ``directory``, signed by ``officer_keys``, and return the root.

    ``further_officers`` belong to both roles but do not sign now. With the online key's private half, snapshot and timestamp
    are made too; officers have only its public half and leave those to the broker.
    """
    folder = metadata_dir(directory)
    if folder.exists() and any(folder.iterdir()):
        raise RepositoryError("exists", f"{folder} is not empty", cure="choose an empty directory")
    publics = [*(key.public_key() for key in officer_keys), *further_officers]
    online = online_key.public_key() if isinstance(online_key, Ed25519PrivateKey) else online_key
    root = Root(version=1, expires=now + OFFICER_LIFETIME, consistent_snapshot=True)
    for role in ("root", "targets"):
        for key in publics:
            root.add_key(signing_key(key), role)
        root.roles[role].threshold = threshold
    for role in ("snapshot", "timestamp"):
        root.add_key(signing_key(online), role)
    raw_root = sign_metadata(Metadata(root), officer_keys)
    check_root(raw_root, now)
    targets = Targets(version=1, expires=now + OFFICER_LIFETIME)
    raw_targets = sign_metadata(Metadata(targets), officer_keys)
    folder.mkdir(parents=True, exist_ok=True)
    (Path(directory) / "targets").mkdir(exist_ok=True)
    write_atomic(folder / "1.root.json", raw_root)
    write_atomic(folder / "1.targets.json", raw_targets)
    if isinstance(online_key, Ed25519PrivateKey):
        sign_online(Path(directory), {"targets": 1}, online_key, now, TIMESTAMP_LIFETIME)
    return raw_root


def target_file(path: str, raw: bytes, policy_digest: str, revision: int, reach: Reach | None = None) -> TargetFile:
    """Return the signed entry of a bundle file; ``reach`` is what the releasing officers state about the change."""
    file = TargetFile.from_data(path, raw, ["sha256"])
    custom: dict[str, object] = {"policy_digest": policy_digest, "revision": revision}
    if reach is not None:
        custom["reach"] = msgspec.to_builtins(reach)
    file.unrecognized_fields["custom"] = custom
    return file


def next_targets(present: Targets | None, now: datetime) -> Targets:
    """Return the successor of a role's metadata with the same content."""
    return Targets(
        version=(present.version if present else 0) + 1,
        expires=now + OFFICER_LIFETIME,
        targets=dict(present.targets) if present else {},
        delegations=present.delegations if present else None,
    )


def stage_publication(
    directory: Path | str,
    target_path: str,
    raw: bytes,
    signers: Sequence[Signer],
    now: datetime,
    *,
    reach: Reach | None = None,
) -> Publication:
    """Return the publication that releases the bundle ``raw`` under ``target_path``, based on the copy in ``directory``.

    The bundle must already be good under the officers' keys. The new metadata of the role that releases to the ring
    carries one signature per signer; the others are added by :func:`cosign_publication`. ``reach`` states the change
    against the release that this one follows, when the manifest does not. Nothing in ``directory`` changes.
    """
    root = current_root(directory)
    keys, threshold = trusted_policy_keys(root)
    ring, blueprint = split_target(target_path)
    state = current_state(directory)
    known = {release.path: release for release in current_releases(directory)}.get(target_path)
    bundle = verify_bundle(raw, keys, threshold, now, min_revision=known.revision + 1 if known else 0)
    if bundle.blueprint != blueprint:
        reason = f"the bundle is of blueprint {bundle.blueprint}, the target of {blueprint}"
        raise RepositoryError("bundle", reason, cure="stage it under its own name")
    role = state.role_for(ring) if state is not None else "targets"
    successor = next_targets(_present(directory, state, role), now)
    successor.targets[target_path] = target_file(target_path, raw, bundle.digest, bundle.revision, reach)
    metadata = {"root.json": root, f"{role}.json": sign_metadata(Metadata(successor), signers)}
    if state is not None and role != "targets":
        metadata["targets.json"] = read_role(directory, "targets", state.targets.version)
    return Publication(metadata, {target_path: raw})


def _present(directory: Path | str, state: State | None, role: str) -> Targets | None:
    """Return the newest metadata of ``role``, that of a role which lost its ring meanwhile included."""
    if state is None:
        return None
    if role == "targets":
        return state.targets
    version = newest(directory, role)
    return parse(Targets, read_role(directory, role, version), f"{role}.json").signed if version else None


def cosign_publication(publication: Publication, signers: Sequence[Signer]) -> Publication:
    """Return ``publication`` with further officers' signatures on the metadata that each of them may sign.

    Raises :class:`RepositoryError` (``not_an_officer``) for a signer who may sign none of it.
    """
    root = parse(Root, publication.metadata["root.json"], "root.json").signed
    targets = parse(Targets, publication.metadata["targets.json"], "targets.json").signed
    holders = {"targets": role_keys(root, "targets")[0]}
    holders |= {role: keys for role, (keys, _) in check_delegations(targets).items()}
    metadata = dict(publication.metadata)
    for signer in signers:
        identifier = key_id(signer.public_key())
        mine = [role for role, keys in holders.items() if f"{role}.json" in metadata and identifier in keys]
        if not mine:
            reason = f"the key {identifier[:16]}… may sign nothing in this publication"
            raise RepositoryError("not_an_officer", reason, cure="sign with an officer's key; see saw policy keys list")
        for role in mine:
            name = f"{role}.json"
            parsed = parse(Targets, metadata[name], name)
            if identifier not in parsed.signatures:
                metadata[name] = sign_metadata(parsed, [signer])
    return Publication(metadata, publication.targets)


def adopt_publication(directory: Path | str, publication: Publication) -> None:
    """Bring the officers' copy in ``directory`` up to a publication that the broker has accepted."""
    folder = metadata_dir(directory)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, TargetFile] = {}
    numbered: dict[str, bytes] = {}
    for name, raw in publication.metadata.items():
        role = name.removesuffix(".json")
        if role.endswith("root"):
            numbered[f"{parse(Root, raw, name).signed.version}.root.json"] = raw
            continue
        signed = parse(Targets, raw, name).signed
        files |= signed.targets
        numbered[f"{signed.version}.{role}.json"] = raw
    for path, content in publication.targets.items():
        stored = stored_target(directory, path, files[path])
        stored.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(stored, content)
    for name, raw in numbered.items():
        write_atomic(folder / name, raw)
