"""What people are told of workspaces: state, policy in force, attestation, lease, open reviews and costs, in one snapshot."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, func, or_, select

from saw.broker.charges import Charges
from saw.broker.clock import iso
from saw.broker.context import Services
from saw.broker.lifecycle import State
from saw.broker.registry import get_row
from saw.broker.resource_use import ResourceUse
from saw.broker.review_states import UNENDED
from saw.broker.rollout import Assignments
from saw.broker.schema import reviews, workspaces

PAGE = 25
"""Workspaces in one page of a list."""
_SHOWN = (
    "id", "sponsor", "blueprint", "ring", "image", "agent_id", "state", "state_reason", "state_since", "created_at",
    "policy_digest", "attested_at", "lease_expires_at",
)  # fmt: skip


class Overview:
    """Reads workspaces for the pages; changes nothing."""

    def __init__(self, services: Services, charges: Charges, resource_use: ResourceUse) -> None:
        self._s = services
        self._charges = charges
        self._resource_use = resource_use

    def sponsor(self, workspace_id: str) -> str:
        """Return who sponsors a workspace; raise :class:`saw.broker.errors.NotFoundError`."""
        with self._s.store.read() as connection:
            return str(get_row(connection, workspace_id).sponsor)

    def listed(
        self, sponsor: str | None, search: str = "", state: State | None = None, after: str = ""
    ) -> dict[str, Any]:
        """Return a page of workspaces by id, behind ``after``: those of ``sponsor``, or of everybody.

        ``search`` is a part of id, sponsor, blueprint or ring. ``next`` is the id to go on behind, empty at the end.
        """
        query = select(workspaces).where(workspaces.c.id > after).order_by(workspaces.c.id).limit(PAGE + 1)
        if sponsor is not None:
            query = query.where(_of(sponsor))
        if state is not None:
            query = query.where(workspaces.c.state == state)
        if search:
            columns = (workspaces.c.id, workspaces.c.sponsor, workspaces.c.blueprint, workspaces.c.ring)
            query = query.where(or_(*(column.icontains(search, autoescape=True) for column in columns)))
        with self._s.store.read() as connection:
            rows = connection.execute(query).all()
            shown = self._shown(connection, rows[:PAGE])
        return {"workspaces": shown, "next": rows[PAGE - 1].id if len(rows) > PAGE else ""}

    def show(self, workspace_id: str) -> dict[str, Any]:
        """Return one workspace; raise :class:`saw.broker.errors.NotFoundError`."""
        with self._s.store.read() as connection:
            return self._shown(connection, [get_row(connection, workspace_id)])[0]

    def _shown(self, connection: Connection, rows: list[Row[Any]] | Any) -> list[dict[str, Any]]:
        now = iso(self._s.clock())
        assignments = Assignments(connection)
        waiting = _open_reviews(connection, [row.id for row in rows])
        costs = self._charges.of_workspaces(connection, {row.id: row.blueprint for row in rows})
        used = self._resource_use.of_workspaces(connection, [row.id for row in rows])
        found = []
        for row in rows:
            release = assignments.of(row)
            released = None if release is None else release.policy_digest
            found.append(
                {
                    **{name: row._mapping[name] for name in _SHOWN},  # noqa: SLF001 - SQLAlchemy's public name
                    "released_digest": released,
                    "released": row.policy_digest is not None and row.policy_digest == released,
                    "lease_counts": row.lease_expires_at is not None and row.lease_expires_at > now,
                    "open_reviews": waiting.get(row.id, 0),
                    "costs": costs[row.id],
                    "used": used[row.id],
                }
            )
        return found


def _of(sponsor: str) -> ColumnElement[bool]:
    """Sponsors are written as the operator wrote them; people's names are in lower case."""
    return or_(workspaces.c.sponsor == sponsor, func.lower(func.trim(workspaces.c.sponsor)) == sponsor)


def _open_reviews(connection: Connection, ids: list[str]) -> dict[str, int]:
    query = (
        select(reviews.c.workspace_id, func.count())
        .where(reviews.c.workspace_id.in_(ids), reviews.c.state.in_(UNENDED))
        .group_by(reviews.c.workspace_id)
    )
    return {row[0]: int(row[1]) for row in connection.execute(query)}
