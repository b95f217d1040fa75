"""Lifecycle jobs on the pages: who asks, cancels and resumes, what is confirmed first, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from portal_world import OPERATOR, ORIGIN, ROLES, Outline, World

from saw.broker.clock import iso
from saw.broker.context import Caller
from saw.broker.job_settings import JobSettings
from saw.broker.jobs import makes_sense
from saw.broker.lifecycle import State
from saw.broker.operator_roles import ALLOWED
from saw.broker.schema import sso_sessions, workspaces
from saw.broker.sso.job_pages import EVENTS, OFFERED, PAGE
from saw.jobs.messages import LIVE, AskClaim, AskJob, Beat, Cancel, End

pytestmark = pytest.mark.control("LIF-01")

WORKER = Caller("worker:saw-worker", "operator-socket", "request-5")
CLAIM = "a" * 43
SCRIPT = "</td><script>alert(1)</script>"
ASK = ALLOWED["POST", "/v1/jobs"]
LOOK = ALLOWED["GET", "/v1/jobs"]
CANCEL = ALLOWED["POST", "/v1/jobs/{id}/cancel"]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path, operate=True, jobs=JobSettings())
    yield found
    found.close()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    found = World(tmp_path_factory.mktemp("jobs"), operate=True, jobs=JobSettings())
    yield found
    found.close()


@pytest.fixture
def shared(lasting: World) -> World:
    """A world in which jobs have run, and none does now."""
    for job in every(lasting):
        if job["state"] in LIVE:
            lasting.broker.jobs.cancel(OPERATOR, job["id"], Cancel("the next test"))
            if job["state"] == "running":
                end(lasting, job["id"], "cancelled")
    return lasting


def form_of(page: str) -> dict[str, str]:
    """The hidden fields of the last form of a page, which is the one in its middle."""
    form = page[page.rindex("<form") :]
    return dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', form))


def send(world: World, who: str, path: str, fields: dict[str, str], **headers: str) -> httpx.Response:
    return world[who].ask("POST", path, data=fields, headers={"origin": ORIGIN, **headers})


def ask(world: World, kind: str, workspace: str = "ws-a", who: str = "dan", **fields: str) -> httpx.Response:
    """Read the page that asks whether it is meant, and say yes."""
    path = f"/workspaces/{workspace}/jobs/{kind}"
    if kind == "rebuild":
        fields = {"confirm": workspace, **fields}
    world.now += timedelta(milliseconds=1)
    return send(world, who, path, {**form_of(world[who].get(path).text), **fields})


def asked(world: World, kind: str, workspace: str = "ws-a", **fields: str) -> str:
    answer = ask(world, kind, workspace, **fields)
    assert answer.status_code == 303, answer.text
    return answer.headers["location"].removeprefix("/jobs/")


def every(world: World) -> list[dict[str, Any]]:
    listed = world.broker.jobs.listed(OPERATOR, state="", workspace="", after="", limit=500)
    return list(listed["jobs"])


def claim(world: World) -> str:
    body = AskClaim(claim=CLAIM, executor="ansible")
    found = world.broker.job_work.claim(WORKER, body).claimed
    assert found is not None
    return found.id


def beat(world: World, job: str, **said: Any) -> None:
    world.broker.job_work.beat(WORKER, job, msgspec.convert({"claim": CLAIM, **said}, Beat))


def end(world: World, job: str, outcome: str = "failed", message: str = "edge: no such disk") -> None:
    error = None if outcome == "succeeded" else {"code": "playbook_failed", "message": message, "cure": "make room"}
    world.broker.job_work.end(WORKER, job, msgspec.convert({"claim": CLAIM, "outcome": outcome, "error": error}, End))


@pytest.mark.parametrize("kind", OFFERED)
def test_a_job_is_confirmed_by_name_asked_for_and_followed_to_its_end(shared: World, kind: str) -> None:
    page = shared["dan"].get("/workspaces/ws-a").text
    assert f'href="/workspaces/ws-a/jobs/{kind}"' in page
    confirm = shared["dan"].get(f"/workspaces/ws-a/jobs/{kind}").text
    lost = {
        "start": "Nothing is lost",
        "stop": "whatever runs in ws-a",
        "rebuild": "everything on the root disk of ws-a",
    }
    assert lost[kind] in confirm
    assert f"{kind.capitalize()} ws-a</button>" in confirm
    before = every(shared)  # to look at it asks for nothing
    job = asked(shared, kind, reason="week-end")
    newest, *others = every(shared)
    assert [newest[name] for name in ("id", "kind", "workspace", "asked_by")] == [
        job, kind, "ws-a", "user:dan@example.com",
    ]  # fmt: skip
    assert others == before
    assert "queued" in shared["dan"].get(f"/jobs/{job}").text
    assert claim(shared) == job
    beat(
        shared, job, events=[{"kind": "host", "text": "Power the VM", "host": "edge", "result": "changed"}],
        progress={"play": "A workspace", "task": "Power the VM", "tasks": 7, "hosts": {"edge": {"ok": 6}}, "lines": ["PLAY A"]},
    )  # fmt: skip
    text = shared["dan"].get(f"/jobs/{job}").text
    for wanted in ("running", "A workspace", "Power the VM", "<dd>7</dd>", "edge", "PLAY A", "changed", "week-end"):
        assert wanted in text
    assert f'href="/jobs/{job}">look at it' in shared["dan"].get("/workspaces/ws-a").text
    end(shared, job, "succeeded")
    text = shared["dan"].get(f"/jobs/{job}").text
    assert "succeeded" in text
    assert "/cancel" not in text
    assert "/resume" not in text
    assert "<script" not in text
    assert f'href="/jobs/{job}"' in shared["dan"].get("/workspaces/ws-a").text


@pytest.mark.control("ID-01")
@pytest.mark.parametrize("who", [*ROLES, "nobody"])
def test_looking_and_asking_take_the_roles_of_the_command_line(shared: World, who: str) -> None:
    own = set(ROLES.get(who, ()))
    job = asked(shared, "stop", "ws-b")
    visitor = shared[who]
    statuses = [visitor.get(path).status_code for path in ("/jobs", f"/jobs/{job}", f"/jobs/{job}/now")]
    assert statuses == ([303, 303, 401] if who == "nobody" else [200] * 3 if own & LOOK else [403, 404, 404])
    sees = bool(own & LOOK) or who == "ada"
    may = bool(own & ASK)
    for kind in OFFERED:
        path = f"/workspaces/ws-a/jobs/{kind}"
        if sees:
            assert (path in visitor.get("/workspaces/ws-a").text) == may
        wanted = 303 if who == "nobody" else 404 if not sees else 200 if may else 403
        assert (kind, visitor.get(path).status_code) == (kind, wanted)
    before = len(every(shared))
    fields = {"csrf": visitor.csrf(), "key": f"key-of-{who}", "reason": "x"}
    answer = send(shared, who, "/workspaces/ws-a/jobs/stop", fields)
    assert answer.status_code == (303 if may or who == "nobody" else 403 if sees else 404), answer.text
    assert len(every(shared)) == before + may
    refused = [(f"user:{who}@example.com", "Failure")] if sees and not may else []
    assert [one for one in shared.audited("job.stop") if one[0].startswith(f"user:{who}@")] == refused


@pytest.mark.parametrize("who", ROLES)
def test_a_job_is_cancelled_by_those_who_intervene_and_resumed_by_operators(shared: World, who: str) -> None:
    own = set(ROLES[who])
    job = asked(shared, "stop")
    assert claim(shared) == job
    end(shared, job)
    fields = {"csrf": shared[who].csrf(), "attempt": "1"}
    hidden = 404 if not own & LOOK else 403
    assert (f"/jobs/{job}/resume" in shared[who].get(f"/jobs/{job}").text) == bool(own & ASK)
    assert send(shared, who, f"/jobs/{job}/resume", fields).status_code == (303 if own & ASK else hidden)
    if not own & ASK:
        assert shared.broker.jobs.show(OPERATOR, job)["state"] == "failed"
        assert send(shared, "dan", f"/jobs/{job}/resume", {**fields, "csrf": shared["dan"].csrf()}).status_code == 303
    assert shared.broker.jobs.show(OPERATOR, job)["attempt"] == 2
    assert (f"/jobs/{job}/cancel" in shared[who].get(f"/jobs/{job}").text) == bool(own & CANCEL)
    fields = {"csrf": shared[who].csrf(), "reason": "not now"}
    assert send(shared, who, f"/jobs/{job}/cancel", fields).status_code == (303 if own & CANCEL else hidden)
    shown = shared.broker.jobs.show(OPERATOR, job)
    assert (shown["state"], shown["cancel_reason"]) == (("cancelled", "not now") if own & CANCEL else ("queued", None))
    events = shared.audited("job.cancel") + shared.audited("job.resume")
    audited = [one for one in events if one[0].startswith(f"user:{who}@")]
    expected = (
        [] if hidden == 404 else [(f"user:{who}@example.com", "Failure")] * ((not own & CANCEL) + (not own & ASK))
    )
    assert audited == expected


def test_a_form_is_one_job_however_often_it_is_sent(world: World) -> None:
    path = "/workspaces/ws-a/jobs/rebuild"
    fields = {**form_of(world["dan"].get(path).text), "confirm": "ws-a"}
    first = send(world, "dan", path, fields)
    assert send(world, "dan", path, fields).headers["location"] == first.headers["location"]
    job = first.headers["location"].removeprefix("/jobs/")
    assert claim(world) == job
    end(world, job, "succeeded")
    # neither when it is over, nor for another workspace or kind
    assert send(world, "dan", path, fields).headers["location"] == first.headers["location"]
    for other in ("/workspaces/ws-b/jobs/rebuild", "/workspaces/ws-a/jobs/stop"):
        answer = send(world, "dan", other, {**fields, "confirm": "ws-b"})
        assert (answer.status_code, "idempotency_mismatch" in answer.text) == (409, True)
    without = {name: value for name, value in fields.items() if name != "key"}
    assert send(world, "dan", path, without).status_code == 400
    assert len(every(world)) == 1
    # a page that is read again asks again
    assert ask(world, "rebuild").status_code == 303
    assert len(every(world)) == 2


def test_a_form_that_resumed_an_attempt_does_not_resume_the_next_one(world: World) -> None:
    job = asked(world, "start")
    assert claim(world) == job
    end(world, job)
    fields = form_of(world["dan"].get(f"/jobs/{job}").text)
    assert fields["attempt"] == "1"
    for _ in range(2):  # the second finds it queued
        assert send(world, "dan", f"/jobs/{job}/resume", fields).status_code == 303
    assert claim(world) == job
    end(world, job, message="again")
    answer = send(world, "dan", f"/jobs/{job}/resume", fields)
    assert (answer.status_code, "attempt_over" in answer.text) == (409, True)
    assert world.broker.jobs.show(OPERATOR, job)["state"] == "failed"
    fields = form_of(world["dan"].get(f"/jobs/{job}").text)
    assert send(world, "dan", f"/jobs/{job}/resume", fields).status_code == 303
    assert world.broker.jobs.show(OPERATOR, job)["attempt"] == 3


@pytest.mark.control("ID-01")
def test_a_change_needs_a_page_of_ones_own_session_and_of_this_site(world: World) -> None:
    failed = asked(world, "stop", "ws-b")
    assert claim(world) == failed
    end(world, failed)
    queued = asked(world, "stop")
    changes = {
        f"/jobs/{failed}/resume": {"attempt": "1"}, f"/jobs/{queued}/cancel": {"reason": "x"},
        "/workspaces/ws-a/jobs/start": {"key": "another-key"},
    }  # fmt: skip
    own = world["dan"].csrf()
    for path, fields in changes.items():
        for token in ("", world["eve"].csrf()):
            answer = send(world, "dan", path, {"csrf": token, **fields})
            assert (answer.status_code, "<code>csrf</code>" in answer.text) == (403, True)
        far = send(world, "dan", path, {"csrf": own, **fields}, origin="https://evil.example")
        assert (far.status_code, "<code>csrf</code>" in far.text) == (403, True)
        assert world["dan"].get(path).status_code == (200 if path.endswith("start") else 404)
    assert sorted(one["state"] for one in every(world)) == ["failed", "queued"]
    for path, fields in changes.items():
        assert send(world, "dan", path, {"csrf": own, **fields}).status_code == 303


def test_every_change_needs_the_providers_fresh_word(world: World) -> None:
    job = asked(world, "stop")
    with world.broker.services.store.write() as tx:
        tx.connection.execute(sso_sessions.update().values(checked_at=iso(world.now - timedelta(minutes=10))))
    # without a way to ask the provider its word is too old to change something, and good enough to read
    assert world["dan"].get(f"/jobs/{job}").status_code == 200
    fields = {"csrf": world["dan"].csrf(), "reason": "x", "attempt": "1"}
    refused = [
        ask(world, "stop", "ws-b"),
        *(send(world, "dan", f"/jobs/{job}/{what}", fields) for what in ("cancel", "resume")),
    ]
    assert [(one.status_code, one.headers["location"]) for one in refused] == [(303, "/sign-in?to=/")] * 3
    assert [one["state"] for one in every(world)] == ["queued"]
    with world.broker.services.store.write() as tx:
        tx.connection.execute(sso_sessions.update().values(checked_at=iso(world.now)))
    assert ask(world, "stop", "ws-b").headers["location"].startswith("/jobs/")


def test_a_rebuild_wants_the_name_and_texts_have_no_braces(world: World) -> None:
    for fields in ({"confirm": "ws-b"}, {"confirm": ""}, {"reason": "{{ 7 }}"}, {"reason": "x" * 257}):
        assert ask(world, "rebuild", **fields).status_code == 400
    assert ask(world, "stop", reason="{% x %}").status_code == 400
    for kind in ("kill", "create", "destroy", "x"):
        assert world["dan"].get(f"/workspaces/ws-a/jobs/{kind}").status_code == 404
        answer = send(world, "dan", f"/workspaces/ws-a/jobs/{kind}", {"csrf": world["dan"].csrf(), "key": "some-key"})
        assert (answer.status_code, "no_such_page" in answer.text) == (404, True)
    assert every(world) == []
    assert ask(world, "rebuild", reason="new image").status_code == 303


def test_where_jobs_are_off_no_button_is_there_and_the_page_says_so(tmp_path: Path) -> None:
    world = World(tmp_path / "off", operate=True)
    try:
        page = world["dan"].get("/workspaces/ws-a").text
        assert "broker_jobs" in page
        assert "/jobs/" not in page
        assert "broker_jobs" in world["fay"].get("/jobs").text
        fields = {"csrf": world["dan"].csrf(), "key": "a-first-key"}
        answers = [
            world["dan"].get("/workspaces/ws-a/jobs/stop"),
            send(world, "dan", "/workspaces/ws-a/jobs/stop", fields),
        ]
        assert [(one.status_code, "jobs_off" in one.text) for one in answers] == [(404, True)] * 2
    finally:
        world.close()


def test_where_people_do_not_operate_jobs_are_looked_at_and_not_changed(tmp_path: Path) -> None:
    world = World(tmp_path / "look", jobs=JobSettings())
    try:
        body = {"kind": "stop", "workspace": "ws-a", "idempotency_key": "from-the-socket"}
        job = str(world.broker.jobs.ask(OPERATOR, msgspec.convert(body, AskJob))["id"])
        page = world["dan"].get("/workspaces/ws-b").text
        assert "<code>operate</code>" in page
        assert "/jobs/stop" not in page
        page = world["dan"].get(f"/jobs/{job}").text
        assert "<code>operate</code>" in page
        assert "/cancel" not in page
        csrf = world["dan"].csrf()
        answers = [
            world["dan"].get("/workspaces/ws-b/jobs/stop"),
            send(world, "dan", "/workspaces/ws-b/jobs/stop", {"csrf": csrf, "key": "from-a-page"}),
            send(world, "dan", f"/jobs/{job}/cancel", {"csrf": csrf, "reason": "x"}),
            send(world, "dan", f"/jobs/{job}/resume", {"csrf": csrf, "attempt": "1"}),
        ]
        assert [(one.status_code, "operate_off" in one.text) for one in answers] == [(403, True)] * 4
        assert [one["state"] for one in every(world)] == ["queued"]
    finally:
        world.close()


def test_buttons_are_there_where_the_job_would_be_taken(world: World) -> None:
    for state in State:
        with world.broker.services.store.write() as tx:
            tx.connection.execute(workspaces.update().where(workspaces.c.id == "ws-a").values(state=state))
        page = world["dan"].get("/workspaces/ws-a").text
        shown = [kind for kind in OFFERED if f"/workspaces/ws-a/jobs/{kind}" in page]
        assert (state, shown) == (state, [kind for kind in OFFERED if makes_sense(kind, state)])
        for kind in OFFERED:
            assert ("<button type" in world["dan"].get(f"/workspaces/ws-a/jobs/{kind}").text.partition("<main")[2]) == (
                kind in shown
            )
    answer = send(world, "dan", "/workspaces/ws-a/jobs/stop", {"csrf": world["dan"].csrf(), "key": "some-key"})
    assert (answer.status_code, "state_refused" in answer.text) == (409, True)


def test_a_workspace_with_a_live_job_has_no_button_and_its_job_is_named(world: World) -> None:
    job = asked(world, "stop")
    page = world["dan"].get("/workspaces/ws-a").text
    assert f"/jobs/{job}" in page
    assert "/workspaces/ws-a/jobs/" not in page
    sponsor = world["ada"].get("/workspaces/ws-a").text
    assert "<strong>stop</strong>" in sponsor
    assert "/jobs" not in sponsor
    confirm = world["dan"].get("/workspaces/ws-a/jobs/rebuild").text
    assert (f"/jobs/{job}" in confirm, 'name="key"' in confirm) == (True, False)
    answer = send(world, "dan", "/workspaces/ws-a/jobs/start", {"csrf": world["dan"].csrf(), "key": "another-key"})
    assert (answer.status_code, "workspace_busy" in answer.text) == (409, True)
    assert ask(world, "start", "ws-b").status_code == 303


def test_the_list_is_read_page_by_page_and_chosen_from(world: World) -> None:
    assert "No job." in world["fay"].get("/jobs").text
    for number in range(PAGE + 1):
        body = AskJob(kind="stop", workspace="ws-a" if number % 2 else "ws-b", idempotency_key=f"key-{number:04d}")
        world.broker.jobs.cancel(OPERATOR, world.broker.jobs.ask(OPERATOR, body)["id"], Cancel("x"))
    last = asked(world, "start")
    listed = lambda path: re.findall(r'href="/jobs/(job-[^"]+)"', world["fay"].get(path).text)  # noqa: E731
    found, path = [], "/jobs"
    while path:
        text = world["fay"].get(path).text
        found += re.findall(r'href="/jobs/(job-[^"]+)"', text)
        following = re.search(r'href="([^"]+)" rel="next"', text)
        path = following[1].replace("&amp;", "&") if following else ""
    assert len(found) == len(set(found)) == PAGE + 2
    assert found[0] == last
    assert listed("/jobs?state=queued") == [last]
    assert len(listed("/jobs?workspace=ws-b")) == (PAGE + 2) // 2
    assert "Nothing is found" in world["fay"].get("/jobs?workspace=ws-c").text
    for path in ("/jobs?state=gone", "/jobs?limit=3", f"/jobs/{last}?before=0", f"/jobs/{last}?after=1"):
        assert world["fay"].get(path).status_code == 400
    assert [world["fay"].get(f"/jobs{path}").status_code for path in ("?after=job-x", "/job-x", "/job-x/now")] == [
        404
    ] * 3


def test_events_go_back_and_what_others_wrote_is_text(world: World) -> None:
    job = asked(world, "stop", reason=SCRIPT)
    assert claim(world) == job
    for part in range(2):
        beat(world, job, events=[{"kind": "task", "text": f"task {part}-{n}"} for n in range(150)])
    beat(
        world, job, events=[{"kind": "host", "text": SCRIPT, "host": SCRIPT, "result": "failed"}],
        progress={"play": SCRIPT, "task": SCRIPT, "hosts": {SCRIPT: {}}, "lines": [SCRIPT]},
    )  # fmt: skip
    found, path = [], f"/jobs/{job}"
    while path:
        text = world["dan"].get(path).text
        assert len(re.findall(r"<td>task ", text)) <= EVENTS
        found += re.findall(r"<td>(task \d-\d+)</td>", text)
        earlier = re.search(r'href="(/jobs/[^"]+before=\d+)#events"', text)
        path = earlier[1] if earlier else ""
    assert found == [f"task {part}-{n}" for part in (1, 0) for n in reversed(range(150))]
    end(world, job, message=SCRIPT)
    for path in (f"/jobs/{job}", f"/jobs/{job}/now", "/jobs", "/workspaces/ws-a"):
        text = world["dan"].get(path).text
        assert ("<script>" in text, "&lt;script&gt;" in text) == (False, True)


def test_pages_have_captions_labels_and_scopes_and_one_script_of_ours_while_a_job_lives(world: World) -> None:
    done, live = asked(world, "stop", "ws-b"), asked(world, "rebuild")
    assert claim(world) == done
    progress = {"play": "a", "task": "b", "hosts": {"edge": {"ok": 1}}, "lines": ["x"]}
    beat(world, done, progress=progress)
    end(world, done)
    for path in (
        "/workspaces/ws-a", "/jobs", "/jobs?state=queued", f"/jobs/{done}", f"/jobs/{live}", f"/jobs/{live}/now",
        *(f"/workspaces/ws-b/jobs/{kind}" for kind in OFFERED),
    ):  # fmt: skip
        text = world["dan"].get(path).text
        assert (path, Outline(text).problems) == (path, [])
        assert (path, text.count("<script")) == (path, int(path == f"/jobs/{live}"))
    script = world["dan"].get("/static/job.js")
    assert (script.status_code, script.headers["content-type"].partition(";")[0]) == (200, "text/javascript")


@pytest.mark.control("ID-01")
def test_a_page_that_asks_by_itself_keeps_no_session_alive(world: World) -> None:
    job = asked(world, "stop")
    assert world.broker.sso is not None
    idle = timedelta(seconds=world.broker.sso.settings.session.idle_s)
    for path, status in ((f"/jobs/{job}/now", 303), (f"/jobs/{job}", 200)):
        with world.broker.services.store.write() as tx:
            stamp = iso(world.now)
            tx.connection.execute(sso_sessions.update().values(seen_at=stamp, checked_at=stamp))
        for _ in range(2):
            world.now += idle * 0.6
            with world.broker.services.store.write() as tx:
                tx.connection.execute(sso_sessions.update().values(checked_at=iso(world.now)))
            answer = world["dan"].get(path)
        assert (path, world["dan"].get(f"/jobs/{job}").status_code, answer.status_code) == (
            path, status, 401 if status == 303 else 200,
        )  # fmt: skip
