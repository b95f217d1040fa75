"""A write beside what is there now: the changes that a PUT, PATCH or DELETE of JSON would make, shown to whoever decides on it.

``PUT`` takes the place of what is there; a merge patch (RFC 7396) changes the members that it names; a JSON Patch (RFC 6902) is a
list of steps; ``DELETE`` takes it away. What a ``PATCH`` of plain JSON does, its server defines: shown are the members that it
names. Places are JSON Pointers (RFC 6901).

Nothing of the agent decides what is read: the perimeter asks the same URL by ``GET``, as policy allows the workspace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from saw.review.escapes import escape
from saw.review.json_text import Members, Unreadable, parse_json, tree
from saw.review.line_diff import Effort, diff_lines
from saw.review.messages import ReviewedAnswer, ReviewedCall, StateContext

MAX_STATE = 256 * 1024
"""Bytes of a state that are compared; a longer one counts as unreadable."""
MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
_NOTHING = frozenset({404, 410})
_WRITES = frozenset({"PUT", "PATCH"})
_ABSENT = object()


class Change(NamedTuple):
    """One place that becomes another; ``lines`` say from what to what, each with its sign."""

    pointer: str
    word: str
    lines: list[str]


def media_of(headers: Sequence[tuple[str, str]]) -> str:
    """Return the media type without its parameters, in lower case; empty where none is given or the body is encoded."""
    found = dict(headers)
    if found.get("content-encoding", "").strip().lower() not in {"", "identity"}:
        return ""
    return found.get("content-type", "").partition(";")[0].strip().lower()


def is_json(media: str) -> bool:
    """Tell whether a media type is JSON (RFC 8259, RFC 6839)."""
    return media == "application/json" or media.endswith("+json")


def has_state(call: ReviewedCall) -> bool:
    """Tell whether ``call`` changes what a ``GET`` of the same URL shows as JSON."""
    if call.method == "DELETE":
        return not call.body
    return call.method in _WRITES and bool(call.body) and is_json(media_of(call.headers))


def state_question(scheme: str, host: str, port: int, path: str) -> ReviewedCall:
    """Return the call that asks the far end for the state."""
    return ReviewedCall(
        method="GET",
        scheme="https" if scheme == "https" else "http",
        host=host,
        port=port,
        path=path,
        headers=(("accept", "application/json"),),
    )


def state_of(answer: ReviewedAnswer) -> StateContext:
    """Return what the far end's answer says of the state: ``read`` with it, or ``unreadable`` with the reason."""
    if answer.status in _NOTHING:
        return StateContext(state="read", status=answer.status)
    if answer.status != 200:
        return StateContext(state="unreadable", detail=f"the far end answered {answer.status}")
    if answer.truncated or len(answer.body) > MAX_STATE:
        return StateContext(state="unreadable", detail=f"what is there has more than {MAX_STATE} bytes")
    if not is_json(media_of(answer.headers)):
        return StateContext(state="unreadable", detail="what is there is not marked as JSON")
    try:
        parse_json(answer.body)
    except Unreadable as error:
        return StateContext(state="unreadable", detail=f"what is there cannot be shown: {error}")
    etag = dict(answer.headers).get("etag", "")[:1024]
    return StateContext(state="read", status=answer.status, etag=etag, body=answer.body)


def show_state(call: ReviewedCall, context: StateContext) -> list[str]:
    """Return what is told about ``call`` beside the state; the call's own body, if it has one, is shown below as ever.

    Raises :class:`Unreadable` when the body is not what :func:`has_state` took it for.
    """
    if context.state == "asked":
        return ["now        not read yet: look again", ""]
    if context.state == "unreadable":
        return [f"now        NOT read: {escape(context.detail)}", ""]
    body = None if call.method == "DELETE" else parse_json(call.body)
    if context.status in _NOTHING:
        return [f"now        nothing is there ({context.status})", ""]
    now = parse_json(context.body)
    digest = hashlib.sha256(context.body).hexdigest()
    lines = [f"now        {len(context.body)} bytes, sha256 {digest}, read at the far end", *_bound(call, context), ""]
    if call.method == "DELETE":
        return [*lines, "# what would be deleted", *(f"- {line}" for line in tree(now))]
    if call.method == "PATCH" and media_of(call.headers) == JSON_PATCH:
        return [*lines, "# the steps of the patch", *_steps(now, body), ""]
    whole = call.method == "PUT"
    found = list(_changes("", now, body, whole=whole, merge=media_of(call.headers) == MERGE_PATCH))
    count = f"{len(found)} change{'' if len(found) == 1 else 's'}" if found else "nothing would change"
    heading = f"# {count}" if whole else f"# {count} among the members that are named"
    return [*lines, heading, *(line for change in found for line in _shown(change)), ""]


def _bound(call: ReviewedCall, context: StateContext) -> list[str]:
    """Say whether the call counts for the state alone that was read (RFC 9110, section 13.1.1)."""
    wanted = [tag.strip() for tag in dict(call.headers).get("if-match", "*").split(",")]
    if wanted == [context.etag] and not context.etag.startswith("W/"):
        return ["           the call counts for this state alone (If-Match)"]
    if wanted != ["*"] and (context.etag not in wanted or context.etag.startswith("W/")):
        return ["!          the call is meant for ANOTHER state (If-Match): the far end should refuse it"]
    return ["           what is there may have changed by the time this is sent"]


def _shown(change: Change) -> Iterator[str]:
    yield f"{escape(change.pointer) or '(the whole)'}: {change.word}"
    yield from change.lines


def _same(one: object, other: object) -> bool:
    if isinstance(one, Members) and isinstance(other, Members):
        mine, its = one.named(), other.named()
        if mine is None or its is None:
            return list(one) == list(other) and all(_same(a[1], b[1]) for a, b in zip(one, other, strict=True))
        return mine.keys() == its.keys() and all(_same(item, its[name]) for name, item in mine.items())
    if isinstance(one, Members) or isinstance(other, Members) or type(one) is not type(other):
        return False
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def _changes(at: str, old: object, new: object, *, whole: bool, merge: bool) -> Iterator[Change]:
    """Yield the places where ``new`` differs; ``whole``: what only ``old`` has goes; ``merge``: null takes a member away."""
    if _same(old, new):
        return
    before = old.named() if isinstance(old, Members) else None
    after = new.named() if isinstance(new, Members) else None
    if before is not None and after is not None:
        for name, item in after.items():
            place = f"{at}/{_token(name)}"
            had = before.get(name, _ABSENT)
            if merge and item is None:
                if had is not _ABSENT:
                    yield Change(place, "removed", _signed("-", had))
            elif had is _ABSENT:
                yield Change(place, "added", _signed("+", item))
            else:
                yield from _changes(place, had, item, whole=whole, merge=merge)
        if whole:
            gone = [name for name in before if name not in after]
            yield from (Change(f"{at}/{_token(name)}", "removed", _signed("-", before[name])) for name in gone)
        return
    if isinstance(old, list) and isinstance(new, list) and before is None and after is None:
        yield Change(at, "changed", _beside(list(tree(old)), list(tree(new))))
        return
    yield Change(at, "changed", [*_signed("-", old), *_signed("+", new)])


def _beside(old: list[str], new: list[str]) -> list[str]:
    found = diff_lines([line.encode() for line in old], [line.encode() for line in new], Effort())
    return [f"{sign} {(new if sign == '+' else old)[index]}" for sign, index in found]


def _signed(sign: str, value: object) -> list[str]:
    return [f"{sign} {line}" for line in tree(value)]


def _token(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _steps(now: object, patch: object) -> Iterator[str]:
    """Yield each step of a JSON Patch with what is at its place now, before any step."""
    if not isinstance(patch, list) or isinstance(patch, Members):
        raise Unreadable("a JSON Patch is a list")
    for step in patch:
        named = step.named() if isinstance(step, Members) else None
        if named is None or not isinstance(named.get("op"), str) or not isinstance(named.get("path"), str):
            raise Unreadable("a step of a JSON Patch has op and path")
        source = f" from {escape(str(named['from']))}" if isinstance(named.get("from"), str) else ""
        yield f"{escape(str(named['path'])) or '(the whole)'}: {escape(str(named['op']))}{source}"
        there = _at(now, str(named["path"]))
        yield from [] if there is _ABSENT else _signed("-" if named["op"] in {"remove", "replace"} else " ", there)
        if "value" in named:
            yield from _signed("+", named["value"])


def _at(value: object, pointer: str) -> object:
    """Return what is at a JSON Pointer, :data:`_ABSENT` where nothing is."""
    if pointer and not pointer.startswith("/"):
        return _ABSENT
    for token in pointer.split("/")[1:]:
        name = token.replace("~1", "/").replace("~0", "~")
        if isinstance(value, Members):
            value = (value.named() or {}).get(name, _ABSENT)
        elif isinstance(value, list) and name.isascii() and name.isdigit() and str(int(name[:9])) == name:
            value = value[int(name)] if int(name) < len(value) else _ABSENT
        else:
            return _ABSENT
        if value is _ABSENT:
            return _ABSENT
    return value


__all__ = [
    "JSON_PATCH",
    "MAX_STATE",
    "MERGE_PATCH",
    "has_state",
    "show_state",
    "state_of",
    "state_question",
]
