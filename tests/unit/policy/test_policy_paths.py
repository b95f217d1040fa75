"""The canonical form of a path: what the rules say character by character, in time that grows with the length alone."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples import examples
from saw.policy.errors import NotCanonical
from saw.policy.paths import MAX_TARGET, canonicalise_path

pytestmark = pytest.mark.control("RUN-01")

_PLAIN = re.compile(r"(?:/[A-Za-z0-9_~!$&'()*+,=:@-][A-Za-z0-9._~!$&'()*+,=:@-]*)*/?\Z")
_PLAIN_QUERY = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/?-]*\Z")
_PERCENT = re.compile(r"%(?:([0-9A-Fa-f]{2}))?")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_ENCODE = {ord(char): f"%{ord(char):02X}" for char in ' "<>^`{|}'}
_ENCODED_RUN = re.compile(r"(?:%[89A-F][0-9A-F])+")


def decoded(match: re.Match[str]) -> str:
    digits = match[1]
    if digits is None:
        raise NotCanonical("the path has a % that two hexadecimal digits do not follow")
    value = int(digits, 16)
    if value < 0x20 or value == 0x7F:
        raise NotCanonical(f"the path has the encoded control byte %{digits}")
    if value == 0x5C:
        raise NotCanonical("the path has an encoded backslash")
    return chr(value) if value in _UNRESERVED else f"%{digits.upper()}"


def normalise(text: str, what: str) -> str:
    """Decode what needs no encoding, upper-case the rest, and refuse what two parsers may read differently."""
    for char in text:
        if char < "!" or char > "~":
            if char == " ":
                raise NotCanonical(f"the {what} has a space")
            raise NotCanonical(f"the {what} has the raw byte or character U+{ord(char):04X}")
    if "\\" in text:
        raise NotCanonical(f"the {what} has a backslash")
    if "#" in text:
        raise NotCanonical(f"the {what} has a fragment")
    result = _PERCENT.sub(decoded, text) if "%" in text else text
    for run in _ENCODED_RUN.finditer(result):
        try:
            bytes.fromhex(run[0].replace("%", "")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise NotCanonical(f"the {what} has an overlong or broken UTF-8 sequence {run[0]}") from error
    return result.translate(_ENCODE)


def segments(path: str) -> str:
    """Strip parameters, collapse empty segments and resolve dot segments."""
    parts = [segment.partition(";")[0] for segment in path.split("/")[1:]]
    resolved: list[str] = []
    for part in parts:
        if part == "..":
            if not resolved:
                raise NotCanonical("the path climbs above its root")
            resolved.pop()
        elif part not in {"", "."}:
            resolved.append(part)
    tail = "/" if resolved and parts[-1] in {"", ".", ".."} else ""
    return "/" + "/".join(resolved) + tail


def by_the_rules(raw: str, *, allow_encoded_slash: bool = False) -> str:
    """The canonical form, step by step as the rules read."""
    if len(raw) > MAX_TARGET:
        raise NotCanonical(f"the request target is longer than {MAX_TARGET} bytes")
    path, mark, query = raw.partition("?")
    if not path.startswith("/"):
        raise NotCanonical("the request target does not start with /")
    if not _PLAIN.match(path):
        path = normalise(path, "path")
        if "%2F" in path:
            if not allow_encoded_slash:
                raise NotCanonical("the path has an encoded slash (%2F), which this endpoint does not allow")
            if any(part.partition(";")[0] in {".", ".."} for part in path.replace("%2F", "/").split("/")):
                raise NotCanonical("the path has dot segments next to an encoded slash")
        path = segments(path)
    if not mark:
        return path
    if not _PLAIN_QUERY.match(query):
        query = normalise(query, "query")
    return f"{path}?{query}"


def outcome(raw: str, *, slash: bool, rules: bool) -> tuple[str, str]:
    judge = by_the_rules if rules else canonicalise_path
    try:
        return "is", judge(raw, allow_encoded_slash=slash)
    except NotCanonical as error:
        return "refused", error.message


_PIECES = st.sampled_from(
    [
        *(
            "/",
            "//",
            ".",
            "..",
            "a",
            "-",
            "~",
            "*",
            "=",
            "&",
            "?",
            "#",
            "\\",
            " ",
            "\x01",
            "\n",
            "\u00e4",
            "|",
            "<",
            ";",
            ";x",
        ),
        *(
            "%",
            "%2",
            "%zz",
            "%%41",
            "%41",
            "%2F",
            "%2f",
            "%2e",
            "%2E%2e",
            "%25",
            "%3B",
            "%00",
            "%1f",
            "%5c",
            "%7F",
            "%7E",
        ),
        *("%c3%a4", "%C3", "%A4", "%c0%af", "%e2%82%ac", "%E2%82", "%f4%90%80%80", "%\n1", "%ed%a0%80"),
    ]
)


@settings(max_examples=examples(600))
@given(st.lists(_PIECES, max_size=10).map("".join).map(lambda text: "/" + text), st.booleans())
@example("/a%2F..;x", True)
@example("/%C3/%A4", False)
@example("/..;a/b", False)
def test_the_fast_form_is_what_the_rules_say(raw: str, slash: bool) -> None:
    assert outcome(raw, slash=slash, rules=False) == outcome(raw, slash=slash, rules=True)


@given(st.text(max_size=30), st.booleans())
def test_any_text_at_all_is_judged_alike(raw: str, slash: bool) -> None:
    assert outcome(raw, slash=slash, rules=False) == outcome(raw, slash=slash, rules=True)


@given(st.lists(_PIECES, max_size=10).map("".join).map(lambda text: "/" + text), st.booleans())
def test_the_canonical_form_is_a_fixed_point(raw: str, slash: bool) -> None:
    kind, text = outcome(raw, slash=slash, rules=False)
    if kind == "is":
        assert outcome(text, slash=slash, rules=False) == ("is", text)


HOSTILE = {
    "unreserved": "%61",
    "reserved": "%40",
    "two bytes": "%C3%A4",
    "runs and text": "%C3%A4a",
    "broken at the end": "%C3%A4",
    "segments": "a/",
    "dots": "./",
    "climbing": "a/../",
    "parameters": "a;b/",
    "to be encoded": "|",
    "encoded slashes": "a%2F",
    "query": "%61",
}


def seconds(name: str, length: int) -> float:
    """Processor time of this thread, so that a busy machine changes little."""
    piece = HOSTILE[name]
    raw = ("/?" if name == "query" else "/") + piece * (length // len(piece))
    raw += "%C3" if name == "broken at the end" else ""
    begin = time.thread_time()
    outcome(raw, slash=True, rules=False)
    return time.thread_time() - begin


@pytest.mark.parametrize("name", HOSTILE)
def test_no_path_takes_long(name: str) -> None:
    """Eight times the length takes eight times as long, not sixty-four; the best of up to fifty tries of each counts."""
    longest = eighth = float("inf")
    for _ in range(50):
        longest, eighth = min(longest, seconds(name, MAX_TARGET - 16)), min(eighth, seconds(name, MAX_TARGET // 8))
        if longest < 24 * eighth:
            return
    raise AssertionError(f"{longest * 1000:.2f} ms against {eighth * 1000:.2f} ms for an eighth of it")
