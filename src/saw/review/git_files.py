"""The changed files of a push as lines: contents compared line by line, binary ones by size and digest."""

from __future__ import annotations

import hashlib

from saw.review.git_changes import MAX_CHANGES, Change, Changes, mode_name
from saw.review.git_history import Objects
from saw.review.git_objects import SUBMODULE, Entry
from saw.review.git_text import Out, Sign, counted, quoted
from saw.review.line_diff import Effort, diff_lines, hunks

MAX_ALARMS = 50
"""Most warnings about names that are repeated at the beginning."""
_PROBE = 8000


class Files:
    """Shows changes into ``out``; names of objects that the far end could tell go into ``wants``.

    ``unresolved`` says that some of the push could not be made whole.
    """

    def __init__(self, objects: Objects, out: Out, wants: dict[str, None], *, unresolved: bool) -> None:
        self.seen: set[str] = set()
        self._objects = objects
        self._out = out
        self._wants = wants
        self._effort = Effort()
        self._unresolved = unresolved
        self._warned: dict[str, None] = {}
        self._left = MAX_CHANGES

    def alarms(self) -> list[str]:
        """Return the warnings about paths, to be said first."""
        found = [*self._warned]
        more = len(found) - MAX_ALARMS
        return found[:MAX_ALARMS] + ([f"! {more} more warnings about names stand below"] if more > 0 else [])

    def show(self, old: str | None, new: str, *, known: bool) -> None:
        """Compare two trees (``old`` None: with nothing) and show every change."""
        changes, out = Changes(self._objects), self._out
        changes.compare(old, new, known=known)
        self._wants |= changes.wants
        self._warn(changes)
        found, more = changes.found[: self._left], changes.more + max(0, len(changes.found) - self._left)
        self._left -= len(found)
        out.say(f"{counted(len(changes.found) + changes.more, 'file')} {'changed' if known else 'carried'}")
        gone = {one.old.oid: one.path for one in found if one.old is not None and one.new is None}
        for change in found:
            self._change(change, gone)
        if changes.elsewhere:
            self._elsewhere(changes.elsewhere)
        if more:
            self._loud(f"! {more} more changed files are NOT shown")
        if changes.cut:
            self._loud(f"! {changes.cut} folders are NOT looked into: there are too many names")

    def whole(self, path: bytes, oid: str) -> None:
        """Show a content that is compared with nothing."""
        self._out.say(f"## content {quoted(path)}, {oid}")
        self._contents(None, oid)

    def _elsewhere(self, paths: list[bytes]) -> None:
        """Name what the push does not carry, or not in a form that could be read without the far end's objects."""
        what = counted(len(paths), "more name")
        if self._unresolved:
            self._out.say(f"! {what}: NOT shown, because the far end has the content, or what the content is made from")
        else:
            self._out.say(f"{what}: NOT shown, because the far end has the content already")
        self._out.say(*(f"name       {quoted(path)}" for path in paths[:MAX_ALARMS]))
        if len(paths) > MAX_ALARMS:
            self._out.say(f"… {len(paths) - MAX_ALARMS} more are NOT named")

    def _warn(self, changes: Changes) -> None:
        for path, why in changes.warnings:
            self._loud(f"! {quoted(path)}: {why}")

    def _loud(self, line: str) -> None:
        """Say something here, and first."""
        self._warned[line] = None
        self._out.say(line)

    def _change(self, change: Change, gone: dict[str, bytes]) -> None:
        old, new, out = change.old, change.new, self._out
        if new is None:
            if old is not None:
                out.say(f"## deleted {quoted(change.path)}, {mode_name(old)}; what it held is NOT shown")
            return
        self.seen.add(new.oid)
        if not change.known:
            out.say(f"## added or changed {quoted(change.path)}, {mode_name(new)}; its old state could not be read")
        elif old is None:
            out.say(f"## added {quoted(change.path)}, {mode_name(new)}")
        else:
            modes = f"{old.mode} → {new.mode}, {mode_name(new)}" if old.mode != new.mode else mode_name(new)
            out.say(f"## changed {quoted(change.path)}, {modes}")
        if SUBMODULE in {new.mode, old.mode if old else ""}:
            out.say(f"! points to {new.oid}" + (f", and did to {old.oid}" if old else "") + "; NOT shown")
            if new.mode == SUBMODULE:
                return
            old = None
        if old is not None and old.oid == new.oid:
            out.say("its content stays")
            return
        if old is None and new.oid in gone and new.oid not in self._objects.carried:
            out.say(f"its content is that of {quoted(gone[new.oid])}, which is deleted")
            return
        if old is None and change.known:
            self._added(new)
        else:
            self._contents(old, new.oid)

    def _added(self, new: Entry) -> None:
        data = self._data(new.oid)
        if data is None:
            return
        if _binary(data):
            self._out.say(_sizes(None, data))
            return
        lines = _lines(data)
        self._out.say(f"@ new 1 to {len(lines)}" if lines else "it is empty")
        self._all("+", lines, data)

    def _contents(self, old: Entry | None, new: str) -> None:
        """Show how a content changes, or all of it where the old one is not there."""
        out, data = self._out, self._data(new)
        self.seen.add(new)
        if data is None:
            return
        before = self._objects.store.data(old.oid, "blob") if old is not None else None
        if old is not None and before is None:
            self._wants[old.oid] = None
            out.say("! its old content could not be read; all of the new one follows")
        if _binary(data) or (before is not None and _binary(before)):
            out.say(_sizes(before, data))
        elif before is None:
            self._all("=", _lines(data), data)
        else:
            self._compared(before, data)

    def _compared(self, before: bytes, data: bytes) -> None:
        out, old, new = self._out, _lines(before), _lines(data)
        lines = diff_lines(old, new, self._effort)
        cut = out.cut
        # Where a part begins, in lines of either text.
        at_old = at_new = 0
        done = 0
        for begin, end in hunks(lines):
            for sign, _ in lines[done:begin]:
                at_old, at_new = at_old + (sign != "+"), at_new + (sign != "-")
            part = lines[begin:end]
            removed, added = sum(sign != "+" for sign, _ in part), sum(sign != "-" for sign, _ in part)
            out.say(f"@ old {_range(at_old, removed)}, new {_range(at_new, added)}")
            for sign, at in part:
                kind: Sign = "+" if sign == "+" else "-" if sign == "-" else " "
                out.content(kind, new[at] if sign == "+" else old[at])
            at_old, at_new, done = at_old + removed, at_new + added, end
        if before and data and before.endswith(b"\n") != data.endswith(b"\n"):
            how = (
                "with a line end, the old one without"
                if data.endswith(b"\n")
                else "without a line end, the old one with one"
            )
            out.say(f"the new content ends {how}")
        self._cut(cut)

    def _all(self, sign: Sign, lines: list[bytes], data: bytes) -> None:
        cut = self._out.cut
        for line in lines:
            self._out.content(sign, line)
        if data and not data.endswith(b"\n"):
            self._out.say("it ends without a line end")
        self._cut(cut)

    def _cut(self, before: int) -> None:
        if self._out.cut > before:
            self._out.say(f"… {self._out.cut - before} more lines of this file are NOT shown")

    def _data(self, oid: str) -> bytes | None:
        found = self._objects.store.objects.get(oid)
        if found is not None and found.data is not None and found.kind == "blob":
            return found.data
        if found is None:
            self._wants[oid] = None
            self._out.say(f"! its content {oid} is NOT shown: the push does not carry it")
        elif found.kind != "blob":
            self._out.say(f"! its content {oid} is a {found.kind}: Git refuses such a tree")
        else:
            self._out.say(f"! its content {oid} is NOT shown: it has {found.size} bytes")
        return None


def _binary(data: bytes) -> bool:
    return b"\0" in data[:_PROBE]


def _lines(data: bytes) -> list[bytes]:
    return data.removesuffix(b"\n").split(b"\n") if data else []


def _sizes(before: bytes | None, data: bytes) -> str:
    old = "" if before is None else f"{len(before)} bytes → "
    return f"binary, {old}{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}; NOT shown"


def _range(before: int, count: int) -> str:
    return "none" if not count else f"{before + 1} to {before + count}"
