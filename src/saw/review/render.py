"""What a reviewer is shown of a call: made from its bytes alone, complete or saying what is left out, escaped.

Nothing that the agent says about its call stands here. The same call gives the same text everywhere, so the digest of the
text can be signed with the decision.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from urllib.parse import unquote_plus

from saw.policy.gitproto import PushUnreadable, inflate, push_updates
from saw.review.messages import ReviewedCall

MAX_SHOWN = 256 * 1024
"""Bytes of a body that are shown as text; a longer body is cut and says so."""
MAX_HEX = 16 * 1024
"""Bytes of a body that are shown as a hex dump."""
_MAX_DEPTH = 64


class _Unreadable(ValueError):
    """The body is not of this kind."""


class _Number(str):
    """A JSON number as it was written."""

    __slots__ = ()


class _Pairs(list[tuple[str, object]]):
    """The members of a JSON object in their order, also when a name appears twice."""


def render(workspace_id: str, call: ReviewedCall) -> str:
    """Return the text that a reviewer of ``call`` sees; it ends with a newline and has no character that steers a terminal."""
    default = {"https": 443, "http": 80}[call.scheme]
    port = "" if call.port == default else f":{call.port}"
    lines = [
        f"workspace  {_plain(workspace_id)}",
        f"request    {call.method} {call.scheme}://{_plain(call.host)}{port}{_plain(call.path)}",
        *(f"header     {_plain(name)}: {_plain(value)}" for name, value in call.headers),
        f"body       {len(call.body)} bytes, sha256 {hashlib.sha256(call.body).hexdigest()}",
    ]
    if call.body:
        kind, shown = _body(call)
        lines += [f"shown as   {kind}", "", *shown]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Return ``text`` with every character that is not printable, and the backslash, written as an escape."""
    return "".join(
        "\\\\" if character == "\\" else character if character.isprintable() else _code(character)
        for character in text
    )


def _plain(text: str) -> str:
    """Like :func:`escape`, and everything beyond ASCII too: names must not pass for other names."""
    return "".join(character if character.isascii() else _code(character) for character in escape(text))


def _code(character: str) -> str:
    return f"\\u{{{ord(character):x}}}"


def _body(call: ReviewedCall) -> tuple[str, list[str]]:
    headers = dict(call.headers)
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    coding = headers.get("content-encoding", "").strip().lower()
    readers: list[tuple[str, Callable[[], list[str]]]] = []
    if call.path.partition("?")[0].endswith("/git-receive-pack"):
        readers.append(("Git push", lambda: _push(call.body, coding)))
    if coding in {"", "identity"}:
        if media == "application/json" or media.endswith("+json"):
            readers.append(("JSON", lambda: _json(call.body)))
        if media == "application/x-www-form-urlencoded":
            readers.append(("form fields", lambda: _form(call.body)))
        readers.append(("text", lambda: _text(call.body)))
    for kind, reader in readers:
        try:
            return kind, reader()
        except _Unreadable:
            continue
    return "hex dump", list(_hex(call.body))


def _decoded(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise _Unreadable from error


def _left_out(size: int, shown: int) -> list[str]:
    return [f"… {size - shown} more bytes are NOT shown"] if size > shown else []


def _text(body: bytes) -> list[str]:
    text = _decoded(body)
    if any(character < " " and character not in "\t\r\n" for character in text):
        raise _Unreadable
    cut = body[:MAX_SHOWN].decode(errors="ignore")
    return [f"| {escape(line)}" for line in cut.split("\n")] + _left_out(len(body), len(cut.encode()))


def _form(body: bytes) -> list[str]:
    text = _decoded(body)
    if len(body) > MAX_SHOWN or not text.isascii():
        raise _Unreadable
    lines = []
    for field in text.split("&"):
        name, equals, value = field.partition("=")
        try:
            pair = [unquote_plus(part, errors="strict") for part in (name, value)]
        except UnicodeDecodeError as error:
            raise _Unreadable from error
        lines.append(f"{escape(pair[0])} {equals or '(no value)'} {escape(pair[1])}".rstrip())
    return lines


def _json(body: bytes) -> list[str]:
    if len(body) > MAX_SHOWN:
        raise _Unreadable
    try:
        value = json.loads(
            _decoded(body), object_pairs_hook=_Pairs, parse_int=_Number, parse_float=_Number, parse_constant=_Number
        )
        return list(_tree(value, 0))
    except (ValueError, RecursionError) as error:
        raise _Unreadable from error


def _tree(value: object, depth: int) -> Iterator[str]:
    """Yield ``value`` as indented lines: one member or element each, numbers as they were written."""
    if depth > _MAX_DEPTH:
        raise _Unreadable
    pad = "  " * depth
    if isinstance(value, _Pairs) and value:
        count = Counter(name for name, _ in value)
        for name, item in value:
            twice = "  (this name appears more than once)" if count[name] > 1 else ""
            yield from _member(f"{pad}{_string(name)}:", item, depth, twice)
    elif isinstance(value, list) and value:
        for item in value:
            yield from _member(f"{pad}-", item, depth, "")
    else:
        yield f"{pad}{_scalar(value)}"


def _member(label: str, item: object, depth: int, remark: str) -> Iterator[str]:
    if isinstance(item, list) and item:
        yield label + remark
        yield from _tree(item, depth + 1)
    else:
        yield f"{label} {_scalar(item)}{remark}"


def _scalar(value: object) -> str:
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, _Pairs):
        return "{}"
    if isinstance(value, list):
        return "[]"
    return json.dumps(value)  # true, false, null


def _string(text: str) -> str:
    return '"' + escape(text).replace('"', '\\"') + '"'


def _push(body: bytes, coding: str) -> list[str]:
    """Return the commands of a push as ``old → new ref``, and what follows them by size and digest."""
    try:
        push_updates(body, complete=True, encoding=coding)
        data = inflate(body, coding)
    except PushUnreadable as error:
        raise _Unreadable from error
    lines, at = [], 0
    while length := int(data[at : at + 4], 16):
        line, _, asked = data[at + 4 : at + length].removesuffix(b"\n").partition(b"\x00")
        old, _, rest = line.decode("ascii", "backslashreplace").partition(" ")
        new, _, ref = rest.partition(" ")
        if ref:
            what = "create" if not old.strip("0") else "delete" if not new.strip("0") else "update"
            lines.append(f"{what}  {old} → {new}  {_plain(ref)}")
        else:
            lines.append(_plain(line.decode("ascii", "backslashreplace")))
        if asked:
            lines.append(f"asks for   {_plain(asked.decode('utf-8', 'backslashreplace').strip())}")
        at += length
    pack = data[at + 4 :]
    if coding:
        lines.append(f"the body is compressed ({coding}); its objects are NOT shown")
    elif pack:
        lines.append(f"{len(pack)} bytes of options and objects follow, sha256 {hashlib.sha256(pack).hexdigest()}")
        lines.append("what the objects hold is NOT shown: look at the new commits at their origin")
    return lines


def _hex(body: bytes) -> Iterator[str]:
    for at in range(0, min(len(body), MAX_HEX), 16):
        row = body[at : at + 16]
        letters = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
        yield f"{at:08x}  {row.hex(' '):<47}  |{letters}|"
    yield from _left_out(len(body), MAX_HEX)
