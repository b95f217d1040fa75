"""Retention, holds and pruned jobs on PostgreSQL: the tests of SQLite, and two brokers that remove at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from postgres_rig import Server
from retention_world import RetentionWorld

# ruff: noqa: F401
from test_holds import (
    test_ended_jobs_go_with_their_events_and_no_live_held_or_young_one,
    test_events_of_a_held_workspace_stay_until_it_is_released_and_all_others_go,
)
from test_retention import (
    test_a_checkpoint_that_is_not_of_this_trail_removes_nothing,
    test_content_that_nobody_removed_rightly_is_found,
)

from saw.audit.removal import OPERATION
from saw.broker import retention
from saw.broker.retention import Retention


@pytest.fixture
def world(tmp_path: Path, postgres: Server):
    found = RetentionWorld(tmp_path, postgresql=postgres.database())
    yield found
    found.broker.close()


@pytest.mark.control("AUD-02")
def test_two_brokers_that_both_do_so_remove_each_event_once(
    world: RetentionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STEP", 7)
    world.say("ws-a", count=40)
    end = world.size()
    world.old()
    world.sign()
    went: list[int] = []
    start = threading.Barrier(2)

    def work() -> None:
        mine = Retention(world.broker.services)
        start.wait(60)
        while not mine.idle:
            went.append(mine.tick())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert sum(went) == end
    report = world.broker.trail.verify()
    assert (report["complete"], report["removed"]["events"]) == (True, end)
    assert world.operations().count(OPERATION) == len([one for one in went if one])
