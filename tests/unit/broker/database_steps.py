"""A database that walks up from the first step of the register to the last, with rows in every table at each step on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import msgspec
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, MetaData, Table

from saw.audit import Chain, EventFactory, Head, Subject, verify_chain
from saw.broker import schema
from saw.broker.clock import parse_iso
from saw.broker.store import Store, chained_rows, read_head

AT = "2026-11-01T08:00:00.000Z"
AT_MS = 1_793_520_000_000
#: Tables that are no rows of ours: alembic's own, the one row of the register, and the trail, which has to be a chain.
_BY_HAND = frozenset({"alembic_version", "registry", "audit_events", "audit_heads"})
#: Their keys count up by themselves.
_COUNTED = frozenset({("policy_states", "id"), ("review_decisions", "id")})
#: What a step reads, so that it has to make sense: of the row without optional values, and of the one with all.
_SENSE: dict[tuple[str, str], tuple[str, str]] = {
    ("workspaces", "state"): ("active", "decommissioned"),
    ("agents", "state"): ("active", "retired"),
    ("delegations", "revoked_at"): ("", AT),
}

Dump = dict[str, list[dict[str, Any]]]
Copied = Callable[[str], AbstractContextManager[Store]]
"""Makes a copy of the walking database under a name, opens it as a broker does, and ends it."""


def config(connection: Connection) -> Config:
    found = Config()
    found.set_main_option("script_location", "saw.broker:migrations")
    found.set_main_option("path_separator", "os")
    found.attributes["connection"] = connection
    return found


def revisions() -> list[str]:
    """Every step, the first one first."""
    script = Config()
    script.set_main_option("script_location", "saw.broker:migrations")
    script.set_main_option("path_separator", "os")
    return [one.revision for one in ScriptDirectory.from_config(script).walk_revisions()][::-1]


def check_every_step(engine: Engine, copied: Copied) -> None:
    """Take ``engine``'s empty database up step by step; from each one a copy goes to the last step at once, and is compared."""
    for revision in revisions():
        with engine.begin() as connection:
            command.upgrade(config(connection), revision)
            tables = MetaData()
            tables.reflect(connection)
            _fill(connection, tables, revision)
            before = _dump(connection, tables)
        engine.dispose()
        assert all(before[name] for name in before if name != "alembic_version"), revision
        with copied(revision) as store, store.read() as connection:
            for problem in _problems(before, _dump(connection, schema.metadata), connection):
                raise AssertionError(f"from step {revision}: {problem}")
        engine.dispose()


def _fill(connection: Connection, tables: MetaData, revision: str) -> None:
    """Put two rows into every table: one with all optional values, one with none."""
    for table in tables.tables.values():
        if table.name not in _BY_HAND:
            rows = [_row(table, int(revision), number) for number in (0, 1)]
            # Before agents were things of their own one could be lost; the step finds it in its workspace.
            for row in rows[1:] if table.name == "agents" and revision < "0017" else rows:
                connection.execute(table.insert().values(**row))
    _write_trail(connection, tables, revision)
    registry = tables.tables["registry"]
    connection.execute(registry.update().values(seq=int(revision) * 1000))


def _row(table: Table, step: int, number: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column in table.columns:
        place = (table.name, column.name)
        if place in _COUNTED or (column.nullable and not number):
            continue
        found[column.name] = _SENSE[place][number] if place in _SENSE else _value(column, step, number)
    name, agent = f"ws-{step}-{number}", f"agent-{step}-{number}"
    if table.name == "workspaces":
        found |= {"id": name, "agent_id": agent, "state_since": AT, "state_reason": "as it was"}
    if table.name == "agents":
        found |= {"id": agent, "workspace_id": name}
    return found


def _value(column: sa.Column[Any], step: int, number: int) -> Any:
    unique = step * 10 + number
    if isinstance(column.type, sa.Boolean):
        return bool(number)
    if isinstance(column.type, sa.Integer):
        return unique
    if isinstance(column.type, sa.LargeBinary):
        return f"{unique:04}\0\xff-{column.name}".encode("latin-1")
    length = getattr(column.type, "length", None)
    return f"{unique:03}-{column.name}"[:length] if length else f"{unique:03} ü\n\"'{{}} {column.name}"


def _write_trail(connection: Connection, tables: MetaData, revision: str) -> None:
    """Go on with the chains of the broker and of a perimeter."""
    events, heads = tables.tables["audit_events"], tables.tables["audit_heads"]
    factory = EventFactory("saw-test", host="here", new_uid=lambda: f"uid-{revision}")
    for source in ("broker", "edge"):
        head = connection.execute(sa.select(heads).where(heads.c.source == source)).one_or_none()
        chain = Chain(source, Head() if head is None else Head(head.seq, head.hash))
        for _ in range(2):
            event = factory.api_activity(parse_iso(AT), Subject(principal="operator:röt"), f"step.{revision}")
            item = chain.append(event)
            values = {
                "source": source,
                "seq": item.seq,
                "prev": item.prev,
                "hash": item.hash,
                "event": msgspec.json.encode(item.event).decode(),
            }
            if "position" in events.c:
                values["position"] = connection.execute(sa.select(sa.func.max(events.c.position))).scalar_one() + 1
            if "at" in events.c:
                values["at"] = AT_MS
            connection.execute(events.insert().values(**values))
        connection.execute(heads.delete().where(heads.c.source == source))
        connection.execute(heads.insert().values(source=source, seq=chain.head.seq, hash=chain.head.hash))


def _dump(connection: Connection, tables: MetaData) -> Dump:
    return {
        table.name: [dict(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key)).mappings()]
        for table in tables.tables.values()
    }


def _problems(before: Dump, after: Dump, connection: Connection) -> Iterator[str]:
    """Yield what of ``before`` is not in ``after`` as it was, what came by itself, and new columns that hold something else."""
    for name, rows in before.items():
        if name == "alembic_version":
            continue
        keys = [column.name for column in schema.metadata.tables[name].primary_key]
        held = {tuple(row[key] for key in keys): row for row in after[name]}
        for row in rows:
            key = tuple(row[name] for name in keys)
            if key not in held:
                yield f"{name} has lost {key}"
            elif changed := {column for column, value in row.items() if held[key].get(column) != value}:
                yield f"{name} {key}: {', '.join(sorted(changed))} changed"
        new = {tuple(row[key] for key in keys) for row in after[name]} - {
            tuple(row[key] for key in keys) for row in rows
        }
        if new != _made(name, before):
            yield f"{name} has {sorted(new)} of its own"
        added = [column for column in schema.metadata.tables[name].columns if column.name not in rows[0]]
        for row in after[name]:
            for column in added:
                wanted = _wanted(name, column, row, before)
                if row[column.name] != wanted:
                    yield f"{name} {[row[key] for key in keys]}: {column.name} is {row[column.name]!r}, not {wanted!r}"
    positions = sorted(row["position"] for row in after["audit_events"])
    if positions != list(range(1, len(positions) + 1)):
        yield f"positions are {positions}"
    for source in ("broker", "edge"):
        events = schema.audit_events
        rows_of = connection.execute(sa.select(events).where(events.c.source == source).order_by(events.c.seq))
        report = verify_chain(chained_rows(rows_of), read_head(connection, source))
        if not report.complete:
            yield f"the chain {source} is not whole: {report.findings}"
    if "freed_numbers" not in before:
        used = {row["number"] for row in before["workspaces"] if row["state"] != "decommissioned"}
        freed = {row["number"] for row in after["freed_numbers"]}
        if freed != set(range(1, max(used))) - used:
            yield f"freed numbers are {sorted(freed)}"


def _made(table: str, before: Dump) -> set[tuple[Any, ...]]:
    """Return the keys of rows that a step makes of others: agents that were known by their workspaces alone."""
    if table != "agents" or "purpose" in before["agents"][0]:
        return set()
    return {(row["agent_id"],) for row in before["workspaces"]} - {(row["id"],) for row in before["agents"]}


def _wanted(table: str, column: sa.Column[Any], row: dict[str, Any], before: Dump) -> Any:
    """Return what a column of which ``before`` knew nothing holds in ``row``."""
    place = (table, column.name)
    if place == ("agents", "name"):
        return row["id"]
    if place in {("agents", "retired_at"), ("agents", "retired_reason")}:
        home = next(one for one in before["workspaces"] if one["id"] == row["workspace_id"])
        return (
            home["state_since" if column.name == "retired_at" else "state_reason"]
            if row["state"] == "retired"
            else None
        )
    if place == ("delegations", "version"):
        return 1 if row["revoked_at"] is None else 2
    if place == ("audit_events", "position"):
        return row["position"]  # they are dense, which is looked at for all of them
    if place == ("audit_events", "at"):
        return AT_MS
    if column.server_default is None:
        return None
    text = str(
        column.server_default.arg.text if hasattr(column.server_default.arg, "text") else column.server_default.arg
    )  # type: ignore[attr-defined]
    if isinstance(column.type, sa.Boolean):
        return text not in {"0", "false"}
    return int(text) if isinstance(column.type, sa.Integer | sa.BigInteger) else text
