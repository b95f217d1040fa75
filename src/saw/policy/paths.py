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
_PERCENT = re.compile(r"%(?:([0-9A-Fa-f]{2}))?")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_ENCODE = {ord(char): f"%{ord(char):02X}" for char in ' "<>^`{|}'}
_ENCODED_RUN = re.compile(r"(?:%[89A-F][0-9A-F])+")


def _decoded(match: re.Match[str]) -> str:
    digits = match[1]
    if digits is None:
        raise NotCanonical("the path has a % that two hexadecimal digits do not follow")
    value = int(digits, 16)
    if value < 0x20 or value == 0x7F:
        raise NotCanonical(f"the path has the encoded control byte %{digits}")
    if value == 0x5C:
        raise NotCanonical("the path has an encoded backslash")
    return chr(value) if value in _UNRESERVED else f"%{digits.upper()}"


def _normalise(text: str, what: str) -> str:
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
    result = _PERCENT.sub(_decoded, text) if "%" in text else text
    for run in _ENCODED_RUN.finditer(result):
        try:
            bytes.fromhex(run[0].replace("%", "")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise NotCanonical(f"the {what} has an overlong or broken UTF-8 sequence {run[0]}") from error
    return result.translate(_ENCODE)


def _segments(path: str) -> str:
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
            if any(part.partition(";")[0] in {".", ".."} for part in path.replace("%2F", "/").split("/")):
                raise NotCanonical("the path has dot segments next to an encoded slash")
        path = _segments(path)
    if not mark:
        return path
    if not _PLAIN_QUERY.match(query):
        query = _normalise(query, "query")
    return f"{path}?{query}"
