"""The broker's database: one transaction holds a state change, its audit row and the registry's new sequence number.

SQLite runs in WAL mode with ``synchronous=FULL``, so an answered call survives a crash. Writers are serialised; readers
see a snapshot.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, select, update

from saw.audit import Chain, ChainedEvent, Head
from saw.broker import schema
from saw.broker.wake import PERIMETER, Waker

#: The chain of the broker's own events.
SOURCE = "broker"


class Transaction:
    """One write: run statements on ``connection``, record events, touch what watchers must see."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.woken: set[str] = set()
        self._chain: Chain | None = None

    def record(self, *events: Mapping[str, Any]) -> None:
        """Append ``events`` to the broker's chain. Without this row the change does not happen."""
        if self._chain is None:
            self._chain = Chain(SOURCE, read_head(self.connection, SOURCE))
        for item in events:
            append_chained(self.connection, self._chain.append(item))

    def touch(self, *workspace_ids: str) -> int:
        """Advance the registry's sequence number, mark ``workspace_ids`` as changed for their watchers, return it."""
        row = self.connection.execute(
            update(schema.registry).values(seq=schema.registry.c.seq + 1).returning(schema.registry.c.seq)
        ).one()
        if workspace_ids:
            self.connection.execute(
                update(schema.workspaces).where(schema.workspaces.c.id.in_(workspace_ids)).values(watch_seq=row.seq)
            )
        self.woken |= {PERIMETER, *workspace_ids}
        return int(row.seq)

    def wake(self, *keys: str) -> None:
        """Wake those who wait for ``keys`` when the transaction has succeeded; perimeters' state stays as it is."""
        self.woken |= set(keys)


class Store:
    """The database behind two doors: :meth:`read` and :meth:`write`."""

    def __init__(self, engine: Engine, waker: Waker) -> None:
        self._engine = engine
        self._waker = waker
        self._writing = threading.Lock()

    @classmethod
    def open_sqlite(cls, path: Path, waker: Waker) -> Store:
        """Open (and make, 0600) the SQLite file ``path`` and bring its tables up to date."""
        path.touch(mode=0o600)
        engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 10})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        store = cls(engine, waker)
        store.migrate()
        return store

    def migrate(self) -> None:
        """Apply the steps that the database lacks."""
        config = Config()
        config.set_main_option("script_location", "saw.broker:migrations")
        config.set_main_option("path_separator", "os")
        with self._engine.connect().execution_options(saw_write=True) as connection, connection.begin():
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent snapshot."""
        with self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """One transaction: all of it is durable when the block ends, or none of it after an exception."""
        with self._writing, self._engine.connect().execution_options(saw_write=True) as connection, connection.begin():
            transaction = Transaction(connection)
            yield transaction
        if transaction.woken:
            self._waker.wake(transaction.woken)


def read_head(connection: Connection, source: str) -> Head:
    """Return the stored end of the chain ``source``."""
    heads = schema.audit_heads
    row = connection.execute(select(heads.c.seq, heads.c.hash).where(heads.c.source == source)).one_or_none()
    return Head() if row is None else Head(row.seq, row.hash)


def append_chained(connection: Connection, item: ChainedEvent) -> None:
    """Store one chained event and move the stored head of its chain forward."""
    insert_chained(connection, item)
    heads = schema.audit_heads
    moved = connection.execute(heads.update().where(heads.c.source == item.source).values(seq=item.seq, hash=item.hash))
    if moved.rowcount == 0:
        connection.execute(heads.insert().values(source=item.source, seq=item.seq, hash=item.hash))


def insert_chained(connection: Connection, item: ChainedEvent) -> None:
    """Store one chained event without moving the head (a late event that fills a gap)."""
    connection.execute(
        schema.audit_events.insert().values(
            source=item.source,
            seq=item.seq,
            prev=item.prev,
            hash=item.hash,
            event=msgspec.json.encode(item.event).decode(),
        )
    )


def chained_rows(rows: Iterable[Any]) -> Iterator[ChainedEvent]:
    """Turn rows of ``audit_events`` back into chained events."""
    for row in rows:
        yield ChainedEvent(row.source, row.seq, row.prev, msgspec.json.decode(row.event), row.hash)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by _begin_sqlite and nobody else
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("saw_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
