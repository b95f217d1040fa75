"""Which agents somebody asks for, page by page, and which have changed since a number of the register."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from sqlalchemy import ColumnElement, Connection, func, or_, select
from starlette.datastructures import QueryParams

from saw.broker.agent_states import STATES, AgentState, agent_view
from saw.broker.feeds import CHANGES, require_reached
from saw.broker.http import filters_of
from saw.broker.schema import agents, registry

LARGEST_PAGE = 10_000
"""Most agents in one page."""

_Text = Annotated[str, msgspec.Meta(max_length=256)]
#: Filter → column. Each may be given several times; one of the values must be met.
_COLUMNS = {
    "state": agents.c.state,
    "sponsor": agents.c.sponsor,
    "workspace": agents.c.workspace_id,
    "blueprint": agents.c.blueprint,
    "name": agents.c.name,
}


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Filters; an empty one lets everything through, several must all hold.

    ``text`` occurs in id, name, sponsor, owner or purpose; case does not matter. ``after`` is the id that the page begins
    behind, ``limit`` the most agents of a page (None: the most there are in one).
    """

    state: tuple[AgentState, ...] = ()
    sponsor: tuple[_Text, ...] = ()
    workspace: tuple[_Text, ...] = ()
    blueprint: tuple[_Text, ...] = ()
    name: tuple[_Text, ...] = ()
    text: _Text = ""
    after: _Text = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_PAGE)] = LARGEST_PAGE


def wanted(query: QueryParams) -> Wanted:
    """Return what ``query`` asks for; raises as :func:`saw.broker.http.filters_of`."""
    return filters_of(query, Wanted, _COLUMNS, f"see docs/agents.md; states are {', '.join(STATES)}")


def page(connection: Connection, asked: Wanted, sponsor: str | None = None) -> Mapping[str, Any]:
    """Return ``{agents, next, seq}`` in the order of ids, for ``sponsor`` only the own ones.

    ``next`` is the ``after`` of the page that follows, None at the end; behind ``seq`` :func:`changes` goes on.
    """
    query = select(agents).order_by(agents.c.id).limit(asked.limit + 1)
    for name, column in _COLUMNS.items():
        if values := getattr(asked, name):
            query = query.where(column.in_(values))
    if asked.text:
        columns = (agents.c.id, agents.c.name, agents.c.sponsor, agents.c.owner, agents.c.purpose)
        part = asked.text.lower()
        query = query.where(or_(*(func.lower(column).contains(part, autoescape=True) for column in columns)))
    if asked.after:
        query = query.where(agents.c.id > asked.after)
    if sponsor is not None:
        query = query.where(_own(sponsor))
    seq = connection.execute(select(registry.c.seq)).scalar_one()
    rows = connection.execute(query).all()
    more = len(rows) > asked.limit
    rows = rows[: asked.limit]
    return {"agents": [agent_view(row) for row in rows], "next": rows[-1].id if more else None, "seq": seq}


def changes(connection: Connection, after: int) -> dict[str, Any]:
    """Return ``{agents, next}``: those that have changed behind number ``after``, as they are now, the oldest change first,
    and the number to ask behind next. Raises ``feed_restarted`` for a number that this register has not reached."""
    require_reached(connection, after, "agents")
    query = select(agents).where(agents.c.seq > after).order_by(agents.c.seq, agents.c.id).limit(CHANGES)
    found = [agent_view(row) for row in connection.execute(query).all()]
    return {"agents": found, "next": found[-1]["seq"] if found else after}


def _own(sponsor: str) -> ColumnElement[bool]:
    """Sponsors are written as the operator wrote them; people's names are in lower case."""
    return or_(agents.c.sponsor == sponsor, func.lower(func.trim(agents.c.sponsor)) == sponsor.lower())
