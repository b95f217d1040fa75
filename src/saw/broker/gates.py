"""Changes to the fleet that people approve: asked for with a statement, decided as every review is, claimed once per wave.

A question is a review of the kind ``gate``: the same states, decisions, receipts and pages. What differs is who may ask
(operators, and machines with the scope), that nobody's workspace is behind it, and that the asker states everything again
when it claims.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Row, func, select

from saw.broker.break_glass import held_up_by, let_through, overdue_error
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import BrokerError, BusyError, ConflictError, ForbiddenError, MalformedError, NotFoundError
from saw.broker.gate_settings import GATE_SCOPE, GateSettings
from saw.broker.review_evidence import counting
from saw.broker.review_states import COLUMNS, GATE, OPEN, UNENDED, Moves, due_at, get_review, stored, unknown_review
from saw.broker.review_vault import BytesChanged, Vault
from saw.broker.schema import review_decisions, reviews
from saw.broker.store import Transaction
from saw.review.gate import (
    MAX_NAMED,
    NO_POLICY,
    AskGate,
    ClaimGate,
    EndGate,
    GateDecision,
    GatePreview,
    GateRefused,
    GateRequest,
    GateStatement,
    GateView,
    differences,
    gate_digest,
    render_gate,
)
from saw.review.statement import parse_statement

MAX_ASKED = 64
"""Most questions of one client that wait at a time."""
_PASSED = frozenset({"approved", "executing", "done", "failed", "unknown"})


class Gates:
    """Questions as clients use them (controls REV-01, REV-02, REV-03); people decide through :class:`Decisions`."""

    def __init__(self, services: Services, vault: Vault) -> None:
        self._s = services
        self._vault = vault
        self._moves = Moves(services)

    def preview(self, caller: Caller, body: AskGate) -> GatePreview:
        """Return what would be asked; nothing is."""
        statement = body.statement
        gate, digest = self._admitted(caller, statement)
        with self._s.store.read() as connection:
            before = self._before(connection, statement.gate)
            waiting = [row for row in self._same(connection, caller, digest) if row.expires_at > iso(self._s.clock())]
        request = GateRequest(statement=statement, before=before)
        return GatePreview(
            gate=statement.gate,
            group=gate.group,
            quorum=gate.quorum,
            statement_digest=digest,
            rendering=render_gate(caller.principal, request),
            before="" if before is None else render_gate(caller.principal, GateRequest(statement=before)),
            after=render_gate(caller.principal, GateRequest(statement=statement)),
            waiting=waiting[0].id if waiting else None,
        )

    def ask(self, caller: Caller, body: AskGate) -> GateView:
        """Ask people for a wave; the same statement that waits already is answered with its review.

        Raises :class:`ForbiddenError` for a client without the scope, :class:`BusyError` when too much of it waits.
        """
        statement = body.statement
        gate, digest = self._admitted(caller, statement)
        now = self._s.clock()
        identifier = self._s.new_id("rv")
        with self._s.store.write() as tx:
            for row in self._same(tx.connection, caller, digest):
                found = self._moves.settle(tx, row)
                if found.state in OPEN and (found.group_name, found.quorum) == (gate.group, gate.quorum):
                    return self._view(tx.connection, found)
            self._require_room(tx.connection, caller)
            request = GateRequest(statement=statement, before=self._before(tx.connection, statement.gate))
            sealed = self._vault.seal(identifier, "call", request)
            tx.connection.execute(
                reviews.insert().values(
                    id=identifier,
                    kind=GATE,
                    workspace_id="",
                    agent_id="",
                    sponsor=statement.requested_by,
                    perimeter=caller.principal,
                    policy_digest=statement.policy or NO_POLICY,
                    request_digest=digest,
                    group_name=gate.group,
                    quorum=gate.quorum,
                    rule=statement.gate,
                    delegation="",
                    binary="",
                    request_id=caller.request_id,
                    method="GATE",
                    scheme="",
                    host=statement.gate,
                    port=0,
                    path=statement.purpose,
                    call=sealed,
                    held_bytes=len(sealed),
                    state="pending",
                    detail="",
                    opened_at=iso(now),
                    expires_at=iso(now + timedelta(seconds=gate.expires_in_s)),
                )
            )
            row = get_review(tx.connection, identifier)
            said: dict[str, object] = {"hosts": [item.name for item in statement.hosts], "purpose": statement.purpose}
            self._moves.record(tx, caller, row, "a change to the fleet waits for review", "create", said=said)
            self._moves.opened(tx, row)
            return self._view(tx.connection, row)

    def view(self, caller: Caller, identifier: str) -> GateView:
        """Return a question of the caller's as it is now; another client's does not exist."""
        with self._s.store.read() as connection:
            row = self._mine(connection, caller, identifier)
            found = self._view(connection, row)
        if due_at(row) and due_at(row) <= iso(self._s.clock()):
            with self._s.store.write() as tx:
                row = self._moves.settle(tx, self._mine(tx.connection, caller, identifier))
                found = self._view(tx.connection, row)
        return found

    def claim(self, caller: Caller, identifier: str, body: ClaimGate) -> GateView:
        """Begin the wave that was approved: once, and only with the statement that people saw.

        The same claim again is answered as the first time, so that a lost answer costs nothing. A refusal is an event.
        """
        with self._s.store.write() as tx:
            row = self._moves.settle(tx, self._mine(tx.connection, caller, identifier))
            found = self._claim(tx, caller, row, body)
            if isinstance(found, BrokerError):
                told: dict[str, object] = {"reason": found.code, "state": row.state}
                self._moves.record(tx, caller, row, "a claim was refused", refused=True, said=told)
        if isinstance(found, BrokerError):
            raise found
        return found

    def result(self, caller: Caller, identifier: str, body: EndGate) -> GateView:
        """Take how the wave ended from whoever claimed it; the same word again changes nothing."""
        with self._s.store.write() as tx:
            row = self._moves.settle(tx, self._mine(tx.connection, caller, identifier))
            mine = hmac.compare_digest(row.claim_sha256 or "", _hash(body.claim))
            if mine and row.state == "executing":
                row = self._moves.move(tx, caller, row, body.outcome, body.detail) or row
            view = self._view(tx.connection, row)
        if not mine:
            raise ForbiddenError(
                f"{identifier} was not claimed with this claim",
                cure="the run that claimed it tells its end",
                code="wrong_claim",
            )
        if view.state != body.outcome:
            raise ConflictError(f"{identifier} is {view.state}", cure="it has ended", code="review_ended")
        return view

    def _claim(self, tx: Transaction, caller: Caller, row: Row[Any], body: ClaimGate) -> GateView | BrokerError:
        """Return the claimed question, or why it is not claimed."""
        now = self._s.clock()
        held = row.claim_sha256 or ""
        try:
            request = self._request(tx.connection, row)
            good = hmac.compare_digest(gate_digest(row.perimeter, request.statement), row.request_digest)
        except (BytesChanged, GateRefused):
            good = False
        if not good:
            if row.state in OPEN:
                self._moves.move(
                    tx, caller, row, "cancelled", "bytes_changed: the stored statement is not what was reviewed"
                )
            return ConflictError(f"{row.id} was changed in the database", cure="ask again", code="bytes_changed")
        differ = _differ(request.statement, body.statement)
        if differ or gate_digest(caller.principal, body.statement) != row.request_digest:
            return _changed(row, differ)
        if held and hmac.compare_digest(held, _hash(body.claim)) and row.state == "executing":
            return self._view(tx.connection, row)
        if held:
            return ConflictError(
                f"{row.id} was claimed at {row.claimed_at} by another run and is {row.state}",
                cure="one approval is for one run: ask again",
                code="already_claimed",
            )
        gate = self._s.config.gates.get(row.rule)
        if row.state in OPEN and (gate is None or (gate.group, gate.quorum) != (row.group_name, row.quorum)):
            self._moves.move(tx, caller, row, "cancelled", "gate_changed: another group or quorum decides now")
            return ConflictError(f"the gate {row.rule} has changed", cure="ask again", code="gate_changed")
        if row.state == "approved":
            if (overdue := held_up_by(tx.connection, row, now)) is not None:
                return overdue_error(overdue)
            approvals = let_through(tx.connection, row, self._s.config.break_glass, now)
            names: dict[str, object] = {"approvers": approvals or [*counting(tx.connection, row, now)]}
            if not approvals:
                row = self._moves.move(tx, caller, row, "pending", "an approval no longer counts", said=names) or row
            else:
                ends = iso(now + timedelta(seconds=self._s.config.gates[row.rule].run_for_s))
                values = {"claimed_at": iso(now), "claim_sha256": _hash(body.claim), "claim_ends_at": ends}
                taken = self._moves.move(tx, caller, row, "executing", "claimed", said=names, **values)
                if taken is not None:
                    return self._view(tx.connection, taken)
        return _not_approved(row)

    def _admitted(self, caller: Caller, statement: GateStatement) -> tuple[GateSettings, str]:
        """Return the gate of ``statement`` and the digest for ``caller``; raise the refusal."""
        gate = self._gate(caller, statement.gate)
        try:
            return gate, gate_digest(caller.principal, statement)
        except GateRefused as error:
            raise MalformedError(error.message, cure=error.cure, code=error.code) from error

    def _gate(self, caller: Caller, name: str) -> GateSettings:
        if not self._in_scope(caller, name):
            error = ForbiddenError(
                f"{caller.principal} may not ask at the gate {name}",
                cure=f"give it the scope {GATE_SCOPE}{name} (role variable broker_machines)",
                code="out_of_scope",
            )
            self._refused(caller, name, error)
            raise error
        found = self._s.config.gates.get(name)
        if found is None:
            raise NotFoundError(
                f"there is no gate {name}", cure="see the role variable broker_gates", code="unknown_gate"
            )
        return found

    def _refused(self, caller: Caller, name: str, error: BrokerError) -> None:
        with self._s.store.write() as tx:
            tx.record(
                self._s.events.entity_management(
                    self._s.clock(),
                    caller.subject(),
                    ("gate", name),
                    activity="create",
                    outcome="failure",
                    comment="a question was refused",
                    detail={"reason": error.code},
                )
            )

    def _mine(self, connection: Connection, caller: Caller, identifier: str) -> Row[Any]:
        row = get_review(connection, identifier)
        if row.kind != GATE or row.perimeter != caller.principal or not self._in_scope(caller, row.rule):
            raise unknown_review(identifier)
        return row

    def _in_scope(self, caller: Caller, gate: str) -> bool:
        """Tell whether the caller may ask at ``gate``: an operator at every one, a machine where its scopes say so."""
        kind, _, name = caller.principal.partition(":")
        machine = self._s.config.machines.get(name) if kind == "machine" else None
        return kind == "operator" or (machine is not None and f"{GATE_SCOPE}{gate}" in machine.scopes)

    def _same(self, connection: Connection, caller: Caller, digest: str) -> list[Row[Any]]:
        """Return the questions of the same statement that wait."""
        query = select(*COLUMNS).where(
            reviews.c.kind == GATE,
            reviews.c.request_digest == digest,
            reviews.c.perimeter == caller.principal,
            reviews.c.state.in_(OPEN),
        )
        return list(connection.execute(query).all())

    def _before(self, connection: Connection, gate: str) -> GateStatement | None:
        """Return the last statement of ``gate`` that was approved; None when there is none that can be read."""
        query = select(*COLUMNS).where(reviews.c.kind == GATE, reviews.c.rule == gate, reviews.c.state.in_(_PASSED))
        row = connection.execute(query.order_by(reviews.c.approved_at.desc(), reviews.c.id).limit(1)).one_or_none()
        try:
            return None if row is None else self._request(connection, row).statement
        except BytesChanged:
            return None

    def _request(self, connection: Connection, row: Row[Any]) -> GateRequest:
        return self._vault.open(row.id, "call", stored(connection, row.id, "call") or b"", GateRequest)

    def _require_room(self, connection: Connection, caller: Caller) -> None:
        query = select(func.count()).select_from(reviews)
        mine = (reviews.c.kind == GATE) & (reviews.c.perimeter == caller.principal) & reviews.c.state.in_(UNENDED)
        if connection.execute(query.where(mine)).scalar_one() >= MAX_ASKED:
            raise BusyError(
                f"{MAX_ASKED} questions of {caller.principal} wait or run",
                cure="decide or cancel some",
                code="too_many_reviews",
            )

    def _view(self, connection: Connection, row: Row[Any]) -> GateView:
        approvals = counting(connection, row, self._s.clock()) if row.state in OPEN else {}
        query = select(review_decisions).where(review_decisions.c.review_id == row.id).order_by(review_decisions.c.id)
        decisions = connection.execute(query).all()
        sso = self._s.config.sso
        return GateView(
            id=row.id,
            gate=row.rule,
            state=row.state,
            statement_digest=row.request_digest,
            group=row.group_name,
            quorum=row.quorum,
            approved_by=_approvers(decisions, row)
            if row.broken_at or row.state not in OPEN
            else tuple(sorted(approvals)),
            decisions=tuple(
                GateDecision(
                    approver=one.approver,
                    decision=one.decision,
                    comment=parse_statement(one.statement.encode()).comment,
                    decided_at=one.decided_at,
                )
                for one in decisions
            ),
            detail=row.detail,
            opened_at=row.opened_at,
            expires_at=row.expires_at,
            claim_ends_at=row.claim_ends_at,
            url="" if sso is None else f"{sso.origin}/reviews/{row.id}",
        )


def _approvers(decisions: Any, row: Row[Any]) -> tuple[str, ...]:
    counted = {"approve", "break_glass"} if row.broken_at else {"approve"}
    return tuple(sorted({one.approver for one in decisions if one.decision in counted}))


def _differ(stated: GateStatement, claimed: GateStatement) -> list[str]:
    found = differences(stated, claimed)
    return found[:MAX_NAMED] + ([f"and {len(found) - MAX_NAMED} more"] if len(found) > MAX_NAMED else [])


def _changed(row: Row[Any], differ: list[str]) -> ConflictError:
    return ConflictError(
        f"what is claimed is not what was asked in {row.id}: {'; '.join(differ)}",
        cure="put it back as it was, or ask for what it is now",
        code="statement_changed",
        details={"differ": differ},
    )


def _not_approved(row: Row[Any]) -> ConflictError:
    code = {"denied": "review_denied", "expired": "review_expired", "cancelled": "review_cancelled"}.get(
        row.state, "not_approved"
    )
    why = f": {row.detail}" if row.detail else ""
    cure = "wait for the people who decide" if row.state in OPEN else "ask again"
    return ConflictError(f"{row.id} is {row.state}{why}", cure=cure, code=code)


def _hash(claim: str) -> str:
    return hashlib.sha256(claim.encode()).hexdigest()
