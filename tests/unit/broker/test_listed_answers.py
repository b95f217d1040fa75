"""Lists of reviews and sessions in pages; answers about an HTTP call that waits, a session and a job are as documented."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from job_world import JobWorld
from review_world import EDGE, OPERATOR, World
from session_world import EDGE as BASTION

from saw.broker import apps
from saw.broker.bastion_sessions import SessionRequest
from saw.broker.client import OperatorClient
from saw.broker.openapi import ABOUT
from saw.broker.session_views import key_digest
from saw.cli import review, sessions
from saw.review.statement import encode_statement, sign_review
from saw.sessions.messages import Closing, Redeem

ORDER = {"reviews": "opened_at", "sessions": "requested_at"}


class Desk(JobWorld):
    """A world whose calls are made as operators make them, each answer checked against the type that the document has for it."""

    def answer(self, method: str, path: str, body: object = None, *, about: str = "") -> tuple[int, Any]:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(apps.operator_app(self.broker))
            async with httpx.AsyncClient(transport=transport, base_url="http://broker") as client:
                return await client.request(method, path, json=body)

        answer = asyncio.run(call())
        if answer.status_code == 200:
            msgspec.json.decode(answer.content, type=ABOUT[f"{method} {about or path.partition('?')[0]}"].answer)
        return answer.status_code, answer.json()

    def good(self, method: str, path: str, body: object = None, *, about: str = "") -> Any:
        status, found = self.answer(method, path, body, about=about)
        assert status == 200, found
        return found

    def one(self, what: str, identifier: str, call: str = "", body: object = None, *, method: str = "POST") -> Any:
        """Make a call about one review, session or job."""
        return self.good(
            method, f"/v1/{what}/{identifier}{call}", body, about=f"/v1/{what}/{{id}}{call.partition('?')[0]}"
        )

    def session(self, workspace: str = "ws-a") -> tuple[str, str]:
        """Ask for a session; return its id and the key."""
        public = Ed25519PrivateKey.generate().public_key()
        key = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        asked = SessionRequest(workspace, key)
        found = self.good("POST", "/v1/sessions", msgspec.to_builtins(asked))
        return str(found["session_id"]), key

    def make(self, what: str, number: int) -> str:
        if what == "sessions":
            return self.session()[0]
        return self.open(f"note {number}".encode()).id

    def pages(self, what: str, filters: str = "", limit: int = 2) -> list[list[str]]:
        found: list[list[str]] = []
        after: str | None = ""
        while after is not None:
            page = self.good("GET", f"/v1/{what}?limit={limit}&after={after}{filters}")
            found.append([one["id"] for one in page[what]])
            after = page["next"]
        return found


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(apps, "socket_caller", lambda *_: OPERATOR)
    found = Desk(tmp_path)
    yield found
    found.broker.close()


@pytest.mark.parametrize("what", ["reviews", "sessions"])
def test_pages_hold_everything_once_the_newest_first(desk: Desk, what: str) -> None:
    made = []
    for number in range(5):
        made.append(desk.make(what, number))
        desk.later(seconds=number % 2)  # several at one time
    whole = desk.good("GET", f"/v1/{what}")
    assert whole["next"] is None
    every = [one["id"] for one in whole[what]]
    assert sorted(every) == sorted(made)
    times = [one[ORDER[what]] for one in whole[what]]
    assert times == sorted(times, reverse=True)
    assert desk.pages(what) == [every[:2], every[2:4], every[4:]]
    assert desk.pages(what, limit=5) == [every], "a page that is just full is the last one"
    newest = desk.good("GET", f"/v1/{what}?limit=2")
    desk.later(seconds=1)
    late = desk.make(what, 9)
    following = desk.good("GET", f"/v1/{what}?limit=1000&after={newest['next']}")
    assert [one["id"] for one in following[what]] == every[2:], "what came meanwhile is on no later page"
    assert [one["id"] for one in desk.good("GET", f"/v1/{what}?limit=1")[what]] == [late]
    assert desk.pages(what, "&workspace_id=ws-b") == [[]]


def test_pages_of_what_lives_and_of_one_state_are_of_these_alone(desk: Desk) -> None:
    sessions, reviews = [], []
    for number in range(3):
        desk.later(seconds=1)
        sessions.insert(0, desk.make("sessions", number))
        reviews.insert(0, desk.make("reviews", number))
    desk.one("sessions", sessions[1], "/end", {"reason": "test"})
    desk.one("reviews", reviews[1], "/cancel", {"reason": "test"})
    assert desk.pages("sessions", "&live=1", limit=1) == [[sessions[0]], [sessions[2]]]
    assert [one["id"] for one in desk.good("GET", "/v1/sessions?live=1")["sessions"]] == [sessions[0], sessions[2]]
    assert desk.pages("reviews", "&state=pending", limit=1) == [[reviews[0]], [reviews[2]]]
    assert desk.pages("reviews", "&state=cancelled", limit=1) == [[reviews[1]]]


@pytest.mark.parametrize("what", ["reviews", "sessions"])
def test_what_is_no_page_is_refused(desk: Desk, what: str) -> None:
    last = desk.make(what, 1)
    wrong = ["limit=0", "limit=1001", "limit=few", "limit=-1", "after=elsewhere", "colour=red", "limit=1&limit=2"]
    wrong += ["workspace_id=ws-a&workspace_id=ws-b"]
    wrong += ["state=peding", "state=null", "owed=5"] if what == "reviews" else ["live=5", "person=ada&person=ben"]
    for bad in wrong:
        status, said = desk.answer("GET", f"/v1/{what}?{bad}")
        assert (status, said["code"]) == (400, "malformed"), said
        assert said["cure"]
    assert desk.good("GET", f"/v1/{what}?limit=1000&after={last}")[what] == []


@pytest.mark.parametrize("what", ["reviews", "sessions"])
def test_the_commands_say_how_a_list_goes_on(
    desk: Desk, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = SimpleNamespace(request=desk.good, session=nullcontext)
    monkeypatch.setattr(OperatorClient, "from_context", lambda _context: client)

    def listed(*words: str) -> str:
        assert (review.main(["list", *words]) if what == "reviews" else sessions.main([*words])) == 0
        return capsys.readouterr().out

    made: list[str] = []
    for number in range(3):
        desk.later(seconds=1)
        made.insert(0, desk.make(what, number))
    assert listed("--limit=2").endswith(f"\nmore: --after {made[1]}\n")
    assert json.loads(listed("--limit=2", "--json"))["next"] == made[1]
    rest = listed("--limit=2", "--after", made[1])
    assert (made[2] in rest, made[1] in rest, "more:" in rest) == (True, False, False)
    assert "more:" not in listed()


def test_what_is_answered_about_a_review_is_as_told(desk: Desk) -> None:
    denied, sent, asked = (desk.open(body).id for body in (b"one", b"two", b"three"))
    desk.one("reviews", asked, method="GET")
    assert "call" in desk.one("reviews", asked, "/call", method="GET")
    nonce = desk.one("reviews", asked, "/nonce", {"approver": "ben"})["nonce"]
    said = desk.statement(asked, "ben", nonce=nonce)
    body = {"statement": encode_statement(said).decode(), "signature": sign_review(said, desk.keys["ben"])}
    assert desk.one("reviews", asked, "/decide", body)["approved_by"] == ["ben"]
    desk.decide(denied, "ben", "deny")
    desk.decide(sent, "ben")
    for _ in range(2):
        claimed = World.claim(desk, EDGE)
        assert claimed is not None
        desk.tell(claimed)
    for identifier in (denied, sent, asked):
        assert desk.one("reviews", identifier, method="GET")["decisions"]
        assert desk.one("reviews", identifier, "/receipt", method="GET")["receipt"]


def test_what_is_answered_about_a_session_is_as_told(desk: Desk) -> None:
    session, key = desk.session()
    desk.broker.sessions.redeem(BASTION, Redeem(session, key_digest(key), "192.0.2.7", key, "ls", terminal=True))
    assert desk.one("sessions", session, method="GET")["from"] == "192.0.2.7"
    assert desk.one("sessions", session, "/key")["digest"] is None
    assert desk.one("sessions", session, "/recording/hold", {"reason": "a question"})["recording_held"]["by"]
    assert desk.one("sessions", session, "/recording/release", {"reason": "answered"})["changed"]
    assert desk.one("sessions", session, "/end", {"reason": "test"})["state"] == "ending"
    desk.broker.sessions.close(BASTION, session, Closing("closed", exit_code=0, digest="1" * 64, chunks=1))
    assert desk.one("sessions", session, method="GET")["exit_code"] == 0
    assert desk.one("sessions", session, "/key")["chunks"] == 1


def test_what_is_answered_about_a_job_is_as_told(desk: Desk) -> None:
    body = {"kind": "stop", "workspace": "ws-a", "idempotency_key": "as-told-1", "parameters": {"reason": "test"}}
    job = desk.good("POST", "/v1/jobs", body)["id"]
    assert not desk.good("POST", "/v1/jobs", body)["changed"]
    assert desk.claim() is not None
    progress = {"play": "stop", "tasks": 1, "hosts": {"host": {"ok": 1}}, "lines": ["done"]}
    events = [{"kind": "task", "text": "stop it"}, {"kind": "host", "text": "no", "host": "host", "result": "failed"}]
    desk.beat(job, progress=progress, events=events)
    assert [one["kind"] for one in desk.one("jobs", job, "/events?after=0", method="GET")["events"]][-2:] == [
        "task",
        "host",
    ]
    desk.end(job, "failed", error={"code": "no", "message": "it failed", "cure": "again"})
    assert desk.one("jobs", job, method="GET")["error"]["code"] == "no"
    assert desk.one("jobs", job, "/resume")["attempt"] == 2
    assert desk.one("jobs", job, "/cancel", {"reason": "test"})["state"] == "cancelled"
    assert [one["id"] for one in desk.good("GET", "/v1/jobs")["jobs"]] == [job]
