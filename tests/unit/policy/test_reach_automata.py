"""Partitions of texts: every combination of patterns that a text has is found, and no other."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw.policy import globs
from saw.policy.errors import NotCanonical
from saw.policy.gitproto import PushUnreadable, push_updates
from saw.policy.linear_regex import LinearRegex, RegexError
from saw.policy.paths import canonicalise_path
from saw.policy.reach_arguments import NOTHING, Under, admits, find
from saw.policy.reach_automata import Automaton, Budget, Glob, RegexAutomaton, Table, TooLarge, partition
from saw.policy.reach_domains import any_text, canonical_path, git_ref
from saw.policy.tool_rules import Argument

pytestmark = pytest.mark.control("POL-01")


def accepts(automaton: Automaton, text: str) -> bool:
    state = automaton.start
    for char in text:
        state = automaton.step(state, char)
    return automaton.accepts(state)


def words(alphabet: str, longest: int) -> list[str]:
    return ["".join(chars) for size in range(longest + 1) for chars in itertools.product(alphabet, repeat=size)]


SEGMENT = st.text(alphabet="ab*", min_size=1, max_size=4).filter(lambda text: "**" not in text)
PATH_GLOB = st.lists(st.one_of(SEGMENT, st.just("**")), min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
HOST_GLOB = st.lists(st.one_of(SEGMENT, st.just("*")), max_size=2).flatmap(
    lambda labels: st.sampled_from([labels, ["**", *labels]]).map(lambda parts: ".".join([*parts, "a", "b"]))
)
SHORT_PATHS = ["/" + word for word in words("ab/", 5)]
SHORT_HOSTS = [word + ".a.b" for word in words("ab.", 4)] + ["a.b", "b.a.b"]


@given(PATH_GLOB)
@settings(max_examples=examples(150), deadline=None)
def test_the_automaton_of_a_path_glob_accepts_what_the_glob_does(glob: str) -> None:
    automaton, compiled = Glob.path(glob), globs.path_glob(glob)
    for path in SHORT_PATHS:
        assert accepts(automaton, path) == (compiled.match(path) is not None), path


@given(HOST_GLOB)
@settings(max_examples=100, deadline=None)
def test_the_automaton_of_a_host_glob_accepts_what_the_glob_does(glob: str) -> None:
    automaton, compiled = Glob.host(glob), globs.host_glob(glob)
    for host in SHORT_HOSTS:
        assert accepts(automaton, host) == (compiled.fullmatch(host) is not None), host


@given(st.text(alphabet="ab*", min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_the_automaton_of_a_flat_glob_accepts_what_the_glob_does(glob: str) -> None:
    automaton, compiled = Glob.flat(glob), globs.flat_glob(glob)
    for text in words("ab", 6):
        assert accepts(automaton, text) == (compiled.fullmatch(text) is not None), text


def included(smaller: str, larger: str, make: Callable[[str], Glob], domain: Table) -> bool:
    classes = partition([make(smaller), make(larger)], domain, (), Budget())
    return not any(found.mask == 1 for found in classes)


TINY = Table([({"/": 1}, -1), ({"/": 1}, 1)], {1}, "ab")
"""Texts over a, b and / that start with /."""


@given(PATH_GLOB, PATH_GLOB)
@settings(max_examples=examples(300), deadline=None)
def test_inclusion_of_globs_agrees_with_all_short_words(smaller: str, larger: str) -> None:
    left, right = globs.path_glob(smaller), globs.path_glob(larger)
    counter = next((p for p in SHORT_PATHS if left.match(p) and not right.match(p)), None)
    if counter is not None:
        assert not included(smaller, larger, Glob.path, TINY)
        return
    for found in partition([Glob.path(smaller), Glob.path(larger)], TINY, (), Budget()):
        assert bool(found.mask & 1) == (left.match(found.text) is not None)
        assert bool(found.mask & 2) == (right.match(found.text) is not None)
        if found.mask == 1:
            assert len(found.text) > 6, "a short counter-example was overlooked by the brute force"


@pytest.mark.parametrize(
    ("smaller", "larger", "expected"),
    [
        ("/a/*/c", "/a/**", True),
        ("/a/**", "/a/*/c", False),
        ("/a/**/c", "/a/**", True),
        ("/**/b/**", "/**", True),
        ("/a*b", "/a*", True),
        ("/a*", "/a*b", False),
        ("/*", "/**", True),
        ("/**", "/*", False),
    ],
)
def test_inclusion(smaller: str, larger: str, expected: bool) -> None:
    assert included(smaller, larger, Glob.path, canonical_path(encoded_slash=False)) is expected


def test_exact_words_are_classes_of_their_own() -> None:
    classes = partition([Glob.path("/a*")], canonical_path(encoded_slash=False), ["/ab", "/a", "/.."], Budget())
    assert {(found.mask, found.word) for found in classes} == {(0, None), (1, None), (1, "/ab"), (1, "/a")}


def test_a_walk_that_is_too_long_is_refused() -> None:
    automata = [Glob.path(f"/**/{c}*{c}/**/x{c}*") for c in "abcdefghijklmnop"]
    with pytest.raises(TooLarge):
        partition(automata, canonical_path(encoded_slash=False), (), Budget(per_walk=20_000))


TOKENS = [
    "/",
    ".",
    "..",
    "a",
    "%2F",
    "%41",
    "%C3",
    "%A9",
    "%E2%82%AC",
    "%5C",
    "%20",
    "[",
    ";",
    "%ED%A0%80",
    "%F0%9F%98%80",
    '"',
]


@given(st.lists(st.sampled_from(TOKENS), max_size=6), st.booleans())
@settings(max_examples=examples(500), deadline=None)
def test_the_domain_of_paths_is_the_canonical_form(tokens: list[str], slash: bool) -> None:
    path = "/" + "".join(tokens)
    try:
        fixed = canonicalise_path(path, allow_encoded_slash=slash) == path
    except NotCanonical:
        fixed = False
    assert accepts(canonical_path(encoded_slash=slash), path) == fixed


@given(st.lists(st.sampled_from(["/", ".", "lock", "a", "@", "{", "..", " "]), max_size=5))
@settings(max_examples=examples(300), deadline=None)
def test_the_domain_of_refs_is_what_git_accepts(tokens: list[str]) -> None:
    ref = "refs/" + "".join(tokens)
    line = f"{'0' * 40} {'b' * 40} {ref}".encode()
    try:
        push_updates(f"{len(line) + 4:04x}".encode() + line + b"0000", complete=False)
        good = True
    except PushUnreadable:
        good = False
    assert accepts(git_ref(), "/" + ref) == good


REGEX = st.text(alphabet="ab|()*+?.[]^-{}12\\d", max_size=8)


@given(REGEX)
@settings(max_examples=examples(400), deadline=None)
def test_the_automaton_of_an_expression_matches_what_it_does(expression: str) -> None:
    try:
        regex = LinearRegex(expression)
    except RegexError:
        return
    automaton = RegexAutomaton(expression)
    for text in words("ab1-", 3):
        assert accepts(automaton, text) == regex.matches(text), text
    for found in partition([automaton], any_text(), (), Budget()):
        assert bool(found.mask) == regex.matches(found.text)


@given(st.lists(st.sampled_from(["/", "a", "b", ".", "..", "ab", "\n"]), max_size=7))
@settings(max_examples=examples(400), deadline=None)
def test_the_automaton_of_a_directory_is_the_rule_under(tokens: list[str]) -> None:
    text = "".join(tokens)
    for base in ("/a/b", "/a", "/", "/a/"):
        assert accepts(Under(base), text) == admits(Argument(under=base), text), base


ARGUMENT = st.one_of(
    st.builds(
        Argument,
        regex=st.one_of(st.none(), st.sampled_from(["a*", "[ab]+", "a{1,3}", "(ab)*"])),
        max_length=st.one_of(st.none(), st.integers(0, 5)),
        enum=st.sampled_from([(), ("a", "b"), ("aaaa",)]),
        under=st.one_of(st.none(), st.none(), st.sampled_from(["/a", "/a/b"])),
    ),
    st.builds(
        Argument,
        type=st.sampled_from(["integer", "number"]),
        min=st.one_of(st.none(), st.integers(-3, 3), st.just(0.5)),
        max=st.one_of(st.none(), st.integers(-3, 6)),
    ),
    st.just(Argument(type="boolean")),
    st.builds(
        Argument,
        type=st.just("array"),
        items=st.builds(Argument, regex=st.sampled_from(["a", "b", "a|b"])),
        max_length=st.one_of(st.none(), st.integers(0, 3)),
    ),
)
VALUES: list[object] = [
    *words("ab", 5), "/a", "/a/b", "/a/b/c", "/b", -4, -3, 0, 1, 3, 6, 7, 0.5, 2.5, -2.5, True, False,
    [], ["a"], ["b"], ["a", "a"], ["a", "b"], ["a"] * 4, ["b"] * 4,
]  # fmt: skip


@given(ARGUMENT, ARGUMENT)
@settings(max_examples=examples(500), deadline=None)
def test_a_value_between_two_rules_is_found_when_there_is_one(inside: Argument, outside: Argument) -> None:
    value = find((inside,), (outside,), Budget())
    if value is NOTHING:
        assert [v for v in VALUES if admits(inside, v) and not admits(outside, v)] == []
    else:
        assert admits(inside, value) and not admits(outside, value)


@given(ARGUMENT, ARGUMENT)
@settings(max_examples=examples(300), deadline=None)
def test_a_value_that_two_rules_share_is_found_when_there_is_one(one: Argument, other: Argument) -> None:
    value = find((one, other), (), Budget())
    if value is NOTHING:
        assert [v for v in VALUES if admits(one, v) and admits(other, v)] == []
    else:
        assert admits(one, value) and admits(other, value)
