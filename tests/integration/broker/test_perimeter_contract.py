"""What the broker states to perimeters is what the gatekeeper reads: field by field, in every state of a workspace.

The gateway's own tests run against a broker of theirs; it is held against the real one here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest
from broker_rig import encode

from databases import beside
from saw.audit import ZERO
from saw.gateway.errors import StateRefused
from saw.gateway.link import Accepted
from saw.gateway.state import PerimeterState, StatedKeys, WorkspaceEntry, decode_release, parse_state

sys.path.append(str(Path(__file__).parents[1] / "gateway"))

from ring2_broker import Broker as FarBroker

LEASE, SEEN = "2026-11-23T12:01:30Z", "f" * 64


@pytest.fixture
def stated(own_broker):
    """The bytes that a real broker answers: a release, and workspaces that called, never called, stopped and were killed."""
    lab = own_broker
    digest, publication = lab.officers.publication(1)
    lab.operator.request("POST", "/v1/policy/publish", encode(publication))
    for name in ("called", "stopped", "killed", "gone"):
        lab.workspace(name, to="attesting")
    lab.workspace("new")
    with beside(lab.config) as store:
        values = "state = 'active', lease_expires_at = ?, policy_digest = ?, svid_sha256 = ?"
        store.execute(f"UPDATE workspaces SET {values} WHERE id = 'called'", (LEASE, digest, SEEN))  # noqa: S608
    lab.step("stopped", "stopped")
    lab.operator.request("POST", "/v1/workspaces/killed/kill", {"reason": "drill"})
    lab.operator.request("POST", "/v1/workspaces/gone/kill", {"reason": "drill"})
    lab.step("gone", "decommissioned")
    with lab.tls("perimeter", "edge-contract") as edge:
        answer = edge.get("/v1/perimeter/state?after=0&wait=0")
        assert answer.status_code == 200
        yield publication, digest, answer.content, edge


def test_the_gatekeeper_reads_every_field_that_the_broker_states(stated) -> None:
    publication, digest, raw, _ = stated
    state = parse_state(raw)
    assert {entry.id: entry.state for entry in state.workspaces} == {
        "called": "active",
        "stopped": "stopped",
        "killed": "quarantined",
        "new": "requested",
    }
    [called] = [entry for entry in state.workspaces if entry.id == "called"]
    assert called.lease_expires_at == msgspec.convert(LEASE, type=type(state.now))
    assert (called.policy_digest, called.released_digest, called.svid_sha256) == (digest, digest, SEEN)
    assert (called.sponsor, called.blueprint, called.ring) == ("ada@example.com", "coding", "stable")
    assert called.released_at is not None
    assert decode_release(state.releases[digest]) == next(iter(publication.targets.values()))
    assert state.policy_keys is not None
    assert state.policy_keys.threshold == 2
    # Nothing that the gatekeeper would read is left out: a default would hide it.
    plain = msgspec.json.decode(raw)
    assert set(plain) == set(PerimeterState.__struct_fields__)
    assert all(set(entry) == set(WorkspaceEntry.__struct_fields__) for entry in plain["workspaces"])
    assert set(plain["policy_keys"]) == set(StatedKeys.__struct_fields__)


def test_a_perimeter_of_before_is_told_of_no_number_that_it_would_refuse(stated, own_broker) -> None:
    edge = stated[3]
    with beside(own_broker.config) as store:
        store.execute("UPDATE workspaces SET number = 251 WHERE id = 'called'")

    def told(query: str) -> set[str]:
        return {entry["id"] for entry in edge.get(f"/v1/perimeter/state?after=0&wait=0{query}").json()["workspaces"]}

    assert told("") == {"stopped", "killed", "new"}
    assert told("&first=1&last=1000") == {"called", "stopped", "killed", "new"}
    assert told("&first=251&last=251") == {"called"}
    assert edge.get("/v1/perimeter/state?first=x").status_code == 400


def test_a_field_that_the_gatekeeper_does_not_know_is_refused(stated) -> None:
    plain = msgspec.json.decode(stated[2])
    plain["workspaces"][0]["surprise"] = 1
    with pytest.raises(StateRefused, match="surprise"):
        parse_state(msgspec.json.encode(plain))


def test_the_far_broker_of_the_gateways_tests_states_what_the_real_one_does(stated) -> None:
    far = FarBroker()
    far.put("ws-1", number=1, state="active", lease_expires_at=60)
    real, fake = msgspec.json.decode(stated[2]), far.state()
    assert set(fake) == set(real)
    assert set(fake["policy_keys"]) == set(real["policy_keys"])
    with pytest.raises(StateRefused, match="surprise"):
        far.put("ws-1", surprise=1)
        far.state()


def test_events_are_shipped_and_accepted_in_the_form_of_both_sides(stated) -> None:
    edge = stated[3]
    empty = edge.post("/v1/perimeter/events", json={"source": "edge-contract", "events": []})
    assert msgspec.json.decode(empty.content, type=Accepted) == Accepted(0)
    far = FarBroker()
    with pytest.raises(msgspec.ValidationError):
        far._accept({"source": "edge", "events": [{"seq": 1, "hash": ZERO}]})
    assert far._accept({"source": "edge", "events": []}) == {"accepted": 0}
