"""AWX as an executor, against its contract: launched once, followed, cancelled, found again; bad cases with allowed twins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from awx_server import CONTRACT, TOKEN, Awx

from saw.errors import ConfigError, SawError, UnavailableError
from saw.jobs.awx import AWAY_S, AwxExecutor, AwxRun
from saw.jobs.awx_api import AwxApi
from saw.jobs.config import AwxSettings
from saw.jobs.executor import Ended
from saw.jobs.messages import Work

pytestmark = [pytest.mark.control("LIF-01")]
WORK = Work(
    id="job-4711",
    kind="stop",
    workspace="ws-a",
    attempt=1,
    asked_at="2026-11-29T08:00:00.000Z",
    lease_s=30,
    parameters={"reason": "week-end"},
)
MINE = {"saw_job": "job-4711", "saw_job_attempt": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Awx]:
    found = Awx(tmp_path_factory.mktemp("awx"))
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def awx(server: Awx) -> Iterator[Awx]:
    server.reset()
    yield server
    assert server.outside == []


@pytest.fixture
def settings(awx: Awx, tmp_path: Path) -> AwxSettings:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return AwxSettings(
        url=awx.url, token_file=str(tmp_path / "token"), ca_file=str(awx.ca_file), timeout_s=20, poll_s=0.02
    )


def executor(settings: AwxSettings, **changes: Any) -> AwxExecutor:
    return AwxExecutor(msgspec.structs.replace(settings, **changes), pause=lambda _seconds: None)


def ended(run: AwxRun) -> Ended:
    found = run.wait(60)
    assert found is not None
    return found


def test_a_template_is_launched_with_our_job_and_followed_to_its_end(awx: Awx, settings: AwxSettings) -> None:
    run = executor(settings).start(WORK)
    assert ended(run) == Ended("succeeded")
    assert run.external_id == "40"
    told = msgspec.json.decode(awx.jobs[40]["extra_vars"])
    assert told == {"workspace_id": "ws-a", "workspace_reason": "week-end", **MINE}
    progress, events = run.progress()
    assert (progress.play, progress.task, progress.tasks) == ("Stop a workspace", "Power the VM off", 2)
    assert (progress.hosts["edge"].ok, progress.hosts["edge"].changed) == (2, 1)
    notes = [event.text for event in events if event.kind == "note"]
    assert notes == [
        "AWX has taken it as job 40",
        *(f"AWX job 40 is {one}" for one in ("pending", "waiting", "running", "successful")),
    ]
    assert TOKEN not in str(events)


@pytest.mark.parametrize(
    ("status", "outcome", "code"),
    [
        ("failed", "failed", "playbook_failed"),
        ("error", "failed", "awx_failed"),
        ("canceled", "cancelled", "cancelled"),
        ("something new", "failed", "awx_failed"),
    ],
)
def test_how_awx_says_that_it_ended_is_what_we_say(
    awx: Awx, settings: AwxSettings, status: str, outcome: str, code: str
) -> None:
    awx.statuses = ["new", "running", status]
    awx.events = [*CONTRACT["events"], CONTRACT["failed"]]
    found = ended(executor(settings).start(WORK))
    assert found.error is not None
    assert (found.outcome, found.error.code) == (outcome, code)
    if status == "failed":
        assert "edge: Power the VM off: no such VM" in found.error.message
        assert "hunter2" not in found.error.message


def test_a_launch_whose_answer_was_lost_is_found_and_not_sent_again(awx: Awx, settings: AwxSettings) -> None:
    awx.lose_launch = True
    run = executor(settings).start(WORK)
    assert ended(run).outcome == "succeeded"
    assert run.external_id == "40"
    assert len(awx.launches()) == len(awx.jobs) == 1


def test_a_launch_of_which_nothing_is_known_is_not_sent_again(awx: Awx, settings: AwxSettings) -> None:
    awx.before = lambda method, _path: (502, {}) if method == "POST" else None
    found = ended(executor(settings).start(WORK))
    assert found.error is not None
    assert found.error.code == "launch_uncertain"
    assert len(awx.launches()) == 1


@pytest.mark.parametrize(
    ("told", "status", "launched"),
    [
        (MINE, "running", False),
        (MINE, "successful", False),
        ({**MINE, "saw_job_attempt": 0}, "running", False),
        ({**MINE, "saw_job_attempt": 0}, "failed", True),
        ({**MINE, "saw_job": "job-other"}, "running", True),
        ({}, "running", True),
    ],
)
def test_a_job_that_awx_has_already_is_followed_and_another_is_launched(
    awx: Awx, settings: AwxSettings, told: dict[str, Any], status: str, launched: bool
) -> None:
    number = awx.job(told, status)
    run = executor(settings).start(WORK)
    assert ended(run).outcome == "succeeded"
    assert (run.external_id == str(number)) is not launched
    assert len(awx.launches()) == int(launched)


def test_a_worker_that_begins_anew_goes_on_with_the_job_and_launches_none(awx: Awx, settings: AwxSettings) -> None:
    number = awx.job(MINE, "running")
    for known in (str(number), ""):
        awx.statuses = ["running", "successful"]
        run = executor(settings).reattach(WORK, known)
        assert ended(run).outcome == "succeeded"
        assert run.external_id == str(number)
    awx.jobs.clear()
    assert ended(executor(settings).reattach(WORK, "")).outcome == "interrupted"
    assert awx.launches() == []


def test_a_run_that_is_cancelled_is_cancelled_at_awx(awx: Awx, settings: AwxSettings) -> None:
    awx.statuses = ["running"]
    run = executor(settings).start(WORK)
    run.cancel()
    found = ended(run)
    assert found.outcome == "cancelled"
    assert awx.cancelled == [int(number) for number in ([run.external_id] if run.external_id else [])]


def test_a_cancel_that_awx_has_no_job_for_any_more_is_no_failure(awx: Awx, settings: AwxSettings) -> None:
    awx.before = lambda _method, path: (405, {}) if path.endswith("/cancel/") else None
    awx.statuses = ["running", "running", "running", "successful"]
    awx.job(MINE, "running")
    run = executor(settings).start(WORK)
    run.cancel()
    assert ended(run).outcome == "succeeded"


def test_what_awx_ignores_is_not_run(awx: Awx, settings: AwxSettings) -> None:
    def ignore(method: str, path: str) -> tuple[int, Any] | None:
        if not path.endswith("/launch/"):
            return None
        return 201, {"job": awx.job({}), "ignored_fields": {"extra_vars": {}}}

    awx.before = ignore
    found = ended(executor(settings).start(WORK))
    assert found.error is not None
    assert found.error.code == "template_fixed"
    assert awx.cancelled == [40]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda awx: awx.templates.clear(), "template_missing"),
        (lambda awx: awx.templates.append(dict(awx.templates[0], id=8)), "template_ambiguous"),
        (lambda awx: awx.templates[0].update(ask_variables_on_launch=False), "template_fixed"),
        (lambda awx: setattr(awx, "before", lambda _m, _p: (403, {})), "awx_denied"),
        (lambda awx: setattr(awx, "before", lambda _m, _p: (200, [])), "awx_answer"),
        (lambda awx: setattr(awx, "before", lambda _m, _p: (302, {})), "awx_refused"),
        (
            lambda awx: setattr(
                awx,
                "before",
                lambda _m, p: (200, {"results": [], "next": "https://evil.example/"}) if "jobs" in p else None,
            ),
            "awx_answer",
        ),
    ],
)
def test_an_awx_that_is_not_set_up_for_it_launches_nothing(
    awx: Awx, settings: AwxSettings, change: Any, code: str
) -> None:
    change(awx)
    found = ended(executor(settings).start(WORK))
    assert found.error is not None
    assert (found.outcome, found.error.code) == ("failed", code)
    assert found.error.cure
    assert awx.jobs == {}


def test_awx_is_waited_for_and_not_for_ever(awx: Awx, settings: AwxSettings) -> None:
    awx.job(MINE, "running")
    seconds = iter(range(0, 10**6, int(AWAY_S / 10)))
    away = AwxExecutor(settings, clock=lambda: float(next(seconds)), pause=lambda _seconds: None)
    answers = iter([True] * 3 + [False] * 20)
    awx.before = lambda _method, path: (503, {}) if path == "/api/v2/jobs/40/" and next(answers, True) else None
    assert ended(away.reattach(WORK, "40")).outcome == "succeeded"
    awx.before = lambda _method, path: (503, {}) if path == "/api/v2/jobs/40/" else None
    found = ended(away.reattach(WORK, "40"))
    assert found.error is not None
    assert (found.outcome, found.error.code) == ("interrupted", "awx_away")


def test_the_certificate_and_the_token_are_checked(awx: Awx, settings: AwxSettings, tmp_path: Path) -> None:
    with AwxApi(settings) as api:
        assert api.template("saw-workspace-stop").id == 7
    with (
        AwxApi(msgspec.structs.replace(settings, ca_file=None), lambda _seconds: None) as api,
        pytest.raises(UnavailableError),
    ):
        api.template("saw-workspace-stop")
    with pytest.raises(ConfigError, match="ca_file"):
        AwxApi(msgspec.structs.replace(settings, ca_file=str(tmp_path / "none")))
    for content, error in (("wrong", "refused the token"), ("", "holds no token"), ("two\nlines", "holds no token")):
        (tmp_path / "token").write_text(content)
        with AwxApi(settings) as api, pytest.raises(SawError, match=error):
            api.template("saw-workspace-stop")


def test_parameters_are_checked_again_before_awx_hears_of_them(awx: Awx, settings: AwxSettings) -> None:
    forged = msgspec.structs.replace(WORK, parameters={"reason": "{{ lookup('env', 'HOME') }}"})
    with pytest.raises(SawError, match="not valid"):
        executor(settings).start(forged)
    assert awx.calls == []
