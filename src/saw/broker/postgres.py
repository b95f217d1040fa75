"""The broker's database on PostgreSQL: connections, what the server must be, and what its errors mean for a call.

Writers of all replicas queue for one lock of the database, which a transaction holds until it is visible to others; readers
see a snapshot (docs/decisions/0040-one-writer-on-postgresql.md). Needs direct sessions: no pooler in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.types.numeric import NumericLoader
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from saw.broker.database_settings import PostgresPlace, require_safe
from saw.broker.errors import BrokerError, MalformedError, StorageFull
from saw.errors import ConfigError

logger = logging.getLogger("saw.broker")

#: Our advisory locks: a class, and which of it. Others who use this database must use other classes.
LOCKS: Final = 0x5341_5701
WRITERS, ENTRY, UPKEEP = 1, 2, 3
#: One lock for each replica that lives, and one for each thing that one replica at a time may do.
REPLICAS: Final = 0x5341_5702
EXCLUSIVE: Final = 0x5341_5703

OLDEST: Final = 140_000
#: How long a call waits for a lock or a connection, and a transaction may stand still, seconds.
WAIT_S: Final = 10
STILL_S: Final = 60
CONNECTIONS: Final = 16

_SESSION = (
    f"-c lock_timeout={WAIT_S}s -c idle_in_transaction_session_timeout={STILL_S}s -c statement_timeout=60s"
    " -c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
    " -c timezone=UTC -c client_min_messages=warning"
)
_CONNECT: Final = {
    "application_name": "saw-broker",
    "connect_timeout": "5",
    "target_session_attrs": "read-write",
    "client_encoding": "utf8",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    "options": _SESSION,
}
#: A name sorts as its bytes do, so that times written as text are in order.
_SORTED = "SELECT array_to_string(array_agg(x ORDER BY x), '') FROM unnest(ARRAY['a', 'B', '_', '-', 'Z', '0']) AS t(x)"


class DatabaseUnavailable(BrokerError):
    """The database does not answer; nothing is decided without it."""

    code = "database_unavailable"
    status = 503


class DatabaseBusy(BrokerError):
    """The database answers, and somebody else is in the way; nothing was changed."""

    code = "database_busy"
    status = 503


class _Whole(NumericLoader):
    """Sums of 64-bit columns come as ``numeric``; they are whole numbers."""

    def load(self, data: Any) -> Any:
        found = super().load(data)
        return int(found) if found == found.to_integral_value() else found


def connect(place: PostgresPlace, **more: str) -> psycopg.Connection[Any]:
    """Open one session outside the pool, without transactions; raise :class:`DatabaseUnavailable` with libpq's reason."""
    try:
        session = psycopg.connect(make_conninfo(**{**_CONNECT, **place.parameters, **more}), autocommit=True)
        _pin(session)
    except psycopg.Error as error:
        reason = "; ".join(str(error).split("\n")).strip("; ") or "no reason given"
        raise DatabaseUnavailable(
            f"PostgreSQL ({place.shown}) cannot be reached: {reason}",
            cure="start it, or correct the setting database",
        ) from error
    return session


def open_engine(place: PostgresPlace) -> Engine:
    """Return an engine whose server was asked; raise :class:`ConfigError` or :class:`DatabaseUnavailable`."""
    require_safe(place)
    with connect(place) as session:
        _check(session, place)
    engine = create_engine(
        "postgresql+psycopg://",
        connect_args={**_CONNECT, **place.parameters},
        pool_pre_ping=True,
        pool_size=CONNECTIONS // 2,
        max_overflow=CONNECTIONS // 2,
        pool_timeout=WAIT_S,
    )
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    return engine


def _pin(session: psycopg.Connection[Any]) -> None:
    """An answered call is on the disk, whatever the default of the server, the database or the role becomes."""
    session.adapters.register_loader("numeric", _Whole)
    session.execute(
        "SELECT set_config('synchronous_commit',"
        " CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, false)"
    )


def _prepare(session: Any, _record: Any) -> None:
    _pin(session)
    session.commit()


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    if options.get("saw_steps", False):  # another replica may be at the same steps, and they take what they take
        connection.exec_driver_sql("SET LOCAL lock_timeout = '10min'")
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
    if options.get("saw_write", False):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCKS}, {WRITERS})")
    else:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")


def _check(session: psycopg.Connection[Any], place: PostgresPlace) -> None:
    """Raise :class:`ConfigError` unless the server keeps what the broker promises."""

    def told(query: str) -> str:
        row = session.execute(query.encode()).fetchone()
        return "" if row is None else str(row[0])

    wrong = [
        (session.info.server_version < OLDEST, "is older than version 14", "install a newer one"),
        (told("SHOW fsync") != "on", "does not write through to its disk (fsync)", "set fsync = on"),
        (told("SHOW full_page_writes") != "on", "has full_page_writes off", "set full_page_writes = on"),
        (told("SHOW server_encoding") != "UTF8", "is not in UTF-8", "createdb -T template0 -E UTF8 --locale=C.UTF-8"),
        (
            told(_SORTED) != "-0BZ_a",
            "sorts text by a language",
            "createdb -T template0 -E UTF8 --locale=C.UTF-8",
        ),
    ]
    for holds, reason, cure in wrong:
        if holds:
            raise ConfigError(f"PostgreSQL ({place.shown}) {reason}", cure=cure, details={"database": place.shown})


@contextmanager
def translated(committing: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn the database's errors within the block into refusals; while ``committing`` nobody knows what a lost one made."""
    try:
        yield
    except PoolTimeout as error:
        raise _busy("every connection is in use") from error
    except DBAPIError as error:
        if isinstance(error.orig, psycopg.Error):
            raise _meaning(error.orig, lost=error.connection_invalidated, unknown=committing()) from error
        raise
    except psycopg.Error as error:
        raise _meaning(error, lost=False, unknown=committing()) from error


def _busy(reason: str) -> DatabaseBusy:
    return DatabaseBusy(f"the database is busy: {reason}; nothing was changed", cure="call again in a few seconds")


def _meaning(error: psycopg.Error, *, lost: bool, unknown: bool) -> Exception:
    """Return the refusal for ``error`` by its SQLSTATE (PostgreSQL's appendix A); what is a fault of ours stays as it is."""
    state = error.sqlstate or ""
    if state in {"40001", "40P01", "55P03", "57014"}:
        return _busy({"55P03": "another change takes long", "57014": "it took too long"}.get(state, "changes met"))
    if isinstance(error, psycopg.DataError) or state.startswith("22"):
        return MalformedError(
            "a value cannot be stored", cure="send shorter text, without NUL characters", code="not_storable"
        )
    if state == "53100":
        return StorageFull()
    away = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) or state in {"25006", "25P03"}
    if not lost and not away:
        return error
    logger.warning("database: %s", str(error).strip().replace("\n", "; "))  # names hosts and files; callers get none
    made = "whether the change was made is not known" if unknown else "nothing was changed"
    return DatabaseUnavailable(
        f"the database does not answer; {made}",
        cure="look before you call again" if unknown else "call again; the log of the broker has the reason",
    )
