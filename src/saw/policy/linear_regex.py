"""Regular expressions for argument rules that match in time linear in the input.

A subset of the usual syntax (literals, ``.``, classes, ``\\d \\w \\s``, groups, ``|``, ``* + ? {m,n}``) is turned into a
position automaton and simulated with sets (Thompson 1968), so no input makes it slow. The whole text must match.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

MAX_STATES = 2000
"""Largest automaton; bounds the cost of one character."""

MAX_EDGES = 20_000
"""Most pairs of positions that follow each other; bounds the memory, and the cost of one character as well."""

_DIGIT = frozenset("0123456789")
_WORD = _DIGIT | frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_SPACE = frozenset(" \t\n\r\f\v")
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROL = {"n": "\n", "t": "\t", "r": "\r"}

Accepts = Callable[[str], bool]


class RegexError(ValueError):
    """The expression is outside the subset or too large."""


class _Set:
    """A set of characters: singles and ranges, possibly inverted."""

    def __init__(self) -> None:
        self.singles: set[str] = set()
        self.ranges: list[tuple[str, str]] = []
        self.outside: list[frozenset[str]] = []
        self.inverted = False

    def __call__(self, char: str) -> bool:
        inside = (
            char in self.singles
            or any(low <= char <= high for low, high in self.ranges)
            or any(char not in group for group in self.outside)
        )
        return inside != self.inverted


class _Char(NamedTuple):
    """One character that passes a test."""

    test: Accepts


class _Join(NamedTuple):
    """All of ``parts`` in order."""

    parts: list[_Node]


class _Choice(NamedTuple):
    """Any one of ``options``."""

    options: list[_Node]


class _Repeat(NamedTuple):
    """``inner`` from ``low`` to ``high`` times (``None``: without end)."""

    inner: _Node
    low: int
    high: int | None


_Node: TypeAlias = "_Char | _Join | _Choice | _Repeat"
_Facts = tuple[bool, set[int], set[int]]


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0

    def peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def take(self) -> str:
        char = self.peek()
        if not char:
            raise RegexError("the expression ends too early")
        self.at += 1
        return char

    def alternatives(self) -> _Node:
        options = [self.sequence()]
        while self.peek() == "|":
            self.at += 1
            options.append(self.sequence())
        return _Choice(options) if len(options) > 1 else options[0]

    def sequence(self) -> _Node:
        parts: list[_Node] = []
        while self.peek() not in {"", "|", ")"}:
            parts.append(self.repeated())
        return _Join(parts)

    def repeated(self) -> _Node:
        node: _Node = self.atom()
        if self.peek() in {"*", "+", "?", "{"}:
            low, high = self.bounds()
            node = _Repeat(node, low, high)
            if self.peek() in {"?", "+"}:
                raise RegexError("lazy and possessive repetition has no meaning for a whole match")
            if self.peek() in {"*", "{"}:
                raise RegexError("a repetition is repeated; put the inner one into a group")
        return node

    def bounds(self) -> tuple[int, int | None]:
        char = self.take()
        if char != "{":
            return (1 if char == "+" else 0), (1 if char == "?" else None)
        end = self.text.find("}", self.at)
        low, comma, high = self.text[self.at : end].partition(",") if end > 0 else ("", "", "")
        if not (low.isascii() and low.isdigit()) or (high and not (high.isascii() and high.isdigit())):
            raise RegexError("{ must be followed by m}, m,} or m,n}")
        self.at = end + 1
        least = int(low)
        most = (int(high) if high else None) if comma else least
        if least > MAX_STATES or (most is not None and (most > MAX_STATES or most < least)):
            raise RegexError("the bounds of a repetition are too large or reversed")
        return least, most

    def atom(self) -> _Node:
        char = self.take()
        if char == "(":
            return self.group()
        if char == "[":
            return _Char(self.char_class())
        if char == "\\":
            return _Char(self.escape())
        if char == ".":
            return _Char(lambda c: c != "\n")
        if char in "*+?{}])^$":
            raise RegexError(
                f"{char!r} cannot stand at position {self.at}; the whole text always matches from end to end"
            )
        return _Char(char.__eq__)

    def group(self) -> _Node:
        self.depth += 1
        if self.depth > 50:
            raise RegexError("groups are nested too deep")
        if self.peek() == "?":
            if self.text[self.at : self.at + 2] != "?:":
                raise RegexError("only plain groups and (?:…) are known")
            self.at += 2
        node = self.alternatives()
        if self.take() != ")":
            raise RegexError("a group is not closed")
        self.depth -= 1
        return node

    def escape(self) -> Accepts:
        char = self.take()
        if char in _CLASSES:
            return _CLASSES[char].__contains__
        if char.lower() in _CLASSES:
            group = _CLASSES[char.lower()]
            return lambda c: c not in group
        if char.isalnum() and char not in _CONTROL:
            raise RegexError(f"the escape \\{char} is not known")
        return _CONTROL.get(char, char).__eq__

    def char_class(self) -> Accepts:
        result = _Set()
        if self.peek() == "^":
            self.at += 1
            result.inverted = True
        first = True
        while first or self.peek() != "]":
            first = False
            char = self.take()
            if char == "\\":
                char = self.take()
                if char in _CLASSES:
                    result.singles |= _CLASSES[char]
                    continue
                if char.lower() in _CLASSES:
                    result.outside.append(_CLASSES[char.lower()])
                    continue
                if char.isalnum() and char not in _CONTROL:
                    raise RegexError(f"the escape \\{char} is not known")
                char = _CONTROL.get(char, char)
            if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in {"]", ""}:
                self.at += 1
                high = self.take()
                if high == "\\":
                    high = self.take()
                    if high.isalnum() and high not in _CONTROL:
                        raise RegexError(f"a range cannot end with \\{high}")
                    high = _CONTROL.get(high, high)
                if high < char:
                    raise RegexError(f"the range {char}-{high} is reversed")
                result.ranges.append((char, high))
            else:
                result.singles.add(char)
        self.at += 1
        return result


class LinearRegex:
    """A compiled expression; :meth:`matches` tells whether a whole text matches."""

    def __init__(self, expression: str) -> None:
        if len(expression) > 1024:
            raise RegexError("the expression is longer than 1024 characters")
        parser = _Parser(expression)
        tree = parser.alternatives()
        if parser.at != len(expression):
            raise RegexError("a group is closed that was not opened")
        self._tests: list[Accepts] = []
        self._follow: list[set[int]] = []
        self._edges = 0
        nullable, first, last = self._positions(tree)
        self._first = frozenset(first)
        self._last = frozenset(last)
        self._nullable = nullable

    def _positions(self, node: _Node) -> _Facts:
        """Return (matches empty, first positions, last positions) of ``node`` (Glushkov 1961)."""
        if isinstance(node, _Char):
            if len(self._tests) >= MAX_STATES:
                raise RegexError(f"the expression needs more than {MAX_STATES} states")
            self._tests.append(node.test)
            self._follow.append(set())
            position = len(self._tests) - 1
            return False, {position}, {position}
        if isinstance(node, _Choice):
            results = [self._positions(option) for option in node.options]
            first = set[int]().union(*(facts[1] for facts in results))
            return any(facts[0] for facts in results), first, set[int]().union(*(facts[2] for facts in results))
        if isinstance(node, _Join):
            return self._chain([self._positions(part) for part in node.parts])
        return self._repeat(node)

    def _repeat(self, node: _Repeat) -> _Facts:
        """Return the facts of a repetition, whose optional end is nested: ``x(x(x)?)?`` has few edges, ``x?x?x?`` many."""
        count = max(node.low, 1) if node.high is None else node.high
        before = len(self._tests)
        copies: list[_Facts] = []
        for _ in range(count):
            copies.append(self._positions(node.inner))
            if len(self._tests) == before:
                break  # nothing but the empty text, however often it is repeated
        if node.high is None:
            self._connect(copies[-1][2], copies[-1][1])
        empty = node.low == 0 or (bool(copies) and copies[0][0])
        needed = 0 if empty else node.low
        first, last = set[int](), set[int]()
        for index in range(len(copies) - 1, -1, -1):
            _, inner_first, inner_last = copies[index]
            if index + 1 < len(copies):
                self._connect(inner_last, first)
            # What follows may be left out once enough copies are there.
            last = inner_last | last if index + 1 >= needed else last
            first = inner_first
        return empty or not copies, first, last

    def _connect(self, last: set[int], first: set[int]) -> None:
        self._edges += len(last) * len(first)
        if self._edges > MAX_EDGES:
            raise RegexError(f"the expression needs more than {MAX_EDGES} transitions")
        for position in last:
            self._follow[position] |= first

    def _chain(self, parts: list[_Facts]) -> _Facts:
        nullable, first, last = True, set[int](), set[int]()
        for part_nullable, part_first, part_last in parts:
            self._connect(last, part_first)
            if nullable:
                first |= part_first
            last = (last | part_last) if part_nullable else set(part_last)
            nullable = nullable and part_nullable
        return nullable, first, last

    def matches(self, text: str) -> bool:
        """Return whether the whole of ``text`` matches; the cost is proportional to its length."""
        if not text:
            return self._nullable
        current: set[int] = {p for p in self._first if self._tests[p](text[0])}
        for char in text[1:]:
            following: set[int] = set()
            for position in current:
                following |= self._follow[position]
            current = {p for p in following if self._tests[p](char)}
            if not current:
                return False
        return not self._last.isdisjoint(current)
