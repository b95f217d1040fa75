"""Delegations: what an agent is handed for one engagement; issued, listed, revoked, and told to the perimeter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy import Connection, Row, select

from saw.audit import Subject
from saw.broker.agent_states import require_living
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.delegation_ends import DELEGATIONS, DelegationEnds, record_of
from saw.broker.delegation_list import Wanted, delegation_view, page
from saw.broker.errors import ConflictError, ForbiddenError, MalformedError, NotFoundError
from saw.broker.handed_tools import names_tools
from saw.broker.idempotency import told_before
from saw.broker.lifecycle import State
from saw.broker.registry import get_row
from saw.broker.schema import delegations
from saw.broker.sponsor_states import require_enabled
from saw.broker.store import Transaction
from saw.identity.statement import sign_statement
from saw.jobs.messages import IdempotencyKey
from saw.policy.delegation import (
    FORMAT,
    MAX_DEPTH,
    STATEMENT_TYPE,
    Approval,
    Delegation,
    DelegationInvalid,
    Resource,
    Tools,
    check_delegation,
    wider,
)

_ENDED = frozenset({State.QUARANTINED, State.DECOMMISSIONED})

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Issue(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an agent is to be handed. Sponsor and agent are those of the workspace; ``duration_s`` is its life in seconds.

    The same ``idempotency_key`` is the same delegation.
    """

    workspace_id: Annotated[str, msgspec.Meta(max_length=64)]
    task: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
    resources: tuple[Resource, ...]
    duration_s: Annotated[int, msgspec.Meta(ge=60)]
    approval: Approval = "policy"
    parent: Annotated[str, msgspec.Meta(max_length=64)] = ""
    tools: tuple[Tools, ...] | msgspec.UnsetType = msgspec.UNSET
    data_classes: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    idempotency_key: IdempotencyKey | None = None


class Revoke(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a delegation must not count any longer."""

    reason: Text


class Delegations:
    """The register of delegations (controls DEL-01, DEL-02)."""

    def __init__(self, services: Services) -> None:
        self._s = services
        self._ends = DelegationEnds(services)

    def issue(self, caller: Caller, wanted: Issue) -> dict[str, Any]:
        """Sign and record a delegation; one that is made from another lies within it, or it is refused.

        Raises :class:`ConflictError` for a key that was used for another request (``idempotency_mismatch``).
        """
        now = self._s.clock().replace(microsecond=0)
        longest = self._s.config.delegation.max_duration_s
        if wanted.duration_s > longest:
            raise MalformedError(f"a delegation cannot live {wanted.duration_s} s", cure=f"ask for {longest} at most")
        problems: tuple[str, ...] = ()
        key = wanted.idempotency_key
        digest = hashlib.sha256(msgspec.json.encode(wanted)).hexdigest()
        with self._s.store.write() as tx:
            if key is not None:
                found = told_before(tx.connection, delegations.c.issued_by, caller.principal, key, digest)
                if found is not None:
                    return {**_signed(found, now), "changed": False}
            row = get_row(tx.connection, wanted.workspace_id)
            _require_open(row)
            require_living(tx.connection, row)
            require_enabled(tx.connection, row.sponsor)
            record = Delegation(
                format=FORMAT,
                id=self._s.new_id("dlg"),
                parent=wanted.parent,
                sponsor=row.sponsor,
                workspace=row.id,
                agent=row.agent_id,
                task=wanted.task,
                resources=wanted.resources,
                approval=wanted.approval,
                tools=wanted.tools,
                data_classes=wanted.data_classes,
                not_before=now,
                expires=now + timedelta(seconds=wanted.duration_s),
            )
            _check(record)
            if wanted.parent:
                line = self._line(tx.connection, wanted.parent, now)
                problems = wider(record, line[0])
                if len(line) >= MAX_DEPTH:
                    problems = (*problems, f"it would be the {len(line) + 1}th of its line; {MAX_DEPTH} are allowed")
            subject = caller.subject(row.id, agent=row.agent_id, policy_digest=row.policy_digest or "")
            if problems:
                self._refused(tx, now, subject, record, problems)
            else:
                asked = {} if key is None else {"idempotency_key": key, "request_sha256": digest}
                self._insert(tx, caller, now, record, tx.touch(row.id), **asked)
                self._recorded(tx, now, subject, record)
        if problems:
            raise ForbiddenError(
                f"the delegation would be wider than {wanted.parent}: {'; '.join(problems)}",
                cure="a delegation only narrows: take the named parts out",
                code="delegation_wider",
                details={"problems": list(problems)},
            )
        return {**self.show(record.id), "changed": True}

    def show(self, identifier: str) -> dict[str, Any]:
        """Return one delegation with its signed statement."""
        now = self._s.clock()
        with self._s.store.read() as connection:
            return _signed(_get(connection, identifier), now)

    def listed(self, asked: Wanted) -> dict[str, Any]:
        """Return a page of delegations, as :func:`saw.broker.delegation_list.page`."""
        with self._s.store.read() as connection:
            return page(connection, asked, self._s.clock())

    def revoke(self, caller: Caller, identifier: str, body: Revoke) -> dict[str, Any]:
        """End a delegation and all that was made from it; perimeters are woken when this returns."""
        with self._s.store.write() as tx:
            revoked = self._ends.end(tx, caller, [_get(tx.connection, identifier)], body.reason)
        return {**self.show(identifier), "changed": bool(revoked), "revoked": revoked}

    def reissue(self, tx: Transaction, caller: Caller, rows: Sequence[Row[Any]], agent: str) -> list[str]:
        """Issue what is in ``rows`` anew, to ``agent`` on the same workspace: the same content, until the same time.

        Called inside the transaction that ended them; returns the new ids in the order of issue. One that was made from
        another of ``rows`` is made from its new one. Raises :class:`ConflictError` when one it was made from does not count, or
        the workspace was cut off.
        """
        now = self._s.clock().replace(microsecond=0)
        made: dict[str, str] = {}
        waiting = {row.id: record_of(row) for row in rows}
        for workspace in {row.workspace_id for row in rows}:
            _require_open(get_row(tx.connection, workspace))
        seq = tx.touch(*{row.workspace_id for row in rows}) if rows else 0
        while waiting:
            old = next(record for record in waiting.values() if record.parent not in waiting)
            del waiting[old.id]
            record = msgspec.structs.replace(
                old, id=self._s.new_id("dlg"), parent=made.get(old.parent, old.parent), agent=agent, not_before=now
            )
            _check(record)
            if record.parent and wider(record, self._line(tx.connection, record.parent, now)[0]):
                raise ConflictError(
                    f"{old.id} does not lie within {record.parent} any more",
                    cure="issue it by itself",
                    code="delegation_wider",
                )
            made[old.id] = record.id
            subject = caller.subject(record.workspace, agent=agent)
            self._insert(tx, caller, now, record, seq)
            self._recorded(tx, now, subject, record)
        return list(made.values())

    def _line(self, connection: Connection, identifier: str, now: datetime) -> list[Delegation]:
        """Return the record ``identifier`` and those it was made from, nearest first; all of them must count now."""
        line: list[Delegation] = []
        while identifier:
            row = _get(connection, identifier)
            record = record_of(row)
            if row.revoked_at or not record.live(now):
                raise ConflictError(
                    f"delegation {row.id} has {'been revoked' if row.revoked_at else 'ended'}",
                    cure="make it from one that counts",
                    code="delegation_ended",
                )
            line.append(record)
            identifier = record.parent
        return line

    def _insert(
        self, tx: Transaction, caller: Caller, now: datetime, record: Delegation, seq: int, **asked: str
    ) -> None:
        tx.wake(DELEGATIONS)
        payload = msgspec.json.encode(record)
        signer = self._s.signer.pem
        tx.connection.execute(
            delegations.insert().values(
                id=record.id,
                workspace_id=record.workspace,
                parent=record.parent or None,
                record=payload.decode(),
                statement=sign_statement(payload, STATEMENT_TYPE, signer, signer),
                issued_by=caller.principal,
                issued_at=iso(now),
                expires_at=iso(record.expires),
                seq=seq,
                names_tools=names_tools(record),
                **asked,
            )
        )

    def _recorded(self, tx: Transaction, now: datetime, subject: Subject, record: Delegation) -> None:
        tx.record(
            self._s.events.entity_management(
                now,
                subject,
                ("delegation", record.id),
                activity="create",
                comment=record.task[:512],
                detail=_detail(record),
            )
        )

    def _refused(
        self, tx: Transaction, now: datetime, subject: Subject, record: Delegation, problems: Iterable[str]
    ) -> None:
        tx.record(
            self._s.events.entity_management(
                now,
                subject,
                ("delegation", record.parent),
                activity="create",
                outcome="failure",
                comment="a delegation that is wider than the one it is made from was refused",
                detail={**_detail(record), "problems": [text[:256] for text in problems][:16]},
            )
        )


def told(connection: Connection, now: datetime) -> tuple[dict[str, list[str]], frozenset[str]]:
    """Return for each workspace the statements that count now, and which workspaces were ever given a delegation.

    The statements are its own and those that they were made from, so that a perimeter can check the whole line itself.
    """
    counting = delegations.c.revoked_at.is_(None) & (delegations.c.expires_at > iso(now))
    rows = {row.id: row for row in connection.execute(select(delegations).where(counting)).all()}
    found: dict[str, dict[str, None]] = {}
    for row in rows.values():
        line, at = [row.statement], row
        while at.parent and at.parent in rows:
            at = rows[at.parent]
            line.append(at.statement)
        if not at.parent:
            found.setdefault(row.workspace_id, {}).update(dict.fromkeys(line))
    engaged = connection.execute(select(delegations.c.workspace_id).distinct()).scalars()
    return {workspace: list(statements) for workspace, statements in found.items()}, frozenset(engaged)


def _require_open(workspace: Row[Any]) -> None:
    if State(workspace.state) in _ENDED:
        raise ConflictError(f"{workspace.id} is {workspace.state}", cure="release it first", code="workspace_ended")


def _check(record: Delegation) -> None:
    try:
        check_delegation(record)
    except DelegationInvalid as error:
        raise MalformedError(error.message, cure=error.cure, code=error.code, details=error.details) from error


def _detail(record: Delegation) -> dict[str, object]:
    resources = [
        f"{','.join(resource.methods) or '*'} {resource.host}:{','.join(map(str, resource.ports))} "
        f"{' '.join(resource.paths)}"[:256]
        for resource in record.resources
    ]
    return {
        "delegation": record.id,
        "parent": record.parent,
        "resources": resources[:16],
        **_tools_told(record),
        **({"data_classes": list(record.classes)} if record.classes else {}),
        "approval": record.approval,
        "expires": iso(record.expires),
    }


def _tools_told(record: Delegation) -> dict[str, object]:
    if record.tools is msgspec.UNSET:
        return {}
    return {"tools": [f"{part.server} {' '.join(part.tools)}"[:256] for part in record.tools][:16]}


def _signed(row: Row[Any], now: datetime) -> dict[str, Any]:
    return {**delegation_view(row, now), "statement": row.statement}


def _get(connection: Connection, identifier: str) -> Row[Any]:
    row = connection.execute(select(delegations).where(delegations.c.id == identifier)).one_or_none()
    if row is None:
        raise unknown_delegation(identifier)
    return row


def unknown_delegation(identifier: str) -> NotFoundError:
    """Return the refusal of a delegation that does not exist, or not for the caller."""
    return NotFoundError(
        f"there is no delegation {identifier[:64]!r}", cure="saw delegation list shows them", code="unknown_delegation"
    )
