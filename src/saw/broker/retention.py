"""Retention of the trail: the content of what is old and kept elsewhere goes; place and hash stay (controls AUD-01, AUD-02).

One step is one transaction that empties at most :data:`STEP` events and tells which: after a crash both happened, or neither.
Only whole days (UTC) go, so that there are few such tellings; they are never removed themselves.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import msgspec
from sqlalchemy import Row, select, tuple_

from saw import jsontext
from saw.audit.chain import ChainError, event_hash
from saw.audit.removal import OPERATION, Removal, moment, ranges_of, removal_of
from saw.broker.context import BROKER, Services
from saw.broker.covered import Covered, Signed
from saw.broker.holds import Held, holds_in_force, released
from saw.broker.schema import audit_events
from saw.broker.store import Transaction
from saw.errors import SawError

logger = logging.getLogger("saw.broker")

STEP = 1000
"""Most events that one step looks at."""
STEPS = 10
"""Most steps that the broker does each time it looks after things (once a minute)."""
_START = (-1, -1)


class Retention:
    """Removes what is due, a step at a time."""

    def __init__(self, services: Services) -> None:
        self._s = services
        self._settings = services.config.audit
        self._covered = None if self._settings is None else Covered(services, self._settings)
        #: What the present pass over the trail is about, and how far it has come; None when it is through.
        self._pass: tuple[int, int, int] | None = None
        self._place: tuple[int, int] | None = _START

    @property
    def idle(self) -> bool:
        """Whether everything that is due now was looked at."""
        return self._place is None

    def catch_up(self) -> None:
        """Do up to :data:`STEPS` steps; others write between them."""
        for _ in range(STEPS):
            if not self.tick() and (self.idle or self._pass is None):
                return

    def tick(self) -> int:
        """Do one step and return how many events lost their content. What is in the way is logged, and nothing is removed."""
        if self._settings is None or self._covered is None:
            return 0
        try:
            return self._step(self._settings.days, self._covered)
        except SawError as error:
            logger.warning("nothing is removed from the trail: %s; %s", error.message, error.cure)
            return 0

    def _step(self, days: int, covered: Covered) -> int:
        day = (self._s.clock() - timedelta(days=days)).replace(hour=0, minute=0, second=0, microsecond=0)
        before = int(day.timestamp() * 1000)
        signed = covered.look()
        with self._s.store.read() as connection:
            shipped = covered.shipped(connection)
            end = signed.size if shipped is None else min(signed.size, shipped)
            wanted = (before, end, released(connection))
        if self._pass is None or (self._place is None and wanted != self._pass):
            self._pass, self._place = wanted, _START
        if self._place is None:
            return 0
        # What was begun is brought to its end first, else much that is held could keep what comes behind it from its turn.
        before, end = self._pass[0], min(end, self._pass[1])
        with self._s.store.write() as tx:
            rows = self._due(tx, before, end, self._place)
            held = holds_in_force(tx.connection)
            going = [row for row in rows if _goes(row, held)]
            if going:
                self._remove(tx, going, days, before, signed)
            place = (rows[-1].at, rows[-1].position) if len(rows) == STEP else None
        self._place = place  # only when the transaction is there
        return len(going)

    @staticmethod
    def _due(tx: Transaction, before: int, end: int, place: tuple[int, int]) -> list[Row[Any]]:
        columns = audit_events.c
        query = (
            select(audit_events)
            .where(columns.at < before, columns.position <= end, tuple_(columns.at, columns.position) > tuple_(*place))
            .order_by(columns.at, columns.position)
            .limit(STEP)
        )
        return list(tx.connection.execute(query))

    def _remove(self, tx: Transaction, rows: list[Row[Any]], days: int, before: int, signed: Signed) -> None:
        if tx.connection.dialect.name == "sqlite":
            tx.connection.exec_driver_sql("PRAGMA secure_delete = ON")  # else the words stay in free pages
        columns = audit_events.c
        for row in rows:
            there = (columns.source == row.source) & (columns.seq == row.seq)
            tx.connection.execute(audit_events.update().where(there).values(event="", at=None))
        times = [_time(row) for row in rows]
        removal = Removal(
            chains=ranges_of((row.source, row.seq) for row in rows),
            count=len(rows),
            first=min(times),
            last=max(times),
            before=before,
            days=days,
            size=signed.size,
            root=signed.root,
        )
        tx.record(
            self._s.events.api_activity(
                self._s.clock(),
                BROKER.subject(),
                OPERATION,
                activity="delete",
                message=f"{len(rows)} events from {moment(min(times))} to {moment(max(times))} were removed by retention",
                detail={"removed": msgspec.to_builtins(removal)},
            )
        )


def _goes(row: Row[Any], held: Held) -> bool:
    """Tell whether the content of an old event goes: not what tells of removals, what is held, or what somebody changed."""
    event = jsontext.decode(row.event)
    try:
        unchanged = event_hash(row.source, row.seq, row.prev, event) == row.hash
    except ChainError:
        unchanged = False
    if not unchanged or removal_of(row.source, event) is not None:
        return False
    ours = event["unmapped"].get("saw") if isinstance(event.get("unmapped"), dict) else None
    workspace = str(ours.get("workspace", "")) if isinstance(ours, dict) else ""
    # A hold of a time takes what happened in it by the event's own word, and by the broker's clock.
    times = sorted((_time(row), int(row.at)))
    return not held.takes(workspace, moment(times[0]), moment(times[1]))


def _time(row: Row[Any]) -> int:
    """Return the time that an event says, that of its arrival when it says none."""
    said = jsontext.decode(row.event).get("time")
    return said if isinstance(said, int) and said >= 0 else int(row.at)
