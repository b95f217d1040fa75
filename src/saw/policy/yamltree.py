"""Strict YAML: one document of maps, lists and scalars, each with its place in the file.

Refused: anchors, aliases, tags, merge keys, more than one document, duplicate keys, keys that are not text or too long,
more than 4 MiB, deep nesting. Plain scalars follow the core schema of YAML 1.2 (``true``, ``null``, decimal integers and
fractions; ``yes`` and ``on`` are text). Reads events, never Python objects, and without recursion, so no input exhausts
memory or stack.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from saw.policy.errors import PolicyError, Problem
from saw.policy.model import MAX_FILE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_DEPTH = 32
"""Deepest nesting of maps and lists."""
MAX_NODES = 200_000
"""Most nodes in one file."""

MAX_KEY = 256
"""Longest key (characters); a key is repeated in the place of every problem below it."""

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})\Z")
_FRACTION = re.compile(r"-?(?:0|[1-9][0-9]{0,17})\.[0-9]{1,17}\Z")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}
_LOADER: Any = getattr(yaml, "CLoader", yaml.Loader)


class Node:
    """One value of the file: ``kind`` is ``map``, ``list`` or ``scalar``; line and column are 1-based."""

    __slots__ = ("column", "items", "kind", "line", "pairs", "value")

    def __init__(self, kind: str, line: int, column: int, value: object = None) -> None:
        self.kind = kind
        self.line = line
        self.column = column
        self.value = value
        self.items: list[Node] = []
        self.pairs: dict[str, tuple[Node, Node]] = {}

    def describe(self) -> str:
        """Return what this is, in words for an error."""
        if self.kind != "scalar":
            return f"a {self.kind}"
        if self.value is None:
            return "nothing"
        if isinstance(self.value, bool):
            return f"the boolean {str(self.value).lower()}"
        if isinstance(self.value, int | float):
            return f"the number {self.value}"
        return f"the text {str(self.value)[:60]!r}"


class _Refused(Exception):
    def __init__(self, line: int, column: int, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.line, self.column, self.reason, self.cure = line, column, reason, cure


def parse(raw: bytes, name: str) -> tuple[Node, list[Problem]]:
    """Return the root map of ``raw`` and the problems that do not stop reading (duplicate keys).

    Raises :class:`PolicyError` for what does stop it.
    """
    problems: list[Problem] = []
    try:
        return _build(_events(raw), name, problems), problems
    except _Refused as refused:
        problems.append(Problem(name, refused.line, refused.column, "", refused.reason, refused.cure))
        raise PolicyError(problems) from None


def _events(raw: bytes) -> Iterator[Any]:
    if len(raw) > MAX_FILE_BYTES:
        raise _Refused(1, 1, f"the file has {len(raw)} bytes", f"keep it at or below {MAX_FILE_BYTES}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _Refused(line, 1, "the file is not UTF-8", "save it as UTF-8") from None
    if text.startswith("\ufeff"):
        raise _Refused(1, 1, "the file starts with a byte order mark", "save it as UTF-8 without one")
    try:
        yield from yaml.parse(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise _Refused(line, column, f"this is not YAML: {reason}", "correct the syntax") from None


def _scalar(event: Any) -> object:
    """Return the value of a scalar by the core schema; quoted and block scalars are text."""
    text: str = event.value
    if event.style:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.match(text):
        return int(text)
    return float(text) if _FRACTION.match(text) else text


def _build(events: Iterator[Any], name: str, problems: list[Problem]) -> Node:
    root: Node | None = None
    stack: list[Node] = []
    keys: list[Node | None] = []
    count = 0
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent) and root is not None:
            raise _Refused(*_place(event), "there is a second document", "keep one document in the file")
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(*_place(event), "aliases are refused", "write the value out")
        if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            stack.pop()
            keys.pop()
            continue
        if not isinstance(event, yaml.ScalarEvent | yaml.MappingStartEvent | yaml.SequenceStartEvent):
            continue
        line, column = _place(event)
        if event.anchor is not None:
            raise _Refused(line, column, "anchors are refused", f"remove &{event.anchor[:60]}")
        if event.tag is not None:
            raise _Refused(line, column, "tags are refused", f"remove the tag {event.tag[:60]}")
        count += 1
        if count > MAX_NODES:
            raise _Refused(line, column, f"there are more than {MAX_NODES} values", "split the policy")
        if isinstance(event, yaml.ScalarEvent):
            node = Node("scalar", line, column, _scalar(event))
        else:
            node = Node("map" if isinstance(event, yaml.MappingStartEvent) else "list", line, column)
        if not stack:
            if node.kind != "map":
                raise _Refused(line, column, f"the file holds {node.describe()}", "write a map of fields")
            root = node
        else:
            duplicate = _attach(stack[-1], keys, node, event)
            if duplicate is not None:
                key, earlier = duplicate
                reason = f"the key {key.value!r} is a duplicate of the one in line {earlier.line}"
                problems.append(Problem(name, key.line, key.column, str(key.value), reason, "keep one of the two"))
        if node.kind != "scalar":
            if len(stack) >= MAX_DEPTH:
                raise _Refused(line, column, f"values are nested deeper than {MAX_DEPTH}", "flatten the structure")
            stack.append(node)
            keys.append(None)
    if root is None:
        raise _Refused(1, 1, "the file is empty", "write a map of fields")
    return root


def _attach(parent: Node, keys: list[Node | None], node: Node, event: Any) -> tuple[Node, Node] | None:
    """Add ``node``, which ``event`` began, to ``parent``; return a duplicate key and its forerunner when it completes one."""
    if parent.kind == "list":
        parent.items.append(node)
        return None
    key = keys[-1]
    if key is None:
        if node.kind != "scalar":
            raise _Refused(node.line, node.column, "a key is not text", "use a plain word as the key")
        text: str = event.value
        if len(text) > MAX_KEY:
            raise _Refused(node.line, node.column, f"a key has {len(text)} characters", f"use at most {MAX_KEY}")
        if text == "<<" and not event.style:
            # Readers of YAML 1.1 would merge another map in here; readers of 1.2 see a key like any other.
            raise _Refused(node.line, node.column, "merge keys are refused", 'write the fields out, or quote "<<"')
        node.value = text
        keys[-1] = node
        return None
    keys[-1] = None
    earlier = parent.pairs.setdefault(str(key.value), (key, node))
    return None if earlier[0] is key else (key, earlier[0])


def _place(event: Any) -> tuple[int, int]:
    return (event.start_mark.line + 1, event.start_mark.column + 1)
