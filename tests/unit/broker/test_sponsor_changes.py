"""The feed of sponsors: a decision, a workspace or an agent of theirs; and what every feed says when the register went back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from portal_world import OPERATOR, World
from starlette.datastructures import QueryParams

from saw.broker import agent_list, delegation_list, sponsor_list
from saw.broker.agents import RegisterAgent, RetireAgent
from saw.broker.errors import ConflictError
from saw.broker.registry import CreateWorkspace, Step
from saw.broker.sponsor_views import SponsorChanges, SponsorPage
from saw.broker.sponsors import SwitchSponsor, wanted
from saw.broker.wake import SPONSORS

pytestmark = pytest.mark.control("ID-04")
ADA, BEN = "ada@example.com", "ben@example.com"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.close()


def start(world: World) -> int:
    page = world.broker.sponsors.listed(wanted(QueryParams("limit=1")))
    return msgspec.json.decode(msgspec.json.encode(page), type=SponsorPage).seq


def ask(world: World, after: int, behind: str = "") -> SponsorChanges:
    with world.broker.services.store.read() as connection:
        found = sponsor_list.changes(connection, after, behind)
    return msgspec.json.decode(msgspec.json.encode(found), type=SponsorChanges)


def create(world: World, name: str, sponsor: str) -> None:
    world.broker.registry.create(
        OPERATOR, CreateWorkspace(id=name, sponsor=sponsor, blueprint="coding", ring="stable", image="workspace")
    )


CHANGES: dict[str, Callable[[World], Any]] = {
    "disabled": lambda world: world.broker.sponsors.disable(OPERATOR, ADA, SwitchSponsor(reason="left")),
    "a workspace made": lambda world: create(world, "ws-made", " Ada@Example.com"),
    "a workspace moved": lambda world: world.broker.registry.transition(OPERATOR, "ws-a", Step("stopped", "night")),
    "an agent made": lambda world: world.broker.agents.register(OPERATOR, RegisterAgent(sponsor="ADA@example.com")),
    "an agent retired": lambda world: world.broker.agents.retire(OPERATOR, "agent-1", RetireAgent(reason="over")),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_whatever_changes_a_sponsor_is_told_once_as_it_is_now(world: World, what: str) -> None:
    since = start(world)
    assert ask(world, since) == SponsorChanges((), since, "")
    CHANGES[what](world)
    told = ask(world, since)
    (one,) = told.sponsors
    shown = world.broker.sponsors.show(ADA)
    assert {name: value for name, value in msgspec.structs.asdict(one).items() if name != "seq"} == shown
    assert one.seq == told.next > since
    assert ask(world, told.next, told.behind) == SponsorChanges((), told.next, ADA)


def test_a_sponsor_who_is_enabled_without_any_workspace_is_told_too(world: World) -> None:
    create(world, "ws-z", "zoe@example.com")
    world.broker.sponsors.disable(OPERATOR, "zoe@example.com", SwitchSponsor(reason="left"))
    since = start(world)
    world.broker.sponsors.enable(OPERATOR, "zoe@example.com", SwitchSponsor(reason="came back"))
    told = ask(world, since)
    assert [(one.name, one.state, one.workspaces) for one in told.sponsors] == [
        ("zoe@example.com", "active", {"quarantined": ("ws-z",)})
    ]
    world.broker.sponsors.enable(OPERATOR, "zoe@example.com", SwitchSponsor(reason="came back"))
    assert ask(world, told.next, told.behind).sponsors == (), "once more is no change"


def test_the_oldest_change_comes_first_and_one_that_changed_again_comes_once(world: World) -> None:
    since = start(world)
    for name, to in (("ws-a", "stopped"), ("ws-b", "stopped"), ("ws-a", "attesting")):
        world.broker.registry.transition(OPERATOR, name, Step(to, "drill"))
    assert [one.name for one in ask(world, since).sponsors] == [BEN, ADA]


def test_many_that_changed_at_once_are_told_page_by_page_and_none_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sponsor_list, "CHANGES", 2)
    for number in range(5):
        create(world, f"ws-{number}", f"sponsor-{number}")
    since = start(world)
    with world.broker.services.store.write() as tx:
        tx.touch(*(f"ws-{number}" for number in range(5)))
    world.broker.registry.kill(OPERATOR, "ws-a", "drill")
    told, after, behind = [], since, ""
    while (found := ask(world, after, behind)).sponsors:
        assert len(found.sponsors) <= 2
        told += [one.name for one in found.sponsors]
        after, behind = found.next, found.behind
    assert told == [*(f"sponsor-{number}" for number in range(5)), ADA]


@pytest.mark.parametrize("what", list(CHANGES))
def test_each_of_these_wakes_who_follows_sponsors_and_a_renewal_does_not(world: World, what: str) -> None:
    woken: list[str] = []
    world.broker.services.store._waker.wake = woken.extend  # type: ignore[method-assign]
    with world.broker.services.store.write() as tx:
        tx.touch()
    assert SPONSORS not in woken
    CHANGES[what](world)
    assert SPONSORS in woken


FEEDS: dict[str, Callable[[World, Any, int], Any]] = {
    "agents": lambda _world, connection, after: agent_list.changes(connection, after)["agents"],
    "delegations": lambda world, connection, after: delegation_list.changes(connection, after, world.now)[
        "delegations"
    ],
    "sponsors": lambda _world, connection, after: sponsor_list.changes(connection, after, "")["sponsors"],
}


@pytest.mark.parametrize("feed", list(FEEDS))
def test_a_number_that_the_register_has_not_reached_is_refused_and_the_newest_one_is_not(
    world: World, feed: str
) -> None:
    since = start(world)
    with world.broker.services.store.read() as connection:
        assert list(FEEDS[feed](world, connection, since)) == []
        with pytest.raises(ConflictError, match=f"the register is at {since}") as refused:
            FEEDS[feed](world, connection, since + 1)
    assert (refused.value.code, refused.value.status) == ("feed_restarted", 409)
    assert feed in refused.value.cure


def test_people_who_look_have_the_feed_and_its_place_is_a_short_name(tmp_path: Path) -> None:
    world = World(tmp_path, operate=True)
    visitor = world.terminal("dan")
    assert visitor.get(f"/operator/v1/sponsor-changes?after={start(world)}").json()["sponsors"] == []
    refused = visitor.get(f"/operator/v1/sponsor-changes?behind={'x' * 1025}")
    assert (refused.status_code, refused.json()["code"]) == (400, "malformed")
    ahead = visitor.get(f"/operator/v1/sponsor-changes?after={start(world) + 1}")
    assert (ahead.status_code, ahead.json()["code"]) == (409, "feed_restarted")
    assert world.terminal("ada").get("/operator/v1/sponsor-changes").status_code == 403
    world.close()
