"""JSON as reviewers see it: a tree of lines, members in their order, numbers as they were written, nothing left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from saw.review.escapes import escape

MAX_DEPTH = 64
"""Deepest nesting that is shown as a tree."""


class Unreadable(ValueError):
    """The bytes are not of this kind; the text, where there is one, says why."""


class Number(str):
    """A JSON number as it was written."""

    __slots__ = ()


class Members(list[tuple[str, object]]):
    """The members of a JSON object in their order, also when a name appears twice."""

    def named(self) -> dict[str, object] | None:
        """Return the members by name; None when a name appears twice, because readers differ in which one counts."""
        found = dict(self)
        return found if len(found) == len(self) else None


def parse_json(raw: bytes) -> object:
    """Return the value; raise :class:`Unreadable` for what is no JSON in UTF-8, or nested too deeply to be shown."""
    try:
        value = json.loads(
            raw.decode(), object_pairs_hook=Members, parse_int=Number, parse_float=Number, parse_constant=Number
        )
    except (ValueError, RecursionError) as error:
        raise Unreadable("it is no JSON") from error
    _require_shallow(value)
    return value


def _require_shallow(value: object) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for one in level
            if isinstance(one, list)
            for item in ([of for _, of in one] if isinstance(one, Members) else one)
        ]
        if not level:
            return
    raise Unreadable(f"it is nested more than {MAX_DEPTH} deep")


def tree(value: object, depth: int = 0) -> Iterator[str]:
    """Yield ``value`` as indented lines: one member or element each."""
    pad = "  " * depth
    if isinstance(value, Members) and value:
        count = Counter(name for name, _ in value)
        for name, item in value:
            twice = "  (this name appears more than once)" if count[name] > 1 else ""
            yield from _member(f"{pad}{quoted(name)}:", item, depth, twice)
    elif isinstance(value, list) and value:
        for item in value:
            yield from _member(f"{pad}-", item, depth, "")
    else:
        yield f"{pad}{_scalar(value)}"


def quoted(text: str) -> str:
    """Return a JSON string as it is shown."""
    return '"' + escape(text).replace('"', '\\"') + '"'


def _member(label: str, item: object, depth: int, remark: str) -> Iterator[str]:
    if isinstance(item, list) and item:
        yield label + remark
        yield from tree(item, depth + 1)
    else:
        yield f"{label} {_scalar(item)}{remark}"


def _scalar(value: object) -> str:
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Members):
        return "{}"
    if isinstance(value, list):
        return "[]"
    return json.dumps(value)  # true, false, null
