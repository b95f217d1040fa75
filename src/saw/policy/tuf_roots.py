"""Follow a chain of roots: each version signed by the officers of the one before and by its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

import msgspec

from saw.policy.keys import key_kind
from saw.policy.tuf_delegation import check_delegations
from saw.policy.tuf_metadata import Root, Targets, check_root, check_successor, parse, role_keys
from saw.policy.tuf_store import newest, read_role

__all__ = ["KeyUse", "follow_roots", "key_uses", "root_chain"]


def follow_roots(trusted: bytes, successors: Iterable[bytes], now: datetime | None = None) -> bytes:
    """Return the newest root that ``trusted`` leads to through ``successors``, which are in order of version.

    A version that is skipped, forged, or not signed by enough officers of both sides raises
    :class:`saw.policy.errors.RepositoryError` (``stale_base``, ``threshold``, ``malformed``) and nothing is followed.
    Versions up to the trusted one are passed over. With ``now``, the newest must not have expired (``freeze``).
    """
    version = check_root(trusted, None).version
    newest_root = trusted
    for raw in successors:
        offered = parse(Root, raw, "root.json").signed.version
        if offered <= version:
            continue
        version = check_successor(newest_root, raw).version
        newest_root = raw
    check_root(newest_root, now)
    return newest_root


def root_chain(directory: Path | str, after: int = 0) -> tuple[bytes, ...]:
    """Return the roots of a repository with a version above ``after``, in order; they are not verified here."""
    return tuple(read_role(directory, "root", version) for version in range(after + 1, newest(directory, "root") + 1))


class KeyUse(msgspec.Struct, frozen=True):
    """One role of the repository: how many of which keys (id → kind) must sign for it."""

    role: str
    threshold: int
    keys: dict[str, str]


def key_uses(root: Root, targets: Targets | None) -> tuple[KeyUse, ...]:
    """Return every role with its keys: the four of the root, and the rings that have officers of their own."""
    holders: Mapping[str, tuple[Mapping[str, object], int]] = {
        role: role_keys(root, role) for role in ("root", "targets", "snapshot", "timestamp")
    }
    rings = check_delegations(targets) if targets is not None else {}
    return tuple(
        KeyUse(role, threshold, {keyid: key_kind(key) for keyid, key in keys.items()})  # type: ignore[arg-type]
        for role, (keys, threshold) in {**holders, **rings}.items()
    )
