"""What each ring gets, and what it got before: revision, digest, signers and window of every release that is still held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from saw.policy.bundle import Reach, describe, good_signers
from saw.policy.errors import RepositoryError
from saw.policy.keys import PublicKey
from saw.policy.tuf_metadata import TargetFile, Targets, parse, trusted_policy_keys
from saw.policy.tuf_store import (
    check_file,
    current_root,
    current_state,
    delegated_roles,
    metadata_dir,
    newest,
    release_of,
    ring_role,
    split_target,
    stored_target,
    target_name,
)


class Revision(msgspec.Struct, frozen=True):
    """One signed bundle: times are UTC, ISO 8601; ``signers`` are the ids of today's policy keys that signed it."""

    revision: int
    policy_digest: str
    version: str
    not_before: str
    not_after: str
    signers: tuple[str, ...]
    reach: Reach | None = None


class RingStatus(msgspec.Struct, frozen=True):
    """The release of one blueprint in one ring, and its earlier revisions, newest first.

    ``role`` answers for it; empty when the teller does not know, as the broker's registry.
    """

    ring: str
    blueprint: str
    current: Revision
    history: tuple[Revision, ...]
    role: str = ""


def revision_of(raw: bytes, keys: Mapping[str, PublicKey]) -> Revision:
    """Return what the bundle file says of itself, with those of ``keys`` that really signed it."""
    digest, manifest, _ = describe(raw)
    return Revision(
        revision=manifest.revision,
        policy_digest=digest,
        version=manifest.version,
        not_before=manifest.not_before,
        not_after=manifest.not_after,
        signers=good_signers(raw, keys),
        reach=manifest.reach,
    )


def _entries(directory: Path, role: str) -> Iterator[tuple[str, TargetFile]]:
    """Yield path and file of every entry in every version of a role, newest version first."""
    for version in range(newest(directory, role), 0, -1):
        path = metadata_dir(directory) / f"{version}.{role}.json"
        if path.exists():
            yield from parse(Targets, path.read_bytes(), path.name).signed.targets.items()


def _held(directory: Path, wanted: str | None = None) -> dict[str, dict[int, bytes]]:
    """Return the bundle files that are held, by target path and revision; ``wanted`` asks for one path alone."""
    found: dict[str, dict[int, bytes]] = {}
    roles = {path.name.split(".")[1] for path in metadata_dir(directory).glob("[1-9]*.ring-*.json")}
    for role in ("targets", *sorted(roles)):
        for path, file in _entries(directory, role):
            revision = release_of(path, file).revision
            if (wanted is not None and path != wanted) or revision in found.setdefault(path, {}):
                continue
            stored = stored_target(directory, path, file)
            if stored.exists():
                raw = stored.read_bytes()
                check_file(path, file, raw)
                found[path][revision] = raw
    return found


def ring_status(directory: Path | str) -> tuple[RingStatus, ...]:
    """Return every ring and blueprint of the repository in ``directory``, sorted; history is what its files still hold."""
    state = current_state(directory)
    if state is None:
        return ()
    keys, _ = trusted_policy_keys(current_root(directory))
    held = _held(Path(directory))
    delegated = delegated_roles(state.targets)
    result: list[RingStatus] = []
    for path, file in sorted(state.files.items()):
        ring, blueprint = split_target(path)
        raw = stored_target(directory, path, file).read_bytes()
        check_file(path, file, raw)
        current = revision_of(raw, keys)
        older = {number: old for number, old in held.get(path, {}).items() if number != current.revision}
        history = tuple(revision_of(older[number], keys) for number in sorted(older, reverse=True))
        role = ring_role(ring) if ring_role(ring) in delegated else "targets"
        result.append(RingStatus(ring, blueprint, current, history, role))
    return tuple(result)


def held_revision(directory: Path | str, ring: str, blueprint: str, revision: int) -> bytes:
    """Return the bundle file of a revision that was released to ``ring``; raise ``not_found`` when it is not held here."""
    path = target_name(ring, blueprint)
    held = _held(Path(directory), path).get(path, {})
    if revision not in held:
        known = ", ".join(str(number) for number in sorted(held)) or "none"
        reason = f"revision {revision} of {ring}/{blueprint} is not held here (held: {known})"
        raise RepositoryError("not_found", reason, cure="choose one of them, or bring the copy up to date")
    return held[revision]


def revision_before(directory: Path | str, ring: str, blueprint: str) -> int:
    """Return the newest revision that is held and older than the one in force; raise ``not_found`` when there is none."""
    held = sorted(_held(Path(directory), target_name(ring, blueprint)).get(target_name(ring, blueprint), {}))
    if len(held) < 2:
        reason = f"{ring}/{blueprint} has no earlier revision here"
        raise RepositoryError("not_found", reason, cure="see saw policy rings, or bring the copy up to date")
    return held[-2]
