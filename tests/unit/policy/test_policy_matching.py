"""Globs, paths and addresses: one meaning for every input, in bounded time."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples import examples
from saw.policy import globs
from saw.policy.addresses import classify, is_blocked_host
from saw.policy.errors import NotCanonical
from saw.policy.linear_regex import LinearRegex, RegexError
from saw.policy.paths import canonicalise_path

pytestmark = pytest.mark.control("RUN-01")


def slow_path_match(glob: list[str], path: list[str]) -> bool:
    """Say plainly what a path glob means, by recursion."""
    if not glob:
        return not path
    if glob[0] == "**":
        if len(glob) == 1:
            return len(path) >= 1
        return any(slow_path_match(glob[1:], path[cut:]) for cut in range(len(path) + 1))
    return bool(path) and slow_segment(glob[0], path[0]) and slow_path_match(glob[1:], path[1:])


def slow_segment(glob: str, text: str) -> bool:
    if glob == "*":
        return text != ""
    return re.fullmatch(".*".join(re.escape(part) for part in glob.split("*")), text) is not None


SEGMENT = st.text(alphabet="ab*", min_size=1, max_size=5).filter(lambda text: "**" not in text)
GLOB = st.lists(st.one_of(SEGMENT, st.just("**")), min_size=1, max_size=5)
PATH = st.lists(st.text(alphabet="ab", max_size=4), min_size=1, max_size=6)


@given(GLOB, PATH)
@example(["**", "a*b"], ["xa", "xab", "ab"])
@example(["**", "a", "**", "b", "**"], ["a", "b", "a", ""])
@settings(max_examples=examples(600), deadline=None)
def test_path_globs_mean_what_the_definition_says(glob: list[str], path: list[str]) -> None:
    compiled = globs.path_glob("/" + "/".join(glob))
    assert bool(compiled.fullmatch("/" + "/".join(path))) == slow_path_match(glob, path)


@given(PATH, st.data())
@settings(max_examples=examples(200), deadline=None)
def test_globs_that_match_the_same_path_overlap(path: list[str], data: st.DataObject) -> None:
    text = "/" + "/".join(path)

    def widened() -> str:
        def of(segment: str) -> str:
            options = [segment, f"{segment[:1]}*", f"*{segment[1:]}", "**"] + (["*"] if segment else [])
            return data.draw(st.sampled_from(options))

        return "/" + "/".join(of(segment) for segment in path)

    left, right = widened(), widened()
    if globs.path_glob(left).fullmatch(text) and globs.path_glob(right).fullmatch(text):
        assert globs.may_overlap(left, right)


def test_disjoint_globs_do_not_overlap() -> None:
    assert not globs.may_overlap("/a/**", "/b/**")
    assert not globs.may_overlap("/a/*/c", "/a/*/d")
    assert not globs.may_overlap("*.a.example.com", "x.example.com", ".")


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("api.example.com", ["api.example.com"], ["xapi.example.com", "api.example.com.evil.org", "api-example.com"]),
        ("*.example.com", ["a.example.com"], ["example.com", "a.b.example.com", ".example.com"]),
        ("**.example.com", ["a.example.com", "a.b.example.com"], ["example.com", "aexample.com", "..example.com"]),
        ("*-x.example.com", ["a-x.example.com", "a-b-x.example.com"], ["a.b-x.example.com", "a-y.example.com"]),
        ("a*b*c.example.com", ["abc.example.com", "aXbYbZc.example.com"], ["acb.example.com", "a.b.c.example.com"]),
    ],
)
def test_host_globs(glob: str, yes: list[str], no: list[str]) -> None:
    compiled = globs.host_glob(glob)
    assert all(compiled.fullmatch(host) for host in yes)
    assert not any(compiled.fullmatch(host) for host in no)


@pytest.mark.parametrize(
    "glob", ["*", "**", "*.com", "**.com", "a.**.example.com", "a..b.com", "-a.example.com", "a.", "é.com"]
)
def test_refused_host_globs(glob: str) -> None:
    with pytest.raises(globs.GlobError):
        globs.host_glob(glob)


def test_no_input_makes_a_glob_slow() -> None:
    started = time.process_time()
    assert not globs.path_glob("/" + "*a" * 100 + "*b").fullmatch("/" + "a" * 15_000)
    assert not globs.path_glob("/**/a" * 100 + "/b").fullmatch("/a" * 7_000)
    assert not globs.flat_glob("*a" * 100 + "*b").fullmatch("a" * 15_000)
    assert not LinearRegex("(a*)*b|(a|aa)+c").matches("a" * 3_000)
    assert time.process_time() - started < 3.0


@given(st.text(alphabet="/.%2eEfFaAzZ;?=#\\ \x00é&+~", max_size=40))
@example("/a/%2e%2e/b")
@example("/%zz")
@settings(max_examples=examples(800), deadline=None)
def test_the_canonical_form_is_a_fixed_point_without_traps(raw: str) -> None:
    try:
        canonical = canonicalise_path(raw)
    except NotCanonical:
        return
    assert canonicalise_path(canonical) == canonical
    path = canonical.partition("?")[0]
    assert path.startswith("/") and "//" not in path and ";" not in path and "\\" not in path
    assert not {".", ".."} & set(path.split("/"))
    assert path.isascii() and "%2F" not in path.upper()


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("/", "/"),
        ("/a/./b/../c", "/a/c"),
        ("/a/..", "/"),
        ("/a/b/..", "/a/"),
        ("//a///b//", "/a/b/"),
        ("/%61%7E%2D", "/a~-"),
        ("/a;x=1/b;y", "/a/b"),
        ("/a/..;/b", "/b"),
        ("/%c3%a9", "/%C3%A9"),
        ("/a%3fb?x=%2f&y=1", "/a%3Fb?x=%2F&y=1"),
        ("/a?b?c", "/a?b?c"),
        ("/a|b", "/a%7Cb"),
        ("/%252e%252e/", "/%252e%252e/"),
    ],
)
def test_canonical_paths(raw: str, canonical: str) -> None:
    assert canonicalise_path(raw) == canonical


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "a",
        "*",
        "http://a/",
        "/..",
        "/a/../..",
        "/%00",
        "/%0a",
        "/%7f",
        "/\x00",
        "/a b",
        "/é",
        "/a#b",
        "/%2f",
        "/a\\b",
        "/%5c",
        "/%",
        "/%2",
        "/%gg",
        "/%c0%ae",
        "/%ed%a0%80",
        "/%ff",
        "/a?\n",
        "/a?%00",
        "/" + "a" * 20000,
    ],
)
def test_paths_that_are_not_canonical(raw: str) -> None:
    with pytest.raises(NotCanonical):
        canonicalise_path(raw)


def test_encoded_slashes_only_where_allowed_and_never_near_dots() -> None:
    assert canonicalise_path("/a%2fb", allow_encoded_slash=True) == "/a%2Fb"
    for raw in ("/a%2f..%2fb", "/%2e%2e%2fb", "/a/..%2fb", "/..;x%2fb"):
        with pytest.raises(NotCanonical):
            canonicalise_path(raw, allow_encoded_slash=True)


@pytest.mark.control("NET-03")
@pytest.mark.parametrize(
    ("address", "reach"),
    [
        ("93.184.215.14", "public"),
        ("2606:4700::1", "public"),
        ("10.1.2.3", "private"),
        ("192.168.0.1", "private"),
        ("100.64.0.1", "private"),
        ("fd12::1", "private"),
        ("127.0.0.1", "blocked"),
        ("127.9.9.9", "blocked"),
        ("0.0.0.0", "blocked"),
        ("169.254.169.254", "blocked"),
        ("100.100.100.200", "blocked"),
        ("168.63.129.16", "blocked"),
        ("224.0.0.1", "blocked"),
        ("255.255.255.255", "blocked"),
        ("::", "blocked"),
        ("::1", "blocked"),
        ("fe80::1", "blocked"),
        ("fe80::1%eth0", "blocked"),
        ("ff02::1", "blocked"),
        ("fd00:ec2::254", "blocked"),
        ("::ffff:127.0.0.1", "blocked"),
        ("::ffff:169.254.169.254", "blocked"),
        ("::ffff:10.0.0.1", "private"),
        ("::ffff:93.184.215.14", "public"),
        ("::169.254.169.254", "blocked"),
        ("64:ff9b::a9fe:a9fe", "blocked"),
        ("64:ff9b::7f00:1", "blocked"),
        ("64:ff9b::a00:1", "private"),
        ("64:ff9b::5db8:d70e", "public"),
        ("64:ff9b:1::1", "blocked"),
        ("2002:7f00:1::1", "blocked"),
        ("2002:a9fe:a9fe::", "blocked"),
        ("2002:a00:1::", "private"),
        ("2001:0:5db8:d70e:0:0:5601:5601", "blocked"),
        ("2001:0:7f00:1::1", "blocked"),
        ("2a00::5efe:7f00:1", "blocked"),
        ("not an address", "blocked"),
        ("2130706433", "blocked"),
    ],
)
def test_classes_of_addresses(address: str, reach: str) -> None:
    assert classify(address) == reach


@pytest.mark.control("NET-03")
@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST.",
        "a.localhost",
        "metadata.google.internal",
        "metadata.google.internal.",
        "instance-data",
        "127.0.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "010.0.0.1",
        "1.2.3.4.",
        "93.184.215",
        "[::1]",
        "::1",
        "[::ffff:169.254.169.254]",
        "169.254.169.254",
        "",
        "a b",
        "a\tb",
        "a\x00b",
        "127。0。0。1",
    ],
)
def test_hosts_that_are_never_dialled(host: str) -> None:
    assert is_blocked_host(host)


@pytest.mark.parametrize(
    "host", ["example.com", "10.0.0.1", "93.184.215.14", "a1.example", "x0.example.com", "[2606:4700::1]"]
)
def test_hosts_that_may_be_dialled(host: str) -> None:
    assert is_blocked_host(host) is None


EXPRESSIONS = [
    "a",
    "a*b",
    "(a|b)+",
    "[a-c]{2,3}",
    "a?b?c",
    "[^a]b*",
    "(ab|a)(c|bc)",
    "a{0,2}b{2}",
    r"\d+\w",
    "x|",
    "(a|)b",
    "a{2,}",
]


@given(st.sampled_from(EXPRESSIONS), st.text(alphabet="abc01x", max_size=8))
@settings(max_examples=examples(500), deadline=None)
def test_linear_expressions_mean_what_re_says(expression: str, text: str) -> None:
    assert LinearRegex(expression).matches(text) == bool(re.fullmatch(expression, text))


@pytest.mark.parametrize(
    "expression", ["(", ")", "*", "a**?", "[", "a{2", "a{3,2}", r"\1", "(?=a)", "^a$", "(?i)a", "a{9999}", r"\b"]
)
def test_expressions_outside_the_subset(expression: str) -> None:
    with pytest.raises(RegexError):
        LinearRegex(expression)


@given(st.text(alphabet="ab()[]{}|*+?\\^-.,01d", max_size=20))
@settings(max_examples=examples(300), deadline=None)
def test_no_expression_crashes_the_parser(expression: str) -> None:
    with contextlib.suppress(RegexError):
        LinearRegex(expression).matches("ab01")
