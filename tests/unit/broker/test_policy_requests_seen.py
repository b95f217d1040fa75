"""Policy requests as people see and answer them, by command and on pages. The agent's words are text, and marked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from portal_world import World as Portal
from request_world import RequestWorld
from review_world import OPERATOR

from saw.broker import apps
from saw.broker.clock import iso
from saw.broker.policy_request_views import AnsweredRequest, JudgedRequest, PolicyRequestPage
from saw.broker.schema import policy_requests
from saw.cli import policy

SCRIPT = "<script>alert(1)</script>\u202e\x1b[2J"

# --- the command line --------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Iterator[RequestWorld]:
    found = RequestWorld(tmp_path)
    yield found
    found.broker.close()


class Client:
    """The operator's client, at the operator's application without a socket between."""

    def __init__(self, world: RequestWorld) -> None:
        self.world = world

    @contextmanager
    def session(self) -> Iterator[Client]:
        yield self

    def request(self, method: str, path: str, body: object = None) -> Any:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(apps.operator_app(self.world.broker))
            async with httpx.AsyncClient(transport=transport, base_url="http://broker") as client:
                return await client.request(method, path, json=body)

        answer = asyncio.run(call())
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
def saw(world: RequestWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(apps, "socket_caller", lambda *_: OPERATOR)
    monkeypatch.setattr("saw.broker.client.OperatorClient.from_context", lambda _context: Client(world))

    def run(*words: str) -> str:
        assert policy.main(["requests", *words]) == 0
        return capsys.readouterr().out

    return run


def test_requests_are_listed_shown_and_answered_on_the_command_line(world: RequestWorld, saw: Any) -> None:
    asked = world.ask(reason=SCRIPT, path="/v2/list")
    world.later(seconds=1)
    world.ask(path="/v2/other")
    text = saw("list", "--state", "open", "--workspace", "ws-a")
    assert text.split()[:4] == ["ID", "STATE", "STANDING", "WORKSPACE"]
    assert "GET https://api.example.com:443/v2/list" in text
    shown = saw("show", asked.id)
    assert "# written by the agent" in shown
    assert "# policy.yaml: add under network_policies" in shown
    assert not {"\x1b", "\u202e"} & set(text + shown)
    msgspec.convert(_without_ok(saw("show", asked.id, "--json")), JudgedRequest)
    found = json.loads(saw("list", "--limit", "1", "--json"))
    assert (len(found["requests"]), found["next"] is not None) == (1, True)
    msgspec.convert({"requests": found["requests"], "next": found["next"]}, PolicyRequestPage)
    told = saw("answer", asked.id, "accept", "--comment", "it fits")
    assert told == f"{asked.id} is accepted; nothing is allowed yet: change the blueprint, sign it and release it\n"
    again = _without_ok(saw("answer", asked.id, "accept", "--comment", "it fits", "--json"))
    assert not msgspec.convert(again, AnsweredRequest).changed
    assert "accepted by operator:root: it fits" in saw("show", asked.id)


def _without_ok(text: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(text).items() if name != "ok"}


# --- the pages ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def portal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Portal]:
    found = Portal(tmp_path_factory.mktemp("portal-requests"), operate=True)
    yield found
    found.close()


def put(portal: Portal, identifier: str, workspace: str = "ws-a", sponsor: str = "Ada@Example.com") -> str:
    """Put down a request as an agent of ``workspace`` would have made it."""
    with portal.broker.services.store.write() as tx:
        tx.connection.execute(
            policy_requests.insert().values(
                id=identifier, workspace_id=workspace, agent_id="agent-1", sponsor=sponsor, blueprint="coding", ring="stable",
                policy_digest="c" * 64, ask_sha256=identifier, scheme="https", host="api.example.com", port=443, method="GET",
                path=f"/v2/{identifier}", program="/usr/bin/curl", reason=SCRIPT, standing="refused", state="open",
                opened_at=iso(portal.now), expires_at=iso(portal.now + timedelta(days=14)),
            )
        )  # fmt: skip
    return identifier


def test_who_sees_which_and_what_the_agent_wrote_is_escaped_and_marked(portal: Portal) -> None:
    put(portal, "pr-a")
    put(portal, "pr-b", "ws-b", "ben@example.com")
    pages = {name: portal[name].get("/policy-requests") for name in ("ada", "ben", "dan", "fay", "cleo")}
    assert {name: ("/v2/pr-a" in page.text, "/v2/pr-b" in page.text) for name, page in pages.items()} == {
        "ada": (True, False),
        "ben": (False, True),
        "dan": (True, True),
        "fay": (True, True),
        "cleo": (False, False),
    }
    assert pages["cleo"].status_code == 303
    assert portal["nobody"].get("/policy-requests").status_code == 303
    one = portal["ada"].get("/policy-requests/pr-a")
    assert one.status_code == 200
    for text in (pages["dan"].text, one.text):
        assert not {"\u202e", "\x1b"} & set(text)
        assert "<script>alert" not in text
        assert "by the agent" in text
    assert portal["ada"].get("/policy-requests/pr-b").status_code == 404
    assert "/v2/pr-b" not in portal["dan"].get("/policy-requests?workspace=ws-a&state=open").text
    assert portal["dan"].get("/policy-requests?state=granted").status_code == 400
    assert "/policy-requests?workspace=ws-a" in portal["ada"].get("/workspaces/ws-a").text


@pytest.mark.control("POL-01")
@pytest.mark.parametrize(
    ("who", "status"), [("dan", 303), ("eve", 303), ("fay", 403), ("ada", 403), ("ben", 404), ("nobody", 303)]
)
def test_those_who_intervene_answer_and_nobody_else(portal: Portal, who: str, status: int) -> None:
    identifier = put(portal, f"pr-answer-{who}")
    allowed = who in {"dan", "eve"}
    assert ('value="accept"' in portal[who].get(f"/policy-requests/{identifier}").text) == allowed
    answer = portal[who].post(f"/policy-requests/{identifier}/answer", decision="accept", comment="it fits")
    assert answer.status_code == status, answer.text
    found = portal.broker.policy_requests.show(identifier)
    expected = ("accepted", f"user:{who}@example.com") if allowed else ("open", None)
    assert (found.state, found.answered_by) == expected
    if allowed:
        assert 'value="accept"' not in portal[who].get(f"/policy-requests/{identifier}").text
        forged = portal[who].post(f"/policy-requests/{identifier}/answer", csrf="x", decision="decline", comment="no")
        assert forged.status_code == 403


@pytest.mark.parametrize(
    ("who", "looks", "answers"), [("dan", 200, 200), ("eve", 200, 200), ("fay", 200, 403), ("ada", 403, 403)]
)
def test_people_on_the_command_line_look_and_answer_by_their_roles(
    portal: Portal, who: str, looks: int, answers: int
) -> None:
    path = f"/operator/v1/policy/requests/{put(portal, f'pr-role-{who}')}"
    person = portal.terminal(who)
    assert person.get(path).status_code == looks
    assert person.get("/operator/v1/policy/requests").status_code == looks
    answer = person.ask("POST", f"{path}/answer", json={"decision": "decline", "comment": "no"})
    assert answer.status_code == answers, answer.text
