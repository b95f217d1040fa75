"""How much a call uses at most, what it costs, and what an answer says that it used."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.budget.bounds import ALLOWANCE, Bound, bound
from saw.budget.errors import Unbounded
from saw.budget.price import Rates, Usage, micros
from saw.budget.usage import read_usage

pytestmark = pytest.mark.control("BUD-01")

CHAT, PLAIN, CLAUDE = "/v1/chat/completions", "/v1/completions", "/v1/messages"
RESPONSES, EMBEDDINGS = "/v1/responses", "/v1/embeddings"
HELLO = [{"role": "user", "content": "hello"}]


def of(path: str, most: dict[str, int] | None = None, **body: Any) -> Bound:
    raw = {"model": "m", **body}
    return bound(path, raw, len(json.dumps(raw)), **(most or {}))


@pytest.mark.parametrize(
    ("path", "body", "output"),
    [
        (CHAT, {"messages": HELLO, "max_tokens": 5}, 5),
        (CHAT, {"messages": HELLO, "max_completion_tokens": 7}, 7),
        (CHAT, {"messages": HELLO, "max_completion_tokens": 7, "max_tokens": 900}, 900),
        (CHAT, {"messages": HELLO, "max_tokens": 5, "n": 3}, 15),
        (CHAT, {"messages": HELLO, "max_tokens": 5, "n": None}, 5),
        (PLAIN, {"prompt": "a", "max_tokens": 5}, 5),
        (PLAIN, {"prompt": ["a", "b"], "max_tokens": 5, "n": 2, "best_of": 4}, 40),
        (PLAIN, {"prompt": [1, 2, 3], "max_tokens": 5}, 5),
        (PLAIN, {"prompt": [[1, 2], [3]], "max_tokens": 5}, 10),
        (CLAUDE, {"messages": HELLO, "max_tokens": 5, "n": 9}, 5),
        (RESPONSES, {"input": "hello", "max_output_tokens": 5}, 5),
        (EMBEDDINGS, {"input": ["a", [1, 2]]}, 0),
    ],
)
def test_the_output_is_what_the_call_asks_for_times_its_copies(path: str, body: dict[str, Any], output: int) -> None:
    found = of(path, **body)
    assert (found.output, found.input) == (output, len(json.dumps({"model": "m", **body})) + ALLOWANCE)


@pytest.mark.parametrize("path", [CHAT, PLAIN, CLAUDE, RESPONSES])
def test_a_call_that_does_not_bound_its_answer_needs_the_routes_bound(path: str) -> None:
    with pytest.raises(Unbounded, match="how long the answer") as refused:
        of(path)
    assert "set max" in refused.value.cure
    assert of(path, {"max_output": 40}).output == 40


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5, "n": 0}, "n is not"),
        ({"max_tokens": 5, "N": 50}, "'N'"),
        ({"Max_Tokens": 5}, "'Max_Tokens'"),
        ({"max_tokens": 5, "web_search_options": {}}, "web_search_options"),
        ({"max_tokens": 5, "audio": {"voice": "a"}}, "audio"),
        ({"max_tokens": 5, "prediction": {"content": "a"}}, "prediction"),
        ({"max_tokens": 5, "mcp_servers": []}, "mcp_servers"),
        ({"max_tokens": 5, "service_tier": "priority"}, "service_tier"),
        ({"max_tokens": 5, "speed": "fast"}, "speed"),
        ({"max_tokens": 5, "modalities": ["text", "audio"]}, "text"),
        ({"max_tokens": 5, "tools": [{"type": "web_search_20250305"}]}, "web_search"),
        ({"max_tokens": 5, "tools": ["a"]}, "tool"),
    ],
)
def test_what_no_bound_or_price_holds_for_is_refused_by_name(body: dict[str, Any], named: str) -> None:
    with pytest.raises(Unbounded, match=named):
        of(CHAT, messages=HELLO, **body)


def test_tools_that_the_client_runs_pass() -> None:
    tools = [{"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}, {"name": "b"}]
    assert of(CHAT, messages=HELLO, tools=tools, max_tokens=5, service_tier="default", modalities=["text"]).output == 5


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a/b"}}]}]},
        ),
        (CHAT, {"messages": [{"role": "assistant", "audio": {"id": "a"}}]}),
        (CLAUDE, {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}),
        (
            CLAUDE,
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image"}]}]}]},
        ),
        (RESPONSES, {"input": "a", "previous_response_id": "r"}),
        (RESPONSES, {"input": "a", "conversation": "c"}),
        (RESPONSES, {"prompt": {"id": "p"}}),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "i"}]}),
    ],
)
def test_input_that_bytes_do_not_bound_needs_the_routes_bound(path: str, body: dict[str, Any]) -> None:
    with pytest.raises(Unbounded, match="max_input_tokens"):
        of(path, {"max_output": 5}, **body)
    assert of(path, {"max_output": 5, "max_input": 9000}, **body) == Bound(9000, 5)


def test_the_routes_bound_also_holds_for_long_texts() -> None:
    text = [{"role": "user", "content": [{"type": "text", "text": "x" * 9000}]}]
    assert of(CHAT, {"max_input": 2000}, messages=text, max_tokens=5).input == 2000
    assert of(EMBEDDINGS, {"max_input": 2000}, input=["x" * 9000, "y" * 9000]).input > 18000


def test_input_that_is_written_to_the_cache_costs_what_that_costs() -> None:
    part = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
    found = of(CLAUDE, messages=[{"role": "user", "content": part}], max_tokens=5)
    assert found.caches
    assert not of(CLAUDE, messages=HELLO, max_tokens=5).caches
    rates = Rates(1000, 2000, 100, 2500)
    assert (rates.most(1_000_000, 0, caches=True), rates.most(1_000_000, 0, caches=False)) == (2500, 1000)


def test_costs_are_whole_numbers_rounded_up() -> None:
    rates = Rates(micros("0.15"), micros("0.60"), micros("0.015"), micros("0.30"))
    assert rates.cost(Usage(1_000_000, 1_000_000, 1_000_000, 1_000_000)) == 150_000 + 600_000 + 15_000 + 300_000
    assert rates.cost(Usage(1)) == 1
    assert rates.cost(Usage()) == 0
    for bad in ("0.0000001", "-1"):
        with pytest.raises(ValueError, match="six decimals"):
            micros(bad)


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**12))
def test_a_cost_is_never_below_the_exact_one_and_less_than_one_above(
    entry: int, out: int, read: int, rate: int
) -> None:
    found = Rates(rate, rate, rate, rate).cost(Usage(entry, out, read))
    assert 0 <= found * 1_000_000 - (entry + out + read) * rate < 1_000_000


@pytest.mark.parametrize(
    ("texts", "usage"),
    [
        (['{"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}'], Usage(9, 3)),
        (
            ['{"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}'],
            Usage(5, 3, 4),
        ),
        (['{"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 20}'], Usage(9, 11)),
        (['{"prompt_tokens": 9, "total_tokens": 9}'], Usage(9, 0)),
        (['{"input_tokens": 9, "output_tokens": 3, "total_tokens": 12}'], Usage(9, 3)),
        (
            ['{"input_tokens": 9, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 2}}'],
            Usage(7, 3, 2),
        ),
        (['{"input_tokens": 25, "output_tokens": 1}', '{"output_tokens": 15}'], Usage(25, 15)),
        (
            [
                '{"input_tokens": 25, "cache_creation_input_tokens": 7, "cache_read_input_tokens": 8, "output_tokens": 1}'
            ],
            Usage(25, 1, 8, 7),
        ),
        (["null", '{"prompt_tokens": 1, "completion_tokens": 2}'], Usage(1, 2)),
        (["null"], None),
        ([], None),
        (["{}"], None),
        (['{"output_tokens": 15}'], None),
        (['{"input_tokens": 15}'], None),
        (['{"prompt_tokens": "9"}'], None),
        (['{"prompt_tokens": -9}'], None),
        (['{"prompt_tokens": 1e99}'], None),
        (['{"prompt_tokens": true}'], None),
        (['{"prompt_tokens": 9'], None),
        (["[]"], None),
    ],
)
def test_usage_is_read_in_both_shapes_and_doubt_is_nothing_said(texts: list[str], usage: Usage | None) -> None:
    assert read_usage(text.encode() for text in texts) == usage


_TOKENS = st.recursive(
    st.none() | st.integers(-5, 5) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "output", "audio", "cache_control", "text"]), inner
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["messages", "input", "prompt", "tools", "n", "max_tokens", "modalities", "service_tier", "speed"]
        ),
        _TOKENS,
    )
)
def test_no_body_makes_it_fail_in_another_way(body: dict[str, Any]) -> None:
    for path in (CHAT, PLAIN, CLAUDE, RESPONSES, EMBEDDINGS):
        try:
            found = of(path, **body)
        except Unbounded as refused:
            assert refused.cure
        else:
            assert found.input >= ALLOWANCE
            assert found.output >= 0
