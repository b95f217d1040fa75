"""The module about sponsors against a real broker: check run, run, second run, whole lists, and refusals by code and text."""

from __future__ import annotations

import pytest
from ansible_collections.secure_agent.workspace.plugins.modules import sponsor, workspace_registration

pytestmark = pytest.mark.control("ID-04")
PROFILE = {"blueprint": "coding", "ring": "stable", "image": "workspace"}


@pytest.fixture
def register(broker_context, run_module):
    """Register a workspace of a sponsor."""

    def made(name: str, person: str) -> dict:
        outcome = run_module(workspace_registration, context=broker_context.context, id=name, sponsor=person, **PROFILE)
        assert not outcome.failed, outcome
        return outcome["workspace"]

    return made


def test_who_left_is_checked_disabled_and_then_left_alone(broker_context, run_module, register):
    context, agent = broker_context.context, register("ws-left", "Lea@example.com")["agent_id"]
    wanted = {"context": context, "name": "lea@example.com", "state": "disabled", "reason": "left"}
    forecast = run_module(sponsor, check=True, **wanted)
    assert (forecast["changed"], forecast["quarantined"], forecast["revoked"]) == (True, ["ws-left"], [])
    assert forecast["diff"]["before"]["state"] == "active"
    assert forecast["sponsor"]["workspaces"] == {"quarantined": ["ws-left"]}
    assert broker_context.operator.request("GET", "/v1/workspaces/ws-left")["state"] == "requested"
    done = run_module(sponsor, **wanted)
    assert (done["changed"], done["quarantined"], done["sponsor"]["state"]) == (True, ["ws-left"], "disabled")
    assert done["sponsor"]["workspaces"] == forecast["sponsor"]["workspaces"]
    assert done["sponsor"]["agents"] == [agent]
    again = run_module(sponsor, **wanted)
    assert (again["changed"], again["sponsor"], again["quarantined"]) == (False, done["sponsor"], [])
    assert not run_module(sponsor, check=True, **wanted)["changed"]
    more = run_module(workspace_registration, context=context, id="ws-left-2", sponsor="LEA@example.com", **PROFILE)
    assert more["failure"]["code"] == "sponsor_disabled"
    assert "the sponsor LEA@example.com is disabled" in more["msg"]


def test_who_comes_back_is_enabled_once(broker_context, run_module, register):
    context = broker_context.context
    register("ws-back", "bo@example.com")
    run_module(sponsor, context=context, name="bo@example.com", state="disabled")
    wanted = {"context": context, "name": "bo@example.com", "state": "active", "reason": "came back"}
    assert run_module(sponsor, check=True, **wanted)["sponsor"]["state"] == "active"
    done = run_module(sponsor, **wanted)
    assert (done["changed"], done["sponsor"]["reason"]) == (True, "came back")
    assert done["sponsor"]["workspaces"] == {"quarantined": ["ws-back"]}
    assert not run_module(sponsor, **wanted)["changed"]


def test_a_name_that_sponsors_nothing_is_a_slip_unless_a_list_is_gone_through(broker_context, run_module):
    wanted = {"context": broker_context.context, "name": "nobody@example.com", "state": "disabled"}
    slip = run_module(sponsor, **wanted)
    assert slip["failure"]["code"] == "unknown_sponsor"
    assert "no workspace and no agent names 'nobody@example.com' as its sponsor" in slip["msg"]
    for check in (True, False):
        passed = run_module(sponsor, check=check, **wanted, unknown="ignore")
        assert (passed["changed"], passed["sponsor"]) == (False, {})
