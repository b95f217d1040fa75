"""What replicas tell each other with a commit: the keys that it changed, so that their long-polls look at once.

PostgreSQL delivers a notification when its transaction is visible, and to nobody when it is undone.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from sqlalchemy import Connection, text

from saw import jsontext
from saw.broker.wake import Waker

CHANNEL = "saw_broker_wake"
#: PostgreSQL takes 7,999 bytes; what has more keys wakes everyone.
LONGEST = 7000
EVERYONE = "*everyone*"

_NOTIFY = text(f"SELECT pg_notify('{CHANNEL}', :told)")


class Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One notification: which replica wrote, and what it changed."""

    replica: int
    keys: tuple[str, ...]


def tell(connection: Connection, replica: int, keys: Iterable[str]) -> None:
    """Tell the other replicas, once this transaction has succeeded, that ``keys`` changed."""
    told = msgspec.json.encode(Told(replica, tuple(sorted(keys))))
    if len(told) > LONGEST:
        told = msgspec.json.encode(Told(replica, (EVERYONE,)))
    connection.execute(_NOTIFY, {"told": told.decode()})


def hear(waker: Waker, replica: int, payload: str) -> None:
    """Wake who waits here for what another replica changed. Whatever cannot be read wakes everyone: waking is harmless."""
    try:
        told = jsontext.decode(payload, kind=Told)
    except msgspec.DecodeError:
        waker.wake_all()
        return
    if told.replica == replica:
        return
    if EVERYONE in told.keys:
        waker.wake_all()
    else:
        waker.wake(told.keys)
