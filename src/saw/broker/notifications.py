"""What people are told by webhook and e-mail: written down in the transaction of what happened, and what operators see of it.

A message carries a link and never a decision. Nothing is lost, because the row is there or the event is not, and nothing is told
that did not happen. How messages leave is in :mod:`saw.broker.notification_courier`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy import Connection, Row, func, select

from saw.broker.clock import iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.errors import ConflictError, MalformedError, NotFoundError
from saw.broker.notification_queue import UNENDED, NotDelivered, Queue, channel_key, record
from saw.broker.notification_settings import Channel, Kind
from saw.broker.notification_words import (
    Message,
    account_message,
    request_message,
    review_message,
    trial_message,
    workspace_message,
)
from saw.broker.schema import notifications
from saw.broker.store import Transaction

FOR = timedelta(hours=24)
"""How long a message is tried."""
KEEP = timedelta(days=7)
"""How long one that has ended is listed; what the trail says of it stays."""
MOST_WAITING = 1000
"""Most messages of a channel that wait; what comes on top of them is given up at once. Urgent ones do not count, and always wait:
agents open reviews, and must not be able to crowd out what people do."""
STEP = 500
"""Most messages that one look gives up, or removes."""
MAX_PAGE = 1000
STATES = (*UNENDED, "delivered", "given_up")


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A test of the channel of that name."""

    channel: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Notifications:
    """Tells people, and what became of it (control REV-01)."""

    def __init__(self, services: Services) -> None:
        self._s = services
        self._queue = Queue(services)
        self._channels: dict[str, Channel] = {one.name: one for one in services.config.notifications}

    def tell(
        self,
        tx: Transaction,
        *,
        kind: Kind | str,
        review: Row[Any] | None = None,
        workspace: str = "",
        request: str = "",
        account: str = "",
    ) -> int:
        """Have those told whom the configuration names for ``kind``, when ``tx`` succeeds; return how many messages that makes.

        ``review``: the row that it is about; without one it is about ``workspace``, or the policy ``request`` of its agent,
        or the ``account`` of the control host. Raises ValueError for an unknown kind.
        """
        kind = Kind(kind)
        group = "" if review is None else str(review.group_name)
        wanted = [one for one in self._channels.values() if one.takes(kind, group)]
        if not wanted:
            return 0
        now = self._s.clock()
        if review is not None:
            message = review_message(self._s.config, kind, review, now)
        elif request:
            message = request_message(self._s.config, kind, workspace, request, now)
        elif account:
            message = account_message(self._s.config, kind, account, now)
        else:
            message = workspace_message(self._s.config, kind, workspace, now)
        return sum(len(self._put(tx, one, one.recipients(group), message)) for one in wanted)

    def test(self, caller: Caller, body: Trial) -> dict[str, Any]:
        """Send a test to everyone whom a channel reaches; return the messages as they wait."""
        with self._s.store.write() as tx:
            channel = self._channel(body.channel)
            made = self._put(
                tx, channel, channel.everyone, trial_message(self._s.config, channel.name, self._s.clock())
            )
            for row in made:
                record(self._s, tx, caller, row, "notification.test", None)
            return {"notifications": [view(get_notification(tx.connection, row.id)) for row in made], "changed": True}

    def show(self, identifier: str) -> dict[str, Any]:
        """Return one message as operators see it."""
        with self._s.store.read() as connection:
            return view(get_notification(connection, identifier))

    def listed(self, *, state: str, channel: str, after: str, limit: int) -> dict[str, Any]:
        """Return ``{notifications, next, channels}``: messages, the newest first, and what is configured."""
        if state and state not in STATES:
            raise MalformedError(f"there is no state {state[:32]!r}", cure="use one of " + ", ".join(STATES))
        query = select(notifications).order_by(notifications.c.created_at.desc(), notifications.c.id.desc())
        if state:
            query = query.where(notifications.c.state == state)
        if channel:
            query = query.where(notifications.c.channel == channel)
        limit = max(1, min(limit, MAX_PAGE))
        with self._s.store.read() as connection:
            if after:
                last = get_notification(connection, after)
                query = query.where(
                    (notifications.c.created_at < last.created_at)
                    | ((notifications.c.created_at == last.created_at) & (notifications.c.id < last.id))
                )
            rows = connection.execute(query.limit(limit + 1)).all()
        more = len(rows) > limit
        return {
            "notifications": [view(row) for row in rows[:limit]],
            "next": rows[limit - 1].id if more else None,
            "channels": [_channel_view(one) for one in self._channels.values()],
        }

    def retry(self, caller: Caller, identifier: str) -> dict[str, Any]:
        """Try a message again now, and for another day; one that is being sent stays as it is.

        Raises :class:`ConflictError` for one that was delivered, or whose channel is there no longer.
        """
        with self._s.store.write() as tx:
            row = get_notification(tx.connection, identifier)
            if row.state == "delivered":
                raise ConflictError(f"{row.id} was delivered", cure="nothing is left to send", code="delivered")
            if row.channel not in self._channels or row.recipient not in self._channels[row.channel].everyone:
                raise ConflictError(
                    f"{row.id} was for {row.recipient or row.channel}, which is configured no longer",
                    cure="see the role variable broker_notifications",
                    code="channel_changed",
                )
            changed = row.state != "sending"
            if changed:
                now = self._s.clock()
                values = {
                    "state": "waiting",
                    "attempts": 0,
                    "next_at": iso(now),
                    "until": iso(now + FOR),
                    "ended_at": None,
                }
                tx.connection.execute(notifications.update().where(notifications.c.id == row.id).values(**values))
                record(self._s, tx, caller, row, "notification.retry", None)
                tx.wake(channel_key(row.channel))
            return {**view(get_notification(tx.connection, row.id)), "changed": changed}

    def tick(self) -> None:
        """Give up what nobody took for a day, and remove what ended long ago."""
        now = self._s.clock()
        late = notifications.c.state.in_(UNENDED) & (notifications.c.until <= iso(now))
        late &= (notifications.c.state == "waiting") | (notifications.c.next_at <= iso(now))
        old = notifications.c.state.not_in(UNENDED) & (notifications.c.ended_at <= iso(now - KEEP))
        with self._s.store.read() as connection:
            if connection.execute(select(notifications.c.id).where(late | old).limit(1)).first() is None:
                return
        with self._s.store.write() as tx:
            for row in tx.connection.execute(select(notifications).where(late).limit(STEP)).all():
                why = f"nobody took it in {FOR.total_seconds() / 3600:.0f} hours"
                words = f"{why}; the last attempt: {row.error}" if row.error else why
                self._queue.give_up(tx, row, NotDelivered(words, code="too_old"))
            gone = tx.connection.execute(select(notifications.c.id).where(old).limit(STEP)).scalars().all()
            if gone:
                tx.connection.execute(notifications.delete().where(notifications.c.id.in_(gone)))
                self._record_removal(tx, len(gone))

    def _put(self, tx: Transaction, channel: Channel, recipients: tuple[str, ...], message: Message) -> list[Row[Any]]:
        """Write a message down for each of ``recipients``; one too many is given up at once."""
        now = self._s.clock()
        mine = (notifications.c.channel == channel.name) & notifications.c.state.in_(UNENDED) & ~notifications.c.urgent
        waiting = tx.connection.execute(select(func.count()).select_from(notifications).where(mine)).scalar_one()
        body, made = msgspec.json.encode(message).decode(), []
        for number, recipient in enumerate(recipients, 1):
            identifier = self._s.new_id("msg")
            tx.connection.execute(
                notifications.insert().values(
                    id=identifier,
                    kind=message.type,
                    channel=channel.name,
                    recipient=recipient,
                    workspace_id=message.data.workspace,
                    review_id=message.data.review,
                    group_name=message.data.group,
                    urgent=message.data.urgent,
                    body=body,
                    state="waiting",
                    attempts=0,
                    created_at=iso(now),
                    next_at=iso(now),
                    until=iso(now + FOR),
                )
            )
            made.append(get_notification(tx.connection, identifier))
            if waiting + number > MOST_WAITING and not message.data.urgent:
                words = f"{MOST_WAITING} messages of {channel.name} wait already"
                self._queue.give_up(tx, made[-1], NotDelivered(words, code="too_many"))
        tx.wake(channel_key(channel.name))
        return made

    def _channel(self, name: str) -> Channel:
        found = self._channels.get(name)
        if found is None:
            raise NotFoundError(
                f"there is no channel {name[:64]!r}",
                cure="see the role variable broker_notifications",
                code="unknown_channel",
            )
        return found

    def _record_removal(self, tx: Transaction, count: int) -> None:
        tx.record(
            self._s.events.api_activity(
                self._s.clock(),
                BROKER.subject(),
                "notification.retention.remove",
                activity="delete",
                message=f"{count} messages that ended more than {KEEP.days} days ago were removed",
                detail={"notifications": count, "days": KEEP.days},
            )
        )


def get_notification(connection: Connection, identifier: str) -> Row[Any]:
    """Return the row of a message or raise :class:`NotFoundError`."""
    row = connection.execute(select(notifications).where(notifications.c.id == identifier)).one_or_none()
    if row is None:
        raise NotFoundError(
            f"there is no message {identifier[:64]!r}", cure="saw notify list shows them", code="unknown_notification"
        )
    return row


def view(row: Row[Any]) -> dict[str, Any]:
    """Return what operators see of a message."""
    names = ("id", "kind", "channel", "recipient", "state", "attempts", "created_at", "next_at", "until", "ended_at")
    return {
        **{name: getattr(row, name) for name in names},
        "workspace": row.workspace_id,
        "review": row.review_id,
        "group": row.group_name,
        "error": None if row.error_code is None else {"code": row.error_code, "message": row.error},
    }


def _channel_view(channel: Channel) -> dict[str, Any]:
    """Return what operators see of a channel: neither its URL nor the names of its files."""
    return {
        "name": channel.name,
        "type": type(channel).__name__.lower(),
        "groups": list(channel.groups),
        "kinds": sorted(kind for kind in Kind if any(channel.takes(kind, group) for group in channel.groups or ("",))),
    }
