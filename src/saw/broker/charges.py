"""What calls of model services cost, out of the gatekeepers' events: kept once for each charge, and added up for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from sqlalchemy import ColumnElement, Connection, case, func, select

from saw.audit import ChainedEvent
from saw.broker.clock import days, iso
from saw.broker.context import Services
from saw.broker.schema import charges
from saw.broker.store import Transaction

MOST_OF_ONE = 10**15
"""What one charge adds at most, so that no gatekeeper makes sums of the database overflow."""
Amount = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Short = Annotated[str, msgspec.Meta(max_length=256)]
Day = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")]


class ChargeSaid(msgspec.Struct, frozen=True, kw_only=True):
    """What an event says of a charge (docs/budgets.md). Amounts are millionths of ``currency``; the events may say more."""

    charge: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    id: Short
    state: Literal["open", "settled", "released", "expired"]
    scope: Literal["engagement", "workspace", "blueprint"]
    subject: Short
    period: Literal["day", "week", "month"]
    start: Day
    end: Day
    currency: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{3}\Z")]
    limit: Amount
    model: Short
    service: Short
    blueprint: Short
    engagement: Short
    at: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T", max_length=40)]
    reserved: Amount
    spent: Amount = 0
    metered: bool = False
    input_tokens: Amount = 0
    output_tokens: Amount = 0


class ChargeTally:
    """The charges that one shipment tells of. An event that says nothing clear is kept in the trail and not counted."""

    def __init__(self) -> None:
        self._said: list[tuple[str, str, ChargeSaid]] = []

    def add(self, item: ChainedEvent) -> None:
        """Note what ``item`` says of a charge, if it does."""
        ours = _part(item.event, "unmapped", "saw")
        said, workspace = ours.get("budget"), ours.get("workspace")
        if not isinstance(said, Mapping) or "charge" not in said or not isinstance(workspace, str):
            return
        try:
            self._said.append((item.source, workspace[:64], msgspec.convert(said, ChargeSaid)))
        except msgspec.ValidationError:
            return

    def write(self, tx: Transaction) -> None:
        """Store what was said: the end of a charge takes the place of its beginning, never the other way round."""
        for source, workspace, said in self._said:
            where = (charges.c.source == source) & (charges.c.id == said.charge)
            known = tx.connection.execute(select(charges.c.state).where(where)).scalar_one_or_none()
            if known is None:
                tx.connection.execute(charges.insert().values(source=source, id=said.charge, **_row(workspace, said)))
            elif said.state != "open" and not (known != "open" and said.state == "expired"):
                tx.connection.execute(charges.update().where(where).values(**_row(workspace, said)))


class Charges:
    """What operators are told about costs."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def show(self, first: str | None, last: str | None, workspace: str | None) -> dict[str, Any]:
        """Return the budgets whose period holds the day ``last`` (default: today), and what was charged from ``first`` to it.

        Amounts are millionths of ``currency``. Budgets are told for all workspaces, unless ``workspace`` is given.
        """
        first, last = days(first, last, self._s.clock())
        mine = charges.c.workspace_id == workspace if workspace else charges.c.workspace_id != ""
        of_line = (
            charges.c.day, charges.c.workspace_id.label("workspace"), charges.c.engagement, charges.c.blueprint,
            charges.c.budget, charges.c.model, charges.c.service, charges.c.currency,
        )  # fmt: skip
        ended = case((charges.c.state != "open", 1), else_=0)
        blind = case((charges.c.state.in_(("settled", "expired")) & ~charges.c.metered, 1), else_=0)
        lines = (
            select(
                *of_line,
                func.sum(ended).label("calls"),
                func.sum(blind).label("unmetered"),
                _HELD.label("reserved"),
                _SPENT.label("spent"),
                func.sum(charges.c.input_tokens).label("input_tokens"),
                func.sum(charges.c.output_tokens).label("output_tokens"),
            )
            .where(charges.c.day >= first, charges.c.day <= last, mine)
            .group_by(*of_line)
            .order_by(*of_line)
        )
        with self._s.store.read() as connection:
            budgets = _budgets(connection, last, mine)
            found = [dict(row) for row in connection.execute(lines).mappings()]
        return {"first": first, "last": last, "budgets": budgets, "charges": [_whole(line) for line in found]}

    def of_workspaces(self, connection: Connection, blueprints: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Return for each workspace (id → its blueprint) what it has cost in this month (UTC), and the budgets it draws on.

        ``spent`` and ``reserved`` are by currency. A budget that others share has what they spent in it too, and what is left
        is what is left for all of them.
        """
        today = iso(self._s.clock())[:10]
        month = f"{today[:7]}-01"
        ids = list(blueprints)
        spent = (
            select(charges.c.workspace_id, charges.c.currency, _HELD.label("reserved"), _SPENT.label("spent"))
            .where(charges.c.day >= month, charges.c.day <= today, charges.c.workspace_id.in_(ids))
            .group_by(charges.c.workspace_id, charges.c.currency)
            .order_by(charges.c.currency)
        )
        shared = (charges.c.scope == "blueprint") & charges.c.subject.in_(set(blueprints.values()))
        found: dict[str, dict[str, Any]] = {one: {"since": month, "spent": [], "budgets": []} for one in ids}
        for row in connection.execute(spent):
            line = {"currency": row.currency, "spent": int(row.spent), "reserved": int(row.reserved)}
            found[row.workspace_id]["spent"].append(line)
        for budget in _budgets(connection, today, charges.c.workspace_id.in_(ids) | shared):
            for one, blueprint in blueprints.items():
                if _draws_on(one, blueprint, budget):
                    found[one]["budgets"].append(budget)
        return found


def _draws_on(workspace: str, blueprint: str, budget: Mapping[str, Any]) -> bool:
    """Tell whether a budget is the workspace's; its subject is what the gatekeeper counts for (docs/budgets.md)."""
    if budget["scope"] == "blueprint":
        return bool(budget["subject"] == blueprint)
    return str(budget["subject"]).partition("/")[0] == workspace


_HELD = func.sum(case((charges.c.state == "open", charges.c.reserved), else_=0))
_SPENT = func.sum(charges.c.spent)


def _budgets(connection: Connection, day: str, wanted: ColumnElement[bool]) -> list[dict[str, Any]]:
    """Return the budgets whose period holds ``day``, counted over the charges that are ``wanted``."""
    of_budget = (
        charges.c.budget, charges.c.scope, charges.c.subject, charges.c.currency, charges.c.period, charges.c.start,
        charges.c.end,
    )  # fmt: skip
    counted = (
        select(
            *of_budget,
            charges.c.limit,
            _HELD.label("reserved"),
            _SPENT.label("spent"),
            func.max(charges.c.at).label("at"),
        )
        .where(charges.c.start <= day, charges.c.end > day, wanted)
        .group_by(*of_budget, charges.c.limit)
    )
    return _merged([dict(row) for row in connection.execute(counted).mappings()])


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add up rows of the same budget and period; the limit is the one that was in force last."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: str(row["at"])):
        key = tuple(str(row[name]) for name in ("budget", "subject", "currency", "period", "start"))
        known = found.setdefault(key, {**row, "reserved": 0, "spent": 0})
        known["limit"] = int(row["limit"])
        known["reserved"] += int(row["reserved"])
        known["spent"] += int(row["spent"])
        known["left"] = max(0, known["limit"] - known["reserved"] - known["spent"])
    return [{name: value for name, value in found[key].items() if name != "at"} for key in sorted(found)]


def _whole(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line with its sums as plain integers (PostgreSQL adds big integers up to decimals)."""
    sums = ("calls", "unmetered", "reserved", "spent", "input_tokens", "output_tokens")
    return {**line, **{name: int(line[name]) for name in sums}}


def _row(workspace: str, said: ChargeSaid) -> dict[str, Any]:
    return {
        "workspace_id": workspace,
        "engagement": said.engagement,
        "blueprint": said.blueprint,
        "budget": said.id,
        "scope": said.scope,
        "subject": said.subject,
        "period": said.period,
        "start": said.start,
        "end": said.end,
        "currency": said.currency,
        "limit": said.limit,
        "model": said.model,
        "service": said.service,
        "state": said.state,
        "reserved": min(said.reserved, MOST_OF_ONE),
        "spent": min(said.spent, MOST_OF_ONE),
        "metered": said.metered,
        "input_tokens": min(said.input_tokens, MOST_OF_ONE),
        "output_tokens": min(said.output_tokens, MOST_OF_ONE),
        "at": said.at,
        "day": said.at[:10],
    }


def _part(value: Any, *names: str) -> Mapping[str, Any]:
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}
