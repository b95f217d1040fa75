"""Limits of inference and models that others stand for: what loads, what passes, what is written into a call, what is wider."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.policy.errors import PolicyError
from saw.policy.governance import InferenceRoute
from saw.policy.inference import edit_of
from saw.policy.loader import Bundle, load_members
from saw.policy.matcher import Matcher
from saw.policy.model import Decision, Request
from saw.policy.reach_diff import diff_bundles

pytestmark = pytest.mark.control("POL-01")

BURST = {"id": "burst", "scope": "workspace", "per": "1m", "requests": 60}
FLOW = {"id": "burst", "scope": "workspace", "per": "1m", "tokens": 1000}
ROUTE = {"alias": "i.local", "models": ["demo-*"], "upstream": "https://m.example.com/v1"}


def bundle(*limits: dict[str, Any], **route: Any) -> Bundle:
    governance = {
        "schema": 1,
        "blueprint": {"name": "x", "version": "1.0.0", "owner": "team"},
        "inference": {"routes": [{**ROUTE, "limits": [limit["id"] for limit in limits], **route}]},
        "limits": list(limits),
    }
    return load_members({"policy.yaml": b"version: 1\n", "governance.yaml": json.dumps(governance).encode()})


@pytest.mark.parametrize("per", ["1s", "90s", "1m", "60m", "1h", "3600s", "day", "week", "month"])
def test_a_limit_is_per_stretch_or_per_period(per: str) -> None:
    assert bundle({**BURST, "per": per}).governance.limits[0].span in {per, 1, 90, 60, 3600}


@pytest.mark.parametrize(
    ("limits", "route", "said"),
    [
        ([{**BURST, "per": "0s"}], {}, "neither a time from 1s to 1h nor day, week or month"),
        ([{**BURST, "per": "61m"}], {}, "neither a time"),
        ([{**BURST, "per": "year"}], {}, "neither a time"),
        ([{**BURST, "requests": 0}], {}, "is not a number of requests or tokens"),
        ([{**BURST, "requests": 100_001}], {}, "more than 100000 requests in 1m"),
        ([{"id": "burst", "scope": "workspace", "per": "1m"}], {}, "limits nothing"),
        ([{**BURST, "scope": "host"}], {}, "host"),
        ([BURST, BURST], {"limits": ["burst"]}, "used twice"),
        ([BURST], {"limits": []}, "no route names the limit burst"),
        ([BURST], {"limits": ["burst", "other"]}, "unknown limit other"),
        ([BURST], {"limits": ["burst", "burst"]}, "the limit burst twice"),
        ([], {"aliases": {"fast": "other-1"}}, "the model other-1 is not among demo-*"),
        ([], {"aliases": {"fast": "demo-1", "demo-1": "demo-2"}}, "demo-1 is an alias itself"),
        ([], {"aliases": {"fast": "demo-*"}}, "is not the name of one model"),
        ([], {"aliases": {"fast": 'demo-"'}}, "is not the name of one model"),
        ([], {"aliases": {"fa*st": "demo-1"}}, "is not the name of one model"),
    ],
)
def test_what_cannot_hold_does_not_load(limits: list[dict[str, Any]], route: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError) as refused:
        bundle(*limits, **route)
    assert said in str(refused.value)


def decided(loaded: Bundle, model: str) -> Decision:
    matcher = Matcher.compile(loaded.policy, loaded.governance)
    body = json.dumps({"model": model}).encode()
    return matcher.decide(Request("https", "i.local", 443, "POST", "/v1/messages", body=body))


def test_the_model_that_another_stands_for_is_the_one_that_must_be_allowed() -> None:
    loaded = bundle(aliases={"fast": "demo-1"})
    assert decided(loaded, "fast").allowed
    refused = decided(loaded, "slow")
    assert refused.reason == "model_not_allowed"
    assert "fast, demo-*" in refused.next_steps[0]
    assert decided(bundle(), "fast").reason == "model_not_allowed"


def test_a_name_without_a_price_behind_it_is_refused() -> None:
    governance = {
        "schema": 1,
        "blueprint": {"name": "x", "version": "1.0.0", "owner": "team"},
        "inference": {
            "routes": [
                {
                    **ROUTE, "budget": "b", "aliases": {"fast": "demo-1", "slow": "demo-2"},
                    "prices": [{"models": ["demo-1", "slow"], "input": "1", "output": "1"}],
                }
            ]
        },
        "budgets": [{"id": "b", "scope": "workspace", "period": "day", "limit": {"currency": "USD", "amount": "1"}}],
    }  # fmt: skip
    loaded = load_members({"policy.yaml": b"version: 1\n", "governance.yaml": json.dumps(governance).encode()})
    assert decided(loaded, "fast").allowed
    assert decided(loaded, "slow").reason == "price_unknown"


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**18) | _TEXT, lambda inner: st.lists(inner, max_size=3), max_leaves=6
)


@given(
    before=st.dictionaries(
        _TEXT.filter(lambda key: key.casefold() != "model"), _JSON | st.just({"model": "fast"}), max_size=4
    ),
    after=st.lists(_JSON, max_size=2),
    plain=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
)
def test_only_the_model_changes_wherever_it_stands(
    before: dict[str, Any], after: list[Any], plain: bool, indent: int | None
) -> None:
    route = InferenceRoute(**{**ROUTE, "models": ("demo-*",)}, aliases={"fast": "demo-long-name"})
    value = {**before, "model": "fast", "rest": after}
    body = f" {json.dumps(value, ensure_ascii=plain, indent=indent)}\n".encode()
    edit = edit_of(route, body)
    assert edit is not None
    assert (body[edit.start : edit.end], edit.size) == (b'"fast"', len(body))
    assert json.loads(edit.apply(body)) == {**value, "model": "demo-long-name"}
    assert edit_of(route, edit.apply(body)) is None


def gained(old: Bundle, new: Bundle) -> list[tuple[str, str, bool]]:
    return [(f"{item.subject} {item.kind}", str(item.risk), item.exact) for item in diff_bundles(old, new).gained]


@pytest.mark.parametrize(
    ("old", "new", "found", "back"),
    [
        ({}, {"requests": 61}, [("budget limit", "medium", True)], []),
        ({"tokens": 5}, {}, [("budget limit", "medium", True)], []),
        ({}, {"per": "59s"}, [("budget period", "medium", True)], []),
        ({}, {"per": "day"}, [("budget period", "medium", False)], [("budget period", "medium", False)]),
        ({}, {"scope": "agent"}, [("budget scope", "high", False)], [("budget scope", "high", False)]),
        ({}, {"scope": "blueprint"}, [], [("budget scope", "high", False)]),
        ({}, {"per": "60s"}, [], []),
    ],
)
def test_a_looser_limit_is_wider(
    old: dict[str, Any], new: dict[str, Any], found: list[object], back: list[object]
) -> None:
    before, after = bundle({**BURST, **old}), bundle({**BURST, **new})
    assert gained(before, after) == found
    assert gained(after, before) == back
    if found and not back:
        assert [item.subject for item in diff_bundles(after, before).lost] == ["budget"]


def test_a_limit_taken_away_is_wider_and_a_new_one_is_not() -> None:
    other = {**BURST, "id": "other"}
    assert gained(bundle(BURST), bundle()) == [("budget unlimited", "high", True)]
    assert gained(bundle(), bundle(BURST)) == []
    assert [item.kind for item in diff_bundles(bundle(), bundle(BURST)).lost] == ["unlimited"]
    assert gained(bundle(BURST), bundle(other)) == [("budget unlimited", "high", True)]


def test_counting_fewer_tokens_is_wider() -> None:
    assert gained(bundle(FLOW), bundle(FLOW, max_output_tokens=9)) == [("budget bound", "medium", False)]
    assert gained(bundle(FLOW, max_output_tokens=9), bundle(FLOW, max_output_tokens=10)) == []
    assert gained(bundle(BURST), bundle(BURST, max_output_tokens=9)) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({}, {"fast": "demo-1"}, [("call call", "medium", True), ("setting alias", "medium", False)]),
        ({"fast": "demo-1"}, {"fast": "demo-2"}, [("setting alias", "medium", False)]),
        ({}, {"demo-9": "demo-1"}, [("setting alias", "medium", False)]),
        ({"demo-9": "demo-1"}, {}, [("setting alias", "medium", False)]),
        ({"fast": "demo-1"}, {}, []),
        ({"fast": "demo-1"}, {"fast": "demo-1"}, []),
    ],
)
def test_another_model_behind_a_name_is_wider(old: dict[str, str], new: dict[str, str], found: list[object]) -> None:
    assert gained(bundle(aliases=old), bundle(aliases=new)) == found


def test_a_name_that_nobody_may_ask_for_any_more_is_a_loss_of_calls() -> None:
    diff = diff_bundles(bundle(aliases={"fast": "demo-1"}), bundle())
    assert [item.subject for item in diff.lost] == ["call"]
    assert diff.covers(Request("https", "i.local", 443, "POST", "/v1/messages", body=b'{"model": "fast"}')) is False
