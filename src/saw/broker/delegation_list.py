"""Which delegations somebody asks for, page by page, and which have changed since a number of the register."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, func, or_, select
from starlette.datastructures import QueryParams

from saw.broker.clock import iso
from saw.broker.delegation_ends import record_of
from saw.broker.feeds import require_reached
from saw.broker.http import filters_of
from saw.broker.newest import newest_page
from saw.broker.registry import get_row
from saw.broker.schema import delegations, registry

LARGEST_PAGE = 1000
"""Most delegations in one page, and in one answer about changes."""

DelegationState = Literal["active", "ended", "revoked"]
_Id = Annotated[str, msgspec.Meta(max_length=64)]
_REPEATED = frozenset({"workspace_id", "state"})


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Filters; an empty one lets everything through, both must hold.

    ``after`` is the id that the page begins behind, ``limit`` the most delegations of a page.
    """

    workspace_id: tuple[_Id, ...] = ()
    state: tuple[DelegationState, ...] = ()
    after: _Id = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_PAGE)] = LARGEST_PAGE


def wanted(query: QueryParams) -> Wanted:
    """Return what ``query`` asks for; raises as :func:`saw.broker.http.filters_of`."""
    return filters_of(query, Wanted, _REPEATED, "see docs/delegation.md")


def page(connection: Connection, asked: Wanted, now: datetime) -> dict[str, Any]:
    """Return ``{delegations, next, seq}``, the newest first.

    ``next`` is the ``after`` of the page that follows, None at the end; behind ``seq`` :func:`changes` goes on. Raises
    :class:`saw.broker.errors.NotFoundError` for a workspace that does not exist.
    """
    seq = connection.execute(select(registry.c.seq)).scalar_one()
    query = select(delegations).where(*_filters(connection, asked, now))
    rows, following = newest_page(connection, query, delegations.c.issued_at, asked.after, asked.limit)
    return {"delegations": [delegation_view(row, now) for row in rows], "next": following, "seq": seq}


def count(connection: Connection, asked: Wanted, now: datetime) -> int:
    """Return how many delegations meet the filters, on all pages together."""
    query = select(func.count()).select_from(delegations).where(*_filters(connection, asked, now))
    return int(connection.execute(query).scalar_one())


def changes(connection: Connection, after: int, now: datetime) -> dict[str, Any]:
    """Return ``{delegations, next}``: those issued or revoked behind number ``after``, as they are now, the oldest change first,
    and the number to ask behind next. Changes that came at once are never torn apart. Raises ``feed_restarted`` for a number that
    this register has not reached.
    """
    require_reached(connection, after, "delegations")
    query = select(delegations).order_by(delegations.c.seq, delegations.c.id)
    rows = list(connection.execute(query.where(delegations.c.seq > after).limit(LARGEST_PAGE)).all())
    if len(rows) == LARGEST_PAGE:
        last = delegations.c.seq == rows[-1].seq
        rows += connection.execute(query.where(last, delegations.c.id > rows[-1].id)).all()
    return {"delegations": [delegation_view(row, now) for row in rows], "next": rows[-1].seq if rows else after}


def delegation_view(row: Row[Any], now: datetime) -> dict[str, Any]:
    """Return a delegation as it is answered: its record, and how it stands at ``now``."""
    record = record_of(row)
    state: DelegationState = "revoked" if row.revoked_at else "active" if record.live(now) else "ended"
    return {
        **msgspec.to_builtins(record),
        "state": state,
        "issued_by": row.issued_by,
        "issued_at": row.issued_at,
        "revoked_by": row.revoked_by,
        "revoked_at": row.revoked_at,
        "revoked_reason": row.revoked_reason,
        "version": row.version,
        "seq": row.seq,
    }


def _filters(connection: Connection, asked: Wanted, now: datetime) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if asked.workspace_id:
        found.append(delegations.c.workspace_id.in_([get_row(connection, one).id for one in asked.workspace_id]))
    if asked.state:
        kept, past = delegations.c.revoked_at.is_(None), delegations.c.expires_at <= iso(now)
        each = {"active": kept & ~past, "ended": kept & past, "revoked": ~kept}
        found.append(or_(*(each[name] for name in asked.state)))
    return found
