"""Commits, tags and trees of Git, read strictly; names in a tree that mislead are told.

Sources: Git's ``gitformat-*`` pages and ``git-fsck``.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

import msgspec

MAX_LINES = 400
"""Most header lines of a commit or tag that are read."""
TREE, SUBMODULE, LINK = "40000", "160000", "120000"
MODES = {"100644": "file", "100755": "program", LINK: "symbolic link", SUBMODULE: "submodule"}
"""What a mode of a tree's entry means; a folder has :data:`TREE`."""

_OID = re.compile(r"(?:[0-9a-f]{40}|[0-9a-f]{64})\Z")
_WHO = re.compile(rb"(?s)(.*) (-?[0-9]{1,12}) ([+-][0-9]{4})\Z")
_DOT_GIT = re.compile(rb"(?:\.git|git~[0-9]+)[ .]*(?:\Z|:)", re.IGNORECASE)
#: Characters that some file systems leave out of names (HFS+): with them, other names become .git.
_IGNORED = re.compile("[\u200c-\u200f\u202a-\u202e\u206a-\u206f\ufeff]")


class Unreadable(ValueError):
    """The object is not well-formed; the text says why."""


class Signed(msgspec.Struct, frozen=True):
    """Who did something, as the object says, and when (RFC 3339; empty where it cannot be read)."""

    who: bytes
    when: str


class Commit(msgspec.Struct, frozen=True):
    """A commit. ``more`` are the names of further headers, such as ``gpgsig``."""

    tree: str
    parents: tuple[str, ...]
    author: Signed
    committer: Signed
    message: bytes
    more: tuple[bytes, ...]


class Tag(msgspec.Struct, frozen=True):
    """An annotated tag: what it points to, and what it says."""

    target: str
    kind: str
    tagger: Signed | None
    name: bytes
    message: bytes


class Entry(msgspec.Struct, frozen=True):
    """One name in a tree. ``mode`` is octal as it is written."""

    mode: str
    name: bytes
    oid: str


def read_commit(data: bytes) -> Commit:
    """Return a commit; raise :class:`Unreadable`."""
    headers, message = _headers(data)
    names = [name for name, _ in headers]
    found = dict(headers)
    if names[:1] != [b"tree"] or names.count(b"tree") != 1 or names.count(b"author") != 1:
        raise Unreadable("it has not one tree and one author")
    if names.count(b"committer") != 1:
        raise Unreadable("it has not one committer")
    parents = tuple(_oid(value) for name, value in headers if name == b"parent")
    known = {b"tree", b"parent", b"author", b"committer"}
    more = tuple(name for name in names if name not in known)
    return Commit(_oid(found[b"tree"]), parents, _signed(found[b"author"]), _signed(found[b"committer"]), message, more)


def read_tag(data: bytes) -> Tag:
    """Return an annotated tag; raise :class:`Unreadable`."""
    headers, message = _headers(data)
    found = dict(headers)
    if [name for name, _ in headers[:3]] != [b"object", b"type", b"tag"]:
        raise Unreadable("it does not say what it points to")
    tagger = found.get(b"tagger")
    kind = found[b"type"].decode("ascii", "replace")
    if kind not in {"commit", "tree", "blob", "tag"}:
        raise Unreadable("it points to something of no type that exists")
    return Tag(_oid(found[b"object"]), kind, None if tagger is None else _signed(tagger), found[b"tag"], message)


def read_tree(data: bytes, hash_size: int) -> list[Entry]:
    """Return the entries of a tree in their order; raise :class:`Unreadable`."""
    entries, at = [], 0
    while at < len(data):
        space = data.find(b" ", at, at + 8)
        end = data.find(b"\0", space) if space > at else -1
        mode = data[at:space]
        if end < 0 or end + 1 + hash_size > len(data) or not re.fullmatch(rb"[0-7]{1,6}", mode):
            raise Unreadable("an entry of it is cut")
        at = end + 1 + hash_size
        entries.append(Entry(mode.decode().lstrip("0"), data[space + 1 : end], data[end + 1 : at].hex()))
    return entries


def order_problems(entries: list[Entry]) -> list[str]:
    """Return what is wrong with the order of a tree: names that appear twice, or out of their order."""
    names = [entry.name for entry in entries]
    found = []
    if len(set(names)) != len(names):
        found.append("a name appears more than once in it: which one counts depends on who reads it")
    keys = [entry.name + (b"/" if entry.mode == TREE else b"") for entry in entries]
    if keys != sorted(keys):
        found.append("its names are not in order: programs may not find them")
    return found


def name_problem(name: bytes) -> str:
    """Return why a name in a tree misleads; empty when it does not."""
    if name in {b"", b".", b".."} or b"/" in name:
        return "this name leads out of its folder"
    folded = _IGNORED.sub("", name.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    if any(_DOT_GIT.match(part) for part in (folded, *folded.split(b"\\"))):
        return "on some systems this name is Git's own folder, which holds programs that Git runs"
    if b"\\" in name:
        return "this name has a backslash: some systems take it for a folder"
    if any(byte < 0x20 or byte == 0x7F for byte in name):
        return "this name has control characters"
    return ""


def _headers(data: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the headers in their order, continued lines joined, and the text after them."""
    found: list[tuple[bytes, bytes]] = []
    at = 0
    for _ in range(MAX_LINES):
        end = data.find(b"\n", at)
        if end < 0:
            raise Unreadable("its headers do not end")
        line, at = data[at:end], end + 1
        if not line:
            return found, data[at:]
        name, _, value = line.partition(b" ")
        if line.startswith(b" ") and found:
            found[-1] = (found[-1][0], found[-1][1] + b"\n" + line[1:])
        elif not name or not value:
            raise Unreadable("a header line of it cannot be read")
        else:
            found.append((name, value))
    raise Unreadable(f"it has more than {MAX_LINES} header lines")


def _oid(raw: bytes) -> str:
    text = raw.decode("ascii", "replace")
    if not _OID.match(text):
        raise Unreadable("the name of an object in it cannot be read")
    return text


def _signed(raw: bytes) -> Signed:
    found = _WHO.fullmatch(raw)
    if found is None:
        return Signed(raw, "")
    sign = -1 if found[3].startswith(b"-") else 1
    hours, minutes = int(found[3][1:3]), int(found[3][3:])
    zone = UTC
    if hours < 24 and minutes < 60:
        zone = timezone(sign * timedelta(hours=hours, minutes=minutes))
    try:
        return Signed(found[1], datetime.fromtimestamp(int(found[2]), zone).isoformat())
    except (ValueError, OverflowError, OSError):
        return Signed(raw, "")
