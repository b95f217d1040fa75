"""Old days of what agents used go (:mod:`saw.broker.resource_use`), and what only served to count workspaces that are no more."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import select

from saw.broker.clock import iso
from saw.broker.context import BROKER, Services
from saw.broker.holds import holds_in_force, released
from saw.broker.lifecycle import State
from saw.broker.schema import resource_boots, resource_use, workspaces

KEPT_DAYS = 400
"""Whole days (UTC) that are kept: a year, and the month after it in which somebody looks back."""
_AT_ONCE = 500
"""Workspaces that one statement names."""


class ResourceRetention:
    """Removes what is due; each day in a transaction of its own, so that others write between them."""

    def __init__(self, services: Services) -> None:
        self._s = services
        self._looked: tuple[str, int] | None = None

    def tick(self) -> None:
        """Look once for each day that passes, and again when a legal hold was released."""
        self._forget_boots()
        before = iso(self._s.clock() - timedelta(days=KEPT_DAYS))[:10]
        old = select(resource_use.c.day).where(resource_use.c.day < before).distinct().order_by(resource_use.c.day)
        with self._s.store.read() as connection:
            wanted = (before, released(connection))
            if wanted == self._looked:
                return
            due = connection.execute(old).scalars().all()
        for day in due:
            self._remove(day)
        self._looked = wanted

    def _forget_boots(self) -> None:
        ended = select(workspaces.c.id).where(workspaces.c.state == State.DECOMMISSIONED)
        gone = resource_boots.c.workspace_id.in_(ended)
        with self._s.store.read() as connection:
            if connection.execute(select(resource_boots.c.workspace_id).where(gone).limit(1)).first() is None:
                return
        with self._s.store.write() as tx:
            tx.connection.execute(resource_boots.delete().where(gone))

    def _remove(self, day: str) -> None:
        of_day = resource_use.c.day == day
        began, ended = f"{day}T00:00:00.000Z", f"{day}T23:59:59.999Z"
        with self._s.store.write() as tx:
            held = holds_in_force(tx.connection)
            told = tx.connection.execute(select(resource_use.c.workspace_id).where(of_day).distinct()).scalars()
            going = [one for one in told if not held.takes(one, began, ended)]
            count = 0
            for at in range(0, len(going), _AT_ONCE):
                mine = resource_use.c.workspace_id.in_(going[at : at + _AT_ONCE])
                count += tx.connection.execute(resource_use.delete().where(of_day, mine)).rowcount
            if count:
                tx.record(
                    self._s.events.api_activity(
                        self._s.clock(),
                        BROKER.subject(),
                        "usage.retention.remove",
                        activity="delete",
                        message=f"{count} lines of what agents used on {day} were removed",
                        detail={"day": day, "lines": count, "days": KEPT_DAYS},
                    )
                )
