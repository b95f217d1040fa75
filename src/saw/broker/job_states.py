"""How a job goes from state to state: each step is one compare-and-set with its audit row, and wakes who waits.

``queued → running → succeeded | failed | cancelled | interrupted``; from ``failed`` and ``interrupted`` back to ``queued``
when somebody resumes it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, Row, delete, select

from saw import jsontext
from saw.broker.clock import iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.errors import NotFoundError
from saw.broker.schema import job_events, jobs
from saw.broker.store import Transaction
from saw.jobs.messages import LIVE, RESUMABLE, Event, JobError, JobState

QUEUED = "*jobs*"
"""The key under which workers wait for a job."""
KEPT_EVENTS = 2000
"""Events of a job that are kept, the newest."""
PAST_A_KILL = frozenset({"kill", "destroy"})
"""Kinds that go on when the workspace is killed."""
LOST = JobError(
    "worker_lost",
    "the worker was not heard of in time: what the run did before that is done, and nothing tells how it ended",
    "see that the worker runs; then saw job resume, the playbooks can be run again",
)

_ACTIVITY: dict[str, Literal["enable", "activate", "deactivate", "suspend", "resume"]] = {
    "queued": "resume",
    "running": "enable",
    "succeeded": "activate",
    "interrupted": "suspend",
}


def job_key(identifier: str) -> str:
    """Return the key under which somebody waits for news of a job."""
    return f"job:{identifier}"


def get_job(connection: Connection, identifier: str) -> Row[Any]:
    """Return the row of a job or raise :class:`NotFoundError`."""
    row = connection.execute(select(jobs).where(jobs.c.id == identifier)).one_or_none()
    if row is None:
        raise unknown_job(identifier)
    return row


def unknown_job(identifier: str) -> NotFoundError:
    """Return the refusal of a job that does not exist, or not for the caller."""
    return NotFoundError(f"there is no job {identifier[:64]!r}", cure="saw job list shows them", code="unknown_job")


def view(row: Row[Any]) -> dict[str, Any]:
    """Return what people see of a job."""
    names = (
        "id",
        "kind",
        "state",
        "attempt",
        "asked_by",
        "asked_at",
        "queued_at",
        "started_at",
        "ended_at",
        "executor",
    )
    found = {name: getattr(row, name) for name in (*names, "external_id", "worker", "cancel_asked_at", "cancel_reason")}
    return {
        **found,
        "workspace": row.workspace_id,
        "parameters": jsontext.decode(row.parameters),
        "progress": jsontext.decode(row.progress),
        "error": None if row.error is None else jsontext.decode(row.error),
        "resumable": row.state in RESUMABLE,
        "seq": row.seq,
    }


class JobMoves:
    """The steps of jobs, inside the transaction of whoever makes them."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def move(
        self, tx: Transaction, caller: Caller, row: Row[Any], to: JobState, comment: str, **values: Any
    ) -> Row[Any] | None:
        """Take ``row`` to ``to`` and return its new row; None when it has left the state of ``row`` meanwhile."""
        now = iso(self._s.clock())
        values |= {"state": to, "ended_at": None if to in LIVE else now}
        there = (jobs.c.id == row.id) & (jobs.c.state == row.state) & (jobs.c.attempt == row.attempt)
        if tx.connection.execute(jobs.update().where(there).values(**values)).rowcount != 1:
            return None
        found = get_job(tx.connection, row.id)
        error = None if found.error is None else jsontext.decode(found.error)
        self.record(
            tx, caller, found, comment, _ACTIVITY.get(to, "deactivate"), said={"from": row.state, "to": to}, error=error
        )
        self.append(tx, found, [{"kind": "state", "text": to, "comment": comment}])
        if to != "running":
            tx.wake(QUEUED)  # also when it has ended: another job of the workspace may have waited for that
        return get_job(tx.connection, row.id)

    def append(self, tx: Transaction, row: Row[Any], events: list[dict[str, Any]]) -> None:
        """Keep ``events`` of a job and wake who watches it; the oldest go when there are too many."""
        now, seq = iso(self._s.clock()), int(get_job(tx.connection, row.id).seq)
        for event in events:
            seq += 1
            told = msgspec.json.encode(event).decode()
            tx.connection.execute(
                job_events.insert().values(job_id=row.id, seq=seq, attempt=row.attempt, at=now, event=told)
            )
        tx.connection.execute(jobs.update().where(jobs.c.id == row.id).values(seq=seq))
        old = (job_events.c.job_id == row.id) & (job_events.c.seq <= seq - KEPT_EVENTS)
        tx.connection.execute(delete(job_events).where(old))
        tx.wake(job_key(row.id))

    def record(
        self,
        tx: Transaction,
        caller: Caller,
        row: Row[Any],
        comment: str,
        activity: Literal["create", "update", "enable", "activate", "deactivate", "suspend", "resume"] = "update",
        *,
        said: dict[str, object] | None = None,
        error: dict[str, Any] | None = None,
        refused: bool = False,
    ) -> None:
        """Audit something about a job. Of an error its code is written, never its words."""
        detail: dict[str, object] = {"job": row.id, "kind": row.kind, "attempt": row.attempt, "asked_by": row.asked_by}
        detail |= {"executor": row.executor or "", "worker": row.worker or "", **(said or {})}
        if error is not None:
            detail["reason"] = error["code"]
        tx.record(
            self._s.events.entity_management(
                self._s.clock(),
                caller.subject(row.workspace_id),
                ("job", row.id),
                activity=activity,
                outcome="failure" if refused or (said or {}).get("to") in {"failed", "interrupted"} else "success",
                comment=comment,
                detail=detail,
            )
        )

    def settle(self, tx: Transaction) -> None:
        """Interrupt every job whose worker was silent for too long."""
        due = (jobs.c.state == "running") & (jobs.c.lease_ends_at <= iso(self._s.clock()))
        for row in tx.connection.execute(select(jobs).where(due)).all():
            self.move(tx, BROKER, row, "interrupted", "the worker was lost", error=msgspec.json.encode(LOST).decode())

    def due(self, connection: Connection) -> bool:
        """Tell whether :meth:`settle` has something to do."""
        late = (jobs.c.state == "running") & (jobs.c.lease_ends_at <= iso(self._s.clock()))
        return connection.execute(select(jobs.c.id).where(late).limit(1)).first() is not None

    def cancel(self, tx: Transaction, caller: Caller, row: Row[Any], reason: str) -> bool:
        """Cancel ``row`` when it waits, ask its worker to end it when it runs; return whether something changed."""
        if row.state == "queued":
            values = {"cancel_asked_at": iso(self._s.clock()), "cancel_reason": reason[:256]}
            return self.move(tx, caller, row, "cancelled", reason, **values) is not None
        if row.state != "running" or row.cancel_asked_at is not None:
            return False
        asked = {"cancel_asked_at": iso(self._s.clock()), "cancel_reason": reason[:256]}
        tx.connection.execute(jobs.update().where(jobs.c.id == row.id).values(**asked))
        self.record(tx, caller, row, reason, said={"cancel": "asked"})
        self.append(tx, row, [msgspec.to_builtins(Event(kind="note", text="somebody asked for its end"))])
        return True

    def workspace_killed(self, tx: Transaction, caller: Caller, workspace_id: str, reason: str) -> None:
        """End what would bring a workspace up that is killed now."""
        live = (jobs.c.workspace_id == workspace_id) & jobs.c.state.in_(LIVE) & jobs.c.kind.not_in(PAST_A_KILL)
        for row in tx.connection.execute(select(jobs).where(live)).all():
            self.cancel(tx, caller, row, f"the workspace was killed: {reason}")
