"""The worker with a broker behind a line that can be cut: it stops what is not its own any more, and leaves what goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from job_world import WORKER, JobWorld
from review_world import OPERATOR

from saw.errors import UnavailableError
from saw.jobs.executor import Ended, Gathered
from saw.jobs.messages import AskClaim, Beat, End, Event, JobError, Progress, Work
from saw.jobs.worker import Held, Worker

pytestmark = [pytest.mark.control("LIF-01")]


class Line:
    """The way to the broker, which can be cut."""

    def __init__(self, world: JobWorld) -> None:
        self.work = world.broker.job_work
        self.cut = False
        self.refused = 0
        self.told: list[str] = []

    def request(self, _method: str, path: str, json: object | None = None) -> dict[str, Any]:
        if self.cut:
            self.refused += 1
            raise UnavailableError("the line is cut")
        parts = path.split("/")
        if parts[-1] == "claim":
            answer: Any = self.work.claim(WORKER, msgspec.convert(json, AskClaim))
            if answer.claimed is None:
                time.sleep(0.01)  # as long as nobody asks for anything, a lane asks again and again
        elif parts[-1] == "beat":
            answer = self.work.beat(WORKER, parts[-2], msgspec.convert(json, Beat))
        else:
            self.told.append(msgspec.convert(json, End).outcome)
            answer = self.work.end(WORKER, parts[-2], msgspec.convert(json, End))
        return dict(msgspec.to_builtins(answer))


class Run:
    """A run that goes on until the test ends it, or until it is cancelled."""

    external_id = "run-1"

    def __init__(self) -> None:
        self.gathered, self.over = Gathered(), threading.Event()
        self.end = Ended("succeeded")
        self.cancelled = self.left = False

    def wait(self, timeout_s: float) -> Ended | None:
        return self.end if self.over.wait(min(timeout_s, 0.01)) else None

    def progress(self) -> tuple[Progress, list[Event]]:
        return self.gathered.told()

    def cancel(self) -> None:
        self.cancelled, self.end = True, Ended("cancelled", JobError("cancelled", "on request"))
        self.over.set()

    def leave(self) -> None:
        self.left = True


class Script:
    """An executor whose runs the test holds."""

    name = "script"

    def __init__(self, *, survives: bool = False) -> None:
        self.survives = survives
        self.runs: dict[str, Run] = {}

    def start(self, work: Work) -> Run:
        return self.runs.setdefault(work.id, Run())

    def reattach(self, work: Work, external_id: str) -> Run | None:
        return self.runs.get(work.id) if external_id and self.survives else None


class Shift:
    """A worker at work."""

    def __init__(self, base: Path, *, survives: bool = False) -> None:
        self.base, self.now = base, 0.0
        self.world = JobWorld(base)
        self.line, self.script = Line(self.world), Script(survives=survives)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Work until the block ends."""
        stop = threading.Event()
        worker = Worker(
            lambda: self.line, self.script, self.base / "worker", slots=1, stop=stop, clock=lambda: self.now
        )
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(60)
            assert not thread.is_alive()

    def running(self) -> tuple[str, Run]:
        """A job that is being run."""
        job = str(self.world.ask("stop")["id"])
        until(lambda: job in self.script.runs and self.world.show(job)["external_id"] == "run-1")
        return job, self.script.runs[job]

    def held(self) -> list[Path]:
        return list((self.base / "worker/held").iterdir())


def until(condition: Callable[[], Any]) -> None:
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("not within two minutes")


def test_what_happens_is_told_while_it_happens_and_the_end_once(tmp_path: Path) -> None:
    shift = Shift(tmp_path)
    with shift.working():
        job, run = shift.running()
        run.gathered.take({"event": "playbook_on_task_start", "event_data": {"name": "Power the VM off"}})
        until(lambda: shift.world.show(job)["progress"].get("task") == "Power the VM off")
        assert [file.name for file in shift.held()] == [f"{job}.json"]
        assert shift.held()[0].stat().st_mode & 0o077 == 0
        run.over.set()
        until(lambda: shift.world.show(job)["state"] == "succeeded" and not shift.held())
    assert shift.line.told == ["succeeded"]


def test_a_worker_that_cannot_reach_the_broker_ends_its_run_before_another_may_begin(tmp_path: Path) -> None:
    shift = Shift(tmp_path)
    with shift.working():
        job, run = shift.running()
        shift.line.cut = True
        shift.now += 20
        until(lambda: shift.line.refused > 2)
        assert not run.cancelled
        shift.now += 5  # 25 of 30 seconds
        until(lambda: run.cancelled and not shift.held())
        shift.line.cut = False
        shift.world.later(seconds=31)
        assert shift.world.show(job)["state"] == "interrupted"


def test_a_broker_that_is_away_for_a_short_while_costs_nothing(tmp_path: Path) -> None:
    shift = Shift(tmp_path)
    with shift.working():
        job, run = shift.running()
        shift.line.cut = True
        run.gathered.note("while the line is cut")
        run.over.set()
        until(lambda: shift.line.refused > 1)
        shift.line.cut = False
        until(lambda: shift.world.show(job)["state"] == "succeeded")
    events = shift.world.broker.jobs.events(OPERATOR, job, 0)["events"]
    assert "while the line is cut" in [event["text"] for event in events]


@pytest.mark.parametrize("survives", [False, True])
def test_a_run_that_does_not_count_any_more_is_ended_unless_it_goes_on_elsewhere(
    tmp_path: Path, survives: bool
) -> None:
    shift = Shift(tmp_path, survives=survives)
    with shift.working():
        job, run = shift.running()
        shift.world.later(seconds=31)
        assert shift.world.show(job)["state"] == "interrupted"
        run.gathered.note("still here")
        until(lambda: not shift.held())
        assert (run.cancelled, run.left) == (not survives, survives)
    assert shift.line.told == []


def test_a_stopped_worker_leaves_a_run_that_goes_on_and_the_next_one_takes_it_up(tmp_path: Path) -> None:
    shift = Shift(tmp_path, survives=True)
    with shift.working():
        job, run = shift.running()
    assert (run.left, run.cancelled, shift.world.show(job)["state"]) == (True, False, "running")
    with shift.working():
        run.over.set()
        until(lambda: shift.world.show(job)["state"] == "succeeded")
    assert shift.line.told == ["succeeded"]


def test_a_stopped_worker_ends_a_run_that_would_be_alone(tmp_path: Path) -> None:
    shift = Shift(tmp_path)
    with shift.working():
        job, run = shift.running()
    assert run.cancelled
    assert shift.world.show(job)["error"]["code"] == "worker_stopped"


def test_what_an_earlier_worker_left_is_said_to_be_cut_off(tmp_path: Path) -> None:
    shift = Shift(tmp_path)
    job = shift.world.ask("stop")["id"]
    work = shift.world.claim()
    assert work is not None
    folder = tmp_path / "worker/held"
    folder.mkdir(parents=True)
    (folder / f"{job}.json").write_bytes(msgspec.json.encode(Held(work, "a" * 43, "run-1")))
    (folder / "broken.json").write_text("{")
    with shift.working():
        until(lambda: shift.world.show(job)["state"] == "interrupted")
        assert shift.world.show(job)["error"]["code"] == "worker_restarted"
    assert [file.name for file in shift.held()] == ["broken.json"]


@pytest.mark.control("LIF-02")
def test_a_kill_is_run_while_every_slot_is_taken(tmp_path: Path) -> None:
    shift = Shift(tmp_path)
    with shift.working():
        shift.running()
        kill = shift.world.ask("kill", "ws-b", reason="scans others")["id"]
        until(lambda: kill in shift.script.runs)
        shift.script.runs[kill].over.set()
        until(lambda: shift.world.show(kill)["state"] == "succeeded")
