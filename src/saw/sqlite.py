"""A writing transaction of a SQLite file, for the parts that keep what they must not lose in one of their own.

The connection has ``isolation_level=None``. What goes wrong is :class:`sqlite3.Error`, which each part tells in its own words.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def change(
    database: sqlite3.Connection, lock: threading.Lock | None = None, patience_s: float = -1
) -> Iterator[sqlite3.Connection]:
    """Hold the only transaction that may write; whatever is raised inside undoes it.

    ``lock`` is held meanwhile, where threads share the connection; who waits longer than ``patience_s`` for it (seconds; below 0:
    as long as it takes) is told so as by SQLite. SQLite ends a transaction by itself after some errors, a full disk among them,
    and not after others, so it is asked.
    """
    if lock is not None and not lock.acquire(timeout=patience_s):
        raise sqlite3.OperationalError("another thread is writing")
    try:
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
    finally:
        if lock is not None:
            lock.release()
