"""Governed calls under delegations, through the real ring 2: covered, outside, revoked, narrowed, kept over a restart."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from ring2_rig import Rig, wait_for
from ring2_sponsor import Sponsor

from saw.policy.delegation import Resource


@pytest.fixture
def sponsor(rig: Rig) -> Any:
    yield Sponsor(rig)
    rig.settle(delegations=[], delegation_required=False)


@pytest.mark.control("DEL-01")
@pytest.mark.control("POL-04")
def test_a_call_outside_the_delegation_never_leaves_and_one_within_does(rig: Rig, sponsor: Sponsor) -> None:
    rig.settle(delegations=[sponsor.hand()], delegation_required=True)
    assert rig.call().status == 200
    refused = rig.call(target="/v1/elsewhere")
    assert refused.outcome == (403, "outside_delegation")
    (step,) = refused.json["next_steps"]
    assert step.startswith(
        "stay within the task that was handed to this agent, or ask the sponsor for a delegation of this call"
    )
    assert "POST http://policy.local/v1/requests" in step
    assert [seen["target"] for seen in rig.far.arrived] == ["/v1/things"]
    wait_for(
        lambda: any(
            item.event.get("http_request", {}).get("url", {}).get("path") == "/v1/elsewhere"
            for item in rig.broker.events
        ),
        "event",
    )
    calls = [item.event for item in rig.broker.events if "http_request" in item.event]
    events = {event["http_request"]["url"]["path"]: event for event in calls[-2:]}
    assert events["/v1/things"]["unmapped"]["saw"]["delegation"] == "dlg-1"
    assert events["/v1/elsewhere"]["status_detail"] == "outside_delegation"


@pytest.mark.control("DEL-01")
def test_policy_still_decides_first_so_a_delegation_never_widens(rig: Rig, sponsor: Sponsor) -> None:
    everything = (Resource(host="api.example.com"), Resource(host="other.example.com"))
    rig.settle(delegations=[sponsor.hand(resources=everything)], delegation_required=True)
    assert rig.call("DELETE", "/v1/things").outcome == (403, "method_or_path_not_allowed")
    assert rig.call(host="other.example.com").outcome == (403, "host_not_allowed")
    assert rig.call().status == 200


@pytest.mark.control("DEL-01")
def test_a_revoked_delegation_refuses_the_next_request_on_an_open_connection_too(rig: Rig, sponsor: Sponsor) -> None:
    rig.settle(delegations=[sponsor.hand()], delegation_required=True)
    assert rig.call().status == 200
    rig.settle(delegations=[])
    assert rig.call().outcome == (403, "outside_delegation")


@pytest.mark.control("DEL-01")
@pytest.mark.control("ID-04")
def test_nothing_leaves_in_the_name_of_a_retired_agent_and_its_successor_calls_with_its_own(
    rig: Rig, sponsor: Sponsor
) -> None:
    rig.settle(agent_retired=True)
    try:
        refused = rig.call()
        assert refused.outcome == (403, "agent_retired")
        assert refused.json["next_steps"] == [
            "nothing more is done in the name of this agent; its sponsor has it succeeded by another one"
        ]
        assert rig.far.arrived == []
    finally:
        rig.settle(agent_retired=False)
    rig.settle(agent="agent-9", delegations=[sponsor.hand()], delegation_required=True)
    try:
        assert rig.call().outcome == (403, "outside_delegation")
        rig.settle(delegations=[sponsor.hand(agent="agent-9")])
        assert rig.call().status == 200
    finally:
        rig.settle(agent="agent-1")


@pytest.mark.control("DEL-02")
def test_a_part_whose_line_is_missing_or_wider_counts_for_nothing(rig: Rig, sponsor: Sponsor) -> None:
    part = sponsor.hand("dlg-2", "dlg-1")
    rig.settle(delegations=[part], delegation_required=True)
    assert rig.call().outcome == (403, "outside_delegation")
    narrow = sponsor.hand(
        workspace="ws-2", agent="agent-2", resources=(Resource(host="api.example.com", paths=("/x",)),)
    )
    rig.settle(delegations=[narrow, part])
    assert rig.call().outcome == (403, "outside_delegation")
    begun, ends = datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(hours=2)
    whole = sponsor.hand(workspace="ws-2", agent="agent-2", not_before=begun, expires=ends)
    rig.settle(delegations=[whole, part])
    assert rig.call().status == 200


@pytest.mark.control("DEL-01")
def test_delegations_survive_a_restart_without_broker_and_still_bind(rig: Rig, sponsor: Sponsor) -> None:
    rig.settle(delegations=[sponsor.hand()], delegation_required=True)
    assert rig.call().status == 200
    rig.broker.answering = False
    try:
        rig.stop_gatekeeper()
        rig.start_gatekeeper()
        wait_for(lambda: rig.call().status == 200, "a call under the saved delegation")
        assert rig.call(target="/v1/elsewhere").outcome == (403, "outside_delegation")
    finally:
        rig.broker.answering = True


@pytest.mark.control("DEL-01")
@pytest.mark.control("REV-01")
def test_under_approval_review_every_write_waits_for_the_sponsors_and_reads_do_not(rig: Rig, sponsor: Sponsor) -> None:
    resources = (Resource(host="api.example.com", paths=("/v1/things", "/v1/notes")),)
    rig.settle(delegations=[sponsor.hand(approval="review", resources=resources)], delegation_required=True)
    assert rig.call().status == 200
    answer = rig.call("POST", "/v1/notes", body=b"text")
    assert answer.status == 202
    review = answer.json["review_id"]
    asked = rig.broker.reviews.one.opened
    assert (asked.group, asked.delegation, asked.rule) == ("sponsors", "dlg-1", "")
    assert rig.call("POST", "/v1/items/1", body=b"x").outcome == (403, "outside_delegation")
    poll = f"/.well-known/saw/reviews/{review}?wait=20"
    assert rig.call(target=poll, host="git.example.com", binary="/usr/bin/git").outcome == (403, "outside_delegation")
    rig.broker.reviews.move(review, "approved")
    assert rig.call(target=poll).headers["x-saw-review"] == "done"
    assert [seen["method"] for seen in rig.far.arrived] == ["GET", "POST"]
    rig.settle(delegations=[sponsor.hand(approval="read-only", resources=resources)])
    assert rig.call("POST", "/v1/notes", body=b"more").outcome == (403, "outside_delegation")
