"""Authority ends in time: the kill switch, a broker that is away, and a TPM that tells of something else."""

from __future__ import annotations

import json
import shlex
import subprocess
import threading
import time
from typing import Any

import pytest
from test_2_root_in_the_vm import direct
from vm_access import Workspace, wait_until


class Caller:
    """A loop in the sandbox that makes a governed call again and again; notes each status as it comes."""

    def __init__(self, workspace: Workspace, seconds: int) -> None:
        loop = (
            f"end=$(( $(date +%s) + {seconds} )); while [ $(date +%s) -lt $end ]; do "
            "curl -s -o /dev/null -m 5 -w '%{http_code}\\n' https://api.example.com/v1/items; done"
        )
        self.seen: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [str(workspace.checkout / ".venv/bin/saw"), "ssh", workspace.id, "--", "sh", "-c", shlex.quote(loop)],
            env=workspace.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen.append((time.monotonic(), line.strip()))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.thread.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.mark.control("LIF-02")
def test_a_kill_refuses_everything_within_seconds_and_outlives_restarts(workspace: Workspace) -> None:
    caller = Caller(workspace, 120)
    try:
        wait_until("allowed calls", lambda: [s for _, s in caller.seen if s == "200"], patience=60)
        begin = time.monotonic()
        workspace.saw("workspace", "kill", workspace.id, "--reason", "exercise")
        returned = time.monotonic()

        def refused() -> list[float]:
            return [at for at, status in list(caller.seen) if at > begin and status != "200"]

        def ended() -> bool:  # the kill ends the way in as well, and with it this loop's own session
            return caller.process.poll() is not None

        wait_until("a refusal or the end of the session", lambda: refused() or ended(), patience=30, interval=0.05)
        refused_at = min([*refused(), time.monotonic()])
        wait_until("the end of the session, or more refusals", lambda: ended() or len(refused()) > 3, patience=60)
        after = [status for at, status in list(caller.seen) if at > refused_at]
    finally:
        caller.close()
    assert "200" not in after
    assert refused_at - begin < 10, f"kill took {refused_at - begin:.1f} s (command {returned - begin:.1f} s)"
    workspace.host("edge", "systemctl restart saw-gatekeeper saw-ring2")
    workspace.host("control", "systemctl restart saw-broker")
    wait_until("the broker", lambda: workspace.saw("workspace", "list", check=False).returncode == 0, patience=60)
    assert workspace.show()["state"] == "quarantined"
    assert workspace.saw("ssh", workspace.id, "--", "true", check=False).returncode != 0, "no certificate either"


@pytest.mark.control("ID-04")
def test_a_released_workspace_attests_again_and_works(workspace: Workspace) -> None:
    workspace.saw("workspace", "stop", workspace.id, "--reason", "released after the exercise")
    workspace.saw("workspace", "start", workspace.id, "--reason", "released after the exercise")
    wait_until("active again", lambda: workspace.show()["state"] == "active", patience=240, interval=2)
    wait_until("an allowed call", lambda: workspace.call()[0] == 200, patience=60)


@pytest.mark.control("POL-05")
def test_without_the_broker_calls_go_on_within_the_lease_and_not_beyond_even_for_root(workspace: Workspace) -> None:
    log = "/home/agent/direct.log"
    copies = "mkdir -p /root/kept; cp /run/saw/svid/svid.pem /run/saw/svid/key.pem /root/kept/"
    call = direct(workspace).replace("/run/saw/svid/", "/root/kept/")
    loop = f"({copies}; for i in $(seq 60); do date +%s; {call} | tr '\\n' ' '; echo; sleep 3; done) > {log} 2>&1 &"
    workspace.host("control", "systemctl stop saw-broker")
    try:
        # The channel into the VM needs the broker for its certificate: start it, hand over the script, stop it again.
        workspace.host("control", "systemctl start saw-broker")
        wait_until("the broker", lambda: workspace.saw("workspace", "list", check=False).returncode == 0, patience=60)
        assert workspace.root(loop)[0] == 0
        workspace.host("control", "systemctl stop saw-broker")
        time.sleep(150)  # longer than the lease of 120 s: its end is the state that is waited for
    finally:
        workspace.host("control", "systemctl start saw-broker")
    wait_until("the broker", lambda: workspace.saw("workspace", "list", check=False).returncode == 0, patience=60)
    wait_until("an allowed call again", lambda: workspace.call()[0] == 200, patience=180, interval=2)
    text = workspace.agent(f"cat {log}").stdout
    statuses = [line.split()[-1] for line in text.splitlines() if line and not line.isdigit()]
    reasons = [json.loads(line.rpartition("}")[0] + "}")["reason"] for line in text.splitlines() if '"reason"' in line]
    assert statuses[0] == "200", text[:500]
    assert "403" in statuses, text[-500:]
    assert set(reasons) <= {"lease_expired", "gatekeeper_stale", "no_identity"}, reasons
    first = statuses.index("403")
    assert all(status == "200" for status in statuses[:first])


def loop_of_calls(workspace: Workspace, log: str, times: int) -> str:
    """Shell loop for root in the VM: calls straight to ring 2 with a kept identity, one status a line in ``log``.

    Without a connection the status is 000.
    """
    call = direct(workspace).replace("/run/saw/svid/", "/root/kept/")
    return f"(for i in $(seq {times}); do {call} | tail -n 1; echo; sleep 3; sync; done) > {log} 2>&1 &"


def statuses_in(text: str) -> list[str]:
    """The HTTP statuses that :func:`loop_of_calls` noted."""
    return [line.strip()[-3:] for line in text.splitlines() if line.strip()[-3:].isdigit()]


def refused_with(workspace: Workspace, code: str, since: int) -> bool:
    """Tell whether the broker has refused an attestation for ``code`` after the first ``since`` events."""
    return any(code in json.dumps(e["event"]) for e in workspace.events()[since:])


@pytest.mark.control("POL-03")
def test_a_tpm_that_tells_of_something_else_gets_no_identity_and_its_calls_end(workspace: Workspace) -> None:
    keep = "mkdir -p /root/kept; cp /run/saw/svid/svid.pem /run/saw/svid/key.pem /root/kept/"
    assert workspace.root(f"{keep}; {loop_of_calls(workspace, '/home/agent/pcr.log', 100)}")[0] == 0
    before = len(workspace.events())
    extend = "tpm2_pcrextend -T device:/dev/tpmrm0 14:sha256=" + "ab" * 32
    assert workspace.root(extend)[0] == 0
    wait_until("a refused attestation", lambda: refused_with(workspace, "policy_pcr", before), patience=180, interval=3)

    seen = workspace.events("edge")[-1]["seq"]

    def refused_calls() -> list[Any]:
        return [e for e in workspace.events("edge", seen) if "lease_expired" in json.dumps(e["event"])]

    wait_until("refused calls", lambda: len(refused_calls()) > 1, patience=240, interval=3)
    assert not lease_in_force(workspace)
    workspace.saw("lab", "stop", timeout=300)
    statuses = statuses_in(workspace.home_file("agent/pcr.log"))
    assert statuses[0] == "200", "allowed while the lease lasted"
    assert set(statuses[statuses.index("403") :]) <= {"403", "000"}, statuses


@pytest.mark.control("POL-03")
def test_a_vm_with_another_tpm_gets_no_identity_and_nothing_out_of_it_is_accepted(workspace: Workspace) -> None:
    folder = f"/var/lib/saw/vms/{workspace.id}"
    workspace.leave_script("foreign", loop_of_calls(workspace, "/home/agent/foreign.log", 1000))
    workspace.host("edge", f"cd {folder}; mv tpm tpm.own; mkdir -m 700 tpm; swtpm_setup --tpm2 --tpmstate {folder}/tpm")
    before = len(workspace.events())
    workspace.saw("workspace", "start", workspace.id, "--reason", "exercise with another TPM")
    workspace.host("edge", f"systemctl start saw-vm@{workspace.id}")
    try:
        wait_until(
            "a refused enrolment", lambda: refused_with(workspace, "unknown_ek", before), patience=300, interval=3
        )
        assert workspace.show()["state"] == "attesting"
        assert not any('"attested"' in json.dumps(e["event"]) for e in workspace.events()[before:])
    finally:
        workspace.saw("lab", "stop", timeout=300)
        workspace.host("edge", f"cd {folder}; rm -rf tpm; mv tpm.own tpm")
    statuses = statuses_in(workspace.home_file("agent/foreign.log"))
    assert statuses, "calls were tried"
    assert set(statuses) <= {"403", "000"}, statuses
    workspace.saw("lab", "start", timeout=900)
    wait_until("an allowed call with its own TPM", lambda: workspace.call()[0] == 200, patience=90)


def lease_in_force(workspace: Workspace) -> bool:
    """Tell whether the broker still holds a lease for the workspace that has not run out."""
    from datetime import UTC, datetime

    expires = workspace.show()["lease_expires_at"]
    return bool(expires) and datetime.fromisoformat(str(expires)) > datetime.now(UTC)
