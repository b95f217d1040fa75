"""The main job's report: whose it is, what a way out leaves in it, and what it says about the accelerator."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from private_ns import private

from saw.errors import UnavailableError
from saw.lab import main_job, people
from saw.lab.report import Report
from saw.lab.steps import Progress
from saw.lab.topology import Lab
from saw.lab.up import Bringup

ROOT = Path(__file__).resolve().parents[3]
OLD = '{"ok": true, "of": "another run"}'
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab with the report of an earlier run, in a directory that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="saw-main-") as place:
        Path(place).chmod(0o755)
        build = Path(place, "build")
        build.mkdir()
        (build / "report.json").write_text(OLD)
        yield Lab(ROOT, build)


def report(lab: Lab) -> dict[str, Any]:
    return dict(json.loads((lab.build / "report.json").read_text()))


def with_steps(monkeypatch: pytest.MonkeyPatch, action: Callable[[Progress, Report], None]) -> None:
    """Put ``action`` in the place of the ten steps."""

    def steps(_: Lab, progress: Progress, told: Report, *, keep_image: bool) -> None:
        action(progress, told)

    monkeypatch.setattr(main_job, "steps", steps)


@root_only
def test_a_run_that_is_refused_because_another_one_works_leaves_that_ones_report(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    with (lab.build / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main_job.bring_up(lab) == 1
    assert "another run uses this build directory" in capsys.readouterr().err
    assert (lab.build / "report.json").read_text() == OLD


@root_only
def test_another_user_gets_a_message_and_touches_nothing(lab: Lab) -> None:
    (lab.build / ".lock").touch()
    before = sorted(path.name for path in lab.build.iterdir())

    def attempt() -> tuple[int, str]:
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            return main_job.bring_up(lab), err.getvalue()

    for mode in (0o755, 0o777):
        lab.build.chmod(mode)
        code, text = private(attempt, uid=65534)
        assert code == 1
        assert "root is needed" in text
        assert "run it with sudo" in text
        assert "Traceback" not in text
        assert (lab.build / "report.json").read_text() == OLD
        assert sorted(path.name for path in lab.build.iterdir()) == before


@root_only
def test_a_fault_in_the_program_is_recorded_and_goes_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(progress: Progress, _: Report) -> None:
        with progress.step("first"):
            raise ZeroDivisionError

    with_steps(monkeypatch, broken)
    with pytest.raises(ZeroDivisionError):
        main_job.bring_up(lab)
    told = report(lab)
    assert told["ok"] is False
    assert told["error"]["message"] == "a fault in this program stopped the run"
    assert [(step["name"], step["ok"]) for step in told["steps"]] == [("first", False)]


@root_only
@pytest.mark.parametrize(
    ("raised", "code", "error"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (UnavailableError("the broker is down", cure="start it"), 1, "unavailable"),
        (OSError(28, "No space left on device"), 1, "storage_refused"),
    ],
)
def test_every_way_out_leaves_its_own_report(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, error: str
) -> None:
    def fail(_: Progress, __: Report) -> None:
        raise raised

    with_steps(monkeypatch, fail)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main_job.bring_up(lab) == code
    told = report(lab)
    assert (told["ok"], told["error"]["code"]) == (False, error)
    assert told["problems"][0] == told["error"]["message"]
    assert people.ORIGIN not in said.getvalue()


@root_only
def test_a_run_that_is_killed_leaves_no_report_of_an_earlier_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: Progress, __: Report) -> None:
        os._exit(9)

    with_steps(monkeypatch, killed)
    child = os.fork()
    if not child:
        main_job.bring_up(lab)
        os._exit(0)
    os.waitpid(child, 0)
    assert not (lab.build / "report.json").exists()


@root_only
def test_a_good_run_says_ok_and_where_the_pages_are_and_ends_with_zero(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def good(progress: Progress, told: Report) -> None:
        with progress.step("all"):
            call = {
                "name": "c",
                "control": "X",
                "expected": "allow",
                "verdict": "allow",
                "reason": "",
                "ok": True,
                "ms": 1,
            }
            told.calls = [call]
            told.attestation = {"verdict": "attested", "policy_digest": "d", "released_digest": "d"}
            told.audit = {"complete": True, "events": 3}
            told.workspace = {"attach": {"ok": True}}

    with_steps(monkeypatch, good)
    assert main_job.bring_up(lab) == 0
    assert (report(lab)["ok"], report(lab)["problems"], report(lab)["error"]) == (True, [], None)
    assert people.how_to_open(lab) in capsys.readouterr().out


class Hypervisor:
    """A job whose hypervisor holds this answer of the probe."""

    def __init__(self, answer: dict[str, str]) -> None:
        self.answer = answer
        self.progress = Progress(total=1)

    def on_host(self, name: str, *command: str) -> str:
        assert (name, command) == ("edge", ("cat", "/run/saw/vm/accel.json"))
        return json.dumps(self.answer)


@pytest.mark.parametrize(
    ("answer", "lines"),
    [
        (
            {"name": "tcg", "reason": "/dev/kvm is missing: software emulation", "cure": "turn virtualisation on"},
            ["accelerator: tcg (/dev/kvm is missing: software emulation)", "turn virtualisation on"],
        ),
        ({"name": "kvm", "reason": "a kernel booted under KVM"}, ["accelerator: kvm (a kernel booted under KVM)"]),
    ],
)
def test_every_run_says_what_runs_the_machine_and_what_would_be_faster(
    answer: dict[str, str], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = main_job.accelerator(cast("Bringup", Hypervisor({"boot_id": "x", **answer})))
    assert told == {"cure": "", **answer}
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == lines


class Converging:
    """A job of which only the plays of two steps run: names them, and publishes ``release`` over what the broker released."""

    def __init__(self, before: str, release: str) -> None:
        self.before, self.after = before, release
        self.plays: list[str] = []
        self.pinned: list[dict[str, Any]] = []
        self.root: dict[str, Any] = {}

    def trusted_root(self) -> dict[str, Any]:
        return self.root

    def released_digest(self) -> str:
        return self.before

    def playbook(self, name: str, variables: dict[str, Any] | None = None) -> None:
        self.plays.append(name)
        self.pinned.append(variables or {})

    def publish(self) -> dict[str, Any]:
        self.root = {"hypervisor_trusted_root": "1.root.json"}
        return {"policy_digest": self.after}


@pytest.mark.parametrize(
    ("before", "after", "plays"),
    [
        ("", "d1", ["demo_enterprise", "control_plane", "control_plane"]),
        ("d1", "d2", ["demo_enterprise", "control_plane", "control_plane"]),
        ("d1", "d1", ["demo_enterprise", "control_plane"]),
    ],
)
def test_the_perimeter_is_converged_again_only_for_a_release_that_it_has_not_seen(
    before: str, after: str, plays: list[str]
) -> None:
    job = Converging(before, after)
    seen = main_job.converge(cast("Bringup", job))
    assert main_job.publish(cast("Bringup", job), seen) == {"policy_digest": after}
    assert job.plays == plays
    # The hypervisor pins the root out of the officers' hands, once they have made it.
    assert job.pinned == [{}, {}, {"hypervisor_trusted_root": "1.root.json"}][: len(plays)]


def test_the_root_that_the_hypervisor_pins_is_the_officers_own(lab: Lab) -> None:
    job, root = Bringup(lab, Progress(total=1)), lab.directory / "officers/metadata/1.root.json"
    assert job.trusted_root() == {}
    root.parent.mkdir(parents=True)
    root.write_text("{}")
    assert job.trusted_root() == {"hypervisor_trusted_root": str(root)}


def test_without_a_broker_nothing_counts_as_released(lab: Lab) -> None:
    assert Bringup(lab, Progress(total=1)).released_digest() == ""
