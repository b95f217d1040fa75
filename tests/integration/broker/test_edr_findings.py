"""What endpoint detection finds in a workspace stands in the broker's trail, under the workspace's identity."""

from __future__ import annotations

import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from broker_rig import NAME, Lab

from saw.audit import validate
from saw.identity.x509 import Authority, new_key_and_csr

sys.path.append(str(Path(__file__).parents[1] / "edr"))
from edr_rig import Host, until

pytestmark = pytest.mark.control("P0-03")


def workspace_on(host: Host, broker: Lab, name: str, *, identified: bool) -> None:
    """Lay out what a workspace has: what it was told, the authority, and its identity when it holds one."""
    run = host.folder / "workspace"
    (run / "svid").mkdir(parents=True)
    shutil.copy(broker.ca_file, run / "ca.pem")
    if identified:
        key, csr = new_key_and_csr(name)
        authority = Authority.load(broker.config.keys / "x509")
        (run / "svid/key.pem").write_bytes(key)
        (run / "svid/svid.pem").write_bytes(authority.issue_svid(csr, name, "a" * 64, datetime.now(UTC)))
    told = {
        "workspace_id": name,
        "number": 1,
        "trust_domain": "saw.example",
        "broker_url": f"https://127.0.0.1:{broker.port}",
        "broker_name": NAME,
        "ring2": "127.0.0.1:1",
        "ring2_name": "ring2.saw.internal",
        "ca_pem": broker.ca_file.read_text(),
        "tuf_root": {},
        "blueprint": "coding",
        "ring": "stable",
    }
    (run / "workspace.json").write_bytes(msgspec.json.encode(told))


def findings(broker: Lab, name: str, kind: str) -> list[dict]:
    events = [chained["event"] for chained in broker.events()]
    wanted = [
        event for event in events if event["class_uid"] == 2004 and event["unmapped"]["saw"].get("workspace") == name
    ]
    return [event for event in wanted if event["finding_info"]["title"] == kind]


@pytest.mark.parametrize("identified", [True, False])
def test_a_finding_of_a_workspace_reaches_the_brokers_trail(broker: Lab, tmp_path: Path, *, identified: bool) -> None:
    name = f"ws-edr-{identified}".lower()
    broker.workspace(name, to="attesting")
    host = Host(tmp_path)
    workspace_on(host, broker, name, identified=identified)
    with host.watching():
        (host.root / "etc/systemd/system/notes.txt").write_text("not a unit")
        (host.root / "etc/systemd/system/door.service").write_text("[Service]\nExecStart=/bin/true\n")
        (event,) = until(lambda: findings(broker, name, "persistence"), "the finding at the broker")
        until(lambda: host.found("persistence")[0].broker, "the finding struck off")
    assert event["unmapped"]["saw"]["verified"] is identified
    inner = event["unmapped"]["saw"]["report"]["event"]
    validate(inner)
    assert inner["unmapped"]["saw"]["subject"] == f"{host.root}/etc/systemd/system/door.service"
    assert inner["device"]["uid"] == name
    host.close()


def test_findings_wait_for_a_broker_that_is_away(own_broker: Lab, tmp_path: Path) -> None:
    own_broker.workspace("ws-edr-away", to="attesting")
    host = Host(tmp_path)
    workspace_on(host, own_broker, "ws-edr-away", identified=True)
    host.log.close()
    own_broker.stop()
    with host.watching():
        (host.root / "etc/cron.d/job").write_text("* * * * * root true\n")
        until(lambda: host.found("persistence"), "the finding")
        assert not host.found("persistence")[0].broker
    own_broker.start()
    workspace = host.folder / "workspace/workspace.json"
    told = msgspec.json.decode(workspace.read_bytes())
    workspace.write_bytes(msgspec.json.encode({**told, "broker_url": f"https://127.0.0.1:{own_broker.port}"}))
    with host.watching():
        until(lambda: findings(own_broker, "ws-edr-away", "persistence"), "the finding at the broker")
