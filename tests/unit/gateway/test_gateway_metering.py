"""How a charge ends by what ring 2's Envoy tells of the answer, and a perimeter without a ledger."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.budget.price import Rates, Usage
from saw.gateway.metering import Outcome, Told, judged, rates_of, read_told
from saw.gateway.paying import Unpaid, pay
from saw.gateway.state import WorkspaceEntry
from saw.gateway.usage_filter import BETWEEN, TOLD_HEADERS, usage_filter
from saw.gateway.view import EMPTY
from saw.policy.governance import Price
from saw.policy.loader import load_members
from saw.policy.matcher import Matcher
from saw.policy.model import Request

pytestmark = pytest.mark.control("BUD-01")

SAID = b'{"prompt_tokens": 3, "completion_tokens": 4}'
WHOLE = Told(charge="c", status=200, flags="", whole=True, encoding="", texts=(SAID,))


def ends(**changes: object) -> Outcome:
    return judged(msgspec.structs.replace(WHOLE, **changes))


def test_reported_usage_counts_whatever_the_status() -> None:
    for status in (200, 400, 500):
        assert ends(status=status).usage == Usage(3, 4)


@pytest.mark.parametrize(
    ("changes", "rule", "why"),
    [
        ({"texts": ()}, "reservation", "no usage"),
        ({"texts": (b"{}",)}, "reservation", "no usage"),
        ({"whole": False}, "reservation", "did not come to its end"),
        ({"encoding": "gzip"}, "reservation", "encoded (gzip)"),
        ({"texts": (), "status": 500}, "reservation", "no usage"),
        ({"texts": (), "status": 408}, "reservation", "no usage"),
        ({"texts": (), "status": 0}, "reservation", "no usage"),
        ({"texts": (), "status": 429}, "nothing_spent", "refused the call (429)"),
        ({"whole": False, "status": 400}, "nothing_spent", "refused the call (400)"),
        ({"texts": (), "flags": "UF", "status": 503}, "nothing_spent", "was not sent (UF)"),
        ({"texts": (), "flags": "UF,URX", "status": 503}, "reservation", "no answer came"),
        ({"texts": (), "flags": "UC", "status": 400}, "reservation", "no answer came"),
    ],
)
def test_only_a_clear_word_gives_money_back(changes: dict[str, object], rule: str, why: str) -> None:
    found = ends(**changes)
    assert (found.rule, found.usage) == (rule, None)
    assert why in found.why


@given(st.lists(st.tuples(st.sampled_from([*TOLD_HEADERS, "host"]), st.text(max_size=6))), st.binary(max_size=60))
def test_whatever_is_told_is_read_and_never_settles_below_what_was_reserved_by_chance(
    headers: list[tuple[str, str]], body: bytes
) -> None:
    raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers]
    told = read_told(raw, body, TOLD_HEADERS, BETWEEN)
    found = judged(told)
    assert found.rule in {"usage", "nothing_spent", "reservation"}
    if found.rule == "usage":
        assert told.whole


def test_a_price_without_words_about_the_cache_counts_reads_as_input_and_writes_twice() -> None:
    assert rates_of(Price(models=("m",), input="1", output="2")) == Rates(1_000_000, 2_000_000, 1_000_000, 2_000_000)
    told = Price(models=("m",), input="1", output="2", cache_read="0.1", cache_write="1.25")
    assert rates_of(told) == Rates(1_000_000, 2_000_000, 100_000, 1_250_000)


def test_without_a_ledger_a_call_that_is_counted_is_refused_and_others_pass() -> None:
    governance = b"""
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team-x}
inference:
  routes:
    - {alias: free.local, models: ["*"], upstream: "https://m.example.com/v1"}
    - {alias: paid.local, models: ["*"], upstream: "https://m.example.com/v1", budget: spend,
       prices: [{models: ["*"], input: "1", output: "1"}]}
    - {alias: limited.local, models: ["*"], upstream: "https://m.example.com/v1", limits: [burst]}
limits: [{id: burst, scope: workspace, per: 1m, requests: 5}]
budgets: [{id: spend, scope: workspace, period: day, limit: {currency: USD, amount: "1"}}]
"""
    bundle = load_members({"policy.yaml": b"version: 1\n", "governance.yaml": governance})
    matcher = Matcher.compile(bundle.policy, bundle.governance)
    entry = WorkspaceEntry(id="ws-1", number=1, state="active")

    class Loaded:
        governance = bundle.governance
        blueprint, digest = "coding", "aa" * 32

    def paid(host: str, method: str, path: str) -> object:
        request = Request("https", host, 443, method, path, body=b'{"model": "m"}')
        decision = matcher.decide(request)
        assert decision.allowed
        asked = pay(None, request, decision, Loaded(), entry, view=EMPTY, delegation="", request_id="")  # type: ignore[arg-type]
        return asyncio.run(asked)

    for host in ("paid.local", "limited.local"):
        with pytest.raises(Unpaid, match="has no ledger") as refused:
            paid(host, "POST", "/v1/messages")
        assert refused.value.reason == "budget_unenforced"
    assert paid("limited.local", "GET", "/v1/models") is None
    assert paid("paid.local", "GET", "/v1/models") is None
    assert paid("free.local", "POST", "/v1/messages") is None


def test_every_name_in_the_filter_is_filled_in() -> None:
    for drop in (True, False):
        source = usage_filter(drop_mark=drop)
        for word in ("_HEADER", "_MARK", "METER_SEAT", "LONGEST"):
            assert word not in source
        assert f"if {str(drop).lower()} then headers:remove" in source
