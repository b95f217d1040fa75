"""A database of any step goes to the newest one with all that it held."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from database_steps import check_every_step, revisions
from sqlalchemy import create_engine, event

from saw.broker.store import Store
from saw.broker.wake import Waker


def test_a_database_of_any_step_goes_to_the_newest_with_all_that_it_held(tmp_path: Path) -> None:
    walking = tmp_path / "walking.db"
    engine = create_engine(f"sqlite:///{walking}")
    event.listen(engine, "connect", lambda connection, _record: connection.execute("PRAGMA synchronous=OFF"))

    @contextmanager
    def copied(name: str) -> Iterator[Store]:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(walking, folder / "broker.db")
        store = Store.open_sqlite(folder / "broker.db", Waker())
        try:
            yield store
        finally:
            store.close()
            shutil.rmtree(folder)

    check_every_step(engine, copied)


def test_steps_follow_one_another_without_a_gap_or_a_fork() -> None:
    assert revisions() == [f"{number:04}" for number in range(1, len(revisions()) + 1)]
