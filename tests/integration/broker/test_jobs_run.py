"""Lifecycle jobs with a real worker and ansible-runner: run, watched, failed and resumed, cut off, cancelled."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from awx_server import TOKEN, Awx
from broker_rig import Lab, cli_here
from page import ROOT, run_page
from worker_rig import SECRET, WorkerRig, commands, until

from saw.broker.gate_settings import MachineSettings
from saw.broker.job_settings import JobSettings

pytestmark = [pytest.mark.control("LIF-01")]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    directory = Path(tempfile.mkdtemp(prefix="saw-jobs-"))
    jobs = JobSettings(lease_s=10, worker_socket=str(directory / "run/worker.sock"))
    scopes = {"runner": ("jobs:run",), "portal": ("jobs:ask",), "nobody": ()}
    machines = {name: MachineSettings(scopes=held) for name, held in scopes.items()}
    lab = Lab(directory, jobs=jobs, machines=machines)
    try:
        lab.start()
        for name in ("ws-a", "ws-b", "ws-demo"):
            lab.workspace(name, to="attesting")
        yield lab
    finally:
        lab.stop()
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def rig(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerRig]:
    rig = WorkerRig(lab, tmp_path_factory.mktemp("worker"))
    rig.start()
    yield rig
    if rig.process is not None:
        assert rig.stop() == 0, rig.log()


@pytest.fixture
def context(rig: WorkerRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAW_CONTEXT", str(rig.context))


def waiting_at_the_gate(rig: WorkerRig, workspace: str) -> str:
    """A job whose playbook waits at its second task."""
    os.mkfifo(rig.base / "gate")
    job = rig.ask("rebuild", workspace)
    until(lambda: any("cat" in line for line in commands(job)), f"{job} waits: {rig.log()}")
    return job


@pytest.mark.usefixtures("context")
def test_a_playbook_that_fails_says_why_and_secrets_are_nowhere(lab: Lab, rig: WorkerRig) -> None:
    failed = cli_here("job", "run", "stop", "ws-a", "--reason", "for Ada's team", "--wait", "--json")
    assert failed.returncode == 1, failed.stderr + rig.log()
    assert (rig.base / "told-stop").read_text() == "ws-a: for Ada's team"
    *events, job, last = [json.loads(line) for line in failed.stdout.splitlines()]
    told = last["error"]
    assert told["code"] == "job_failed"
    assert "edge: Look for the power switch" in told["message"]
    assert "saw job resume" in told["cure"]
    assert {"play", "task", "host", "state"} == {event["kind"] for event in events}
    shown = json.loads(cli_here("job", "show", told["details"]["job"], "--json").stdout)["job"]
    assert shown == job["job"]
    assert (shown["executor"], shown["worker"], shown["asked_by"]) == ("ansible", "worker:root", "operator:root")
    assert shown["progress"]["hosts"]["edge"] == {"ok": 2, "changed": 1, "failed": 1, "unreachable": 0, "skipped": 0}
    assert shown["progress"]["tasks"] == 3
    said = [event["unmapped"]["saw"].get("to") for event in job_events(lab, shown["id"])]
    assert [one for one in said if one] == ["queued", "running", "failed"]
    everything = failed.stdout + json.dumps([shown, lab.events()]) + rig.log() + lab.log()
    everything += "".join(file.read_text() for file in (rig.base / "state").rglob("*") if file.is_file())
    assert SECRET not in everything


def job_events(lab: Lab, job: str) -> list[dict]:
    return [item["event"] for item in lab.events() if item["event"].get("entity") == {"type": "job", "uid": job}]


@pytest.mark.thorough
def test_a_run_whose_worker_is_killed_ends_with_it_is_interrupted_and_resumed(lab: Lab, rig: WorkerRig) -> None:
    job = waiting_at_the_gate(rig, "ws-a")
    rig.stop(signal.SIGKILL)
    until(lambda: not commands(job), "nothing of the run goes on")
    until(lambda: rig.state(job) == "interrupted", "the lease ends")
    assert rig.job(job)["error"]["code"] == "worker_lost"
    rig.start()
    until(lambda: "its end was refused" in rig.log(), "the new worker tells of the old run, which counts no more")
    assert rig.state(job) == "interrupted"
    (rig.base / "gate").unlink()
    lab.operator.request("POST", f"/v1/jobs/{job}/resume")
    ended = rig.ended(job)
    assert (ended["state"], ended["attempt"]) == ("succeeded", 2)
    assert not list((rig.base / "state/held").iterdir())


def test_a_cancelled_run_ends_with_all_its_processes(lab: Lab, rig: WorkerRig) -> None:
    job = waiting_at_the_gate(rig, "ws-b")
    lab.operator.request("POST", f"/v1/jobs/{job}/cancel", {"reason": "wrong one"})
    assert rig.ended(job)["state"] == "cancelled"
    assert commands(job) == []
    (rig.base / "gate").unlink()


def test_the_workers_socket_serves_workers_calls_and_no_other(lab: Lab) -> None:
    from saw.broker.client import BrokerContext, BrokerRefusal, Context, OperatorClient

    assert lab.config.jobs is not None
    assert lab.config.jobs.worker_socket is not None
    client = OperatorClient(Context(BrokerContext(socket=lab.config.jobs.worker_socket)))
    for method, path in (("GET", "/v1/workspaces"), ("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("GET", "/v1/trust")):
        with pytest.raises(BrokerRefusal) as caught:
            client.request(method, path, {})
        assert caught.value.code == "no_such_call"
    with pytest.raises(BrokerRefusal) as caught:
        lab.operator.request("POST", "/v1/worker/claim", {"claim": "a" * 43, "executor": "x"})
    assert caught.value.code == "no_such_call"  # nor does an operator's socket give work


@pytest.mark.usefixtures("rig")
def test_a_machine_works_or_asks_as_its_scopes_say_and_no_other_certificate_does(lab: Lab) -> None:
    claim = {"claim": "m" * 43, "executor": "elsewhere", "kinds": ["create"]}
    ask = {"kind": "start", "workspace": "ws-unknown", "idempotency_key": "from-a-machine"}
    answers = {}
    for kind, name in (
        ("machine", "runner"),
        ("machine", "portal"),
        ("machine", "nobody"),
        ("perimeter", "edge"),
        (None, ""),
    ):
        with lab.tls(kind, name) as client:
            answers[name] = [
                client.post(path, json=body).json().get("error", "taken")
                for path, body in (("/v1/worker/claim", claim), ("/v1/jobs", ask))
            ]
    assert answers == {
        "runner": ["taken", "out_of_scope"],
        "portal": ["out_of_scope", "unknown_workspace"],
        "nobody": ["out_of_scope", "out_of_scope"],
        "edge": ["not_a_machine", "not_a_machine"],
        "": ["not_a_machine", "not_a_machine"],
    }


def test_the_page_is_as_it_is_written_with_the_collections_own_playbooks(lab: Lab, rig: WorkerRig) -> None:
    rig.stop()
    (rig.base / "collections/ansible_collections/secure_agent").mkdir(parents=True)
    (rig.base / "collections/ansible_collections/secure_agent/workspace").symlink_to(ROOT)
    places = {name: str(rig.base / name) for name in ("inventory", "collections")}
    rig.configure(ansible={**places, "context": str(rig.context)})
    rig.start()
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"

    def read(printed: str) -> dict[str, str]:
        found = re.search(r"job-[0-9a-f]{32}", printed)
        return {"JOB": found[0]} if found else {}

    printed = run_page("docs/jobs.md", rig.base, {"SAW_CONTEXT": str(rig.context), "PATH": path}, read)
    assert "is succeeded" in printed[0]  # there is no such VM here, so the register alone changes
    shown = lab.operator.request("GET", "/v1/workspaces/ws-demo")
    assert (shown["state"], shown["state_reason"]) == ("stopped", "week-end")


def test_a_job_goes_on_at_awx_while_its_worker_is_killed_and_is_launched_once(lab: Lab, rig: WorkerRig) -> None:
    awx = Awx(rig.base)
    try:
        awx.statuses = ["running"]
        (rig.base / "token").write_text(TOKEN)
        rig.stop()
        place = {"url": awx.url, "token_file": str(rig.base / "token"), "ca_file": str(awx.ca_file), "poll_s": 0.1}
        rig.configure(awx=place)
        rig.start()
        job = rig.ask("stop", "ws-a")
        until(lambda: rig.job(job)["external_id"] == "40", f"AWX has it: {rig.log()}")
        rig.stop(signal.SIGKILL)
        rig.start()
        until(lambda: "going on with 40" in rig.log(), "the new worker goes on with it")
        awx.statuses = ["successful"]
        assert rig.ended(job)["state"] == "succeeded"
        assert len(awx.launches()) == 1
        assert awx.outside == []
        assert TOKEN not in rig.log() + json.dumps(lab.events())
    finally:
        awx.server.shutdown()
        awx.server.server_close()
