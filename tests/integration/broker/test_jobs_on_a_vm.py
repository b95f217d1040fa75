"""Lifecycle jobs with the collection's own playbooks on a VM that runs, from an empty hypervisor to an empty one.

The broker, the worker, ansible-runner, the qemu driver, qemu, its firmware and the virtual TPM are real; the VM is emulated.
Each step goes on where the one before it ended.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from broker_rig import Lab, cli_here, encode
from emulated_host import EmulatedHost, Guest, endorsement
from worker_rig import WorkerRig, commands, until

from saw.broker.gate_settings import MachineSettings
from saw.broker.job_settings import JobSettings

pytestmark = [
    pytest.mark.control("LIF-01"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts in a namespace of its own"),
]
WS = "ws-life"
WAITS = "Wait until it has attested"
PARTS = {"root.qcow2", "data.img", "tpm", "spec.json"}
"""What a VM is made of, among other files."""
LONG_S = 600.0
"""What a machine that is busy with other tests may take for one step."""


class Watched:
    """A job with ``saw job watch`` beside it; ``lines`` are what that has printed so far."""

    def __init__(self, site: Site, job: str) -> None:
        self.site, self.job = site, job
        self.lines: list[dict[str, Any]] = []
        self._watch = subprocess.Popen(
            [sys.executable, "-m", "saw.cli.main", "job", "watch", job, "--json"], stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._watch.stdout is not None
        with self._watch.stdout as stream:
            for line in stream:
                self.lines.append(json.loads(line))

    def at(self, task: str) -> dict[str, Any]:
        """The job when it has come to ``task``, of which the watcher has told."""
        rig = self.site.rig

        def told() -> bool:
            assert self._watch.poll() is None, f"{self.lines[-2:]} {rig.log()}"
            return any((line.get("kind"), line.get("text")) == ("task", task) for line in self.lines)

        until(told, f"{self.job} comes to {task!r}: {self.lines[-3:]}", LONG_S)
        return rig.job(self.job)

    def until(self, command: str) -> None:
        """Wait until ``command`` is one of the job's processes."""
        until(lambda: command in commands(self.job), f"{self.job} waits: {self.lines[-3:]}", LONG_S)

    def ended(self) -> dict[str, Any]:
        """The job as the watcher saw it end."""
        self._reader.join(LONG_S)
        self._watch.wait(LONG_S)
        return dict(next(line for line in reversed(self.lines) if "job" in line)["job"])


@dataclass
class Site:
    """A broker, a hypervisor with nothing on it, and the worker on that."""

    lab: Lab
    host: EmulatedHost
    rig: WorkerRig

    def asked(self, *words: str) -> Watched:
        """A job that an operator asks for with the command."""
        return Watched(self, json.loads(cli_here("job", *words, "--json").stdout)["job"]["id"])

    def workspace(self) -> dict[str, Any]:
        return dict(self.lab.operator.request("GET", f"/v1/workspaces/{WS}"))

    def parts(self) -> set[str]:
        """The names of what the driver keeps of the VM."""
        return {part.name for part in self.host.disks(WS).iterdir()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory, base = Path(tempfile.mkdtemp(prefix="saw-jobs-")), tmp_path_factory.mktemp("host")
    jobs = JobSettings(lease_s=10, worker_socket=str(directory / "run/worker.sock"))
    lab = Lab(directory, jobs=jobs, machines={"portal": MachineSettings(scopes=("jobs:ask",))})
    host = None
    try:
        lab.start()
        lab.digest, publication = lab.officers.publication(1)
        lab.operator.request("POST", "/v1/policy/publish", encode(publication))
        rig = WorkerRig(lab, tmp_path_factory.mktemp("worker"))
        host = EmulatedHost(base, lab, rig.context, ("one", "two"))
        small = {"workspace_vm_accel": "tcg", "workspace_vm_memory_mib": 512, "workspace_vm_data_disk_mib": 64}
        inventory = rig.base / "inventory/hosts.yml"
        told = json.loads(inventory.read_text())
        inventory.write_text(json.dumps({"hypervisors": {**told["hypervisors"], "vars": small}}))
        places = {"inventory": str(inventory.parent), "collections": str(host.collections), "context": str(rig.context)}
        rig.configure(ansible=places)
        rig.enter, rig.environment = host.enter, host.environment
        rig.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SAW_CONTEXT", str(rig.context))
            yield Site(lab, host, rig)
        if rig.process is not None:
            assert rig.stop() == 0, rig.log()
    finally:
        if host is not None:
            host.end()
        lab.stop()
        shutil.rmtree(directory)


@dataclass
class Step:
    """How a job was in its middle, how it ended, what its watcher saw, and the VM's main process after it."""

    midway: dict[str, Any]
    job: dict[str, Any]
    lines: list[dict[str, Any]]
    pid: int | None


CREATE = (
    "run", "create", WS, "--sponsor", "ada@example.com", "--blueprint", "coding", "--ring", "stable", "--image", "one",
    "--image-path", EmulatedHost.path("one"),
)  # fmt: skip


@pytest.fixture(scope="module")
def waiting(site: Site) -> tuple[Watched, dict[str, Any]]:
    """A create that has come to its last task, and how it is then."""
    create = site.asked(*CREATE)
    return create, create.at(WAITS)


@pytest.fixture(scope="module")
def guest(
    site: Site, waiting: tuple[Watched, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    guest = Guest(site.host, WS, tmp_path_factory.mktemp("guest"))
    yield guest
    guest.swtpm.stop()


@pytest.fixture(scope="module")
def created(site: Site, waiting: tuple[Watched, dict[str, Any]], guest: Guest) -> Step:
    create, midway = waiting
    guest.attest()
    return Step(midway, create.ended(), create.lines, site.host.main_process(WS))


@pytest.fixture(scope="module")
def stopped(site: Site, created: Step) -> Step:
    """A program asks for this one, while the guest is up and hears the power button."""
    site.host.says(WS, "guest one first")
    body = {"kind": "stop", "workspace": WS, "idempotency_key": "stop-for-the-night", "parameters": {"reason": "night"}}
    with site.lab.tls("machine", "portal") as client:
        stop = Watched(site, client.post("/v1/jobs", json=body).json()["id"])
    return Step({}, stop.ended(), stop.lines, site.host.main_process(WS))


@pytest.fixture(scope="module")
def started(site: Site, stopped: Step, guest: Guest) -> Step:
    start = site.asked("run", "start", WS)
    midway = start.at(WAITS)
    guest.attest()
    return Step(midway, start.ended(), start.lines, site.host.main_process(WS))


@pytest.fixture(scope="module")
def interrupted(site: Site, started: Step) -> Step:
    """A rebuild whose worker is killed when the workspace is bound to the new image and the disk is the old one still."""
    site.host.says(WS, "guest one again")
    with site.host.gate("rebuild") as waits:
        rebuild = site.asked("run", "rebuild", WS, "--image", "two", "--image-path", site.host.path("two"))
        rebuild.until(waits)
        midway = {**site.rig.job(rebuild.job), "workspace": site.workspace()}
        site.rig.stop(signal.SIGKILL)
        until(lambda: not commands(rebuild.job), "nothing of the run goes on")
    return Step(midway, rebuild.ended(), rebuild.lines, site.host.main_process(WS))


@pytest.fixture(scope="module")
def resumed(site: Site, interrupted: Step, guest: Guest) -> Step:
    job = interrupted.job["id"]
    site.rig.start()
    again = site.asked("resume", job)
    until(lambda: site.rig.job(job)["progress"].get("task") == WAITS, f"attempt 2 waits: {again.lines[-3:]}", LONG_S)
    guest.attest()
    return Step({}, again.ended(), again.lines, site.host.main_process(WS))


@pytest.fixture(scope="module")
def cancelled(site: Site, resumed: Step) -> Step:
    """A destroy that somebody cancels before anything of the VM was removed."""
    with site.host.gate("destroy") as waits:
        destroy = site.asked("run", "destroy", WS, "--reason", "the work is done")
        destroy.until(waits)
        midway = {**site.rig.job(destroy.job), "workspace": site.workspace()}
        assert cli_here("job", "cancel", destroy.job, "--reason", "look at it first", "--wait").returncode == 0
    return Step(midway, destroy.ended(), destroy.lines, site.host.main_process(WS))


@pytest.fixture(scope="module")
def destroyed(site: Site, cancelled: Step) -> Step:
    destroy = site.asked("run", "destroy", WS, "--reason", "looked at")
    return Step({}, destroy.ended(), destroy.lines, site.host.main_process(WS))


@pytest.mark.thorough
def test_a_create_is_watched_task_by_task_while_it_runs_and_ends_with_an_active_workspace(
    site: Site, created: Step
) -> None:
    midway = created.midway
    assert (midway["state"], midway["executor"], midway["asked_by"]) == ("running", "ansible", "operator:root")
    assert (midway["progress"]["play"], midway["progress"]["task"]) == ("Start a workspace", WAITS)
    counts = midway["progress"]["hosts"]["edge"]
    assert counts["changed"] >= 3, counts
    assert counts["failed"] == counts["unreachable"] == 0
    told = [line["text"] for line in created.lines if line.get("kind") in {"play", "task"}]
    wanted = [
        "Create a workspace",
        "Register it",
        "Record the endorsement key and let it attest",
        "Start a workspace",
        WAITS,
    ]
    assert [text for text in told if text in wanted] == wanted
    assert created.job["state"] == "succeeded", created.job
    assert created.pid is not None
    site.host.says(WS, "guest one first")


@pytest.mark.thorough
def test_a_stop_ends_the_vm_and_keeps_what_it_is_made_of(site: Site, stopped: Step) -> None:
    assert (stopped.job["state"], stopped.job["asked_by"]) == ("succeeded", "machine:portal")
    assert stopped.pid is None
    assert "terminating on signal" not in site.host.log(WS), "the guest went off by itself"
    assert site.parts() >= PARTS


@pytest.mark.thorough
def test_a_start_runs_the_same_root_disk(site: Site, created: Step, started: Step) -> None:
    assert started.job["state"] == "succeeded", started.job
    assert started.pid not in {None, created.pid}
    site.host.says(WS, "guest one again")


@pytest.mark.thorough
def test_a_rebuild_whose_worker_is_killed_is_interrupted_and_nothing_runs(interrupted: Step) -> None:
    assert (interrupted.job["state"], interrupted.job["error"]["code"]) == ("interrupted", "worker_lost")
    workspace = interrupted.midway["workspace"]
    assert (workspace["state"], workspace["image"]) == ("stopped", "two")
    assert interrupted.pid is None


@pytest.mark.thorough
def test_resumed_it_makes_the_new_root_disk_keeps_the_tpm_and_the_workspace_is_active(
    site: Site, interrupted: Step, resumed: Step, guest: Guest
) -> None:
    assert (resumed.job["state"], resumed.job["attempt"]) == ("succeeded", 2), resumed.job
    assert resumed.job["id"] == interrupted.job["id"]
    assert resumed.pid is not None
    assert endorsement(site.host.disks(WS) / "tpm") == endorsement(guest.swtpm.state), "the virtual TPM stays"
    site.host.says(WS, "guest two first")


@pytest.mark.thorough
def test_a_cancelled_destroy_ends_with_its_processes_and_removes_nothing(
    site: Site, resumed: Step, cancelled: Step
) -> None:
    assert (cancelled.job["state"], cancelled.job["cancel_reason"]) == ("cancelled", "look at it first")
    assert cancelled.midway["workspace"]["state"] == "decommissioned"
    assert commands(cancelled.job["id"]) == []
    assert cancelled.pid == resumed.pid is not None
    assert site.parts() >= PARTS
    assert b"guest two again" not in site.host.console(WS), "the guest began anew"


@pytest.mark.thorough
def test_a_destroy_leaves_nothing_behind(site: Site, destroyed: Step) -> None:
    assert destroyed.job["state"] == "succeeded", destroyed.job
    assert site.workspace()["state"] == "decommissioned"
    assert not site.host.disks(WS).exists()
    assert json.loads(site.host.inside("/opt/saw/bin/saw", "vm", "list", "--json").stdout)["vms"] == []
    links = json.loads(site.host.inside("ip", "-json", "link").stdout)
    assert [link["ifname"] for link in links] == ["lo"]
    assert site.host.inside("find", "/run", "-mindepth", "1", "-name", WS).stdout == ""
    assert site.host.emulators() == []
    assert not list((site.rig.base / "state/held").iterdir())


@pytest.mark.thorough
def test_the_audit_trail_tells_who_asked_for_what_and_how_each_ended(site: Site, destroyed: Step) -> None:
    ends = [
        (event["unmapped"]["saw"]["kind"], event["unmapped"]["saw"]["to"])
        for item in site.lab.events()
        if (event := item["event"]).get("entity", {}).get("type") == "job"
        and event["unmapped"]["saw"].get("to") not in {None, "queued", "running"}
    ]
    assert ends == [
        ("create", "succeeded"), ("stop", "succeeded"), ("start", "succeeded"), ("rebuild", "interrupted"),
        ("rebuild", "succeeded"), ("destroy", "cancelled"), ("destroy", "succeeded"),
    ]  # fmt: skip
