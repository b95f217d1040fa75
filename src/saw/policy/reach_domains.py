"""Which texts exist at all: canonical paths, host names, Git refs, values of arguments.

A pattern may accept texts that no request can hold; what counts is what is left of it here.
"""

from __future__ import annotations

import string
from functools import lru_cache

from saw.policy.reach_automata import DEAD, Table

_LETTERS = "xyzwvutsrqponmlkjihgfedcba"
_ALNUM = _LETTERS + string.digits + string.ascii_uppercase
_HEX = "0123456789ABCDEF"

LONGEST_REF = 512
"""Longest ref name (characters) that a push is read with."""


class _Builder:
    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, int], int]] = []

    def state(self, default: int = DEAD) -> int:
        self.rows.append(({}, default))
        return len(self.rows) - 1

    def edge(self, source: int, chars: str, target: int) -> None:
        for char in chars:
            self.rows[source][0][char] = target

    def default(self, source: int, target: int) -> None:
        self.rows[source] = (self.rows[source][0], target)


def _continuation(table: _Builder, target: int, low: int, high: int) -> int:
    """Return a state that reads ``%XX`` with ``low <= XX <= high`` (UTF-8 continuation bytes) and goes on to ``target``."""
    percent = table.state()
    first = table.state()
    table.edge(percent, "%", first)
    for digit in "89AB":
        second = table.state()
        allowed = "".join(c for c in _HEX if low <= int(digit + c, 16) <= high)
        if allowed:
            table.edge(second, allowed, target)
            table.edge(first, digit, second)
    return percent


@lru_cache(maxsize=2)
def canonical_path(*, encoded_slash: bool) -> Table:
    """Return the automaton of the canonical paths of :mod:`saw.policy.paths` (without a query).

    ``encoded_slash``: whether ``%2F`` may occur. UTF-8 forms are those of RFC 3629.
    """
    table = _Builder()
    begin, empty, dot, dots, normal, after_encoded = (table.state() for _ in range(6))
    percents = {source: table.state() for source in (empty, dot, dots, normal, after_encoded)}
    table.edge(begin, "/", empty)
    for source, percent in percents.items():
        table.default(source, normal)
        table.edge(source, "%", percent)
        table.edge(source, ".", normal)
        table.edge(source, "/", DEAD if source in {empty, dot, dots} else empty)
    for source in (empty, after_encoded):
        table.edge(source, ".", dot)
    table.edge(dot, ".", dots)
    more = _continuation(table, normal, 0x80, 0xBF)
    more_2 = _continuation(table, more, 0x80, 0xBF)
    leads = {f"{lead:02X}": more for lead in range(0xC2, 0xE0)}
    leads |= {f"{lead:02X}": more_2 for lead in range(0xE1, 0xF0) if lead != 0xED}
    leads |= {
        "E0": _continuation(table, more, 0xA0, 0xBF),
        "ED": _continuation(table, more, 0x80, 0x9F),
        "F0": _continuation(table, more_2, 0x90, 0xBF),
        "F4": _continuation(table, more_2, 0x80, 0x8F),
    }
    leads |= {f"F{digit}": _continuation(table, more_2, 0x80, 0xBF) for digit in "123"}
    unreserved = {ord(char) for char in string.ascii_letters + string.digits + "-._~"}
    plain = {f"{value:02X}": normal for value in range(0x20, 0x7F) if value not in unreserved | {0x5C, 0x2F}}
    for source, percent in percents.items():
        targets = dict(leads | plain)
        if encoded_slash and source not in {dot, dots}:
            targets["2F"] = after_encoded
        for digit in sorted({pair[0] for pair in targets}):
            second = table.state()
            table.edge(percent, digit, second)
            for pair, target in targets.items():
                if pair[0] == digit:
                    table.edge(second, pair[1], target)
    return Table(table.rows, {empty, normal, after_encoded}, _ALNUM + "_~!$&'()*+,=:@-[]")


@lru_cache(maxsize=1)
def git_ref() -> Table:
    """Return the automaton of ``/`` and a ref name that Git accepts (git-check-ref-format), below ``refs/``."""
    table = _Builder()
    prefix = [table.state() for _ in "/refs/"]
    slash, normal, at, dot, l1, l2, l3, lock = (table.state() for _ in range(8))
    for source, char, target in zip(prefix, "/refs/", [*prefix[1:], slash], strict=True):
        table.edge(source, char, target)
    for source in (slash, normal, at, dot, l1, l2, l3, lock):
        table.default(source, normal)
        table.edge(source, "/", DEAD if source in {slash, lock} else slash)
        table.edge(source, ".", DEAD if source in {slash, dot} else dot)
        table.edge(source, "@", at)
    table.edge(at, "{", DEAD)
    for source, char, target in ((dot, "l", l1), (l1, "o", l2), (l2, "c", l3), (l3, "k", lock)):
        table.edge(source, char, target)
    return Table(table.rows, {normal, at, l1, l2, l3}, _ALNUM + "-_!\"#$%&'()+,;<=>]`{|}")


def _free(ordinary: str, *, first: str = "") -> Table:
    rows: list[tuple[dict[str, int], int]] = [({}, 0)]
    if first:
        rows = [({first: 1}, DEAD), ({}, 1)]
    return Table(rows, {len(rows) - 1}, ordinary)


_PRINTABLE = _ALNUM + "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) not in _ALNUM)


@lru_cache(maxsize=1)
def host_name() -> Table:
    """Return the automaton of everything that is looked up as a host: lower-case text."""
    return _free("".join(c for c in _PRINTABLE if not c.isupper() and c not in "/:@?#[]\\ ") + "é")


@lru_cache(maxsize=1)
def absolute_path() -> Table:
    """Return the automaton of what starts with ``/`` (executables)."""
    return _free(_PRINTABLE + "é", first="/")


@lru_cache(maxsize=1)
def query_value() -> Table:
    """Return the automaton of the values that a canonical query can hold: no control characters, no backslash."""
    return _free(_PRINTABLE.replace("\\", "") + "é")


class AnyText(Table):
    """The automaton of all texts, for model names and arguments: every character is ordinary."""

    __slots__ = ()

    def step(self, state: int, char: str) -> int:
        """Return the state after ``char``: there is one state only."""
        return DEAD if state == DEAD or not char else 0


@lru_cache(maxsize=1)
def any_text() -> AnyText:
    """Return the automaton of all texts."""
    return AnyText([({"\n": 0, "\x01": 0, "\\": 0, "é": 0}, 0)], {0}, _PRINTABLE + "é")
