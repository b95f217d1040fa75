"""The main job from a clean clone: ended by force at each of its ten steps, then whole; the report shows the real chain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from vm_access import Workspace, wait_until

INTERRUPTIONS: tuple[tuple[str, float, signal.Signals], ...] = (
    ("[ 1/10]", 0.0, signal.SIGKILL),
    ("[ 2/10]", 6.0, signal.SIGKILL),
    ("[ 3/10]", 2.0, signal.SIGKILL),
    ("[ 4/10]", 8.0, signal.SIGKILL),
    ("[ 4/10]", 2.0, signal.SIGINT),
    ("[ 5/10]", 0.7, signal.SIGKILL),
    ("[ 6/10]", 5.0, signal.SIGKILL),
    ("[ 7/10]", 20.0, signal.SIGKILL),
    ("[ 8/10]", 0.5, signal.SIGKILL),
    ("[ 9/10]", 4.0, signal.SIGKILL),
    ("[10/10]", 0.0, signal.SIGKILL),
)
"""Step, seconds after its first line, and the signal that the whole process group of that run then gets."""


def run_and_end(checkout: Path, marker: str, seconds: float, number: signal.Signals, output: Path) -> int | None:
    """Start the main job and signal its process group ``seconds`` after ``marker`` shows in ``output``.

    Returns its exit code, or None when it ended before the marker.
    """
    with output.open("wb") as stream:
        child = subprocess.Popen(
            ["make", "workspace"], cwd=checkout, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(
            marker,
            lambda: marker in output.read_text(errors="replace") or child.poll() is not None,
            patience=1200,
            interval=0.1,
        )
        if child.poll() is not None:
            return None
        time.sleep(seconds)  # not a wait for a state: the moment of the signal is the point of the test
        os.killpg(child.pid, number)
        return child.wait(120)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def hosts_state(checkout: Path) -> str:
    """What a person would look at after a failed run: failed units and the end of the services' journals."""
    script = (
        "systemctl --failed --no-legend; journalctl --no-pager -n 25 -u 'saw-*' -u nginx -o short-iso | cut -c1-300"
    )
    told = []
    for name in ("control", "edge", "enterprise"):
        try:
            told.append(f"== {name}\n{Workspace(checkout, '', 0).host(name, script, timeout=60)}")
        except (AssertionError, subprocess.TimeoutExpired) as error:
            told.append(f"== {name}: {error}")
    return "\n".join(told)


@pytest.mark.control("LIF-01")
def test_the_main_job_completes_after_being_ended_at_every_step(checkout: Path, log: Any, tmp_path: Path) -> None:
    output = tmp_path / "output"
    for marker, seconds, number in INTERRUPTIONS:
        code = run_and_end(checkout, marker, seconds, number, output)
        log.write(output.read_bytes())
        log.flush()
        assert code, (marker, number.name, code, output.read_text()[-2000:], hosts_state(checkout))
        assert (number is signal.SIGINT) == ("interrupted; the next `make workspace` goes on" in output.read_text())
    assert run(checkout, "make", "workspace", log=log) == 0, hosts_state(checkout)
    report = json.loads((checkout / "build/report.json").read_text(encoding="utf-8"))
    assert report["ok"], [call for call in report["calls"] if not call["ok"]]
    assert [step["ok"] for step in report["steps"]] == [True] * 10


def calls(report: dict[str, Any], control: str) -> dict[str, dict[str, Any]]:
    return {call["name"]: call for call in report["calls"] if call["control"] == control}


@pytest.mark.control("RUN-01")
def test_calls_are_refused_for_their_reason_and_their_twins_are_allowed(report: dict[str, Any]) -> None:
    seen = calls(report, "RUN-01")
    assert seen["host that is not in the policy"]["reason"] == "host_not_allowed"
    assert seen["admin path of the API"]["reason"] == "deny_rule"
    assert seen["program that the rule does not name"]["reason"] == "binary_not_allowed"
    assert seen["method that no rule allows"]["reason"] == "method_or_path_not_allowed"
    assert seen["git push to agent/ branch"]["verdict"] == seen["write a note"]["verdict"] == "allow"
    decided = [call for call in report["calls"] if call["control"] in {"RUN-01", "CRED-01", "REV-01", "INF-01"}]
    told = [call for call in decided if call["name"] != "no credential in the sandbox"]
    assert {call["policy_digest"] for call in told} == {report["attestation"]["policy_digest"]}
    assert {call["digest_source"] for call in told} == {"answer", "audit"}


@pytest.mark.control("CRED-01")
def test_the_real_credential_arrives_outside_and_is_never_in_the_sandbox(report: dict[str, Any]) -> None:
    seen = calls(report, "CRED-01")
    for end in ("git", "api", "models"):
        assert seen[f"credential arrived at {end}"]["ok"], seen
    assert seen["no credential in the sandbox"]["ok"]


@pytest.mark.control("NET-01")
@pytest.mark.control("NET-03")
def test_nothing_leaves_past_the_rings(report: dict[str, Any]) -> None:
    assert calls(report, "NET-01")["connection past the proxy"]["reason"] == "not_permitted"
    assert calls(report, "NET-01")["the same through the proxy"]["verdict"] == "allow"
    assert calls(report, "NET-01")["nothing refused arrived"]["ok"]
    assert calls(report, "NET-03")["metadata address"]["reason"] == "destination_blocked"
    assert calls(report, "CRED-01")["read the ticket API"]["verdict"] == "allow"


@pytest.mark.control("INF-01")
def test_the_model_endpoint_is_routed_and_limited(report: dict[str, Any]) -> None:
    assert calls(report, "INF-01")["chat completion"]["verdict"] == "allow"
    assert calls(report, "INF-01")["model that is not allowed"]["reason"] == "model_not_allowed"


@pytest.mark.control("RUN-05")
def test_mcp_calls_are_judged_by_their_arguments(report: dict[str, Any]) -> None:
    seen = calls(report, "RUN-05")
    assert seen["MCP: read a project file"]["verdict"] == "allow"
    assert seen["MCP: read outside the project"]["reason"] == "argument_not_allowed"
    assert seen["MCP: tool that is not allowed"]["reason"] == "tool_not_allowed"


@pytest.mark.control("POL-03")
def test_the_identity_came_from_a_quote_over_the_released_policy(report: dict[str, Any], workspace: Workspace) -> None:
    assert report["attestation"]["verdict"] == "attested"
    assert report["attestation"]["policy_digest"] == report["attestation"]["released_digest"]
    assert any(event["event"].get("message") == "attested" for event in workspace.events())


@pytest.mark.control("AUD-02")
def test_the_trail_is_complete_and_a_removed_event_shows(workspace: Workspace, tmp_path: Path) -> None:
    copy = tmp_path / "trail.jsonl"
    copy.write_text(workspace.saw("audit", "export").stdout, encoding="utf-8")
    sources = {json.loads(line)["source"] for line in copy.read_text(encoding="utf-8").splitlines()}
    assert sources == {"broker", "edge"}
    assert workspace.saw("audit", "verify", "--file", str(copy), check=False).returncode == 0
    lines = copy.read_text(encoding="utf-8").splitlines(keepends=True)
    copy.write_text("".join(lines[:3] + lines[4:]), encoding="utf-8")
    assert workspace.saw("audit", "verify", "--file", str(copy), check=False).returncode == 1


@pytest.mark.control("ID-02")
def test_only_a_certificate_of_minutes_gets_in(workspace: Workspace, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    plain = ["ssh", "-i", str(key), "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
             "-o", "IdentitiesOnly=yes", "-p", str(22000 + workspace.number)]  # fmt: skip
    for user in ("agent", "root"):
        refused = subprocess.run(
            [*plain, f"{user}@10.77.0.20", "id"], capture_output=True, text=True, check=False, timeout=60
        )
        assert refused.returncode == 255
        assert "Permission denied" in refused.stderr
    assert workspace.agent("id -un").stdout.strip() == "agent"


def test_the_report_says_what_ran_the_machine_and_that_the_terminal_kept_its_work(report: dict[str, Any]) -> None:
    assert report["accelerator"]["name"] in {"kvm", "tcg"}
    assert report["accelerator"]["reason"]
    assert bool(report["accelerator"]["cure"]) == (report["accelerator"]["name"] == "tcg")
    attach = report["workspace"]["attach"]
    assert (attach["attachments"], attach["detached"], attach["kept"], attach["kept_after_hangup"]) == (
        3,
        True,
        True,
        True,
    )
    assert (report["problems"], report["error"]) == ([], None)


def test_the_multiplexer_outlives_the_connection(workspace: Workspace) -> None:
    tmux = "tmux -S /run/saw/shell/tmux.sock"
    assert workspace.agent(f"{tmux} new-session -d -s kept 'sleep 3600'").returncode == 0
    assert "kept" in workspace.agent(f"{tmux} list-sessions").stdout


@pytest.mark.control("P0-01")
def test_a_second_converge_changes_nothing_and_check_mode_works(checkout: Path) -> None:
    program = """
import json
from pathlib import Path
from saw.lab.playbook import run_playbook
from saw.lab.topology import find_lab

lab, results = find_lab(Path.cwd()), []
for check in (False, True):
    results.append(run_playbook(lab, "control_plane", say=lambda text: None, check=check).changes)
print(json.dumps(results))
"""
    done = subprocess.run(
        [str(checkout / ".venv/bin/python"), "-c", program],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [[], []]
