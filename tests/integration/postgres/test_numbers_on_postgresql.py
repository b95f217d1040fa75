"""Numbers of workspaces on PostgreSQL: the tests of SQLite, and two brokers that give numbers at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from postgres_rig import Server
from review_world import World

# ruff: noqa: F401
from test_numbers import (
    add,
    end,
    held,
    test_a_number_that_an_older_broker_gave_is_not_given_again,
    test_a_place_has_numbers_of_its_own_and_nobody_else_gets_them,
    test_numbers_go_on_past_250,
    test_the_database_refuses_a_number_twice,
    test_the_last_one_is_given_and_then_none,
    test_the_lowest_that_was_given_back_is_given_first,
)

from saw.broker.core import Broker

pytestmark = pytest.mark.control("FLT-01")


@pytest.fixture
def world(tmp_path: Path, postgres: Server) -> Iterator[World]:
    found = World(tmp_path, postgresql=postgres.database())
    yield found
    found.broker.close()


def test_two_brokers_give_different_numbers_while_others_are_given_back(world: World) -> None:
    for index in range(8):
        add(world, f"old{index}")
    before = held(world)
    other = World.__new__(World)
    other.broker = Broker.open(world.config, lambda: world.now, os.urandom)
    try:
        with ThreadPoolExecutor(4) as pool:
            ended = [pool.submit(end, (world, other)[index % 2], f"old{index}") for index in range(8)]
            given = list(pool.map(lambda index: add((world, other)[index % 2], f"n{index}"), range(16)))
            for one in ended:
                one.result(120)
    finally:
        other.broker.close()
    assert len(set(given)) == 16
    assert len(held(world)) == len(set(held(world))) == len(before) + 8
    assert max(held(world)) <= max(before) + 16
