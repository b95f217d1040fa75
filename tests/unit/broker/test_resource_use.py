"""What workspaces report that their agents used: counted once, by day and engagement, bounded, and shown to those it concerns."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from portal_world import OPERATOR, World
from sqlalchemy import select

from saw.audit.workspace_usage import Usage, Used
from saw.broker.clock import iso
from saw.broker.delegations import Revoke
from saw.broker.errors import MalformedError
from saw.broker.holds import AddHold, ReleaseHold
from saw.broker.registry import Step, get_row
from saw.broker.resource_retention import KEPT_DAYS
from saw.broker.resource_use import MOST, count_use
from saw.broker.schema import resource_boots
from saw.broker.server import tls_context, upkeep_once

BOOT, NEXT_BOOT = "1" * 32, "2" * 32


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.close()


def tell(world: World, cpu_ms: int = 0, *, workspace: str = "ws-a", boot: str = BOOT, **used: int) -> None:
    """Take in a report, as the broker does in the transaction of its event."""
    with world.broker.services.store.write() as tx:
        row = get_row(tx.connection, workspace)
        count_use(tx, row, Usage(boot=boot, total=Used(cpu_ms=cpu_ms, **used)), iso(world.now))


def shown(world: World, *days: str, workspace: str = "ws-a") -> list[dict[str, Any]]:
    first, last = (*days, *days)[:2] if days else (None, None)
    return list(world.broker.resource_use.show(first, last, workspace)["usage"])


def test_reports_of_one_boot_count_once_and_those_of_the_next_are_added(world: World) -> None:
    assert shown(world) == []
    for cpu_ms, written in ((1000, 10), (1000, 10), (2500, 15)):
        tell(world, cpu_ms, written_bytes=written, memory_peak=700, oom_kills=1)
    tell(world, 300, boot=NEXT_BOOT, memory_peak=500, refused_tasks=2)
    (line,) = shown(world)
    assert line == {
        "day": "2026-11-29", "workspace": "ws-a", "engagement": "", "cpu_ms": 2800, "read_bytes": 0, "written_bytes": 15,
        "oom_kills": 1, "refused_tasks": 2, "memory_peak": 700,
    }  # fmt: skip


def test_numbers_that_shrink_take_nothing_away_and_do_not_count_twice(world: World) -> None:
    for cpu_ms in (2000, 500, 2000, 2100):
        tell(world, cpu_ms)
    assert shown(world)[0]["cpu_ms"] == 2100


def test_a_day_has_what_was_told_on_it_and_another_workspace_has_its_own(world: World) -> None:
    tell(world, 1000)
    tell(world, 7, workspace="ws-b")
    world.now += timedelta(days=1)
    tell(world, 1600)
    assert [(line["day"], line["cpu_ms"]) for line in shown(world, "2026-11-29", "2026-11-30")] == [
        ("2026-11-29", 1000),
        ("2026-11-30", 600),
    ]
    assert [line["cpu_ms"] for line in shown(world, "2026-11-29", workspace="ws-b")] == [7]
    assert shown(world, "2026-11-28") == []


def test_what_is_used_belongs_to_the_engagement_that_all_live_delegations_go_back_to(world: World) -> None:
    tell(world, 100)
    root = world.delegation("ws-a")
    child = world.delegation("ws-a", "a part of it", parent=root)
    tell(world, 300)
    other = world.delegation("ws-a", "something else")
    tell(world, 350)
    world.broker.delegations.revoke(OPERATOR, other, Revoke("done"))
    tell(world, 450)
    found = {line["engagement"]: line["cpu_ms"] for line in shown(world)}
    assert found == {"": 150, root: 300}
    assert child not in found


def test_a_workspace_that_makes_numbers_up_bounds_its_own_line_and_breaks_no_sum(world: World) -> None:
    for boot in range(4):
        tell(world, 2**53 - 1, boot=f"{boot:032x}", memory_peak=2**53 - 1)
    tell(world, 5, workspace="ws-b")
    assert (shown(world)[0]["cpu_ms"], shown(world)[0]["memory_peak"]) == (MOST, MOST)
    with world.broker.services.store.read() as connection:
        found = world.broker.resource_use.of_workspaces(connection, ["ws-a", "ws-b", "ws-c"])
    assert [found[one].cpu_ms for one in ("ws-a", "ws-b", "ws-c")] == [MOST, 5, 0]


def test_the_page_of_a_workspace_says_what_was_used_in_the_running_month(world: World) -> None:
    assert "nothing told yet" in world["ada"].get("/workspaces/ws-a").text
    tell(world, 5_400_000, memory_peak=300 * 1024**2, written_bytes=2 * 1024**2)
    text = world["ada"].get("/workspaces/ws-a").text
    assert "1.50 h of processors, at most 300 MiB of memory, 2 MiB written" in text
    assert "met its limits" not in text
    tell(world, 5_400_000, oom_kills=3)
    assert "met its limits: 3 × memory, 0 × processes" in world["ada"].get("/workspaces/ws-a").text


@pytest.mark.parametrize(
    "day", ["today", "2026-11-29\n", "2026-1-1", "٢٠٢٦-11-29", "2026-02-29", "2026-11-31", "0000-01-01"]
)
def test_a_text_that_is_no_day_is_refused(world: World, day: str) -> None:
    with pytest.raises(MalformedError, match="is not a day"):
        world.broker.resource_use.show(day, None, None)


def test_a_leap_day_is_a_day_and_a_leap_year_is_as_much_as_can_be_asked_for(world: World) -> None:
    assert world.broker.resource_use.show("2028-02-29", "2028-02-29", None)["usage"] == []
    assert world.broker.resource_use.show("2028-01-01", "2028-12-31", None)["usage"] == []
    with pytest.raises(MalformedError, match="are 367 days; 366 can be asked for") as refused:
        world.broker.resource_use.show("2028-01-01", "2029-01-01", None)
    assert (refused.value.code, refused.value.status) == ("too_many_days", 400)
    assert "366" in refused.value.cure
    # What was charged has no such bound: it is added up by the database.
    assert world.broker.charges.show("2020-01-01", "2029-01-01", None)["charges"] == []


def removed(world: World) -> list[str]:
    """Return what the trail says of removals."""
    events = [item.event for item in world.broker.trail.page("broker", 0, 1000)["events"]]
    return [one["message"] for one in events if one.get("api", {}).get("operation") == "usage.retention.remove"]


def test_days_go_when_they_are_older_than_400_and_a_removal_is_told(world: World) -> None:
    for workspace in ("ws-a", "ws-b"):
        tell(world, 1000, workspace=workspace)
    world.now += timedelta(days=1)
    tell(world, 1600)
    world.now += timedelta(days=KEPT_DAYS - 1)
    world.broker.resource_retention.tick()
    assert [len(shown(world, "2026-11-29", workspace=one)) for one in ("ws-a", "ws-b")] == [1, 1]
    assert removed(world) == []
    world.now += timedelta(days=1)
    for _ in range(2):
        world.broker.resource_retention.tick()
    assert [shown(world, "2026-11-29", workspace=one) for one in ("ws-a", "ws-b")] == [[], []]
    assert [line["cpu_ms"] for line in shown(world, "2026-11-30")] == [600]
    assert removed(world) == ["2 lines of what agents used on 2026-11-29 were removed"]


def test_what_is_held_stays_until_the_hold_is_released(world: World) -> None:
    for workspace in ("ws-a", "ws-b"):
        tell(world, 1000, workspace=workspace)
    hold = world.broker.holds.add(OPERATOR, AddHold("case 7", "ws-a"))["id"]
    world.now += timedelta(days=KEPT_DAYS + 1)
    world.broker.resource_retention.tick()
    assert [len(shown(world, "2026-11-29", workspace=one)) for one in ("ws-a", "ws-b")] == [1, 0]
    world.broker.holds.release(OPERATOR, hold, ReleaseHold("closed"))
    world.broker.resource_retention.tick()
    assert shown(world, "2026-11-29") == []


def test_what_was_told_last_goes_with_the_workspace_and_what_it_used_stays(world: World) -> None:
    for workspace in ("ws-a", "ws-b"):
        tell(world, 1000, workspace=workspace)
    world.broker.registry.transition(OPERATOR, "ws-a", Step("stopped", "test"))
    world.broker.registry.transition(OPERATOR, "ws-a", Step("decommissioned", "test"))
    upkeep_once(world.broker, tls_context(world.broker, lambda: world.now), lambda: world.now)
    with world.broker.services.store.read() as connection:
        assert connection.execute(select(resource_boots.c.workspace_id)).scalars().all() == ["ws-b"]
    assert [line["cpu_ms"] for line in shown(world)] == [1000]
