"""What a push changes in the files of a ref: one tree compared with another, also where the old one cannot be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec

from saw.review.git_history import MAX_DEPTH, Objects
from saw.review.git_objects import MODES, SUBMODULE, TREE, Entry, name_problem, order_problems

MAX_CHANGES = 2000
"""Most changed files of one push that are named."""


class Change(msgspec.Struct, frozen=True):
    """A path before and after. ``known`` is False when what was there before could not be read."""

    path: bytes
    old: Entry | None
    new: Entry | None
    known: bool = True


class Changes:
    """The comparison of two trees; ``objects`` and what is left of its bounds belong to the push.

    ``wants`` are names of trees that could not be read, ``warnings`` sentences about a path (which is not escaped yet), and
    ``elsewhere`` are paths whose content is not among what was read of the push, where the old state is not known.
    ``more`` counts changes beyond the bound, and ``cut`` folders that are not looked into for it.
    """

    def __init__(self, objects: Objects) -> None:
        self.found: list[Change] = []
        self.wants: dict[str, None] = {}
        self.warnings: list[tuple[bytes, str]] = []
        self.elsewhere: list[bytes] = []
        self.more = 0
        self.cut = 0
        self._objects = objects

    def compare(self, old: str | None, new: str, *, known: bool) -> None:
        """Compare two trees; ``old`` is None for none, and ``known`` False when there may be one that cannot be named."""
        self._trees(b"", old, new, known, 0)

    def _trees(self, path: bytes, old: str | None, new: str | None, known: bool, depth: int) -> None:
        if old == new and old is not None:
            return
        if depth > MAX_DEPTH:
            self.warnings.append((path, f"folders deeper than {MAX_DEPTH} are NOT shown"))
            return
        before: dict[tuple[bytes, int], Entry] = {}
        if old is not None and known:
            found = self._objects.tree(old)
            if isinstance(found, list):
                before = _by_name(found)
            else:
                self.wants[old] = None
                known = False
                if new is None:
                    self.warnings.append((path, "a folder is deleted; what it held could not be read"))
                    return
        after: dict[tuple[bytes, int], Entry] = {}
        if new is not None:
            found = self._objects.tree(new)
            if isinstance(found, list):
                after = _by_name(found)
                self.warnings += [(path, problem) for problem in order_problems(found)]
            else:
                self.wants[new] = None
                why = found or "the push does not carry it"
                self.warnings.append((path, f"what this folder holds is NOT shown: {why}"))
                return
        # The same folder may be in many places, and in each of them again.
        self._objects.visits_left -= len(before) + len(after) + 1
        if self._objects.visits_left < 0:
            self.cut += 1
            return
        for key in sorted({*before, *after}):
            was, now = before.get(key), after.get(key)
            if was is not None and now is not None and (was.mode, was.oid) == (now.mode, now.oid):
                continue
            self._entry(path + b"/" + key[0] if path else key[0], was, now, known, depth)

    def _entry(self, path: bytes, was: Entry | None, now: Entry | None, known: bool, depth: int) -> None:
        if not known and now is not None and now.mode != SUBMODULE and now.oid not in self._objects.carried:
            self.elsewhere.append(path)
            return
        if now is not None:
            self.warnings += [(path, problem) for problem in _problems(now)]
        old_tree = was.oid if was is not None and was.mode == TREE else None
        new_tree = now.oid if now is not None and now.mode == TREE else None
        if old_tree or new_tree:
            self._trees(path, old_tree, new_tree, known, depth + 1)
        was = None if old_tree else was
        now = None if new_tree else now
        if was is None and now is None:
            return
        if len(self.found) >= MAX_CHANGES:
            self.more += 1
        else:
            self.found.append(Change(path, was, now, known))


def _by_name(entries: list[Entry]) -> dict[tuple[bytes, int], Entry]:
    """Return entries by name, and by how many of the same name came before."""
    before: Counter[bytes] = Counter()
    found: dict[tuple[bytes, int], Entry] = {}
    for entry in entries:
        found[entry.name, before[entry.name]] = entry
        before[entry.name] += 1
    return found


def _problems(entry: Entry) -> Iterator[str]:
    problem = name_problem(entry.name)
    if problem:
        yield problem
    if entry.mode != TREE and entry.mode not in MODES:
        yield f"its mode {entry.mode} is none that Git writes"


def mode_name(entry: Entry) -> str:
    """Return what an entry is, in words."""
    return MODES.get(entry.mode, f"mode {entry.mode}")


__all__ = ["MAX_CHANGES", "SUBMODULE", "Change", "Changes", "mode_name"]
