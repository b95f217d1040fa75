"""A writing transaction: kept or undone as a whole, and never left open."""

from __future__ import annotations

import sqlite3
import threading

import pytest

from saw.sqlite import change


@pytest.fixture
def database():
    found = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    found.execute("CREATE TABLE kept (what TEXT)")
    yield found
    found.close()


def rows(database: sqlite3.Connection) -> int:
    return int(database.execute("SELECT COUNT(*) FROM kept").fetchone()[0])


def test_what_is_written_is_kept_at_the_end(database) -> None:
    with change(database):
        database.execute("INSERT INTO kept VALUES ('a')")
    assert (rows(database), database.in_transaction) == (1, False)


@pytest.mark.parametrize("ends_by_itself", [True, False])
def test_no_transaction_stays_open_behind_an_exception_and_that_is_the_one_that_is_raised(
    database, ends_by_itself: bool
) -> None:
    with pytest.raises(KeyError), change(database):
        database.execute("INSERT INTO kept VALUES ('a')")
        if ends_by_itself:
            database.execute("ROLLBACK")
        raise KeyError
    assert (rows(database), database.in_transaction) == (0, False)


def test_a_lock_is_waited_for_no_longer_than_said_and_is_free_again(database) -> None:
    lock = threading.Lock()
    with lock, pytest.raises(sqlite3.OperationalError, match="another thread"), change(database, lock, 0.01):
        pytest.fail("it has the lock")
    with change(database, lock, 0.01):
        assert lock.locked()
    assert not lock.locked()
