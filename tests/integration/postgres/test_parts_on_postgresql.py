"""The broker's parts on PostgreSQL: the tests of SQLite that race, crash, count and refuse, with the same words."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from postgres_rig import Server
from review_world import World

# ruff: noqa: F401
from test_reviews import (
    test_a_claim_whose_event_cannot_be_written_is_not_given,
    test_a_crash_between_any_two_steps_loses_nothing_and_repeats_nothing,
    test_a_kill_cancels_what_waits_and_leaves_other_workspaces,
    test_a_nonce_is_for_one_review_and_approver_once_and_ends,
    test_a_step_from_a_state_that_has_been_left_is_not_taken,
    test_of_many_who_claim_at_once_each_approval_goes_to_one,
    test_the_same_call_opens_one_review_until_it_has_ended,
)

from saw.broker.schema import charges


@pytest.fixture
def world(tmp_path: Path, postgres: Server):
    found = World(tmp_path, postgresql=postgres.database())
    yield found
    found.broker.close()


def test_what_calls_cost_adds_up_to_the_same_whole_numbers_on_both(world: World, tmp_path: Path) -> None:
    small = World(tmp_path / "sqlite")
    day = {"start": "2026-11-01", "end": "2026-12-01", "day": "2026-11-26", "at": "2026-11-26T08:00:00.000Z"}
    row = {
        "source": "edge", "workspace_id": "ws-a", "engagement": "e", "blueprint": "coding", "budget": "b", "scope": "workspace",
        "subject": "ws-a", "period": "month", "currency": "EUR", "limit": 2**45, "model": "m", "service": "s", "metered": True,
        "input_tokens": 2**40, "output_tokens": 7, **day,
    }  # fmt: skip
    found = []
    for one in (world, small):
        with one.broker.services.store.write() as tx:
            tx.connection.execute(charges.insert().values(**row, id="1", state="settled", reserved=0, spent=2**40))
            tx.connection.execute(charges.insert().values(**row, id="2", state="open", reserved=5, spent=1))
        with one.broker.services.store.read() as connection:
            mine = one.broker.charges.of_workspaces(connection, {"ws-a": "coding"})
        found.append(msgspec.json.encode([one.broker.charges.show("2026-11-01", "2026-11-26", None), mine]))
    small.broker.close()
    assert found[0] == found[1]
    assert str(2**40 + 1).encode() in found[0]
