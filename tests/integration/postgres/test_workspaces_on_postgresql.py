"""Versions and keys of workspaces on PostgreSQL: the tests of SQLite, databases from before, and two brokers at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_rows import put_image
from postgres_rig import Server
from review_world import OPERATOR, World

# ruff: noqa: F401
from test_workspace_versions import (
    create,
    test_a_change_from_a_version_that_is_no_more_is_refused_and_its_twin_taken,
    test_a_key_is_known_for_thirty_days,
    test_a_kill_that_is_told_again_does_not_kill_what_was_released_since,
    test_a_request_that_was_refused_may_be_told_again_under_its_key,
    test_every_change_counts_and_what_a_workspace_reports_does_not,
    test_of_two_writers_with_the_same_version_one_wins,
    test_the_same_key_is_the_same_workspace_and_the_same_answer,
    test_what_was_told_under_a_key_is_done_once_whatever_happened_since,
    version,
)
from workspaces_before import AFTER, fill_before, found_after

from saw.broker import postgres as broker_postgres
from saw.broker.core import Broker
from saw.broker.database_settings import parse_database
from saw.broker.errors import BrokerError
from saw.broker.registry import Step
from saw.broker.store import Store
from saw.broker.wake import Waker

pytestmark = [pytest.mark.control("FLT-01"), pytest.mark.control("LIF-01")]


@pytest.fixture
def world(tmp_path: Path, postgres: Server) -> Iterator[World]:
    found = World(tmp_path, postgresql=postgres.database())
    put_image(found.broker.services.store, "j", "2" * 64)
    yield found
    found.broker.close()


def test_a_database_from_before_begins_at_version_one(postgres: Server) -> None:
    url = postgres.database(empty=True)
    engine = broker_postgres.open_engine(parse_database(url))
    with engine.connect().execution_options(saw_write=True, saw_steps=True) as connection, connection.begin():
        fill_before(connection)
    engine.dispose()
    store = Store.open_postgresql(parse_database(url), Waker())
    with store.read() as connection:
        assert found_after(connection) == AFTER
    store.close()


def test_two_brokers_take_one_of_two_changes_and_make_one_workspace_of_one_key(world: World) -> None:
    other = Broker.open(world.config, lambda: world.now, os.urandom)
    outcomes: list[str] = []
    made: list[bool] = []
    begin = threading.Barrier(2)

    def write(broker: Broker, to: str) -> None:
        begin.wait(60)
        try:
            broker.registry.transition(OPERATOR, "ws-b", Step(to, "test", version=1))
            outcomes.append("done")
        except BrokerError as error:
            outcomes.append(error.code)
        begin.wait(60)
        made.append(broker.registry.create(OPERATOR, create(idempotency_key="key-00001"))["changed"])

    pairs = ((world.broker, "stopped"), (other, "attesting"))
    threads = [threading.Thread(target=write, args=pair) for pair in pairs]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        other.close()
    assert sorted(outcomes) == ["done", "version_conflict"]
    assert sorted(made) == [False, True]
    assert version(world, "ws-b") == 2
