"""``make workspace``: every step in order under the lab's lock, and the control report of how they ended."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from saw.errors import SawError, UnavailableError
from saw.files import StorageError, describe_file_system, storage_error, takes_no_more
from saw.image.finished import GoldenImage
from saw.lab import people
from saw.lab.evidence import attestation, head, trail
from saw.lab.preflight import preflight
from saw.lab.process import wait_for
from saw.lab.report import Report
from saw.lab.retire import retire_images
from saw.lab.steps import Progress
from saw.lab.topology import Lab
from saw.lab.up import Bringup, boot_seconds, exclusive
from saw.vm.spec import RUNTIME


class Interrupted(SawError):
    """The run was interrupted by a person."""

    code = "interrupted"


def accelerator(job: Bringup) -> dict[str, str]:
    """Return ``{name, reason, cure}`` of what runs the machines on the hypervisor, as its probe found it at their start."""
    known = json.loads(job.on_host("edge", "cat", str(RUNTIME / "accel.json")))
    found = {name: str(known.get(name, "")) for name in ("name", "reason", "cure")}
    job.progress.say(f"accelerator: {found['name']} ({found['reason']})")
    if found["cure"]:
        job.progress.say(f"  {found['cure']}")
    return found


def attested(job: Bringup, workspace: str, released_digest: str) -> dict[str, Any]:
    """Return what the verifier said last about the workspace; a renewal that is under way is given a few seconds."""
    told: dict[str, Any] = {}

    def good() -> bool:
        nonlocal told
        with job.client().session() as client:
            recent = max(0, head(client, "broker") - 1000)
            shown = client.request("GET", f"/v1/workspaces/{workspace}")
            told = attestation(shown, trail(client, "broker", recent), released_digest, datetime.now(UTC))
        return bool(told["verdict"] == "attested")

    with suppress(UnavailableError):
        wait_for("a good attestation", good, patience=20, interval=1.0)
    return told


def bring_up(lab: Lab, *, keep_image: bool = False) -> int:
    """Run the whole; write ``build/report.json``; return the exit code.

    Only the run that holds the lab's lock touches the report. It removes the old one first, so that a report is always
    that of a finished or failed run and never an older one's.
    """
    try:
        if os.geteuid() != 0:
            preflight(lab)
        with exclusive(lab):
            return reported(lab, keep_image=keep_image)
    except SawError as error:
        print(f"\n{error}", file=sys.stderr)
    except OSError as error:
        full = storage_error(error, lab.build, tempfile.gettempdir())
        if full is None:
            raise
        print(f"\n{full}", file=sys.stderr)
    return 1


def reported(lab: Lab, *, keep_image: bool) -> int:
    """Run every step under the lock and report how they ended; raises ``OSError`` when the report cannot be written."""
    path = lab.build / "report.json"
    path.unlink(missing_ok=True)
    progress = Progress(total=10)
    report = Report(ok=False, steps=progress.steps, calls=[], attestation={}, audit={})
    begin = time.monotonic()
    failure: SawError | None = SawError("a fault in this program stopped the run", cure="report it with the trace")
    try:
        steps(lab, progress, report, keep_image=keep_image)
        failure = None
    except KeyboardInterrupt:
        failure = Interrupted("interrupted", cure="the next `make workspace` goes on from here")
    except SawError as error:
        failure = full_disk_behind(error, lab)
    except OSError as error:
        full = storage_error(error, lab.build, tempfile.gettempdir())
        if full is None:
            raise
        failure = full
    finally:
        # Reached by every way out: a fault of ours is recorded too before it goes on.
        report.error = failure.as_dict() if failure else None
        report.judge()
        if failure:
            print(f"\n{failure}", file=sys.stderr, flush=True)
        report.write(path)
    if isinstance(failure, Interrupted):
        return 130
    print(report.table())
    if report.ok:
        print(people.how_to_open(lab))
    print(f"{time.monotonic() - begin:.0f} s; report: {path}")
    return 0 if report.ok else 1


def steps(lab: Lab, progress: Progress, report: Report, *, keep_image: bool) -> None:
    """Bring everything up, run the demonstration, and record in ``report`` what was seen."""
    started = datetime.now(UTC)
    with progress.step("check this machine"):
        preflight(lab)
    job = Bringup(lab, progress)
    with progress.step("golden image (Packer, Ansible)"):
        image = job.image(keep=keep_image)
        report.image = msgspec.to_builtins(image)
    with progress.step("light hosts for control plane, perimeter and far end"):
        job.write_files(job.start_hosts())
    with progress.step("control plane, perimeter, hypervisor and far-end services (Ansible)"):
        seen = converge(job)
    with progress.step("sign the blueprint with 2 of 3 keys and publish it"):
        release = publish(job, seen)
    with progress.step("release record of the image"):
        job.register_image(image)
    with progress.step("workspace: create, boot, attest, activate"):
        workspace = job.create_workspace(image)
        shown = job.saw("workspace", "show", workspace)
        report.workspace = {**shown, "boot_seconds": boot_seconds(job, shown, started)}
        report.accelerator = accelerator(job)
        tidy(job, image)
    with progress.step("attach with a certificate of minutes"):
        report.workspace["attach"] = job.attach(workspace)
    with progress.step("demonstration engagement in the sandbox"):
        report.calls = job.engagement(workspace)
    with progress.step("audit trail"):
        report.audit = job.client().request("GET", "/v1/audit/verify")
        report.attestation = attested(job, workspace, str(release["policy_digest"]))


def tidy(job: Bringup, image: GoldenImage) -> None:
    """Remove images that the lab has gone past; what stands in the way of that is told, and no failure of the run."""
    try:
        retire_images(job.lab.build, job.saw, job.progress.say, image)
    except (SawError, OSError) as error:
        job.progress.say(f"older images stay: {error}")


def converge(job: Bringup) -> str:
    """Converge the far end, the control plane and the perimeter; return the digest of the release that they then knew."""
    job.playbook("demo_enterprise")
    seen = job.released_digest()
    job.playbook("control_plane", job.trusted_root())
    return seen


def publish(job: Bringup, seen: str) -> dict[str, Any]:
    """Publish the blueprint and return its release; the perimeter opens once it is told the root of a first one."""
    release = job.publish()
    if release["policy_digest"] != seen:
        job.playbook("control_plane", job.trusted_root())
    return release


def full_disk_behind(error: SawError, lab: Lab) -> SawError:
    """Return ``error``, or the full file system behind it: the program that failed said so, or there is no room left."""
    said = next((number for number in (errno.ENOSPC, errno.EDQUOT) if os.strerror(number) in error.message), 0)
    places = (lab.build, Path(tempfile.gettempdir()))
    if isinstance(error, StorageError) or not (said or any(takes_no_more(place) for place in places)):
        return error
    # What failed has cleaned up behind itself, so the file system may have room again by now.
    full = next((place for place in places if takes_no_more(place)), None)
    state = "is full" if full else "was full, or another one that the program writes to"
    return StorageError(
        f"{describe_file_system(full or lab.build)} {state}: {error.message}",
        cure="free space on it, or set SAW_BUILD to a directory on a larger disk; the next run goes on from here",
    )
