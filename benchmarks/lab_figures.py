"""Figures that the lab's own runs recorded (``build/report.json``, ``build/images``), and a second converge of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec

sys.path[:0] = [str(Path(__file__).parent)]

from results import Goal, Result, result  # noqa: E402 - the module beside this one

IMAGE = "golden image (Packer, Ansible)"
# Reusing an image or a release record takes about a second; making one never takes this little.
MADE_S = 5.0


class Step(msgspec.Struct):
    """A step of the report."""

    name: str
    ok: bool
    seconds: float


class Attach(msgspec.Struct):
    """What the first attachment took."""

    seconds: float


class Workspace(msgspec.Struct):
    """The part of the workspace record that is read here."""

    attach: Attach | None = None
    boot_seconds: float | None = None


class Report(msgspec.Struct):
    """``build/report.json`` as far as it is read here."""

    ok: bool
    steps: list[Step]
    workspace: Workspace = msgspec.field(default_factory=Workspace)


class Build(msgspec.Struct):
    """``build/images/<name>/build.json`` as far as it is read here."""

    name: str
    seconds: float
    created: str


class Reference(msgspec.Struct):
    """``build/images/<name>/reference.json``: how long the bare reference boot took."""

    seconds: float


def read(build: Path) -> list[Result]:
    """Return the rows; what was not recorded is not measured."""
    return [*_report_rows(build), _image_row(build)]


def _report_rows(build: Path) -> list[Result]:
    path, command = build / "report.json", "make workspace"
    names = ("make_workspace", "boot_to_attested", "attach")
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError:
        return [result(name, None, "s", command=command, note=f"not measured: no {path.name}") for name in names]
    except msgspec.MsgspecError as error:
        note = f"not measured: {path.name}: {error}"
        return [result(name, None, "s", command=command, note=note) for name in names]
    steps = {step.name: step for step in report.steps}
    ran = IMAGE in steps and steps[IMAGE].seconds >= MADE_S
    kind = "image built in this run" if ran else "image reused"
    verdict = "" if report.ok else "; the run's control report was NOT as expected"
    rows = [
        result(
            names[0], sum(step.seconds for step in report.steps), "s", command=command,
            note=f"{kind}; demonstration included{verdict}",
        )
    ]  # fmt: skip
    rows.append(_boot_row(build, report.workspace.boot_seconds, command))
    attach = report.workspace.attach
    rows.append(
        result(
            names[2], attach.seconds if attach else None, "s", command=command,
            note="certificate, SSH, shell in the sandbox" if attach else "not measured: the report has no attachment",
        )
    )  # fmt: skip
    return rows


def _boot_row(build: Path, seconds: float | None, command: str) -> Result:
    """Start of the VM to its first attestation, over the reference boot of the same image."""
    name = "boot_to_attested"
    if seconds is None:
        return result(name, None, "s", command=command, note="not measured: the workspace ran before this run")
    newest = _newest(build)
    try:
        raw = (newest[0] / "reference.json").read_bytes() if newest else b""
        bare = msgspec.json.decode(raw, type=Reference).seconds
    except (OSError, msgspec.MsgspecError):
        return result(name, seconds, "s", command=command, note="no ratio: no reference boot of the image is recorded")
    note = "from the start of the VM; baseline: the image's reference boot"
    return result(name, seconds, "s", baseline=bare, goal=Goal("ratio", "most", 1.5), command=command, note=note)


def _newest(build: Path) -> tuple[Path, Build] | None:
    found = []
    for path in sorted((build / "images").glob("*/build.json")):
        try:
            found.append((path.parent, msgspec.json.decode(path.read_bytes(), type=Build)))
        except (OSError, msgspec.MsgspecError):
            continue
    return max(found, key=lambda item: item[1].created, default=None)


def _image_row(build: Path) -> Result:
    newest = _newest(build)
    if newest is None:
        return result("image_build", None, "s", command="make image", note="not measured: no finished image")
    return result(
        "image_build", newest[1].seconds, "s", command="make image", note=f"{newest[1].name}, packages cached"
    )


def converge(repository: Path, *, run: bool) -> list[Result]:
    """Converge the running lab's control plane twice and time the second; nothing may change in it."""
    name = "second_converge_control_plane"
    command = "python benchmarks/run.py --only converge --lab"
    if not run:
        return [result(name, None, "s", command=command, note="not measured: asks for --lab and a running lab")]
    from saw.lab.playbook import run_playbook
    from saw.lab.topology import Lab

    lab = Lab(repository, repository / "build")
    if not all(host.running() for host in lab.hosts()):
        return [result(name, None, "s", command=command, note="not measured: the lab does not run (make workspace)")]
    times, changed = [], 0
    for _ in range(2):
        begin = time.monotonic()
        changed = run_playbook(lab, "control_plane", say=lambda _: None).changed
        times.append(time.monotonic() - begin)
    note = "baseline: the converge right before it"
    return [
        result(name, times[1], "s", baseline=times[0], command=command, note=note),
        result("second_converge_changes", changed, "", goal=Goal("value", "most", 0), command=command),
    ]
