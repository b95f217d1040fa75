"""The policy agent is stopped, killed or suspended, or its clock is set: nothing is allowed that it cannot vouch for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from policyd_lab import GOVERNANCE, Lab, until

from saw.policy.bundle import describe
from saw.runtime.decide_state import Heartbeat, Lease

PLAIN = GOVERNANCE + 'plaintext: ["api.example.com:443"]\n'
GONE = "the policy agent of this workspace is not running"


def digest_of(raw: bytes) -> str:
    return describe(raw)[0]


class Service:
    """``saw policyd`` as a process of its own, and a client of ring 1."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        lease = {"expires_at": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}
        (lab.run / "svid" / "lease.json").write_text(json.dumps(lease))
        self.start()
        until((lab.run / "generations" / "current").is_symlink, "the agent is ready")
        lab.start_envoy()
        until(lambda: any(r["state"] == "loaded" for r in lab.broker.reports), "the policy is in force", 60)

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "saw.cli.main",
            "policyd",
            "--config",
            str(self.lab.directory / "policyd.json"),
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def call(self) -> str:
        """Call an allowed address; return what ring 1 said, or ``passed`` when it went on to ring 2 (which is not there)."""
        proxy = f"http://127.0.0.1:{self.lab.proxy_port}"
        command = ["curl", "-s", "-x", proxy, "http://api.example.com:443/v1/x"]
        body = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return "passed" if body.get("reason") == "no_identity" else f"{body['reason']}: {body['detail']}"


@pytest.fixture
def service(lab):
    lab.publish(lab.bundle(governance=PLAIN))
    lab.heartbeat._limit = 3.0  # three beats and more: the lab's agent beats five times a second
    made = Service(lab)
    yield made
    made.end()


@pytest.mark.thorough
@pytest.mark.control("POL-05")
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_without_a_running_agent_every_call_is_denied_until_it_runs_again(service, how):
    until(lambda: service.call() == "passed", "calls pass ring 1")
    service.process.send_signal(signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
    until(lambda: service.call().startswith(f"lease_expired: {GONE}"), "calls are denied")
    assert service.lab.current() == service.lab.decided()["policy_digest"]
    if how == "stopped":
        service.process.send_signal(signal.SIGCONT)
    else:
        service.process.wait(10)
        service.start()
    until(lambda: service.call() == "passed", "calls pass again", 60)


@pytest.fixture
def loaded(lab):
    """A lab with revision 1 in force, its agent, and that bundle."""
    raw = lab.publish()
    agent = lab.agent()
    agent.cycle()
    assert lab.told()["state"] == "loaded"
    return lab, agent, raw


@pytest.mark.control("POL-02")
@pytest.mark.parametrize(("days", "reason"), [(-40, "not_yet_valid"), (40, "expired")], ids=["back", "forward"])
def test_a_clock_that_was_set_loads_nothing_new_and_a_right_one_does(loaded, days, reason):
    lab, agent, before = loaded
    raw = lab.publish()
    agent._now = lambda: datetime.now(UTC) + timedelta(days=days)
    agent.cycle()
    assert (lab.current(), lab.told()["reason"]) == (digest_of(before), reason)
    agent._now = lambda: datetime.now(UTC)
    agent.cycle()
    assert lab.current() == digest_of(raw)


@pytest.mark.control("POL-02")
@pytest.mark.parametrize("days", [-40, 40], ids=["back", "forward"])
def test_a_clock_that_was_set_before_a_start_without_a_broker_takes_up_nothing(loaded, days):
    lab, _, before = loaded
    lab.broker.stop()
    (lab.run / "generations" / "current").unlink()
    agent = lab.agent()
    agent._now = lambda: datetime.now(UTC) + timedelta(days=days)
    agent.cycle()
    assert (lab.current(), lab.told()["state"]) == ("closed", "refused")
    agent._now = lambda: datetime.now(UTC)
    agent.cycle()
    assert lab.current() == digest_of(before)


@pytest.mark.control("POL-05")
def test_after_a_suspend_nothing_is_allowed_before_the_agent_went_round(loaded):
    lab, agent, _ = loaded
    boot = [1000.0]
    wall = [datetime.now(UTC)]
    lease = lab.run / "svid" / "lease.json"
    lease.write_text(json.dumps({"expires_at": (wall[0] + timedelta(seconds=90)).isoformat()}))
    agent._boottime = lambda: boot[0]
    heartbeat = Heartbeat(lab.run / "policy" / "heartbeat", 15.0, lambda: boot[0])
    leased = Lease(lease, lambda: wall[0], lambda: boot[0])
    agent.cycle()
    agent.beat()
    assert (heartbeat.refusal(), leased.refusal()) == ("", "")
    # The boot clock counts the sleep; the wall clock may be set to before it, which makes no difference.
    boot[0] += 3600
    wall[0] -= timedelta(seconds=30)
    agent.beat()  # the heartbeat's thread may well run before the loop does
    assert GONE in heartbeat.refusal()
    assert "the lease ended" in leased.refusal()
    agent.cycle()
    agent.beat()
    assert heartbeat.refusal() == ""
    assert "the lease ended" in leased.refusal()  # the agent does not prolong it: attestation does
    lease.write_text(json.dumps({"expires_at": (wall[0] + timedelta(seconds=80)).isoformat()}))
    assert leased.refusal() == ""
