"""What a call carries (JSON, pushes, tool arguments, paths, addresses) has one meaning, compared with a plain definition."""

from __future__ import annotations

import ipaddress
import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw.policy import strict_json
from saw.policy.addresses import classify, is_blocked_host
from saw.policy.casefile import Push, push_body
from saw.policy.errors import NotCanonical
from saw.policy.gitproto import PushUnreadable, push_updates
from saw.policy.linear_regex import LinearRegex, RegexError
from saw.policy.loader import load_governance
from saw.policy.mcp import decide_tool
from saw.policy.paths import canonicalise_path

pytestmark = pytest.mark.control("RUN-01")


# Strict JSON


def strict(raw: bytes) -> object:
    return strict_json.loads(raw, limit=1 << 20)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
@settings(max_examples=examples(200), deadline=None)
def test_what_json_says_is_read_as_it_was_written(value: object) -> None:
    assert strict(json.dumps(value).encode()) == value
    assert strict(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\u0d8eE+-.1nN \t', max_size=40).map(str.encode))
@settings(max_examples=examples(400), deadline=None)
def test_strict_json_is_never_laxer_than_json(raw: bytes) -> None:
    try:
        value = strict(raw)
    except strict_json.NotStrict:
        return
    assert json.loads(raw) == value
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")


@pytest.mark.parametrize(
    "raw",
    [
        b"1e999",
        b"-1e999",
        b'"\\ud800"',
        b'{"\\uDC00": 1}',
        b'{"a": 1, "\\u0061": 2}',
        b"NaN",
        b"[Infinity]",
        b"\xff",
        b"[" * 9999,
    ],
)
def test_json_that_parsers_read_differently_is_refused(raw: bytes) -> None:
    with pytest.raises(strict_json.NotStrict):
        strict(raw)


def test_json_near_those_is_read() -> None:
    assert strict(b"1e308") == 1e308
    assert strict(b'"\\ud83d\\ude00"') == "\U0001f600"
    assert strict(b'"\\\\ud800"') == "\\ud800"
    assert strict(b'{"a": 1, "A": 2}') == {"a": 1, "A": 2}


# Git pushes

REF = st.sampled_from(["refs/heads/a", "refs/heads/b", "refs/tags/v1", "refs/heads/agent/x"])
PUSHES = st.lists(
    st.builds(Push, ref=REF, operation=st.sampled_from(["create", "update", "delete"])),
    min_size=1,
    max_size=4,
    unique_by=lambda push: push.ref,
)


@given(PUSHES)
@settings(max_examples=100, deadline=None)
def test_a_push_is_read_as_it_was_written(pushes: list[Push]) -> None:
    found = push_updates(push_body(tuple(pushes)), complete=True)
    assert [(update.ref, update.operation) for update in found] == [(push.ref, push.operation) for push in pushes]


@given(PUSHES, st.data())
@settings(max_examples=examples(200), deadline=None)
def test_a_cut_push_names_no_refs_and_a_changed_one_no_more_than_it_holds(
    pushes: list[Push], data: st.DataObject
) -> None:
    body = push_body(tuple(pushes))
    end = len(body) - len(b"PACK")
    for complete in (True, False):
        with pytest.raises(PushUnreadable):
            push_updates(body[: data.draw(st.integers(0, end - 1))], complete=complete)
    changed = bytearray(body)
    changed[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    try:
        found = push_updates(bytes(changed), complete=True)
    except PushUnreadable:
        return
    assert all(update.ref.encode() in changed for update in found)
    assert len({update.ref for update in found}) == len(found)


# Tool arguments

TOOLS = """\
schema: 1
blueprint: {name: x, version: 1.0.0, owner: team}
mcp: {servers: {s: {transport: stdio, command: [x], tools: {t: {class: auto, args: {
  path: {under: /srv/tree}, n: {type: integer, min: 1, max: 9}, word: {regex: "[a-c]{1,4}"},
  many: {type: array, max_length: 3, items: {under: /srv/tree}}, kind: {enum: [one, 2, true]}}}}}}}
"""
PLACES = st.sampled_from(
    [
        "/srv/tree/a",
        "/srv/tree",
        "/srv/tree/../x",
        "//srv/tree/a",
        "/srv/tree/./a",
        "abc",
        "abcd\n",
        "one",
        "/srv/treex",
    ]
)
VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.floats()
    | st.text(alphabet="/srvtea.\\~\x00 ", max_size=14)
    | st.sampled_from(
        [
            "/srv/tree/a",
            "/srv/tree",
            "/srv/tree/../x",
            "//srv/tree/a",
            "/srv/tree/./a",
            "abc",
            "abcd\n",
            "one",
            "/srv/treex",
        ]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


def argument_is_good(name: str, value: object) -> bool:
    """What the rules above say, said plainly."""

    def under(text: object) -> bool:
        if not isinstance(text, str) or not text.startswith("/") or not text.isprintable() or "\\" in text:
            return False
        parts = [part for part in text.split("/") if part not in {"", "."}]
        return ".." not in parts and parts[:2] == ["srv", "tree"]

    if name == "path":
        return under(value)
    if name == "n":
        return type(value) is int and 1 <= value <= 9
    if name == "word":
        return isinstance(value, str) and re.fullmatch("[a-c]{1,4}", value) is not None
    if name == "many":
        return isinstance(value, list) and len(value) <= 3 and all(map(under, value))
    # An enum of several kinds still has the type of its rule, which is text by default.
    return value == "one"


@pytest.mark.control("RUN-05")
@given(st.dictionaries(st.sampled_from(["path", "n", "word", "many", "kind", "PATH", "other"]), VALUE, max_size=4))
@settings(max_examples=examples(500), deadline=None)
def test_tool_arguments_pass_when_each_fits_its_rule(arguments: dict[str, object]) -> None:
    governance = load_governance(TOOLS.encode())
    good = all(
        name in {"path", "n", "word", "many", "kind"} and argument_is_good(name, v) for name, v in arguments.items()
    )
    decision = decide_tool(governance, "s", "t", arguments)
    assert (decision.reason or "") == ("" if good else "argument_not_allowed")


# Expressions

ATOM = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\S", "[a-c0-2]", r"[\t-\n]", r"\."])
EXPRESSION = st.recursive(
    ATOM,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,3}", "{2,}", "{0}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        inner.map(lambda text: f"({text}|)"),
    ),
    max_leaves=7,
)


@given(EXPRESSION, st.lists(st.text(alphabet="abc01\t\n.é", max_size=7), min_size=1, max_size=5))
@settings(max_examples=examples(500), deadline=None)
def test_expressions_of_the_subset_mean_what_re_says(expression: str, texts: list[str]) -> None:
    compiled = LinearRegex(expression)
    for text in texts:
        assert compiled.matches(text) == bool(re.fullmatch(expression, text, re.ASCII)), text


def executed_lines(compiled: LinearRegex, text: str) -> int:
    """Count the steps of a match: lines of Python that run in it."""
    count = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal count
        count += event == "line"
        return trace

    earlier = sys.gettrace()
    sys.settrace(trace)
    try:
        compiled.matches(text)
    finally:
        sys.settrace(earlier)
    return count


@pytest.mark.parametrize(
    ("expression", "text"),
    [("(a*)*b", "a"), ("(a|aa)+c", "a"), ("(a?){40}a{40}", "a"), ("(.*)(.*)(.*)x", "y"), ("([a-z]+)*!", "q")],
)
def test_twice_the_text_takes_at_most_twice_the_steps(expression: str, text: str) -> None:
    compiled = LinearRegex(expression)
    short, long = executed_lines(compiled, text * 400), executed_lines(compiled, text * 800)
    assert long <= 2.1 * short + 50
    assert not compiled.matches(text * 800) or re.fullmatch(expression, text * 800)


@pytest.mark.parametrize(
    "expression",
    [
        "a" + "*" * 1000,
        "a{1}{1}{1}",
        "(" * 60 + ")" * 60,
        "((a{100}){100}){100}",
        "((ab|cd|ef){0,3}){900}",
        r"[a-\d]",
        "a{2}{3}",
    ],
)
def test_expressions_that_would_cost_too_much_or_mean_two_things_are_refused(expression: str) -> None:
    with pytest.raises(RegexError):
        LinearRegex(expression)


@pytest.mark.parametrize(
    ("expression", "text"), [(".{0,1000}", "x" * 1000), ("(a?){1999}", "a" * 1999), ("(((){2000}){2000}){2000}", "")]
)
def test_large_bounds_stay_small_inside(expression: str, text: str) -> None:
    compiled = LinearRegex(expression)
    assert compiled.matches(text)
    assert not compiled.matches(text + "a")


# Paths


@given(
    st.lists(st.sampled_from(["a", "b", ".", "..", "", "a;x=1", "%61", "%2E%2E", "%2e", "..;", "%41b"]), max_size=7),
    st.booleans(),
)
@settings(max_examples=examples(400), deadline=None)
def test_a_path_leads_where_a_careful_service_would_go(parts: list[str], slash: bool) -> None:
    stack: list[str] = []
    plain = [
        part.partition(";")[0].replace("%61", "a").replace("%2E", ".").replace("%2e", ".").replace("%41", "A")
        for part in parts
    ]
    climbs = False
    for part in plain:
        if part == ".." and not stack:
            climbs = True
            break
        if part == "..":
            stack.pop()
        elif part not in {"", "."}:
            stack.append(part)
    raw = "/" + "/".join(parts) + ("/" if slash else "")
    if climbs:
        with pytest.raises(NotCanonical):
            canonicalise_path(raw)
        return
    assert [part for part in canonicalise_path(raw).split("/") if part] == stack


# Addresses

BLOCKED_NETWORKS = (
    "127.0.0.0/8",
    "169.254.0.0/16",
    "0.0.0.0/8",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "100.100.100.200/32",
    "168.63.129.16/32",
)
BLOCKED_4 = st.sampled_from([ipaddress.ip_network(text) for text in BLOCKED_NETWORKS]).flatmap(
    lambda network: st.integers(int(network[0]), int(network[-1]))
)
ANY_4 = st.integers(0, 2**32 - 1)


def numeric_forms(value: int) -> list[str]:
    a, b, c, d = value >> 24, value >> 16 & 255, value >> 8 & 255, value & 255
    return [
        str(value),
        hex(value),
        f"0X{value:08X}",
        f"0{value:o}",
        f"0x{a:x}.0x{b:x}.0x{c:x}.0x{d:x}",
        f"0{a:o}.0{b:o}.0{c:o}.0{d:o}",
        f"{a}.{value & 0xFFFFFF}",
        f"{a}.{b}.{value & 0xFFFF}",
        f"{a}.{b}.{c}.0x{d:x}",
        f"{a:03}.{b:03}.{c:03}.{d:04}",
        f"{a}.{b}.{c}.{d}.",
    ]


def carrying_forms(value: int) -> list[ipaddress.IPv6Address]:
    address = ipaddress.IPv6Address
    return [
        address(0xFFFF << 32 | value),
        address(value),
        address(0xFFFF << 48 | value),
        address(0x64FF9B << 96 | value),
        address(0x2002 << 112 | value << 80 | 0x1234),
        address(0x20010000 << 96 | value << 64 | 0xFFFF),
        address(0x20010000 << 96 | 0x5DB8D70E << 64 | value ^ 0xFFFFFFFF),
        address(0x2A00 << 112 | 0x00005EFE << 32 | value),
        address(0x2A00 << 112 | 0x02005EFE << 32 | value),
    ]


def spellings(address: ipaddress.IPv6Address) -> list[str]:
    plain = [address.compressed, address.exploded, address.exploded.upper()]
    low = int(address) & 0xFFFFFFFF
    mixed = ":".join(address.exploded.split(":")[:6]) + f":{ipaddress.IPv4Address(low)}"
    return [form for text in [*plain, mixed] for form in (text, f"[{text}]")]


@pytest.mark.control("NET-03")
@given(BLOCKED_4)
@settings(max_examples=examples(150), deadline=None)
def test_every_spelling_of_a_blocked_address_is_blocked(value: int) -> None:
    assert is_blocked_host(str(ipaddress.IPv4Address(value)))
    for form in numeric_forms(value):
        assert is_blocked_host(form), form
        assert classify(form) == "blocked", form
    for carrier in carrying_forms(value):
        for form in spellings(carrier):
            assert is_blocked_host(form), form
        assert classify(str(carrier)) == "blocked", carrier


@pytest.mark.control("NET-03")
@given(ANY_4)
@settings(max_examples=examples(150), deadline=None)
def test_an_address_that_is_not_blocked_has_exactly_one_v4_spelling(value: int) -> None:
    plain = str(ipaddress.IPv4Address(value))
    assert (is_blocked_host(plain) is None) == (classify(plain) != "blocked")
    assert all(is_blocked_host(form) for form in numeric_forms(value) if form != plain)
