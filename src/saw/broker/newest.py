"""Lists whose newest rows come first, page by page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, Connection, Row, Select, and_, or_, select

from saw.broker.errors import MalformedError


def newest_page(
    connection: Connection, query: Select[Any], at: Column[Any], after: str, limit: int | None
) -> tuple[Sequence[Row[Any]], str | None]:
    """Return a page of ``query``, the newest first by the column ``at``, and the ``after`` of the page that follows.

    ``after`` is the id behind which the page begins (empty: the first page), ``limit`` the most rows (None: all). The second is
    None at the end. No row comes twice. One that is made meanwhile is on no later page, unless it is of the same time as the last
    row of a page, to the column's millisecond. Raises :class:`MalformedError` for an id that the table does not have.
    """
    identifier = at.table.c.id
    query = query.order_by(at.desc(), identifier)
    if after:
        last = connection.execute(select(at).where(identifier == after)).scalar_one_or_none()
        if last is None:
            raise MalformedError(f"no page ends with {after[:64]!r}", cure="begin at the first page")
        query = query.where(or_(at < last, and_(at == last, identifier > after)))
    if limit is None:
        return connection.execute(query).all(), None
    rows = connection.execute(query.limit(limit + 1)).all()
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None
