"""The feed of workspaces that changed: each once, as it is now, page by page also when many changed at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from image_rows import put_image
from review_world import OPERATOR, World
from starlette.datastructures import QueryParams

from saw.broker import workspace_list
from saw.broker.agents import RetireAgent, SucceedAgent
from saw.broker.clock import iso
from saw.broker.errors import ConflictError
from saw.broker.registry import CreateWorkspace, RecordEk, Reprovision, Step
from saw.broker.wake import WORKSPACES
from saw.broker.workspace_views import WorkspaceChanges, WorkspacePage

pytestmark = pytest.mark.control("LIF-01")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    put_image(found.broker.services.store, "j", "2" * 64)
    yield found
    found.broker.close()


def start(world: World) -> int:
    """Return where the feed begins for whoever has just read the list."""
    with world.broker.services.store.read() as connection:
        page = workspace_list.page(connection, workspace_list.wanted(QueryParams("limit=1")))
    return msgspec.convert(msgspec.to_builtins(page), WorkspacePage).seq


def ask(world: World, after: int, behind: str = "") -> WorkspaceChanges:
    with world.broker.services.store.read() as connection:
        found = workspace_list.changes(connection, after, behind)
    return msgspec.json.decode(msgspec.json.encode(found), type=WorkspaceChanges)


def create(world: World, name: str = "ws-new") -> None:
    world.broker.registry.create(
        OPERATOR, CreateWorkspace(id=name, sponsor="Ada", blueprint="coding", ring="stable", image="i")
    )


def endorsement() -> str:
    key = generate_private_key(65537, 2048).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


CHANGES: dict[str, Callable[[World], Any]] = {
    "created": lambda world: create(world, "ws-made"),
    "moved": lambda world: world.broker.registry.transition(OPERATOR, "ws-a", Step("stopped", "night")),
    "another image": lambda world: world.broker.registry.reprovision(OPERATOR, "ws-new", Reprovision("j")),
    "its key": lambda world: world.broker.registry.record_ek(OPERATOR, "ws-new", RecordEk(endorsement())),
    "killed": lambda world: world.broker.registry.kill(OPERATOR, "ws-a", "drill"),
    "another agent": lambda world: (
        world.broker.agents.retire(OPERATOR, "agent-1", RetireAgent(reason="over")),
        world.broker.agents.succeed(OPERATOR, "agent-1", SucceedAgent(reason="newer")),
    ),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_whatever_makes_another_version_is_told_once_as_it_is_now(world: World, what: str) -> None:
    create(world)
    since = start(world)
    before = {one.id: one.version for one in ask(world, 0).workspaces}
    assert ask(world, since) == WorkspaceChanges((), since, "")
    CHANGES[what](world)
    told = ask(world, since)
    (one,) = told.workspaces
    assert one.version > before.get(one.id, 0)
    assert one.state == world.broker.registry.show(one.id)["state"]
    assert one.watch_seq == told.next > since
    assert ask(world, told.next, told.behind) == WorkspaceChanges((), told.next, told.behind)


def test_the_same_again_and_what_a_workspace_reports_is_no_change(world: World) -> None:
    world.broker.registry.transition(OPERATOR, "ws-a", Step("stopped", "night"))
    since = start(world)
    world.broker.registry.transition(OPERATOR, "ws-a", Step("stopped", "night"))
    world.set("ws-a", lease_expires_at=iso(world.now + timedelta(hours=1)), reported_state="loaded")
    assert ask(world, since).workspaces == ()


def test_a_number_that_the_register_has_not_reached_is_refused_and_the_newest_one_is_not(world: World) -> None:
    since = start(world)
    assert ask(world, since).workspaces == ()
    with pytest.raises(ConflictError) as refused:
        ask(world, since + 1)
    assert (refused.value.code, refused.value.status) == ("feed_restarted", 409)


def test_a_renewed_lease_wakes_no_follower_and_a_change_does(world: World) -> None:
    woken: list[str] = []
    world.broker.services.store._waker.wake = woken.extend  # type: ignore[method-assign]
    with world.broker.services.store.write() as tx:
        tx.touch()
    assert WORKSPACES not in woken
    world.broker.registry.transition(OPERATOR, "ws-a", Step("stopped", "night"))
    assert WORKSPACES in woken


def test_the_oldest_change_comes_first_and_one_that_changed_again_comes_once(world: World) -> None:
    since = start(world)
    registry = world.broker.registry
    registry.transition(OPERATOR, "ws-a", Step("stopped", "night"))
    registry.transition(OPERATOR, "ws-b", Step("stopped", "night"))
    registry.transition(OPERATOR, "ws-a", Step("attesting", "day"))
    assert [(one.id, one.state) for one in ask(world, since).workspaces] == [("ws-b", "stopped"), ("ws-a", "attesting")]


def test_many_that_changed_at_once_are_told_page_by_page_and_none_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace_list, "CHANGES", 3)
    names = [f"ws-{number}" for number in range(7)]
    for name in names:
        create(world, name)
    since = start(world)
    with world.broker.services.store.write() as tx:
        tx.touch(*names)
    world.broker.registry.kill(OPERATOR, "ws-a", "drill")
    told, after, behind = [], since, ""
    while (found := ask(world, after, behind)).workspaces:
        assert len(found.workspaces) <= 3
        told += [one.id for one in found.workspaces]
        after, behind = found.next, found.behind
    assert told == [*names, "ws-a"]


def test_keys_are_in_no_answer(world: World) -> None:
    create(world)
    world.broker.registry.record_ek(OPERATOR, "ws-new", RecordEk(endorsement()))
    with world.broker.services.store.read() as connection:
        found = workspace_list.changes(connection, 0, "")
    assert not {"ek_pub_pem", "ak_pub"} & set(found["workspaces"][-1])
    assert ask(world, 0).workspaces[-1].ek_recorded
