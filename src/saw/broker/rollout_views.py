"""What operators see of rollouts: where each release stands, and what one workspace said about its releases."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import Connection, Row, select

from saw.broker.config import RolloutSettings
from saw.broker.context import Services
from saw.broker.registry import get_row
from saw.broker.rollout import (
    FINAL,
    Course,
    Word,
    assigned_release,
    live_workspaces,
    of_rollout,
    standing_release,
)
from saw.broker.rollout_calls import calls_under
from saw.broker.rollout_escrow import command_for, kept
from saw.broker.rollout_limits import Calls, Counts, count, crossed
from saw.broker.schema import policy_states, releases, rollout_members, rollouts

#: How many rollouts of a ring and blueprint, and how many reports of a workspace, are shown.
SHOWN_ROLLOUTS = 5
SHOWN_STATES = 200


class CallsView(msgspec.Struct, frozen=True):
    """Calls decided under a policy, with the share that was denied (0 to 1)."""

    allowed: int
    denied: int
    deny_rate: float

    @classmethod
    def of(cls, calls: Calls) -> CallsView:
        """Return the view of ``calls``."""
        return cls(calls.allowed, calls.denied, round(calls.deny_rate, 4))


class MemberView(msgspec.Struct, frozen=True):
    """The last word of one workspace. Times are UTC texts."""

    workspace: str
    state: str
    reason: str
    offered_at: str
    said_at: str
    silent: bool


class RollbackView(msgspec.Struct, frozen=True):
    """A rollback in escrow: ``state`` is kept, published, stale or failed."""

    state: str
    reason: str
    returns_to: int
    policy_digest: str
    deposited_by: str


class Standing(msgspec.Struct, frozen=True):
    """The newest release of a ring and blueprint that is not halted."""

    ring: str
    blueprint: str
    revision: int
    policy_digest: str


class RolloutView(msgspec.Struct, frozen=True, kw_only=True):
    """One release in one ring. ``held`` are the workspaces that are not offered it.

    ``all_loaded``: every running workspace of the ring has. ``over_limit`` says which limits are crossed now.
    """

    ring: str
    blueprint: str
    revision: int
    policy_digest: str
    previous_revision: int | None
    previous_digest: str | None
    returns_to: int | None
    state: str
    reason: str
    state_by: str
    state_since: str
    opened_at: str
    newest: bool
    counts: Counts
    all_loaded: bool
    calls: CallsView
    calls_before: CallsView
    over_limit: tuple[str, ...]
    limits: RolloutSettings
    rollback: RollbackView | None
    rollback_due: bool
    prepare_rollback: str
    members: tuple[MemberView, ...]
    held: tuple[str, ...]


class RolloutViews:
    """Reads rollouts for operators."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def ring(self, ring: str | None) -> dict[str, Any]:
        """Return the limits in force, what stands in ``ring`` (None: in all rings), and its last rollouts.

        ``standing`` is for each blueprint the release that the next one would go back to; rollouts are newest first.
        """
        query = select(rollouts).order_by(rollouts.c.ring, rollouts.c.blueprint, rollouts.c.revision.desc())
        if ring is not None:
            query = query.where(rollouts.c.ring == ring)
        found: dict[tuple[str, str], list[RolloutView]] = {}
        with self._s.store.read() as connection:
            for row in connection.execute(query):
                held = found.setdefault((row.ring, row.blueprint), [])
                if len(held) < SHOWN_ROLLOUTS:
                    held.append(_view(connection, self._s.config.rollout, row, newest=not held))
            standing = [
                Standing(*key, release.revision, release.policy_digest)
                for key in found
                if (release := standing_release(connection, *key)) is not None
            ]
        return {
            "limits": self._s.config.rollout,
            "standing": standing,
            "rollouts": [view for held in found.values() for view in held],
        }

    def workspace(self, workspace_id: str) -> dict[str, Any]:
        """Return which release a workspace is given, which it was attested with, and all that it said."""
        with self._s.store.read() as connection:
            row = get_row(connection, workspace_id)
            given = assigned_release(connection, row)
            query = select(policy_states).where(policy_states.c.workspace_id == row.id)
            said = list(connection.execute(query.order_by(policy_states.c.id.desc()).limit(SHOWN_STATES)))
            where = rollout_members.c.workspace_id == row.id
            words = list(
                connection.execute(select(rollout_members).where(where).order_by(rollout_members.c.revision.desc()))
            )
        return {
            "workspace": row.id,
            "ring": row.ring,
            "blueprint": row.blueprint,
            "state": row.state,
            "attested_digest": row.policy_digest,
            "given_digest": None if given is None else given.policy_digest,
            "given_revision": None if given is None else given.revision,
            "releases": [{"ring": word.ring, "revision": word.revision, **_fields(_member(word))} for word in words],
            "history": [
                {
                    "at": entry.at,
                    "revision": entry.revision,
                    "policy_digest": entry.policy_digest,
                    "state": entry.state,
                    "reason": entry.reason,
                    "verified": entry.verified,
                }
                for entry in said
            ],
        }

    def bundle(self, workspace_id: str) -> dict[str, Any]:
        """Return the bundle of the release that a workspace is given, base64 under ``bundle``; None when there is none."""
        with self._s.store.read() as connection:
            row = get_row(connection, workspace_id)
            given = assigned_release(connection, row)
            if given is None:
                return {"revision": None, "policy_digest": None, "bundle": None}
            where = (releases.c.ring == row.ring) & (releases.c.blueprint == row.blueprint)
            query = select(releases.c.bundle).where(where & (releases.c.revision == given.revision))
            raw = connection.execute(query).scalar_one()
        return {"revision": given.revision, "policy_digest": given.policy_digest, "bundle": raw}


def _view(connection: Connection, limits: RolloutSettings, row: Row[Any], *, newest: bool) -> RolloutView:
    query = select(rollout_members).where(of_rollout(row)).order_by(rollout_members.c.workspace_id)
    members = list(connection.execute(query))
    live = {workspace.id for workspace in live_workspaces(connection, row.ring, row.blueprint)}
    words = {member.workspace_id: member.state for member in members}
    counts = count(
        (member.state, member.silent) for member in members if member.state in FINAL or member.workspace_id in live
    )
    calls = calls_under(connection, row.ring, row.policy_digest)
    before = calls_under(connection, row.ring, row.previous_digest)
    rollback = kept(connection, row)
    offered = row.state in {Course.RUNNING, Course.COMPLETE}
    return RolloutView(
        ring=row.ring,
        blueprint=row.blueprint,
        revision=row.revision,
        policy_digest=row.policy_digest,
        previous_revision=row.previous_revision,
        previous_digest=row.previous_digest,
        returns_to=row.returns_to,
        state=row.state,
        reason=row.reason,
        state_by=row.state_by,
        state_since=row.state_since,
        opened_at=row.opened_at,
        newest=newest,
        counts=counts,
        all_loaded=offered and all(words.get(workspace) == Word.LOADED for workspace in live),
        calls=CallsView.of(calls),
        calls_before=CallsView.of(before),
        over_limit=crossed(limits, counts, calls, before),
        limits=limits,
        rollback=None
        if rollback is None
        else RollbackView(
            rollback.state, rollback.reason, rollback.returns_to, rollback.policy_digest, rollback.deposited_by
        ),
        rollback_due=row.rollback_due,
        prepare_rollback=command_for(row),
        members=tuple(_member(member) for member in members),
        held=tuple(sorted(live - words.keys()))
        if offered
        else tuple(sorted(workspace for workspace in live if words.get(workspace) != Word.LOADED)),
    )


def _member(row: Row[Any]) -> MemberView:
    return MemberView(row.workspace_id, row.state, row.reason, row.offered_at, row.said_at, row.silent)


def _fields(view: MemberView) -> dict[str, Any]:
    return msgspec.structs.asdict(view)
