"""Mails, and forms with files, as reviewers see them: who a mail goes to first, every header and part named, nothing guessed.

Read are RFC 5322 (headers), RFC 2045 and 2046 (parts), and RFC 2047 (words in other scripts), and ``multipart/form-data`` of
RFC 7578, by code of our own in bounded work: a reviewer signs the digest of what comes out, on another machine and with another
version of Python than the broker's. What is outside these forms is said to be, or the whole is not shown as a mail.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from saw.review.escapes import escape
from saw.review.json_text import Members, Unreadable, quoted

MAX_DEPTH = 8
MAX_PARTS = 200
MAX_HEADERS = 200
MAX_TEXT = 256 * 1024
"""Bytes of text that are shown of all parts together."""
_NAME = re.compile(r"[!-9;-~]{1,100}\Z")
_WORD = re.compile(r"=\?([A-Za-z0-9-]{1,32})(?:\*[A-Za-z-]*)?\?([BbQq])\?([!->@-~]{0,1000})\?=")
_PARAMETER = re.compile(r';\s*([!-~]+?)\s*=\s*("(?:[^"\\]|\\.)*"|[^;\s]*)')
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]\Z")
_CHARSETS = {
    "us-ascii": "ascii",
    "ascii": "ascii",
    "utf-8": "utf-8",
    "utf8": "utf-8",
    "iso-8859-1": "latin-1",
    "iso-8859-15": "iso8859-15",
    "windows-1252": "cp1252",
}
_FIRST = ("from", "sender", "reply-to", "to", "cc", "bcc", "subject", "date")
_MIME = ("content-type", "content-transfer-encoding", "content-disposition")
_ONCE = frozenset({*_FIRST, "message-id", "in-reply-to", "mime-version"})


class _Headers(NamedTuple):
    """Header fields in their order, names as written; ``body`` is what follows."""

    fields: list[tuple[str, str]]
    body: bytes

    def first(self, name: str) -> str:
        return next((value for known, value in self.fields if known.lower() == name), "")


class _Room:
    """What may still be shown."""

    def __init__(self) -> None:
        self.parts, self.text = MAX_PARTS, MAX_TEXT


def show_mail(raw: bytes) -> list[str]:
    """Return the lines about the mail ``raw``; raise :class:`Unreadable` for what has no headers of a mail."""
    head = _headers(raw)
    known = [name.lower() for name, _ in head.fields]
    if not {"to", "cc", "bcc"} & set(known):
        raise Unreadable("it names nobody that it goes to")
    lines: list[str] = []
    for name in _FIRST:
        lines += [line for known_as, value in head.fields if known_as.lower() == name for line in _field(name, value)]
    twice = sorted({name for name in known if name in _ONCE and known.count(name) > 1})
    lines += [f"! {name} appears more than once: readers differ in which one counts" for name in twice]
    lines += ["", *_part(head, _Room(), 0, "the mail"), "", "# all headers as they are written"]
    return lines + [f"header     {escape(name)}: {escape(value)}" for name, value in head.fields]


def show_form(raw: bytes, content_type: str) -> list[str]:
    """Return the lines about a ``multipart/form-data`` body; raise :class:`Unreadable` for what is none."""
    parts, outside = _split(raw, content_type)
    if outside:
        raise Unreadable("there is text outside its parts")
    if not parts or any(not _parameter(part.first("content-disposition"), "name") for part in parts):
        raise Unreadable("it has a part without a name")
    room = _Room()
    lines: list[str] = []
    for part in parts:
        lines += [*_part(part, room, 1, _parameter(part.first("content-disposition"), "name")), ""]
    return lines[:-1]


def mail_in(value: object) -> tuple[bytes, Members] | None:
    """Return the mail that a JSON object carries in base64url as its member ``raw``, or that of its member ``message``, as some
    mail services take it, and the object with the digest of the mail in that place; None where there is none."""
    named = value.named() if isinstance(value, Members) else None
    if named is None:
        return None
    if "raw" not in named:
        inner = mail_in(named["message"]) if isinstance(named.get("message"), Members) and "message" in named else None
        return None if inner is None else (inner[0], _with(named, "message", inner[1]))
    raw = named["raw"]
    if not isinstance(raw, str) or not re.fullmatch(r"[A-Za-z0-9_-]+={0,2}", raw):
        return None
    try:
        letters = raw.rstrip("=")
        mail = base64.b64decode(letters + "=" * (-len(letters) % 4), b"-_", validate=True)
    except binascii.Error:
        return None
    digest = hashlib.sha256(mail).hexdigest()
    return mail, _with(named, "raw", f"({len(mail)} bytes, sha256 {digest}: the mail above)")


def _with(named: dict[str, object], name: str, stands: object) -> Members:
    return Members((known, stands if known == name else item) for known, item in named.items())


def _headers(raw: bytes) -> _Headers:
    fields: list[tuple[str, str]] = []
    at = 0
    while True:
        end = raw.find(b"\n", at)
        line = raw[at : end if end >= 0 else len(raw)].removesuffix(b"\r")
        if not line:
            return _Headers(fields, raw[end + 1 :] if end >= 0 else b"")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise Unreadable("a header is not in UTF-8") from error
        if "\r" in text or "\0" in text:
            raise Unreadable("a header has a line end of another form")
        if text[0] in " \t":
            if not fields:
                raise Unreadable("it begins with the rest of a header")
            name, before = fields[-1]
            rest = text.strip(" \t")
            fields[-1] = (name, f"{before} {rest}".strip())
        else:
            name, colon, value = text.partition(":")
            if not colon or not _NAME.match(name):
                raise Unreadable("it does not begin with headers")
            fields.append((name, value.strip(" \t")))
        if len(fields) > MAX_HEADERS:
            raise Unreadable(f"it has more than {MAX_HEADERS} headers")
        if end < 0:
            return _Headers(fields, b"")
        at = end + 1


def _field(name: str, value: str) -> Iterator[str]:
    yield f"{name:<10} {escape(value)}"
    read = _WORD.sub(_word, re.sub(rf"(?<=\?=)\s+(?={_WORD.pattern})", "", value))
    if read != value:
        yield f"  reads    {escape(read)}"


def _word(found: re.Match[str]) -> str:
    charset = _CHARSETS.get(found[1].lower())
    try:
        if charset is None:
            return found[0]
        if found[2] in "Bb":
            return base64.b64decode(found[3], validate=True).decode(charset)
        return binascii.a2b_qp(found[3].replace("_", " ").encode(), header=False).decode(charset)
    except (binascii.Error, UnicodeDecodeError):
        return found[0]


def _parameter(value: str, name: str) -> str:
    """Return a parameter of a header field, empty where it is not given, or given twice."""
    found = [text for known, text in _PARAMETER.findall(value) if known.lower() == name]
    if len(found) != 1:
        return ""
    text = found[0]
    return (
        re.sub(r"\\(.)", r"\1", text[1:-1]) if text.startswith('"') and text.endswith('"') and len(text) > 1 else text
    )


def _split(body: bytes, content_type: str) -> tuple[list[_Headers], int]:
    """Return the parts of a multipart body, and how many bytes are outside them; raise :class:`Unreadable` where they cannot be
    told apart for certain."""
    boundary = _parameter(content_type, "boundary")
    if not _BOUNDARY.match(boundary):
        raise Unreadable("it has no boundary, or one of a form that readers differ in")
    marks = list(re.finditer(rb"(?:\A|\r?\n)--" + re.escape(boundary.encode()) + rb"(--)?[ \t]*(?=\r?\n|\Z)", body))
    if not marks or not marks[-1][1] or any(mark[1] for mark in marks[:-1]):
        raise Unreadable("its parts do not end where they should")
    inner = [body[begin.end() : end.start()] for begin, end in itertools.pairwise(marks)]
    parts = [_headers(one[2:] if one.startswith(b"\r\n") else one.removeprefix(b"\n")) for one in inner]
    return parts, len(body[: marks[0].start()].strip()) + len(body[marks[-1].end() :].strip())


def _part(part: _Headers, room: _Room, depth: int, name: str) -> Iterator[str]:
    """Yield a part with its headings; what cannot be taken apart is named with its size and digest."""
    kind = part.first("content-type") or "text/plain"
    media = kind.partition(";")[0].strip().lower()
    file = _parameter(part.first("content-disposition"), "filename") or _parameter(kind, "name")
    told = f" file {quoted(file)}" if file else ""
    yield f"# {escape(name)}: {escape(media)}{told}"
    room.parts -= 1
    if room.parts < 0:
        yield "… further parts are NOT shown"
        return
    if depth:
        yield from (f"header     {escape(known)}: {escape(value)}" for known, value in part.fields)
    known = [field.lower() for field, _ in part.fields]
    yield from (
        f"! {one} appears more than once: readers differ in which one counts" for one in _MIME if known.count(one) > 1
    )
    if media.startswith("multipart/") and depth < MAX_DEPTH:
        try:
            parts, outside = _split(part.body, kind)
        except Unreadable as error:
            yield f"! it cannot be taken apart: {error}"
        else:
            if outside:
                yield f"! {outside} bytes outside its parts are NOT shown; programs for mail do not show them either"
            for number, inner in enumerate(parts, 1):
                yield from _part(inner, room, depth + 1, f"{name}, part {number}")
            return
    content, warning = _decoded(part)
    if warning:
        yield f"! {warning}"
    if media == "message/rfc822" and depth < MAX_DEPTH and not warning:
        try:
            yield from _part(_headers(content), room, depth + 1, f"{name}, the mail in it")
        except Unreadable as error:
            yield f"! it is no mail: {error}"
        else:
            return
    yield f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}"
    yield from _text(content, kind, media, room)


def _decoded(part: _Headers) -> tuple[bytes, str]:
    coding = part.first("content-transfer-encoding").strip().lower()
    if coding in {"", "7bit", "8bit", "binary"}:
        return part.body, ""
    if coding == "quoted-printable":
        return binascii.a2b_qp(part.body), ""
    if coding == "base64":
        try:
            return base64.b64decode(re.sub(rb"[ \t\r\n]", b"", part.body), validate=True), ""
        except binascii.Error:
            return part.body, "it says base64 and is none: shown as it is"
    return part.body, f"it is encoded in a way that is not read: {escape(coding[:64])}"


def _text(content: bytes, kind: str, media: str, room: _Room) -> Iterator[str]:
    charset = _CHARSETS.get((_parameter(kind, "charset") or "utf-8").lower())
    if not media.startswith("text/") and media not in {"application/json", "application/xml"}:
        yield "it is NOT shown"
        return
    try:
        text = content.decode(charset or "")
    except (LookupError, UnicodeDecodeError):
        yield "it is NOT shown: not in a character set that is read"
        return
    if len(content) > room.text:
        text = content[: room.text].decode(charset or "", errors="ignore")
    yield from (f"| {escape(line)}" for line in text.replace("\r\n", "\n").split("\n"))
    if len(content) > room.text:
        yield f"… {len(content) - room.text} more bytes are NOT shown"
    room.text = max(0, room.text - len(content))


__all__ = ["mail_in", "show_form", "show_mail"]
