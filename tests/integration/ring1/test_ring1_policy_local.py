"""``http://policy.local`` through a real ring 1: the policy is told, people are asked, and what was asked for stays refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from saw.policy.policy_request import Asked, AskedList
from saw.runtime.policy_local import NOTE
from saw.runtime.request_desk import AskRefused, Mine, More, Question, RequestDesk

WISH = {"host": "files.example.com", "method": "GET", "path": "/v2/list", "reason": "the task names this list"}


class People:
    """What the policy agent would be answered by the broker."""

    def __init__(self) -> None:
        self.asked: list[Question] = []
        self.refusal: AskRefused | None = None

    def pass_on(self, question: Question) -> Asked | AskedList:
        self.asked.append(question)
        if self.refusal is not None:
            raise self.refusal
        made = tuple(self.shown(one) for one in self.asked if isinstance(one, More))
        return AskedList(requests=made) if isinstance(question, Mine) else made[-1]

    @staticmethod
    def shown(one: More) -> Asked:
        names = ("host", "port", "scheme", "method", "path", "program", "reason", "policy_digest")
        said = {name: getattr(one, name) for name in names}
        return Asked(id="pr-1", state="open", opened_at="then", expires_at="later", **said)


@pytest.fixture
def people(rig) -> Iterator[People]:
    found = People()
    desk = RequestDesk(rig.directory / "ask" / "policy.sock", os.getuid(), found, print)
    desk.start()
    yield found
    desk.close()


def post(rig, body: object, *extra: str, url: str = "http://policy.local/v1/requests"):
    text = body if isinstance(body, str) else json.dumps(body)
    return rig.curl(url, *extra, "--data-binary", text)


@pytest.mark.control("RUN-01")
def test_the_policy_in_force_is_told_over_every_way_and_nothing_secret_with_it(rig):
    plain = rig.curl("http://policy.local/")
    assert plain.status == 200, plain
    told = plain.json()
    assert (told["policy_digest"], told["blueprint"]) == (rig.base, "coding")
    assert {one["host"] for one in told["hosts"]} >= {"git.example.com", "api.example.com"}
    assert {"class": "deny", "match": {"host": "api.example.com", "method": ["POST"], "path": "/v1/never"}} in told[
        "classes"
    ]
    assert "models.example.com" not in plain.body.decode()
    for url in ("https://policy.local/", "http://policy.local/v1/policy", "http://policy.local:80/"):
        assert rig.curl(url).json() == told, url
    assert rig.curl("http://policy.local/", "--proxytunnel").json() == told
    text = rig.curl("http://policy.local/text")
    assert f"policy {rig.base[:16]}" in text.body.decode()
    assert "POST http://policy.local/v1/requests" in text.body.decode()


@pytest.mark.control("RUN-01")
def test_of_the_decision_service_nothing_else_is_reached_and_a_tunnel_to_the_policy_leads_nowhere_else(rig):
    for path in (
        "/decide",
        "/status",
        "/counts",
        "/refusals",
        "/v1/requests/../../status",
        "/policy.local/text",
        "/text?a=1",
    ):
        reply = rig.curl("--path-as-is", f"http://policy.local{path}")
        assert reply.status == 404, (path, reply)
    for method in ("PUT", "DELETE", "PATCH"):
        assert rig.curl("http://policy.local/v1/requests", "--request", method).status == 404
    inside = rig.curl("https://policy.local/v1/x", "--header", "Host: api.example.com")
    assert (inside.status, inside.json()["reason"]) == (403, "host_not_allowed")
    for port in (22, 8443):
        assert rig.curl(f"https://policy.local:{port}/").connect == 403
    assert rig.curl("http://policy.local:8080/").status == 403


@pytest.mark.control("RUN-01")
@pytest.mark.control("POL-01")
def test_an_ask_goes_on_under_the_policy_and_the_program_that_asks_and_allows_nothing(rig, people):
    refused = rig.curl("https://files.example.com/v2/list")
    assert (refused.status, refused.connect) == (403, 403)
    within = rig.curl("https://api.example.com/v2/list")
    assert any("http://policy.local/v1/requests" in step for step in within.json()["next_steps"])
    reply = post(rig, WISH)
    assert reply.status == 200, reply
    assert (reply.json()["request"]["state"], reply.json()["note"]) == ("open", NOTE)
    (asked,) = people.asked
    assert isinstance(asked, More)
    assert (asked.policy_digest, asked.program, asked.port) == (rig.base, "/usr/bin/curl", 443)
    assert (asked.host, asked.method, asked.path, asked.reason) == tuple(WISH.values())
    assert post(rig, {**WISH, "program": "/usr/bin/git"}, url="https://policy.local/v1/requests").status == 200
    assert people.asked[-1].program == "/usr/bin/git"
    listed = rig.curl("http://policy.local/v1/requests").json()["requests"]
    assert [one["host"] for one in listed] == ["files.example.com"] * 2
    assert rig.curl("https://files.example.com/v2/list").connect == 403
    assert rig.curl("http://policy.local/").json()["policy_digest"] == rig.base


@pytest.mark.control("RUN-01")
def test_what_is_no_ask_is_refused_before_anybody_hears_of_it(rig, people):
    for body, status in (
        ("{", 400),
        ({**WISH, "allow": True}, 400),
        ({**WISH, "reason": "x" * 5000}, 413),
    ):
        reply = post(rig, body)
        assert (reply.status, reply.json()["note"]) == (status, NOTE), reply
    assert people.asked == []
    assert post(rig, WISH).status == 200
    people.refusal = AskRefused("already_allowed", "it is", "call it")
    assert (post(rig, WISH).status, post(rig, WISH).json()["error"]) == (409, "already_allowed")


@pytest.mark.control("RUN-01")
def test_without_the_policy_agent_the_policy_is_told_and_nothing_can_be_asked(rig):
    assert rig.curl("http://policy.local/").status == 200
    reply = post(rig, WISH)
    assert (reply.status, reply.json()["error"]) == (503, "ask_unavailable")
