"""What ring 1 refuses is heard outside: how much of it halts a ring, and what was decided there is in the broker's trail."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from policyd_lab import POLICY, Lab

from databases import beside
from saw.audit.workspace_usage import Usage, Used
from saw.cli.policyd import request_desk
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.tuf_repository import adopt_publication
from saw.runtime.policyd_broker import BrokerUnreachable

sys.path.append(str(Path(__file__).parents[1] / "broker"))

from broker_rig import Lab as BrokerLab
from broker_rig import cli, encode

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
        self.tell()
        key, csr = new_key_and_csr("ws-demo")
        authority = Authority.load(broker.config.keys / "x509")
        (lab.run / "svid" / "key.pem").write_bytes(key)
        certificate = authority.issue_svid(csr, "ws-demo", "0" * 64, datetime.now(UTC))
        (lab.run / "svid" / "svid.pem").write_bytes(certificate)
        lease = {"expires_at": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}
        (lab.run / "svid" / "lease.json").write_text(json.dumps(lease))
        lab.configure(calls_s=0.001, decisions_s=0.001)
        self.unread = (lab.directory / "decisions.log").open(encoding="utf-8")
        self.clock = int(datetime.now(UTC).timestamp() * 1_000_000)

    def tell(self) -> None:
        """Tell the workspace where its broker is."""
        told = json.loads((self.lab.run / "workspace.json").read_text())
        ca = self.broker.ca_file.read_text()
        told |= {
            "broker_url": f"https://127.0.0.1:{self.broker.port}",
            "ca_pem": ca,
            "tuf_root": json.loads(self.broker.officers.root),
        }
        (self.lab.run / "workspace.json").write_text(json.dumps(told))
        (self.lab.run / "ca.pem").write_text(ca)

    def store(self, statement: str, *values: object) -> None:
        with beside(self.broker.config) as database:
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

    def journal(self, unit: str = "saw-decide.service", process: str = "a" * 32, text: str | None = None) -> None:
        """Put what the decision service wrote since the last time, or ``text``, into a real journal."""
        lines = (self.unread.readlines() if text is None else text.splitlines(keepends=True)) or []
        fields = []
        for line in lines:
            priority, message = (line[1], line[3:]) if line.startswith("<") else ("6", line)
            self.clock += 1
            fields += [
                f"__REALTIME_TIMESTAMP={self.clock}",
                f"__MONOTONIC_TIMESTAMP={self.clock}",
                f"_BOOT_ID={'b' * 32}",
                f"PRIORITY={priority}",
                f"_SYSTEMD_UNIT={unit}",
                f"_SYSTEMD_INVOCATION_ID={process}",
                f"MESSAGE={message}",
            ]
        command = ["/lib/systemd/systemd-journal-remote", f"--output={self.lab.journal}/one.journal", "-"]
        done = subprocess.run(command, input="\n".join(fields) + "\n", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def decisions(self) -> list[dict]:
        """Return the events of what was decided inside the workspace."""
        ours = [one["event"] for one in self.broker.events()]
        return [one for one in ours if one["unmapped"]["saw"].get("layer") in {"ring1", "mcp", "workspace"}]

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
        made.unread.close()
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


@pytest.mark.control("AUD-01")
@pytest.mark.control("P0-05")
def test_what_nobody_outside_sees_is_in_the_trail_and_what_ring_2_records_is_not(workspace):
    lab = workspace.lab
    workspace.release(1, POLICY)
    agent = lab.agent()
    agent.cycle()
    agent.beat()
    allowed, refused = "http://api.example.com:443/v1/x", "http://other.example.com:443/secret?token=1"
    proxy = ["curl", "-s", "-o", "/dev/null", "-x", f"http://127.0.0.1:{lab.proxy_port}"]
    subprocess.run([*proxy, allowed, refused, refused, "http://third.example.com/"], check=True)
    workspace.journal()
    called = {"event": "tool_call", "server": "files", "tool": "read", "reason": "argument_not_allowed", "rule": "r"}
    text = "".join(
        f"<4>{json.dumps({**called, 'verdict': 'deny', 'n': number, 'policy_digest': workspace.digests[1]})}\n"
        for number in (1, 2, 5)
    )
    text += f"<5>{json.dumps({**called, 'verdict': 'allow', 'reason': '', 'n': 6})}\n"
    workspace.journal("saw-mcp-files.service", "c" * 32, text)
    workspace.journal("saw-mcp-server-files@7.service", "d" * 32, text.replace("read", "forged"))

    # Nobody hears of it while the broker is away, or while the workspace cannot prove who it is.
    workspace.broker.stop()
    agent.report_decisions()
    workspace.broker.start()
    workspace.tell()
    agent = lab.agent()
    (lab.run / "svid" / "svid.pem").rename(lab.run / "svid" / "away")
    agent.report_decisions()
    assert workspace.decisions() == []
    (lab.run / "svid" / "away").rename(lab.run / "svid" / "svid.pem")
    agent.report_decisions()
    agent.report_decisions()  # what was told is not told again

    found = workspace.decisions()
    calls = {(one["http_request"]["url"]["hostname"], one["count"]) for one in found if one["class_uid"] == 4002}
    assert calls == {("other.example.com", 2), ("third.example.com", 1)}
    twice = next(one for one in found if one.get("count") == 2)
    assert (twice["status_detail"], twice["policy"]["uid"]) == ("host_not_allowed", workspace.digests[1])
    assert twice["device"]["uid"] == "ws-demo"
    assert len(set(twice["unmapped"]["saw"]["request_ids"])) == 2
    assert "token" not in json.dumps(found)
    tools = [one for one in found if one["class_uid"] == 6003]
    assert [(one["count"], one["status"], one["resources"][0]["uid"]) for one in tools] == [
        (3, "Failure", "files/read"),
        (1, "Success", "files/read"),
    ]
    (lost,) = [one for one in found if one["class_uid"] == 2004]
    assert lost["finding_info"]["types"] == ["decisions_missing"]
    assert lost["unmapped"]["saw"]["count"] == 2

    # Another start of the service counts from one again, and goes on behind what was told.
    subprocess.run([*proxy, "http://fourth.example.com/"], check=True)
    after = [line.replace('"n":4', '"n":1') for line in workspace.unread.readlines()]
    workspace.journal(process="e" * 32, text="".join(after))
    agent.report_decisions()
    assert [one["http_request"]["url"]["hostname"] for one in workspace.decisions()[len(found) :]] == [
        "fourth.example.com"
    ]


@pytest.mark.control("AUD-01")
def test_what_the_agent_used_is_in_the_trail_under_the_workspaces_identity_alone(workspace):
    agent = workspace.lab.agent()
    usage = Usage(boot="0" * 32, total=Used(cpu_ms=5000, oom_kills=1), units={"saw-shell.service": Used(cpu_ms=4000)})

    def recorded() -> list[dict]:
        found = [one["event"] for one in workspace.broker.events()]
        return [one for one in found if one.get("api", {}).get("operation") == "sandbox/usage"]

    svid = workspace.lab.run / "svid"
    (svid / "svid.pem").rename(svid / "away")
    with pytest.raises(BrokerUnreachable, match="records usage under the workspace's identity alone"):
        agent._broker.report_usage(usage)
    assert recorded() == []
    (svid / "away").rename(svid / "svid.pem")
    agent._broker.report_usage(usage)
    (event,) = recorded()
    assert event["device"]["uid"] == "ws-demo"
    assert event["unmapped"]["saw"]["usage"] == msgspec.to_builtins(usage)
    day = workspace.broker.operator.request("GET", "/v1/usage?workspace_id=ws-demo")["usage"]
    assert [line["cpu_ms"] for line in day] == [5000]
    said = cli(workspace.broker, "usage", "--workspace", "ws-demo").stdout.splitlines()
    assert said[0].split() == [
        "DAY", "WORKSPACE", "ENGAGEMENT", "CPU_S", "MEMORY_PEAK_MIB", "READ_MIB", "WRITTEN_MIB", "OOM_KILLS", "REFUSED_TASKS"
    ]  # fmt: skip
    assert said[1].split() == [day[0]["day"], "ws-demo", "-", "5.0", "0", "0", "0", "1", "0"]
    assert "is not a day" in cli(workspace.broker, "usage", "--first", "yesterday").stderr


@pytest.mark.control("POL-01")
@pytest.mark.control("RUN-01")
def test_an_agent_asks_people_for_more_and_a_signed_release_alone_allows_it(workspace):
    lab = workspace.lab
    workspace.release(1, NARROW)
    lab.configure(ask_user=pwd.getpwuid(os.getuid()).pw_name)
    agent = lab.agent()
    agent.cycle()
    agent.beat()
    desk = request_desk(lab.config())
    assert desk is not None

    def local(path: str, *extra: str) -> dict:
        command = ["curl", "-s", "-x", f"http://127.0.0.1:{lab.proxy_port}", *extra, f"http://policy.local{path}"]
        return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    def people(method: str, path: str, body: dict | None = None) -> dict:
        return workspace.broker.operator.request(method, f"/v1/policy/requests{path}", body)

    wish = {
        "host": "api.example.com",
        "method": "GET",
        "path": "/v1/x",
        "scheme": "http",
        "port": 443,
        "reason": "the task",
    }
    try:
        assert local("/")["policy_digest"] == workspace.digests[1]
        assert workspace.ask(1) == ["host_not_allowed"]
        asked = local("/v1/requests", "-d", json.dumps(wish))["request"]
        assert (asked["state"], asked["program"]) == ("open", "/usr/bin/curl")
        assert local("/v1/requests", "-d", json.dumps({**wish, "reason": "again"}))["request"]["id"] == asked["id"]
        refused = local("/v1/requests", "-d", json.dumps({**wish, "host": "other.example.com"}))
        assert refused["error"] == "already_allowed"
        shown = people("GET", f"/{asked['id']}")
        assert (shown["now"]["standing"], "host: api.example.com" in shown["now"]["proposal"]) == ("refused", True)
        people("POST", f"/{asked['id']}/answer", {"decision": "accept", "comment": "it fits the task"})
        answered = local("/v1/requests")["requests"][0]
        assert (answered["state"], answered["comment"]) == ("accepted", "it fits the task")
        agent.cycle()
        assert local("/")["policy_digest"] == workspace.digests[1]
        assert workspace.ask(1) == ["host_not_allowed"]
        workspace.release(2, POLICY)
        agent.cycle()
        assert local("/")["policy_digest"] == workspace.digests[2]
        assert workspace.ask(1) != ["host_not_allowed"]
        assert people("GET", f"/{asked['id']}")["now"]["standing"] == "allowed"
        # Without the identity that attestation gave, nobody is asked in the workspace's name.
        (lab.run / "svid" / "svid.pem").rename(lab.run / "svid" / "away")
        assert local("/v1/requests", "-d", json.dumps({**wish, "path": "/v9"}))["error"] == "ask_unavailable"
        (lab.run / "svid" / "away").rename(lab.run / "svid" / "svid.pem")
    finally:
        desk.close()
    told = [one["event"] for one in workspace.broker.events()]
    operations = [one["api"]["operation"] for one in told if "policy_request" in json.dumps(one.get("resources", ""))]
    assert operations == ["policy.request.open", "policy.request.accept"]
