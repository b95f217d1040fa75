"""The pages about agents, and the calls of people who signed in: who sees which, who ends one, and that what was said is text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from portal_world import OPERATOR, World

from saw.broker.agents import ChangeAgent, RegisterAgent, SucceedAgent

pytestmark = pytest.mark.control("ID-04")
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world in which each test that ends an agent has a workspace of its own, of ada's."""
    found = World(tmp_path_factory.mktemp("portal-agents"), operate=True)
    yield found
    found.close()


def agent_of(world: World, number: int) -> str:
    """Put down a workspace of ada's with the agent ``agent-<number>``."""
    world.workspace(f"ws-{number}", number, "ada@example.com")
    return f"agent-{number}"


def test_the_list_has_the_persons_own_agents_and_all_for_those_who_look(world: World) -> None:
    world.broker.agents.register(OPERATOR, RegisterAgent(sponsor="ada@example.com", name="adas-helper"))
    pages = {name: world[name].get("/agents") for name in ("ada", "ben", "dan", "fay", "cleo")}
    assert {name: ("adas-helper" in page.text, "agent-2" in page.text) for name, page in pages.items()} == {
        "ada": (True, False),
        "ben": (False, True),
        "dan": (True, True),
        "fay": (True, True),
        "cleo": (False, False),
    }
    assert pages["cleo"].status_code == 303
    assert "adas-helper" in world["dan"].get("/agents?q=HELPER&state=registered").text
    assert "Nothing is found" in world["dan"].get("/agents?q=nobody").text
    assert world["dan"].get("/agents?state=asleep").status_code == 400


@pytest.mark.control("DEL-01")
@pytest.mark.parametrize(
    ("who", "number", "status"),
    [("ada", 11, 303), ("dan", 12, 303), ("eve", 13, 303), ("fay", 14, 403), ("ben", 15, 404)],
)
def test_an_agent_is_retired_by_its_sponsor_and_by_those_who_intervene(
    world: World, who: str, number: int, status: int
) -> None:
    agent, workspace = agent_of(world, number), f"ws-{number}"
    handed = world.delegation(workspace)
    assert (f"/agents/{agent}/retire" in world[who].get(f"/workspaces/{workspace}").text) == (status == 303)
    before = len(world.audited("agent.retire"))
    answer = world[who].post(f"/agents/{agent}/retire", reason="task done")
    assert answer.status_code == status, answer.text
    found = world.broker.agents.show(agent)
    assert found["state"] == ("retired" if status == 303 else "active")
    assert world.broker.delegations.show(handed)["state"] == ("revoked" if status == 303 else "active")
    if status == 303:
        assert (found["retired_by"], found["retired_reason"]) == (f"user:{who}@example.com", "task done")
        assert "Every call of this workspace is refused" in world[who].get(f"/workspaces/{workspace}").text
    refused = [(f"user:{who}@example.com", "Failure")] if status == 403 else []
    assert world.audited("agent.retire")[before:] == refused


def test_a_successor_is_shown_with_the_one_before_and_what_was_said_is_text(world: World) -> None:
    agent = agent_of(world, 21)
    world.broker.agents.change(OPERATOR, agent, ChangeAgent(version=1, purpose=SCRIPT, owner=SCRIPT))
    first = world["ada"].get("/workspaces/ws-21").text
    assert SCRIPT not in first
    assert "&lt;script&gt;" in first
    new = world.broker.agents.succeed(OPERATOR, agent, SucceedAgent(reason=SCRIPT, name="second", model="m-2"))
    page = world["ada"].get("/workspaces/ws-21").text
    assert "second" in page
    assert "Before it" in page
    assert f"/agents/{new['id']}/retire" in page
    assert SCRIPT not in page + world["dan"].get("/agents").text


def test_a_sponsor_on_the_command_line_looks_at_and_ends_the_own_agents_and_does_no_more(world: World) -> None:
    agent = agent_of(world, 31)
    ada = world.terminal("ada")
    listed = ada.get("/operator/v1/agents").json()["agents"]
    assert agent in {one["id"] for one in listed}
    assert {one["sponsor"].lower() for one in listed} == {"ada@example.com"}
    assert ada.get("/operator/v1/agents?sponsor=ben@example.com").json()["agents"] == []
    assert ada.get(f"/operator/v1/agents/{agent}").status_code == 200
    foreign = ada.get("/operator/v1/agents/agent-2")
    assert (foreign.status_code, foreign.json()["code"]) == (404, "unknown_agent")
    assert ada.ask("POST", "/operator/v1/agents/agent-2/retire", json={"reason": "not mine"}).status_code == 404
    for method, path in (
        ("POST", "/agents"),
        ("PUT", f"/agents/{agent}"),
        ("POST", f"/agents/{agent}/succeed"),
        ("GET", "/agents/changes"),
    ):
        assert ada.ask(method, f"/operator/v1{path}", json={}).json()["code"] == "not_allowed", (method, path)
    assert world.broker.agents.show("agent-2")["state"] == "active"
    ended = ada.ask("POST", f"/operator/v1/agents/{agent}/retire", json={"reason": "task done"})
    assert (ended.status_code, ended.json()["retired_by"]) == (200, "user:ada@example.com")
