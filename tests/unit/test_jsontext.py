"""Every text that is no JSON ends in one error, which holds nothing of the text; what is JSON is read as msgspec reads it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw import jsontext


class Told(msgspec.Struct, frozen=True):
    word: str = ""
    more: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"word": "\xff"}', "a text in it is not UTF-8"),
        (b'{"more": {"\xff": 1}}', "a text in it is not UTF-8"),
        (b'{"more": {"a": ' + b"[" * 60_000, "nested too deeply"),
        (b'{"unknown": ' + b"[" * 60_000, "nested too deeply"),
        (b'{"word": 1}', "Expected `str`"),
        (b'{"word"', "truncated"),
        (b"", "truncated"),
    ],
)
def test_what_is_no_json_is_one_error(raw: bytes, words: str) -> None:
    with pytest.raises(msgspec.DecodeError, match=words) as told:
        jsontext.decode(raw, Told)
    # an error on the way to this one could hold the bytes, which may be a secret
    assert told.value.__cause__ is None
    assert told.value.__suppress_context__ or told.value.__context__ is None


def test_what_is_json_is_read() -> None:
    assert jsontext.decode('{"word": "é", "more": {"a": [1]}, "unknown": [[]]}', Told) == Told("é", {"a": [1]})
    assert jsontext.decode(b"[1, null]") == [1, None]


WORDS = st.text(alphabet='{}[]",:\\u0d8é\udfff1e', max_size=60)


@given(st.binary(max_size=80) | WORDS.map(lambda word: word.encode(errors="surrogatepass")))
@settings(max_examples=examples(800), deadline=None)
def test_no_text_ends_otherwise(raw: bytes) -> None:
    for kind in (Any, Told, dict[str, Any], msgspec.Raw):
        with suppress(msgspec.DecodeError):
            jsontext.decode(raw, kind)
