"""A write of JSON beside what is there: every place that would change is named, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.review.json_text import MAX_DEPTH, Unreadable, parse_json
from saw.review.messages import ReviewedAnswer, ReviewedCall, StateContext
from saw.review.render import STATE, context_kind, push_parts, render
from saw.review.state_diff import has_state, state_of, state_question

pytestmark = pytest.mark.control("REV-01")
NOW = {"name": "rent", "amount": 100, "to": {"iban": "DE1", "a/b~c": None}, "lines": [1, 2, 3]}


def call(body: Any = None, method: str = "PUT", media: str = "application/json", **headers: str) -> ReviewedCall:
    raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"content-type": media, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return ReviewedCall(
        method=method, scheme="https", host="api.example.com", port=443, path="/v1/items/7",
        headers=tuple(named.items()) if raw else (), body=raw,
    )  # fmt: skip


def there(body: Any = NOW, status: int = 200, media: str = "application/json", **headers: str) -> StateContext:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return state_of(ReviewedAnswer(status=status, headers=(("content-type", media), *headers.items()), body=raw))


def shown(write: ReviewedCall, state: StateContext) -> list[str]:
    """Return the lines about the change, without the call itself."""
    text = render("ws-a", write, state)
    assert text.split("\n")[2] == f"shown as   {STATE}"
    assert push_parts(text) == []
    return text.split("\n# what would be sent\n")[0].split("\n# headers and body\n")[0].split("\n")[4:]


def test_a_put_takes_the_place_of_all_that_is_there():
    wanted = {"name": "rent", "amount": 4711, "to": {"iban": "DE2", "bic": "X"}, "lines": [1, 3]}
    lines = shown(call(wanted), there())
    assert lines[0].startswith(f"now        {len(json.dumps(NOW))} bytes, sha256 ")
    assert lines[1].strip() == "what is there may have changed by the time this is sent"
    assert lines[3:-1] == [
        "# 5 changes",
        "/amount: changed", "- 100", "+ 4711",
        "/to/iban: changed", '- "DE1"', '+ "DE2"',
        "/to/bic: added", '+ "X"',
        "/to/a~1b~0c: removed", "- null",
        "/lines: changed", "  - 1", "- - 2", "  - 3",
    ]  # fmt: skip
    assert "# nothing would change" in shown(call(NOW), there())


def test_the_call_itself_is_shown_whole_below():
    text = render("ws-a", call({"amount": 4711}), there())
    assert '\n# what would be sent\n"amount": 4711\n\n# headers and body\nheader     content-type' in text


@pytest.mark.parametrize("media", ["application/json", "application/merge-patch+json"])
def test_a_patch_changes_the_members_that_it_names(media):
    lines = shown(call({"amount": 1, "to": {"iban": None}, "new": {"x": 1}}, "PATCH", media), there())
    merge = media != "application/json"
    iban = ["/to/iban: removed", '- "DE1"'] if merge else ["/to/iban: changed", '- "DE1"', "+ null"]
    assert lines[3:-1] == [
        "# 3 changes among the members that are named", "/amount: changed", "- 100", "+ 1", *iban, "/new: added", '+ "x": 1',
    ]  # fmt: skip


def test_the_steps_of_a_json_patch_stand_beside_what_is_at_their_places():
    steps = [
        {"op": "replace", "path": "/amount", "value": 7},
        {"op": "remove", "path": "/lines/1"},
        {"op": "test", "path": "/name", "value": "rent"},
        {"op": "move", "from": "/name", "path": "/title"},
    ]
    lines = shown(call(steps, "PATCH", "application/json-patch+json"), there())
    assert lines[3:-1] == [
        "# the steps of the patch",
        "/amount: replace", "- 100", "+ 7",
        "/lines/1: remove", "- 2",
        "/name: test", '  "rent"', '+ "rent"',
        "/title: move from /name",
    ]  # fmt: skip


def test_a_delete_shows_what_would_go():
    lines = shown(call(method="DELETE"), there({"name": "rent", "of": [1]}))
    assert lines[3:] == ["# what would be deleted", '- "name": "rent"', '- "of":', "-   - 1", ""]


@pytest.mark.parametrize("status", [404, 410])
def test_where_nothing_is_there_it_is_said(status):
    assert shown(call({"a": 1}), there(status=status))[0] == f"now        nothing is there ({status})"


def test_if_match_says_whether_the_call_counts_for_what_was_read():
    state = there(etag='"v1"')
    assert "for this state alone" in shown(call(NOW, if_match='"v1"'), state)[1]
    assert "! " in shown(call(NOW, if_match='"v0"'), state)[1]
    assert "may have changed" in shown(call(NOW, if_match="*"), state)[1]
    assert "may have changed" in shown(call(NOW, if_match='"v0", "v1"'), state)[1], "one of several"
    assert "! " in shown(call(NOW, if_match='"v0", "v2"'), state)[1]
    assert "for this state alone" not in shown(call(NOW, if_match='W/"v1"'), there(etag='W/"v1"'))[1]


def test_names_that_appear_twice_and_numbers_of_another_form_are_changes():
    twice = b'{"amount": 100, "amount": 4711}'
    assert shown(call(twice), there({"amount": 100}))[3:-1] == [
        "# 1 change", "(the whole): changed", '- "amount": 100',
        '+ "amount": 100  (this name appears more than once)', '+ "amount": 4711  (this name appears more than once)',
    ]  # fmt: skip
    assert "/a: changed" in shown(call(b'{"a": 1.0}'), there(b'{"a": 1}'))
    assert "/a: changed" in shown(call(b'{"a": "1"}'), there(b'{"a": 1}'))
    assert "# nothing would change" in shown(call(b'{"b": 2, "a": 1}'), there(b'{"a":1,"b":2}'))


def test_nothing_in_names_or_values_steers_a_terminal_or_passes_for_a_heading():
    text = "\n".join(shown(call({"\x1b[2J\n# 0 changes": "\u202e"}), there({})))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "/\\u{1b}[2J\\u{a}# 0 changes: added" in text


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (there(status=403), "the far end answered 403"),
        (there(status=301), "the far end answered 301"),
        (there(media="text/html"), "not marked as JSON"),
        (there(b"{"), "it is no JSON"),
        (there(b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2)), "nested more than"),
        (there(json.dumps("x" * 262_145).encode()), "more than 262144 bytes"),
    ],
)
def test_what_cannot_be_compared_is_named_and_the_call_is_still_shown(state, why):
    assert (state.state, why in state.detail) == ("unreadable", True)
    text = render("ws-a", call({"amount": 1}), state)
    assert f"now        NOT read: {state.detail}" in text
    assert '"amount": 1' in text


def test_only_writes_of_json_have_a_state_and_it_is_asked_by_get_alone():
    assert has_state(call(NOW))
    assert has_state(call(NOW, "PATCH", "application/merge-patch+json; charset=utf-8"))
    assert has_state(call(method="DELETE"))
    for other in (
        call(NOW, "POST"),
        call(NOW, media="text/plain"),
        call(NOW, content_encoding="gzip"),
        call(NOW, "DELETE"),
        call(),
    ):
        assert not has_state(other)
        assert context_kind(other) is None
    question = state_question("https", "api.example.com", 8443, "/v1/items/7?a=b")
    assert (question.method, question.path, question.port, question.body) == ("GET", "/v1/items/7?a=b", 8443, b"")


def test_a_body_that_is_not_what_its_header_says_is_shown_as_what_it_is():
    text = render("ws-a", call(b"{not json"), there())
    assert "shown as   text\n\n| {not json" in text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(VALUES, VALUES)
def test_a_put_changes_nothing_exactly_when_both_say_the_same(old, new):
    lines = shown(call(json.dumps(new).encode()), there(old))
    assert ("# nothing would change" in lines) is (json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True))


@given(st.binary(max_size=200))
def test_no_bytes_are_too_odd_for_a_state(raw):
    state = there(raw)
    if state.state == "read":
        parse_json(raw)
    else:
        with pytest.raises(Unreadable):
            parse_json(raw)
    text = render("ws-a", call(raw or b"0"), state)
    assert all(line.isprintable() for line in text.split("\n"))
