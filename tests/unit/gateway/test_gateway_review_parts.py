"""Parts of ring 2's review service: tickets, what is kept of a call, who decides, and the words that git understands."""

from __future__ import annotations

import asyncio
import gzip
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from saw.audit.events import EventFactory
from saw.gateway import reviews
from saw.gateway.app import AuthorizationApp
from saw.gateway.credentials import Injection
from saw.gateway.envoy_parts import SEND_SEAT
from saw.gateway.held import Held, held_by
from saw.gateway.judge import Call, Dial, Verdict
from saw.gateway.releases import Release
from saw.gateway.review_answers import git_waits, safe_headers, state_of, waits
from saw.gateway.reviews import ReviewApp, kept_headers
from saw.gateway.spool import Spool
from saw.gateway.tickets import LIFE_S, Tickets, TicketsOut
from saw.policy.loader import load_governance, load_policy
from saw.policy.matcher import Matcher
from saw.policy.model import Request
from saw.review.messages import ReviewedAnswer, ReviewView

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
BOUND = ("POST", "api.example.com", "/v1/x?a=1")
VIEW = ReviewView(
    id=f"rv-{'a' * 32}", workspace_id="ws-1", state="pending", request_digest="b" * 64, opened_at="2026-01-02T03:04:05Z",
    expires_at="2026-01-03T03:04:05Z",
)  # fmt: skip


class Time:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.control("REV-01")
def test_a_ticket_is_good_once_for_its_call_and_for_seconds() -> None:
    time = Time()
    tickets: Tickets[str] = Tickets(time)
    first = tickets.issue(BOUND, "one")
    assert len(first) == 43
    assert tickets.issue(BOUND, "two") != first
    assert tickets.redeem(first, BOUND) == "one"
    assert tickets.redeem(first, BOUND) is None
    for at in range(3):
        other = list(BOUND)
        other[at] += "x"
        ticket = tickets.issue(BOUND, "three")
        assert tickets.redeem(ticket, (other[0], other[1], other[2])) is None
        assert tickets.redeem(ticket, BOUND) is None, "spent by the attempt"
    late = tickets.issue(BOUND, "four")
    time.now += LIFE_S
    assert tickets.redeem(late, BOUND) is None
    for forged in ("", "A" * 43, "\udcff", "é"):
        assert tickets.redeem(forged, BOUND) is None


@pytest.mark.control("REV-01")
def test_tickets_that_are_out_are_bounded_and_end() -> None:
    time = Time()
    tickets: Tickets[int] = Tickets(time, most=2)
    kept = [tickets.issue(BOUND, number) for number in range(2)]
    with pytest.raises(TicketsOut):
        tickets.issue(BOUND, 3)
    assert tickets.drop(kept[0])
    assert not tickets.drop(kept[0])
    assert tickets.redeem(tickets.issue(BOUND, 4), BOUND) == 4
    time.now += LIFE_S
    assert tickets.redeem(tickets.issue(BOUND, 5), BOUND) == 5


@pytest.mark.control("CRED-01")
def test_of_the_headers_the_agents_own_are_kept_and_no_credential_or_control_header() -> None:
    brought = [
        ("Host", "api.example.com"), ("Content-Type", "application/json"), ("Authorization", "Bearer x"), ("Cookie", "a"),
        ("X-Own-Key", "secret"), ("X-Saw-Binary", "/usr/bin/curl"), ("x-forwarded-for", "1.2.3.4"), ("Connection", "x-hop"),
        ("X-Hop", "1"), ("Accept", "a"), ("accept", "b"), ("x-token", "openshell:resolve:env:T"), ("Idempotency-Key", "k"),
        ("Content-Length", "3"), ("x-request-id", "r"), ("Proxy-Anything", "p"), ("x-envoy-retry-on", "5xx"),
    ]  # fmt: skip
    kept = kept_headers(brought, frozenset({"x-own-key"}))
    assert kept == (("content-type", "application/json"), ("accept", "a"), ("accept", "b"))


def test_of_an_answer_no_cookie_hop_or_control_header_is_kept() -> None:
    brought = [
        ("ETag", "1"),
        ("Set-Cookie", "a=b"),
        ("Transfer-Encoding", "chunked"),
        ("X-Saw-Review", "done"),
        ("x", "y" * 9000),
    ]
    assert safe_headers(brought) == (("etag", "1"),)


def push(*refs: str, capabilities: str = " report-status side-band-64k") -> bytes:
    body = b""
    for index, ref in enumerate(refs):
        line = f"{'1' * 40} {'2' * 40} {ref}".encode() + (f"\0{capabilities}\n".encode() if not index else b"\n")
        body += f"{len(line) + 4:04x}".encode() + line
    return body + b"0000PACK..."


def test_git_is_told_which_review_each_ref_waits_for() -> None:
    answer = git_waits(VIEW, push("refs/heads/main", "refs/tags/v1"), "", "d" * 64)
    assert answer is not None
    status, headers, body = answer
    assert (status, dict(headers)[b"content-type"]) == (200, b"application/x-git-receive-pack-result")
    assert b"\x02rv-" in body
    for ref in (b"refs/heads/main", b"refs/tags/v1"):
        assert b"ng " + ref + b" waiting for review " + VIEW.id.encode() in body
    assert body.endswith(b"0000")
    plain = git_waits(VIEW, push("refs/heads/main", capabilities=" report-status"), "", "d" * 64)
    assert plain is not None
    assert plain[2].startswith(b"000eunpack ok\n")
    packed = git_waits(VIEW, gzip.compress(push("refs/heads/main")), "gzip", "d" * 64)
    assert packed is not None
    assert packed[2].startswith(b"00")


@pytest.mark.parametrize("body", [b"", b"0000", b"nonsense", push("refs/heads/main", capabilities=" atomic")])
def test_what_is_no_push_that_wants_a_report_gets_the_answer_in_json(body: bytes) -> None:
    assert git_waits(VIEW, body, "", "d" * 64) is None
    assert waits(VIEW, "d" * 64)[0] == 202


@pytest.mark.parametrize("state", ["pending", "approved", "executing"])
def test_until_it_has_ended_the_answer_is_202(state: Any) -> None:
    status, headers, _ = state_of(msgspec.structs.replace(VIEW, state=state), "d" * 64)
    assert (status, dict(headers)[b"retry-after"]) == (202, b"10")


def test_the_stored_answer_is_given_as_it_came_and_marked() -> None:
    answer = ReviewedAnswer(status=204, headers=(("etag", "1"), ("set-cookie", "a")), truncated=True)
    status, headers, body = state_of(msgspec.structs.replace(VIEW, state="done", answer=answer), "d" * 64)
    assert (status, body) == (204, b"")
    assert dict(headers) == {
        b"etag": b"1", b"x-saw-review": b"done", b"x-saw-review-id": VIEW.id.encode(), b"x-saw-review-truncated": b"true",
    }  # fmt: skip


POLICY = b"""
version: 1
network_policies:
  api:
    endpoints:
      - {host: api.example.com, port: 443, protocol: rest, access: full}
      - {host: git.example.com, port: 443, protocol: rest, access: full}
    binaries: [{path: /usr/bin/curl}]
"""
GOVERNANCE = b"""
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team-x}
actions:
  - {match: {host: api.example.com, method: [POST], path: /v1/orders}, class: review, expires: 10s,
     reviewers: {group: buyers, quorum: 2}}
  - {match: {host: git.example.com, git: {service: receive-pack, ref: refs/heads/docs}}, class: review,
     reviewers: {group: writers}}
  - {match: {host: git.example.com, git: {service: receive-pack, ref: "refs/heads/agent/**"}}, class: staged}
"""


def held(
    method: str, path: str, body: bytes = b"", delegation: str = "", host: str = "api.example.com"
) -> tuple[Held | None, str]:
    governance = load_governance(GOVERNANCE)
    matcher = Matcher.compile(load_policy(POLICY), governance)
    release = Release("aa" * 32, 1, "coding", NOW + timedelta(days=1), governance, matcher)
    request = Request("https", host, 443, method, path, binary="/usr/bin/curl", body=body)
    return held_by(release, request, matcher.decide(request), delegation)


@pytest.mark.control("REV-02")
def test_who_decides_is_what_the_rule_says_or_else_the_owners_or_the_sponsors() -> None:
    found, problem = held("POST", "/v1/orders?a=1")
    assert found is not None
    assert (found.group, found.quorum, found.expires_in_s, problem) == ("buyers", 2, 60, "")
    found, _ = held("PUT", "/v1/orders")
    assert found is not None
    assert (found.group, found.quorum, found.expires_in_s) == ("team-x", 1, 86400)
    found, _ = held("GET", "/v1/orders", delegation="dlg-1")
    assert found is not None
    assert (found.group, found.delegation, found.rule) == ("sponsors", "dlg-1", "")


@pytest.mark.control("REV-02")
def test_a_push_that_different_people_decide_on_is_no_single_review() -> None:
    path, host = "/team/a.git/git-receive-pack", "git.example.com"
    for refs, group in (
        (("refs/heads/docs",), "writers"),
        (("refs/heads/agent/x", "refs/heads/docs"), "writers"),
        (("refs/heads/main", "refs/heads/next"), "team-x"),
    ):
        found, _ = held("POST", path, push(*refs), host=host)
        assert found is not None
        assert found.group == group
    found, problem = held("POST", path, push("refs/heads/docs", "refs/heads/main"), host=host)
    assert found is None
    assert "one at a time" in problem


@pytest.mark.control("REV-02")
def test_an_approval_takes_away_the_review_and_nothing_else() -> None:
    governance = load_governance(GOVERNANCE)
    matcher = Matcher.compile(load_policy(POLICY), governance)
    request = Request("https", "api.example.com", 443, "POST", "/v1/orders", binary="/usr/bin/curl")
    assert matcher.decide(request).reason == "review_required"
    assert matcher.decide(request, approved=True).allowed
    for change, reason in (
        ({"binary": "/usr/bin/wget"}, "binary_not_allowed"),
        ({"host": "other.example.com"}, "host_not_allowed"),
        ({"path": "/v1/..%2fx"}, "not_canonical"),
        ({"method": "TRACE"}, "method_or_path_not_allowed"),
        ({"headers": {"x-http-method-override": "DELETE"}}, "method_or_path_not_allowed"),
        ({"host": "git.example.com", "path": "/a/git-receive-pack", "body": b"?"}, "action_denied"),
    ):
        assert matcher.decide(msgspec.structs.replace(request, **change), approved=True).reason == reason


class Judged:
    """Stands where the judge does and says what a test wants: what is done with a verdict is looked at here."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict

    async def decide(self, _call: Call) -> Verdict:
        return self.verdict


@pytest.mark.control("REV-01")
def test_without_a_review_service_a_held_call_is_refused_as_review_required(tmp_path: Path) -> None:
    call = Call("1", "", "https", "api.example.com", "443", "POST", "/v1/x", "", (), "r", {}, b"", body_complete=True)
    waiting = Verdict(
        call=call, time=NOW, allowed=False, host="api.example.com", port=443, reason="review_required",
        held=Held(group="g", quorum=1, expires_in_s=60),
    )  # fmt: skip
    spool = Spool(tmp_path, "edge", 100)
    factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "u")

    async def both() -> tuple[Any, Any]:
        without = AuthorizationApp(Judged(waiting), spool, factory)  # type: ignore[arg-type]
        tickets: Tickets[Verdict] = Tickets(Time())
        served = AuthorizationApp(Judged(waiting), spool, factory, waiting=tickets)  # type: ignore[arg-type]
        return await without.answer(call), await served.answer(call)

    refused, taken = asyncio.run(both())
    assert refused[0] == 403
    assert b'"reason": "review_required"' in refused[2]
    assert (taken[0], dict(taken[1])[b"x-saw-transport"]) == (200, b"review")
    spool.close()


def test_a_body_that_does_not_arrive_in_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviews, "BODY_TIME_S", 0.05)
    call = Call("1", "", "https", "api.example.com", "443", "POST", "/v1/x", "", (), "r", {}, b"", body_complete=True)
    waiting = Verdict(
        call=call, time=NOW, allowed=False, host="api.example.com", port=443, workspace_id="ws-1",
        held=Held(group="g", quorum=1, expires_in_s=60),
    )  # fmt: skip
    sent: list[Any] = []

    async def served() -> None:
        tickets: Tickets[Verdict] = Tickets(Time())
        app = ReviewApp(
            tickets, None, None, None, credential_headers=frozenset, now=lambda: NOW,
            may_read=lambda *_: False,  # type: ignore[arg-type]
        )  # fmt: skip
        ticket = tickets.issue(("POST", "api.example.com", "/v1/x"), waiting)
        scope = {
            "type": "http", "method": "POST", "raw_path": b"/v1/x", "query_string": b"",
            "headers": [(b"host", b"api.example.com"), (b"x-saw-ticket", ticket.encode())],
        }  # fmt: skip

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)

    asyncio.run(served())
    assert sent[0]["status"] == 408
    assert b"did not arrive in time" in sent[1]["body"]


@pytest.mark.control("REV-02")
def test_the_socket_for_approved_calls_lets_through_what_its_ticket_says_and_nothing_else(tmp_path: Path) -> None:
    call = Call(
        SEND_SEAT, "", "https", "api.example.com", "443", "POST", "/v1/x", "", (), "r", {}, b"", body_complete=True
    )
    dial = Dial(
        "192.0.2.1:443",
        "api.example.com",
        "tls",
        "/v1/x",
        Injection((("authorization", "Bearer t"),), ("a-token-that-is-long",)),
        (),
    )
    allowed = Verdict(call=call, time=NOW, allowed=True, host="api.example.com", port=443, dial=dial)
    spool = Spool(tmp_path, "edge", 100)
    factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "u")
    tickets: Tickets[Verdict] = Tickets(Time())

    def ask(ticket: str, target: str = "/v1/x", sending: Tickets[Verdict] | None = tickets) -> int:
        app = AuthorizationApp(Judged(allowed), spool, factory, sending=sending)  # type: ignore[arg-type]
        return int(asyncio.run(app.answer(msgspec.structs.replace(call, target=target, send_ticket=ticket)))[0])

    bound = ("POST", "api.example.com", "/v1/x")
    assert ask("") == ask("A" * 43) == 403
    assert ask(tickets.issue(bound, allowed), "/v1/y") == 403
    assert ask(tickets.issue(bound, allowed), sending=None) == 403
    ticket = tickets.issue(bound, allowed)
    assert ask(ticket) == 200
    assert ask(ticket) == 403
    spool.close()
