"""Delegations at a real broker: issued under a signature, narrowed, listed, revoked with all below, told to perimeters."""

from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest
from broker_rig import Lab, cli

from saw.broker.client import BrokerRefusal, listed_delegations
from saw.gateway.delegations import engagements, verify_statements
from saw.gateway.state import parse_state
from saw.identity.statement import verify_statement
from saw.policy.delegation import STATEMENT_TYPE, parse_delegation

V1 = {"host": "api.example.com", "paths": ["/v1/**"]}
NOTES = {"host": "api.example.com", "methods": ["GET"], "paths": ["/v1/notes/*"]}


def issue(broker: Lab, workspace: str, **fields: Any) -> dict[str, Any]:
    body = {"workspace_id": workspace, "task": "tidy the notes", "resources": [V1], "duration_s": 3600, **fields}
    return broker.operator.request("POST", "/v1/delegations", body)


def refusal(broker: Lab, workspace: str, **fields: Any) -> BrokerRefusal:
    with pytest.raises(BrokerRefusal) as caught:
        issue(broker, workspace, **fields)
    return caught.value


def held(broker: Lab, workspace: str) -> Any:
    """What a gatekeeper makes of the state that the broker tells it."""
    with broker.tls("perimeter", "edge") as client:
        state = parse_state(client.get("/v1/perimeter/state?after=0&wait=0").content)
    verified, refused = verify_statements(state.workspaces, {}, broker.ca_file.read_bytes(), datetime.now(UTC))
    assert not refused
    return engagements(state.workspaces, verified).get(workspace)


@pytest.mark.control("DEL-01")
def test_a_delegation_is_signed_for_the_workspace_its_agent_and_its_sponsor(broker: Lab) -> None:
    workspace = broker.workspace("del-issue")
    made = issue(broker, "del-issue")
    assert (made["state"], made["sponsor"], made["agent"]) == ("active", "ada@example.com", workspace["agent_id"])
    found = verify_statement(made["statement"], STATEMENT_TYPE, broker.ca_file.read_bytes(), datetime.now(UTC))
    record = parse_delegation(found.payload)
    assert (record.id, record.workspace, found.signer) == (
        made["id"],
        "del-issue",
        "spiffe://saw.example/signer/broker",
    )
    assert (record.expires - record.not_before).total_seconds() == 3600
    event = broker.events()[-1]["event"]
    assert event["entity"] == {"type": "delegation", "uid": made["id"]}
    assert event["unmapped"]["saw"]["principal"] == "operator:root"
    assert event["unmapped"]["saw"]["resources"] == ["* api.example.com:443 /v1/**"]


def test_the_key_that_signs_is_private(broker: Lab) -> None:
    assert stat.S_IMODE((broker.config.keys / "signer.pem").stat().st_mode) == 0o600


@pytest.mark.control("DEL-02")
def test_a_part_lies_within_the_whole_or_is_refused_and_audited(broker: Lab) -> None:
    broker.workspace("del-part")
    whole = issue(broker, "del-part")
    part = issue(broker, "del-part", parent=whole["id"], resources=[NOTES], duration_s=600, approval="review")
    assert part["parent"] == whole["id"]
    wider = refusal(broker, "del-part", parent=part["id"], resources=[V1], duration_s=60, approval="policy")
    assert (wider.code, wider.status, len(wider.details["problems"])) == ("delegation_wider", 403, 2)
    event = broker.events()[-1]["event"]
    assert (event["status"], event["entity"]["uid"]) == ("Failure", part["id"])
    narrower = issue(broker, "del-part", parent=part["id"], resources=[NOTES], duration_s=60, approval="read-only")
    assert narrower["state"] == "active"


@pytest.mark.control("DEL-02")
def test_another_workspace_of_the_same_sponsor_may_be_handed_a_part_and_no_other(broker: Lab) -> None:
    for name in ("del-a", "del-b"):
        broker.workspace(name)
    whole = issue(broker, "del-a")
    part = issue(broker, "del-b", parent=whole["id"], resources=[NOTES], duration_s=600)
    lines = held(broker, "del-b").lines
    assert [line.record.id for line in lines] == [part["id"]]
    body = {"id": "del-c", "sponsor": "ben@example.com", "blueprint": "coding", "ring": "stable", "image": "workspace"}
    broker.operator.request("POST", "/v1/workspaces", body)
    assert refusal(broker, "del-c", parent=whole["id"], duration_s=600).details["problems"] == [
        "it has another sponsor"
    ]


@pytest.mark.control("DEL-01")
def test_revoking_ends_a_delegation_and_all_that_was_made_from_it_once(broker: Lab) -> None:
    broker.workspace("del-end")
    whole = issue(broker, "del-end")
    part = issue(broker, "del-end", parent=whole["id"], duration_s=600)
    other = issue(broker, "del-end", resources=[NOTES])
    assert len(held(broker, "del-end").lines) == 3
    path = f"/v1/delegations/{whole['id']}/revoke"
    ended = broker.operator.request("POST", path, {"reason": "task done"})
    assert (ended["changed"], ended["state"], ended["revoked"]) == (True, "revoked", [whole["id"], part["id"]])
    assert not broker.operator.request("POST", path, {"reason": "task done"})["changed"]
    assert [line.record.id for line in held(broker, "del-end").lines] == [other["id"]]
    assert refusal(broker, "del-end", parent=whole["id"], duration_s=60).code == "delegation_ended"
    broker.operator.request("POST", f"/v1/delegations/{other['id']}/revoke", {"reason": "task done"})
    assert held(broker, "del-end").required
    assert held(broker, "del-end").lines == ()


@pytest.mark.control("DEL-01")
def test_issuing_and_revoking_wake_the_perimeter(broker: Lab) -> None:
    broker.workspace("del-wake")
    with broker.tls("perimeter", "edge") as client:
        seq = client.get("/v1/perimeter/state?after=0&wait=0").json()["seq"]
        made = issue(broker, "del-wake")
        after = client.get(f"/v1/perimeter/state?after={seq}&wait=10").json()["seq"]
        assert after > seq
        broker.operator.request("POST", f"/v1/delegations/{made['id']}/revoke", {"reason": "test"})
        assert client.get(f"/v1/perimeter/state?after={after}&wait=10").json()["seq"] > after


@pytest.mark.control("DEL-01")
def test_what_cannot_be_handed_out_is_refused_with_its_reason(broker: Lab) -> None:
    broker.workspace("del-bad")
    assert refusal(broker, "nobody").code == "unknown_workspace"
    assert refusal(broker, "del-bad", parent="dlg-none").code == "unknown_delegation"
    assert refusal(broker, "del-bad", duration_s=8 * 86_400).code == "malformed"
    assert refusal(broker, "del-bad", duration_s=1).code == "malformed"
    bad = refusal(broker, "del-bad", resources=[{"host": "*.com"}])
    assert (bad.code, len(bad.details["problems"])) == ("delegation_invalid", 1)
    broker.operator.request("POST", "/v1/workspaces/del-bad/kill", {"reason": "test"})
    assert refusal(broker, "del-bad").code == "workspace_ended"
    with broker.tls() as client:
        assert client.post("/v1/delegations", json={}).status_code == 404


def test_a_workspace_that_was_never_given_one_is_not_bound_to_any(broker: Lab) -> None:
    broker.workspace("del-free")
    assert held(broker, "del-free") is None


@pytest.mark.control("DEL-01")
def test_the_command_line_issues_shows_verifies_and_revokes(broker: Lab, tmp_path: Any) -> None:
    broker.workspace("del-cli")
    made = cli(
        broker, "delegation", "issue", "del-cli", "--task", "tidy the notes", "--for", "8h", "--json",
        "--resource", "api.example.com:443 GET,POST /v1/notes /v1/items/**", "--resource", "git.example.com",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    record = json.loads(made.stdout)
    first = record["resources"][0]
    assert (first["ports"], first["methods"], first["paths"]) == ([443], ["GET", "POST"], ["/v1/notes", "/v1/items/**"])
    assert record["id"] in cli(broker, "delegation", "list", "del-cli").stdout
    file = tmp_path / "delegation.json"
    file.write_text(cli(broker, "delegation", "show", record["id"], "--json").stdout)
    good = cli(broker, "delegation", "verify", str(file), "--ca", str(broker.ca_file), "--json")
    assert json.loads(good.stdout)["live"]
    file.write_text(record["statement"][:-6] + "AAAAAA")
    bad = cli(broker, "delegation", "verify", str(file), "--ca", str(broker.ca_file))
    assert (bad.returncode, "signature" in bad.stderr or "malformed" in bad.stderr) == (1, True)
    assert cli(broker, "delegation", "revoke", record["id"], "--reason", "done").returncode == 0
    assert "revoked" in cli(broker, "delegation", "list").stdout
    for wrong in (("--resource", "api.example.com get"), ("--resource", "a b c")):
        refused = cli(broker, "delegation", "issue", "del-cli", "--task", "t", "--for", "8h", *wrong)
        assert (refused.returncode, "cannot be read" in refused.stderr) == (1, True)
    refused = cli(broker, "delegation", "issue", "del-cli", "--task", "t", "--for", "soon", "--resource", "a.test")
    assert "--for" in refused.stderr


@pytest.mark.control("DEL-01")
def test_the_command_line_hands_out_tools_and_reads_every_page(broker: Lab) -> None:
    broker.workspace("del-tools")
    hand = ("delegation", "issue", "del-tools", "--task", "t", "--for", "1h", "--resource", "a.test", "--json")
    named = cli(broker, *hand, "--tool", "tracker search read_*", "--tool", "files")
    assert json.loads(named.stdout)["tools"] == [
        {"server": "tracker", "tools": ["search", "read_*"]},
        {"server": "files", "tools": ["*"]},
    ]
    none = json.loads(cli(broker, *hand, "--tool", "none").stdout)
    assert none["tools"] == []
    plain = json.loads(cli(broker, *hand).stdout)
    assert "tools" not in plain
    for wrong in (("--tool", "none", "--tool", "files"), ("--tool", " ")):
        refused = cli(broker, *hand, *wrong)
        assert (refused.returncode, "cannot be read" in refused.stderr) == (1, True)
    assert cli(broker, "delegation", "revoke", none["id"], "--reason", "done").returncode == 0
    listed = cli(broker, "delegation", "list", "del-tools", "--state", "active", "--json")
    assert [one["id"] for one in json.loads(listed.stdout)["delegations"]].count(plain["id"]) == 1
    assert none["id"] not in listed.stdout
    assert none["id"] in cli(broker, "delegation", "list", "--state", "revoked").stdout
    found = listed_delegations(broker.operator, page=1, workspace_id=["del-tools"])
    assert {one["id"] for one in found} == {plain["id"], none["id"], json.loads(named.stdout)["id"]}
    assert len(found) == 3


@pytest.mark.control("DEL-01")
def test_changes_wake_whoever_waits_for_them_and_a_workspace_asks_under_its_own_name_alone(broker: Lab) -> None:
    broker.workspace("del-feed")
    seq = broker.operator.request("GET", "/v1/delegations?limit=1")["seq"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(broker.operator.request, "GET", f"/v1/delegations/changes?after={seq}&wait=20")
        made = issue(broker, "del-feed")
        assert made["id"] in [one["id"] for one in waiting.result(60)["delegations"]]
    with broker.tls() as client:
        answer = client.get("/v1/workspace/tools?workspace_id=del-feed")
        assert (answer.status_code, answer.json()["code"]) == (403, "not_this_workspace")
    with broker.tls("perimeter", "edge") as client:
        assert client.get("/v1/workspace/tools?workspace_id=del-feed").status_code == 403
