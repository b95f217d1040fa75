"""The one canonical form of a request path: made once, matched, and sent as matched.

Sources: RFC 3986 (percent encoding, dot segments), RFC 3629 (UTF-8, overlong forms), 3-policy of the design.
"""

from __future__ import annotations

import re

from saw.policy.errors import NotCanonical

MAX_TARGET = 16384
"""Longest request target (bytes) that is read."""

_PLAIN = re.compile(r"(?:/[A-Za-z0-9_~!$&'()*+,=:@-][A-Za-z0-9._~!$&'()*+,=:@-]*)*/?\Z")
_PLAIN_QUERY = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/?-]*\Z")
_ESCAPE = re.compile(r"%(..)", re.DOTALL)
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_ENCODE = tuple((char, f"%{ord(char):02X}") for char in '"<>^`{|}')
_RAW = re.compile(r"[^!-~]")
_HIGH_ESCAPE = re.compile(r"%[89A-F]")
_HIGH_BYTES = bytes(range(0x80, 0x100))
_PARAMETERS = re.compile(r";[^/]*")
_DOT_SEGMENT = re.compile(r"/\.{1,2}(?:[;/]|\Z)")


def _forms(digits: str) -> set[str]:
    return {a + b for a in (digits[0].lower(), digits[0]) for b in (digits[1].lower(), digits[1])}


_ALLOWED = [value for value in range(0x20, 0x100) if value not in {0x5C, 0x7F}]
_DECODED = {
    form: chr(value) if value in _UNRESERVED else f"%{value:02X}"
    for value in _ALLOWED
    for form in _forms(f"{value:02X}")
}
"""What stands for the two digits of an escape in the canonical form; control bytes and the backslash are missing."""
_BYTES = {form: chr(value) if value >= 0x80 else "." for value in _ALLOWED for form in _forms(f"{value:02X}")}
"""The byte behind two digits where UTF-8 has a say, as a character of Latin-1; a dot where it has none."""


def _refuse_escape(digits: str) -> NotCanonical:
    if not re.match(r"[0-9A-Fa-f]{2}\Z", digits):
        return NotCanonical("the path has a % that two hexadecimal digits do not follow")
    if digits.upper() == "5C":
        return NotCanonical("the path has an encoded backslash")
    return NotCanonical(f"the path has the encoded control byte %{digits}")


def _decode(text: str, what: str) -> str:
    """Decode the escapes that need not be any, upper-case the others; every step is one pass over the whole text."""
    parts = _ESCAPE.split(text)
    escapes = parts[1::2]
    decoded = list(map(_DECODED.get, escapes))
    if None in decoded:
        raise _refuse_escape(escapes[decoded.index(None)])
    if text.count("%") != len(escapes):
        raise _refuse_escape("")
    parts[1::2] = decoded
    result = "".join(parts)
    if _HIGH_ESCAPE.search(result):
        parts[1::2] = map(_BYTES.__getitem__, escapes)
        # Plain characters part the sequences, so the whole is good UTF-8 when each run of escapes is.
        octets = "".join(parts).encode("latin-1")
        try:
            octets.decode("utf-8")
        except UnicodeDecodeError as error:
            start = len(octets[: error.start].rstrip(_HIGH_BYTES))
            run = octets[start : len(octets) - len(octets[start:].lstrip(_HIGH_BYTES))]
            escaped = f"%{run.hex('%').upper()}"
            raise NotCanonical(f"the {what} has an overlong or broken UTF-8 sequence {escaped}") from error
    return result


def _normalise(text: str, what: str) -> str:
    """Decode what needs no encoding, upper-case the rest, and refuse what two parsers may read differently."""
    raw = _RAW.search(text)
    if raw is not None:
        if raw[0] == " ":
            raise NotCanonical(f"the {what} has a space")
        raise NotCanonical(f"the {what} has the raw byte or character U+{ord(raw[0]):04X}")
    if "\\" in text:
        raise NotCanonical(f"the {what} has a backslash")
    if "#" in text:
        raise NotCanonical(f"the {what} has a fragment")
    if "%" in text:
        text = _decode(text, what)
    for char, escape in _ENCODE:
        text = text.replace(char, escape)
    return text


def _segments(path: str) -> str:
    """Strip parameters, collapse empty segments and resolve dot segments."""
    parts = (_PARAMETERS.sub("", path) if ";" in path else path).split("/")
    resolved = [part for part in parts if part and part != "."]
    if ".." in resolved:
        climbed: list[str] = []
        for part in resolved:
            if part != "..":
                climbed.append(part)
            elif climbed:
                climbed.pop()
            else:
                raise NotCanonical("the path climbs above its root")
        resolved = climbed
    tail = "/" if resolved and parts[-1] in {"", ".", ".."} else ""
    return "/" + "/".join(resolved) + tail


def canonicalise_path(raw: str, *, allow_encoded_slash: bool = False) -> str:
    """Return the canonical form of the origin-form target ``raw`` (path, and query when there is one).

    Unreserved characters are decoded, escapes upper-cased, ``;parameters`` stripped, ``//`` collapsed and dot segments
    resolved. The query keeps its order and its escapes. The result is a fixed point. Raises :class:`NotCanonical` for a
    climb above the root, control bytes, raw non-ASCII, spaces, backslashes, fragments, ``%2F`` (unless allowed; even then
    not next to dot segments), broken or overlong UTF-8, and for anything that does not start with ``/``.
    """
    if len(raw) > MAX_TARGET:
        raise NotCanonical(f"the request target is longer than {MAX_TARGET} bytes")
    path, mark, query = raw.partition("?")
    if not path.startswith("/"):
        raise NotCanonical("the request target does not start with /")
    if not _PLAIN.match(path):
        path = _normalise(path, "path")
        if "%2F" in path:
            if not allow_encoded_slash:
                raise NotCanonical("the path has an encoded slash (%2F), which this endpoint does not allow")
            if _DOT_SEGMENT.search(path.replace("%2F", "/")):
                raise NotCanonical("the path has dot segments next to an encoded slash")
        path = _segments(path)
    if not mark:
        return path
    if not _PLAIN_QUERY.match(query):
        query = _normalise(query, "query")
    return f"{path}?{query}"
