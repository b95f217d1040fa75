"""Policy requests on PostgreSQL: the tests of SQLite that race, expire, page and answer, with the same words."""

from __future__ import annotations

from pathlib import Path

import pytest
from postgres_rig import Server
from request_world import RequestWorld

# ruff: noqa: F401
from test_policy_requests import (
    test_a_request_whose_event_cannot_be_written_is_not_there,
    test_an_answer_is_given_once_and_says_why,
    test_of_many_who_ask_at_once_there_is_one_request,
    test_the_list_is_filtered_and_comes_in_pages_newest_first,
    test_the_same_ask_is_one_request_while_it_is_open_and_while_the_policy_that_answered_it_is_in_force,
    test_what_ended_long_ago_goes_and_what_is_held_or_open_stays,
    test_what_is_held_keeps_nothing_behind_it_and_has_nothing_written,
    test_what_is_held_makes_no_room_and_what_is_not_does,
)


@pytest.fixture
def world(tmp_path: Path, postgres: Server):
    found = RequestWorld(tmp_path, postgresql=postgres.database())
    yield found
    found.broker.close()
