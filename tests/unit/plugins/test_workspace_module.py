"""The module ``workspace`` against a real broker: check run, run, second run, and every refusal."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from ansible_collections.secure_agent.workspace.plugins.modules import workspace
from broker_rig import image_record

from saw.broker.client import OperatorClient


def at_broker(lab, name: str) -> dict[str, object]:
    return dict(lab.operator.request("GET", f"/v1/workspaces/{name}"))


@pytest.mark.control("LIF-01")
def test_each_step_is_forecast_taken_and_then_left_alone(broker_context, run_module) -> None:
    broker_context.workspace("ws-life", to="attesting")
    wanted = {"context": broker_context.context, "id": "ws-life", "reason": "test"}
    for state, told, release in (
        ("stopped", "stopped", False),
        ("running", "attesting", False),
        ("quarantined", "quarantined", False),
        ("stopped", "stopped", True),
        ("decommissioned", "decommissioned", False),
    ):
        before = at_broker(broker_context, "ws-life")
        forecast = run_module(workspace, check=True, **wanted, state=state, release=release)
        assert (forecast["changed"], forecast["workspace"]["state"]) == (True, told)
        assert at_broker(broker_context, "ws-life") == before
        done = run_module(workspace, **wanted, state=state, release=release)
        assert (done["changed"], done["workspace"]["state"]) == (True, told)
        assert done["diff"] == forecast["diff"]
        assert done["diff"]["before"]["state"] == before["state"]
        for check in (False, True):
            assert not run_module(workspace, check=check, **wanted, state=state, release=release)["changed"]


@pytest.mark.control("LIF-02")
def test_a_killed_workspace_is_not_released_by_the_way(broker_context, run_module) -> None:
    broker_context.workspace("ws-killed", to="attesting")
    wanted = {"context": broker_context.context, "id": "ws-killed"}
    assert run_module(workspace, **wanted, state="quarantined", reason="incident 7")["changed"]
    for check in (False, True):
        refused = run_module(workspace, check=check, **wanted, state="stopped")
        assert refused["failure"]["code"] == "quarantined"
        assert refused["msg"] == "ws-killed was killed: incident 7 (set release to end that)"
        running = run_module(workspace, check=check, **wanted, state="running", release=True)
        assert running["failure"]["code"] == "transition_refused"
    assert at_broker(broker_context, "ws-killed")["state"] == "quarantined"


def test_another_image_needs_a_workspace_that_does_not_run(broker_context, run_module) -> None:
    broker_context.register_image(image_record("rebuilt", "7" * 64))
    broker_context.workspace("ws-image", to="attesting")
    wanted = {"context": broker_context.context, "id": "ws-image", "image": "rebuilt"}
    for check in (False, True):
        assert run_module(workspace, check=check, **wanted)["failure"]["code"] == "not_stopped"
    assert run_module(workspace, **{**wanted, "image": "workspace"}, state="stopped")["changed"]
    forecast = run_module(workspace, check=True, **wanted, state="running")
    assert forecast["diff"]["after"] == {"state": "attesting", "image": "rebuilt"}
    assert run_module(workspace, **wanted, state="running")["diff"] == forecast["diff"]
    assert not run_module(workspace, **wanted, state="running")["changed"]
    assert at_broker(broker_context, "ws-image")["image_sha256"] == "7" * 64


def test_what_is_not_there_or_is_over_is_refused(broker_context, run_module) -> None:
    wanted = {"context": broker_context.context, "id": "ws-nothing", "state": "stopped"}
    assert run_module(workspace, **wanted)["failure"]["code"] == "unknown_workspace"
    broker_context.workspace("ws-over")
    broker_context.step("ws-over", "decommissioned")
    for check in (False, True):
        over = run_module(workspace, check=check, **{**wanted, "id": "ws-over", "state": "running"})
        assert over["failure"]["code"] == "transition_refused"
        assert "this state is final" in over["msg"]
    assert run_module(workspace, context=broker_context.context, id="ws-over").failed


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch):
    """Have somebody else act between what the module reads and what it changes; return the bodies of its changes."""

    def arrange(act: Any, times: int = 1) -> list[dict[str, Any]]:
        bodies: list[dict[str, Any]] = []
        ask, left = OperatorClient.request, [times]

        def request(client: OperatorClient, method: str, path: str, json: Any = None) -> Any:
            if method != "GET":
                if left[0]:
                    left[0] -= 1
                    monkeypatch.setattr(OperatorClient, "request", ask)
                    act()
                    monkeypatch.setattr(OperatorClient, "request", request)
                bodies.append(json)
            return ask(client, method, path, json)

        monkeypatch.setattr(OperatorClient, "request", request)
        return bodies

    return arrange


@pytest.mark.control("LIF-02")
def test_a_workspace_that_is_killed_in_between_is_not_released_by_a_stop(broker_context, run_module, between) -> None:
    broker_context.workspace("ws-race", to="attesting")
    kill = {"reason": "incident 8"}
    between(lambda: broker_context.operator.request("POST", "/v1/workspaces/ws-race/kill", kill))
    refused = run_module(workspace, context=broker_context.context, id="ws-race", state="stopped")
    assert refused["failure"]["code"] == "quarantined"
    assert at_broker(broker_context, "ws-race")["state"] == "quarantined"


def test_what_changed_in_between_is_read_again_and_a_register_that_never_rests_is_a_failure(
    broker_context, run_module, between
) -> None:
    broker_context.workspace("ws-moves", to="attesting")
    steps = iter(["provisioning", "provisioning", "attesting", "provisioning"])
    bodies = between(lambda: broker_context.step("ws-moves", next(steps)))
    done = run_module(workspace, context=broker_context.context, id="ws-moves", state="stopped")
    assert (done["changed"], done["diff"]["before"]["state"], done["workspace"]["state"]) == (
        True,
        "attesting",
        "stopped",
    )
    first, second = (body for body in bodies if "idempotency_key" in body)
    assert second["version"] == first["version"] + 1
    assert done["workspace"]["version"] == second["version"] + 1
    stated = {name: value for name, value in second.items() if name != "idempotency_key"}
    words = json.dumps(["ws-moves", stated], sort_keys=True).encode()
    assert second["idempotency_key"] == hashlib.sha256(words).hexdigest() != first["idempotency_key"]
    broker_context.step("ws-moves", "attesting")
    between(lambda: broker_context.step("ws-moves", next(steps)), times=3)
    refused = run_module(workspace, context=broker_context.context, id="ws-moves", state="stopped")
    assert refused["failure"]["code"] == "version_conflict"
    assert refused["failure"]["details"]["version"] == at_broker(broker_context, "ws-moves")["version"]


def test_a_kill_states_no_version_and_a_broker_without_versions_is_told_none(
    broker_context, run_module, between
) -> None:
    broker_context.workspace("ws-cut", to="attesting")
    bodies = between(lambda: broker_context.step("ws-cut", "stopped"))
    assert run_module(workspace, context=broker_context.context, id="ws-cut", state="quarantined")["changed"]
    assert bodies[-1] == {"reason": "by playbook"}
    assert workspace.stated({"id": "ws-cut", "state": "active"}, {"image": "i"}) == {"image": "i"}
