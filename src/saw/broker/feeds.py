"""What feeds of changes have in common: whoever follows one after a backup was restored is told, and does not wait for ever."""

from __future__ import annotations

from sqlalchemy import Connection, select

from saw.broker.errors import ConflictError
from saw.broker.schema import registry

CHANGES = 1000
"""Most entries in one answer about changes."""


def require_reached(connection: Connection, after: int, what: str) -> None:
    """Raise ``feed_restarted`` (409) when the register has not come to number ``after``; ``what`` is the list to read again."""
    now = connection.execute(select(registry.c.seq)).scalar_one()
    if after > now:
        raise ConflictError(
            f"the register is at {now}, before {after}: it was restored, or is another one",
            cure=f"read the list of {what} again, and follow behind its seq",
            code="feed_restarted",
        )
