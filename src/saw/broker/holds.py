"""Legal hold: what is about a workspace, or from a time, is kept past its time until somebody releases it (control AUD-01).

One hold keeps events of the trail, recordings, bytes of reviewed calls, ended jobs and what agents used alike. A single
recording can be held by itself (:mod:`saw.broker.recordings`); it is listed here with the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from sqlalchemy import Connection, Row, func, select

from saw.audit.removal import LATEST, moment
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import ConflictError, MalformedError, NotFoundError
from saw.broker.registry import unknown_workspace
from saw.broker.schema import audit_holds, sessions, workspaces
from saw.broker.store import Transaction

MOST = 200
"""Most holds at a time: each event that is due is held against all of them."""
Reason = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Moment = Annotated[int, msgspec.Meta(ge=0, lt=LATEST)]


class AddHold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is held: what is about ``workspace``, or is from ``since`` to ``until`` (not included), or both together.

    Times are milliseconds since 1970 UTC.
    """

    reason: Reason
    workspace: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | None = None
    since: Moment | None = None
    until: Moment | None = None


class ReleaseHold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a hold ends."""

    reason: Reason


class Held:
    """The holds that are in force, as they were when this was read."""

    def __init__(self, rows: Iterable[Row[Any]]) -> None:
        self._holds = [(row.workspace_id, row.since, row.until) for row in rows]

    def takes(self, workspace: str, first: str, last: str | None = None) -> bool:
        """Tell whether something about ``workspace`` (empty: none) that was from ``first`` to ``last`` is held."""
        last = last or first
        return any(
            (name is None or name == workspace)
            and (since is None or last >= since)
            and (until is None or first < until)
            for name, since, until in self._holds
        )


class Holds:
    """Added, listed and released holds."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def add(self, caller: Caller, body: AddHold) -> dict[str, Any]:
        """Hold something from now on; the same again is the hold that is there.

        Raises :class:`MalformedError` for one that holds nothing in particular, and ``unknown_workspace``.
        """
        since, until = _span(body)
        with self._s.store.write() as tx:
            there = select(workspaces.c.id).where(workspaces.c.id == body.workspace)
            if body.workspace is not None and tx.connection.execute(there).one_or_none() is None:
                raise unknown_workspace(body.workspace)
            live = audit_holds.c.released_at.is_(None)
            same = [
                column.is_(None) if value is None else column == value
                for column, value in (
                    (audit_holds.c.workspace_id, body.workspace),
                    (audit_holds.c.since, since),
                    (audit_holds.c.until, until),
                    (audit_holds.c.reason, body.reason),
                )
            ]
            known = tx.connection.execute(select(audit_holds).where(live, *same)).first()
            if known is not None:
                return {**_view(known), "changed": False}
            if tx.connection.execute(select(func.count()).select_from(audit_holds).where(live)).scalar_one() >= MOST:
                raise ConflictError(f"there are {MOST} holds", cure="release some", code="too_many_holds")
            identifier = self._s.new_id("hold")
            tx.connection.execute(
                audit_holds.insert().values(
                    id=identifier,
                    workspace_id=body.workspace,
                    since=since,
                    until=until,
                    reason=body.reason,
                    added_by=caller.principal,
                    added_at=iso(self._s.clock()),
                )
            )
            row = _get(tx.connection, identifier)
            self._record(tx, caller, row, "audit.hold.add", body.reason)
        return {**_view(row), "changed": True}

    def listed(self, *, everything: bool) -> dict[str, Any]:
        """Return ``{holds}``, the newest first: those in force, and single recordings; with ``everything`` the released too."""
        query = select(audit_holds).order_by(audit_holds.c.added_at.desc(), audit_holds.c.id)
        if not everything:
            query = query.where(audit_holds.c.released_at.is_(None))
        single = select(sessions).where(sessions.c.recording_held_at.is_not(None))
        with self._s.store.read() as connection:
            found = [_view(row) for row in connection.execute(query.limit(1000))]
            found += [_single(row) for row in connection.execute(single.limit(1000))]
        return {"holds": sorted(found, key=lambda one: str(one["added_at"]), reverse=True)}

    def release(self, caller: Caller, identifier: str, body: ReleaseHold) -> dict[str, Any]:
        """End a hold: what is past its time goes at the next look. One that was released before stays as it is."""
        with self._s.store.write() as tx:
            row = _get(tx.connection, identifier)
            if row.released_at is not None:
                return {**_view(row), "changed": False}
            now = iso(self._s.clock())
            values = {"released_by": caller.principal, "released_at": now, "released_reason": body.reason}
            tx.connection.execute(audit_holds.update().where(audit_holds.c.id == row.id).values(**values))
            row = _get(tx.connection, identifier)
            self._record(tx, caller, row, "audit.hold.release", body.reason)
        return {**_view(row), "changed": True}

    def _record(
        self,
        tx: Transaction,
        caller: Caller,
        row: Row[Any],
        operation: Literal["audit.hold.add", "audit.hold.release"],
        why: str,
    ) -> None:
        told = {"hold": row.id, "since": row.since or "", "until": row.until or ""}
        tx.record(
            self._s.events.api_activity(
                self._s.clock(),
                caller.subject(row.workspace_id or ""),
                operation,
                activity="create" if operation == "audit.hold.add" else "delete",
                resource=("hold", row.id),
                status_detail=why,
                detail=told,
            )
        )


def holds_in_force(connection: Connection) -> Held:
    """Return the holds that are in force in this transaction."""
    return Held(connection.execute(select(audit_holds).where(audit_holds.c.released_at.is_(None))).all())


def released(connection: Connection) -> int:
    """Return how many holds were released ever: when it grows, what was looked at is looked at again."""
    query = select(func.count()).select_from(audit_holds).where(audit_holds.c.released_at.is_not(None))
    return int(connection.execute(query).scalar_one())


def _span(body: AddHold) -> tuple[str | None, str | None]:
    if body.workspace is None and (body.since is None or body.until is None):
        raise MalformedError(
            "a hold is of a workspace, or from one time to another",
            cure="give --workspace, or --from and --to",
            code="hold_malformed",
        )
    if body.since is not None and body.until is not None and body.since >= body.until:
        raise MalformedError("a hold ends after it begins", cure="give an earlier --from", code="hold_malformed")
    return (
        None if body.since is None else moment(body.since),
        None if body.until is None else moment(body.until),
    )


def _get(connection: Connection, identifier: str) -> Row[Any]:
    row = connection.execute(select(audit_holds).where(audit_holds.c.id == identifier)).one_or_none()
    if row is None:
        raise NotFoundError(
            f"there is no hold {identifier[:64]!r}", cure="saw audit hold list shows them", code="unknown_hold"
        )
    return row


def _view(row: Row[Any]) -> dict[str, Any]:
    names = ("id", "since", "until", "reason", "added_by", "added_at", "released_by", "released_at", "released_reason")
    return {**{name: getattr(row, name) for name in names}, "workspace": row.workspace_id, "session": None}


def _single(row: Row[Any]) -> dict[str, Any]:
    ended = dict.fromkeys(("released_by", "released_at", "released_reason"))
    return {
        "id": row.id,
        "workspace": row.workspace_id,
        "session": row.id,
        "since": None,
        "until": None,
        "reason": row.recording_held_reason,
        "added_by": row.recording_held_by,
        "added_at": row.recording_held_at,
        **ended,
    }
