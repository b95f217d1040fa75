"""What is under a legal hold stays past its time, until it is released; ended jobs go when theirs is over."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from job_world import token_of
from retention_world import RetentionWorld
from review_world import OPERATOR
from sqlalchemy import select

from saw.broker import job_retention
from saw.broker.errors import BrokerError
from saw.broker.holds import AddHold, Held, ReleaseHold
from saw.broker.job_settings import JobSettings, problems_of_jobs
from saw.broker.reviews import KEEP
from saw.broker.schema import job_events, jobs, reviews

REASON = "case 7"


@pytest.fixture
def world(tmp_path: Path):
    found = RetentionWorld(tmp_path)
    yield found
    found.broker.close()


def held(world: RetentionWorld, **of: object) -> str:
    return str(world.broker.holds.add(OPERATOR, msgspec.convert({"reason": REASON, **of}, AddHold))["id"])


def let_go(world: RetentionWorld, identifier: str) -> bool:
    return bool(world.broker.holds.release(OPERATOR, identifier, ReleaseHold("closed"))["changed"])


def ms(world: RetentionWorld) -> int:
    return int(world.now.timestamp() * 1000)


@pytest.mark.control("AUD-01")
def test_events_of_a_held_workspace_stay_until_it_is_released_and_all_others_go(world: RetentionWorld) -> None:
    world.say("ws-a")
    kept = world.size()
    world.say("ws-b")
    world.ship_in(1, "ws-a")
    world.ship_in(1, "ws-b")
    end = world.size()
    hold = held(world, workspace="ws-a")
    world.old()
    world.sign()
    went = world.pass_by()
    staying = {row.position for row in world.rows() if '"workspace":"ws-a"' in row.event and row.position <= end + 1}
    assert {kept, end - 1} <= staying
    assert went == end + 1 - len(staying)
    assert world.broker.trail.verify()["complete"]
    assert let_go(world, hold)
    assert not let_go(world, hold)
    assert world.pass_by() == len(staying)
    assert [one for one in world.operations() if one.startswith("audit.hold")] == ["audit.hold.release"]
    assert world.broker.trail.verify()["complete"]


@pytest.mark.control("AUD-01")
def test_a_time_and_a_workspace_in_a_time_are_held(world: RetentionWorld) -> None:
    first = ms(world)
    places = {}
    for hour in range(4):
        for name in ("ws-a", "ws-b"):
            world.say(name)
            places[hour, name] = world.size()
        world.later(hours=1)
    hour = 3_600_000
    whole = held(world, since=first + hour, until=first + 2 * hour)
    part = held(world, workspace="ws-b", since=first + 3 * hour)
    world.old()
    world.sign()
    world.pass_by()
    left = {name for name, place in places.items() if place not in world.gone()}
    assert left == {(1, "ws-a"), (1, "ws-b"), (3, "ws-b")}
    let_go(world, whole)
    world.pass_by()
    assert {name for name, place in places.items() if place not in world.gone()} == {(3, "ws-b")}
    let_go(world, part)
    world.pass_by()
    assert set(places.values()) <= set(world.gone())


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "hold_malformed"),
        ({"since": 5}, "hold_malformed"),
        ({"since": 5, "until": 5}, "hold_malformed"),
        ({"workspace": "ws-z"}, "unknown_workspace"),
    ],
)
def test_a_hold_of_nothing_in_particular_is_refused(world: RetentionWorld, body: dict[str, object], code: str) -> None:
    with pytest.raises(BrokerError) as error:
        held(world, **body)
    assert error.value.code == code
    assert held(world, since=5, until=6)
    assert held(world, workspace="ws-a")


def test_a_hold_is_made_once_listed_and_told_and_an_unknown_one_is_refused(
    world: RetentionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = world.broker.holds.add(OPERATOR, AddHold(REASON, "ws-a"))
    again = world.broker.holds.add(OPERATOR, AddHold(REASON, "ws-a"))
    assert (first["changed"], again["changed"], again["id"]) == (True, False, first["id"])
    monkeypatch.setattr("saw.broker.holds.MOST", 1)
    with pytest.raises(BrokerError) as many:
        held(world, workspace="ws-b")
    with pytest.raises(BrokerError) as unknown:
        let_go(world, "hold-x")
    assert (many.value.code, unknown.value.code) == ("too_many_holds", "unknown_hold")
    let_go(world, first["id"])
    held(world, workspace="ws-b")
    holds = world.broker.holds
    assert [one["workspace"] for one in holds.listed(everything=False)["holds"]] == ["ws-b"]
    everything = {one["workspace"]: one["released_reason"] for one in holds.listed(everything=True)["holds"]}
    assert everything == {"ws-a": "closed", "ws-b": None}
    steps = [
        (item.event["api"]["operation"], item.event["status_detail"], item.event["unmapped"]["saw"]["principal"])
        for item in world.broker.trail.page("broker", 0, 1000)["events"]
        if item.event.get("api", {}).get("operation", "").startswith("audit.hold.")
    ]
    who = "operator:root"
    assert steps == [
        ("audit.hold.add", REASON, who), ("audit.hold.release", "closed", who), ("audit.hold.add", REASON, who),
    ]  # fmt: skip


def test_what_lasted_is_held_by_any_part_of_it() -> None:
    class Row:
        def __init__(self, *of: str | None) -> None:
            self.workspace_id, self.since, self.until = of

    holds = Held([Row(None, "2", "4"), Row("ws-a", None, "7")])  # type: ignore[list-item]
    assert [holds.takes("ws-b", *span) for span in (("0", "1"), ("1", "2"), ("3", "9"), ("4", "9"))] == [
        False, True, True, False,
    ]  # fmt: skip
    assert holds.takes("ws-a", "6", "9")
    assert not holds.takes("ws-a", "7", "9")
    assert not holds.takes("", "6")


def test_bytes_of_reviewed_calls_stay_while_their_workspace_is_held(world: RetentionWorld) -> None:
    calls = {name: world.open(workspace_id=name, expires_in_s=60).id for name in ("ws-a", "ws-b")}
    world.later(seconds=61)
    world.broker.reviews.tick()
    hold = held(world, workspace="ws-a")
    world.now += KEEP + timedelta(seconds=1)

    def bytes_kept() -> set[str]:
        world.broker.reviews.tick()
        with world.broker.services.store.read() as connection:
            found = connection.execute(select(reviews.c.workspace_id).where(reviews.c.call.is_not(None)))
            return set(found.scalars())

    assert len(calls) == 2
    assert bytes_kept() == {"ws-a"}
    let_go(world, hold)
    assert bytes_kept() == set()


def ended(world: RetentionWorld, outcome: str, workspace: str = "ws-a") -> str:
    job = str(world.ask(workspace=workspace)["id"])
    world.claim()
    error = {"code": "x", "message": "m", "cure": "c"}
    world.end(job, outcome, **({"error": error} if outcome == "failed" else {}))
    return job


@pytest.mark.control("LIF-01")
def test_ended_jobs_go_with_their_events_and_no_live_held_or_young_one(world: RetentionWorld) -> None:
    gone = [ended(world, "succeeded"), ended(world, "failed")]
    under = ended(world, "succeeded", "ws-b")
    hold = held(world, workspace="ws-b")
    waiting = str(world.ask()["id"])
    world.now += timedelta(days=90)
    world.claim(token_of("a"))
    running = waiting
    world.now += timedelta(seconds=1)
    world.beat(running)
    queued = str(world.ask(workspace="ws-b")["id"])
    world.broker.jobs.tick()

    def there() -> set[str]:
        with world.broker.services.store.read() as connection:
            told = set(connection.execute(select(job_events.c.job_id)).scalars())
            assert told == set(connection.execute(select(jobs.c.id)).scalars())
            return told

    assert there() == {under, running, queued}
    for job in gone:
        with pytest.raises(BrokerError) as error:
            world.show(job)
        assert error.value.code == "unknown_job"
    [told] = [
        item.event["unmapped"]["saw"]
        for item in world.broker.trail.page("broker", 0, 1000)["events"]
        if item.event.get("api", {}).get("operation") == "jobs.retention.remove"
    ]
    assert (told["jobs"], told["days"]) == (2, 90)
    let_go(world, hold)
    world.broker.jobs.tick()
    assert there() == {running, queued}
    world.broker.jobs.tick()
    assert world.operations().count("jobs.retention.remove") == 2


def test_a_step_over_jobs_is_bounded(world: RetentionWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_retention, "STEP", 2)
    for _ in range(3):
        ended(world, "succeeded")
    world.now += timedelta(days=91)
    assert [job_retention.remove_old_jobs(world.broker.services) for _ in range(3)] == [2, 1, 0]


@pytest.mark.parametrize(
    ("text", "good"), [("1d", True), ("36500d", True), ("0d", False), ("36501d", False), ("9h", False)]
)
def test_the_retention_of_jobs_is_a_day_at_least(text: str, good: bool) -> None:
    assert bool(list(problems_of_jobs(JobSettings(retention=text)))) is not good
