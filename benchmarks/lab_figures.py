"""Figures that the lab's own runs recorded (``build/report.json``, ``workspace-runs.json``, ``images``); a second converge."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec

from saw.lab.topology import Lab

sys.path[:0] = [str(Path(__file__).parent)]

import workspace_runs  # noqa: E402 - the modules beside this one
from results import Goal, Result, result  # noqa: E402

COLD, WARM = Goal("value", "most", 15 * 60), Goal("value", "most", 4 * 60)
CONVERGE = Goal("value", "most", 15)
BOOT = Goal("ratio", "most", 1.5)


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
    return [*_run_rows(build), *_report_rows(build), _image_row(build)]


def _run_rows(build: Path) -> list[Result]:
    """The newest cold and the newest warm run that ended well, each against its goal."""
    runs = workspace_runs.history(build)
    rows = []
    for kind, goal in (("cold", COLD), ("warm", WARM)):
        newest = next((run for run in reversed(runs) if run.kind == kind and run.ok), None)
        note = f"not measured: no {kind} run is recorded; " + (
            "run `make clean`, then `make workspace`" if kind == "cold" else "run `make workspace` again"
        )
        if newest:
            note = f"ended {newest.ended}; {newest.packages} packages installed; demonstration included"
        rows.append(
            result(
                f"make_workspace_{kind}", newest.seconds if newest else None, "s", goal=goal, command="make workspace", note=note
            )
        )  # fmt: skip
    return rows


def _report_rows(build: Path) -> list[Result]:
    path, command = build / "report.json", "make workspace"
    names = ("boot_to_attested", "attach")
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError:
        return [result(name, None, "s", command=command, note=f"not measured: no {path.name}") for name in names]
    except msgspec.MsgspecError as error:
        note = f"not measured: {path.name}: {error}"
        return [result(name, None, "s", command=command, note=note) for name in names]
    verdict = "" if report.ok else "; the run's control report was NOT as expected"
    attach = report.workspace.attach
    note = "certificate, SSH, shell in the sandbox" if attach else "not measured: the report has no attachment"
    return [
        _boot_row(build, report.workspace.boot_seconds, command),
        result(names[1], attach.seconds if attach else None, "s", command=command, note=note + verdict),
    ]


def _boot_row(build: Path, seconds: float | None, command: str) -> Result:
    """Start of the VM to its first attestation, over the reference boot of the same image."""
    name = "boot_to_attested"
    if seconds is None:
        return result(
            name, None, "s", goal=BOOT, command=command,
            note="not measured: the workspace ran before the last `make workspace`; run `make stop`, then `make workspace`",
        )  # fmt: skip
    newest = _newest(build)
    try:
        raw = (newest[0] / "reference.json").read_bytes() if newest else b""
        bare = msgspec.json.decode(raw, type=Reference).seconds
    except (OSError, msgspec.MsgspecError):
        return result(name, seconds, "s", command=command, note="no ratio: no reference boot of the image is recorded")
    note = "from the start of the VM; baseline: the image's reference boot"
    return result(name, seconds, "s", baseline=bare, goal=BOOT, command=command, note=note)


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


def converge(lab: Lab) -> list[Result]:
    """Converge the running lab's control plane twice and time the second; nothing may change in it."""
    from saw.lab.playbook import run_playbook
    from saw.lab.up import exclusive

    times, changed = [], 0
    with exclusive(lab):
        for _ in range(2):
            begin = time.monotonic()
            changed = run_playbook(lab, "control_plane", say=lambda _: None).changed
            times.append(time.monotonic() - begin)
    note = "control plane and perimeter in one play; baseline: the converge right before it; goal: for one host"
    return [
        result("second_converge", times[1], "s", baseline=times[0], goal=CONVERGE, note=note),
        result("second_converge_changes", changed, "", goal=Goal("value", "most", 0)),
    ]
