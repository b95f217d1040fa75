"""The end of what agents asked for: requests that ended long ago, or of which there are too many, go; what is held stays."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Row, func, select, tuple_

from saw.broker.clock import iso
from saw.broker.context import BROKER, Services
from saw.broker.errors import BusyError
from saw.broker.holds import Held, holds_in_force
from saw.broker.schema import policy_requests
from saw.broker.store import Transaction

KEEP = timedelta(days=90)
"""How long a request that has ended is listed; what the trail says of it stays."""
STEP = 500
"""Most requests that one look considers."""
_START = ("", "")


class RequestRetention:
    """Removes what ended longer ago than :data:`KEEP`, a step at a time and the oldest first."""

    def __init__(self, services: Services) -> None:
        self._s = services
        #: How far the present pass has come (``ended_at``, id): what is held must not keep what comes behind it from its turn.
        self._place = _START

    def tick(self) -> int:
        """Do one step and return how many were removed; where none goes, nothing is written."""
        before = iso(self._s.clock() - KEEP)
        with self._s.store.read() as connection:
            rows = _ended(connection, policy_requests.c.ended_at <= before, self._place)
            going = _not_held(rows, holds_in_force(connection)) if rows else []
        if going:
            with self._s.store.write() as tx:
                # Once more: what is held since counts.
                going = _not_held(going, holds_in_force(tx.connection))
                _remove(tx, self._s, going, "", f"ended more than {KEEP.days} days ago")
        self._place = (rows[-1].ended_at, rows[-1].id) if len(rows) == STEP else _START
        return len(going)


def make_room(tx: Transaction, services: Services, workspace_id: str, most: int) -> None:
    """Remove so many ended requests of a workspace, those that ended first, that one more makes ``most`` at most.

    Raises ``all_requests_held`` when all that could go are held.
    """
    mine = policy_requests.c.workspace_id == workspace_id
    count = tx.connection.execute(select(func.count()).select_from(policy_requests).where(mine)).scalar_one()
    over = int(count) - most + 1
    if over <= 0:
        return
    held, place, going = holds_in_force(tx.connection), _START, list[Row[Any]]()
    while len(going) < over and (rows := _ended(tx.connection, mine, place)):
        going += _not_held(rows, held)
        place = (rows[-1].ended_at, rows[-1].id)
    if not going:
        raise BusyError(
            f"{most} requests of {workspace_id} are kept, and those that have ended are under a legal hold",
            cure="somebody releases the hold: saw audit hold list",
            code="all_requests_held",
        )
    _remove(tx, services, going[:over], workspace_id, f"made room: {most} are kept of a workspace")


def _ended(connection: Connection, which: Any, place: tuple[str, str]) -> list[Row[Any]]:
    """Return the next ended requests behind ``place``, the one that ended first first."""
    columns = policy_requests.c
    query = select(policy_requests).where(columns.state != "open", which)
    query = query.where(tuple_(columns.ended_at, columns.id) > tuple_(*place)).order_by(columns.ended_at, columns.id)
    return list(connection.execute(query.limit(STEP)))


def _not_held(rows: list[Row[Any]], held: Held) -> list[Row[Any]]:
    return [row for row in rows if not held.takes(row.workspace_id, row.opened_at, row.ended_at)]


def _remove(tx: Transaction, services: Services, rows: list[Row[Any]], workspace_id: str, why: str) -> None:
    """Remove ``rows`` and tell it; ``workspace_id`` is empty for what is of any workspace."""
    if not rows:
        return
    tx.connection.execute(policy_requests.delete().where(policy_requests.c.id.in_([row.id for row in rows])))
    tx.record(
        services.events.api_activity(
            services.clock(),
            BROKER.subject(workspace_id),
            "policy.request.retention.remove",
            activity="delete",
            message=f"{len(rows)} policy requests were removed: they {why}",
            detail={"requests": len(rows), "days": KEEP.days},
        )
    )
