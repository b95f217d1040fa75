"""Values of tool arguments: find one that some rules accept and others refuse, or know that there is none.

Texts are decided by the automata of their expressions and directories, numbers at the ends of their ranges, lists by their
elements. Every value that is returned has been put to :func:`saw.policy.mcp.argument_fault`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from saw.policy.mcp import argument_fault
from saw.policy.reach_automata import DEAD, Automaton, Budget, RegexAutomaton, TooLarge, partition, price
from saw.policy.reach_domains import any_text
from saw.policy.tool_rules import Argument


class _Nothing:
    """The absence of a value."""


NOTHING: Final = _Nothing()
"""Returned when no value exists."""
MAX_ELEMENTS = 4096
"""Longest text (characters) that is searched step by step, and longest list that is made."""


def admits(rule: Argument, value: object) -> bool:
    """Return whether ``rule`` accepts ``value``, as the decision on a tool does."""
    return argument_fault(value, rule) is None


class Under:
    """The automaton of the absolute paths at or below a directory, by text: ``.`` and empty segments count for nothing."""

    __slots__ = ("_base", "_numbers", "_states")

    def __init__(self, base: str) -> None:
        self._base = tuple(part for part in base.split("/") if part not in {"", "."})
        self._states: list[tuple[int, str]] = [(-1, "")]
        self._numbers: dict[tuple[int, str], int] = {self._states[0]: 0}

    @property
    def start(self) -> int:
        """Return the first state."""
        return 0

    def _number(self, depth: int, segment: str) -> int:
        state = (depth, segment)
        number = self._numbers.setdefault(state, len(self._states))
        if number == len(self._states):
            self._states.append(state)
        return number

    def _closed(self, depth: int, segment: str) -> int:
        """Return how many segments of the base have been read once ``segment`` has ended, or DEAD."""
        if segment == "..":
            return DEAD
        if depth == len(self._base) or segment in {"", "."}:
            return depth
        return depth + 1 if segment == self._base[depth] else DEAD

    @property
    def size(self) -> int:
        """Return 1: a step looks at one segment."""
        return 1

    def step(self, state: int, char: str) -> int:
        """Return the state after ``char``."""
        if state == DEAD:
            return DEAD
        depth, segment = self._states[state]
        if not char.isprintable() or char == "\\":
            return DEAD
        if depth < 0:
            return self._number(0, "") if char == "/" else DEAD
        if char == "/":
            closed = self._closed(depth, segment)
            return DEAD if closed == DEAD else self._number(closed, "")
        segment += char
        if depth == len(self._base):
            return self._number(depth, segment if segment in {".", ".."} else "x")
        wanted = self._base[depth]
        return self._number(depth, segment) if wanted.startswith(segment) or segment in {".", ".."} else DEAD

    def accepts(self, state: int) -> bool:
        """Return whether a path that ends in ``state`` is at or below the directory."""
        if state == DEAD:
            return False
        depth, segment = self._states[state]
        return depth >= 0 and self._closed(depth, segment) == len(self._base)

    def marks(self, state: int) -> frozenset[str]:
        """Return the characters that ``state`` tells apart."""
        if state == DEAD:
            return frozenset()
        depth, segment = self._states[state]
        marks = {"/", ".", "\\", "\n", "\x01"}
        if 0 <= depth < len(self._base):
            marks.update(self._base[depth][len(segment) : len(segment) + 1])
        return frozenset(marks)


def find(inside: Sequence[Argument], outside: Sequence[Argument], budget: Budget) -> object:
    """Return a value that all of ``inside`` accept and none of ``outside``, or :data:`NOTHING`.

    ``inside`` names one rule at least; ``outside`` none or one. Raises :class:`TooLarge` when that cannot be told in bounds.
    """
    for value in _candidates(inside, outside, budget):
        if all(admits(rule, value) for rule in inside) and not any(admits(rule, value) for rule in outside):
            return value
    return NOTHING


def _candidates(inside: Sequence[Argument], outside: Sequence[Argument], budget: Budget) -> Iterator[object]:
    listed = next((rule.enum for rule in inside if rule.enum), None)
    if listed is not None:
        yield from listed
        return
    kind = inside[0].type
    if kind == "boolean":
        yield from (True, False)
    elif kind in {"integer", "number"}:
        yield from _numbers((*inside, *outside))
    elif kind == "string":
        yield from _texts(inside, outside, budget)
    elif kind == "array":
        yield from _lists(inside, outside, budget)


def _numbers(rules: Sequence[Argument]) -> Iterator[int | float]:
    """Yield a number in every range that the bounds of ``rules`` cut, whole and broken ones."""
    bounds = {bound for rule in rules for bound in (rule.min, rule.max) if bound is not None and math.isfinite(bound)}
    bounds |= {value for rule in rules for value in rule.enum if isinstance(value, int) and not isinstance(value, bool)}
    around: set[int | float] = {0, 1, 0.5}
    for bound in sorted(bounds):
        whole = math.floor(bound)
        around |= {bound, whole - 1, whole, whole + 1, whole + 2}
        if abs(bound) < 1e15:
            around |= {float(bound), bound + 0.5, bound - 0.5}
            around |= {math.nextafter(float(bound), math.inf), math.nextafter(float(bound), -math.inf)}
    far = max((abs(math.floor(bound)) for bound in bounds), default=1) * 2 + 10
    yield from sorted(around, key=lambda number: (isinstance(number, float), abs(number), number))
    yield from (far, -far, math.inf, -math.inf, math.nan)


def _lists(inside: Sequence[Argument], outside: Sequence[Argument], budget: Budget) -> Iterator[list[object]]:
    yield []
    items = [rule.items for rule in inside if rule.items is not None]
    if not items:
        return
    other = [rule.items for rule in outside if rule.type == "array" and rule.items is not None]
    for element in (find(items, other, budget), find(items, (), budget)):
        if element is not NOTHING:
            yield [element]
    most = [rule.max_length for rule in outside if rule.type == "array" and rule.max_length is not None]
    element = find(items, (), budget)
    if element is not NOTHING:
        for length in most:
            if length >= MAX_ELEMENTS:
                if all(rule.max_length is None or rule.max_length > length for rule in inside):
                    raise TooLarge
                continue
            yield [element] * (length + 1)


def _automata(rule: Argument) -> list[Automaton]:
    result: list[Automaton] = []
    if rule.type == "string" and rule.regex is not None:
        result.append(RegexAutomaton(rule.regex))
    if rule.type == "string" and rule.under is not None:
        result.append(Under(rule.under))
    return result


def _texts(inside: Sequence[Argument], outside: Sequence[Argument], budget: Budget) -> Iterator[str]:
    """Yield a shortest text for everything the rules tell apart, and one that is too long for ``outside``."""
    within = [automaton for rule in inside for automaton in _automata(rule)]
    beyond = [automaton for rule in outside for automaton in _automata(rule)]
    words = sorted({value for rule in outside for value in rule.enum if isinstance(value, str)})
    for found in partition([*within, *beyond], any_text(), words, budget):
        if found.mask & ((1 << len(within)) - 1) == (1 << len(within)) - 1:
            yield found.text
    most = min((rule.max_length for rule in inside if rule.max_length is not None), default=None)
    for limit in {rule.max_length for rule in outside if rule.type == "string" and rule.max_length is not None}:
        if most is None or most > limit:
            longer = _longer(within, limit + 1, most, budget)
            if longer is not None:
                yield longer


def _longer(automata: Sequence[Automaton], low: int, high: int | None, budget: Budget) -> str | None:
    """Return a text that all ``automata`` accept of ``low`` to ``high`` characters."""
    domain = any_text()
    layer: dict[tuple[int, ...], str] = {tuple(part.start for part in automata): ""}
    length = 0
    cost = price(automata)
    while layer:
        for state, text in layer.items():
            if all(part.accepts(at) for part, at in zip(automata, state, strict=True)):
                if length >= low:
                    return text
                grown = _pumped(automata, text, low)
                if grown is not None:
                    return grown
        length += 1
        if high is not None and length > high:
            return None
        if length > MAX_ELEMENTS:
            raise TooLarge
        following: dict[tuple[int, ...], str] = {}
        for state, text in layer.items():
            marks = frozenset[str]().union(*(part.marks(at) for part, at in zip(automata, state, strict=True)))
            plain = next((char for char in domain.ordinary if char not in marks), None)
            for char in ([] if plain is None else [plain]) + sorted(marks):
                budget.spend(cost)
                target = tuple(part.step(at, char) for part, at in zip(automata, state, strict=True))
                if DEAD not in target:
                    following.setdefault(target, text + char)
        layer = following
    return None


def _pumped(automata: Sequence[Automaton], text: str, length: int) -> str | None:
    """Return ``text`` grown to ``length`` by a character that changes no state somewhere on its way, or ``None``."""
    state = tuple(part.start for part in automata)
    for index in range(len(text) + 1):
        for char in dict.fromkeys(("x", "a", "0", "/", text[index - 1 : index], text[index : index + 1])):
            if char and state == tuple(part.step(at, char) for part, at in zip(automata, state, strict=True)):
                return text[:index] + char * (length - len(text)) + text[index:]
        if index < len(text):
            state = tuple(part.step(at, text[index]) for part, at in zip(automata, state, strict=True))
    return None
