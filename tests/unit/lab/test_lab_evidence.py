"""What the report takes from the audit trail: digests of allowed calls, what arrived, and the verifier's last word."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from saw.audit.events import EventFactory, Subject
from saw.lab.evidence import allowed_calls, attestation, explain, unexplained

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
D1, D2 = "a" * 64, "b" * 64
FACTORY = EventFactory("saw-test", host="edge", new_uid=iter(map(str, range(10_000))).__next__)


def http(
    path: str,
    *,
    method: str = "GET",
    digest: str = D1,
    allowed: bool = True,
    workspace: str = "ws",
    host: str = "api.example.com",
) -> dict[str, Any]:
    """One event as the gatekeeper records it."""
    authority = {"authority": "models.example.com:443"} if host == "inference.local" else {"authority": host}
    event = FACTORY.http_activity(
        NOW, Subject(workspace=workspace, policy_digest=digest), method=method, scheme="https", host=host, port=443,
        path=path, allowed=allowed, detail=authority,
    )  # fmt: skip
    return {"seq": 1, "event": event}


def call(*requests: tuple[str, str, str], verdict: str = "allow", digest: str = "") -> dict[str, Any]:
    return {"name": "c", "verdict": verdict, "policy_digest": digest, "requests": [list(item) for item in requests]}


ITEMS = ("GET", "api.example.com", "/v1/items?page=2")


def test_an_allowed_call_gets_the_digest_of_its_own_event() -> None:
    calls = [call(ITEMS)]
    events = allowed_calls([http("/v1/other", digest=D2), http("/v1/items?page=2")], "ws")
    assert explain(calls, events) == []
    assert (calls[0]["policy_digest"], calls[0]["digest_source"]) == (D1, "audit")


@pytest.mark.parametrize(
    "event",
    [
        http("/v1/items"),
        http("/v1/items?page=2", method="POST"),
        http("/v1/items?page=2", allowed=False),
        http("/v1/items?page=2", workspace="another"),
        http("/v1/items?page=2", host="git.example.com"),
        http("/v1/items?page=2", digest=""),
    ],
)
def test_an_event_of_something_else_does_not_explain_a_call(event: dict[str, Any]) -> None:
    calls = [call(ITEMS)]
    assert explain(calls, allowed_calls([event], "ws")) == ["c"]
    assert (calls[0]["policy_digest"], calls[0]["digest_source"]) == ("", "none")


def test_one_event_explains_one_call_and_order_counts() -> None:
    events = allowed_calls([http("/v1/items?page=2")], "ws")
    assert explain([call(ITEMS), call(ITEMS)], events) == ["c"]
    first, second = ("GET", "api.example.com", "/v1/a"), ("GET", "api.example.com", "/v1/b")
    turned = allowed_calls([http("/v1/b"), http("/v1/a")], "ws")
    assert explain([call(first, second)], turned) == ["c"]
    assert explain([call(second, first)], turned) == []


def test_a_call_under_two_policies_has_no_digest() -> None:
    first, second = ("GET", "api.example.com", "/v1/a"), ("GET", "api.example.com", "/v1/b")
    calls = [call(first, second)]
    assert explain(calls, allowed_calls([http("/v1/a"), http("/v1/b", digest=D2)], "ws")) == ["c"]


def test_refusals_keep_what_their_answer_named_and_calls_without_a_ring_claim_nothing() -> None:
    calls = [call(verdict="deny", digest=D2), call(verdict="deny"), call(verdict="allow")]
    assert explain(calls, []) == []
    assert [(item["policy_digest"], item["digest_source"]) for item in calls] == [
        (D2, "answer"),
        ("", "none"),
        ("", "none"),
    ]


def test_what_arrived_needs_an_allowed_call_of_its_own() -> None:
    events = allowed_calls(
        [http("/v1/items?page=2"), http("/v1/chat/completions", method="POST", host="inference.local")], "ws"
    )
    good = {"host": "api.example.com", "method": "GET", "uri": "/v1/items?page=2", "saw_headers": ""}
    chat = {"host": "models.example.com", "method": "POST", "uri": "/v1/chat/completions", "saw_headers": ""}
    assert unexplained([good, chat], events) == []
    assert unexplained([good, good], events) == ["api.example.com GET /v1/items?page=2"]
    assert unexplained([{**good, "method": "DELETE"}], events) == ["api.example.com DELETE /v1/items?page=2"]
    assert unexplained([{**good, "saw_headers": "allow"}], events) == ["api.example.com GET /v1/items?page=2"]


def quote(*, digest: str = D1, good: bool = True, workspace: str = "ws", seq: int = 7) -> dict[str, Any]:
    """An attestation event as the broker records it."""
    subject = Subject(workspace=workspace, policy_digest=digest)
    if good:
        event = FACTORY.authentication(NOW, subject, activity="ticket", protocol="tpm2-quote", message="attested")
    else:
        event = FACTORY.authentication(
            NOW, subject, activity="ticket", outcome="failure", protocol="tpm2", message="pcr_mismatch",
            status_detail="not_attested",
        )  # fmt: skip
    return {"seq": seq, "event": event}


SHOWN = {
    "id": "ws",
    "state": "active",
    "policy_digest": D1,
    "lease_expires_at": (NOW + timedelta(minutes=1)).isoformat(),
}


def test_a_good_quote_over_the_release_with_a_running_lease_is_attested() -> None:
    told = attestation(SHOWN, [quote(good=False), quote(seq=9)], D1, NOW)
    assert (told["verdict"], told["problems"], told["policy_digest"]) == ("attested", [], D1)
    assert told["event"] == {"seq": 9, "time": "2026-11-25T12:00:00.000+00:00"}


@pytest.mark.parametrize(
    ("shown", "events", "released", "problem"),
    [
        ({}, [], D1, "the trail has no attestation of this workspace"),
        ({}, [quote(workspace="another")], D1, "the trail has no attestation of this workspace"),
        ({}, [quote(), quote(good=False)], D1, "the newest attestation was refused: pcr_mismatch"),
        ({}, [quote(digest=D2)], D1, "the quote is over policy bbb"),
        ({"policy_digest": D2}, [quote()], D1, "the broker holds policy bbb"),
        ({}, [quote(digest="")], "", "the quote is over policy none, released is none"),
        ({"state": "quarantined"}, [quote()], D1, "the workspace is quarantined"),
        ({"lease_expires_at": NOW.isoformat()}, [quote()], D1, "the lease ended at"),
        ({"lease_expires_at": None}, [quote()], D1, "there is no lease"),
    ],
)
def test_whatever_does_not_hold_is_not_attested_and_named(
    shown: dict[str, Any], events: list[dict[str, Any]], released: str, problem: str
) -> None:
    told = attestation({**SHOWN, **shown}, events, released, NOW)
    assert told["verdict"] == "not_attested"
    assert any(text.startswith(problem) for text in told["problems"]), told["problems"]
