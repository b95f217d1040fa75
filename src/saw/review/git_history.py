"""What a push carries as history: its commits, what they build on, whether anything is discarded, what no ref reaches."""

from __future__ import annotations

from collections.abc import Container, Iterable

import msgspec

from saw.review.git_objects import SUBMODULE, TREE, Commit, Entry, Tag, Unreadable, read_commit, read_tag, read_tree
from saw.review.git_pack import Store

MAX_WALK = 5000
"""Most commits of one ref that are walked."""
MAX_ENTRIES = 200_000
"""Most entries of trees that are read for one push."""
MAX_TAGS = 8
"""Most tags that point to each other."""
MAX_DEPTH = 64
"""Most folders inside each other."""


class History(msgspec.Struct, frozen=True):
    """The history of one ref. ``commits`` are those that the push carries, parents first; ``boundary`` what they build on.

    ``follows`` says whether the new state has the old one among its ancestors; None when that cannot be known.
    ``broken`` are names of commits that cannot be read, with the reason.
    """

    commits: tuple[tuple[str, Commit], ...]
    boundary: tuple[str, ...]
    broken: tuple[tuple[str, str], ...]
    follows: bool | None
    complete: bool


class Objects:
    """Objects read once; ``carried`` are the names of those that came in the push itself."""

    def __init__(self, store: Store, carried: Container[str]) -> None:
        self.store = store
        self.carried = carried
        self.entries_left = MAX_ENTRIES
        self.visits_left = MAX_ENTRIES
        self._commits: dict[str, Commit | str] = {}
        self._trees: dict[str, list[Entry] | str] = {}

    def commit(self, oid: str) -> Commit | str | None:
        """Return a commit, why it cannot be read, or None when there is no such commit here."""
        data = self.store.data(oid, "commit")
        if data is not None and oid not in self._commits:
            try:
                self._commits[oid] = read_commit(data)
            except Unreadable as error:
                self._commits[oid] = str(error)
        return self._commits.get(oid)

    def tree(self, oid: str) -> list[Entry] | str | None:
        """Return the entries of a tree, why it cannot be read, or None when there is no such tree here."""
        data = self.store.data(oid, "tree")
        if data is not None and oid not in self._trees:
            try:
                found = read_tree(data, self.store.hash_size)
            except Unreadable as error:
                self._trees[oid] = str(error)
            else:
                self.entries_left -= len(found) + 1
                self._trees[oid] = found if self.entries_left >= 0 else "there are too many entries to read them all"
        return self._trees.get(oid)

    def peel(self, oid: str) -> tuple[str, list[tuple[str, Tag | str]]]:
        """Return what ``oid`` points to behind its tags, and the tags: each as read, or why it cannot be."""
        tags: list[tuple[str, Tag | str]] = []
        while len(tags) < MAX_TAGS:
            data = self.store.data(oid, "tag")
            if data is None:
                break
            try:
                tag = read_tag(data)
            except Unreadable as error:
                tags.append((oid, str(error)))
                break
            tags.append((oid, tag))
            oid = tag.target
        return oid, tags


def history(objects: Objects, old: str, new: str) -> History:
    """Return the history between two commits; ``old`` is empty for a ref that is created."""
    order: list[tuple[str, Commit]] = []
    boundary: dict[str, None] = {}
    broken: dict[str, str] = {}
    frontier: set[str] = set()
    seen: set[str] = set()
    met, complete = False, True
    todo: list[tuple[str, bool, bool]] = [(new, False, True)]
    while todo:
        oid, done, from_push = todo.pop()
        carried = oid in objects.carried
        found = objects.commit(oid)
        if done:
            if carried and isinstance(found, Commit):
                order.append((oid, found))
            continue
        if from_push and (not carried or oid == old):
            boundary[oid] = None
        if oid == old:
            met = True
            continue
        if oid in seen:
            continue
        seen.add(oid)
        if len(seen) > MAX_WALK:
            complete = False
            break
        if isinstance(found, Commit):
            todo.append((oid, True, False))
            todo += [(parent, False, carried) for parent in reversed(found.parents)]
        else:
            frontier.add(oid)
            if found is not None:
                broken[oid] = found
    follows: bool | None = None
    if met:
        follows = True
    elif old and complete and not broken and frontier <= _ancestors(objects, old):
        follows = False
    return History(tuple(order), tuple(boundary), tuple(broken.items()), follows, complete)


def _ancestors(objects: Objects, oid: str) -> set[str]:
    """Return the names that are known to be ancestors of ``oid``."""
    found: set[str] = set()
    todo = [oid]
    while todo and len(found) < MAX_WALK:
        commit = objects.commit(todo.pop())
        if isinstance(commit, Commit):
            todo += [parent for parent in commit.parents if parent not in found]
            found.update(commit.parents)
    return found


def reached(objects: Objects, tips: Iterable[str]) -> tuple[dict[str, bytes], bool]:
    """Return what the push carries and a tip leads to, each with the first path that it has, and whether that is all of it."""
    found: dict[str, bytes] = {}
    whole = True
    todo: list[tuple[str, bytes, int]] = [(tip, b"", 0) for tip in tips]
    while todo:
        oid, path, depth = todo.pop()
        if oid in found or oid not in objects.carried:
            continue
        found[oid] = path
        tag = objects.peel(oid)[1][:1]
        if tag:
            todo += [(tag[0][1].target, path, 0)] if isinstance(tag[0][1], Tag) else []
            continue
        commit, tree = objects.commit(oid), objects.tree(oid)
        if isinstance(commit, Commit):
            todo += [(parent, b"", 0) for parent in commit.parents]
            todo.append((commit.tree, b"", 0))
        elif isinstance(tree, list) and depth < MAX_DEPTH:
            todo += [
                (entry.oid, path + b"/" + entry.name if path else entry.name, depth + 1)
                for entry in reversed(tree)
                if entry.mode != SUBMODULE
            ]
        elif isinstance(tree, str) or isinstance(commit, str) or isinstance(tree, list):
            whole = False
    return found, whole


__all__ = ["MAX_DEPTH", "MAX_ENTRIES", "MAX_WALK", "TREE", "History", "Objects", "history", "reached"]
