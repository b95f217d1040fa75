"""The feeds of sponsors, agents and delegations on PostgreSQL: the tests of SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from portal_world import World
from postgres_rig import Server

# ruff: noqa: F401
from test_sponsor_changes import (
    test_a_number_that_the_register_has_not_reached_is_refused_and_the_newest_one_is_not,
    test_a_sponsor_who_is_enabled_without_any_workspace_is_told_too,
    test_many_that_changed_at_once_are_told_page_by_page_and_none_twice,
    test_the_oldest_change_comes_first_and_one_that_changed_again_comes_once,
    test_whatever_changes_a_sponsor_is_told_once_as_it_is_now,
)

pytestmark = [pytest.mark.control("FLT-01"), pytest.mark.control("ID-04")]


@pytest.fixture
def world(tmp_path: Path, postgres: Server) -> Iterator[World]:
    found = World(tmp_path, postgresql=postgres.database())
    yield found
    found.close()
