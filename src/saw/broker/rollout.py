"""A release on its way through its ring: who is offered it, and which release each workspace is given meanwhile.

The TUF repository names one release for all of a ring; the broker states for each workspace which release it is to run.
That statement can hold a signed release back, never replace it: the workspace verifies content by itself. Attestation and
perimeters go by the same statement, so a workspace that ignores it gets no identity.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, and_, or_, select

from saw.broker.clock import iso
from saw.broker.config import RolloutSettings
from saw.broker.lifecycle import State
from saw.broker.schema import releases, rollbacks, rollout_members, rollouts, workspaces
from saw.broker.store import Transaction
from saw.policy.bundle import VerifiedBundle, describe


class Course(enum.StrEnum):
    """Where a rollout stands.

    ``waiting``: nobody is offered it before a rollback is in escrow. ``running``: offered, limits count. ``complete``:
    everyone had loaded it for the soak time. ``halted``: offered to nobody any more. ``superseded``: a newer release came.
    """

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETE = "complete"
    HALTED = "halted"
    SUPERSEDED = "superseded"


class Word(enum.StrEnum):
    """A workspace's last word on a release; ``waiting`` means that it said nothing yet."""

    WAITING = "waiting"
    OFFERED = "offered"
    VERIFIED = "verified"
    LOADED = "loaded"
    REFUSED = "refused"


#: The last words.
FINAL = frozenset({Word.LOADED, Word.REFUSED})

_KEY = and_(
    releases.c.ring == rollouts.c.ring,
    releases.c.blueprint == rollouts.c.blueprint,
    releases.c.revision == rollouts.c.revision,
)


class Assignments:
    """Which release each workspace is given, in one snapshot; of all rings, or of one ``ring`` and ``blueprint``."""

    def __init__(self, connection: Connection, ring: str | None = None, blueprint: str | None = None) -> None:
        chain = select(
            releases.c.ring,
            releases.c.blueprint,
            releases.c.revision,
            releases.c.policy_digest,
            releases.c.lease_ttl_s,
            releases.c.released_at,
            rollouts.c.state,
            rollouts.c.everyone,
        ).select_from(releases.outerjoin(rollouts, _KEY))
        members = select(
            rollout_members.c.ring,
            rollout_members.c.blueprint,
            rollout_members.c.revision,
            rollout_members.c.workspace_id,
            rollout_members.c.state,
        )
        if ring is not None:
            chain = chain.where(releases.c.ring == ring, releases.c.blueprint == blueprint)
            members = members.where(rollout_members.c.ring == ring, rollout_members.c.blueprint == blueprint)
        self._chains: dict[tuple[str, str], list[Any]] = {}
        doubtful: set[tuple[str, str, int]] = set()
        row: Any
        for row in connection.execute(chain.order_by(releases.c.revision.desc())):
            held = self._chains.setdefault((row.ring, row.blueprint), [])
            # What is open to everyone ends the search, so nothing older is kept.
            if not held or not _open(held[-1]):
                held.append(row)
                if not _open(row):
                    doubtful.add((row.ring, row.blueprint, row.revision))
        self._words: dict[tuple[str, str, int, str], str] = {}
        if doubtful:
            for found in connection.execute(members):
                if (found.ring, found.blueprint, found.revision) in doubtful:
                    self._words[found.ring, found.blueprint, found.revision, found.workspace_id] = found.state

    def of(self, workspace: Row[Any]) -> Row[Any] | None:
        """Return the release (revision, policy_digest, lease_ttl_s, released_at) that ``workspace`` is given, or None."""
        release: Row[Any]
        for release in self._chains.get((workspace.ring, workspace.blueprint), ()):
            if _open(release) or workspace.policy_digest == release.policy_digest:
                return release
            word = self._words.get((workspace.ring, workspace.blueprint, release.revision, workspace.id))
            if word == Word.LOADED or (word is not None and release.state in {Course.RUNNING, Course.SUPERSEDED}):
                return release
        return None


def _open(release: Row[Any]) -> bool:
    """Tell whether every workspace of the ring is given this release (one from before there were rollouts too)."""
    if release.state is None or release.state == Course.COMPLETE:
        return True
    return bool(release.everyone) and release.state in {Course.RUNNING, Course.SUPERSEDED}


def assigned_release(connection: Connection, workspace: Row[Any]) -> Row[Any] | None:
    """Return the release that one workspace is given; see :meth:`Assignments.of`."""
    return Assignments(connection, workspace.ring, workspace.blueprint).of(workspace)


def open_rollout(
    tx: Transaction, settings: RolloutSettings, ring: str, bundle: VerifiedBundle, *, raw: bytes, now: datetime
) -> None:
    """Begin the rollout of a release that was recorded in this transaction, and offer it to the first workspaces.

    A release that returns to the content of an earlier one goes to everyone at once: going back must not wait. One that
    renews the content before it needs no rollback in escrow: going back from it would change nothing.
    """
    if find_rollout(tx.connection, ring, bundle.blueprint, bundle.revision) is not None:
        return  # the release was recorded before and its row was restored from the repository
    mine = (rollouts.c.ring == ring) & (rollouts.c.blueprint == bundle.blueprint)
    previous = standing_release(tx.connection, ring, bundle.blueprint, before=bundle.revision)
    returns_to = earlier_content(tx.connection, ring, bundle.blueprint, bundle.revision, raw)
    renews = previous is not None and describe(previous.bundle)[1].members == describe(raw)[1].members
    waiting = settings.require_rollback and previous is not None and returns_to is None and not renews
    everyone = not waiting and (settings.first_wave == 0 or returns_to is not None or previous is None)
    tx.connection.execute(
        rollouts.update()
        .where(mine & rollouts.c.state.in_([Course.WAITING, Course.RUNNING]))
        .values(state=Course.SUPERSEDED, state_since=iso(now), reason=f"revision {bundle.revision} was released")
    )
    tx.connection.execute(rollouts.update().where(mine).values(rollback_due=False))
    tx.connection.execute(
        rollbacks.update()
        .where(
            rollbacks.c.ring == ring,
            rollbacks.c.blueprint == bundle.blueprint,
            rollbacks.c.policy_digest == bundle.digest,
        )
        .values(state="published", reason="")
    )
    tx.connection.execute(
        rollouts.insert().values(
            ring=ring,
            blueprint=bundle.blueprint,
            revision=bundle.revision,
            policy_digest=bundle.digest,
            previous_revision=None if previous is None else previous.revision,
            previous_digest=None if previous is None else previous.policy_digest,
            returns_to=returns_to,
            state=Course.WAITING if waiting else Course.RUNNING,
            reason="no rollback is in escrow" if waiting else "",
            state_by="service:saw-broker",
            state_since=iso(now),
            opened_at=iso(now),
            everyone=everyone,
            rollback_due=False,
            warned="",
        )
    )
    if not waiting:
        rollout = find_rollout(tx.connection, ring, bundle.blueprint, bundle.revision)
        assert rollout is not None  # noqa: S101 - inserted above
        ready = [row.id for row in live_workspaces(tx.connection, ring, bundle.blueprint)]
        offer(tx, rollout, ready if everyone else ready[: settings.first_wave], now)


def offer(tx: Transaction, rollout: Row[Any], workspace_ids: Iterable[str], now: datetime) -> None:
    """Offer a release to workspaces that were not offered it before, and wake them."""
    chosen = list(workspace_ids)
    for workspace_id in chosen:
        tx.connection.execute(
            rollout_members.insert().values(
                ring=rollout.ring,
                blueprint=rollout.blueprint,
                revision=rollout.revision,
                workspace_id=workspace_id,
                state=Word.WAITING,
                reason="",
                offered_at=iso(now),
                said_at=iso(now),
                silent=False,
            )
        )
    if chosen:
        tx.touch(*chosen)


def live_workspaces(connection: Connection, ring: str, blueprint: str) -> list[Row[Any]]:
    """Return the workspaces of a ring that run and were attested, by id."""
    where = (workspaces.c.ring == ring) & (workspaces.c.blueprint == blueprint) & (workspaces.c.state == State.ACTIVE)
    return list(connection.execute(select(workspaces).where(where).order_by(workspaces.c.id)))


def find_rollout(connection: Connection, ring: str, blueprint: str, revision: int | None = None) -> Row[Any] | None:
    """Return the rollout of ``revision``, or the newest one of the ring and blueprint."""
    where = (rollouts.c.ring == ring) & (rollouts.c.blueprint == blueprint)
    if revision is not None:
        where &= rollouts.c.revision == revision
    query = select(rollouts).where(where).order_by(rollouts.c.revision.desc()).limit(1)
    return connection.execute(query).one_or_none()


def newest_rollouts(connection: Connection) -> list[Row[Any]]:
    """Return the newest rollout of every ring and blueprint."""
    newest: dict[tuple[str, str], Row[Any]] = {}
    for row in connection.execute(select(rollouts).order_by(rollouts.c.revision)):
        newest[row.ring, row.blueprint] = row
    return [newest[key] for key in sorted(newest)]


def this(rollout: Row[Any]) -> Any:
    """Return the condition that picks the row of ``rollout``."""
    return and_(
        rollouts.c.ring == rollout.ring,
        rollouts.c.blueprint == rollout.blueprint,
        rollouts.c.revision == rollout.revision,
    )


def of_rollout(rollout: Row[Any]) -> Any:
    """Return the condition that picks the members of ``rollout``."""
    return and_(
        rollout_members.c.ring == rollout.ring,
        rollout_members.c.blueprint == rollout.blueprint,
        rollout_members.c.revision == rollout.revision,
    )


def earlier_content(connection: Connection, ring: str, blueprint: str, revision: int, raw: bytes) -> int | None:
    """Return the revision before the last one whose content the bundle ``raw`` has again, or None: no way back.

    A release that was halted is nothing to go back to: its content counts as new, and is limited as such.
    """
    where = (releases.c.ring == ring) & (releases.c.blueprint == blueprint) & (releases.c.revision < revision)
    query = (
        select(releases.c.revision, releases.c.bundle, rollouts.c.state)
        .select_from(releases.outerjoin(rollouts, _KEY))
        .where(where)
        .order_by(releases.c.revision.desc())
    )
    members = describe(raw)[1].members
    for place, row in enumerate(connection.execute(query)):
        if describe(row.bundle)[1].members != members or (place and row.state == Course.HALTED):
            continue
        return int(row.revision) if place else None
    return None


def standing_release(
    connection: Connection, ring: str, blueprint: str, *, before: int | None = None
) -> Row[Any] | None:
    """Return the newest release (revision, policy_digest, bundle) that was not halted, ``before`` a revision."""
    where = (releases.c.ring == ring) & (releases.c.blueprint == blueprint)
    if before is not None:
        where &= releases.c.revision < before
    query = (
        select(releases.c.revision, releases.c.policy_digest, releases.c.bundle)
        .select_from(releases.outerjoin(rollouts, _KEY))
        .where(where, or_(rollouts.c.state.is_(None), rollouts.c.state != Course.HALTED))
        .order_by(releases.c.revision.desc())
        .limit(1)
    )
    found: list[Any] = list(connection.execute(query))
    return found[0] if found else None
