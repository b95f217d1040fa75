"""Texts and bytes that are nearly right: what fuzzers of parsers send beside plain rubbish."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from hypothesis import strategies as st

_STRANGE = (
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b'"',
    b"'",
    b"\\",
    b"\n",
    b"\r\n",
    b" ",
    b"-1",
    b"9" * 400,
    b"1e999",
    b"\t",
    b"%00",
    b"%ff",
    b"{",
    b"[" * 3000,
    b"]",
    b",",
    b"=",
    b"/../",
    b";",
    b"\x1b[2J",
    "\u2028".encode(),
    b"AAAA",
)
_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    2**31,
    2**63,
    2**64,
    10**30,
    0.5,
    -0.0,
    "",
    "x" * 5000,
    "\0",
    "é\u2028",
    " ",
    [],
    {},
    [None],
    {"a": {}},
    "9999-12-31T23:59:59Z",
    "0001-01-01T00:00:00+23:59",
    "2026-01-01T00:00:00",
    "-",
    "1",
    "a" * 64,
)
_PEM = re.compile(rb"-----BEGIN ([A-Z ]+)-----\n(.*?)-----END", re.DOTALL)


@st.composite
def bytes_near(draw: st.DrawFn, good: tuple[bytes, ...]) -> bytes:
    """One of ``good`` with up to four changes: bytes exchanged, cut out, doubled or put in, or the end cut off."""
    raw = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        until = draw(st.integers(at, min(len(raw), at + 40)))
        match draw(st.integers(0, 5)):
            case 0:
                raw[at:until] = draw(st.binary(max_size=until - at))
            case 1:
                del raw[at:until]
            case 2:
                raw[at:at] = raw[at:until]
            case 3:
                raw[at:at] = draw(st.sampled_from(_STRANGE))
            case 4 if raw:
                place = min(at, len(raw) - 1)
                raw[place] ^= 1 << draw(st.integers(0, 7))
            case _:
                del raw[at:]
    return bytes(raw)


def _exchanged(draw: st.DrawFn, value: Any) -> Any:
    """``value`` with one part of it, anywhere below, exchanged, left out or put in."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        match draw(st.integers(0, 4)):
            case 0:
                return {name: one for name, one in value.items() if name != key}
            case 1:
                return {
                    **value,
                    draw(st.sampled_from(["", "x", "type", "\ud800", "a" * 300])): draw(st.sampled_from(_VALUES)),
                }
        return {**value, key: _exchanged(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        if draw(st.booleans()):
            return [*value, value[at]]
        return [*value[:at], _exchanged(draw, value[at]), *value[at + 1 :]]
    return draw(st.sampled_from(_VALUES))


@st.composite
def json_near(draw: st.DrawFn, good: tuple[bytes, ...]) -> bytes:
    """One of ``good``, which are JSON, with up to three of its parts exchanged; sometimes nested beyond all depth."""
    value = json.loads(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(1, 3))):
        value = _exchanged(draw, value)
    raw = json.dumps(value, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    if draw(st.integers(0, 7)) == 0:
        raw = re.sub(rb"(null|0|\"\")", lambda _: b"[" * 50_000 + b"]" * 50_000, raw, count=1)
    return raw


@st.composite
def pem_near(draw: st.DrawFn, good: tuple[bytes, ...]) -> bytes:
    """One of ``good``, which are PEM, with changes in what is encoded there, so that the outermost form holds."""
    raw = draw(st.sampled_from(good))
    found = _PEM.search(raw)
    assert found is not None
    der = draw(bytes_near((base64.b64decode(found[2]),)))
    lines = base64.encodebytes(der)
    return b"-----BEGIN " + found[1] + b"-----\n" + lines + b"-----END " + found[1] + b"-----\n"


def near(good: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """What is nearly one of ``good``, in the ways that fit their form, and rubbish."""
    ways = [st.binary(max_size=200), bytes_near(good)]
    if all(one.startswith((b"{", b"[")) for one in good):
        ways.append(json_near(good))
    if all(one.startswith(b"-----BEGIN ") for one in good):
        ways += [pem_near(good), pem_near(good)]
    return st.one_of(*ways)
