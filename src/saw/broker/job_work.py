"""Lifecycle jobs as workers see them: claimed once, kept by a lease with signs of life, ended by whoever claimed them."""

from __future__ import annotations

import hashlib
import hmac
from datetime import timedelta
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, case, exists, select

from saw import jsontext
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import BrokerError, ConflictError, ForbiddenError
from saw.broker.job_settings import RUN_SCOPE
from saw.broker.job_states import JobMoves, get_job, unknown_job, view
from saw.broker.jobs import Jobs, stored_parameters
from saw.broker.schema import jobs
from saw.broker.store import Transaction
from saw.jobs.messages import AskClaim, Beat, BeatAnswer, ClaimAnswer, End, JobError, Work


class JobWork:
    """Jobs at the worker's side (controls LIF-01, LIF-03). What no longer is the worker's is refused, so that it stops."""

    def __init__(self, services: Services, asked: Jobs) -> None:
        self._s = services
        self._asked = asked
        self._moves = JobMoves(services)

    def require_worker(self, caller: Caller) -> None:
        """Raise :class:`ForbiddenError`, audited, unless ``caller`` is a worker."""
        kind, _, name = caller.principal.partition(":")
        machine = self._s.config.machines.get(name) if kind == "machine" else None
        if self._s.config.jobs is not None and (
            kind == "worker" or (machine is not None and RUN_SCOPE in machine.scopes)
        ):
            return
        error = ForbiddenError(
            f"{caller.principal} may not work on jobs",
            cure=f"give it the scope {RUN_SCOPE} (role variable broker_machines)",
            code="out_of_scope",
        )
        with self._s.store.write() as tx:
            tx.record(
                self._s.events.entity_management(
                    self._s.clock(),
                    caller.subject(),
                    ("job", "*"),
                    activity="enable",
                    outcome="failure",
                    comment="a claim was refused",
                    detail={"reason": error.code},
                )
            )
        raise error

    def claim(self, caller: Caller, body: AskClaim) -> ClaimAnswer:
        """Give the worker the job that waits longest, kills first, or none. The same claim again is answered with its job.

        One that may not run any more (its workspace was killed meanwhile) fails here and the next is looked at.
        """
        token = _hash(body.claim)
        with self._s.store.read() as connection:
            idle = not self._moves.due(connection) and self._next(connection, body) is None
            if idle and self._held(connection, caller, token) is None:
                return ClaimAnswer()
        with self._s.store.write() as tx:
            self._moves.settle(tx)
            if (held := self._held(tx.connection, caller, token)) is not None:
                return ClaimAnswer(self._work(held))
            while (row := self._next(tx.connection, body)) is not None:
                if self._still_good(tx, caller, row):
                    now = self._s.clock()
                    values = {"worker": caller.principal, "executor": body.executor, "claim_sha256": token}
                    values |= {"started_at": iso(now), "lease_ends_at": self._lease_ends()}
                    taken = self._moves.move(tx, caller, row, "running", "claimed", **values)
                    return ClaimAnswer(None if taken is None else self._work(taken))
        return ClaimAnswer()

    def beat(self, caller: Caller, identifier: str, body: Beat) -> BeatAnswer:
        """Take a sign of life and what happened; tell whether the run is to end. Raises as :meth:`end`."""
        with self._s.store.write() as tx:
            row, error = self._running(tx, caller, identifier, body.claim)
            if row is not None:
                values: dict[str, Any] = {"lease_ends_at": self._lease_ends()}
                if body.progress is not None:
                    values["progress"] = msgspec.json.encode(body.progress).decode()
                if body.external_id is not None and body.external_id != row.external_id:
                    values["external_id"] = body.external_id
                    self._moves.record(tx, caller, row, "started", said={"external_id": body.external_id})
                tx.connection.execute(jobs.update().where(jobs.c.id == row.id).values(**values))
                if body.events:
                    self._moves.append(tx, row, [msgspec.to_builtins(event) for event in body.events])
        if row is None:
            raise error or unknown_job(identifier)
        return BeatAnswer(row.cancel_asked_at is not None, self._lease_s)

    def end(self, caller: Caller, identifier: str, body: End) -> dict[str, Any]:
        """Take how the run ended; the same word again changes nothing.

        Raises :class:`ForbiddenError` (``wrong_claim``) for who did not claim it, :class:`ConflictError` (``lease_lost``) for
        who was silent for too long or whose job has ended: nothing that it tells then counts.
        """
        with self._s.store.write() as tx:
            row, error = self._running(tx, caller, identifier, body.claim)
            if row is None and isinstance(error, ConflictError):
                found = get_job(tx.connection, identifier)
                if found.state == body.outcome != "interrupted":
                    return view(found)
            if row is not None:
                told = body.error or JobError("failed", "the worker gave no reason", "see its log")
                words = None if body.outcome == "succeeded" else msgspec.json.encode(told).decode()
                comment = "" if body.outcome == "succeeded" else told.code
                row = self._moves.move(tx, caller, row, body.outcome, comment or "done", error=words)
        if row is None:
            raise error or unknown_job(identifier)
        return view(row)

    def _running(
        self, tx: Transaction, caller: Caller, identifier: str, claim: str
    ) -> tuple[Row[Any] | None, BrokerError | None]:
        """Return the job that ``claim`` holds, or why it holds none; a wrong claim is audited."""
        self._moves.settle(tx)
        row = get_job(tx.connection, identifier)
        if row.worker != caller.principal or not hmac.compare_digest(row.claim_sha256 or "", _hash(claim)):
            self._moves.record(tx, caller, row, "a worker was refused", said={"reason": "wrong_claim"}, refused=True)
            return None, ForbiddenError(
                f"{identifier} was not claimed with this claim",
                cure="the worker that claimed it tells",
                code="wrong_claim",
            )
        if row.state != "running":
            return None, ConflictError(
                f"{identifier} is {row.state}: this run does not count any more", cure="end it", code="lease_lost"
            )
        return row, None

    def _held(self, connection: Connection, caller: Caller, token: str) -> Row[Any] | None:
        mine = (jobs.c.claim_sha256 == token) & (jobs.c.worker == caller.principal) & (jobs.c.state == "running")
        return connection.execute(select(jobs).where(mine)).first()

    @staticmethod
    def _next(connection: Connection, body: AskClaim) -> Row[Any] | None:
        """Return the next job: kills first, then in order; none of a workspace in which another one still runs."""
        other = jobs.alias()
        busy = exists().where((other.c.workspace_id == jobs.c.workspace_id) & (other.c.state == "running"))
        query = select(jobs).where(jobs.c.state == "queued", ~busy)
        if body.kinds:
            query = query.where(jobs.c.kind.in_(body.kinds))
        first = case((jobs.c.lane == "kill", 0), else_=1)
        return connection.execute(query.order_by(first, jobs.c.queued_at, jobs.c.id).limit(1)).first()

    def _still_good(self, tx: Transaction, caller: Caller, row: Row[Any]) -> bool:
        try:
            self._asked.admit(tx.connection, row.kind, row.workspace_id, stored_parameters(row))
        except BrokerError as error:
            told = JobError(error.code, error.message[:4000], error.cure[:1000])
            self._moves.move(tx, caller, row, "failed", error.code, error=msgspec.json.encode(told).decode())
            return False
        return True

    def _work(self, row: Row[Any]) -> Work:
        return Work(
            id=row.id,
            kind=row.kind,
            workspace=row.workspace_id,
            attempt=row.attempt,
            asked_at=row.asked_at,
            lease_s=self._lease_s,
            parameters=jsontext.decode(row.parameters),
            image_sha256=row.image_sha256,
        )

    @property
    def _lease_s(self) -> int:
        settings = self._s.config.jobs
        return 30 if settings is None else settings.lease_s

    def _lease_ends(self) -> str:
        return iso(self._s.clock() + timedelta(seconds=self._lease_s))


def _hash(claim: str) -> str:
    return hashlib.sha256(claim.encode()).hexdigest()
