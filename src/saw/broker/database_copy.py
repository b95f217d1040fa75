"""``saw broker database copy``: from the SQLite file of a broker that is stopped into a database of PostgreSQL that is empty.

One transaction there, and a lock on the file here: either everything has arrived, counted and with every audit chain
complete, or nothing has. The file stays as it is.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import msgspec
from sqlalchemy import Connection, Table, func, insert, select, text

from saw.audit import verify_chain
from saw.broker import schema
from saw.broker.config import BrokerConfig
from saw.broker.register_place import remember_kind
from saw.broker.replicas import bind_installation
from saw.broker.store import Store, chained_rows, read_head
from saw.broker.trail import removals_of
from saw.broker.wake import Waker
from saw.errors import ConfigError, SawError

BATCH = 500
#: Their keys count up by themselves, from behind what was copied.
_COUNTED = ("policy_states", "review_decisions")


class CopyError(SawError):
    """The database cannot be copied; nothing was."""

    code = "copy_refused"


class Copied(msgspec.Struct, frozen=True):
    """How many rows went over, and where each audit chain ends (source → number of its last event)."""

    rows: int
    chains: dict[str, int]


def copy_database(config: BrokerConfig) -> Copied:
    """Copy everything; raise :class:`ConfigError`, :class:`CopyError` or what the databases refuse."""
    if config.postgresql is None:
        raise ConfigError("the setting database is missing", cure="name the database to copy to in the configuration")
    if not config.database.exists():
        raise CopyError(f"there is no {config.database}", cure="saw broker init makes an empty database")
    if serves(config.operator_socket):
        raise CopyError(f"a broker serves at {config.operator_socket}", cure="systemctl stop saw-broker, then again")
    waker = Waker()
    source = Store.open_sqlite(config.database, waker)
    try:
        target = Store.open(config, waker)
        try:
            # The lock on the file is held until the rows are there: nobody writes behind the copy.
            with source.write() as old, target.write() as new:
                copied = _copy(old.connection, new.connection)
            bind_installation(target, config, copied=True)
            remember_kind(config)
        finally:
            target.close()
    finally:
        source.close()
    return copied


def serves(path: str) -> bool:
    """Tell whether a broker of this host answers at its operators' socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(path)
        except OSError:
            return False
        return True


def _copy(old: Connection, new: Connection) -> Copied:
    tables = schema.metadata.sorted_tables
    full = [table.name for table in tables if table is not schema.registry and _count(new, table)]
    if full or new.execute(select(schema.registry.c.seq)).scalar_one() != 0:
        raise CopyError("the database is not empty", cure="name a fresh one", details={"tables": full})
    rows = 0
    new.execute(schema.registry.delete())
    for table in tables:
        for part in _batches(old, table):
            new.execute(insert(table), part)
        there = _count(new, table)
        if there != _count(old, table):
            raise CopyError(f"{table.name} did not arrive whole", cure="report this; the file is unchanged")
        rows += there
    for name in _COUNTED:
        new.execute(text(f"SELECT setval(pg_get_serial_sequence('{name}', 'id'), (SELECT max(id) FROM {name}))"))  # noqa: S608
    return Copied(rows, _chains(new))


def _batches(connection: Connection, table: Table) -> Iterator[list[dict[str, Any]]]:
    for part in connection.execute(select(table)).mappings().partitions(BATCH):
        yield [dict(row) for row in part]


def _count(connection: Connection, table: Table) -> int:
    return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def _chains(connection: Connection) -> dict[str, int]:
    """Return the ends of all chains as they are now; raise :class:`CopyError` when one is not complete."""
    events = schema.audit_events
    ends: dict[str, int] = {}
    told = removals_of(connection)
    for source in connection.execute(select(schema.audit_heads.c.source)).scalars().all():
        rows = connection.execute(select(events).where(events.c.source == source).order_by(events.c.seq))
        report = verify_chain(chained_rows(rows), read_head(connection, source), told=told.tell)
        if not report.complete:
            raise CopyError(
                f"the audit chain {source} is not complete",
                cure="saw audit verify on the broker says what is missing",
                details={"source": source},
            )
        ends[source] = report.head.seq
    return ends
