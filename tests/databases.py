"""Where the brokers of the tests keep their register: files of SQLite, or a PostgreSQL that the test session starts.

``SAW_TEST_DATABASE=postgresql`` chooses the latter for every broker that :func:`installed` makes; a test that names a database
itself keeps it. Either way a new register is a copy of one whose tables are made: the steps run once in a session, not once for
each test. The server is unprivileged, on a Unix socket in a directory of its own, and its databases go with what made them.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import psycopg

from saw.broker import postgres
from saw.broker.config import BrokerConfig
from saw.broker.setup import initialise
from saw.broker.store import Store
from saw.broker.wake import Waker

VARIABLE = "SAW_TEST_DATABASE"
KINDS = ("sqlite", "postgresql")

_ending = ExitStack()
_parts: dict[str, Any] = {}
_holders: list[list[str]] = []


def on_postgresql() -> bool:
    """Whether PostgreSQL is chosen; another word than the two is refused."""
    chosen = os.environ.get(VARIABLE, "sqlite")
    assert chosen in KINDS, f"{VARIABLE} is {chosen!r}: one of {', '.join(KINDS)}"
    return chosen == "postgresql"


def installed(config: BrokerConfig, now: datetime) -> BrokerConfig:
    """Make an installation on the chosen database and return its configuration."""
    if config.postgresql is None and on_postgresql():
        config = msgspec.structs.replace(config, postgresql=_server().database())
        _note(str(config.postgresql))
    elif config.postgresql is None and not config.database.exists():
        config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        copy_of_empty(config.database)
    initialise(config, now)
    return config


def copy_of_empty(place: Path) -> None:
    """Put a SQLite register that holds nothing at ``place``."""
    if "template" not in _parts:
        folder = Path(_ending.enter_context(tempfile.TemporaryDirectory(prefix="saw-register-")))
        Store.open_sqlite(folder / "broker.db", Waker()).close()
        assert [one.name for one in folder.iterdir()] == ["broker.db"], "its log is written back when it is closed"
        _parts["template"] = folder / "broker.db"
    shutil.copy(_parts["template"], place)


class Rows:
    """Statements straight to a register, with ``?`` for values, as :mod:`sqlite3` has it."""

    def __init__(self, session: sqlite3.Connection | psycopg.Connection[Any]) -> None:
        self._session = session

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Any:
        """Run a statement; the cursor gives rows as tuples and ``rowcount``."""
        if isinstance(self._session, sqlite3.Connection):
            return self._session.execute(statement, values)
        return self._session.execute(re.sub(r"\?", "%s", statement.replace("%", "%%")).encode(), tuple(values))

    def executemany(self, statement: str, many: Sequence[Sequence[Any]]) -> None:
        """Run a statement once for each."""
        for values in many:
            self.execute(statement, values)


@contextmanager
def beside(config: BrokerConfig) -> Iterator[Rows]:
    """The register of an installation in one transaction, beside the broker that may serve it."""
    if config.postgresql is None:
        with closing(sqlite3.connect(config.database, timeout=60)) as file, file:
            yield Rows(file)
    else:
        with psycopg.connect(config.postgresql) as session:
            yield Rows(session)


def at_rest(config: BrokerConfig) -> bytes:
    """Return the bytes that a register holds: those of its files, or of every value of every table."""
    if config.postgresql is None:
        files = [path for path in config.state.glob("broker.db*") if path.is_file()]
        assert files, "there is no register"
        return b"".join(path.read_bytes() for path in files)
    with beside(config) as session:
        names = [str(row[0]) for row in session.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
        rows = [row for name in names for row in session.execute(f'SELECT * FROM "{name}"')]  # noqa: S608
    values = [value for row in rows for value in row]
    return b"\n".join(bytes(one) if isinstance(one, bytes | memoryview) else str(one).encode() for one in values)


def back_up(config: BrokerConfig, place: Path) -> None:
    """Write a copy of a register to the file ``place``, while a broker may serve it."""
    if config.postgresql is not None:
        _postgres_program("pg_dump", "-Fc", "-f", str(place), "-d", config.postgresql)
        return
    with closing(sqlite3.connect(config.database)) as store, closing(sqlite3.connect(place)) as copy:
        store.backup(copy)


def put_back(config: BrokerConfig, place: Path) -> None:
    """Make a register, which nobody serves, what it was when it was backed up."""
    if config.postgresql is not None:
        _postgres_program("pg_restore", "--clean", "--single-transaction", "-d", config.postgresql, str(place))
        return
    with closing(sqlite3.connect(place)) as copy, closing(sqlite3.connect(config.database)) as store:
        copy.backup(store)


def _postgres_program(name: str, *arguments: str) -> None:
    from postgres_rig import programs

    done = subprocess.run([str(programs() / name), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def nobody_writes(config: BrokerConfig) -> bool:
    """Whether a transaction that writes could begin now, without waiting for another."""
    if config.postgresql is None:
        try:
            with closing(sqlite3.connect(config.database, timeout=0, isolation_level=None)) as file:
                file.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        return True
    with beside(config) as session:
        ((free,),) = session.execute("SELECT pg_try_advisory_xact_lock(?, ?)", (postgres.LOCKS, postgres.WRITERS))
    return bool(free)


@contextmanager
def held() -> Iterator[list[str]]:
    """Collect the names of the databases that are made meanwhile, by the innermost who asks."""
    made: list[str] = []
    _holders.append(made)
    try:
        yield made
    finally:
        _holders.remove(made)


def _note(url: str) -> None:
    from postgres_rig import name_of

    if _holders:
        _holders[-1].append(name_of(url))


def drop(made: list[str]) -> None:
    """Remove databases, whoever still uses them."""
    if made:
        with _server().admin() as session:
            for name in made:
                session.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())
        made.clear()


def _server() -> Any:
    if "server" not in _parts:
        from postgres_rig import running_postgres

        _parts["server"] = _ending.enter_context(running_postgres())
        _parts["server"].kept = None  # who made one drops it
    return _parts["server"]


def end() -> None:
    """End the server and remove what was made."""
    _parts.clear()
    _ending.close()
