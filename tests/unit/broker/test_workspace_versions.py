"""Changes of a workspace count its version and may state it; requests may carry a key, under which they are done once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from image_rows import put_image
from review_world import OPERATOR, World
from sqlalchemy import create_engine, func, select
from starlette.datastructures import QueryParams
from workspaces_before import AFTER, fill_before, found_after

from saw.broker.agents import RetireAgent, SucceedAgent
from saw.broker.context import Caller
from saw.broker.errors import BrokerError
from saw.broker.idempotency import KEPT
from saw.broker.registry import CreateWorkspace, Kill, Reprovision, Step
from saw.broker.schema import audit_events, workspace_requests
from saw.broker.store import Store
from saw.broker.wake import Waker
from saw.broker.workspace_list import page, wanted
from saw.broker.workspace_views import ChangedWorkspace, Workspace, WorkspacePage

pytestmark = pytest.mark.control("LIF-01")

OTHER = Caller("operator:other", "operator-socket", "request-9")
KEY = "key-00001"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    put_image(found.broker.services.store, "j", "2" * 64)
    yield found
    found.broker.close()


def refused(call: Any, *arguments: Any) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        call(*arguments)
    assert caught.value.cure
    return caught.value


def create(name: str = "ws-new", **more: Any) -> CreateWorkspace:
    return CreateWorkspace(
        **{"id": name, "sponsor": "Ada", "blueprint": "coding", "ring": "stable", "image": "i", **more}
    )


def as_told(answer: object, kind: Any) -> Any:
    """Return an answer as the type that programs are told of; raise when it is none."""
    return msgspec.json.decode(msgspec.json.encode(answer), type=kind)


def version(world: World, name: str = "ws-a") -> int:
    return int(world.broker.registry.show(name)["version"])


def counted(world: World, table: Any) -> int:
    with world.broker.services.store.read() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


# --- Versions ---------------------------------------------------------------------------------------------------------


def test_every_change_counts_and_what_a_workspace_reports_does_not(world: World) -> None:
    registry = world.broker.registry
    assert registry.create(OPERATOR, create())["version"] == 1
    seen = [1]

    def after(changed: bool) -> None:
        seen.append(version(world, "ws-new"))
        assert (seen[-1] == seen[-2] + 1) is changed

    registry.transition(OPERATOR, "ws-new", Step("provisioning", "test"))
    after(changed=True)
    registry.transition(OPERATOR, "ws-new", Step("provisioning", "test"))
    after(changed=False)
    registry.reprovision(OPERATOR, "ws-new", Reprovision("j"))
    after(changed=True)
    registry.reprovision(OPERATOR, "ws-new", Reprovision("j"))
    after(changed=False)
    registry.kill(OPERATOR, "ws-new", "drill")
    after(changed=True)
    registry.kill(OPERATOR, "ws-new", "drill")
    after(changed=False)
    world.set("ws-new", lease_expires_at="2026", reported_state="loaded", attested_at="2026", ak_id="a")
    after(changed=False)


def test_a_successor_is_another_agent_and_so_another_version(world: World) -> None:
    before = version(world)
    world.broker.agents.retire(OPERATOR, "agent-1", RetireAgent(reason="over"))
    assert version(world) == before, "the workspace names the same agent still"
    world.broker.agents.succeed(OPERATOR, "agent-1", SucceedAgent(reason="newer"))
    assert version(world) == before + 1


def test_the_version_is_in_every_view_and_the_views_are_as_told(world: World) -> None:
    registry = world.broker.registry
    made = registry.create(OPERATOR, create())
    assert as_told(made, ChangedWorkspace).version == 1
    moved = registry.transition(OPERATOR, "ws-new", Step("provisioning", "test"))
    assert as_told(moved, ChangedWorkspace).version == 2
    assert as_told(registry.show("ws-a"), Workspace).version == 1
    with world.broker.services.store.read() as connection:
        listed = as_told(page(connection, wanted(QueryParams())), WorkspacePage)
    assert [(one.id, one.version) for one in listed.workspaces] == [("ws-a", 1), ("ws-b", 1), ("ws-new", 2)]
    last = world.broker.trail.page("broker", 0, 100_000)["events"]
    told = [
        one.event["unmapped"]["saw"]
        for one in last
        if one.event.get("entity") == {"type": "workspace", "uid": "ws-new"}
    ]
    assert told[-1]["version"] == 2


def test_a_change_from_a_version_that_is_no_more_is_refused_and_its_twin_taken(world: World) -> None:
    registry = world.broker.registry
    assert registry.transition(OPERATOR, "ws-a", Step("stopped", "night", version=1))["version"] == 2
    for call, body in (
        (registry.transition, Step("attesting", "day", version=1)),
        (registry.reprovision, Reprovision("j", version=1)),
    ):
        error = refused(call, OTHER, "ws-a", body)
        assert (error.code, error.details) == ("version_conflict", {"version": 2})
    assert refused(registry.transition, OTHER, "ws-a", Step("attesting", "day", version=3)).code == "version_conflict"
    assert (version(world), registry.show("ws-a")["state"], registry.show("ws-a")["image"]) == (2, "stopped", "i")
    assert registry.reprovision(OTHER, "ws-a", Reprovision("j", version=2))["version"] == 3
    assert registry.transition(OTHER, "ws-a", Step("attesting", "day", version=3))["version"] == 4
    assert registry.transition(OTHER, "ws-a", Step("stopped", "old clients state none"))["version"] == 5


def test_who_wants_what_is_already_so_is_not_in_conflict(world: World) -> None:
    registry = world.broker.registry
    registry.transition(OPERATOR, "ws-a", Step("stopped", "night"))
    told = registry.transition(OTHER, "ws-a", Step("stopped", "night too", version=1))
    assert (told["changed"], told["version"]) == (False, 2)
    assert not registry.reprovision(OTHER, "ws-a", Reprovision("i", version=1))["changed"]


def test_a_kill_goes_before_every_version_and_a_release_does_not_cross_one(world: World) -> None:
    registry = world.broker.registry
    registry.transition(OPERATOR, "ws-a", Step("stopped", "night"))
    with pytest.raises(msgspec.ValidationError, match="version"):
        msgspec.convert({"reason": "x", "version": 1}, Kill)
    assert registry.kill(OTHER, "ws-a", "drill")["state"] == "quarantined"
    # Whoever saw it stopped does not release it by the way.
    assert (
        refused(registry.transition, OPERATOR, "ws-a", Step("stopped", "night", version=2)).code == "version_conflict"
    )
    assert registry.show("ws-a")["state"] == "quarantined"
    assert registry.transition(OPERATOR, "ws-a", Step("stopped", "released", version=3))["changed"]


def test_of_two_writers_with_the_same_version_one_wins(world: World) -> None:
    outcomes: list[str] = []
    begin = threading.Barrier(4)

    def write(number: int) -> None:
        begin.wait(60)
        try:
            to = ("stopped", "decommissioned", "attesting", "quarantined")[number]
            world.broker.registry.transition(OPERATOR, "ws-b", Step(to, "test", version=1))
            outcomes.append("done")
        except BrokerError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(outcomes) == ["done", "version_conflict", "version_conflict", "version_conflict"]
    assert version(world, "ws-b") == 2


# --- Keys -------------------------------------------------------------------------------------------------------------


def test_the_same_key_is_the_same_workspace_and_the_same_answer(world: World) -> None:
    registry = world.broker.registry
    first = registry.create(OPERATOR, create(idempotency_key=KEY))
    events = counted(world, audit_events)
    again = registry.create(OPERATOR, create(idempotency_key=KEY))
    assert (first.pop("changed"), again.pop("changed")) == (True, False)
    assert again == first
    assert counted(world, audit_events) == events, "nothing happened"
    error = refused(registry.create, OPERATOR, create("ws-other", idempotency_key=KEY))
    assert (error.code, "ws-new" in error.message) == ("idempotency_mismatch", True)
    assert refused(registry.create, OPERATOR, create(image="j", idempotency_key=KEY)).code == "idempotency_mismatch"
    assert refused(registry.create, OTHER, create(idempotency_key=KEY)).code == "workspace_exists", (
        "keys are the caller's own"
    )
    assert refused(registry.create, OPERATOR, create()).code == "workspace_exists"
    assert registry.create(OTHER, create("ws-other", idempotency_key=KEY))["changed"]


def test_what_was_told_under_a_key_is_done_once_whatever_happened_since(world: World) -> None:
    registry = world.broker.registry
    stop, rebuild = Step("stopped", "night", 1, KEY), Reprovision("j", 2, "key-00002")
    assert registry.transition(OPERATOR, "ws-a", stop)["changed"]
    assert registry.reprovision(OPERATOR, "ws-a", rebuild)["changed"]
    registry.transition(OTHER, "ws-a", Step("attesting", "day"))
    told = registry.transition(OPERATOR, "ws-a", stop)
    assert (told["state"], told["changed"], told["version"]) == ("attesting", False, 4), (
        "no conflict, and no second stop"
    )
    assert not registry.reprovision(OPERATOR, "ws-a", rebuild)["changed"]
    assert refused(registry.transition, OPERATOR, "ws-a", Step("stopped", "x", 4, KEY)).code == "idempotency_mismatch"
    assert refused(registry.transition, OPERATOR, "ws-b", stop).code == "idempotency_mismatch"
    assert refused(registry.reprovision, OPERATOR, "ws-a", Reprovision("j", 2, KEY)).code == "idempotency_mismatch"
    assert registry.show("ws-b")["state"] == "active"
    assert registry.transition(OPERATOR, "ws-a", Step("stopped", "night", 4, "key-00003"))["changed"]


def test_a_kill_that_is_told_again_does_not_kill_what_was_released_since(world: World) -> None:
    registry = world.broker.registry
    assert registry.kill(OPERATOR, "ws-a", "drill", KEY)["changed"]
    assert registry.kill(OPERATOR, "ws-a", "drill", KEY)["state"] == "quarantined"
    registry.transition(OTHER, "ws-a", Step("stopped", "released"))
    assert registry.kill(OPERATOR, "ws-a", "drill", KEY)["state"] == "stopped"
    assert refused(registry.kill, OPERATOR, "ws-a", "another", KEY).code == "idempotency_mismatch"
    assert registry.kill(OPERATOR, "ws-a", "drill", "key-00002")["state"] == "quarantined"
    registry.transition(OTHER, "ws-a", Step("stopped", "released"))
    assert registry.kill(OPERATOR, "ws-a", "drill")["state"] == "quarantined", "without a key each one counts"


def test_a_request_that_was_refused_may_be_told_again_under_its_key(world: World) -> None:
    registry = world.broker.registry
    assert refused(registry.create, OPERATOR, create(image="none", idempotency_key=KEY)).code == "unknown_image"
    assert registry.create(OPERATOR, create(idempotency_key=KEY))["changed"]
    image = Reprovision("j", idempotency_key="key-00002")
    assert refused(registry.reprovision, OPERATOR, "ws-a", image).code == "not_stopped"
    registry.transition(OPERATOR, "ws-a", Step("stopped", "night"))
    assert registry.reprovision(OPERATOR, "ws-a", image)["changed"]
    assert (
        refused(registry.transition, OPERATOR, "ws-none", Step("stopped", "x", idempotency_key="key-00003")).code
        == "unknown_workspace"
    )
    assert counted(world, workspace_requests) == 2


def test_a_key_is_known_for_thirty_days(world: World) -> None:
    registry = world.broker.registry
    stop = Step("stopped", "night", idempotency_key=KEY)
    registry.transition(OPERATOR, "ws-a", stop)
    registry.transition(OPERATOR, "ws-a", Step("attesting", "day"))
    world.later(seconds=KEPT.total_seconds())
    assert not registry.transition(OPERATOR, "ws-a", stop)["changed"]
    world.later(seconds=1)
    assert registry.transition(OPERATOR, "ws-a", stop)["changed"]
    assert counted(world, workspace_requests) == 1
    assert timedelta(days=30) == KEPT


@pytest.mark.parametrize(
    "body",
    [
        {"idempotency_key": "short"},
        {"idempotency_key": "with blank"},
        {"idempotency_key": "k" * 129},
        {"version": 0},
        {"version": "1"},
        {"version": 2**31},
    ],
)
def test_keys_and_versions_are_taken_strictly(body: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"to": "stopped", "reason": "x", **body}, Step)
    assert msgspec.convert({"to": "stopped", "reason": "x"}, Step) == Step("stopped", "x")


# --- Databases from before --------------------------------------------------------------------------------------------


def test_a_database_from_before_begins_at_version_one(tmp_path: Path) -> None:
    path = tmp_path / "broker.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection, connection.begin():
        fill_before(connection)
    engine.dispose()
    store = Store.open_sqlite(path, Waker())
    with store.read() as connection:
        assert found_after(connection) == AFTER
    store.close()
