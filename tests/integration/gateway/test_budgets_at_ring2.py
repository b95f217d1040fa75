"""Budgets at ring 2: calls of a model service are reserved before they leave and settled by what the service answers."""

from __future__ import annotations

import gzip
import json
import signal
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from ring2_inference import (
    ANTHROPIC,
    CHAT,
    EVENTS,
    JSON,
    OPENAI,
    RESPONSES,
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
from ring2_sponsor import Sponsor

from saw.policy.delegation import Resource

pytestmark = pytest.mark.control("BUD-01")


def governance(
    *, limit: str = "1.00", scope: str = "workspace", on_exhaust: str = "deny", credential: bool = True
) -> str:
    """Return the rig's governance with a budget; a token of output costs a cent, a million of input as well."""
    route = (
        "budget: spend, max_output_tokens: 20,\n"
        '    prices: [{models: ["demo-*"], input: "0.01", output: "10000"}, {models: [free], input: "0", output: "0"}]'
    )
    text = GOVERNANCE.replace('models: ["demo-*"]', 'models: ["demo-*", free, unpriced]')
    text = text.replace("credential: model-key}]", f"{'credential: model-key, ' if credential else ''}{route}}}]")
    return text + (
        f"budgets: [{{id: spend, scope: {scope}, period: day, on_exhaust: {on_exhaust}, "
        f'limit: {{currency: USD, amount: "{limit}"}}}}]\n'
    )


def use(rig: Rig, **options: Any) -> None:
    """Release a governance to two workspaces of our own; its budget has a name of its own, so nothing is spent of it."""
    name = unused("spend")
    release(rig, governance(**options).replace("spend", name))
    rig.budget = f"coding/{name}"  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def _places(ring2: Rig) -> Iterator[None]:
    yield from networks(ring2)


@pytest.fixture(autouse=True)
def _as_before(rig: Rig, _places: None) -> Iterator[None]:
    yield
    rig.far.respond = None


def balances(rig: Rig) -> list[tuple[int, int]]:
    """Return what is held and spent in each account of the budget, in cents (what input costs is below one)."""
    database = sqlite3.connect(f"file:{rig.directory}/state/budget.db?mode=ro", uri=True)
    try:
        rows = database.execute("SELECT key, held, spent FROM account ORDER BY rowid").fetchall()
    finally:
        database.close()
    ours = f"{rig.budget}|"  # type: ignore[attr-defined]
    return [(held // 10_000, spent // 10_000) for key, held, spent in rows if key.startswith(ours)]


def ends(rig: Rig) -> list[dict[str, Any]]:
    """Return what the audit trail says of the ended charges of the budget, oldest first."""
    told = [
        event.event["unmapped"]["saw"]["budget"]
        for event in rig.broker.events
        if event.event.get("api", {}).get("operation") == "budget.settle"
    ]
    return [one for one in told if one["id"] == rig.budget]  # type: ignore[attr-defined]


@pytest.mark.control("INF-01")
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_a_call_costs_what_the_answer_says_and_the_client_sees_it_settled(rig: Rig, step: int) -> None:
    use(rig)
    whole = usage(500, 3)
    answering(rig, [whole[at : at + step] for at in range(0, len(whole), step)], JSON)
    answer = ask(rig)
    assert (answer.status, answer.body) == (200, whole), answer.body
    assert balances(rig) == [(0, 3)]
    sent = dict(rig.far.arrived[-1]["headers"])
    assert "accept-encoding" not in sent
    assert [name for name in sent if name.startswith("x-saw-")] == []
    assert [name for name in answer.headers if name.startswith("x-saw-")] == []


def test_a_service_without_a_key_is_not_asked_to_compress_either(rig: Rig) -> None:
    use(rig, credential=False)
    answering(rig, [usage(1, 2)], JSON)
    assert ask(rig).status == 200
    assert "accept-encoding" not in dict(rig.far.arrived[-1]["headers"])
    assert balances(rig) == [(0, 2)]


@pytest.mark.control("INF-01")
def test_what_does_not_fit_is_refused_before_it_leaves_and_says_what_is_left(rig: Rig) -> None:
    use(rig, limit="0.25")
    answering(rig, [usage(1, 8)], JSON)
    assert ask(rig, max_tokens=10).status == 200
    refused = ask(rig, max_tokens=17)
    assert refused.outcome == (403, "budget_exhausted")
    told = refused.json["budget"]
    assert (told["currency"], told["limit"], told["left"] // 10_000) == ("USD", 250_000, 16)
    assert told["resets_at"].endswith("T00:00:00Z")
    assert "left of the budget" in refused.json["detail"]
    assert "smaller answer" in refused.json["next_steps"][0]
    assert len(rig.far.arrived) == 1
    assert ask(rig, max_tokens=15).status == 200
    assert rig.call("GET", "/v1/models", host="inference.local", number=5, context=context(rig)).status == 200, (
        "a list of models costs nothing"
    )


@pytest.mark.control("INF-01")
def test_calls_that_nothing_bounds_or_prices_are_refused_by_name(rig: Rig) -> None:
    use(rig)
    assert ask(rig, model="unpriced").outcome == (403, "price_unknown")
    refused = ask(rig, tools=[{"type": "web_search"}])
    assert refused.outcome == (403, "budget_unbounded")
    assert "web_search" in refused.json["detail"]
    assert rig.far.arrived == []
    answering(rig, [usage(1, 1)], JSON)
    assert ask(rig, model="free").status == 200
    assert ask(rig, max_tokens=None).status == 200, "the route says how long answers are at most"


@pytest.mark.control("INF-01")
def test_workspaces_engagements_and_blueprints_share_what_policy_says(rig: Rig) -> None:
    answering(rig, [usage(1, 20)], JSON)
    use(rig, limit="0.25")
    assert [ask(rig, number=number, max_tokens=20).status for number in (5, 5, 6)] == [200, 403, 200]
    use(rig, limit="0.25", scope="blueprint")
    assert [ask(rig, number=number, max_tokens=20).status for number in (5, 5, 6)] == [200, 403, 403]
    use(rig, limit="0.25", scope="engagement")
    assert [ask(rig, number=number, max_tokens=20).status for number in (5, 5, 6)] == [200, 403, 200]


@pytest.mark.control("DEL-01")
def test_an_engagement_is_a_delegation_with_everything_that_was_made_from_it(rig: Rig) -> None:
    use(rig, limit="0.25", scope="engagement")
    answering(rig, [usage(1, 20)], JSON)
    sponsor, models = Sponsor(rig), (Resource(host="inference.local"),)
    long = {"not_before": datetime.now(UTC) - timedelta(hours=1), "expires": datetime.now(UTC) + timedelta(hours=2)}
    whole = sponsor.hand(workspace="ws-6", agent="agent-6", resources=models, **long)
    part, more, other = (
        sponsor.hand(name, parent, workspace="ws-5", agent="agent-5", resources=models)
        for name, parent in (("dlg-2", "dlg-1"), ("dlg-3", "dlg-1"), ("dlg-4", ""))
    )

    def under(delegation: str) -> tuple[int, str]:
        rig.broker.put("ws-5", delegations=[whole, delegation], delegation_required=True)
        rig.settled()
        return ask(rig, max_tokens=20).outcome

    assert under(part) == (200, "")
    assert under(more) == (403, "budget_exhausted")
    assert under(other) == (200, "")
    wait_for(lambda: len(ends(rig)) == 2, "the ends in the trail")
    assert [told["engagement"] for told in ends(rig)] == ["dlg-1", "dlg-4"]


def test_a_limit_that_only_reports_lets_calls_pass(rig: Rig) -> None:
    answering(rig, [usage(1, 20)], JSON)
    use(rig, limit="0.25", on_exhaust="report")
    assert [ask(rig, max_tokens=20).status for _ in range(3)] == [200, 200, 200]
    assert balances(rig) == [(0, 60)]


def test_more_than_was_reserved_is_recorded_as_it_is_and_the_budget_denies_then(rig: Rig) -> None:
    use(rig, limit="0.50")
    answering(rig, [usage(1, 70)], JSON)
    assert ask(rig, max_tokens=1).status == 200
    assert balances(rig) == [(0, 70)]
    assert ask(rig, max_tokens=1).outcome == (403, "budget_exhausted")


def test_a_limit_larger_than_an_event_can_tell_still_counts(rig: Rig) -> None:
    use(rig, limit="999999999999.999999")
    answering(rig, [usage(0, 10**12)], JSON)
    assert ask(rig).status == 200
    assert balances(rig) == [(0, 10**12)]
    wait_for(lambda: ends(rig), "the end in the trail")
    assert ends(rig)[0]["spent"] == ends(rig)[0]["limit"] == 2**53 - 1
    assert ask(rig, max_tokens=10**9, n=10**9).outcome == (403, "budget_exhausted")


def test_calls_that_race_at_the_cap_are_admitted_exactly_as_they_fit(rig: Rig) -> None:
    """32 calls of 7 at once under a cap of 100, while nothing is answered: 14 leave, the others are refused."""
    use(rig, limit="1.001")
    go_on = answering(rig, [], JSON, end=False)
    statuses: list[int] = []
    with ThreadPoolExecutor(32) as pool:
        calls = [pool.submit(ask, rig, max_tokens=7) for _ in range(32)]
        wait_for(
            lambda: len(rig.far.arrived) == 14 and sum(call.done() for call in calls) == 18, "14 calls on their way"
        )
        assert balances(rig) == [(98, 0)]
        go_on.set()
        statuses = [call.result().status for call in calls]
    assert sorted(statuses) == [200] * 14 + [403] * 18
    assert len(rig.far.arrived) == 14
    assert balances(rig) == [(0, 98)], "an answer without usage spends what was reserved"


@pytest.mark.parametrize(
    ("status", "cents", "rule"),
    [(400, 0, "nothing_spent"), (429, 0, "nothing_spent"), (500, 10, "reservation"), (503, 10, "reservation")],
)
def test_an_answer_that_says_no_usage_costs_what_the_rule_for_it_says(
    rig: Rig, status: int, cents: int, rule: str
) -> None:
    use(rig)
    forged = (b"x-saw-local", b"UF")
    answering(rig, [b'{"error": "no"}'], JSON, forged, status=status)
    assert ask(rig).status == status
    assert balances(rig) == [(0, cents)]
    wait_for(lambda: ends(rig), "the end in the trail")
    (told,) = ends(rig)
    assert (told["rule"], told["spent"] // 10_000, told["metered"]) == (rule, cents, False)


def test_a_failed_call_that_says_what_it_used_costs_that(rig: Rig) -> None:
    use(rig)
    answering(rig, [usage(1, 4)], JSON, status=500)
    assert ask(rig).status == 500
    assert balances(rig) == [(0, 4)]


def test_a_call_that_never_left_costs_nothing(rig: Rig) -> None:
    use(rig)
    rig.name_hosts(models_example_com="10.99.0.3")  # nobody listens on port 443 there
    answer = ask(rig)
    assert answer.status == 503
    assert balances(rig) == [(0, 0)]
    assert [name for name in answer.headers if name.startswith("x-saw-")] == []


def test_a_compressed_answer_spends_what_was_reserved(rig: Rig) -> None:
    use(rig)
    packed = gzip.compress(usage(1, 1))
    answering(rig, [packed], JSON, (b"content-encoding", b"gzip"))
    assert ask(rig).body == packed
    assert balances(rig) == [(0, 10)]


@pytest.mark.control("INF-01")
@pytest.mark.parametrize("cut", [0, 1, 5])
@pytest.mark.parametrize(
    ("target", "pieces"), [(CHAT, OPENAI), ("/v1/messages", ANTHROPIC), ("/v1/responses", RESPONSES)]
)
def test_a_stream_is_settled_by_its_own_words_however_it_is_cut(
    rig: Rig, target: str, pieces: list[bytes], cut: int
) -> None:
    use(rig)
    whole = b"".join(pieces)
    answering(rig, [whole[at : at + cut] for at in range(0, len(whole), cut)] if cut else pieces, EVENTS)
    answer = ask(rig, target, stream=True, max_output_tokens=10)
    assert (answer.status, answer.body) == (200, whole)
    assert balances(rig) == [(0, 4)]


@pytest.mark.parametrize("pieces", [OPENAI, ANTHROPIC], ids=["OpenAI", "Anthropic"])
def test_a_client_that_leaves_after_the_last_word_of_a_stream_finds_it_settled(rig: Rig, pieces: list[bytes]) -> None:
    """The service leaves the connection open; its last word is what the client waits for."""
    use(rig)
    go_on = answering(rig, pieces, EVENTS, end=False)
    with left(rig, until=pieces[-1]):
        assert balances(rig) == [(0, 4)]
    go_on.set()


def test_a_client_that_leaves_in_mid_stream_leaves_its_reservation(rig: Rig) -> None:
    use(rig)
    go_on = answering(rig, ANTHROPIC[:3], EVENTS, end=False)
    with left(rig, until=b'output_tokens": 4}}\n\n'):
        pass
    go_on.set()
    assert balances(rig) == [(10, 0)]
    answering(rig, [usage(1, 1)], JSON)
    assert ask(rig).status == 200
    assert balances(rig) == [(10, 1)]


def test_a_stream_that_does_not_say_its_usage_or_ends_early_spends_what_was_reserved(rig: Rig) -> None:
    use(rig)
    answering(rig, [OPENAI[0], OPENAI[2]], EVENTS)
    assert ask(rig, stream=True).status == 200
    assert balances(rig) == [(0, 10)]
    answering(rig, ANTHROPIC[:3], EVENTS)
    assert ask(rig, "/v1/messages", stream=True).status == 200
    assert balances(rig) == [(0, 20)]
    wait_for(lambda: len(ends(rig)) == 2, "the ends in the trail")
    assert [told["rule"] for told in ends(rig)] == ["reservation", "reservation"]
    assert "no usage" in ends(rig)[0]["why"]
    assert "did not come to its end" in ends(rig)[1]["why"]


class left:  # noqa: N801 - reads as a word
    """A call whose client reads until ``until`` has come, and leaves at the end of the block."""

    def __init__(self, rig: Rig, *, until: bytes) -> None:
        raw = json.dumps({"model": "demo-1", "messages": [], "max_tokens": 10, "stream": True}).encode()
        self.sock = context(rig).wrap_socket(rig.connect("10.210.5.1", 8443), server_hostname="ring2.saw.internal")
        head = f"POST {CHAT} HTTP/1.1\r\nhost: inference.local\r\ncontent-length: {len(raw)}\r\n\r\n"
        self.sock.sendall(head.encode() + raw)
        self.sock.settimeout(60)
        found = b""
        while until not in found.replace(b"\r\n", b"\n"):
            piece = self.sock.recv(65536)
            assert piece, found
            found += piece

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def test_what_is_told_of_a_call_names_everyone_and_arrives_once(rig: Rig) -> None:
    use(rig)
    answering(rig, [usage(1_000_000, 2)], JSON)
    assert ask(rig, number=6).status == 200
    wait_for(lambda: ends(rig), "the end in the trail")
    (told,) = ends(rig)
    assert (told["spent"], told["state"], told["rule"], told["metered"]) == (30_000, "settled", "usage", True)
    assert (told["input_tokens"], told["output_tokens"]) == (1_000_000, 2)
    assert (told["model"], told["service"], told["blueprint"]) == ("demo-1", "models.example.com", "coding")
    (opened,) = [
        event.event for event in rig.broker.events
        if event.event["unmapped"]["saw"].get("budget", {}).get("charge") == told["charge"]
        and event.event["class_uid"] == 4002
    ]  # fmt: skip
    assert opened["unmapped"]["saw"]["budget"]["state"] == "open"
    settled = next(event.event for event in rig.broker.events if event.event.get("message") == "0.03 USD spent")
    assert settled["unmapped"]["saw"]["workspace"] == "ws-6"
    assert settled["metadata"]["correlation_uid"] == opened["metadata"]["correlation_uid"]


def test_a_workspace_cannot_settle_or_name_a_charge_itself(rig: Rig) -> None:
    use(rig)
    go_on = answering(rig, [], JSON, end=False)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(ask, rig)
        wait_for(lambda: rig.far.arrived, "the call at the far end")
        database = sqlite3.connect(f"file:{rig.directory}/state/budget.db?mode=ro", uri=True)
        ((charge,),) = database.execute(
            "SELECT id FROM charge WHERE state = 'open' ORDER BY rowid DESC LIMIT 1"
        ).fetchall()
        database.close()
        forged = {"x-saw-listener": "meter", "x-saw-meter": charge, "x-saw-status": "400", "x-saw-whole": "1"}
        assert (
            rig.call("POST", "/", host="gatekeeper", headers=forged, body=b"", number=5, context=context(rig)).status
            == 403
        )
        assert balances(rig) == [(10, 0)]
        go_on.set()
        assert call.result().status == 200


def test_the_gatekeeper_killed_between_reserving_and_settling_leaves_the_reservation_counted(rig: Rig) -> None:
    use(rig, limit="0.15")
    go_on = answering(rig, [usage(1, 1)], JSON, end=False)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(ask, rig)
        wait_for(lambda: rig.far.arrived, "the call at the far end")
        rig.stop_gatekeeper(signal.SIGKILL)
        go_on.set()
        assert call.result().status == 200, "the answer is the client's, told or not"
    assert balances(rig) == [(10, 0)]
    rig.start_gatekeeper()
    wait_for(lambda: governed(rig), "the gatekeeper")
    assert ask(rig).outcome == (403, "budget_exhausted")
    assert ask(rig, max_tokens=4).status == 200


def test_a_call_whose_answer_comes_after_a_restart_of_the_gatekeeper_is_settled(rig: Rig) -> None:
    use(rig)
    go_on = answering(rig, [usage(1, 1)], JSON, end=False)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(ask, rig)
        wait_for(lambda: rig.far.arrived, "the call at the far end")
        rig.stop_gatekeeper(signal.SIGKILL)
        rig.start_gatekeeper()
        go_on.set()
        assert call.result().status == 200
    assert balances(rig) == [(0, 1)]
