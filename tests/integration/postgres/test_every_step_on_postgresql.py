"""A database of any step goes to the newest one with all that it held, on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from database_steps import check_every_step
from postgres_rig import Server, name_of

from saw.broker import postgres as broker_postgres
from saw.broker.database_settings import parse_database
from saw.broker.store import Store
from saw.broker.wake import Waker

pytestmark = pytest.mark.control("FLT-01")


@pytest.mark.thorough
def test_a_database_of_any_step_goes_to_the_newest_with_all_that_it_held(postgres: Server) -> None:
    walking = postgres.database(empty=True)
    engine = broker_postgres.open_engine(parse_database(walking)).execution_options(saw_write=True, saw_steps=True)

    @contextmanager
    def copied(name: str) -> Iterator[Store]:
        target = f"steps_{name}"
        with postgres.admin() as session:
            session.execute(f"CREATE DATABASE {target} TEMPLATE {name_of(walking)} STRATEGY file_copy".encode())
        store = Store.open_postgresql(parse_database(postgres.url(target)), Waker())
        try:
            yield store
        finally:
            store.close()
            with postgres.admin() as session:
                session.execute(f"DROP DATABASE {target}".encode())

    check_every_step(engine, copied)
    engine.dispose()
