"""The main job from a clean clone: ended by force at its steps, then whole; the report shows the real chain.

Each interruption costs another start of the job. `make test` has seven of them;
with `SAW_INTERRUPTIONS=all` it is ended at each of the ten steps.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from vm_access import Workspace, facts, wait_until

from conftest import run
from saw.lab.up import DELEGATION

PACKER_LOG = "build/packer.log"
STARTED_JOB = ".venv/bin/saw lab up"


@dataclass(frozen=True)
class Interruption:
    """One way and moment to end the main job by force.

    The moment is ``seconds`` after ``marker`` shows in the job's output or, ``in_packer``, in Packer's log. ``how``: ``kill``
    and ``ctrl-c`` go to the whole process group, as a terminal does it; ``leader`` kills the job's own process alone, so that
    everything it started lives on without it. ``thorough`` ones are left out unless all are asked for.
    """

    step: int
    marker: str
    how: str
    seconds: float = 0.0
    in_packer: bool = False
    thorough: bool = False


EVERY_INTERRUPTION = (
    Interruption(1, "[ 1/10]", "kill"),
    Interruption(2, "MCP servers", "leader", thorough=True),
    Interruption(2, "Running local shell script", "kill", 2.0, in_packer=True),
    Interruption(3, "[ 3/10]", "kill", 2.0),
    Interruption(4, "play: Far-end services", "leader", 2.0),
    Interruption(4, "play: Control host", "ctrl-c", 3.0),
    Interruption(5, "[ 5/10]", "kill", 0.7, thorough=True),
    Interruption(6, "reference boot", "kill", 5.0),
    Interruption(7, "play: Create a workspace", "leader", 3.0),
    Interruption(8, "[ 8/10]", "kill", 0.5, thorough=True),
    Interruption(9, "[ 9/10]", "kill", 4.0, thorough=True),
    Interruption(10, "[10/10]", "kill", thorough=True),
)
INTERRUPTIONS = tuple(
    one for one in EVERY_INTERRUPTION if not one.thorough or os.environ.get("SAW_INTERRUPTIONS") == "all"
)
LEAST_HITS = len(INTERRUPTIONS) - 3
"""A run on a fast machine may be past a moment, or ended, before the signal: some may miss, not many."""


@dataclass(frozen=True)
class Interrupted:
    """How an interrupted run ended: its exit code (0 when it was faster than we), and how long it ran."""

    code: int
    seconds: float
    output: str

    @property
    def hit(self) -> bool:
        """Whether the run was really ended by us."""
        return self.code != 0


def processes() -> dict[int, tuple[int, str]]:
    """Every process: pid → parent and arguments."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    return {int(row[0]): (int(row[1]), row[2]) for row in rows if len(row) == 3}


def job_of(make: int) -> int | None:
    """The pid of the main job's own process below ``make``, once it runs."""
    known = processes()

    def below(pid: int) -> bool:
        return pid == make or (pid in known and below(known[pid][0]))

    return next((pid for pid, (_, arguments) in known.items() if STARTED_JOB in arguments and below(pid)), None)


def end(make: int, how: str) -> None:
    """Send the signal of ``how``."""
    try:
        if how == "leader":
            os.kill(job_of(make) or make, signal.SIGKILL)
        else:
            os.killpg(make, signal.SIGINT if how == "ctrl-c" else signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended in this moment


def run_and_end(checkout: Path, wanted: Interruption, output: Path) -> Interrupted:
    """Start the main job and end it at the moment of ``wanted``; its output goes to ``output``."""
    packer = checkout / PACKER_LOG
    packer.unlink(missing_ok=True)
    watched = packer if wanted.in_packer else output
    begin = time.monotonic()
    with output.open("wb") as stream:
        child = subprocess.Popen(
            ["make", "workspace"], cwd=checkout, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def due() -> bool:
        shown = watched.read_text(errors="replace") if watched.exists() else ""
        return wanted.marker in shown or child.poll() is not None

    try:
        wait_until(wanted.marker, due, patience=1200, interval=0.1)
        time.sleep(wanted.seconds)  # not a wait for a state: the moment of the signal is the point of the test
        end(child.pid, wanted.how)
        code = child.wait(180)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return Interrupted(code, round(time.monotonic() - begin, 1), output.read_text(errors="replace"))


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
def test_the_main_job_completes_after_being_ended_at_its_steps(
    checkout: Path, log: Any, tmp_path: Path, figures: dict[str, Any]
) -> None:
    output = tmp_path / "output"
    hits: list[Interruption] = []
    for wanted in INTERRUPTIONS:
        done = run_and_end(checkout, wanted, output)
        log.write(f"\n=== {wanted}: exit {done.code} after {done.seconds} s\n".encode() + output.read_bytes())
        log.flush()
        figures[f"interrupted: step {wanted.step}, {wanted.marker} +{wanted.seconds} s, {wanted.how}"] = {
            "value": done.seconds, "unit": "s", "goal": None, "hit": done.hit,
        }  # fmt: skip
        if not done.hit:
            continue
        told = "interrupted (the next `make workspace` goes on" in done.output
        assert told == (wanted.how == "ctrl-c"), (wanted, done.code, done.output[-2000:], hosts_state(checkout))
        # An error of its own is no interruption: each ends by our signal, at the step that was meant.
        assert f"[{wanted.step:>2}/10]" in done.output, (wanted, done.output[-2000:])
        assert wanted.how == "ctrl-c" or "FAILED after" not in done.output, (
            wanted,
            done.output[-3000:],
            hosts_state(checkout),
        )
        hits.append(wanted)
    assert len(hits) >= LEAST_HITS, hits
    assert {wanted.step for wanted in hits} >= {one.step for one in INTERRUPTIONS if one.step <= 8}, hits
    begin = time.monotonic()
    assert run(checkout, "make", "workspace", log=log) == 0, hosts_state(checkout)
    figures["make workspace after the interruptions"] = {
        "value": round(time.monotonic() - begin, 1),
        "unit": "s",
        "goal": None,
    }
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


@pytest.mark.control("REV-01")
@pytest.mark.control("REV-02")
@pytest.mark.control("REV-03")
def test_the_push_that_waits_arrives_once_after_a_person_has_approved_it(report: dict[str, Any]) -> None:
    waits = calls(report, "REV-01")["git push to main"]
    assert (waits["verdict"], waits["reason"]) == ("deny", "review_required")
    approved = calls(report, "REV-02")["push to main, after a review"]
    assert approved["verdict"] == "allow", approved
    assert " is done; 1 such pushes recorded at the far end" in approved["detail"]
    assert approved["policy_digest"] == waits["policy_digest"] == report["attestation"]["policy_digest"]


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


@pytest.mark.control("AUD-01")
@pytest.mark.control("P0-05")
def test_what_was_decided_inside_the_vm_is_in_the_trail_outside(report: dict[str, Any], workspace: Workspace) -> None:
    wanted = {("ring1", "deny_rule"), ("ring1", "host_not_allowed")}
    wanted |= {("mcp", "argument_not_allowed"), ("mcp", "tool_not_allowed"), ("mcp", "")}
    digest = report["attestation"]["policy_digest"]

    def told() -> bool:
        ours = [event["event"] for event in workspace.events() if facts(event).get("layer") in {"ring1", "mcp"}]
        assert all((event["status"] == "Success") != bool(event.get("status_detail")) for event in ours)
        about = [
            event for event in ours if event["device"]["uid"] == workspace.id and digest in str(event.get("policy"))
        ]
        return wanted <= {(event["unmapped"]["saw"]["layer"], event.get("status_detail", "")) for event in about}

    wait_until("what the demonstration tried, in the trail", told, patience=180)


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
def test_only_a_certificate_of_minutes_gets_in_and_only_by_the_bastion(workspace: Workspace, tmp_path: Path) -> None:
    environment = {**workspace.environment, "SAW_SSH_KEYS": str(tmp_path)}
    certify = [str(workspace.checkout / ".venv/bin/saw"), "ssh", "--certify", workspace.id]
    subprocess.run(certify, env=environment, check=True, timeout=60)
    certified = tmp_path / workspace.id / "key"
    bare = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(bare)], check=True)
    ways = {"workspace": (22000 + workspace.number, ("agent", "root")), "bastion": (2222, ("saw-session", "root"))}
    for key, way in ((bare, "workspace"), (certified, "workspace"), (bare, "bastion")):
        port, users = ways[way]
        for user in users:
            refused = subprocess.run(
                ["ssh", "-i", str(key), "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no",
                 "-o", "UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes", "-p", str(port), f"{user}@10.77.0.20", "id"],
                capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
            assert refused.returncode == 255
            assert "Permission denied" in refused.stderr
    # Without the bastion in the context the broker is asked for a certificate that leads past it.
    context = json.loads((workspace.checkout / "build/lab/context.json").read_text(encoding="utf-8"))
    del context["bastion"]
    direct = tmp_path / "context.json"
    direct.write_text(json.dumps(context), encoding="utf-8")
    refused = workspace.saw("ssh", "--context", str(direct), workspace.id, "--", "id", check=False)
    assert refused.returncode == 1
    assert "reached through the bastion alone" in refused.stderr
    assert workspace.agent("id -un").stdout.strip() == "agent"


@pytest.mark.control("ID-02")
def test_a_session_can_be_played_back_and_its_recording_is_the_one_of_the_trail(
    workspace: Workspace, tmp_path: Path
) -> None:
    words = [secrets.token_hex(8), secrets.token_hex(8)]
    said = workspace.saw("ssh", workspace.id, "--", "printf", "'%s-%s'", *words).stdout
    assert said == "-".join(words)

    def stored() -> dict[str, Any] | None:
        said_there = [row for row in workspace.sessions() if words[0] in (row["command"] or "")]
        return next((row for row in said_there if row["recording_stored_at"]), None)

    session = wait_until("the recording of the session", stored, patience=60)
    assert (session["reason"], session["exit_code"], session["bytes_out"]) == ("closed", 0, len(said))
    assert workspace.saw("replay", session["id"]).stdout == said
    kept = f"/var/lib/saw/broker/recordings/{session['id']}.sawrec"
    raw = bytearray(base64.b64decode(workspace.host("control", f"base64 {kept}")))
    assert said.encode() not in raw
    (ended,) = [
        facts(event) for event in workspace.events()
        if event["event"].get("activity_name") == "Logoff" and facts(event).get("session") == session["id"]
    ]  # fmt: skip
    assert ended["recording_sha256"] == session["recording"]
    raw[-10] ^= 1
    copy = tmp_path / "changed.sawrec"
    copy.write_bytes(raw)
    changed = workspace.saw("replay", session["id"], "--from", str(copy), check=False)
    assert changed.returncode == 1
    assert "of the recording was changed" in changed.stderr


ALLOW_PORT = """
cp -p /etc/saw/broker.json /run/broker.json.before
python3 - <<'END'
import json
path = "/etc/saw/broker.json"
with open(path) as file:
    told = json.load(file)
with open(path, "w") as file:
    json.dump({**told, "forwarding": {"ports": ["3000"], "max_hours": 1}}, file)
END
systemctl restart saw-broker
"""
PUT_BACK = "mv /run/broker.json.before /etc/saw/broker.json; systemctl restart saw-broker"


@contextmanager
def granted(workspace: Workspace, to: str) -> Iterator[None]:
    """Port 3000 may be granted, and is, to the principal ``to``; afterwards the broker is configured as it was."""

    def listed() -> bool:
        return workspace.saw("session", "grants", check=False).returncode == 0

    workspace.host("control", ALLOW_PORT)
    try:
        wait_until("the broker", listed, patience=60)
        words = ("--port", "3000", "--to", to, "--for", "30m", "--reason", "end to end", "--json")
        given = json.loads(workspace.saw("session", "grant", workspace.id, *words).stdout)
        yield
        workspace.saw("session", "revoke", given["id"], "--reason", "seen")
    finally:
        workspace.host("control", PUT_BACK)
        wait_until("the broker", listed, patience=60)


@contextmanager
def exposed(workspace: Workspace, said: Path) -> Iterator[str]:
    """``saw expose`` while it runs; yields the address that it says."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        local = probe.getsockname()[1]
    command = [
        str(workspace.checkout / ".venv/bin/saw"),
        "expose",
        workspace.id,
        "--port",
        "3000",
        "--local",
        str(local),
    ]
    with said.open("wb") as out, said.with_suffix(".err").open("wb") as err:
        process = subprocess.Popen(
            [*command, "--json"], env=workspace.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
    try:
        wait_until("saw expose", lambda: said.read_text() or process.poll() is not None, patience=120)
        assert process.poll() is None, said.with_suffix(".err").read_text()
        yield str(json.loads(said.read_text())["url"])
        assert process.poll() is None, said.with_suffix(".err").read_text()
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.control("ID-02")
def test_a_file_is_copied_in_and_a_server_of_the_agent_shows_it_by_a_granted_port(
    workspace: Workspace, tmp_path: Path
) -> None:
    page = tmp_path / f"page-{secrets.token_hex(4)}.html"
    page.write_text(secrets.token_hex(16), encoding="utf-8")
    copied = json.loads(workspace.saw("cp", "--json", str(page), f"{workspace.id}:").stdout)
    assert (copied["direction"], copied["files"], copied["bytes"]) == ("to", 1, 32)
    [us] = [row["who"] for row in workspace.sessions() if row["id"] in copied["sessions"]]
    # Copies and commands begin in the same folder.
    serve = "python3 -m http.server 3000 --bind 127.0.0.1 >/dev/null 2>&1 </dev/null & echo $!"
    server = workspace.agent(serve).stdout.strip()
    assert server.isdecimal()
    try:
        with granted(workspace, us), exposed(workspace, tmp_path / "said") as url:
            address = f"{url}/{page.name}".replace("localhost", "127.0.0.1")

            def fetch() -> str:
                # A server that does not listen yet cuts the connection.
                with suppress(OSError, HTTPException), urlopen(address, timeout=60) as answer:
                    return str(answer.read().decode())
                return ""

            assert wait_until("the page", fetch, patience=60) == page.read_text(encoding="utf-8")
            [session] = [row for row in workspace.sessions("--live") if row["forward_port"]]
            assert (session["forward_port"], session["who"]) == (3000, us)
    finally:
        workspace.agent(f"kill {server}; rm {page.name}")


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
    tmux, name = "tmux -S /run/saw/shell/tmux.sock", f"kept{secrets.token_hex(4)}"
    assert workspace.agent(f"{tmux} new-session -d -s {name} 'sleep 3600'").returncode == 0
    workspace.leave()
    assert name in workspace.agent(f"{tmux} list-sessions").stdout


def playbook_changes(checkout: Path, name: str, checks: tuple[bool, ...], variables: dict[str, Any]) -> list[list[str]]:
    """Run a playbook once for each of ``checks`` (true: ``--check``) as the main job does; return what each changed."""
    program = """
import json, sys
from pathlib import Path
from saw.lab.playbook import run_playbook
from saw.lab.topology import find_lab

name, checks, variables = json.loads(sys.argv[1])
lab, results = find_lab(Path.cwd()), []
for check in checks:
    results.append(run_playbook(lab, name, variables, say=lambda text: None, check=check).changes)
print(json.dumps(results))
"""
    done = subprocess.run(
        [str(checkout / ".venv/bin/python"), "-c", program, json.dumps([name, checks, variables])],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


@pytest.mark.control("P0-01")
def test_a_second_converge_changes_nothing_and_check_mode_works(checkout: Path) -> None:
    assert playbook_changes(checkout, "control_plane", (False, True), {}) == [[], []]


@pytest.mark.control("P0-01")
def test_a_second_creation_changes_nothing_and_check_mode_works_before_and_after(
    checkout: Path, workspace: Workspace, report: dict[str, Any]
) -> None:
    image = report["image"]
    profile = {
        "workspace_id": workspace.id,
        "workspace_image": image["name"],
        "workspace_image_path": f"/var/lib/saw/images/{image['name']}/image.qcow2",
        "workspace_image_sha256": image["image_sha256"],
        "workspace_sponsor": "demo.user@example.com",
        "workspace_blueprint": "coding",
        "workspace_ring": "stable",
        "workspace_delegations": [DELEGATION],
    }
    before = workspace.show()
    assert playbook_changes(checkout, "workspace_create", (True, False, True), profile) == [[], [], []]
    after = workspace.show()
    assert (after["state"], after["state_since"]) == (before["state"], before["state_since"])
    # A workspace that does not exist yet: the check says what it would do, and does none of it.
    new = {**profile, "workspace_id": "ws-not-there"}
    (would,) = playbook_changes(checkout, "workspace_create", (True,), new)
    assert any("Register it" in change for change in would), would
    assert any("Bring the VM to its state" in change for change in would), would
    assert workspace.saw("workspace", "show", "ws-not-there", check=False).returncode == 1
    assert workspace.host("edge", "ls /var/lib/saw/vms").split() == [workspace.id]
