"""The outbox as deliveries see it: a message is claimed by one of all brokers, and ends as delivered or given up.

A claim is one compare-and-set. A broker that dies with one leaves the message to be sent again after :data:`CLAIM_FOR`, with the
same id: each message goes out at least once, and who takes it drops what came twice.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import msgspec
from sqlalchemy import Row, select

from saw.broker.clock import iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.schema import notifications
from saw.broker.store import Transaction
from saw.errors import SawError

CLAIM_FOR = timedelta(seconds=90)
"""How long one attempt may take, all that is written about it included."""
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 900.0
UNENDED = ("waiting", "sending")


class NotDelivered(SawError):
    """A message was not taken. ``gives_up``: no further attempt can help; ``wait_s``: the least pause that the far end wants."""

    code = "not_delivered"

    def __init__(self, message: str, *, code: str, cure: str = "", gives_up: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(message, cure=cure)
        self.code = code
        self.gives_up = gives_up
        self.wait_s = wait_s


class Claimed(msgspec.Struct, frozen=True):
    """A message that this broker alone sends now. ``body`` is the text of a :class:`~saw.broker.notification_words.Message`."""

    id: str
    claim: str
    channel: str
    recipient: str
    body: str
    attempt: int


def channel_key(channel: str) -> str:
    """Return the key under which the deliveries of ``channel`` wait for work."""
    return f"notify:{channel}"


def notification_key(identifier: str) -> str:
    """Return the key under which somebody waits for the end of an attempt."""
    return f"notification:{identifier}"


class Queue:
    """Messages of channels: claimed, delivered, tried again, given up."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def claim(self, channel: str) -> tuple[Claimed | None, str | None]:
        """Claim what is due in ``channel``, urgent ones first; else return when something is due next, None for never."""
        now = self._s.clock()
        mine = (notifications.c.channel == channel) & notifications.c.state.in_(UNENDED)
        due = mine & (notifications.c.next_at <= iso(now)) & (notifications.c.until > iso(now))
        order = (notifications.c.urgent.desc(), notifications.c.next_at, notifications.c.id)
        with self._s.store.read() as connection:
            found = connection.execute(select(notifications.c.id).where(due).limit(1)).first()
            # What is past its time is given up by whoever does the upkeep, and is no work here.
            later = select(notifications.c.next_at).where(mine, notifications.c.until > iso(now))
            upcoming = connection.execute(later.order_by(notifications.c.next_at).limit(1)).scalar_one_or_none()
        if found is None:
            return None, upcoming
        with self._s.store.write() as tx:
            row = tx.connection.execute(select(notifications).where(due).order_by(*order).limit(1)).one_or_none()
            if row is None:  # another broker was faster
                return None, upcoming
            token = self._s.random(16).hex()
            values = {"state": "sending", "claim": token, "next_at": iso(now + CLAIM_FOR), "attempts": row.attempts + 1}
            tx.connection.execute(notifications.update().where(notifications.c.id == row.id).values(**values))
        return Claimed(row.id, token, row.channel, row.recipient, row.body, row.attempts + 1), None

    def delivered(self, claimed: Claimed) -> None:
        """Note that the far end has taken a message."""
        with self._s.store.write() as tx:
            row = self._held(tx, claimed)
            if row is not None:
                self._end(tx, row, "delivered", None)

    def failed(self, claimed: Claimed, error: NotDelivered) -> None:
        """Note that it was not taken: it is tried again after a pause that grows, or given up when that cannot help."""
        with self._s.store.write() as tx:
            row = self._held(tx, claimed)
            if row is None:
                return
            if error.gives_up:
                self.give_up(tx, row, error)
                return
            again = self._s.clock() + timedelta(seconds=max(self._pause(claimed.attempt), error.wait_s))
            values = {"state": "waiting", "claim": None, "next_at": iso(again), **_words(error)}
            tx.connection.execute(notifications.update().where(notifications.c.id == row.id).values(**values))
            tx.wake(channel_key(row.channel), notification_key(row.id))

    def give_up(self, tx: Transaction, row: Row[Any], error: NotDelivered, caller: Caller = BROKER) -> None:
        """End a message that nobody was told, with an event that says so."""
        self._end(tx, row, "given_up", error, caller)

    def release(self) -> None:
        """Take back what a broker that has ended was sending. For the one broker of a database, when it starts."""
        sending = notifications.c.state == "sending"
        with self._s.store.read() as connection:
            if connection.execute(select(notifications.c.id).where(sending).limit(1)).first() is None:
                return
        with self._s.store.write() as tx:
            values = {"state": "waiting", "claim": None, "next_at": iso(self._s.clock())}
            tx.connection.execute(notifications.update().where(sending).values(**values))

    def _held(self, tx: Transaction, claimed: Claimed) -> Row[Any] | None:
        """Return the row of a claim; None when it was lost meanwhile."""
        there = (notifications.c.id == claimed.id) & (notifications.c.state == "sending")
        there &= notifications.c.claim == claimed.claim
        return tx.connection.execute(select(notifications).where(there)).one_or_none()

    def _end(
        self,
        tx: Transaction,
        row: Row[Any],
        state: Literal["delivered", "given_up"],
        error: NotDelivered | None,
        caller: Caller = BROKER,
    ) -> None:
        values = {"state": state, "claim": None, "ended_at": iso(self._s.clock()), **_words(error)}
        tx.connection.execute(notifications.update().where(notifications.c.id == row.id).values(**values))
        what = "notification.deliver" if error is None else "notification.give_up"
        record(self._s, tx, caller, row, what, error)
        tx.wake(notification_key(row.id))

    def _pause(self, attempt: int) -> float:
        """Return the pause after an attempt: twice the last one, up to a quarter of an hour, less up to half by chance."""
        whole = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(attempt - 1, 16))
        return whole * (1 - int.from_bytes(self._s.random(2)) / 2**17)


def record(  # noqa: PLR0917 - the one place that audits messages
    services: Services, tx: Transaction, caller: Caller, row: Row[Any], operation: str, error: NotDelivered | None
) -> None:
    """Audit something about a message: which, to whom, about what. Its words and the far end's are not in it."""
    told: dict[str, object] = {"kind": row.kind, "channel": row.channel, "recipient": row.recipient}
    told |= {"review": row.review_id, "attempts": row.attempts}
    tx.record(
        services.events.api_activity(
            services.clock(),
            caller.subject(row.workspace_id),
            operation,
            activity="other",
            outcome="success" if error is None else "failure",
            resource=("notification", row.id),
            status_detail="" if error is None else error.code,
            detail=told,
        )
    )


def _words(error: NotDelivered | None) -> dict[str, str | None]:
    if error is None:
        return {"error_code": None, "error": None}
    return {"error_code": error.code[:64], "error": error.message[:256]}
