"""The broker's database: one transaction holds a state change, its audit row and the registry's new sequence number.

SQLite runs in WAL mode with ``synchronous=FULL``, so an answered call survives a crash. Writers are serialised; readers
see a snapshot. PostgreSQL (:mod:`saw.broker.postgres`) gives the same to several brokers at once.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, func, select, update

from saw import jsontext
from saw.audit import Chain, ChainedEvent, Head
from saw.broker import full_disk, postgres, schema
from saw.broker.config import BrokerConfig
from saw.broker.database_settings import PostgresPlace, parse_database
from saw.broker.errors import StorageFull
from saw.broker.full_disk import Reserve
from saw.broker.replica_wake import tell
from saw.broker.wake import PERIMETER, SPONSORS, TRAIL, WORKSPACES, Waker
from saw.errors import SawError

T = TypeVar("T")

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
        self.woken |= {PERIMETER, *([WORKSPACES, SPONSORS] if workspace_ids else []), *workspace_ids}
        return int(row.seq)

    def wake(self, *keys: str) -> None:
        """Wake those who wait for ``keys`` when the transaction has succeeded; perimeters' state stays as it is."""
        self.woken |= set(keys)


class Store:
    """The database behind two doors: :meth:`read` and :meth:`write`."""

    def __init__(self, engine: Engine, waker: Waker, folder: Path | None = None) -> None:
        self._engine = engine
        #: Of a SQLite file, with room for kills on its disk; the disk of a server is not ours.
        self._folder = folder
        self._reserve = None if folder is None else Reserve(folder / "reserve")
        self._waker = waker
        self._writing = threading.RLock()
        self._shared = engine.dialect.name == "postgresql"
        #: Who this is among those that share the database; what it tells the others carries it.
        self.replica = secrets.randbits(31)
        self._shut: SawError | None = None

    @classmethod
    def open(cls, config: BrokerConfig, waker: Waker) -> Store:
        """Open the database that the configuration names and bring its tables up to date."""
        if config.postgresql is None:
            return cls.open_sqlite(config.database, waker)
        return cls.open_postgresql(parse_database(config.postgresql), waker)

    @classmethod
    def open_sqlite(cls, path: Path, waker: Waker) -> Store:
        """Open (and make, 0600) the SQLite file ``path`` and bring its tables up to date."""
        path.touch(mode=0o600)
        engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 10})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        store = cls(engine, waker, path.parent)
        store.urgently(store.migrate)  # also to open it takes room, and a broker that does not run kills nothing
        return store

    @classmethod
    def open_postgresql(cls, place: PostgresPlace, waker: Waker) -> Store:
        """Open a database of PostgreSQL and bring its tables up to date."""
        store = cls(postgres.open_engine(place), waker)
        store.migrate()
        return store

    def migrate(self) -> None:
        """Apply the steps that the database lacks; of several replicas the first one does, the others wait."""
        config = Config()
        config.set_main_option("script_location", "saw.broker:migrations")
        config.set_main_option("path_separator", "os")
        options = {"saw_write": True, "saw_steps": True}
        with self._refusing(), self._engine.connect().execution_options(**options) as connection, connection.begin():
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def shut(self, reason: SawError) -> None:
        """Refuse every further call with ``reason``."""
        self._shut = reason

    def tell(self, *keys: str) -> None:
        """Tell other replicas that ``keys`` changed, without a change."""
        with self.read() as connection:
            tell(connection, self.replica, keys)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent snapshot."""
        with self._refusing(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """One transaction: all of it is durable when the block ends, or none of it after an exception."""
        ending = False
        with (
            self._refusing(lambda: ending),
            self._writing,
            self._engine.connect().execution_options(saw_write=True) as connection,
            connection.begin(),
        ):
            transaction = Transaction(connection)
            yield transaction
            keys = {TRAIL, *transaction.woken}
            if self._shared:
                tell(connection, self.replica, keys)
            ending = True
        self._waker.wake(keys)

    def urgently(self, change: Callable[[], T]) -> T:
        """Do ``change``, and on a full disk once more in the room that is set aside. Nobody of ours writes in between."""
        with self._writing:
            try:
                return change()
            except StorageFull:
                if self._reserve is None or not self._reserve.spend():
                    raise
                return change()

    @property
    def shared(self) -> bool:
        """Whether other brokers may write the same database: what only one of them knows does not hold for the others."""
        return self._shared

    def set_room_aside(self) -> None:
        """Set room aside for :meth:`urgently`, as far as there is any."""
        if self._reserve is not None:
            with self._writing:
                self._reserve.keep()

    @contextmanager
    def exclusively(self, what: str) -> Iterator[None]:
        """Let one replica at a time do ``what``; within one process this excludes nobody from a SQLite file."""
        if not self._shared:
            yield
            return
        number = int.from_bytes(hashlib.sha256(what.encode()).digest()[:4], "big", signed=True)
        lock = f"({postgres.EXCLUSIVE}, {number})"
        with self._refusing(), self._engine.connect() as connection:
            session = connection.execution_options(isolation_level="AUTOCOMMIT")
            session.exec_driver_sql(f"SELECT pg_advisory_lock{lock}")
            try:
                yield
            finally:
                session.exec_driver_sql(f"SELECT pg_advisory_unlock{lock}")

    def _refusing(self, ending: Callable[[], bool] = lambda: False) -> AbstractContextManager[None]:
        if self._shut is not None:
            raise self._shut
        return postgres.translated(ending) if self._folder is None else full_disk.translated(self._folder)


def read_head(connection: Connection, source: str) -> Head:
    """Return the stored end of the chain ``source``."""
    heads = schema.audit_heads
    row = connection.execute(select(heads.c.seq, heads.c.hash).where(heads.c.source == source)).one_or_none()
    return Head() if row is None else Head(row.seq, row.hash)


def append_chained(connection: Connection, item: ChainedEvent, at: int | None = None) -> None:
    """Store one chained event, as :func:`insert_chained` does, and move the stored head of its chain forward."""
    insert_chained(connection, item, at)
    heads = schema.audit_heads
    moved = connection.execute(heads.update().where(heads.c.source == item.source).values(seq=item.seq, hash=item.hash))
    if moved.rowcount == 0:
        connection.execute(heads.insert().values(source=item.source, seq=item.seq, hash=item.hash))


def insert_chained(connection: Connection, item: ChainedEvent, at: int | None = None) -> None:
    """Store one chained event, behind all that came before, without moving the head (a late event that fills a gap).

    ``at``: when it arrived, milliseconds since 1970 UTC; None for one of our own, which says so itself.
    """
    last = select(func.coalesce(func.max(schema.audit_events.c.position), 0)).scalar_subquery()
    connection.execute(
        schema.audit_events.insert().values(
            source=item.source,
            seq=item.seq,
            prev=item.prev,
            hash=item.hash,
            event=msgspec.json.encode(item.event).decode(),
            position=last + 1,
            at=item.event["time"] if at is None else at,
        )
    )


def chained_rows(rows: Iterable[Any]) -> Iterator[ChainedEvent]:
    """Turn rows of ``audit_events`` back into chained events; one whose content was removed has none (an empty object)."""
    for row in rows:
        yield ChainedEvent(row.source, row.seq, row.prev, content_of(row), row.hash)


def content_of(row: Any) -> dict[str, Any]:
    """Return the event in a row of ``audit_events``, an empty object when it was removed."""
    return dict(jsontext.decode(row.event)) if row.event else {}


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by _begin_sqlite and nobody else
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("saw_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
