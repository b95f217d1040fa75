"""The main job: from an empty machine to a governed workspace, step by step.

Every step ensures a state and may be repeated: after Ctrl-C or kill -9 the next run goes on where things stand.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from saw.attest.image_record import BASELINE_REPORT
from saw.broker.client import OperatorClient
from saw.datadisk.recovery import make_keys
from saw.errors import SawError, UnavailableError
from saw.image import package_state, secure_boot, verified_root
from saw.image.base_os import base_os
from saw.image.build import ImageBuild
from saw.image.edr import chosen
from saw.image.finished import GoldenImage
from saw.image.record import make_record
from saw.image.wheelhouse import wheelhouse
from saw.lab import demo_pki, people
from saw.lab.exclusive import exclusive as hold
from saw.lab.image_release import release_image
from saw.lab.nspawn import login_key_of
from saw.lab.playbook import PlaybookRun, run_playbook
from saw.lab.process import run
from saw.lab.steps import Progress
from saw.lab.topology import BASTION_PORT, ENTERPRISE_NAMES, TRUST_DOMAIN, WORKSPACE, Lab

DELEGATION = {
    "task": "the demonstration engagement",
    "duration": "7d",
    "renew": "2d",
    "resources": [
        {"host": "git.example.com", "paths": ["/team/**"]},
        {"host": "api.example.com", "methods": ["GET", "POST"], "paths": ["/v1/items", "/v1/items/**", "/v1/notes"]},
        {"host": "inference.local"},
    ],
}
"""What the agent of the demonstration workspace is handed: less than its policy allows, which the engagement shows."""


def exclusive(lab: Lab) -> AbstractContextManager[None]:
    """Hold the lab's lock; a second run ends with a message instead of a mess."""
    return hold(lab.build)


class Bringup:
    """One run of the main job on ``lab``."""

    def __init__(self, lab: Lab, progress: Progress) -> None:
        self.lab = lab
        self.progress = progress
        self.hosts = {host.name: host for host in lab.hosts()}

    def client(self) -> OperatorClient:
        """Return the operator's client of the lab's broker."""
        return OperatorClient.from_context(self.lab.context_file)

    def playbook(self, name: str, variables: dict[str, Any] | None = None) -> PlaybookRun:
        """Run a playbook with progress."""
        return run_playbook(self.lab, name, variables, say=self.progress.say)

    def saw(self, *argv: str) -> dict[str, Any]:
        """Run ``saw`` with ``--json`` and return its answer."""
        command = [str(Path(sys.executable).with_name("saw")), *argv, "--json"]
        environment = {**os.environ, "SAW_CONTEXT": str(self.lab.context_file)}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL
        )
        try:
            answer = json.loads(done.stdout or "{}")
        except ValueError:
            answer = {}
        if done.returncode:
            raise UnavailableError(
                f"`saw {' '.join(argv[:2])}` failed: {(done.stderr or done.stdout).strip()[-1200:]}",
                details={"error": answer.get("error") if isinstance(answer, dict) else None},
            )
        return dict(answer)

    # --- steps -------------------------------------------------------------------------------------------------------

    def image(self, *, keep: bool = False) -> GoldenImage:
        """Build or reuse the golden image; ``keep`` takes the newest finished one as it is.

        The archive is not asked for newer packages unless that was chosen; what waits is told (docs/decisions/0059).
        """
        choice = package_state.chosen("reuse")
        build = ImageBuild(
            self.lab.repository,
            self.lab.build,
            self.progress.say,
            edr=chosen(),
            owner=secure_boot.chosen(),
            root_verity=verified_root.chosen(),
            choice=choice,
        )
        newest = build.latest() if keep else None
        if newest and BASELINE_REPORT not in newest[0].evidence:
            raise UnavailableError(
                f"image {newest[0].name} is of an earlier release and has no score of its hardening, "
                "which the lab's broker asks for",
                cure="run it without --keep-image: the image is built again",
            )
        image, reason = (newest[0], "kept as asked") if newest else build.ensure()
        self.progress.say(f"golden image {image.name}: {reason}")
        build.news(image)
        return image

    def start_hosts(self) -> Path:
        """Start the light hosts; return the wheelhouse."""
        people.need_provider(self.lab)
        cache = self.lab.build / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        base = package_state.Base(self.lab.repository / "packer/packages/host.txt", cache, base_os(self.lab.repository))
        tar = base.tar(package_state.settle(base, package_state.Choice("reuse"))[0])
        wheels = wheelhouse(self.lab.repository, cache)
        for host in self.hosts.values():
            # What an earlier version started is started anew; not the hypervisor, which would end the workspace.
            if host.name != "edge" and host.outdated():
                self.progress.say(f"host {host.name} was started otherwise: it starts anew")
                host.down()
            host.up(tar)
            self.progress.say(f"host {host.name} answers at {host.address}")
        return wheels

    def write_files(self, wheels: Path) -> None:
        """Write inventory and context."""
        pki = demo_pki.ensure(self.lab.directory / "enterprise-tls", ENTERPRISE_NAMES)
        credentials = self.lab.credentials()
        people.write_context(self.lab)
        self.lab.write_files(
            {
                "saw_runtime_wheelhouse": str(wheels),
                "broker_trust_domain": TRUST_DOMAIN,
                "broker_sessions": {"recorded_only": True, "lease_s": 300},
                # Nothing to search for vulnerabilities with is brought along (docs/images.md).
                "broker_image_require": ["sbom", "provenance", "baseline"],
                "bastion_broker_address": f"{self.hosts['control'].address}:8443",
                "bastion_port": BASTION_PORT,
                "perimeter_broker_address": f"{self.hosts['control'].address}:8443",
                "perimeter_operator_networks": [f"{self.lab.network.prefix}.0/24"],
                "perimeter_ingress_address": self.hosts["edge"].address,
                "perimeter_bastion_port": BASTION_PORT,
                "perimeter_upstream_ca_file": "/etc/saw-enterprise-ca.pem",
                "perimeter_hosts_file": "/etc/saw-enterprise-hosts",
                "perimeter_credentials": credentials,
                "perimeter_reviews": True,
                "perimeter_replicas": 1,  # the machine may have two cores (docs/decisions/0084)
                "demo_enterprise_credentials": credentials,
                "demo_enterprise_tls": str(pki),
                "demo_enterprise_names": list(ENTERPRISE_NAMES),
                "demo_enterprise_address": self.hosts["enterprise"].address,
                **people.variables(self.lab),
            }
        )

    def released_digest(self) -> str:
        """Return the digest of the policy that the broker releases; empty while there is none, or no broker that answers."""
        from saw.lab.release import current_release

        try:
            return str(current_release(self.lab, "stable", "coding")[0].get("policy_digest", ""))
        except SawError:
            return ""

    def trusted_root(self) -> dict[str, Any]:
        """Return the variable that pins the officers' root on the hypervisor; none before the officers made it."""
        root = self.lab.directory / "officers/metadata/1.root.json"
        return {"hypervisor_trusted_root": str(root)} if root.exists() else {}

    def publish(self) -> dict[str, Any]:
        """Sign the example blueprint with two of three keys made on the spot and publish it, unless it is in force."""
        from saw.lab.release import publish_blueprint

        return publish_blueprint(self.lab, self.saw, self.progress.say)

    def register_image(self, image: GoldenImage) -> dict[str, Any]:
        """Boot the image once on the hypervisor, record what it measures, and register the release record."""

        path = f"/var/lib/saw/images/{image.name}/image.qcow2"

        def on_edge(*words: str) -> dict[str, Any]:
            return dict(json.loads(self.on_host("edge", "/opt/saw/bin/saw", "vm", *words, "--json").splitlines()[-1]))

        def measure(_file: Path) -> dict[str, Any]:
            answer = on_edge("measure", "--image", path)
            self.progress.say(f"accelerator: {answer['accel']['name']} ({answer['accel']['reason']})")
            return answer

        firmware = str(on_edge("firmware")["firmware_sha256"])
        made = make_record(Path(image.directory), measure, self.progress.say, firmware=firmware)
        release_image(self.lab, self.saw, Path(made.file), datetime.now(UTC))
        return made.record

    def on_host(self, name: str, *command: str, timeout: float = 600) -> str:
        """Run a command on a light host over SSH and return its output."""
        trusted = self.lab.directory / "ssh/known_hosts"
        return run(
            "ssh", "-i", str(login_key_of(self.lab.directory)), "-o", f"UserKnownHostsFile={trusted}", "-o", "BatchMode=yes",
            "-o", "StrictHostKeyChecking=yes", f"root@{self.hosts[name].address}", "--", *command, timeout=timeout,
        )  # fmt: skip

    def workspace_id(self) -> str:
        """Return the id of the demonstration workspace: the live one, or the next free one after a decommissioning."""
        known = {row["id"]: row["state"] for row in self.saw("workspace", "list")["workspaces"]}
        for number in range(1, 250):
            name = WORKSPACE if number == 1 else f"{WORKSPACE}-{number}"
            if known.get(name) != "decommissioned":
                return name
        raise UnavailableError("250 demonstration workspaces were used up", cure="make clean")

    def create_workspace(self, image: GoldenImage) -> str:
        """Create and start the workspace and wait until it is active; one of another image is rebuilt and keeps its data."""
        name = self.workspace_id()
        profile = {
            "workspace_id": name,
            "workspace_image": image.name,
            "workspace_image_path": f"/var/lib/saw/images/{image.name}/image.qcow2",
            "workspace_image_sha256": image.image_sha256,
        }
        known = {row["id"]: row for row in self.saw("workspace", "list")["workspaces"]}.get(name)
        if known and known["state"] == "quarantined":
            raise UnavailableError(
                f"workspace {name} is quarantined ({known.get('state_reason', 'killed')})",
                cure=f"release it: saw workspace stop {name}, or remove it: make destroy",
            )
        if known and known.get("image") != image.name and known["ek_recorded"]:
            self.progress.say(f"rebuilding {name} on image {image.name}; its data disk stays")
            self.playbook("workspace_stop", {"workspace_id": name, "workspace_reason": "new golden image"})
            self.saw("workspace", "reprovision", name, "--image", image.name)
        self.playbook(
            "workspace_create",
            {
                **profile,
                "workspace_sponsor": "demo.user@example.com",
                "workspace_blueprint": "coding",
                "workspace_ring": "stable",
                "workspace_delegations": [DELEGATION],
                **data_disk_variables(self.lab, image),
            },
        )
        return name

    def engagement(self, workspace: str) -> list[dict[str, Any]]:
        """Run the demonstration engagement in the sandbox and judge what arrived at the far end."""
        from saw.lab.approval import approved_push
        from saw.lab.demo import run_engagement

        return [*run_engagement(self, workspace), approved_push(self, workspace)]

    def attach(self, workspace: str) -> dict[str, Any]:
        """Attach with a certificate of minutes: a command, and the persistent multiplexer."""
        from saw.lab.demo import check_attach

        return check_attach(self, workspace)


def data_disk_variables(lab: Lab, image: GoldenImage) -> dict[str, Any]:
    """Return what has the workspace encrypt its data disk, where ``SAW_DATA_DISK`` is ``encrypted``; the key is made once.

    Without the variable it is as it was the last time. The disk opens under secure boot alone where the image was signed, and on
    its TPM with any image otherwise.
    """
    folder = lab.directory / "data-disk"
    public = folder / "recovery.pub"
    wanted = os.environ.get("SAW_DATA_DISK") or ("encrypted" if public.exists() else "plain")
    if wanted not in {"plain", "encrypted"}:
        raise UnavailableError(f"SAW_DATA_DISK is {wanted!r}", cure="say plain or encrypted")
    if wanted == "plain":
        return {}
    if not public.exists():
        make_keys(folder, "recovery")
    return {
        "workspace_vm_data_disk_recovery_key": public.read_text(encoding="ascii"),
        "workspace_vm_data_disk_secure_boot": image.secure_boot is not None,
    }


def boot_seconds(job: Bringup, shown: dict[str, Any], begin: datetime) -> float | None:
    """Return the seconds from the start of the VM to its first attestation; None when it ran before ``begin``."""
    unit = f"saw-vm@{shown['id']}.service"
    told = job.on_host(
        "edge", "systemctl", "show", "--timestamp=unix", "--property=ActiveEnterTimestamp", "--value", unit
    )
    started = datetime.fromtimestamp(int(told.strip().lstrip("@") or 0), UTC)
    attested = datetime.fromisoformat(str(shown["state_since"]))
    return round((attested - started).total_seconds(), 1) if begin < started < attested else None


def lifecycle(job: Bringup, verb: str, reason: str) -> str:
    """Start, stop, rebuild, kill or destroy the demonstration workspace with its playbook; return the workspace's id."""
    name = job.workspace_id()
    job.playbook(f"workspace_{verb}", {"workspace_id": name, "workspace_reason": reason})
    if verb in {"start", "rebuild"}:
        from saw.lab.demo import wait_shell

        wait_shell(job, name)
    return name


def tear_down(lab: Lab, *, purge: bool) -> None:
    """End everything of the lab and say what; with ``purge`` also the role tests, and the state. Safe on a half-made lab."""
    from saw.lab.leftovers import ROLE_TESTS, SITES, end_all

    sites = SITES if purge else tuple(site for site in SITES if site is not ROLE_TESTS)
    with exclusive(lab):
        ended = end_all(
            lab.build, lab.repository, lambda text: print(f"    {text}", flush=True), purge=purge, sites=sites
        )
        if purge:
            shutil.rmtree(lab.directory, ignore_errors=True)
    print(f"    ended: {ended}", flush=True)
