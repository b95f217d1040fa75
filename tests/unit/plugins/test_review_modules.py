"""The modules about reviews against a real broker: automation reads and denies, and has no way to approve."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from ansible_collections.secure_agent.workspace.plugins.modules import review_decision, review_info

from databases import beside
from saw.policy.keys import create_key

POLICY = "a" * 64
SECRET = b"the body of the call"


@pytest.fixture(scope="module")
def watch(broker_context, tmp_path_factory) -> Path:
    """The key of a reviewer."""
    folder = tmp_path_factory.mktemp("keys")
    create_key(folder, "night-watch", b"passphrase")
    (folder / "passphrase").write_text("passphrase\n")
    body = {"groups": ["maintainers"], "public_key": (folder / "night-watch.pub").read_text()}
    broker_context.operator.request("PUT", "/v1/reviewers/night-watch", body)
    return folder


def waiting(lab, workspace: str, body: bytes = SECRET) -> str:
    if workspace not in {one["id"] for one in lab.operator.request("GET", "/v1/workspaces")["workspaces"]}:
        lab.workspace(workspace)
    with beside(lab.config) as store:
        query = "UPDATE workspaces SET state = 'active', policy_digest = ? WHERE id = ?"
        store.execute(query, (POLICY, workspace))
    call = {"method": "POST", "scheme": "https", "host": "api.example.com", "port": 443, "path": "/v1/notes"}
    call |= {"body": base64.b64encode(body).decode()}
    asked = {"workspace_id": workspace, "call": call, "policy_digest": POLICY, "group": "maintainers", "quorum": 1}
    with lab.tls("perimeter", "edge-modules") as client:
        answer = client.post("/v1/perimeter/reviews", json={**asked, "expires_in_s": 600})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])


def test_what_waits_is_read(broker_context, run_module, watch):
    first, second = (waiting(broker_context, "ws-rev", body) for body in (b"1", b"2"))
    context = broker_context.context
    found = run_module(review_info, context=context, workspace="ws-rev", state="pending")
    assert {one["id"] for one in found["reviews"]} == {first, second}
    assert "night-watch" in {one["name"] for one in found["reviewers"]}
    assert not found["changed"]
    assert run_module(review_info, context=context, workspace="ws-rev", owed=True)["reviews"] == []
    one = run_module(review_info, context=context, id=first)["reviews"][0]
    assert "POST https://api.example.com/v1/notes" in one["rendering"]
    assert run_module(review_info, context=context, id="rv-none")["reviews"] == []
    assert run_module(review_info, context=context, workspace="ws-none")["failure"]["code"] == "unknown_workspace"
    assert run_module(review_info, context=context, id=first, state="pending").failed


@pytest.mark.control("REV-02")
def test_automation_denies_once_and_cannot_approve(broker_context, run_module, watch):
    identifier = waiting(broker_context, "ws-deny")
    wanted = {"context": broker_context.context, "id": identifier, "decision": "deny"}
    wanted |= {"key": str(watch / "night-watch.key"), "passphrase_file": str(watch / "passphrase")}
    refused = run_module(review_decision, **{**wanted, "decision": "approve"})
    assert refused.failed
    assert "must be one of: deny" in refused["msg"]
    assert run_module(review_decision, check=True, **wanted)["changed"]
    state = {"context": broker_context.context, "id": identifier}
    assert run_module(review_info, **state)["reviews"][0]["state"] == "pending"
    denied = run_module(review_decision, **wanted, comment="nobody looks at it")
    assert denied["changed"]
    assert (denied["review"]["state"], denied["review"]["detail"]) == ("denied", "denied by night-watch")
    assert SECRET.decode() not in json.dumps(denied)
    assert not run_module(review_decision, **wanted)["changed"]
    assert not run_module(review_decision, check=True, **wanted)["changed"]


def test_who_is_no_reviewer_and_what_has_ended_is_refused(broker_context, run_module, watch, tmp_path):
    identifier = waiting(broker_context, "ws-deny-2")
    create_key(tmp_path, "mallory")
    wanted = {"context": broker_context.context, "id": identifier, "decision": "deny"}
    stranger = {**wanted, "key": str(tmp_path / "mallory.key")}
    for check in (False, True):
        assert run_module(review_decision, check=check, **stranger)["failure"]["code"] == "not_a_reviewer"
    broker_context.operator.request("POST", f"/v1/reviews/{identifier}/cancel", {"reason": "test"})
    mine = {"key": str(watch / "night-watch.key"), "passphrase_file": str(watch / "passphrase")}
    assert run_module(review_decision, **wanted, **mine)["failure"]["code"] == "review_not_open"
    unknown = run_module(review_decision, **{**wanted, "id": "rv-none"}, **mine)
    assert unknown["failure"]["code"] == "unknown_review"
