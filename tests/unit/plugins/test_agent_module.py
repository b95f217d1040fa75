"""The modules about agents against a real broker: check run, run, second run, and every refusal by its code and text."""

from __future__ import annotations

import pytest
from ansible_collections.secure_agent.workspace.plugins.modules import (
    agent,
    agent_info,
    delegation,
    workspace_registration,
)

pytestmark = pytest.mark.control("ID-04")
PROFILE = {"sponsor": "dana@example.com", "blueprint": "coding", "ring": "stable", "image": "workspace"}
SAID = {"sponsor": "dana@example.com", "owner": "team A", "purpose": "keeps notes", "harness": "codex 1.2"}
TASK = {"task": "tidy the notes", "resources": [{"host": "api.example.com", "paths": ["/v1/**"]}], "duration": "8h"}


@pytest.fixture
def register(broker_context, run_module):
    """Register a workspace under this name, with a named agent or the one that comes with it."""

    def made(name: str, **more: str) -> dict:
        outcome = run_module(workspace_registration, context=broker_context.context, id=name, **PROFILE, **more)
        assert not outcome.failed, outcome
        return outcome["workspace"]

    return made


def test_an_agent_is_checked_registered_and_then_left_alone(broker_context, run_module):
    wanted = {"context": broker_context.context, "name": "mod-one", **SAID}
    forecast = run_module(agent, check=True, **wanted)
    assert (forecast["changed"], forecast["agent"]["claims"]["harness"]) == (True, "codex 1.2")
    assert run_module(agent_info, context=broker_context.context, name="mod-one")["agents"] == []
    made = run_module(agent, **wanted)
    assert (made["changed"], made["agent"]["state"], made["agent"]["workspace"]) == (True, "registered", None)
    again = run_module(agent, **wanted)
    assert (again["changed"], again["agent"]) == (False, made["agent"])
    assert not run_module(agent, check=True, **wanted)["changed"]
    assert run_module(agent_info, context=broker_context.context, id=made["agent"]["id"])["agents"] == [made["agent"]]
    assert run_module(agent_info, context=broker_context.context, id="agent-0")["agents"] == []


def test_what_is_said_is_changed_alone_and_shown_as_a_difference(broker_context, run_module):
    context = broker_context.context
    before = run_module(agent, context=context, name="mod-said", **SAID)["agent"]
    change = {"context": context, "name": "mod-said", "model": "example/large"}
    forecast = run_module(agent, check=True, **change)
    assert forecast["diff"]["after"]["claims"] == {"harness": "codex 1.2", "model": "example/large"}
    done = run_module(agent, **change)
    assert (done["changed"], done["agent"]["version"], done["agent"]["owner"]) == (
        True,
        before["version"] + 1,
        "team A",
    )
    assert not run_module(agent, **change)["changed"]
    other = run_module(agent, **change, sponsor="ben@example.com")
    assert other["failure"]["code"] == "sponsor_fixed"
    assert "agent mod-said has another sponsor" in other["msg"]
    assert run_module(agent, **{**change, "model": "a\nb"})["failure"]["code"] == "malformed"


def test_a_new_workspace_takes_the_agent_that_is_named(broker_context, run_module, register):
    context = broker_context.context
    mine = run_module(agent, context=context, name="mod-named", **SAID)["agent"]["id"]
    unknown = run_module(workspace_registration, context=context, id="ws-mod-x", **PROFILE, agent="mod-nobody")
    assert (unknown["failure"]["code"], unknown["msg"]) == ("unknown_agent", "there is no living agent mod-nobody")
    assert register("ws-mod-named", agent="mod-named")["agent_id"] == mine
    assert not run_module(workspace_registration, context=context, id="ws-mod-named", **PROFILE, agent="mod-named")[
        "changed"
    ]
    taken = run_module(workspace_registration, context=context, id="ws-mod-y", **PROFILE, agent="mod-named")
    assert taken["failure"]["code"] == "agent_bound"
    moved = run_module(agent, context=context, name="mod-named", workspace=register("ws-mod-z")["id"])
    assert moved["failure"]["code"] == "agent_bound"


@pytest.mark.control("DEL-01")
def test_another_agent_takes_a_workspace_only_when_that_is_asked_for(broker_context, run_module, register):
    context, first = broker_context.context, register("ws-mod-next")["agent_id"]
    handed = run_module(delegation, context=context, workspace="ws-mod-next", **TASK)["delegation"]["id"]
    wanted = {"context": context, "name": "mod-next", "workspace": "ws-mod-next", "model": "m-2"}
    refused = run_module(agent, **wanted)
    assert refused["failure"]["code"] == "workspace_has_agent"
    assert f"ws-mod-next has an agent, {first}; set replace: true" in refused["msg"]
    forecast = run_module(agent, check=True, **wanted, replace=True)
    assert (forecast["changed"], forecast["retired"], forecast["agent"]["sponsor"]) == (True, first, PROFILE["sponsor"])
    assert broker_context.operator.request("GET", f"/v1/agents/{first}")["state"] == "registered"
    wrong = run_module(agent, **wanted, replace=True, sponsor="ben@example.com")
    assert wrong["failure"]["code"] == "sponsor_fixed"
    done = run_module(agent, **wanted, replace=True, reason="a newer model")
    assert (done["retired"], done["revoked"], done["agent"]["predecessor"]) == (first, [handed], first)
    assert not run_module(agent, **wanted, replace=True)["changed"]
    unbound = run_module(agent, context=context, name="mod-late", **SAID)["agent"]
    late = run_module(agent, context=context, name="mod-late", workspace="ws-mod-next", replace=True)
    assert (late["failure"]["code"], late["failure"]["details"]["name"]) == ("workspace_has_agent", "mod-next")
    ended = run_module(agent, context=context, name="mod-next", state="retired")
    assert ended["retired"] == done["agent"]["id"]
    assert run_module(agent, check=True, context=context, name="mod-late", workspace="ws-mod-next")["changed"]
    bound = run_module(agent, context=context, name="mod-late", workspace="ws-mod-next")
    assert (bound["agent"]["id"], bound["agent"]["workspace"]) == (unbound["id"], "ws-mod-next")


@pytest.mark.control("DEL-01")
def test_an_agent_is_retired_once_and_nothing_more_is_handed_to_it(broker_context, run_module, register):
    context = broker_context.context
    run_module(agent, context=context, name="mod-ends", **SAID)
    register("ws-mod-ends", agent="mod-ends")
    task = {"context": context, "workspace": "ws-mod-ends", **TASK}
    handed = run_module(delegation, **task)["delegation"]["id"]
    gone = {"context": context, "name": "mod-ends", "state": "retired", "reason": "task over"}
    forecast = run_module(agent, check=True, **gone)
    assert (forecast["changed"], forecast["revoked"]) == (True, [])
    done = run_module(agent, **gone)
    assert (done["agent"]["state"], done["agent"]["retired_reason"], done["revoked"]) == (
        "retired",
        "task over",
        [handed],
    )
    assert not run_module(agent, **gone)["changed"]
    assert run_module(delegation, **task)["failure"]["code"] == "agent_retired"
    nobody = run_module(agent, context=context, name="mod-ends")
    assert nobody["failure"]["details"] == {"missing": ["sponsor"]}
    again = run_module(agent, context=context, name="mod-ends", workspace="ws-mod-ends", **SAID)
    assert again["changed"]
    assert run_module(delegation, **task)["changed"]
