"""Finite automata over the policy's patterns, and the partition of all texts that they make.

Texts that the same patterns accept are alike to the matcher. :func:`partition` walks the product of deterministic automata
(Rabin and Scott 1959), built as it goes, and returns one shortest text for every set of patterns that some text has, so that
inclusion of globs is decided over all texts and not by their spelling. Work is counted: what would take too long is refused
with :class:`TooLarge`, and the caller then reports too much rather than too little.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from saw.policy.linear_regex import LinearRegex

DEAD = -1
"""The state from which nothing is accepted."""


class TooLarge(Exception):
    """An exact answer would take more work than is allowed."""


class Budget:
    """The work that is left, in transitions; the same input always spends the same."""

    __slots__ = ("left", "per_walk")

    def __init__(self, total: int = 6_000_000, per_walk: int = 1_500_000) -> None:
        self.left = total
        self.per_walk = per_walk

    def spend(self, amount: int) -> None:
        """Take ``amount`` away; raise :class:`TooLarge` when nothing is left."""
        self.left -= amount
        if self.left < 0:
            raise TooLarge


class Automaton(Protocol):
    """A deterministic automaton whose states are numbers, made when they are first reached."""

    @property
    def start(self) -> int:
        """Return the first state."""
        ...

    def step(self, state: int, char: str) -> int:
        """Return the state after ``char``."""
        ...

    def accepts(self, state: int) -> bool:
        """Return whether a text that ends in ``state`` is accepted."""
        ...

    def marks(self, state: int) -> frozenset[str]:
        """Return the characters that ``state`` tells apart; it treats all others alike."""
        ...

    @property
    def size(self) -> int:
        """Return how much one step may cost: the number of positions that are followed at once."""
        ...


class Glob:
    """A glob of :mod:`saw.policy.globs` as an automaton; make one with :meth:`path`, :meth:`host` or :meth:`flat`.

    Non-deterministic positions are bits of a number, and the sets of them that are reached become the states.
    """

    __slots__ = ("_any", "_empty", "_final", "_known", "_literal", "_marks", "_numbers", "_run", "_separator", "_sets")

    def __init__(self, separator: str) -> None:
        self._separator = separator
        self._literal: list[dict[str, int]] = [{}]
        self._run: list[int] = [0]
        self._any: list[int] = [0]
        self._empty: list[int] = [0]
        self._final = 0
        self._sets: list[int] = []
        self._numbers: dict[int, int] = {}
        self._known: list[dict[str, int]] = []
        self._marks: list[frozenset[str] | None] = []

    # -- construction

    def _new(self) -> int:
        self._literal.append({})
        self._run.append(0)
        self._any.append(0)
        self._empty.append(0)
        return len(self._literal) - 1

    def _char(self, at: int, char: str) -> int:
        target = self._new()
        self._literal[at][char] = self._literal[at].get(char, 0) | 1 << target
        return target

    def _repeat(self, at: int) -> int:
        """Add a run of characters other than the separator."""
        target = self._new()
        self._empty[at] |= 1 << target
        self._run[target] |= 1 << target
        return target

    def _text(self, at: int, text: str) -> int:
        for char in text:
            at = self._repeat(at) if char == "*" else self._char(at, char)
        return at

    def _one_or_more(self, at: int) -> int:
        target = self._new()
        self._run[at] |= 1 << target
        self._run[target] |= 1 << target
        return target

    def _done(self, at: int) -> Glob:
        self._final = 1 << at
        self._number(self._closed(1))
        return self

    @classmethod
    def path(cls, glob: str) -> Glob:
        """Return the automaton of :func:`saw.policy.globs.path_glob`."""
        result = cls("/")
        at = 0
        segments = glob.split("/")[1:]
        for index, segment in enumerate(segments):
            if segment == "**" and index == len(segments) - 1:
                at = result._char(at, "/")
                rest = result._new()
                result._empty[at] |= 1 << rest
                result._any[rest] |= 1 << rest
                at = rest
            elif segment == "**":
                before = result._new()
                result._empty[at] |= 1 << before
                inside = result._repeat(result._char(before, "/"))
                result._empty[inside] |= 1 << before
                at = before
            else:
                at = result._char(at, "/")
                at = result._one_or_more(at) if segment == "*" else result._text(at, segment)
        return result._done(at)

    @classmethod
    def host(cls, glob: str) -> Glob:
        """Return the automaton of :func:`saw.policy.globs.host_glob`."""
        result = cls(".")
        at = 0
        for index, label in enumerate(glob.lower().split(".")):
            if index:
                at = result._char(at, ".")
            if label == "**":
                first = at
                at = result._one_or_more(first)
                result._literal[at]["."] = 1 << first
            else:
                at = result._one_or_more(at) if label == "*" else result._text(at, label)
        return result._done(at)

    @classmethod
    def flat(cls, glob: str) -> Glob:
        """Return the automaton of :func:`saw.policy.globs.flat_glob`."""
        result = cls("")
        return result._done(result._text(0, glob))

    @classmethod
    def ending(cls, text: str) -> Glob:
        """Return the automaton of the texts that end with ``text``."""
        result = cls("")
        return result._done(result._text(0, "*" + text))

    @classmethod
    def holding(cls, text: str) -> Glob:
        """Return the automaton of the texts in which ``text`` occurs."""
        result = cls("")
        return result._done(result._text(0, f"*{text}*"))

    # -- use

    @property
    def size(self) -> int:
        """Return the number of positions."""
        return len(self._literal)

    def _closed(self, positions: int) -> int:
        pending = positions
        while pending:
            bit = pending & -pending
            pending ^= bit
            more = self._empty[bit.bit_length() - 1] & ~positions
            positions |= more
            pending |= more
        return positions

    def _number(self, positions: int) -> int:
        found = self._numbers.get(positions)
        if found is None:
            found = self._numbers[positions] = len(self._sets)
            self._sets.append(positions)
            self._known.append({})
            self._marks.append(None)
        return found

    @property
    def start(self) -> int:
        """Return the first state."""
        return 0

    def step(self, state: int, char: str) -> int:
        """Return the state after ``char``."""
        if state == DEAD:
            return DEAD
        known = self._known[state]
        target = known.get(char)
        if target is None:
            reached = 0
            for position in _bits(self._sets[state]):
                reached |= self._literal[position].get(char, 0) | self._any[position]
                if char != self._separator:
                    reached |= self._run[position]
            target = known[char] = self._number(self._closed(reached)) if reached else DEAD
        return target

    def accepts(self, state: int) -> bool:
        """Return whether a text that ends in ``state`` is accepted."""
        return state != DEAD and self._sets[state] & self._final != 0

    def marks(self, state: int) -> frozenset[str]:
        """Return the characters that ``state`` tells apart."""
        if state == DEAD:
            return frozenset()
        marks = self._marks[state]
        if marks is None:
            found: set[str] = set()
            for position in _bits(self._sets[state]):
                found.update(self._literal[position])
                if self._run[position] and self._separator:
                    found.add(self._separator)
            marks = self._marks[state] = frozenset(found)
        return marks


def _bits(mask: int) -> Iterator[int]:
    while mask:
        bit = mask & -mask
        mask ^= bit
        yield bit.bit_length() - 1


class Words:
    """The automaton of a list of exact texts; :meth:`word` tells which one was read."""

    __slots__ = ("_ends", "_next")

    def __init__(self, words: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._ends: dict[int, str] = {}
        for word in words:
            at = 0
            for char in word:
                following = self._next[at].get(char)
                if following is None:
                    following = self._next[at][char] = len(self._next)
                    self._next.append({})
                at = following
            self._ends[at] = word

    @property
    def start(self) -> int:
        """Return the first state."""
        return 0

    def step(self, state: int, char: str) -> int:
        """Return the state after ``char``."""
        return DEAD if state == DEAD else self._next[state].get(char, DEAD)

    @property
    def size(self) -> int:
        """Return 1: a step is one look-up."""
        return 1

    def accepts(self, state: int) -> bool:
        """Return whether one of the words ends in ``state``."""
        return state in self._ends

    def word(self, state: int) -> str | None:
        """Return the word that ends in ``state``."""
        return self._ends.get(state)

    def marks(self, state: int) -> frozenset[str]:
        """Return the characters that go on from ``state``."""
        return frozenset() if state == DEAD else frozenset(self._next[state])


class Table:
    """An automaton written as a table: for each state what single characters and what all ``ordinary`` ones lead to."""

    __slots__ = ("_accepting", "_known", "_marks", "_rows", "ordinary")

    def __init__(
        self, rows: Sequence[tuple[Mapping[str, int], int]], accepting: Iterable[int], ordinary: Sequence[str]
    ) -> None:
        self._rows = tuple((dict(row), default) for row, default in rows)
        self._accepting = frozenset(accepting)
        self._marks = tuple(frozenset(row) for row, _ in self._rows)
        self.ordinary = tuple(ordinary)
        self._known = frozenset(ordinary)

    @property
    def start(self) -> int:
        """Return the first state."""
        return 0

    def step(self, state: int, char: str) -> int:
        """Return the state after ``char``; characters of neither kind are refused."""
        if state == DEAD:
            return DEAD
        row, default = self._rows[state]
        if char in row:
            return row[char]
        return default if char in self._known else DEAD

    @property
    def size(self) -> int:
        """Return 1: a step is one look-up."""
        return 1

    def accepts(self, state: int) -> bool:
        """Return whether a text that ends in ``state`` is accepted."""
        return state in self._accepting

    def marks(self, state: int) -> frozenset[str]:
        """Return the characters of the row."""
        return frozenset() if state == DEAD else self._marks[state]


class RegexAutomaton(LinearRegex):
    """The automaton of an argument's expression: its sets of positions, one after the other."""

    def __init__(self, expression: str) -> None:
        super().__init__(expression)
        self._sets: list[frozenset[int]] = [frozenset({DEAD})]
        self._numbers: dict[frozenset[int], int] = {self._sets[0]: 0}
        self._known: dict[tuple[int, str], int] = {}
        codes = {ord(char) + shift for char in expression for shift in (-1, 0, 1)} | set(range(128)) | {0xE9}
        # Every set of characters of the syntax begins or ends next to a character that is written in the expression.
        self._marked = frozenset(chr(code) for code in codes if 0 <= code < 0x110000 and not 0xD800 <= code < 0xE000)

    @property
    def start(self) -> int:
        """Return the first state."""
        return 0

    @property
    def size(self) -> int:
        """Return the number of positions."""
        return len(self._tests)

    def step(self, state: int, char: str) -> int:
        """Return the state after ``char``."""
        if state == DEAD:
            return DEAD
        known = self._known.get((state, char))
        if known is not None:
            return known
        following: set[int] = set()
        for position in self._sets[state]:
            following |= self._first if position == DEAD else self._follow[position]
        reached = frozenset(position for position in following if self._tests[position](char))
        number = DEAD
        if reached:
            number = self._numbers.setdefault(reached, len(self._sets))
            if number == len(self._sets):
                self._sets.append(reached)
        self._known[state, char] = number
        return number

    def accepts(self, state: int) -> bool:
        """Return whether a text that ends in ``state`` matches."""
        if state <= 0:
            return state == 0 and self._nullable
        return not self._last.isdisjoint(self._sets[state])

    def marks(self, state: int) -> frozenset[str]:
        """Return one character at least of every set that the expression tells apart."""
        return frozenset() if state == DEAD else self._marked


class TextClass(NamedTuple):
    """Texts that no pattern tells apart: bit i of ``mask`` for pattern i, the exact word if it is one, a shortest text."""

    mask: int
    word: str | None
    text: str


def partition(
    automata: Sequence[Automaton], domain: Table, words: Iterable[str], budget: Budget
) -> tuple[TextClass, ...]:
    """Return one class for every combination of ``automata`` and ``words`` that a text of ``domain`` has, shortest first."""
    exact = Words(words)
    parts: tuple[Automaton, ...] = (domain, exact, *automata)
    start = tuple(part.start for part in parts)
    origin: dict[tuple[int, ...], tuple[tuple[int, ...], str] | None] = {start: None}
    pending = deque([start])
    found: dict[tuple[int, str | None], TextClass] = {}
    cost = price(parts)
    spent = 0
    while pending:
        state = pending.popleft()
        if domain.accepts(state[0]):
            mask = sum(1 << i for i, part in enumerate(automata) if part.accepts(state[i + 2]))
            key = (mask, exact.word(state[1]))
            if key not in found:
                found[key] = TextClass(mask, key[1], _spelled(origin, state))
        for char in _choices(parts, state, domain):
            spent += cost
            if spent > budget.per_walk:
                raise TooLarge
            after = domain.step(state[0], char)
            if after == DEAD:
                continue
            target = (after, *(part.step(at, char) for part, at in zip(parts[1:], state[1:], strict=True)))
            if target not in origin:
                origin[target] = (state, char)
                pending.append(target)
    budget.spend(spent)
    return tuple(found.values())


def price(parts: Sequence[Automaton]) -> int:
    """Return what one step of all ``parts`` takes out of a budget."""
    return 1 + len(parts) // 8 + sum(part.size for part in parts) // 32


def _choices(parts: Sequence[Automaton], state: tuple[int, ...], domain: Table) -> list[str]:
    """Return one character for each way to go on from ``state``: an ordinary one, and all that some part tells apart."""
    marks = frozenset[str]().union(*(part.marks(at) for part, at in zip(parts, state, strict=True)))
    plain = next((char for char in domain.ordinary if char not in marks), None)
    return ([] if plain is None else [plain]) + sorted(marks)


def _spelled(origin: Mapping[tuple[int, ...], tuple[tuple[int, ...], str] | None], state: tuple[int, ...]) -> str:
    chars: list[str] = []
    step = origin[state]
    while step is not None:
        state, char = step
        chars.append(char)
        step = origin[state]
    return "".join(reversed(chars))
