"""The people's side of reviews: look at a call, take a nonce, decide under one's own signature, keep a receipt."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy import Connection, Row, func, select

from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import BrokerError, ConflictError, ForbiddenError, MalformedError, NotFoundError
from saw.broker.registry import get_row
from saw.broker.review_states import COLUMNS, OPEN, Moves, due_at, get_review, stored, why_void
from saw.broker.review_vault import BytesChanged, Vault
from saw.broker.reviewers import counting, get_reviewer, is_self_approval, may_decide
from saw.broker.schema import review_decisions, review_nonces, reviewers, reviews
from saw.broker.setup import signer_file
from saw.broker.store import Transaction
from saw.identity.statement import sign_statement
from saw.policy.keys import parse_public_key
from saw.review.messages import FINAL, ReviewedCall
from saw.review.receipt import RECEIPT_TYPE, Receipt, SignedDecision
from saw.review.render import render
from saw.review.statement import (
    MAX_STATEMENT,
    ReviewStatement,
    StatementRefused,
    parse_statement,
    render_digest,
    verify_review,
)

NONCE_FOR = timedelta(minutes=10)
"""How long a reviewer has from taking a nonce to handing in the signed decision."""
MAX_DECISIONS = 18
"""Most decisions that are kept of one review; so many fit into a receipt."""
_HIDDEN = frozenset({"claim_sha256", "held_bytes"})

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class AskNonce(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is going to decide."""

    approver: Text


class Decide(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A statement in canonical form (:mod:`saw.review.statement`) and the signature over it, hexadecimal."""

    statement: Annotated[str, msgspec.Meta(max_length=MAX_STATEMENT)]
    signature: Annotated[str, msgspec.Meta(max_length=512)]


class Cancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a call is not waited for any longer."""

    reason: Text


class Decisions:
    """Reviews as people use them, through an operator's socket; what counts is the signature (control REV-02)."""

    def __init__(self, services: Services, vault: Vault) -> None:
        self._s = services
        self._vault = vault
        self._moves = Moves(services)

    def listed(self, state: str | None, workspace_id: str | None) -> dict[str, Any]:
        """Return reviews, newest first, at most 1000."""
        query = select(*COLUMNS).order_by(reviews.c.opened_at.desc(), reviews.c.id).limit(1000)
        with self._s.store.read() as connection:
            if workspace_id:
                query = query.where(reviews.c.workspace_id == get_row(connection, workspace_id).id)
            if state:
                query = query.where(reviews.c.state == state)
            rows = connection.execute(query).all()
            return {"reviews": [self._summary(connection, row) for row in rows]}

    def show(self, identifier: str) -> dict[str, Any]:
        """Return a review with what a reviewer has to look at, and every decision."""
        self._settled(identifier)
        with self._s.store.read() as connection:
            row = get_review(connection, identifier)
            rendering = self._rendering(connection, row)
            decisions = [_decision_view(one) for one in _decisions(connection, identifier)]
            return {
                **self._summary(connection, row),
                "rendering": rendering,
                "render_digest": None if rendering is None else render_digest(rendering),
                "decisions": decisions,
            }

    def call(self, identifier: str) -> dict[str, Any]:
        """Return the exact call, so that a reviewer's own machine can show and digest it."""
        with self._s.store.read() as connection:
            row = get_review(connection, identifier)
            call = self._call(connection, row)
        if call is None:
            raise NotFoundError(
                f"the bytes of {identifier} are no longer kept", cure="its digest is", code="bytes_removed"
            )
        return {"id": row.id, "workspace_id": row.workspace_id, "call": call}

    def nonce(self, identifier: str, body: AskNonce) -> dict[str, Any]:
        """Give ``approver`` a nonce for one decision about this review; it replaces the one of before."""
        now = self._s.clock()
        nonce = base64.urlsafe_b64encode(self._s.random(32)).rstrip(b"=").decode()
        with self._s.store.write() as tx:
            row = self._moves.settle(tx, get_review(tx.connection, identifier))
            person = get_reviewer(tx.connection, body.approver)
            where = (review_nonces.c.review_id == row.id) & (review_nonces.c.approver == person.name)
            tx.connection.execute(review_nonces.delete().where(where))
            if row.state in OPEN and may_decide(person, row.group_name):
                tx.connection.execute(
                    review_nonces.insert().values(
                        review_id=row.id, approver=person.name, nonce=nonce, expires_at=iso(now + NONCE_FOR)
                    )
                )
        if row.state not in OPEN:
            raise _not_open(row)
        if not may_decide(person, row.group_name):
            raise _not_in_group(person.name, row)
        return {"review": row.id, "approver": person.name, "nonce": nonce, "expires_at": iso(now + NONCE_FOR)}

    def decide(self, caller: Caller, identifier: str, body: Decide) -> dict[str, Any]:
        """Take a signed decision: a denial ends the review, the last approval that is needed approves it.

        The nonce is gone after this, whatever else is found. Raises a refusal that says what does not fit.
        """
        try:
            said = parse_statement(body.statement.encode())
        except StatementRefused as error:
            raise MalformedError(error.message, cure=error.cure, code=error.code) from error
        with self._s.store.write() as tx:
            row = self._moves.settle(tx, get_review(tx.connection, identifier))
            refused = self._judge(tx, caller, row, said, body)
            if refused is None:
                self._take(tx, caller, row, said, body)
            else:
                told: dict[str, object] = {"reviewer": said.approver, "decision": said.decision, "reason": refused.code}
                self._moves.record(tx, caller, row, "a decision was refused", refused=True, said=told)
        if refused is not None:
            raise refused
        return {**self.show(identifier), "changed": True}

    def cancel(self, caller: Caller, identifier: str, body: Cancel) -> dict[str, Any]:
        """End a review that nobody shall wait for; a cancelled one stays as it is."""
        with self._s.store.write() as tx:
            row = self._moves.settle(tx, get_review(tx.connection, identifier))
            changed = row.state in OPEN
            if changed:
                self._moves.move(tx, caller, row, "cancelled", body.reason)
        if not changed and row.state != "cancelled":
            raise _not_open(row)
        return {**self.show(identifier), "changed": changed}

    def receipt(self, identifier: str) -> dict[str, Any]:
        """Return a receipt of a review that has ended, signed by the broker now."""
        self._settled(identifier)
        with self._s.store.read() as connection:
            row = get_review(connection, identifier)
            decisions = _decisions(connection, identifier)
        if row.state not in FINAL:
            raise ConflictError(f"{identifier} is {row.state}", cure="wait for its end", code="review_not_ended")
        receipt = Receipt(
            id=row.id,
            workspace=row.workspace_id,
            agent=row.agent_id,
            sponsor=row.sponsor,
            policy_digest=row.policy_digest,
            request_digest=row.request_digest,
            method=row.method,
            host=row.host,
            group=row.group_name,
            quorum=row.quorum,
            rule=row.rule,
            delegation=row.delegation,
            opened_at=row.opened_at,
            claimed_at=row.claimed_at,
            ended_at=row.ended_at,
            outcome=row.state,
            detail=row.detail,
            answer_status=row.answer_status,
            answer_sha256=row.answer_sha256,
            decisions=tuple(
                SignedDecision(
                    statement=one.statement,
                    signature=one.signature,
                    public_key=one.public_key,
                    decided_at=one.decided_at,
                )
                for one in decisions
            ),
            issued_at=iso(self._s.clock()),
        )
        signer = signer_file(self._s.config).read_bytes()
        return {
            "id": row.id,
            "outcome": row.state,
            "receipt": sign_statement(msgspec.json.encode(receipt), RECEIPT_TYPE, signer, signer),
        }

    def _judge(
        self, tx: Transaction, caller: Caller, row: Row[Any], said: ReviewStatement, body: Decide
    ) -> BrokerError | None:
        """Use up the nonce and return why the decision cannot be taken, or None."""
        now = self._s.clock()
        where = (review_nonces.c.review_id == row.id) & (review_nonces.c.approver == said.approver)
        held = tx.connection.execute(select(review_nonces).where(where)).one_or_none()
        tx.connection.execute(review_nonces.delete().where(where))
        if row.state not in ({"pending"} if said.decision == "approve" else OPEN):
            return _not_open(row)
        why = why_void(tx.connection, row, now)
        if why:
            self._moves.move(tx, caller, row, "cancelled", why)
            return ConflictError(f"{row.id} is void: {why}", cure="the agent may ask again", code=why)
        person = tx.connection.execute(select(reviewers).where(reviewers.c.name == said.approver)).one_or_none()
        if person is None or not may_decide(person, row.group_name):
            return _not_in_group(said.approver, row)
        try:
            verify_review(
                body.statement.encode(), body.signature, parse_public_key(person.public_key.encode(), person.name)
            )
        except StatementRefused as error:
            return ForbiddenError(error.message, cure=error.cure, code="signature_refused")
        if held is None or held.expires_at <= iso(now) or not hmac.compare_digest(held.nonce, said.nonce):
            return ForbiddenError(
                "the nonce is not the one that was given for this review and approver, or it was used",
                cure="take another nonce and sign again",
                code="nonce_refused",
            )
        return self._judge_content(tx.connection, row, said, now)

    def _judge_content(
        self, connection: Connection, row: Row[Any], said: ReviewStatement, now: datetime
    ) -> BrokerError | None:
        try:
            rendering = self._rendering(connection, row)
        except BytesChanged as error:
            return ConflictError(error.message, cure=error.cure, code=error.code)
        wanted = {
            "review": row.id,
            "request_digest": row.request_digest,
            "policy_digest": row.policy_digest,
            "render_digest": "" if rendering is None else render_digest(rendering),
        }
        differ = [name for name, value in wanted.items() if not hmac.compare_digest(getattr(said, name), value)]
        if differ:
            return ConflictError(
                f"the decision is not about this review as it is: {', '.join(differ)}",
                cure="look at it again and sign what is shown",
                code="statement_mismatch",
                details={"differ": differ},
            )
        if not iso(now) < said.not_after <= row.expires_at:
            return ConflictError(
                f"not_after {said.not_after} is past, or later than the end of the review",
                cure=f"sign with one until {row.expires_at} at most",
                code="statement_expired",
            )
        if said.decision == "approve" and is_self_approval(row, said.approver):
            return ForbiddenError(
                f"{said.approver} is the sponsor of {row.workspace_id}",
                cure="somebody else approves what one's own agent asks for",
                code="self_approval",
            )
        if said.decision == "approve" and said.approver in counting(connection, row, now):
            return ConflictError(
                f"{said.approver} has approved already", cure="another person decides", code="already_decided"
            )
        count = select(func.count()).select_from(review_decisions).where(review_decisions.c.review_id == row.id)
        if said.decision == "approve" and connection.execute(count).scalar_one() >= MAX_DECISIONS - 1:
            return ConflictError(
                f"{row.id} has {MAX_DECISIONS - 1} decisions", cure="deny or cancel it", code="too_many_decisions"
            )
        return None

    def _take(self, tx: Transaction, caller: Caller, row: Row[Any], said: ReviewStatement, body: Decide) -> None:
        now = self._s.clock()
        person = get_reviewer(tx.connection, said.approver)
        tx.connection.execute(
            review_decisions.insert().values(
                review_id=row.id,
                approver=said.approver,
                decision=said.decision,
                statement=body.statement,
                signature=body.signature,
                public_key=person.public_key,
                key_sha256=person.key_sha256,
                not_after=said.not_after,
                decided_by=caller.principal,
                decided_at=iso(now),
            )
        )
        told: dict[str, object] = {
            "reviewer": said.approver,
            "decision": said.decision,
            "key_sha256": person.key_sha256,
            "render_digest": said.render_digest,
        }
        comment = said.comment or said.decision
        if said.decision == "deny":
            self._moves.move(tx, caller, row, "denied", f"denied by {said.approver}", said=told | {"comment": comment})
            return
        self._moves.record(tx, caller, row, comment, said=told)
        approvals = counting(tx.connection, row, now)
        if len(approvals) >= row.quorum:
            names: dict[str, object] = {"approvers": [*approvals]}
            self._moves.move(tx, caller, row, "approved", "approved", said=names, approved_at=iso(now))

    def _settled(self, identifier: str) -> None:
        with self._s.store.read() as connection:
            due = due_at(get_review(connection, identifier))
        if due and due <= iso(self._s.clock()):
            with self._s.store.write() as tx:
                self._moves.settle(tx, get_review(tx.connection, identifier))

    def _call(self, connection: Connection, row: Row[Any]) -> ReviewedCall | None:
        raw = stored(connection, row.id, "call")
        return None if raw is None else self._vault.open(row.id, "call", raw, ReviewedCall)

    def _rendering(self, connection: Connection, row: Row[Any]) -> str | None:
        call = self._call(connection, row)
        return None if call is None else render(row.workspace_id, call)

    def _summary(self, connection: Connection, row: Row[Any]) -> dict[str, Any]:
        """Return what a list says of a review; for one that waits, who has approved it and still counts."""
        shown = {name: value for name, value in row._mapping.items() if name not in _HIDDEN}  # noqa: SLF001 - public name
        approvals: Iterable[str] = counting(connection, row, self._s.clock()) if row.state in OPEN else ()
        return {**shown, "group": shown.pop("group_name"), "approved_by": sorted(approvals)}


def _decisions(connection: Connection, identifier: str) -> list[Row[Any]]:
    query = select(review_decisions).where(review_decisions.c.review_id == identifier).order_by(review_decisions.c.id)
    return list(connection.execute(query).all())


def _decision_view(row: Row[Any]) -> dict[str, Any]:
    said = parse_statement(row.statement.encode())
    return {
        "approver": row.approver,
        "decision": row.decision,
        "comment": said.comment,
        "not_after": row.not_after,
        "decided_at": row.decided_at,
        "key_sha256": row.key_sha256,
        "statement": row.statement,
        "signature": row.signature,
    }


def _not_open(row: Row[Any]) -> ConflictError:
    return ConflictError(f"{row.id} is {row.state}", cure="it is decided no longer", code="review_not_open")


def _not_in_group(name: str, row: Row[Any]) -> ForbiddenError:
    return ForbiddenError(
        f"{name[:64]} is no active reviewer of the group {row.group_name[:64]}",
        cure="somebody of the group decides",
        code="not_in_group",
    )
