"""Limits of requests and tokens, models that others stand for, and calls beyond a budget that wait for a person, at ring 2."""

from __future__ import annotations

import hashlib
import json
import signal
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ring2_inference import (
    ANTHROPIC,
    CHAT,
    EVENTS,
    JSON,
    OPENAI,
    answering,
    ask,
    context,
    governed,
    networks,
    release,
    unused,
    usage,
)  # fmt: skip
from ring2_policy import GOVERNANCE
from ring2_rig import Rig, wait_for

pytestmark = pytest.mark.control("INF-01")

HOUR = {"scope": "workspace", "per": "1h"}
PRICES = [
    {"models": ["demo-big"], "input": "0.01", "output": "20000"},
    {"models": ["*"], "input": "0.01", "output": "10000"},
]
"""A token of output costs a cent, of demo-big two; a million of input as well."""


def use(
    rig: Rig,
    *limits: dict[str, Any],
    budget: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
    **route: Any,
) -> None:
    """Release a route with these ``limits``, each under a name of its own, so that nothing was taken of them before."""
    named = [{"id": unused("limit"), **limit} for limit in limits]
    spend = unused("spend")
    whole = {
        "alias": "inference.local", "models": ["demo-*"], "upstream": "https://models.example.com/api/v1",
        "credential": "model-key", "limits": [limit["id"] for limit in named], **route,
    }  # fmt: skip
    money = {"scope": "workspace", "period": "day", "limit": {"currency": "USD", "amount": "0.25"}, **(budget or {})}
    if budget is not None:
        whole |= {"budget": spend, "prices": PRICES}
    before, _, after = GOVERNANCE.partition("inference:\n")
    text = f"{before}inference: {json.dumps({'routes': [whole]})}\nlimits: {json.dumps(named)}\n"
    text += f"budgets: {json.dumps([{'id': spend, **money}] if budget is not None else [])}\n"
    release(rig, text + after.partition("\n")[2], **(fields or {}))
    rig.budget = f"coding/{spend}"  # type: ignore[attr-defined]
    rig.limits = [f"coding/{limit['id']}" for limit in named]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def _places(ring2: Rig) -> Iterator[None]:
    yield from networks(ring2)


@pytest.fixture(autouse=True)
def _as_before(rig: Rig, _places: None) -> Iterator[None]:
    yield
    rig.far.respond = None
    rig.broker.reviews.clear()


def taken(rig: Rig) -> dict[str, int]:
    """Return what is counted against the limits now, by unit."""
    database = sqlite3.connect(f"file:{rig.directory}/state/budget.db?mode=ro", uri=True)
    try:
        rows = database.execute("SELECT key, unit, amount FROM counted").fetchall()
    finally:
        database.close()
    ours = [(unit, amount) for key, unit, amount in rows if json.loads(key)[0] in rig.limits]  # type: ignore[attr-defined]
    return {unit: sum(amount for kind, amount in ours if kind == unit) for unit, _ in ours}


def refusals(rig: Rig, reason: str) -> list[dict[str, Any]]:
    """Return what the audit trail says of refused calls."""
    told = [event.event["unmapped"]["saw"] for event in rig.broker.events if "unmapped" in event.event]
    return [one for one in told if one.get("reason") == reason and one.get("limit", {}).get("id") in rig.limits]  # type: ignore[attr-defined]


def test_a_call_beyond_the_rate_is_told_when_to_come_again_and_never_leaves(rig: Rig) -> None:
    use(rig, {**HOUR, "requests": 2})
    answering(rig, [usage(1, 2)], JSON)
    assert [ask(rig).status for _ in range(2)] == [200, 200]
    refused = ask(rig)
    assert refused.outcome == (429, "rate_limited")
    limit = refused.json["limit"]
    assert (limit["id"], limit["unit"], limit["per"], limit["left"]) == (rig.limits[0], "requests", "3600s", 0)  # type: ignore[attr-defined]
    assert refused.headers["retry-after"] == str(limit["retry_after_s"])
    assert 3000 < limit["retry_after_s"] <= 3601
    assert refused.json["next_steps"] == [f"make the call again in {limit['retry_after_s']} seconds"]
    assert len(rig.far.arrived) == 2
    assert ask(rig, number=6).status == 200, "another workspace has a count of its own"
    assert rig.call("GET", "/v1/models", host="inference.local", number=5, context=context(rig)).status == 200
    wait_for(lambda: refusals(rig, "rate_limited"), "the refusal in the trail")
    assert refusals(rig, "rate_limited")[0]["limit"]["left"] == 0


def test_what_left_the_window_makes_room_again(rig: Rig) -> None:
    use(rig, {"scope": "workspace", "per": "5s", "requests": 1})
    answering(rig, [usage(1, 2)], JSON)

    def together() -> list[int]:
        """Call at once, so that the calls of one round meet in one window however slow the machine is."""
        with ThreadPoolExecutor(8) as pool:
            return sorted(call.result().status for call in [pool.submit(ask, rig) for _ in range(8)])

    wait_for(lambda: together()[-1] == 429, "the limit")
    wait_for(lambda: ask(rig).status == 200, "room in the window")


def test_tokens_are_counted_by_what_answers_say(rig: Rig) -> None:
    use(rig, {**HOUR, "tokens": 3000})
    answering(rig, [usage(300, 20)], JSON)
    assert ask(rig).status == 200
    wait_for(lambda: taken(rig) == {"tokens": 320}, "the tokens of the answer")
    answering(rig, OPENAI, EVENTS)
    assert ask(rig, stream=True).status == 200
    answering(rig, ANTHROPIC, EVENTS)
    assert ask(rig, "/v1/messages", stream=True).status == 200
    assert taken(rig) == {"tokens": 320 + 9 + 9}
    assert ask(rig, max_tokens=1700).outcome == (429, "rate_limited"), "with its input it may use more than is left"
    never = ask(rig, max_tokens=3000)
    assert never.outcome == (403, "rate_limited")
    assert "retry-after" not in never.headers
    assert "waiting does not help" in never.json["next_steps"][0]
    unbounded = ask(rig, max_tokens=None)
    assert unbounded.outcome == (403, "budget_unbounded")
    answering(rig, [b'{"error": "no"}'], JSON, status=400)
    assert ask(rig).status == 400
    assert taken(rig) == {"tokens": 338}, "what the service refused took no tokens"
    answering(rig, [b"{}"], JSON)
    assert ask(rig).status == 200
    assert taken(rig)["tokens"] > 338 + 1024, "an answer that says nothing took all that it might have"


def test_calls_that_race_are_admitted_exactly_as_they_fit(rig: Rig) -> None:
    use(rig, {**HOUR, "requests": 5})
    go_on = answering(rig, [], JSON, end=False)
    with ThreadPoolExecutor(16) as pool:
        calls = [pool.submit(ask, rig) for _ in range(16)]
        wait_for(lambda: len(rig.far.arrived) == 5 and sum(call.done() for call in calls) == 11, "5 calls on their way")
        go_on.set()
        statuses = sorted(call.result().status for call in calls)
    assert statuses == [200] * 5 + [429] * 11
    assert len(rig.far.arrived) == 5
    assert taken(rig) == {"requests": 5}


@pytest.mark.parametrize(
    ("scope", "fields", "second"),
    [
        ("workspace", {}, 200),
        ("agent", {}, 200),
        ("agent", {"agent": "agent-one"}, 429),
        ("sponsor", {}, 429),
        ("blueprint", {}, 429),
        ("engagement", {}, 200),
    ],
)
def test_who_shares_a_count_is_what_policy_says(rig: Rig, scope: str, fields: dict[str, Any], second: int) -> None:
    use(rig, {"scope": scope, "per": "1h", "requests": 1}, fields=fields)
    assert [ask(rig, number=number).status for number in (5, 5, 6)] == [200, 429, second]


def test_a_quota_of_the_calendar_says_when_it_starts_anew(rig: Rig) -> None:
    use(rig, {**HOUR, "requests": 100}, {"scope": "workspace", "per": "month", "requests": 2, "tokens": 100_000})
    answering(rig, [usage(300, 20)], JSON)
    assert [ask(rig).status for _ in range(2)] == [200, 200]
    refused = ask(rig)
    assert refused.outcome == (403, "quota_exhausted")
    assert refused.json["limit"]["resets_at"].endswith("-01T00:00:00Z")
    assert taken(rig) == {"requests": 4, "tokens": 640}, "each limit has counted each call that left"


def test_a_gatekeeper_that_is_killed_forgets_nothing(rig: Rig) -> None:
    use(rig, {**HOUR, "requests": 2}, {"scope": "workspace", "per": "month", "requests": 2})
    assert [ask(rig).status for _ in range(2)] == [200, 200]
    rig.stop_gatekeeper(signal.SIGKILL)
    rig.start_gatekeeper()
    wait_for(lambda: governed(rig), "the gatekeeper")
    assert ask(rig).outcome == (429, "rate_limited")


def ends(rig: Rig) -> list[dict[str, Any]]:
    """Return what the audit trail says of the ended charges of our budget, oldest first."""
    told = [event.event["unmapped"]["saw"].get("budget", {}) for event in rig.broker.events]
    return [one for one in told if one.get("id") == rig.budget and one.get("state") == "settled"]  # type: ignore[attr-defined]


def arrived(rig: Rig, body: bytes) -> bool:
    """Return whether the last call came with exactly this body, and nothing of ours in its headers."""
    last = rig.far.arrived[-1]
    headers = dict(last["headers"])
    assert not [name for name in headers if name.startswith("x-saw-")]
    assert headers.get("content-length", str(len(body))) == str(len(body))
    return bool(last["sha256"] == hashlib.sha256(body).hexdigest())


def send(rig: Rig, body: bytes, target: str = CHAT, number: int = 5) -> Any:
    headers = {"content-type": "application/json"}
    return rig.call(
        "POST", target, host="inference.local", headers=headers, body=body, number=number, context=context(rig, number)
    )


@pytest.mark.parametrize(
    ("target", "pieces"), [(CHAT, OPENAI), ("/v1/messages", ANTHROPIC)], ids=["OpenAI", "Anthropic"]
)
def test_a_model_that_another_stands_for_is_written_into_the_call_and_nothing_else(
    rig: Rig, target: str, pieces: list[bytes]
) -> None:
    use(rig, budget={}, aliases={"fast": "demo-big", "demo-small": "demo-1"})
    answering(rig, pieces, EVENTS)
    before = '{"messages": [{"role": "user", "content": "model: \\"fast\\" é"}],\n "model" : '
    after = b', "max_tokens":3, "stream": true, "metadata": {"model": "fast"}}  '
    for asked, sent in ((b'"fast"', b'"demo-big"'), (rb'"f\u0061st"', b'"demo-big"'), (b'"demo-small"', b'"demo-1"')):
        assert send(rig, before.encode() + asked + after, target).status == 200
        assert arrived(rig, before.encode() + sent + after), asked
    same = before.encode() + b'"demo-2"' + after
    assert send(rig, same, target).status == 200
    assert arrived(rig, same)
    wait_for(lambda: len(ends(rig)) == 4, "the ends in the trail")
    assert [one["model"] for one in ends(rig)] == ["demo-big", "demo-big", "demo-1", "demo-2"]
    assert "model_not_allowed" in send(rig, before.encode() + b'"faster"' + after, target).json["reason"]


def test_a_long_call_is_written_into_as_a_short_one(rig: Rig) -> None:
    use(rig, aliases={"fast": "demo-big"})
    text = "x" * 900_000
    body = json.dumps({"model": "fast", "messages": [{"role": "user", "content": text}]}).encode()
    assert send(rig, body).status == 200
    assert arrived(rig, body.replace(b'"fast"', b'"demo-big"'))


def test_a_call_in_pieces_of_unknown_length_is_written_into_as_well(rig: Rig) -> None:
    use(rig, aliases={"fast": "demo-big"})
    pieces = [b'{"mod', b'el": "fa', b'st", "messages": []', b"}"]
    chunks = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces) + b"0\r\n\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\nhost: inference.local\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    with context(rig).wrap_socket(rig.connect("10.210.5.1", 8443), server_hostname="ring2.saw.internal") as sock:
        sock.settimeout(60)
        sock.sendall(head.encode() + chunks)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert arrived(rig, b'{"model": "demo-big", "messages": []}')


def test_the_price_is_that_of_the_model_that_is_asked(rig: Rig) -> None:
    use(rig, budget={}, aliases={"fast": "demo-big"})
    assert ask(rig, model="demo-1", max_tokens=20).status == 200
    use(rig, budget={}, aliases={"fast": "demo-big"})
    assert ask(rig, model="fast", max_tokens=20).outcome == (403, "budget_exhausted")


def test_a_workspace_cannot_have_a_body_changed_itself(rig: Rig) -> None:
    use(rig, aliases={"fast": "demo-big"})
    body = b'{"model": "demo-1", "messages": []}'
    headers = {"content-type": "application/json", "x-saw-edit": f'10,18,{len(body)},"demo-0"'}
    answer = rig.call("POST", CHAT, host="inference.local", headers=headers, body=body, number=5, context=context(rig))
    assert answer.status == 200
    assert arrived(rig, body)


def test_a_call_beyond_the_budget_waits_for_a_person_and_is_sent_once_as_it_was(rig: Rig) -> None:
    use(rig, budget={"on_exhaust": "review"}, aliases={"fast": "demo-1"})
    answering(rig, [usage(1, 20)], JSON)
    assert ask(rig, max_tokens=20).status == 200
    body = b'{"model": "fast", "messages": [], "max_tokens": 18}'
    waits = send(rig, body)
    assert waits.status == 202, waits.body
    review = waits.json["review_id"]
    assert send(rig, body).json["review_id"] == review, "the same call is the same review"
    asked = rig.broker.reviews.one.opened
    assert (asked.group, asked.quorum, asked.call.body) == ("team-x", 1, body)
    name = rig.budget.removeprefix("coding/")  # type: ignore[attr-defined]
    assert asked.rule.startswith(f"budgets {name}: the call may cost 0.18")
    assert asked.rule.endswith("USD is left")
    assert len(rig.far.arrived) == 1
    assert ask(rig, max_tokens=4).status == 200, "what fits needs nobody"

    def poll() -> Any:
        return rig.call(
            "GET", f"/.well-known/saw/reviews/{review}?wait=5", host="inference.local", number=5, context=context(rig)
        )

    assert poll().status == 202
    rig.broker.reviews.move(review, "approved")
    wait_for(lambda: poll().status == 200, "the answer")
    assert poll().body == usage(1, 20)
    assert len(rig.far.arrived) == 3
    assert arrived(rig, body.replace(b"fast", b"demo-1"))
    assert send(rig, body).status == 202, "one approval is for one call"
    assert rig.broker.reviews.all.keys() > {review}
    wait_for(lambda: len(ends(rig)) == 3, "the ends in the trail")
    assert sum(one["spent"] for one in ends(rig)) // 10_000 == 60, "what people agreed to is counted, beyond the limit"


def test_a_call_that_people_agreed_to_for_another_reason_does_not_pass_the_budget(rig: Rig) -> None:
    use(rig, budget={"on_exhaust": "review"})
    answering(rig, [usage(1, 20)], JSON)
    assert ask(rig, max_tokens=20).status == 200
    for said in ("", "budgets another", "actions[0]"):
        rig.broker.reviews.clear()
        rig.broker.reviews.spoil = lambda claimed, said=said: type(claimed)(
            **{name: getattr(claimed, name) for name in claimed.__struct_fields__ if name != "rule"}, rule=said
        )
        review = ask(rig, max_tokens=19).json["review_id"]
        rig.broker.reviews.move(review, "approved")
        wait_for(lambda review=review: rig.broker.reviews.all[review].results, "the end of the review")
        [result] = rig.broker.reviews.one.results
        assert (result.outcome, result.detail.partition(":")[0]) == ("failed", "budget_exhausted")
    assert len(rig.far.arrived) == 1
