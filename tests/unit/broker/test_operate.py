"""The operators' calls for people who signed in: each role has its own, nobody else's, and some are for the socket alone."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from portal_world import ROLES, Visitor, World
from starlette.routing import Route

from saw.broker.agent_routes import OWN
from saw.broker.clock import iso
from saw.broker.operator_roles import ALLOWED
from saw.broker.operator_routes import operator_routes
from saw.broker.schema import people, sso_sessions
from saw.broker.sso.operate import call_of

pytestmark = pytest.mark.control("ID-01")

SOCKET_ALONE = {
    ("PUT", "/v1/workspaces/{id}/ek"),
    ("PUT", "/v1/policy/root"),
    ("POST", "/v1/certificates/ssh"),
    ("POST", "/v1/certificates/x509"),
    ("POST", "/v1/sessions"),
    ("GET", "/v1/reviewers"),
    ("GET", "/v1/reviewers/{name}"),
    ("PUT", "/v1/reviewers/{name}"),
    ("POST", "/v1/reviewers/{name}/retire"),
    ("GET", "/v1/reviews"),
    ("GET", "/v1/reviews/{id}"),
    ("GET", "/v1/reviews/{id}/call"),
    ("GET", "/v1/reviews/{id}/receipt"),
    ("POST", "/v1/reviews/{id}/nonce"),
    ("POST", "/v1/reviews/{id}/decide"),
    ("POST", "/v1/reviews/{id}/cancel"),
    ("POST", "/v1/reviews/{id}/read-back"),
    ("POST", "/v1/gates"),
    ("POST", "/v1/gates/preview"),
    ("GET", "/v1/gates/{id}"),
    ("POST", "/v1/gates/{id}/claim"),
    ("POST", "/v1/gates/{id}/result"),
}
"""What founds trust, decides reviews, asks for changes, or leads into a workspace: people have other ways, or none."""
PARTS = {"id": "ws-a", "ring": "stable", "name": "workspace"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world that is only looked at, with everybody at a terminal."""
    world = World(tmp_path_factory.mktemp("operate"), operate=True)
    world.visitors |= {f"{name}-cli": world.terminal(name) for name in ROLES}
    yield world
    world.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path, operate=True)
    yield found
    found.close()


def ask(visitor: Visitor, call: tuple[str, str], body: object | None = None) -> tuple[int, str]:
    """Make a call; return status and the code of a refusal."""
    method, path = call
    answer = visitor.ask(method, f"/operator{path.format(**PARTS)}", json=body)
    return answer.status_code, answer.json().get("error", "") if answer.content else ""


def test_every_call_of_operators_is_for_some_roles_or_for_the_socket_alone(shared: World) -> None:
    known = {
        call_of(route)
        for route in operator_routes(shared.broker, lambda path, method, _h: Route(path, print, methods=[method]))
    }
    assert known == set(ALLOWED) | SOCKET_ALONE
    assert not set(ALLOWED) & SOCKET_ALONE


def test_a_call_is_answered_to_the_roles_that_allow_it_and_refused_to_all_others(shared: World) -> None:
    refused = {"dan": 0, "eve": 0, "fay": 0}
    for call, roles in sorted(ALLOWED.items()):
        for name, own in ROLES.items():
            status, code = ask(shared[f"{name}-cli"], call)
            if roles & set(own) or (call in OWN and "user" in own):
                assert code not in {"not_allowed", "not_for_people", "not_signed_in"}, (call, name)
            else:
                assert (status, code) == (403, "not_allowed"), (call, name)
                refused[name] = refused.get(name, 0) + 1
    trail = (item.event for item in shared.broker.trail.page("broker", 0, 1000)["events"])
    audited = [event["unmapped"]["saw"]["principal"] for event in trail if event.get("status_detail") == "not_allowed"]
    assert {name: audited.count(f"user:{name}@example.com") for name in ROLES} == refused
    assert refused["ada"] == len(ALLOWED) - len(OWN)
    assert refused["cleo"] == len(ALLOWED)


def test_calls_for_the_socket_alone_are_there_for_nobody_who_signed_in(shared: World) -> None:
    for call in sorted(SOCKET_ALONE):
        # Some of these paths have another method that people may use.
        assert ask(shared["dan-cli"], call)[1] == "not_for_people", call


def test_nobody_calls_without_a_session_of_a_command_line(shared: World) -> None:
    for name in ("dan", "stranger"):
        status, code = ask(shared[name], ("GET", "/v1/workspaces"))
        assert (status, code) == (401, "not_signed_in")
    browser = shared["dan"].headers["cookie"].partition("=")[2]
    visitor = Visitor(shared)
    visitor.headers = {"authorization": f"Bearer {browser}"}
    assert ask(visitor, ("GET", "/v1/workspaces")) == (401, "not_signed_in")
    rebound = shared["dan-cli"].ask("GET", "/operator/v1/workspaces", headers={"host": "evil.example"})
    assert (rebound.status_code, rebound.json()["error"]) == (403, "wrong_host")


def test_where_it_was_not_asked_for_there_is_no_such_door(tmp_path: Path) -> None:
    world = World(tmp_path)
    try:
        assert world.terminal("dan").ask("GET", "/operator/v1/workspaces").status_code == 404
    finally:
        world.close()


@pytest.mark.control("LIF-02")
def test_a_workspace_is_killed_from_afar_in_the_persons_name_and_only_with_a_fresh_word(world: World) -> None:
    dan, kill = world.terminal("dan"), ("POST", "/v1/workspaces/{id}/kill")
    with world.broker.services.store.write() as tx:
        tx.connection.execute(sso_sessions.update().values(checked_at=iso(world.now - timedelta(minutes=10))))
    assert ask(dan, ("GET", "/v1/workspaces"))[0] == 200
    # without a way to ask the provider, its word of before is good enough to look and not to change anything
    assert ask(dan, kill, {"reason": "scans others"})[0] == 401
    assert world.state("ws-a") == "active"
    with world.broker.services.store.write() as tx:
        tx.connection.execute(sso_sessions.update().values(checked_at=iso(world.now)))
    assert ask(dan, kill, {"reason": "scans others"})[0] == 200
    assert world.state("ws-a") == "quarantined"
    assert world.audited("workspace.kill") == [("user:dan@example.com", "Success")]


def test_a_role_that_was_taken_away_ends_it_at_once(world: World) -> None:
    dan = world.terminal("dan")
    assert ask(dan, ("GET", "/v1/workspaces"))[0] == 200
    with world.broker.services.store.write() as tx:
        tx.connection.execute(people.update().where(people.c.name == "dan@example.com").values(roles='["user"]'))
    assert ask(dan, ("GET", "/v1/workspaces")) == (403, "not_allowed")
