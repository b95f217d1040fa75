"""What the journal of a workspace says stands in the broker's trail, in a frame that is the broker's own."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from broker_rig import Lab
from test_edr_findings import workspace_on

from saw.audit import Chain, EventFactory, Subject, validate
from saw.files import load_json
from saw.identity.x509 import Authority, new_key_and_csr
from saw.runtime.policyd_broker import BrokerUnreachable, PolicyBroker
from saw.runtime.policyd_config import Workspace

sys.path.append(str(Path(__file__).parents[1] / "telemetry"))
from telemetry_rig import Host, ssh, until

pytestmark = pytest.mark.control("P0-05")
TIME = datetime(2026, 11, 30, tzinfo=UTC)
SOURCE = "host.host-1.00000000"


def told(broker: Lab, name: str) -> list[dict]:
    """Events of the trail that came by telemetry of this workspace."""
    events = [one["event"] for one in broker.events()]
    ours = [one for one in events if one["unmapped"]["saw"].get("workspace") == name]
    return [one for one in ours if "chain" in one["unmapped"]["saw"] or one["unmapped"]["saw"].get("why")]


@pytest.mark.thorough
def test_events_of_a_workspace_reach_the_trail_and_wait_for_a_broker_that_is_away(
    own_broker: Lab, tmp_path: Path
) -> None:
    name = "ws-telemetry"
    own_broker.workspace(name, to="attesting")
    host = Host(tmp_path)
    workspace_on(host, own_broker, name, identified=True)
    with host.running():
        host.journal.write([ssh("Accepted publickey for agent from 10.210.1.1 port 4022 ssh2: ED25519 SHA256:abc")])
        until(lambda: [one for one in told(own_broker, name) if one["class_uid"] == 3002], "the sign-in at the broker")
        own_broker.stop()
        host.journal.write([ssh("Failed password for root from 10.210.1.1 port 4023 ssh2")])
        until(lambda: "events do not leave for the broker" in host.saw("status").stdout, "the problem")
    own_broker.start()
    workspace_file = host.folder / "workspace/workspace.json"
    workspace_file.unlink()
    for part in (host.folder / "workspace/svid").iterdir():
        part.unlink()
    (host.folder / "workspace/svid").rmdir()
    (host.folder / "workspace/ca.pem").unlink()
    (host.folder / "workspace").rmdir()
    workspace_on(host, own_broker, name, identified=True)
    with host.running():
        until(lambda: len([one for one in told(own_broker, name) if one["class_uid"] == 3002]) == 2, "the second one")
        until(lambda: host.saw("status").returncode == 0, "a good health")
    began, accepted, refused = told(own_broker, name)
    for event in (began, accepted, refused):
        validate(event)
        ours = event["unmapped"]["saw"]
        assert (ours["principal"], ours["layer"]) == (f"workspace:{name}", "workspace")
        assert event["device"]["uid"] == name
    assert [event["unmapped"]["saw"]["chain"]["seq"] for event in (began, accepted, refused)] == [1, 2, 3]
    assert (accepted["user"], accepted["status"], refused["status"]) == ({"name": "agent"}, "Success", "Failure")
    assert accepted["start_time"] < accepted["time"]


@pytest.fixture
def teller(broker: Lab, tmp_path: Path):
    """Tells the broker events as a workspace may, and returns what the trail made of them."""
    number = iter(range(100))

    def tell(name: str, *events: dict, identified: bool = True, spoil=lambda item: item) -> list[dict]:
        folder = tmp_path / str(next(number))
        folder.mkdir()
        broker.workspace(name, to="attesting")
        host = Host(folder)
        workspace_on(host, broker, name, identified=identified)
        client = PolicyBroker(load_json(folder / "workspace/workspace.json", Workspace), folder / "workspace")
        chain = Chain(SOURCE)
        try:
            client.report_telemetry(SOURCE, [spoil(chain.append(event)) for event in events])
        finally:
            client.close()
        return told(broker, name)

    return tell


def factory() -> EventFactory:
    return EventFactory("saw-telemetry", host="host-1", new_uid=lambda: "uid-1")


def test_what_a_workspace_claims_to_be_stands_in_its_report_and_nowhere_else(teller) -> None:
    liar = Subject("operator:root", "agent-9", "ws-other", "a" * 64, "req-1", "10.0.0.1")
    claimed = factory().log(TIME, liar, message="I am the operator", detail={"verified": True})
    (event,) = teller("ws-liar", claimed)
    ours = event["unmapped"]["saw"]
    assert (ours["principal"], ours["workspace"], event["device"]["uid"]) == ("workspace:ws-liar", "ws-liar", "ws-liar")
    assert event["actor"]["user"] == {"uid": "workspace:ws-liar"}
    assert event["metadata"]["product"]["name"] == "saw-broker"
    assert "policy" not in event
    assert ours["report"]["principal"] == "operator:root"
    assert event["time"] > claimed["time"] == event["start_time"]


def test_what_is_not_as_it_has_to_be_is_a_finding_in_its_place_and_stops_nothing_behind_it(teller) -> None:
    made = factory()
    good = made.log(TIME, Subject(), message="good")
    control = made.entity_management(TIME, Subject(), ("workspace", "ws-other"), activity="delete")
    found = teller("ws-forging", control, good)
    assert [one["class_uid"] for one in found] == [2004, 0]
    assert found[0]["unmapped"]["saw"]["why"] == "it is of a class that no workspace tells"

    def changed(item):
        return type(item)(item.source, item.seq, item.prev, {**item.event, "message": "another"}, item.hash)

    (event,) = teller("ws-changing", good, spoil=changed)
    assert event["unmapped"]["saw"]["why"] == "it does not match its hash"
    long = made.log(TIME, Subject(), message="m", detail={"text": "x" * 20_000})
    (event,) = teller("ws-long", long)
    assert event["unmapped"]["saw"]["why"] == "it is too long"


def test_without_its_identity_a_workspace_tells_nothing(teller, broker: Lab) -> None:
    with pytest.raises(BrokerUnreachable, match="under the workspace's identity alone"):
        teller("ws-unproven", factory().log(TIME, Subject(), message="hello"), identified=False)
    assert told(broker, "ws-unproven") == []


def test_reports_of_telemetry_have_a_rate_of_their_own(broker: Lab) -> None:
    broker.workspace("ws-flood", to="attesting")
    body = {"workspace_id": "ws-flood", "kind": "telemetry", "telemetry": {"source": SOURCE, "events": []}}
    key, csr = new_key_and_csr("ws-flood")
    authority = Authority.load(broker.config.keys / "x509")
    with broker.tls(pair=(key, authority.issue_svid(csr, "ws-flood", "a" * 64, datetime.now(UTC)))) as client:
        codes = [client.post("/v1/workspace/report", json=body).status_code for _ in range(35)]
        assert codes[0] == httpx.codes.OK
        assert httpx.codes.TOO_MANY_REQUESTS in codes
        other = {"workspace_id": "ws-flood", "kind": "finding", "reason": "something else"}
        assert client.post("/v1/workspace/report", json=other).status_code == httpx.codes.OK
