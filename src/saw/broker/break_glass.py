"""Break-glass: a review that its group cannot decide in time is let through by several keys, loudly, and looked at afterwards.

It takes the place of the group's approvals and of nothing else: policy, bytes, workspace, lease, agent and delegation are looked
at as ever, a denial wins, and the sponsor has no say. Once the glass is broken the review owes an after-review, whatever becomes
of the call: the group decides, as many as its quorum, without those who broke it, whether that was right.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, select

from saw.broker.break_glass_settings import BreakGlassSettings
from saw.broker.clock import iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.errors import BrokerError, ConflictError, ForbiddenError, MalformedError
from saw.broker.notification_settings import Kind
from saw.broker.notifications import Notifications
from saw.broker.review_evidence import counting
from saw.broker.review_states import COLUMNS, GATE, Moves, claims_key, subject_of
from saw.broker.schema import review_decisions, reviews
from saw.broker.store import Transaction
from saw.review.statement import AFTER, ReviewStatement

OWED = frozenset({"owed", "overdue"})
"""States of an after-review that nobody has decided; the others are ``upheld`` and ``rejected``."""
AFTER_FOR = timedelta(days=7)
"""How long a decision of an after-review counts at most, while the others of the quorum are waited for."""


def holders(
    connection: Connection, review: Row[Any], settings: BreakGlassSettings | None, now: datetime
) -> dict[str, Row[Any]]:
    """Return the break-glass decisions about ``review`` that count at ``now``, by who made them."""
    if settings is None:
        return {}
    return counting(connection, review, now, decision="break_glass", group=settings.group)


def let_through(
    connection: Connection, review: Row[Any], settings: BreakGlassSettings | None, now: datetime
) -> list[str]:
    """Return by whose word ``review`` may be sent at ``now``: its group's, or of those who broke the glass; empty: it may not."""
    approvals = counting(connection, review, now)
    if len(approvals) >= review.quorum:
        return [*approvals]
    held = holders(connection, review, settings, now)
    return [*held] if review.broken_at and settings is not None and _enough(held, settings) else []


def held_up_by(connection: Connection, review: Row[Any], now: datetime) -> str | None:
    """Return the review whose overdue after-review keeps back all of the same workspace or gate; None: there is none."""
    query = _owed_beside(review).where(reviews.c.after_due_at <= iso(now))
    return connection.execute(query.order_by(reviews.c.after_due_at).limit(1)).scalar_one_or_none()


class BreakGlass:
    """What breaking the glass adds to decisions (controls REV-01, REV-02)."""

    def __init__(self, services: Services) -> None:
        self._s = services
        self._settings = services.config.break_glass
        self._moves = Moves(services)
        self._notifications = Notifications(services)

    def groups(self, review: Row[Any]) -> tuple[str, ...]:
        """Return the groups of whoever may take a nonce for ``review``."""
        return (review.group_name, *((self._settings.group,) if self._settings is not None else ()))

    def group_for(self, review: Row[Any], said: ReviewStatement) -> str:
        """Return the group that ``said`` must come from; raise ``break_glass_off`` where no glass can be broken."""
        if said.decision != "break_glass":
            return str(review.group_name)
        if self._settings is None:
            raise ConflictError(
                "the glass cannot be broken here",
                cure="the group decides; see the role variable broker_break_glass",
                code="break_glass_off",
            )
        return self._settings.group

    def until(self, review: Row[Any], said: ReviewStatement, now: datetime) -> str:
        """Return the latest time until which ``said`` may say that it counts."""
        if said.decision in AFTER:
            return iso(now + AFTER_FOR)
        if said.decision == "break_glass" and self._settings is not None:
            return min(str(review.expires_at), iso(now + timedelta(seconds=self._settings.last_s)))
        return str(review.expires_at)

    def offered(self, review: Row[Any], now: datetime) -> dict[str, str]:
        """Return what a nonce says besides: until when the decisions of this module may count."""
        found = {"after_review_until": iso(now + AFTER_FOR)}
        if self._settings is not None:
            latest = iso(now + timedelta(seconds=self._settings.last_s))
            found["break_glass_until"] = min(str(review.expires_at), latest)
        return found

    def why_not(
        self, connection: Connection, review: Row[Any], said: ReviewStatement, now: datetime
    ) -> BrokerError | None:
        """Return why ``said`` cannot be taken, as far as breaking the glass is concerned."""
        if said.decision == "deny":
            return None
        if said.decision == "approve":
            overdue = held_up_by(connection, review, now)
            return None if overdue is None else overdue_error(overdue)
        if not said.comment.strip():
            return MalformedError("this decision says why", cure="give a comment", code="reason_missing")
        if said.decision == "break_glass":
            owed = connection.execute(_owed_beside(review).limit(1)).scalar_one_or_none()
            if owed is None:
                return None
            return ConflictError(
                f"the glass was broken before, and nobody has looked at {owed} since",
                cure=f"its group decides first: saw review uphold {owed}, or reject",
                code="after_review_owed",
            )
        if review.after_state not in OWED:
            return ConflictError(
                f"{review.id} owes no after-review",
                cure="one is owed once the glass was broken",
                code="no_after_review",
            )
        if said.approver in _breakers(connection, review):
            return ForbiddenError(
                f"{said.approver[:64]} broke the glass",
                cure="others of the group look at it afterwards",
                code="own_break_glass",
            )
        return None

    def took(self, tx: Transaction, caller: Caller, review: Row[Any], said: ReviewStatement) -> None:
        """Draw the consequence of a break-glass decision, or of one of an after-review, that was stored in ``tx``."""
        if said.decision == "break_glass":
            self._broken(tx, caller, review, said)
        elif said.decision == "reject":
            self._settle(tx, caller, review, "rejected", [said.approver])
        else:
            breakers = _breakers(tx.connection, review)
            upheld = counting(tx.connection, review, self._s.clock(), decision="uphold")
            people = [name for name in upheld if name not in breakers]
            if len(people) >= review.quorum:
                self._settle(tx, caller, review, "upheld", people)

    def tick(self) -> None:
        """Tell of each after-review that became overdue, once."""
        now = self._s.clock()
        late = select(*COLUMNS).where(reviews.c.after_state == "owed", reviews.c.after_due_at <= iso(now))
        with self._s.store.read() as connection:
            if connection.execute(late.limit(1)).first() is None:
                return
        with self._s.store.write() as tx:
            for review in tx.connection.execute(late).all():
                if self._after(tx, review, "overdue"):
                    title = "nobody has looked at a broken glass in time"
                    self._alarm(tx, BROKER, review, Kind.AFTER_REVIEW_OVERDUE, title, "critical")

    def _broken(self, tx: Transaction, caller: Caller, review: Row[Any], said: ReviewStatement) -> None:
        settings, now = self._settings, self._s.clock()
        if settings is None:
            return
        held = holders(tx.connection, review, settings, now)
        told: dict[str, object] = {"reason": said.comment, "holders": sorted(held), "keys": settings.keys}
        if not _enough(held, settings):
            title = f"{said.approver} wants the glass broken"
            self._alarm(tx, caller, review, Kind.BREAK_GLASS_KEY, title, "high", told)
            return
        values = {
            "approved_at": iso(now),
            "broken_at": review.broken_at or iso(now),
            "broken_keys": settings.keys,
            "expires_at": min(review.expires_at, *(row.not_after for row in held.values())),
        }
        if not review.broken_at:
            due = iso(now + timedelta(seconds=settings.review_within_s))
            values |= {"after_state": "owed", "after_due_at": due}
            told["after_review_due"] = due
        names: dict[str, object] = {"approvers": [*held], "break_glass": True}
        found = self._moves.move(tx, caller, review, "approved", "the glass was broken", said=names, **values) or review
        self._alarm(tx, caller, found, Kind.BREAK_GLASS, "the glass was broken", "critical", told)
        if not review.broken_at:
            self._notifications.tell(tx, kind=Kind.AFTER_REVIEW_OWED, review=found)

    def _settle(self, tx: Transaction, caller: Caller, review: Row[Any], state: str, people: Iterable[str]) -> None:
        if not self._after(tx, review, state, after_at=iso(self._s.clock())):
            return
        told: dict[str, object] = {"after_state": state, "people": sorted(people)}
        self._moves.record(tx, caller, review, f"after-review: {state}", said=told)
        if state == "rejected":
            title = "the glass should not have been broken"
            self._alarm(tx, caller, review, Kind.BREAK_GLASS_REJECTED, title, "critical", told)
        tx.wake(claims_key(review.perimeter))

    @staticmethod
    def _after(tx: Transaction, review: Row[Any], state: str, **values: Any) -> bool:
        there = (reviews.c.id == review.id) & (reviews.c.after_state == review.after_state)
        return tx.connection.execute(reviews.update().where(there).values(after_state=state, **values)).rowcount == 1

    def _alarm(  # noqa: PLR0917 - what happened, to what, how bad
        self,
        tx: Transaction,
        caller: Caller,
        review: Row[Any],
        kind: Kind,
        title: str,
        severity: Any,
        said: dict[str, object] | None = None,
    ) -> None:
        detail = {
            "review": review.id,
            "request_digest": review.request_digest,
            "group": review.group_name,
            **(said or {}),
        }
        subject = subject_of(caller, review)
        tx.record(
            self._s.events.detection_finding(
                self._s.clock(), subject, kind=kind.value, title=title, severity=severity, detail=detail
            )
        )
        self._notifications.tell(tx, kind=kind, review=review)


def overdue_error(review: str) -> ConflictError:
    """Return the refusal of whatever waits until somebody has looked at the broken glass of ``review``."""
    return ConflictError(
        f"the glass was broken for {review}, and nobody has looked at it in time",
        cure=f"its group decides first: saw review uphold {review}, or reject",
        code="after_review_overdue",
    )


def _enough(held: dict[str, Row[Any]], settings: BreakGlassSettings) -> bool:
    """Tell whether ``held`` are by enough people with as many different keys."""
    return min(len(held), len({row.key_sha256 for row in held.values()})) >= settings.keys


def _owed_beside(review: Row[Any]) -> Any:
    """Select the ids of reviews of the same workspace, or the same gate, that owe an after-review."""
    same: ColumnElement[bool] = (
        (reviews.c.kind == GATE) & (reviews.c.rule == review.rule)
        if review.kind == GATE
        else (reviews.c.kind != GATE) & (reviews.c.workspace_id == review.workspace_id)
    )
    return select(reviews.c.id).where(same, reviews.c.id != review.id, reviews.c.after_state.in_(OWED))


def _breakers(connection: Connection, review: Row[Any]) -> set[str]:
    """Return who signed to break the glass of ``review``, whether or not it counted."""
    query = select(review_decisions.c.approver).where(
        review_decisions.c.review_id == review.id, review_decisions.c.decision == "break_glass"
    )
    return set(connection.execute(query).scalars().all())
