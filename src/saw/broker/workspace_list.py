"""Which workspaces somebody asks for, page by page, and which have changed since a number of the register."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from sqlalchemy import Connection, Row, func, or_, select
from starlette.datastructures import QueryParams

from saw.broker.feeds import CHANGES, require_reached
from saw.broker.http import filters_of
from saw.broker.lifecycle import parse_state
from saw.broker.registry import HIDDEN
from saw.broker.schema import registry, workspaces

LARGEST_PAGE = 10_000
"""Most workspaces in one page."""

_Text = Annotated[str, msgspec.Meta(max_length=256)]
#: Filter → column. Each may be given several times; one of the values must be met.
_COLUMNS = {name: workspaces.c[name] for name in ("state", "sponsor", "blueprint", "ring", "image")}
#: What operators see, as :func:`saw.broker.registry.public_view` has it for one workspace: keys stay in the database.
_SHOWN = (
    *(column for column in workspaces.c if column.name not in HIDDEN),
    workspaces.c.ek_pub_pem.is_not(None).label("ek_recorded"),
)


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Filters; an empty one lets everything through, several must all hold.

    ``text`` occurs in the id or the sponsor; case does not matter. ``after`` is the id that the page begins behind, ``limit``
    the most workspaces of a page (None: all of them).
    """

    state: tuple[_Text, ...] = ()
    sponsor: tuple[_Text, ...] = ()
    blueprint: tuple[_Text, ...] = ()
    ring: tuple[_Text, ...] = ()
    image: tuple[_Text, ...] = ()
    text: _Text = ""
    after: _Text = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_PAGE)] | None = None


def wanted(query: QueryParams) -> Wanted:
    """Return what ``query`` asks for; raises as :func:`saw.broker.http.filters_of`, and for a state that does not exist."""
    found = filters_of(query, Wanted, _COLUMNS, "see docs/architecture.md")
    for name in found.state:
        parse_state(name)
    return found


def page(connection: Connection, asked: Wanted) -> Mapping[str, Any]:
    """Return ``{workspaces, next, seq}`` in the order of ids; ``next`` is the ``after`` of the following page, None at the end.

    Pages are read one after the other: a workspace that is registered meanwhile may be missing, none comes twice. Behind ``seq``
    of the first page :func:`changes` goes on.
    """
    seq = connection.execute(select(registry.c.seq)).scalar_one()
    query = select(*_SHOWN).order_by(workspaces.c.id)
    for name, column in _COLUMNS.items():
        if values := getattr(asked, name):
            query = query.where(column.in_(values))
    if asked.text:
        part = asked.text.lower()
        query = query.where(
            or_(*(func.lower(workspaces.c[name]).contains(part, autoescape=True) for name in ("id", "sponsor")))
        )
    if asked.after:
        query = query.where(workspaces.c.id > asked.after)
    if asked.limit is not None:
        query = query.limit(asked.limit + 1)
    rows = connection.execute(query).all()
    more = asked.limit is not None and len(rows) > asked.limit
    rows = rows[: asked.limit]
    return {"workspaces": _views(rows), "next": rows[-1].id if more else None, "seq": seq}


def changes(connection: Connection, after: int, behind: str) -> dict[str, Any]:
    """Return ``{workspaces, next, behind}``: those that changed behind number ``after``, as they are now, the oldest first.

    A change of many workspaces has one number: ``behind`` is the id up to which those of number ``after`` were told, empty for
    all of them. The answer has both for the next question. Besides changes of the version, releases and delegations that a
    workspace has to hear of count as changes, and another policy that it runs; renewals and reports of workspaces do not.
    Raises ``feed_restarted`` for a number that this register has not reached.
    """
    require_reached(connection, after, "workspaces")
    number = workspaces.c.watch_seq
    later = number > after
    if behind:
        later = or_(later, (number == after) & (workspaces.c.id > behind))
    rows = connection.execute(select(*_SHOWN).where(later).order_by(number, workspaces.c.id).limit(CHANGES)).all()
    if not rows:
        return {"workspaces": [], "next": after, "behind": behind}
    return {"workspaces": _views(rows), "next": rows[-1].watch_seq, "behind": rows[-1].id}


def _views(rows: Sequence[Row[Any]]) -> list[dict[str, Any]]:
    names = [column.key for column in _SHOWN]
    return [dict(zip(names, row, strict=True)) for row in rows]
