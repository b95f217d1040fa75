"""The module ``workspace`` against a real broker: check run, run, second run, and every refusal."""

from __future__ import annotations

import pytest
from ansible_collections.secure_agent.workspace.plugins.modules import workspace
from broker_rig import image_record


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
