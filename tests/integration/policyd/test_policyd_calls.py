"""A policy that is too narrow: ring 1 refuses the calls, the broker hears of it from the workspace, and the ring halts."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from policyd_lab import POLICY, Lab

from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.tuf_repository import adopt_publication

sys.path.append(str(Path(__file__).parents[1] / "broker"))

from broker_rig import Lab as BrokerLab
from broker_rig import encode

GOVERNANCE = """schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team}
plaintext: ["HOST:443"]
"""
NARROW = POLICY.replace("api.example.com", "other.example.com")


class Workspace:
    """The lab's workspace under a real broker: real ring 1, real policy agent, real reports over mutual TLS."""

    def __init__(self, lab: Lab, broker: BrokerLab) -> None:
        self.lab, self.broker = lab, broker
        self.digests: dict[int, str] = {}
        broker.workspace("ws-demo", to="attesting")
        told = json.loads((lab.run / "workspace.json").read_text())
        ca = broker.ca_file.read_text()
        told |= {
            "broker_url": f"https://127.0.0.1:{broker.port}",
            "ca_pem": ca,
            "tuf_root": json.loads(broker.officers.root),
        }
        (lab.run / "workspace.json").write_text(json.dumps(told))
        (lab.run / "ca.pem").write_text(ca)
        key, csr = new_key_and_csr("ws-demo")
        authority = Authority.load(broker.config.keys / "x509")
        (lab.run / "svid" / "key.pem").write_bytes(key)
        certificate = authority.issue_svid(csr, "ws-demo", "0" * 64, datetime.now(UTC))
        (lab.run / "svid" / "svid.pem").write_bytes(certificate)
        lease = {"expires_at": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}
        (lab.run / "svid" / "lease.json").write_text(json.dumps(lease))
        lab.configure(calls_s=0.001)

    def store(self, statement: str, *values: object) -> None:
        with closing(sqlite3.connect(self.broker.config.database, timeout=10)) as database, database:
            database.execute(statement, values)

    def release(self, revision: int, policy: str) -> None:
        """Publish; the attestation that the broker would make of the switch is written beforehand."""
        content = policy.replace("PATH", "/**")
        governance = GOVERNANCE.replace("HOST", "other.example.com" if policy is NARROW else "api.example.com")
        self.digests[revision], made = self.broker.officers.publication(
            revision, content=content, governance=governance
        )
        self.broker.operator.request("POST", "/v1/policy/publish", encode(made))
        adopt_publication(self.broker.officers.directory, made)
        attested = "UPDATE workspaces SET state = 'active', policy_digest = ? WHERE id = 'ws-demo'"
        self.store(attested, self.digests[revision])

    def ask(self, times: int) -> list[str]:
        """Call ``api.example.com`` through ring 1 as the agent would; return the reasons of the refusals."""
        url = "http://api.example.com:443/v1/x"
        command = ["curl", "-s", "-x", f"http://127.0.0.1:{self.lab.proxy_port}", *[url] * times]
        text = subprocess.run(command, capture_output=True, check=False, text=True).stdout
        return [json.loads(line)["reason"] for line in text.splitlines() if line.startswith("{")]

    def rollout(self, revision: int) -> dict:
        found = self.broker.operator.request("GET", "/v1/policy/rollouts/stable")["rollouts"]
        return next(one for one in found if one["revision"] == revision)


@pytest.fixture
def workspace(lab):
    directory = Path(tempfile.mkdtemp(prefix="saw-pdb-"))
    broker = BrokerLab(directory)
    try:
        broker.start()
        made = Workspace(lab, broker)
        yield made
    finally:
        broker.stop()
        shutil.rmtree(directory)


@pytest.mark.control("POL-02")
@pytest.mark.parametrize(("policy", "state"), [(NARROW, "halted"), (POLICY, "running")], ids=["narrow", "as wide"])
def test_calls_that_ring_1_denies_halt_the_ring(workspace, policy, state):
    lab = workspace.lab
    workspace.release(1, POLICY)
    agent = lab.agent()
    agent.cycle()
    agent.beat()
    assert lab.told()["policy_digest"] == workspace.digests[1], lab.told()
    workspace.store("INSERT INTO policy_calls VALUES ('ws-demo', ?, 30, 0)", workspace.digests[1])
    workspace.release(2, policy)
    workspace.store("INSERT INTO policy_calls VALUES ('ws-demo', ?, 10, 0)", workspace.digests[2])
    agent.cycle()
    assert lab.told()["policy_digest"] == workspace.digests[2], lab.told()
    assert workspace.rollout(2)["state"] == "running"
    refused = workspace.ask(12)
    assert refused.count("host_not_allowed") == (12 if state == "halted" else 0), refused
    agent.report_calls()
    agent.report_calls()  # what was told is not told again
    found = workspace.rollout(2)
    assert found["state"] == state
    counted = [
        e["event"] for e in workspace.broker.events() if e["event"].get("message", "").startswith("calls denied")
    ]
    if state == "halted":
        assert "max_deny_rate_increase: 54.5% of 22 calls are denied" in found["reason"]
        assert len(counted) == 1
        assert "12" in json.dumps(counted)
    else:
        assert counted == []
