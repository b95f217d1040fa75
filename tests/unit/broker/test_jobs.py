"""Lifecycle jobs at the broker: who asks and who works, one live job, one claim, a lease; bad cases with allowed twins."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_world import ASKER, CREATE, OTHER, STRANGER, WORKER, JobWorld, token_of
from review_world import OPERATOR

from saw.broker.config import BrokerConfig, load_config
from saw.broker.context import Caller
from saw.broker.errors import BrokerError
from saw.broker.images import Move
from saw.broker.job_settings import JobSettings
from saw.broker.registry import Step
from saw.broker.sponsors import SwitchSponsor
from saw.errors import ConfigError
from saw.jobs.messages import KINDS, JobMalformed, Work, parameters_of, variables_of

pytestmark = [pytest.mark.control("LIF-01")]


@pytest.fixture
def world(tmp_path: Path) -> JobWorld:
    return JobWorld(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> JobWorld:
    """A world for tests that leave no live job behind."""
    return JobWorld(tmp_path_factory.mktemp("jobs"))


def refusal(code: str, call: Callable[..., Any], *given: Any, **named: Any) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        call(*given, **named)
    assert caught.value.code == code, caught.value
    assert caught.value.cure
    return caught.value


def test_a_job_goes_from_the_queue_to_its_end_and_each_step_is_in_the_trail(world: JobWorld) -> None:
    asked = world.ask("stop", reason="week-end")
    assert (asked["state"], asked["changed"], asked["attempt"]) == ("queued", True, 1)
    work = world.claim()
    assert work is not None
    assert (work.id, work.kind, work.workspace, work.parameters) == (
        asked["id"],
        "stop",
        "ws-a",
        {"reason": "week-end"},
    )
    progress = {"play": "Stop a workspace", "task": "Power the VM off", "tasks": 2, "hosts": {"edge": {"ok": 1}}}
    events = [{"kind": "task", "text": "Power the VM off"}]
    answer = world.beat(work.id, progress=progress, events=events, external_id="run-1")
    assert (answer.cancel, answer.lease_s) == (False, 30)
    shown = world.show(work.id)
    assert (shown["state"], shown["progress"]["tasks"], shown["external_id"]) == ("running", 2, "run-1")
    assert world.end(work.id)["state"] == "succeeded"
    assert world.end(work.id)["state"] == "succeeded"  # told again after a lost answer
    told = world.broker.jobs.events(OPERATOR, work.id, 0)
    assert [(item["kind"], item["text"]) for item in told["events"]] == [
        ("state", "queued"),
        ("state", "running"),
        ("task", "Power the VM off"),
        ("state", "succeeded"),
    ]
    assert world.broker.jobs.events(OPERATOR, work.id, told["next"])["events"] == []
    assert world.audited(work.id) == [
        ("operator:root", "queued"),
        ("worker:saw-worker", "running"),
        ("worker:saw-worker", "run-1"),
        ("worker:saw-worker", "succeeded"),
    ]


def test_a_workspace_has_one_live_job_and_another_workspace_has_its_own(world: JobWorld) -> None:
    first = world.ask("stop")
    error = refusal("workspace_busy", world.ask, "rebuild")
    assert (error.status, error.details["job"]) == (409, first["id"])
    assert world.ask("stop", "ws-b")["state"] == "queued"
    world.claim()
    refusal("workspace_busy", world.ask, "stop")
    world.end(first["id"])
    assert world.ask("stop")["state"] == "queued"


def test_the_same_key_is_the_same_job_and_never_another(world: JobWorld) -> None:
    first = world.ask("stop", key="a-key-of-mine", reason="one")
    again = world.ask("stop", key="a-key-of-mine", reason="one")
    assert (again["id"], again["changed"]) == (first["id"], False)
    refusal("idempotency_mismatch", world.ask, "stop", key="a-key-of-mine", reason="two")
    world.claim()
    world.end(first["id"])
    assert world.ask("stop", key="a-key-of-mine", reason="one")["state"] == "succeeded"
    assert world.ask("stop", key="a-key-of-mine", caller=ASKER)["id"] != first["id"]  # another's keys are another's


def test_of_many_claims_at_once_exactly_one_gets_the_job(world: JobWorld) -> None:
    job = world.ask("stop")["id"]
    barrier, found = threading.Barrier(8), []

    def run(number: int) -> None:
        barrier.wait()
        found.append(world.claim(token_of(str(number)), WORKER if number % 2 else OTHER))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [work.id for work in found if work is not None] == [job]
    assert sum(what == "running" for _, what in world.audited(job)) == 1


def test_the_same_claim_gets_its_job_again_and_none_other(world: JobWorld) -> None:
    job = world.ask("stop")["id"]
    world.ask("stop", "ws-b")
    for _ in range(2):
        work = world.claim(token_of("x"))
        assert work is not None
        assert work.id == job
    other = world.claim(token_of("y"))
    assert other is not None
    assert other.id != job
    assert world.claim(token_of("z")) is None


def test_a_worker_that_is_silent_loses_its_job_and_what_it_tells_then_does_not_count(world: JobWorld) -> None:
    job = world.ask("stop")["id"]
    world.claim()
    world.later(seconds=29)
    world.beat(job)
    world.later(seconds=29)
    assert world.show(job)["state"] == "running"
    world.later(seconds=2)
    shown = world.show(job)
    assert (shown["state"], shown["error"]["code"], shown["resumable"]) == ("interrupted", "worker_lost", True)
    assert world.audited(job)[-1] == ("service:saw-broker", "interrupted")
    for call in (world.beat, world.end):
        assert refusal("lease_lost", call, job).status == 409
    assert world.claim(token_of("b")) is None  # it is not run again by itself
    assert world.broker.jobs.resume(OPERATOR, job)["attempt"] == 2
    refusal("wrong_claim", world.beat, job)  # nor does the old run come back
    work = world.claim(token_of("b"))
    assert work is not None
    assert (work.id, work.attempt) == (job, 2)


def test_a_failed_job_is_resumed_and_a_done_or_cancelled_one_is_not(world: JobWorld) -> None:
    job = world.ask("stop")["id"]
    world.claim()
    error = {"code": "playbook_failed", "message": "edge: Power the VM off: no", "cure": "look"}
    assert world.end(job, "failed", error=error)["error"] == error
    assert ("worker:saw-worker", "failed") in world.audited(job)
    again = world.broker.jobs.resume(OPERATOR, job)
    assert (again["state"], again["attempt"], again["error"], again["changed"]) == ("queued", 2, None, True)
    assert world.broker.jobs.resume(OPERATOR, job)["changed"] is False
    world.claim(token_of("a"))
    world.end(job)
    refusal("not_resumable", world.broker.jobs.resume, OPERATOR, job)
    other = world.ask("stop")["id"]
    world.cancel(other)
    refusal("not_resumable", world.broker.jobs.resume, OPERATOR, other)


def test_a_job_is_not_resumed_beside_another_live_one(world: JobWorld) -> None:
    job = world.ask("stop")["id"]
    world.claim()
    world.end(job, "failed")
    other = world.ask("rebuild")["id"]
    refusal("workspace_busy", world.broker.jobs.resume, OPERATOR, job)
    world.cancel(other)
    assert world.broker.jobs.resume(OPERATOR, job)["state"] == "queued"


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_by_its_worker(world: JobWorld) -> None:
    waiting, running = world.ask("stop", "ws-b")["id"], None
    assert world.cancel(waiting)["state"] == "cancelled"
    assert world.cancel(waiting)["changed"] is False
    running = world.ask("stop")["id"]
    world.claim()
    assert world.beat(running).cancel is False
    assert (world.cancel(running)["state"], world.cancel(running)["changed"]) == ("running", False)
    assert world.beat(running).cancel is True
    assert world.end(running, "cancelled")["state"] == "cancelled"
    refusal("job_ended", world.cancel, world_done(world))


def world_done(world: JobWorld) -> str:
    """A job that has succeeded."""
    job = str(world.ask("stop")["id"])
    world.claim()
    world.end(job)
    return job


@pytest.mark.parametrize(
    ("kind", "parameters", "named"),
    [
        ("create", {name: value for name, value in CREATE.items() if name != "image_path"}, "image_path"),
        ("create", {**CREATE, "memory": 4096}, "memory"),
        ("create", {**CREATE, "image_path": "../x"}, "image_path"),
        ("create", {**CREATE, "sponsor": "{{ lookup('pipe', 'id') }}"}, "sponsor"),
        ("stop", {"reason": "{% raw %}"}, "reason"),
        ("stop", {"reason": "two\nlines"}, "reason"),
        ("stop", {"ansible_connection": "local"}, "ansible_connection"),
        ("kill", {}, "reason"),
        ("rebuild", {"image": "debian"}, "belong together"),
    ],
)
def test_parameters_that_are_not_the_kinds_are_refused(
    shared: JobWorld, kind: str, parameters: dict[str, Any], named: str
) -> None:
    error = refusal("parameters_refused", shared.ask, kind, "ws-new" if kind == "create" else "ws-a", **parameters)
    assert named in error.message
    assert shared.claim() is None


def test_an_unknown_kind_is_no_job(shared: JobWorld) -> None:
    with pytest.raises(Exception, match="reboot"):
        shared.ask("reboot")


@pytest.mark.control("P0-04")
def test_nothing_is_touched_by_a_job_after_which_the_workspace_could_not_start(world: JobWorld) -> None:
    broker = world.broker
    world.set("ws-a", state="stopped")
    broker.images.move(OPERATOR, "i", Move(to="revoked", reason="cve"))
    for kind in ("start", "rebuild"):
        refusal("image_revoked", world.ask, kind)
    world.set("ws-a", ring="canary")
    # The twins: another image takes its place, and what ends is never refused.
    assert world.ask("rebuild", image="debian", image_path="/images/debian.raw")["state"] == "queued"
    assert world.ask("stop", "ws-b")["state"] == "queued"


@pytest.mark.control("ID-04")
def test_no_job_begins_anything_for_a_disabled_sponsor(world: JobWorld) -> None:
    broker = world.broker
    broker.sponsors.disable(OPERATOR, "Ada", SwitchSponsor(reason="left"))
    broker.registry.transition(OPERATOR, "ws-a", Step("stopped", "released"))
    for kind in ("start", "rebuild"):
        refusal("sponsor_disabled", world.ask, kind)
    refusal("sponsor_disabled", world.ask, "create", "ws-new", **{**CREATE, "sponsor": "ada"})
    assert world.ask("stop")["state"] == "queued"
    assert world.ask("create", "ws-new", **CREATE)["state"] == "queued"


@pytest.mark.control("LIF-03")
def test_a_created_or_rebuilt_workspace_gets_the_registered_digest_of_its_image(world: JobWorld) -> None:
    created = world.ask("create", "ws-new", **CREATE)
    work = world.claim()
    assert work is not None
    assert variables_of(work) == {
        "workspace_id": "ws-new",
        **{f"workspace_{name}": value for name, value in CREATE.items()},
        "workspace_image_sha256": "2" * 64,
    }
    world.end(created["id"])
    refusal("unknown_image", world.ask, "create", "ws-new", **{**CREATE, "image": "other"})
    refusal("image_candidate", world.ask, "create", "ws-new", **{**CREATE, "ring": "stable"})
    refusal("workspace_exists", world.ask, "create", "ws-a", **CREATE)
    world.set("ws-a", ring="canary")
    world.ask("rebuild", image="debian", image_path="/images/debian.raw")
    rebuilt = world.claim(token_of("b"))
    assert rebuilt is not None
    assert variables_of(rebuilt)["workspace_image_sha256"] == "2" * 64


@pytest.mark.parametrize(
    ("state", "refused"),
    [
        ("requested", {"start", "stop", "rebuild"}),
        ("active", set()),
        ("stopped", set()),
        ("quarantined", {"start", "stop", "rebuild"}),
        ("decommissioned", {"start", "stop", "rebuild", "kill"}),
    ],
)
def test_a_job_that_makes_no_sense_in_the_state_of_the_workspace_is_refused(
    shared: JobWorld, state: str, refused: set[str]
) -> None:
    for kind in sorted(set(KINDS) - {"create"}):
        shared.set("ws-a", state=state)
        given = {"reason": "test"} if kind == "kill" else {}
        if kind in refused:
            with pytest.raises(BrokerError) as caught:
                shared.ask(kind, **given)
            assert caught.value.code in {"state_refused", "decommissioned"}, kind
        else:
            shared.cancel(shared.ask(kind, **given)["id"])
    refusal("unknown_workspace", shared.ask, "start", "ws-unknown")


@pytest.mark.control("LIF-02")
def test_a_kill_holds_at_once_ends_what_runs_and_comes_before_everything_else(world: JobWorld) -> None:
    running = world.ask("stop")["id"]
    world.claim()
    waiting = world.ask("stop", "ws-b")["id"]
    kill = world.ask("kill", key="kill-4711", reason="scans others")
    assert world.broker.registry.show("ws-a")["state"] == "quarantined"
    assert world.beat(running).cancel is True
    other = world.claim(token_of("b"))
    assert other is not None
    assert other.id == waiting  # the kill waits until nothing else runs in its workspace
    refusal("workspace_busy", world.ask, "kill", reason="again")
    refusal("workspace_busy", world.ask, "destroy")
    world.end(running, "cancelled")
    work = world.claim(token_of("c"), kinds=("kill",))
    assert work is not None
    assert work.id == kill["id"]
    world.broker.registry.transition(OPERATOR, "ws-a", Step("stopped", "released"))
    assert world.ask("kill", key="kill-4711", reason="scans others")["changed"] is False
    assert world.broker.registry.show("ws-a")["state"] == "stopped"  # told again, it does not kill what was released


@pytest.mark.control("LIF-02")
def test_what_waits_for_a_workspace_that_is_killed_is_not_run(world: JobWorld) -> None:
    waiting = world.ask("rebuild")["id"]
    world.broker.registry.kill(OPERATOR, "ws-a", "scans others")
    assert world.show(waiting)["state"] == "cancelled"
    failed = world.ask("stop", "ws-b")["id"]
    world.set("ws-b", state="quarantined")  # as by another replica
    assert world.claim() is None
    assert world.show(failed)["error"]["code"] == "state_refused"


def test_who_may_ask_and_who_may_work(world: JobWorld) -> None:
    mine, other = world.ask(caller=ASKER)["id"], world.ask("stop", "ws-b")["id"]
    listed = world.broker.jobs.listed(ASKER, state="", workspace="", after="", limit=10)["jobs"]
    assert [job["id"] for job in listed] == [mine]
    assert world.broker.jobs.show(ASKER, mine)["asked_by"] == "machine:portal"
    for call in (world.broker.jobs.show, world.broker.jobs.resume):
        refusal("unknown_job", call, ASKER, other)
    refusal("unknown_job", world.cancel, other, ASKER)
    for caller in (STRANGER, OTHER, Caller("workspace:ws-a", "", ""), Caller("perimeter:edge", "", "")):
        refusal("out_of_scope", world.ask, caller=caller)
        refusal("out_of_scope", world.broker.jobs.show, caller, mine)
    work = world.broker.job_work
    for caller in (STRANGER, ASKER, OPERATOR, Caller("workspace:ws-a", "", "")):
        refusal("out_of_scope", work.require_worker, caller)
    work.require_worker(WORKER)
    work.require_worker(OTHER)
    assert world.audited("*")[-1][1] == "out_of_scope"


def test_a_forged_worker_neither_keeps_nor_ends_the_job_of_another(world: JobWorld) -> None:
    job = world.ask("stop")["id"]
    world.claim()
    refusal("wrong_claim", world.end, job, "succeeded", OTHER)
    refusal("wrong_claim", world.beat, job, token_of("b"))
    assert [what for _, what in world.audited(job)][-2:] == ["wrong_claim", "wrong_claim"]
    assert world.show(job)["state"] == "running"
    assert world.end(job)["state"] == "succeeded"


def test_without_the_part_in_the_configuration_there_are_no_jobs(tmp_path: Path) -> None:
    world = JobWorld(tmp_path, jobs=None, machines={})
    refusal("jobs_off", world.ask)
    refusal("out_of_scope", world.broker.job_work.require_worker, WORKER)
    assert world.broker.jobs.listed(OPERATOR, state="", workspace="", after="", limit=10) == {"jobs": [], "next": None}


def test_the_queue_is_bounded_and_a_kill_is_always_taken(world: JobWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saw.broker.jobs.MAX_LIVE", 1)
    job = world.ask("stop", "ws-b")["id"]
    refusal("too_many_jobs", world.ask, "stop")
    assert world.ask("kill", reason="scans others")["state"] == "queued"
    world.cancel(job)
    refusal("too_many_jobs", world.ask, "create", "ws-new", **CREATE)
    world.claim()
    world.end(world.broker.jobs.listed(OPERATOR, state="running", workspace="", after="", limit=1)["jobs"][0]["id"])
    assert world.ask("create", "ws-new", **CREATE)["state"] == "queued"


def test_jobs_are_listed_page_by_page_the_newest_first(world: JobWorld) -> None:
    made = []
    for number in range(5):
        made.append(world.ask("stop", "ws-a" if number % 2 else "ws-b")["id"])
        world.cancel(made[-1])
        world.later(seconds=1)
    seen: list[str] = []
    after: str | None = ""
    while after is not None:
        page = world.broker.jobs.listed(OPERATOR, state="cancelled", workspace="", after=after, limit=2)
        seen += [job["id"] for job in page["jobs"]]
        after = page["next"]
    assert seen == made[::-1]
    only = world.broker.jobs.listed(OPERATOR, state="", workspace="ws-b", after="", limit=10)["jobs"]
    assert {job["workspace"] for job in only} == {"ws-b"}
    refusal("malformed", world.broker.jobs.listed, OPERATOR, state="lost", workspace="", after="", limit=1)


def test_a_crash_of_the_broker_loses_no_job_and_gives_none_twice(world: JobWorld) -> None:
    job = world.ask("stop")["id"]
    world.claim()
    world.crash()
    assert world.claim(token_of("b")) is None
    assert world.beat(job).cancel is False


@settings(max_examples=60)
@given(st.text(max_size=40))
def test_no_text_that_is_taken_can_be_a_template(text: str) -> None:
    try:
        found = parameters_of("stop", {"reason": text})
    except JobMalformed:
        return
    work = Work(id="j", kind="stop", workspace="ws-a", attempt=1, asked_at="", lease_s=30, parameters={"reason": text})
    assert found.reason == variables_of(work)["workspace_reason"]
    assert not set("{}\n\r\0") & set(text)


@pytest.mark.parametrize(
    ("change", "field"), [({"lease_s": 9}, "lease_s"), ({"worker_socket": "w.sock"}, "worker_socket")]
)
def test_a_wrong_setting_is_named(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    file = tmp_path / "broker.json"
    base = BrokerConfig("saw.example", "/s", "/o", ("b.saw.internal",), jobs=JobSettings())
    file.write_bytes(msgspec.json.encode(base))
    assert load_config(file).jobs == JobSettings()
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(base, jobs=JobSettings(**change))))
    with pytest.raises(ConfigError, match=f"jobs.{field}"):
        load_config(file)
