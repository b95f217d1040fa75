"""Lifecycle jobs as people and programs ask for them: one live job for a workspace, cancelled and resumed on request."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, func, select

from saw import jsontext
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import BusyError, ConflictError, ForbiddenError, MalformedError, NotFoundError
from saw.broker.idempotency import told_before
from saw.broker.images import admit, find_image, require_bootable
from saw.broker.job_retention import remove_old_jobs
from saw.broker.job_settings import ASK_SCOPE
from saw.broker.job_states import QUEUED, JobMoves, get_job, unknown_job, view
from saw.broker.lifecycle import State
from saw.broker.registry import Registry, unknown_workspace
from saw.broker.schema import job_events, jobs, workspaces
from saw.broker.sponsor_states import require_enabled
from saw.jobs.messages import LIVE, RESUMABLE, STATES, AskJob, Cancel, Create, JobMalformed, Kind, Parameters, Rebuild
from saw.jobs.messages import parameters_of as parse_parameters

MAX_LIVE = 1000
"""Most jobs that wait or run; each workspace has one, but ids of workspaces to be created cost nothing."""
MAX_PAGE = 500
MAX_EVENTS = 500
"""Events in one answer."""

_GONE = frozenset({State.DECOMMISSIONED})
_NO_VM = frozenset({State.REQUESTED})
_KILLED = frozenset({State.QUARANTINED})
#: Kind → states of the workspace in which it is refused. A killed workspace is released by people, never by a playbook.
_REFUSED_IN: dict[Kind, frozenset[State]] = {
    "create": _GONE | _KILLED | {State.STOPPED},
    "start": _GONE | _KILLED | _NO_VM,
    "stop": _GONE | _KILLED | _NO_VM,
    "rebuild": _GONE | _KILLED | _NO_VM,
    "destroy": frozenset(),
    "kill": _GONE,
}
#: Kinds after which a workspace runs: nothing is touched that could not be started afterwards.
_BEGINS: frozenset[Kind] = frozenset({"create", "start", "rebuild"})


class Jobs:
    """Jobs at the asker's side (controls LIF-01, LIF-03)."""

    def __init__(self, services: Services, registry: Registry) -> None:
        self._s = services
        self._registry = registry
        self._moves = JobMoves(services)

    def ask(self, caller: Caller, body: AskJob) -> dict[str, Any]:
        """Queue a job. The same key with the same request is the same job; a kill refuses everything of the workspace at once.

        Raises :class:`MalformedError` for parameters that are not the kind's, :class:`ConflictError` when the workspace has a
        live job (``workspace_busy``) or is in a state in which the kind makes no sense (``state_refused``).
        """
        self._require_on()
        self._require_asker(caller)
        parameters = self._parsed(body)
        digest = hashlib.sha256(
            msgspec.json.encode([body.kind, body.workspace, parameters], order="sorted")
        ).hexdigest()
        if body.kind == "kill" and self._kills_now(caller, body, digest):
            reason = str(getattr(parameters, "reason", ""))
            self._registry.kill(caller, body.workspace, reason)
        now = iso(self._s.clock())
        with self._s.store.write() as tx:
            if (found := self._same(tx.connection, caller, body, digest)) is not None:
                return {**view(found), "changed": False}
            self._moves.settle(tx)
            image = self.admit(tx.connection, body.kind, body.workspace, parameters)
            self._require_free(tx.connection, body.kind, body.workspace)
            self._require_room(tx.connection, body.kind)
            identifier = self._s.new_id("job")
            told = msgspec.to_builtins(parameters)
            tx.connection.execute(
                jobs.insert().values(
                    id=identifier,
                    kind=body.kind,
                    lane=_lane(body.kind),
                    workspace_id=body.workspace,
                    asked_by=caller.principal,
                    idempotency_key=body.idempotency_key,
                    request_sha256=digest,
                    parameters=msgspec.json.encode(
                        {key: value for key, value in told.items() if value is not None}
                    ).decode(),
                    image_sha256=image,
                    state="queued",
                    attempt=1,
                    asked_at=now,
                    queued_at=now,
                    progress="{}",
                    seq=0,
                )
            )
            row = get_job(tx.connection, identifier)
            said: dict[str, object] = {"to": "queued", **({"image_sha256": image} if image else {})}
            self._moves.record(tx, caller, row, f"{body.kind} was asked for", "create", said=said)
            self._moves.append(tx, row, [{"kind": "state", "text": "queued", "comment": ""}])
            tx.wake(QUEUED)
            return {**view(get_job(tx.connection, identifier)), "changed": True}

    def show(self, caller: Caller, identifier: str) -> dict[str, Any]:
        """Return one job as it is now."""
        self._settle()
        with self._s.store.read() as connection:
            return view(self._mine(connection, caller, identifier))

    def listed(self, caller: Caller, *, state: str, workspace: str, after: str, limit: int) -> dict[str, Any]:
        """Return ``{jobs, next}``, the newest first; ``next`` is the ``after`` of the page that follows, None at the end."""
        self._require_asker(caller)
        if state and state not in STATES:
            raise MalformedError(f"there is no state {state[:64]!r}", cure=f"use one of {', '.join(STATES)}")
        self._settle()
        query = select(jobs).order_by(jobs.c.asked_at.desc(), jobs.c.id.desc())
        if state:
            query = query.where(jobs.c.state == state)
        if workspace:
            query = query.where(jobs.c.workspace_id == workspace)
        if caller.principal.startswith("machine:"):
            query = query.where(jobs.c.asked_by == caller.principal)
        limit = max(1, min(limit, MAX_PAGE))
        with self._s.store.read() as connection:
            if after:
                last = self._mine(connection, caller, after)
                query = query.where(
                    (jobs.c.asked_at < last.asked_at) | ((jobs.c.asked_at == last.asked_at) & (jobs.c.id < last.id))
                )
            rows = connection.execute(query.limit(limit + 1)).all()
        more = len(rows) > limit
        return {"jobs": [view(row) for row in rows[:limit]], "next": rows[limit - 1].id if more else None}

    def live(self, workspace: str) -> dict[str, Any] | None:
        """Return the live job of ``workspace``, or None. While there is one, nothing but a kill is taken."""
        self._settle()
        wanted = (jobs.c.workspace_id == workspace) & jobs.c.state.in_(LIVE)
        with self._s.store.read() as connection:
            row = connection.execute(select(jobs).where(wanted).order_by(jobs.c.asked_at, jobs.c.id)).first()
        return None if row is None else view(row)

    def events(self, caller: Caller, identifier: str, after: int) -> dict[str, Any]:
        """Return ``{job, events, next}``: what happened behind number ``after``, and the number to ask behind next."""
        self._settle()
        with self._s.store.read() as connection:
            row = self._mine(connection, caller, identifier)
            query = select(job_events).where(job_events.c.job_id == row.id, job_events.c.seq > after)
            found = connection.execute(query.order_by(job_events.c.seq).limit(MAX_EVENTS)).all()
        told = [
            {"seq": item.seq, "at": item.at, "attempt": item.attempt, **jsontext.decode(item.event)} for item in found
        ]
        return {"job": view(row), "events": told, "next": told[-1]["seq"] if told else after}

    def cancel(self, caller: Caller, identifier: str, body: Cancel) -> dict[str, Any]:
        """End a job: at once while it waits, by its worker while it runs. One that has ended is a conflict."""
        with self._s.store.write() as tx:
            row = self._mine(tx.connection, caller, identifier)
            if row.state not in LIVE and row.state != "cancelled":
                raise ConflictError(f"{row.id} is {row.state}", cure="it has ended", code="job_ended")
            changed = self._moves.cancel(tx, caller, row, body.reason)
            return {**view(get_job(tx.connection, row.id)), "changed": changed}

    def resume(self, caller: Caller, identifier: str, *, attempt: int | None = None) -> dict[str, Any]:
        """Queue a job again that failed or was interrupted: its playbook begins anew and finds what is done already.

        Raises :class:`ConflictError` for one in another state (but a live one is answered as it is), when ``attempt`` is given
        and another one than that has ended (``attempt_over``), or as :meth:`ask` does.
        """
        self._require_on()
        with self._s.store.write() as tx:
            self._moves.settle(tx)
            row = self._mine(tx.connection, caller, identifier)
            if row.state in LIVE:
                return {**view(row), "changed": False}
            if attempt is not None and row.attempt != attempt:
                raise ConflictError(
                    f"attempt {attempt} of {row.id} was resumed already", cure="look at it again", code="attempt_over"
                )
            if row.state not in RESUMABLE:
                raise ConflictError(
                    f"{row.id} is {row.state}", cure="ask for a new job: saw job run", code="not_resumable"
                )
            self.admit(tx.connection, row.kind, row.workspace_id, stored_parameters(row))
            self._require_free(tx.connection, row.kind, row.workspace_id)
            cleared = dict.fromkeys(
                ("started_at", "executor", "external_id", "worker", "claim_sha256", "lease_ends_at")
            )
            cleared |= dict.fromkeys(("cancel_asked_at", "cancel_reason", "error"))
            values: dict[str, Any] = {**cleared, "attempt": row.attempt + 1, "progress": "{}"}
            moved = self._moves.move(tx, caller, row, "queued", "resumed", queued_at=iso(self._s.clock()), **values)
            return {**view(moved or row), "changed": moved is not None}

    def tick(self) -> None:
        """Interrupt what was lost, and remove what ended long ago."""
        self._settle()
        remove_old_jobs(self._s)

    def admit(self, connection: Connection, kind: Kind, workspace: str, parameters: Parameters) -> str | None:
        """Return the digest of the image that ``parameters`` name; raise the refusal of a job that cannot go well now."""
        row = connection.execute(select(workspaces).where(workspaces.c.id == workspace)).one_or_none()
        if row is None and kind != "create":
            raise unknown_workspace(workspace)
        if row is not None and row.state in _REFUSED_IN[kind]:
            cure = (
                "release it first: saw workspace transition ID stopped"
                if row.state in _KILLED
                else "see saw workspace show"
            )
            raise ConflictError(f"{workspace} is {row.state}: {kind} is refused", cure=cure, code="state_refused")
        if isinstance(parameters, Create) and row is not None:
            differ = [
                name
                for name in ("sponsor", "blueprint", "ring", "image")
                if getattr(row, name) != getattr(parameters, name)
            ]
            if differ:
                raise ConflictError(
                    f"workspace {workspace} exists with another {', '.join(differ)}",
                    cure="choose another id; ids are never used again",
                    code="workspace_exists",
                )
        sponsor = parameters.sponsor if isinstance(parameters, Create) else None if row is None else row.sponsor
        if kind in _BEGINS and sponsor is not None:
            require_enabled(connection, sponsor)
        ring = parameters.ring if isinstance(parameters, Create) else None if row is None else row.ring
        if isinstance(parameters, (Create, Rebuild)) and parameters.image is not None and ring is not None:
            image = find_image(connection, parameters.image)
            admit(image, ring, frozenset(self._s.config.image.candidate_rings), self._s.clock())
            return str(image.image_sha256)
        if row is not None and kind in _BEGINS:
            require_bootable(connection, row, self._s.clock())
        return None

    def _kills_now(self, caller: Caller, body: AskJob, digest: str) -> bool:
        """Tell whether this is a new kill: one that is told again does not kill what was released since."""
        with self._s.store.read() as connection:
            if self._same(connection, caller, body, digest) is not None:
                return False
            self._require_free(connection, body.kind, body.workspace)
        return True

    def _same(self, connection: Connection, caller: Caller, body: AskJob, digest: str) -> Row[Any] | None:
        return told_before(connection, jobs.c.asked_by, caller.principal, body.idempotency_key, digest)

    @staticmethod
    def _require_free(connection: Connection, kind: Kind, workspace: str) -> None:
        """One live job for a workspace; a kill waits for no other job, and nothing else is taken while there is one."""
        live = (jobs.c.workspace_id == workspace) & jobs.c.state.in_(LIVE)
        if kind == "kill":
            live &= jobs.c.kind == "kill"
        row = connection.execute(select(jobs).where(live)).first()
        if row is not None:
            raise ConflictError(
                f"{workspace} has the job {row.id} ({row.kind}, {row.state})",
                cure="wait for it (saw job watch), or cancel it (saw job cancel)",
                code="workspace_busy",
                details={"job": row.id, "kind": row.kind, "state": row.state},
            )

    @staticmethod
    def _require_room(connection: Connection, kind: Kind) -> None:
        live = select(func.count()).select_from(jobs).where(jobs.c.state.in_(LIVE))
        if kind != "kill" and connection.execute(live).scalar_one() >= MAX_LIVE:
            raise BusyError(f"{MAX_LIVE} jobs wait or run", cure="wait, or cancel some", code="too_many_jobs")

    def _parsed(self, body: AskJob) -> Parameters:
        try:
            return parse_parameters(body.kind, body.parameters)
        except JobMalformed as error:
            raise MalformedError(error.message, cure=error.cure, code=error.code) from error

    def _mine(self, connection: Connection, caller: Caller, identifier: str) -> Row[Any]:
        """Return a job that the caller may see: everyone of people, its own of a machine."""
        self._require_asker(caller)
        row = get_job(connection, identifier)
        if caller.principal.startswith("machine:") and row.asked_by != caller.principal:
            raise unknown_job(identifier)
        return row

    def _require_asker(self, caller: Caller) -> None:
        kind, _, name = caller.principal.partition(":")
        machine = self._s.config.machines.get(name) if kind == "machine" else None
        if kind in {"operator", "user"} or (machine is not None and ASK_SCOPE in machine.scopes):
            return
        raise ForbiddenError(
            f"{caller.principal} may not ask for jobs",
            cure=f"give it the scope {ASK_SCOPE} (role variable broker_machines)",
            code="out_of_scope",
        )

    def _require_on(self) -> None:
        if self._s.config.jobs is None:
            raise NotFoundError(
                "this broker runs no jobs", cure="set the role variable broker_jobs (docs/jobs.md)", code="jobs_off"
            )

    def _settle(self) -> None:
        with self._s.store.read() as connection:
            late = self._moves.due(connection)
        if late:
            with self._s.store.write() as tx:
                self._moves.settle(tx)


def makes_sense(kind: Kind, state: State | str) -> bool:
    """Tell whether a job of this kind is taken for a workspace in ``state``."""
    return state not in _REFUSED_IN[kind]


def stored_parameters(row: Row[Any]) -> Parameters:
    """Return the parameters of a stored job; raise :class:`MalformedError` when they are none."""
    try:
        return parse_parameters(row.kind, jsontext.decode(row.parameters))
    except (JobMalformed, KeyError) as error:
        raise MalformedError(f"the stored job {row.id} is not valid", cure="ask for a new one") from error


def _lane(kind: Kind) -> str:
    return "kill" if kind == "kill" else "work"
