"""The people's side of reviews: look at a call, take a nonce, decide under one's own signature, keep a receipt."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy import Connection, Row, func, select

from saw.broker.break_glass import OWED, BreakGlass, held_up_by, holders
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import BrokerError, ConflictError, ForbiddenError, MalformedError, NotFoundError
from saw.broker.newest import newest_page
from saw.broker.registry import get_row
from saw.broker.review_context import Texts, context_of
from saw.broker.review_evidence import (
    Decide,
    DecideByPasskey,
    Proof,
    counting,
    in_group,
    prove,
    signed_decision,
    use_passkey,
)
from saw.broker.review_states import COLUMNS, GATE, OPEN, TOOL, Moves, due_at, get_review, stored, why_void
from saw.broker.review_vault import BytesChanged, Vault
from saw.broker.reviewers import get_reviewer, is_self_approval
from saw.broker.schema import review_decisions, review_nonces, reviews
from saw.broker.step_up import StepUpSettings
from saw.broker.store import Transaction
from saw.identity.statement import sign_statement
from saw.review.gate import GateRequest, render_gate
from saw.review.messages import FINAL, ReviewedCall
from saw.review.receipt import RECEIPT_TYPE, BrokenGlass, Receipt
from saw.review.statement import AFTER, ReviewStatement, StatementRefused, parse_statement, render_digest
from saw.review.tool import ReviewedTool, render_tool

NONCE_FOR = timedelta(minutes=10)
"""How long a reviewer has from taking a nonce to handing in the signed decision."""
MAX_APPROVALS = 17
"""Most decisions of a review after which another approval is taken."""
MAX_DECISIONS = 32
"""Most decisions that are kept of one review; so many fit into a receipt."""
_DONE = {"approve": "approved it", "break_glass": "signed to break the glass", "uphold": "upheld it"}
_HIDDEN = frozenset({"claim_sha256", "held_bytes", "context_step", "render_digest", "group_name"})
LARGEST_PAGE = 1000
"""Most reviews in one page."""

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class AskNonce(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is going to decide."""

    approver: Text


class Cancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a call is not waited for any longer."""

    reason: Text


class Decisions:
    """Reviews as people use them, through an operator's socket or the pages; what counts is the signature (control REV-02)."""

    def __init__(self, services: Services, vault: Vault) -> None:
        self._s = services
        self._vault = vault
        self._moves = Moves(services)
        self._texts = Texts()
        self._glass = BreakGlass(services)
        self._step_up = services.config.sso.step_up if services.config.sso else StepUpSettings()

    def listed(
        self,
        state: str | None,
        workspace_id: str | None,
        *,
        owed: bool = False,
        after: str = "",
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Return ``{reviews, next}``, the newest first; with ``owed`` only those that owe an after-review.

        ``next`` is the ``after`` of the page that follows, None at the end.
        """
        query = select(*COLUMNS)
        with self._s.store.read() as connection:
            if workspace_id:
                query = query.where(reviews.c.workspace_id == get_row(connection, workspace_id).id)
            if state:
                query = query.where(reviews.c.state == state)
            if owed:
                query = query.where(reviews.c.after_state.in_(OWED))
            rows, following = newest_page(connection, query, reviews.c.opened_at, after, limit or LARGEST_PAGE)
            return {"reviews": [self._summary(connection, row) for row in rows], "next": following}

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

    def brief(self, identifier: str) -> dict[str, Any]:
        """Return what a list says of one review."""
        with self._s.store.read() as connection:
            return self._summary(connection, get_review(connection, identifier))

    def call(self, identifier: str) -> dict[str, Any]:
        """Return the exact call, or the statement of a gate, so that a reviewer's own machine can show and digest it."""
        with self._s.store.read() as connection:
            row = get_review(connection, identifier)
            call = self._call(connection, row)
            sealed = stored(connection, row.id, "context")
        if isinstance(call, GateRequest | ReviewedTool):
            what = "gate" if isinstance(call, GateRequest) else "tool"
            return {"id": row.id, "workspace_id": row.workspace_id, what: call}
        if call is None:
            raise NotFoundError(
                f"the bytes of {identifier} are no longer kept", cure="its digest is", code="bytes_removed"
            )
        context = context_of(self._vault, row, call, sealed)
        return {"id": row.id, "workspace_id": row.workspace_id, "call": call, "context": context}

    def nonce(self, identifier: str, body: AskNonce) -> dict[str, Any]:
        """Give a registered reviewer a nonce for one decision about this review; it replaces the one of before."""
        with self._s.store.read() as connection:
            name = get_reviewer(connection, body.approver).name
        return self.nonce_for(identifier, name, passkey=False)

    def nonce_for(self, identifier: str, name: str, *, passkey: bool) -> dict[str, Any]:
        """Like :meth:`nonce`; with ``passkey`` for somebody who is signed in."""
        now = self._s.clock()
        nonce = base64.urlsafe_b64encode(self._s.random(32)).rstrip(b"=").decode()
        with self._s.store.write() as tx:
            row = self._moves.settle(tx, get_review(tx.connection, identifier))
            member = any(
                in_group(tx.connection, name, group, now, passkey=passkey) for group in self._glass.groups(row)
            )
            decided = row.state in OPEN or row.after_state in OWED
            where = (review_nonces.c.review_id == row.id) & (review_nonces.c.approver == name)
            tx.connection.execute(review_nonces.delete().where(where))
            if decided and member:
                tx.connection.execute(
                    review_nonces.insert().values(
                        review_id=row.id, approver=name, nonce=nonce, expires_at=iso(now + NONCE_FOR)
                    )
                )
        if not decided:
            raise _not_open(row)
        if not member:
            raise _not_in_group(name, row.group_name)
        ends = iso(now + NONCE_FOR)
        return {"review": row.id, "approver": name, "nonce": nonce, "expires_at": ends, **self._glass.offered(row, now)}

    def decide(self, caller: Caller, identifier: str, body: Decide | DecideByPasskey) -> dict[str, Any]:
        """Take a signed decision: a denial ends the review, the last approval that is needed approves it.

        The nonce is gone after this, whatever else is found. Raises a refusal that says what does not fit.
        """
        try:
            said = parse_statement(body.statement.encode())
        except StatementRefused as error:
            raise MalformedError(error.message, cure=error.cure, code=error.code) from error
        with self._s.store.write() as tx:
            row = self._moves.settle(tx, get_review(tx.connection, identifier))
            proof = self._judge(tx, caller, row, said, body)
            refused = proof if isinstance(proof, BrokerError) else None
            if not isinstance(proof, BrokerError):
                self._take(tx, caller, row, said, body.statement, proof)
            else:
                told: dict[str, object] = {"reviewer": said.approver, "decision": said.decision, "reason": proof.code}
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
            decisions=tuple(signed_decision(one) for one in decisions),
            break_glass=_broken_glass(row),
            issued_at=iso(self._s.clock()),
        )
        signer = self._s.signer.pem
        return {
            "id": row.id,
            "outcome": row.state,
            "receipt": sign_statement(msgspec.json.encode(receipt), RECEIPT_TYPE, signer, signer),
        }

    def _judge(
        self, tx: Transaction, caller: Caller, row: Row[Any], said: ReviewStatement, body: Decide | DecideByPasskey
    ) -> BrokerError | Proof:
        """Use up the nonce and return why the decision cannot be taken, or what proves it."""
        now = self._s.clock()
        by_passkey = isinstance(body, DecideByPasskey)
        if isinstance(body, DecideByPasskey) and said.approver != body.person:
            return ForbiddenError(
                f"the decision is in the name of {said.approver[:64]}",
                cure="decide in your own name",
                code="another_persons_name",
            )
        where = (review_nonces.c.review_id == row.id) & (review_nonces.c.approver == said.approver)
        held = tx.connection.execute(select(review_nonces).where(where)).one_or_none()
        tx.connection.execute(review_nonces.delete().where(where))
        if said.decision not in AFTER:
            if row.state not in (OPEN if said.decision == "deny" else {"pending"}):
                return _not_open(row)
            why = why_void(tx.connection, row, now)
            if why:
                self._moves.move(tx, caller, row, "cancelled", why)
                return ConflictError(f"{row.id} is void: {why}", cure="the agent may ask again", code=why)
        try:
            group = self._glass.group_for(row, said)
            if not in_group(tx.connection, said.approver, group, now, passkey=by_passkey):
                return _not_in_group(said.approver, group)
            signed_in = body.signed_in if isinstance(body, DecideByPasskey) else None
            if weak := self._step_up.refusal(said.decision, row.group_name, signed_in, now):
                return weak
            proof = prove(tx.connection, said, body)
        except BrokerError as error:
            return error
        if held is None or held.expires_at <= iso(now) or not hmac.compare_digest(held.nonce, said.nonce):
            return ForbiddenError(
                "the nonce is not the one that was given for this review and approver, or it was used",
                cure="take another nonce and sign again",
                code="nonce_refused",
            )
        return self._judge_content(tx.connection, row, said, now) or proof

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
        until = self._glass.until(row, said, now)
        if not iso(now) < said.not_after <= until:
            return ConflictError(
                f"not_after {said.not_after} is past, or later than this decision can count",
                cure=f"sign with one until {until} at most",
                code="statement_expired",
            )
        if said.decision in _DONE and is_self_approval(row, said.approver):
            return ForbiddenError(
                f"{said.approver} {'asked for this' if row.kind == GATE else f'is the sponsor of {row.workspace_id}'}",
                cure="somebody else approves what one asks for, or one's own agent does",
                code="self_approval",
            )
        group = self._glass.group_for(row, said)
        if said.decision in _DONE and said.approver in counting(
            connection, row, now, decision=said.decision, group=group
        ):
            return ConflictError(
                f"{said.approver} has {_DONE[said.decision]} already",
                cure="another person decides",
                code="already_decided",
            )
        count = select(func.count()).select_from(review_decisions).where(review_decisions.c.review_id == row.id)
        most = {"deny": MAX_DECISIONS, "approve": MAX_APPROVALS}.get(said.decision, MAX_DECISIONS - 1)
        if (there := connection.execute(count).scalar_one()) >= most:
            return ConflictError(f"{row.id} has {there} decisions", cure="deny or cancel it", code="too_many_decisions")
        return self._glass.why_not(connection, row, said, now)

    def _take(  # noqa: PLR0917 - the one place that stores a decision
        self, tx: Transaction, caller: Caller, row: Row[Any], said: ReviewStatement, raw: str, proof: Proof
    ) -> None:
        now = self._s.clock()
        use_passkey(tx.connection, proof, now)
        tx.connection.execute(
            review_decisions.insert().values(
                review_id=row.id,
                approver=said.approver,
                decision=said.decision,
                kind=proof.kind,
                statement=raw,
                signature=proof.signature,
                public_key=proof.public_key,
                key_sha256=proof.key_sha256,
                not_after=said.not_after,
                decided_by=caller.principal,
                decided_at=iso(now),
            )
        )
        told: dict[str, object] = {
            "reviewer": said.approver,
            "decision": said.decision,
            "key_sha256": proof.key_sha256,
            "signed_with": proof.kind,
            "render_digest": said.render_digest,
            **({"acr": proof.acr} if proof.acr else {}),
        }
        comment = said.comment or said.decision
        if said.decision == "deny":
            self._moves.move(tx, caller, row, "denied", f"denied by {said.approver}", said=told | {"comment": comment})
            return
        self._moves.record(tx, caller, row, comment, said=told)
        if said.decision != "approve":
            self._glass.took(tx, caller, row, said)
            return
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

    def _call(self, connection: Connection, row: Row[Any]) -> ReviewedCall | GateRequest | ReviewedTool | None:
        raw = stored(connection, row.id, "call")
        if raw is None:
            return None
        if row.kind == GATE:
            return self._vault.open(row.id, "call", raw, GateRequest)
        if row.kind == TOOL:
            return self._vault.open(row.id, "call", raw, ReviewedTool)
        return self._vault.open(row.id, "call", raw, ReviewedCall)

    def _rendering(self, connection: Connection, row: Row[Any]) -> str | None:
        call = self._call(connection, row)
        if isinstance(call, GateRequest):
            return render_gate(row.perimeter, call)
        if isinstance(call, ReviewedTool):
            return render_tool(row.workspace_id, call)
        if call is None:
            return None
        raw = stored(connection, row.id, "context")
        return self._texts.of(row.workspace_id, call, context_of(self._vault, row, call, raw))

    def _summary(self, connection: Connection, row: Row[Any]) -> dict[str, Any]:
        """Return what a list says of a review; for one that waits, whose word for it still counts, and what holds it up."""
        now = self._s.clock()
        shown = {name: value for name, value in row._mapping.items() if name not in _HIDDEN}  # noqa: SLF001 - public name
        waits = row.state in OPEN
        approvals: Iterable[str] = counting(connection, row, now) if waits else ()
        held: Iterable[str] = holders(connection, row, self._s.config.break_glass, now) if waits else ()
        return {
            **shown,
            "group": row.group_name,
            "approved_by": sorted(approvals),
            "break_glass_by": sorted(held),
            "held_up_by": held_up_by(connection, row, now) if waits else None,
        }


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
        "signed_with": row.kind,
        "key_sha256": row.key_sha256,
        "statement": row.statement,
        "signature": row.signature,
    }


def _not_open(row: Row[Any]) -> ConflictError:
    return ConflictError(f"{row.id} is {row.state}", cure="it is decided no longer", code="review_not_open")


def _broken_glass(row: Row[Any]) -> BrokenGlass | msgspec.UnsetType:
    """Return what a receipt says of a broken glass: how many keys it took then, whatever the configuration says now."""
    if not row.broken_at:
        return msgspec.UNSET
    return BrokenGlass(at=row.broken_at, keys=row.broken_keys, after=row.after_state, after_at=row.after_at)


def _not_in_group(name: str, group: str) -> ForbiddenError:
    return ForbiddenError(
        f"{name[:64]} is no active reviewer of the group {group[:64]}",
        cure="somebody of the group decides",
        code="not_in_group",
    )
