"""Budgets in the diff of reach and in proofs: nothing may be spent that was refused before without an item that says so."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw.policy.errors import PolicyError
from saw.policy.loader import Bundle, load_members
from saw.policy.reach_budgets import compare_budgets
from saw.policy.reach_diff import diff_bundles
from saw.policy.reach_html import page, table
from saw.policy.reach_invariants import load_invariants
from saw.policy.reach_prove import Finding, prove

pytestmark = pytest.mark.control("POL-01")

DAY = {"id": "spend", "scope": "workspace", "period": "day", "limit": {"currency": "USD", "amount": "20.00"}}
ROUTE = {"alias": "i.local", "models": ["small"], "upstream": "https://m.example.com/v1"}


def bundle(*budgets: dict[str, Any], draws: str | None = "spend") -> Bundle:
    governance = {
        "schema": 1,
        "blueprint": {"name": "x", "version": "1.0.0", "owner": "team"},
        "inference": {"routes": [{**ROUTE, **({"budget": draws} if draws else {})}]},
        "budgets": list(budgets),
    }
    return load_members({"policy.yaml": b"version: 1\n", "governance.yaml": json.dumps(governance).encode()})


def gained(old: Bundle, new: Bundle) -> list[tuple[str, str, bool]]:
    return [
        (item.kind, str(item.risk), item.exact) for item in diff_bundles(old, new).gained if item.subject == "budget"
    ]


@pytest.mark.parametrize(
    ("change", "kind", "risk", "exact"),
    [
        ({"limit": {"currency": "USD", "amount": "20.01"}}, "limit", "medium", True),
        ({"limit": {"currency": "EUR", "amount": "1"}}, "currency", "high", False),
        ({"period": "week"}, "period", "medium", False),
        ({"scope": "engagement"}, "scope", "high", True),
        ({"on_exhaust": "review"}, "on_exhaust", "high", True),
        ({"on_exhaust": "report"}, "on_exhaust", "high", True),
    ],
)
def test_a_loosened_budget_is_a_widening(change: dict[str, Any], kind: str, risk: str, exact: bool) -> None:
    old, new = bundle(DAY), bundle({**DAY, **change})
    assert gained(old, new) == [(kind, risk, exact)]
    diff = diff_bundles(old, new)
    assert diff.widening
    shown = diff.to_builtins()["gained"][0]
    assert (shown["subject"], shown["region"], shown["risk"]) == ("budget", {"budget": "spend"}, risk)
    assert f"GAINED · {risk}" in table(diff)
    assert "spend: " in table(diff)
    assert "spend: " in page(diff)
    if kind not in {"currency", "period"}:
        back = diff_bundles(new, old)
        assert not back.widening
        assert [item.kind for item in back.lost] == [kind]


def test_every_other_period_is_shown() -> None:
    week, month = {**DAY, "period": "week"}, {**DAY, "period": "month"}
    assert gained(bundle(month), bundle(DAY)) == [("period", "medium", True)]
    assert gained(bundle(week), bundle(month)) == [("period", "medium", True)]
    assert gained(bundle(DAY), bundle(month)) == [("period", "medium", False)]


def test_the_same_budget_in_other_words_is_no_change() -> None:
    other = {**DAY, "limit": {"currency": "USD", "amount": "20"}, "on_exhaust": "deny"}
    diff = diff_bundles(bundle(DAY), bundle(other))
    assert (diff.gained, diff.lost) == ((), ())


def test_a_budget_taken_away_opens_the_calls_and_the_limit() -> None:
    old, new = bundle(DAY), bundle(draws=None)
    assert gained(old, new) == [("unlimited", "high", True)]
    diff = diff_bundles(old, new)
    assert {item.subject for item in diff.gained} == {"budget", "call"}
    back = diff_bundles(new, old)
    assert back.gained == ()
    assert {item.subject for item in back.lost} == {"budget", "call"}


def test_a_route_that_draws_on_another_budget_is_possibly_wider() -> None:
    other = {**DAY, "id": "other", "limit": {"currency": "USD", "amount": "1"}}
    assert gained(bundle(DAY), bundle(other, draws="other")) == [("exchanged", "high", False)]


PRICES = [{"models": ["small"], "input": "1", "output": "4"}]


def priced(**route: Any) -> Bundle:
    """Return a bundle whose calls pass, because they have prices."""
    governance = {
        "schema": 1,
        "blueprint": {"name": "x", "version": "1.0.0", "owner": "team"},
        "inference": {"routes": [{**ROUTE, "budget": "spend", "prices": PRICES, **route}]},
        "budgets": [DAY],
    }
    return load_members({"policy.yaml": b"version: 1\n", "governance.yaml": json.dumps(governance).encode()})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"prices": [{**PRICES[0], "output": "3.99"}]}, [("price", "medium", True)]),
        ({"prices": [{**PRICES[0], "cache_read": "0.1"}]}, [("price", "medium", True)]),
        ({"prices": [{**PRICES[0], "cache_write": "1.99"}]}, [("price", "medium", True)]),
        ({"prices": [{**PRICES[0], "models": ["sm*"]}]}, [("price", "medium", False)]),
        ({"prices": [{**PRICES[0], "output": "5"}]}, []),
        ({"prices": [{**PRICES[0], "cache_read": "1", "cache_write": "2.00"}]}, []),
        ({"max_output_tokens": 9}, [("bound", "medium", False)]),
        ({"max_input_tokens": 9}, [("bound", "medium", False)]),
    ],
)
def test_counting_calls_at_less_is_a_widening(change: dict[str, Any], found: list[tuple[str, str, bool]]) -> None:
    assert gained(priced(), priced(**change)) == found
    if found and found[0][0] == "bound":
        assert gained(priced(**change), priced()) == []


def test_a_price_opens_the_calls_of_its_models() -> None:
    diff = diff_bundles(bundle(DAY), priced())
    assert {item.subject for item in diff.gained} == {"call"}
    assert not diff_bundles(priced(), bundle(DAY)).widening
    both = {"models": ["small", "large"]}
    more = [*PRICES, {"models": ["large"], "input": "1", "output": "1"}]
    diff = diff_bundles(priced(**both), priced(**both, prices=more))
    assert {item.subject for item in diff.gained} == {"call", "budget"}
    assert {item.subject for item in diff_bundles(priced(**both, prices=more), priced(**both)).lost} == {"call"}


_BUDGETS = st.fixed_dictionaries(
    {
        "id": st.just("spend"),
        "scope": st.sampled_from(["engagement", "workspace", "blueprint"]),
        "period": st.sampled_from(["day", "week", "month"]),
        "limit": st.fixed_dictionaries(
            {"currency": st.just("USD"), "amount": st.sampled_from(["1", "2", "3.5", "10"])}
        ),
        "on_exhaust": st.sampled_from(["deny", "report"]),
    }
)
#: Spends: day (a week has 7, a month 30 of them), workspace, engagement within it, amount.
_SPENDS = st.lists(
    st.tuples(st.integers(0, 65), st.integers(0, 1), st.integers(0, 1), st.sampled_from([1, 2, 4])), max_size=12
)


def passes(budget: dict[str, Any], spends: list[tuple[int, int, int, int]]) -> bool:
    """Whether a meter that counted would let all of ``spends`` through."""
    if budget["on_exhaust"] != "deny":
        return True
    length = {"day": 1, "week": 7, "month": 30}[budget["period"]]
    sums: dict[object, int] = {}
    for day, workspace, engagement, amount in spends:
        who = {"blueprint": (), "workspace": (workspace,), "engagement": (workspace, engagement)}[budget["scope"]]
        sums[day // length, who] = sums.get((day // length, who), 0) + amount
    return all(Decimal(total) <= Decimal(budget["limit"]["amount"]) for total in sums.values())


@settings(max_examples=examples(400), deadline=None)
@given(_BUDGETS, _BUDGETS, _SPENDS)
def test_whatever_may_be_spent_anew_is_told(
    before: dict[str, Any], after: dict[str, Any], spends: list[tuple[int, int, int, int]]
) -> None:
    if passes(after, spends) and not passes(before, spends):
        assert compare_budgets(bundle(before).governance, bundle(after).governance)


def finding(content: Bundle, **fields: Any) -> Finding:
    raw = json.dumps({"schema": 1, "invariants": [{"id": "one", "kind": "inference_within_budget", **fields}]})
    (result,) = prove(content, load_invariants(raw.encode()))
    return result


def usd(amount: str) -> dict[str, str]:
    return {"currency": "USD", "amount": amount}


@pytest.mark.parametrize(
    ("period", "limit", "asked", "verdict"),
    [
        ("day", "20", "day", "holds"),
        ("day", "20.01", "day", "broken"),
        ("month", "20", "day", "holds"),
        ("day", "20", "month", "broken"),
        ("day", "0.64", "month", "holds"),
        ("week", "3.33", "month", "holds"),
        ("week", "3.34", "month", "broken"),
        ("month", "10", "week", "holds"),
        ("month", "10.01", "week", "broken"),
    ],
)
def test_a_limit_is_proven_over_calendar_periods(period: str, limit: str, asked: str, verdict: str) -> None:
    content = bundle({**DAY, "period": period, "limit": usd(limit)})
    found = finding(content, limit=usd("20"), period=asked)
    assert found.verdict == verdict, found.detail
    assert found.rules == (() if verdict == "holds" else ("inference.routes[0]",))


def test_what_breaks_the_promise_is_named() -> None:
    assert "draws on no budget" in finding(bundle(draws=None), limit=usd("20"), period="day").detail
    assert finding(bundle(draws=None), limit=usd("20"), period="day", hosts=["*.other.local"]).verdict == "holds"
    soft = finding(bundle({**DAY, "on_exhaust": "report"}), limit=usd("20"), period="day")
    assert (soft.verdict, "no hard stop" in soft.detail) == ("broken", True)
    assert "is in USD" in finding(bundle(DAY), limit={"currency": "EUR", "amount": "99"}, period="day").detail


@pytest.mark.parametrize(
    "fields",
    [
        {"limit": usd("20")},
        {"period": "day"},
        {"limit": usd("0"), "period": "day"},
        {"limit": usd("1"), "period": "year"},
    ],
)
def test_a_promise_without_limit_or_period_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        finding(bundle(DAY), **fields)
