"""Rings with officers of their own: the targets role delegates ``rings/<ring>/`` to a role with its keys and threshold.

A delegated role decides *which* bundle its ring gets. *What* may be a bundle at all stays with the officers of the targets
role, whose signatures every bundle carries; so a ring's officers alone can put nothing unsigned into a workspace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuf.api.metadata import DelegatedRole, Delegations, Key  # type: ignore[attr-defined]

from saw.policy.errors import RepositoryError
from saw.policy.keys import PublicKey
from saw.policy.tuf_metadata import Targets, check_keys, signing_key
from saw.policy.tuf_store import ring_of_role, ring_role, split_target, target_name


def ring_pattern(ring: str) -> str:
    """Return the target paths that the role of ``ring`` may name."""
    target_name(ring, "any")
    return f"rings/{ring}/*.bundle.json"


def _refuse(reason: str) -> RepositoryError:
    return RepositoryError("malformed", reason, cure="delegate with saw policy keys delegate")


def check_delegations(targets: Targets) -> dict[str, tuple[dict[str, PublicKey], int]]:
    """Return keys and threshold of each delegated ring by role name; refuse every other kind of delegation.

    A delegation covers exactly one ring, ends the search, and the top-level targets name nothing of that ring.
    """
    if targets.delegations is None:
        return {}
    if targets.delegations.roles is None:
        raise _refuse("the targets delegate to hashed bins")
    found: dict[str, tuple[dict[str, PublicKey], int]] = {}
    for name, role in targets.delegations.roles.items():
        ring = ring_of_role(name)
        if ring is None or role.name != name or role.paths != [ring_pattern(ring)] or not role.terminating:
            raise _refuse(f"the targets delegate to {name[:64]!r}, which is not one whole ring")
        found[name] = check_keys(targets.delegations.keys, role, name), role.threshold
    for path in targets.targets:
        if ring_role(split_target(path)[0]) in found:
            raise _refuse(f"{path} is named by the top-level targets although its ring is delegated")
    return found


def with_ring(present: Delegations | None, ring: str, keys: Sequence[PublicKey], threshold: int) -> Delegations:
    """Return the delegations with ``ring`` given to ``keys``, ``threshold`` of whom must sign."""
    holders = {key.keyid: key for key in map(signing_key, keys)}
    name = ring_role(ring)
    role = DelegatedRole(name, sorted(holders), threshold, terminating=True, paths=[ring_pattern(ring)])
    return _delegations(present, {name: role}, holders)


def without_ring(present: Delegations | None, ring: str) -> Delegations | None:
    """Return the delegations without that of ``ring``; ``None`` when none is left."""
    roles = dict(present.roles or {}) if present else {}
    if roles.pop(ring_role(ring), None) is None:
        raise RepositoryError("not_found", f"the ring {ring} is not delegated", cure="see saw policy keys list")
    return _build(roles, present.keys if present else {}) if roles else None


def without_key(present: Delegations, keyid: str) -> Delegations:
    """Return the delegations in which ``keyid`` counts nowhere; refuse when a ring could not be released any more."""
    roles: dict[str, DelegatedRole] = {}
    for name, role in (present.roles or {}).items():
        left = [other for other in role.keyids if other != keyid]
        if len(left) < role.threshold:
            reason = f"without this key {len(left)} officers are left for {name}, and {role.threshold} must sign"
            raise RepositoryError("threshold", reason, cure="delegate the ring to further officers first")
        roles[name] = DelegatedRole(name, left, role.threshold, role.terminating, paths=role.paths)
    return _build(roles, present.keys)


def _delegations(
    present: Delegations | None, roles: Mapping[str, DelegatedRole], keys: Mapping[str, Key]
) -> Delegations:
    before = present.roles or {} if present else {}
    return _build({**before, **roles}, {**(present.keys if present else {}), **keys})


def _build(roles: dict[str, DelegatedRole], keys: Mapping[str, Key]) -> Delegations:
    used = {keyid for role in roles.values() for keyid in role.keyids}
    return Delegations({keyid: key for keyid, key in keys.items() if keyid in used}, roles=roles)
