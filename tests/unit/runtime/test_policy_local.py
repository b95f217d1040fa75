"""``policy.local`` in the workspace: what is passed on to the broker, what is refused before, and what an answer turns into."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest

from saw.cli import policyd
from saw.policy.loader import load_members
from saw.policy.matcher import Matcher
from saw.policy.policy_request import MAX_BODY, Asked, AskedList, AskMore
from saw.runtime import policyd_asking
from saw.runtime.attribution import Caller
from saw.runtime.decide import DecideService
from saw.runtime.generation import Loaded
from saw.runtime.policy_local import _BURST, _EACH_S, NOTE, PolicyLocal
from saw.runtime.policyd_config import PolicydConfig, Workspace
from saw.runtime.policyd_requests import RequestBroker
from saw.runtime.request_desk import MAX_ASKING, AskRefused, Mine, More, Question, RequestDesk

DIGEST = "d" * 64
WORKSPACE = Workspace(
    workspace_id="ws-a", number=1, trust_domain="saw.example", broker_url="https://10.0.0.1:8443", broker_name="broker",
    ring2="10.0.0.1:1", ring2_name="ring2", ca_pem="", tuf_root={}, blueprint="coding", ring="stable",
)  # fmt: skip
ASKED = Asked(
    id="pr-1", state="open", host="a.example.com", port=443, scheme="https", method="GET", path="/", program="/usr/bin/curl",
    reason="r", policy_digest=DIGEST, opened_at="then", expires_at="later",
)  # fmt: skip
MORE = More(
    policy_digest=DIGEST, host="a.example.com", port=443, scheme="https", method="GET", path="/", program="", reason="r"
)
WISH = {"host": "a.example.com", "reason": "r"}
MEMBERS = {
    "policy.yaml": b"version: 1\n",
    "governance.yaml": b"schema: 1\nblueprint: {name: coding, version: 1.0.0, owner: team}\n",
}


class Part:
    """The decider, the broker and the clock."""

    def __init__(self) -> None:
        bundle = load_members(MEMBERS)
        matcher = Matcher.compile(bundle.policy, bundle.governance)
        self.loaded: Loaded | None = Loaded(DIGEST, 3, matcher, bundle.policy, bundle.governance)
        self.binary = "/usr/bin/curl"
        self.asked: list[Question] = []
        self.end: Callable[[], Asked | AskedList] = lambda: ASKED
        self.now = 0.0

    def current(self) -> Loaded | None:
        return self.loaded

    def caller(self, _source: str) -> Caller | None:
        return Caller(7, self.binary, ()) if self.binary else None

    def pass_on(self, question: Question) -> Asked | AskedList:
        self.asked.append(question)
        return self.end()


@pytest.fixture
def part() -> Part:
    return Part()


@pytest.fixture
def local(part: Part, tmp_path: Path) -> Iterator[PolicyLocal]:
    path = tmp_path / "ask" / "policy.sock"
    desk = RequestDesk(path, os.getuid(), part, lambda _line: None)
    desk.start()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o711)
    yield PolicyLocal(part, path, lambda: part.now)
    desk.close()


def call(local: PolicyLocal, method: str = "POST", path: str = "/v1/requests", body: Any = WISH) -> tuple[int, Any]:
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    status, _, answer = asyncio.run(local.answer(method, path, "10.200.0.2:4000", raw))
    return status, json.loads(answer)


def test_an_ask_is_passed_on_with_the_policy_and_the_program(local: PolicyLocal, part: Part) -> None:
    status, told = call(local, body={**WISH, "path": "/v1//x/./y", "scheme": "http"})
    assert (status, told["request"]["id"], told["note"]) == (200, "pr-1", NOTE)
    call(local, body={**WISH, "program": "/usr/bin/git", "port": 8443})
    first, second = part.asked
    assert isinstance(first, More)
    assert isinstance(second, More)
    assert (first.policy_digest, first.program, first.port, first.path) == (DIGEST, "/usr/bin/curl", 80, "/v1/x/y")
    assert (second.program, second.port, second.path) == ("/usr/bin/git", 8443, "/")
    part.end = lambda: AskedList(requests=(ASKED,))
    assert call(local, "GET", body=b"")[1]["requests"][0]["id"] == "pr-1"
    assert isinstance(part.asked[-1], Mine)


@pytest.mark.parametrize("binary", ["", "relative", "/bin/\x1b", "/bin/\u00e4", "/" + "a" * 256])
def test_a_program_that_no_rule_can_name_is_left_out(local: PolicyLocal, part: Part, binary: str) -> None:
    part.binary = binary
    assert call(local)[0] == 200
    assert [one.program for one in part.asked if isinstance(one, More)] == [""]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "malformed"),
        (b"\xff", 400, "malformed"),
        ({**WISH, "allow": True}, 400, "malformed"),
        ({**WISH, "path": "/../x"}, 400, "malformed"),
        ({**WISH, "path": "/x?a=1"}, 400, "malformed"),
        ({**WISH, "reason": "  "}, 400, "malformed"),
        (None, 413, "too_large"),
    ],
)
def test_what_is_no_ask_reaches_nobody(local: PolicyLocal, part: Part, body: Any, status: int, code: str) -> None:
    found, told = call(local, body=body)
    assert (found, told["error"], told["note"]) == (status, code, NOTE)
    assert part.asked == []
    assert call(local)[0] == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/decide"), ("PUT", "/v1/requests"), ("POST", "/"), ("GET", "")])
def test_there_are_no_other_calls(local: PolicyLocal, method: str, path: str) -> None:
    assert call(local, method, path, b"")[0] == 404
    assert call(local, "GET", "/", b"")[0] == 200


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("already_allowed", 409),
        ("never_allowed", 403),
        ("too_many_requests", 429),
        ("all_requests_held", 429),
        ("ask_unavailable", 503),
        ("of_another_time", 503),
    ],
)
def test_the_brokers_refusal_is_told(local: PolicyLocal, part: Part, code: str, status: int) -> None:
    def refuse() -> Asked:
        raise AskRefused(code, "m", "c")

    part.end = refuse
    assert call(local) == (status, {"error": code, "message": "m", "cure": "c", "note": NOTE})


def test_calls_about_requests_have_a_rate_and_reading_the_policy_has_none(local: PolicyLocal, part: Part) -> None:
    assert [call(local)[0] for _ in range(_BURST + 1)] == [200] * _BURST + [429]
    assert call(local, "GET", "/", b"")[0] == 200
    part.now += _EACH_S
    assert [call(local)[0] for _ in range(2)] == [200, 429]


def test_only_so_many_wait_at_a_time(local: PolicyLocal, part: Part) -> None:
    gate = threading.Event()

    def hold() -> Asked:
        assert gate.wait(60)
        return ASKED

    part.end = hold

    async def crowd() -> list[int]:
        async def one() -> int:
            found = (await local.answer("POST", "/v1/requests", "", json.dumps(WISH).encode()))[0]
            if found == 429:
                gate.set()
            return found

        return list(await asyncio.gather(*(one() for _ in range(MAX_ASKING + 1))))

    assert sorted(asyncio.run(crowd())) == [200] * MAX_ASKING + [429]


def test_without_a_policy_or_a_policy_agent_nothing_is_asked(local: PolicyLocal, part: Part, tmp_path: Path) -> None:
    alone = PolicyLocal(part, tmp_path / "nothing.sock", lambda: 0.0)
    assert call(alone)[1]["error"] == "ask_unavailable"
    assert call(alone, "GET", "/", b"")[1]["policy_digest"] == DIGEST
    part.loaded = None
    for method, path in (("GET", "/"), ("GET", "/text"), ("POST", "/v1/requests")):
        assert call(local, method, path) == (
            503,
            {"error": "not_released", "message": "no verified policy is loaded in this workspace yet", "cure": "wait for it",
             "note": NOTE},
        )  # fmt: skip
    assert part.asked == []


def test_the_desk_takes_two_questions_and_answers_one_user(tmp_path: Path, part: Part) -> None:
    path = tmp_path / "policy.sock"
    desk = RequestDesk(path, os.getuid(), part, lambda _line: None)
    desk.start()

    def exchange(line: bytes) -> bytes:
        async def run() -> bytes:
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(line + b"\n")
            try:
                return await reader.readline()
            except ConnectionError:  # what was sent was not read, or the other side had gone before it was
                return b""
            finally:
                writer.close()

        return asyncio.run(run())

    try:
        assert json.loads(exchange(msgspec.json.encode(MORE)))["asked"]["id"] == "pr-1"
        for line in (b"{}", b'{"type": "ask"}', msgspec.json.encode(MORE)[:-1] + b', "grant": true}', b"x" * 9000):
            assert json.loads(exchange(line))["refused"]["code"] == "malformed"
        assert part.asked == [MORE]
        desk._server.uid = 2000
        assert exchange(msgspec.json.encode(MORE)) == b""
        assert part.asked == [MORE]
    finally:
        desk.close()


def test_a_body_is_read_to_its_bound_and_a_query_is_no_path(local: PolicyLocal, part: Part) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    def ask(path: str, body: bytes, query: bytes = b"", method: str = "POST") -> int:
        parts = iter(
            [
                {"type": "http.request", "body": body[:100], "more_body": True},
                {"type": "http.request", "body": body[100:]},
            ]
        )

        async def receive() -> Any:
            return next(parts)

        scope = {"type": "http", "path": path, "method": method, "headers": [], "query_string": query}
        service = DecideService(SimpleNamespace(), lambda _line: None, local)  # type: ignore[arg-type]
        sent.clear()
        asyncio.run(service(scope, receive, send))
        return int(sent[0]["status"])

    wish = json.dumps({**WISH, "reason": "x" * 200}).encode()
    assert ask("/policy.local/v1/requests", wish) == 200
    assert ask("/policy.local/v1/requests", wish + b" " * MAX_BODY) == 413
    assert ask("/policy.local/v1/requests", wish, b"a=1") == 404
    assert ask("/policy.local/", b"", method="GET") == 200
    assert len(part.asked) == 1


# --- the policy agent's call of the broker -----------------------------------------------------------------------------------


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> tuple[list[httpx.Request], dict[str, Any]]:
    """What the broker was asked, and what it answers."""
    seen: list[httpx.Request] = []
    answers: dict[str, Any] = {"status": 200, "body": msgspec.json.encode(ASKED)}

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if "raises" in answers:
            raise answers["raises"]
        return httpx.Response(answers["status"], content=answers["body"])

    def client(workspace: Workspace, *_: object) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(answer), base_url=workspace.broker_url)

    monkeypatch.setattr(policyd_asking, "open_client", client)
    return seen, answers


def test_the_broker_is_asked_in_the_workspaces_own_name(answered: tuple[list[httpx.Request], dict[str, Any]]) -> None:
    broker = RequestBroker(WORKSPACE, Path("/nowhere"))
    assert broker.pass_on(MORE) == ASKED
    (request,) = answered[0]
    assert (request.method, request.url.path) == ("POST", "/v1/workspace/policy-requests")
    sent = msgspec.json.decode(request.content, type=AskMore)
    assert (sent.workspace_id, sent.policy_digest, sent.host) == ("ws-a", DIGEST, "a.example.com")
    answered[1]["body"] = msgspec.json.encode(AskedList(requests=(ASKED,)))
    assert broker.pass_on(Mine()) == AskedList(requests=(ASKED,))
    assert answered[0][-1].url.query == b"workspace_id=ws-a"


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (409, {"code": "already_allowed", "message": "m", "cure": "c"}, "already_allowed"),
        (403, {"code": "not_this_workspace", "message": "no certificate"}, "ask_unavailable"),
        (429, {"code": "rate_limited", "message": "slower"}, "rate_limited"),
        (500, {"code": "internal", "message": "m"}, "ask_unavailable"),
        (409, "no JSON object", "ask_unavailable"),
        (200, {"id": "no state"}, "ask_unavailable"),
    ],
)
def test_a_refusal_has_the_brokers_reason_and_whatever_else_is_no_answer(
    answered: tuple[list[httpx.Request], dict[str, Any]], status: int, body: object, code: str
) -> None:
    answered[1].update(status=status, body=msgspec.json.encode(body))
    with pytest.raises(AskRefused) as caught:
        RequestBroker(WORKSPACE, Path("/nowhere")).pass_on(MORE)
    assert caught.value.code == code


@pytest.mark.parametrize("error", [httpx.ConnectError("gone"), httpx.ReadTimeout("late"), FileNotFoundError("ca.pem")])
def test_a_broker_that_cannot_be_reached_is_no_answer(
    answered: tuple[list[httpx.Request], dict[str, Any]], error: Exception
) -> None:
    answered[1]["raises"] = error
    with pytest.raises(AskRefused, match="no usable answer"):
        RequestBroker(WORKSPACE, Path("/nowhere")).pass_on(MORE)


def test_the_desk_is_there_for_the_decision_services_user_and_never_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(policyd, "load_workspace", lambda _config: WORKSPACE)
    folder, me = str(tmp_path), pwd.getpwuid(os.getuid()).pw_name
    assert policyd.request_desk(PolicydConfig(run_dir=folder, ask_user=None)) is None
    assert policyd.request_desk(PolicydConfig(run_dir=folder, ask_user="nobody-of-that-name")) is None
    assert "cannot ask for more" in capsys.readouterr().err
    desk = policyd.request_desk(PolicydConfig(run_dir=folder, ask_user=me))
    assert desk is not None
    desk.close()
    assert not (tmp_path / "ask" / "policy.sock").exists()
    (tmp_path / "ask").rmdir()
    (tmp_path / "ask").write_text("no folder")
    assert policyd.request_desk(PolicydConfig(run_dir=folder, ask_user=me)) is None
    assert "cannot ask for more" in capsys.readouterr().err
