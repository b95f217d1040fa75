"""What the agents of workspaces used of them, out of what the workspaces report: added up by day and engagement for people.

The numbers are the workspace's own word (:mod:`saw.audit.workspace_usage`): nothing is decided by them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, Row, Table, func, select

from saw.audit.workspace_usage import Usage, Used
from saw.broker.clock import days, iso
from saw.broker.context import Services
from saw.broker.schema import RESOURCES, delegations, resource_boots, resource_use
from saw.broker.store import Transaction

MOST = 10**15
"""What one day of one workspace adds up to at most, so that no workspace makes sums of the database overflow."""
MOST_DAYS = 366
"""Days that are told at a time."""
_COLUMNS = (*RESOURCES, "memory_peak")


def count_use(tx: Transaction, workspace: Row[Any], usage: Usage, now: str) -> None:
    """Add to ``workspace``'s day what was used since its last report; ``now`` is a time as the register writes it.

    A report of the boot that was told last counts as far as it is beyond what was told; a report of another boot counts whole.
    """
    told = _row(tx.connection, resource_boots, workspace_id=workspace.id)
    before = {name: getattr(told, name) if told is not None and told.boot == usage.boot else 0 for name in RESOURCES}
    kept = {name: max(before[name], min(getattr(usage.total, name), MOST)) for name in RESOURCES}
    _put(tx.connection, resource_boots, {"workspace_id": workspace.id}, {"boot": usage.boot, **kept})
    day = {
        "workspace_id": workspace.id,
        "day": now[:10],
        "engagement": _engagement(tx.connection, workspace, now),
    }
    known = _row(tx.connection, resource_use, **day)
    values = {
        name: min(MOST, (0 if known is None else getattr(known, name)) + kept[name] - before[name])
        for name in RESOURCES
    }
    peak = min(usage.total.memory_peak, MOST)
    _put(
        tx.connection,
        resource_use,
        day,
        {**values, "memory_peak": max(peak, 0 if known is None else known.memory_peak)},
    )


class ResourceUse:
    """What people are told of it."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def show(self, first: str | None, last: str | None, workspace: str | None) -> dict[str, Any]:
        """Return what was used from the day ``first`` to ``last`` (UTC; default: today), by day, workspace and engagement.

        Raises :class:`saw.broker.errors.MalformedError` for more than :data:`MOST_DAYS` days.

        ``engagement`` is the id of the delegation that the agent's work goes back to; empty where it held none, or several.
        """
        first, last = days(first, last, self._s.clock(), MOST_DAYS)
        query = select(resource_use).where(resource_use.c.day >= first, resource_use.c.day <= last)
        if workspace:
            query = query.where(resource_use.c.workspace_id == workspace)
        query = query.order_by(resource_use.c.day, resource_use.c.workspace_id, resource_use.c.engagement)
        with self._s.store.read() as connection:
            rows = connection.execute(query).all()
        found = [
            {
                "day": row.day,
                "workspace": row.workspace_id,
                "engagement": row.engagement,
                **{name: getattr(row, name) for name in _COLUMNS},
            }
            for row in rows
        ]
        return {"first": first, "last": last, "usage": found}

    def of_workspaces(self, connection: Connection, ids: Iterable[str]) -> dict[str, Used]:
        """Return what each workspace used in this month (UTC); one that told nothing used nothing."""
        today = iso(self._s.clock())[:10]
        column = resource_use.c
        sums = [func.sum(column[name]).label(name) for name in RESOURCES]
        query = (
            select(column.workspace_id, *sums, func.max(column.memory_peak).label("memory_peak"))
            .where(column.day >= f"{today[:7]}-01", column.day <= today, column.workspace_id.in_(wanted := list(ids)))
            .group_by(column.workspace_id)
        )
        # PostgreSQL adds big integers up to decimals.
        found = {
            row.workspace_id: Used(**{name: int(getattr(row, name)) for name in _COLUMNS})
            for row in connection.execute(query)
        }
        return {one: found.get(one, Used()) for one in wanted}


def _engagement(connection: Connection, workspace: Row[Any], now: str) -> str:
    """Return the id of the one delegation that all live ones of ``workspace`` go back to, or an empty text."""
    live = (
        (delegations.c.workspace_id == workspace.id)
        & delegations.c.revoked_at.is_(None)
        & (delegations.c.expires_at > now)
    )
    ids = set(connection.execute(select(delegations.c.id).where(live)).scalars())
    roots: set[str] = set()
    seen: set[str] = set()
    while ids:
        seen |= ids
        rows = connection.execute(select(delegations.c.id, delegations.c.parent).where(delegations.c.id.in_(ids))).all()
        roots |= {row.id for row in rows if not row.parent}
        ids = {row.parent for row in rows if row.parent} - seen
    return roots.pop() if len(roots) == 1 else ""


def _row(connection: Connection, table: Table, **key: str) -> Row[Any] | None:
    query = select(table).where(*(table.c[name] == value for name, value in key.items()))
    return connection.execute(query).one_or_none()


def _put(connection: Connection, table: Table, key: dict[str, str], values: dict[str, Any]) -> None:
    where = [table.c[name] == value for name, value in key.items()]
    if not connection.execute(table.update().where(*where).values(**values)).rowcount:
        connection.execute(table.insert().values(**key, **values))
