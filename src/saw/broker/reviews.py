"""The perimeter's side of reviews: a call is opened and waits, is claimed once when people agreed, and its end is told."""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Row, func, select

from saw.broker.agent_states import require_living
from saw.broker.break_glass import OWED, BreakGlass, held_up_by, let_through
from saw.broker.clock import iso, parse_iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.errors import BrokerError, BusyError, ConflictError, ForbiddenError, MalformedError
from saw.broker.holds import holds_in_force
from saw.broker.lifecycle import State
from saw.broker.registry import get_row, require_state
from saw.broker.review_context import Contexts
from saw.broker.review_evidence import counting
from saw.broker.review_read_back import ReadBacks, read_back_words
from saw.broker.review_states import (
    COLUMNS,
    GATE,
    OPEN,
    UNENDED,
    Moves,
    claims_key,
    due_at,
    get_review,
    lease_counts,
    other_policy,
    stored,
    unknown_review,
    why_void,
)
from saw.broker.review_vault import BytesChanged, Vault
from saw.broker.schema import review_nonces, reviews
from saw.broker.store import Transaction
from saw.review.digest import request_digest
from saw.review.messages import (
    BEYOND_BUDGET,
    FINAL,
    ClaimAnswer,
    Claimed,
    OpenReview,
    ReadContext,
    ReadState,
    ReviewedAnswer,
    ReviewedCall,
    ReviewResult,
    ReviewView,
)
from saw.review.render import is_push
from saw.review.state_diff import has_state

CLAIM_FOR = timedelta(seconds=120)
"""How long a perimeter has for the one attempt, from the claim to telling its result."""
KEEP = timedelta(days=7)
"""How long the bytes of a call and of its answer are kept after its review has ended; digests and decisions stay."""
MAX_OPEN = 64
"""Most reviews of one workspace that wait at a time."""
MAX_HELD = 256 * 1024 * 1024
"""Most bytes that are kept of the reviewed calls of one workspace."""


class Reviews:
    """Reviews as perimeters use them (controls REV-01 to REV-03)."""

    def __init__(self, services: Services, vault: Vault) -> None:
        self._s = services
        self._vault = vault
        self._moves = Moves(services)
        self.read_backs = ReadBacks(services, vault)
        self.contexts = Contexts(services, vault)
        self._glass = BreakGlass(services)

    def open(self, caller: Caller, wanted: OpenReview) -> ReviewView:
        """Keep a call until people have decided; the same call that waits already is answered with its review.

        Raises :class:`ForbiddenError` unless the workspace is active, :class:`ConflictError` when its policy is another one,
        :class:`BusyError` when too much of it waits.
        """
        now = self._s.clock()
        identifier = self._s.new_id("rv")
        digest = request_digest(wanted.workspace_id, wanted.call)
        sealed = self._vault.seal(identifier, "call", wanted.call)
        with self._s.store.write() as tx:
            workspace = get_row(tx.connection, wanted.workspace_id)
            require_state(workspace, frozenset({State.ACTIVE}))
            require_living(tx.connection, workspace)
            if workspace.policy_digest != wanted.policy_digest:
                raise other_policy(workspace.id)
            first = self._same(tx, caller, wanted, digest)
            if first is None:
                require_room(tx.connection, workspace.id)
                tx.connection.execute(
                    reviews.insert().values(
                        id=identifier,
                        workspace_id=workspace.id,
                        agent_id=workspace.agent_id,
                        sponsor=workspace.sponsor,
                        perimeter=caller.principal,
                        policy_digest=wanted.policy_digest,
                        request_digest=digest,
                        group_name=wanted.group,
                        quorum=wanted.quorum,
                        rule=wanted.rule,
                        delegation=wanted.delegation,
                        binary=wanted.binary,
                        request_id=wanted.request_id,
                        method=wanted.call.method,
                        scheme=wanted.call.scheme,
                        host=wanted.call.host,
                        port=wanted.call.port,
                        path=wanted.call.path.partition("?")[0][:1024],
                        call=sealed,
                        held_bytes=len(sealed),
                        state="pending",
                        detail="",
                        opened_at=iso(now),
                        expires_at=iso(now + timedelta(seconds=wanted.expires_in_s)),
                        **(
                            {"context_state": "asked", "context_at": iso(now), "context_step": 1}
                            if is_push(wanted.call) or (wanted.readable and has_state(wanted.call))
                            else {}
                        ),
                    )
                )
                first = get_review(tx.connection, identifier)
                tx.wake(claims_key(caller.principal))
                self._moves.record(tx, caller, first, "a call waits for review", "create")
                self._moves.opened(tx, first)
            return self._view(tx.connection, first)

    def view(self, caller: Caller, identifier: str, workspace_id: str) -> tuple[ReviewView, float]:
        """Return a review as its workspace may see it, and in how many seconds time alone changes it (0: it does not).

        Raises :class:`NotFoundError` for another workspace's review, or another perimeter's.
        """
        with self._s.store.read() as connection:
            row = _of(connection, caller, identifier, workspace_id)
            view = self._view(connection, row)
        now = self._s.clock()
        if due_at(row) and due_at(row) <= iso(now):
            with self._s.store.write() as tx:
                row = self._moves.settle(tx, _of(tx.connection, caller, identifier, workspace_id))
                view = self._view(tx.connection, row)
        due = due_at(row)
        return view, (parse_iso(due) - now).total_seconds() if due else 0.0

    def claim(self, caller: Caller, secret: str | None = None) -> ClaimAnswer:
        """Give the caller the right to send one approved call of its own workspaces, once.

        Everything is looked at again first: expiry, workspace, policy, delegation, who approved, and the bytes. The review is
        ``executing``, with its audit row, before this returns. A call that was claimed with ``secret``, and whose end was not
        told, is given again: the caller says that no answer came.
        """
        mine = (reviews.c.perimeter == caller.principal) & (reviews.c.state == "approved")
        token = secret or base64.urlsafe_b64encode(self._s.random(32)).rstrip(b"=").decode()
        with self._s.store.read() as connection:
            waiting = connection.execute(select(reviews.c.id).where(mine)).first() is not None
            waiting |= bool(secret) and self._given(connection, caller, token) is not None
        if not waiting:
            return self._question(caller)
        with self._s.store.write() as tx:
            given = self._given(tx.connection, caller, token) if secret else None
            if given is not None and (again := self._again(tx, caller, given, token)) is not None:
                return ClaimAnswer(claimed=again)
            query = select(reviews.c.id).where(mine).order_by(reviews.c.approved_at, reviews.c.id)
            for identifier in tx.connection.execute(query).scalars().all():
                claimed = self._claim(tx, caller, get_review(tx.connection, identifier), token)
                if claimed is not None:
                    return ClaimAnswer(claimed=claimed)
        return self._question(caller)

    def _question(self, caller: Caller) -> ClaimAnswer:
        """Return what the caller shall read at a far end, where there is nothing to send."""
        found = self.read_backs.give(caller)
        asked = None if found else self.contexts.give(caller)
        return ClaimAnswer(
            read_back=found,
            read_context=asked if isinstance(asked, ReadContext) else None,
            read_state=asked if isinstance(asked, ReadState) else None,
        )

    def result(self, caller: Caller, identifier: str, told: ReviewResult) -> ReviewView:
        """Record how the one attempt ended; the same again changes nothing.

        Raises :class:`ForbiddenError` without the claim, :class:`ConflictError` when the claim was lost meanwhile.
        """
        if (told.outcome == "done") != (told.answer is not None):
            raise MalformedError("an answer belongs to done, and to nothing else", cure="tell what happened")
        given = _hash(told.claim)
        raw = b"" if told.answer is None else self._vault.seal(identifier, "answer", told.answer)
        refused: BrokerError | None = None
        with self._s.store.write() as tx:
            row = get_review(tx.connection, identifier)
            if row.perimeter != caller.principal:
                raise unknown_review(identifier)
            row = self._moves.settle(tx, row)
            if not hmac.compare_digest(row.claim_sha256 or "", given):
                refused = ForbiddenError(
                    "this is not the claim of the review", cure="claim it first", code="wrong_claim"
                )
            elif row.state == "executing":
                row = self._end(tx, caller, row, told, raw)
            elif row.state != told.outcome or row.answer_sha256 != _fingerprint(told.answer):
                refused = ConflictError(
                    f"{identifier} has ended as {row.state} already",
                    cure="read back at the far end what happened",
                    code="claim_ended",
                )
            if refused is not None:
                said: dict[str, object] = {"told": told.outcome, "reason": refused.code}
                self._moves.record(tx, caller, row, "a result was refused", refused=True, said=said)
            view = self._view(tx.connection, row)
        if refused is not None:
            raise refused
        return view

    def tick(self) -> None:
        """Let time have its say: expire, lose claims, cancel what is void, and drop bytes that are kept long enough."""
        self._glass.tick()
        now = self._s.clock()
        with self._s.store.read() as connection:
            rows = connection.execute(select(*COLUMNS).where(reviews.c.state.in_(UNENDED))).all()
            due = [
                row.id
                for row in rows
                if due_at(row) <= iso(now) or (row.state in OPEN and why_void(connection, row, now))
            ]
            # A statement of a gate stays: the next one is compared with it, and it holds no body.
            old = (reviews.c.ended_at <= iso(now - KEEP)) & (reviews.c.held_bytes > 0) & (reviews.c.kind != GATE)
            # So does what people have still to look at afterwards.
            old &= reviews.c.after_state.is_(None) | reviews.c.after_state.not_in(OWED)
            held = holds_in_force(connection)
            ended = select(reviews.c.id, reviews.c.workspace_id, reviews.c.opened_at, reviews.c.ended_at).where(old)
            rows = connection.execute(ended).all()
            stale = [row.id for row in rows if not held.takes(row.workspace_id, row.opened_at, row.ended_at)][:256]
        if due or stale:
            with self._s.store.write() as tx:
                held = holds_in_force(tx.connection)
                for identifier in due:
                    self._void(tx, BROKER, self._moves.settle(tx, get_review(tx.connection, identifier)))
                for identifier in stale:
                    there = reviews.c.id == identifier
                    row = get_review(tx.connection, identifier)
                    if held.takes(row.workspace_id, row.opened_at, row.ended_at):
                        continue  # it is held since we looked
                    tx.connection.execute(
                        reviews.update().where(there).values(call=None, answer=None, context=None, held_bytes=0)
                    )
                    self._moves.record(tx, BROKER, row, "the bytes of the call were removed")
                tx.connection.execute(review_nonces.delete().where(review_nonces.c.expires_at <= iso(now)))

    def _same(self, tx: Transaction, caller: Caller, wanted: OpenReview, digest: str) -> Row[Any] | None:
        """Return the review of the same call that has not ended."""
        query = select(*COLUMNS).where(
            reviews.c.workspace_id == wanted.workspace_id,
            reviews.c.request_digest == digest,
            reviews.c.policy_digest == wanted.policy_digest,
            reviews.c.perimeter == caller.principal,
            reviews.c.state.in_(UNENDED),
        )
        for row in tx.connection.execute(query).all():
            found = self._moves.settle(tx, row)
            if found.state not in UNENDED:
                continue
            if (found.group_name, found.quorum) != (wanted.group, wanted.quorum):
                raise ConflictError(
                    f"{found.id} asks another group or number of people about the same call",
                    cure="wait for its end, or have it cancelled",
                    code="review_differs",
                )
            return found
        return None

    def _claim(self, tx: Transaction, caller: Caller, row: Row[Any], token: str) -> Claimed | None:
        now = self._s.clock()
        row = self._void(tx, caller, self._moves.settle(tx, row))
        if row.state != "approved" or not lease_counts(tx.connection, row.workspace_id, now):
            return None
        if held_up_by(tx.connection, row, now) is not None:
            return None  # it waits, as with a lapsed lease
        approvals = let_through(tx.connection, row, self._s.config.break_glass, now)
        if not approvals:
            left: dict[str, object] = {"approvers": [*counting(tx.connection, row, now)]}
            self._moves.move(tx, caller, row, "pending", "an approval no longer counts", said=left)
            return None
        call = self._call(tx, row)
        if call is None:
            self._moves.move(tx, caller, row, "cancelled", "bytes_changed: the stored call is not what was reviewed")
            return None
        ends = iso(now + CLAIM_FOR)
        taken = self._moves.move(
            tx,
            caller,
            row,
            "executing",
            "claimed",
            said={"approvers": approvals},
            claimed_at=iso(now),
            claim_sha256=_hash(token),
            claim_ends_at=ends,
        )
        return None if taken is None else _claimed(taken, token, call)

    def _given(self, connection: Connection, caller: Caller, token: str) -> str | None:
        """Return the review that the caller claimed with ``token`` and has not told the end of."""
        out = (reviews.c.perimeter == caller.principal) & (reviews.c.state == "executing")
        found: str | None = (
            connection.execute(select(reviews.c.id).where(out, reviews.c.claim_sha256 == _hash(token)))
            .scalars()
            .first()
        )
        return found

    def _again(self, tx: Transaction, caller: Caller, identifier: str, token: str) -> Claimed | None:
        """Give a claimed call again while its claim lasts; the perimeter asks policy about it once more before it sends."""
        row = self._moves.settle(tx, get_review(tx.connection, identifier))
        call = self._call(tx, row) if row.state == "executing" else None
        if call is None:
            return None
        self._moves.record(tx, caller, row, "the claim was answered again")
        return _claimed(row, token, call)

    def _call(self, tx: Transaction, row: Row[Any]) -> ReviewedCall | None:
        """Return the stored call; None when it is not what was reviewed."""
        try:
            call = self._vault.open(row.id, "call", stored(tx.connection, row.id, "call") or b"", ReviewedCall)
        except BytesChanged:
            return None
        same = hmac.compare_digest(request_digest(row.workspace_id, call), row.request_digest)
        return call if same else None

    def _void(self, tx: Transaction, caller: Caller, row: Row[Any]) -> Row[Any]:
        """Cancel ``row`` when it may not be executed any more."""
        why = why_void(tx.connection, row, self._s.clock()) if row.state in OPEN else ""
        return (self._moves.move(tx, caller, row, "cancelled", why) if why else None) or row

    def _end(self, tx: Transaction, caller: Caller, row: Row[Any], told: ReviewResult, raw: bytes) -> Row[Any]:
        values: dict[str, Any] = {}
        if told.answer is not None:
            values = {"answer": raw, "answer_status": told.answer.status, "held_bytes": row.held_bytes + len(raw)}
            values["answer_sha256"] = _fingerprint(told.answer)
        said: dict[str, object] = {
            "status_code": values.get("answer_status"),
            "answer_sha256": values.get("answer_sha256"),
        }
        return self._moves.move(tx, caller, row, told.outcome, told.detail, said=said, **values) or row

    def _view(self, connection: Connection, row: Row[Any]) -> ReviewView:
        raw = stored(connection, row.id, "answer") if row.answer_status is not None else None
        return ReviewView(
            id=row.id,
            workspace_id=row.workspace_id,
            state=row.state,
            request_digest=row.request_digest,
            opened_at=row.opened_at,
            expires_at=row.expires_at,
            approvals=0 if row.state in FINAL else len(counting(connection, row, self._s.clock())),
            quorum=row.quorum,
            detail="; ".join(filter(None, (row.detail, read_back_words(row)))),
            answer=None if raw is None else self._vault.open(row.id, "answer", raw, ReviewedAnswer),
        )


def require_room(connection: Connection, workspace_id: str) -> None:
    """Raise :class:`BusyError` when as much of a workspace waits, or is kept, as may."""
    of = reviews.c.workspace_id == workspace_id
    waiting = connection.execute(select(func.count()).select_from(reviews).where(of, reviews.c.state.in_(OPEN)))
    held = connection.execute(select(func.coalesce(func.sum(reviews.c.held_bytes), 0)).where(of)).scalar_one()
    if waiting.scalar_one() >= MAX_OPEN or held >= MAX_HELD:
        raise BusyError(
            f"too many calls of {workspace_id} wait for review",
            cure=f"at most {MAX_OPEN} wait, {MAX_HELD} bytes are kept: decide or cancel some",
            code="too_many_reviews",
        )


def _of(connection: Connection, caller: Caller, identifier: str, workspace_id: str) -> Row[Any]:
    row = get_review(connection, identifier)
    if row.workspace_id != workspace_id or row.perimeter != caller.principal:
        raise unknown_review(identifier)
    return row


def _hash(token: str) -> str:
    """Return what is kept of a claim's secret."""
    return hashlib.sha256(token.encode()).hexdigest()


def _claimed(row: Row[Any], token: str, call: ReviewedCall) -> Claimed:
    """Return the right to send ``call``, of a row that is ``executing``."""
    return Claimed(
        id=row.id,
        claim=token,
        claim_ends_at=row.claim_ends_at,
        workspace_id=row.workspace_id,
        policy_digest=row.policy_digest,
        request_digest=row.request_digest,
        call=call,
        binary=row.binary,
        rule=row.rule if row.rule.startswith(BEYOND_BUDGET) else "",
    )


def _fingerprint(answer: ReviewedAnswer | None) -> str | None:
    """Return the digest (hex SHA-256) of an answer's status, headers and body."""
    if answer is None:
        return None
    digest = hashlib.sha256(f"{answer.status} {int(answer.truncated)}\n".encode())
    for name, value in answer.headers:
        digest.update(f"{name}: {value}\n".encode())
    digest.update(b"\n" + answer.body)
    return digest.hexdigest()
