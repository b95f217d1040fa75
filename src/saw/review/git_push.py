"""What a reviewer sees of a Git push: its refs, its commits, and how the files change; made from the push's own bytes.

What the push does not carry, its perimeter may have read from the far end (:class:`PushContext`). Nothing is believed of it:
every object is known by its content. The same bytes and context give the same lines everywhere. What is left out is said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from saw.review.git_files import Files
from saw.review.git_history import History, Objects, history, reached
from saw.review.git_objects import Commit, Signed, Tag
from saw.review.git_pack import MAX_INFLATED, MAX_KEPT, Pack, Store, read_pack
from saw.review.git_request import Command, PushRequest, read_push
from saw.review.git_text import Out, ascii_only, counted
from saw.review.messages import PushContext

MAX_COMMITS = 200
"""Most commits of one push that are shown."""
MAX_WANTS = 512
"""Most objects that are asked of a far end at a time."""
MAX_UNSEEN = 500
"""Most contents that are shown beside what changes."""
MAX_NAMED = 20
"""Most objects that are named of what no ref reaches."""
_MAX_ASKED = 256


class PushShown(msgspec.Struct, frozen=True):
    """The lines about a push, and what the far end could tell: ``commits`` it builds on or replaces, ``others`` besides."""

    lines: tuple[str, ...]
    commits: tuple[str, ...]
    others: tuple[str, ...]


def show_push(body: bytes, coding: str, context: PushContext | None = None) -> PushShown:
    """Return what a reviewer sees of the push in ``body``; raise :class:`saw.policy.gitproto.PushUnreadable`."""
    return _Shower(read_push(body, coding), context).shown()


class _Shower:
    def __init__(self, request: PushRequest, context: PushContext | None) -> None:
        self._request = request
        self._context = context
        names = [name for one in request.commands for name in (one.old, one.new) if name]
        self._store = Store("sha256" if any(len(name) == 64 for name in names) else "sha1")
        # The far end's objects come first, for the deltas against them, and leave half of the room to the push.
        self._store.kept_left, self._store.inflated_left = MAX_KEPT // 2, MAX_INFLATED // 2
        self._theirs = [read_pack(pack, self._store) for pack in (context.packs if context else ())]
        self._store.kept_left += MAX_KEPT // 2
        self._store.inflated_left += MAX_INFLATED // 2
        self._pack = read_pack(request.pack, self._store) if request.pack else Pack()
        self._objects = Objects(self._store, self._pack.names)
        self._out = Out()
        self._commits: dict[str, None] = {}
        self._others: dict[str, None] = dict.fromkeys(self._pack.bases)
        self._files = Files(self._objects, self._out, self._others, unresolved=bool(self._pack.left_out))
        self._commits_left = MAX_COMMITS
        self._compared: dict[tuple[str, str], str] = {}

    def shown(self) -> PushShown:
        first, rest = Out(), self._out
        for command in self._request.commands:
            self._ref(first, command)
        self._unseen()
        if rest.cut:
            first.say(f"! {rest.cut} lines are NOT shown, because there are too many; each place says how many")
        first.say(*(f"! {problem}" for problem in (*self._request.problems, *self._pack.problems)))
        first.say(*self._files.alarms())
        first.say(*(f"{one.operation}  {one.old or '0' * len(one.new)} → {one.new or '0' * len(one.old)}  {one.ref}"
                    for one in self._request.commands))  # fmt: skip
        first.say(*self._facts())
        lines = tuple(first.lines + rest.lines)
        known = [*self._store.objects]
        wanted = [name for name in self._commits if name not in known]
        others = [name for name in self._others if name not in self._store.objects and name not in wanted]
        return PushShown(lines, tuple(wanted[:MAX_WANTS]), tuple(others[:MAX_WANTS]))

    def _facts(self) -> Iterable[str]:
        if self._request.asked:
            yield f"asks for   {ascii_only(self._request.asked.encode(), _MAX_ASKED)}"
        yield from (f"option     {ascii_only(one.encode(), _MAX_ASKED)}" for one in self._request.options[:MAX_NAMED])
        if len(self._request.options) > MAX_NAMED:
            yield f"! {len(self._request.options) - MAX_NAMED} more options of the push are NOT shown"
        if self._request.shallow:
            yield f"! the agent's copy has no history before {len(self._request.shallow)} commits"
        pack = self._request.pack
        if pack:
            names = len(self._pack.names)
            digest = hashlib.sha256(pack).hexdigest()
            yield f"packfile   {len(pack)} bytes, {names} of {self._pack.declared} objects read, sha256 {digest}"
        else:
            yield "packfile   none: the push carries no objects"
        context = self._context
        if context is None:
            yield "old state  was not asked of the far end"
        elif context.state == "read" and not context.packs:
            yield "old state  nothing of the far end is needed to show this"
        elif context.state == "read":
            digest = hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in context.packs)).hexdigest()
            count = sum(len(one.names) for one in self._theirs)
            yield f"old state  read from the far end: {count} objects, sha256 {digest}"
            yield from (f"! in what the far end sent, {problem}" for one in self._theirs for problem in one.problems)
            if context.detail:
                yield f"! a part of the old state could not be read: {ascii_only(context.detail.encode(), _MAX_ASKED)}"
        elif context.state == "asked":
            yield "! the old state is being read from the far end: look again, this text will change"
        else:
            yield f"! the old state could not be read: {ascii_only(context.detail.encode(), _MAX_ASKED)}"

    def _ref(self, first: Out, command: Command) -> None:
        ref, out = command.ref, self._out
        out.say("", f"# {command.operation} {ref}")
        tag = ref.startswith("refs/tags/")
        if command.operation == "delete":
            first.say(f"! DELETES {ref}: what only it holds is lost at the far end")
            out.say(f"it pointed to {command.old}; what it held is NOT shown")
            return
        if command.operation == "create":
            first.say(f"! CREATES {ref}")
        elif tag:
            first.say(f"! MOVES THE TAG {ref}: who has it already may keep the old one")
        tip, tags = self._objects.peel(command.new)
        self._tags(first, ref, tags)
        if not isinstance(self._objects.commit(tip), Commit):
            self._no_commit(first, command, tip)
            return
        old = self._objects.peel(command.old)[0] if command.old else ""
        found = history(self._objects, old, tip)
        self._commits |= dict.fromkeys([name for name in (command.old, *found.boundary) if name])
        self._follows(first, command, found)
        self._history(found)
        self._compare(command, found, old, tip)

    def _tags(self, first: Out, ref: str, tags: list[tuple[str, Tag | str]]) -> None:
        for oid, tag in tags:
            if isinstance(tag, str):
                first.say(f"! {ref} points to a tag that cannot be read: {tag}")
                continue
            first.say(f"! {ref} is an annotated tag")
            self._out.say(f"## tag {oid}", f"name       {ascii_only(tag.name)}", f"points to  {tag.kind} {tag.target}")
            if tag.tagger:
                self._out.say(_who("tagger", tag.tagger))
            self._message(tag.message)

    def _no_commit(self, first: Out, command: Command, tip: str) -> None:
        found, why = self._store.objects.get(tip), self._objects.commit(tip)
        if isinstance(why, str):
            first.say(f"! {command.ref} would point to a commit that cannot be read: {why}")
        elif found is not None:
            first.say(f"! {command.ref} would point to a {found.kind}, which is no commit")
        else:
            self._commits |= dict.fromkeys(name for name in (command.old, tip) if name)
            first.say(f"! {command.ref} would point to {tip}, which the push does not carry: its files are NOT shown")

    def _follows(self, first: Out, command: Command, found: History) -> None:
        if command.operation != "update":
            return
        if found.follows is False:
            first.say(
                f"! FORCED: the new state of {command.ref} does not follow from the old one; commits are discarded"
            )
        elif found.follows is None:
            first.say(f"! MAY DISCARD COMMITS: whether {command.ref} follows from its old state could not be known")

    def _history(self, found: History) -> None:
        out = self._out
        out.say(f"{counted(len(found.commits), 'commit')}, oldest first")
        for oid, why in found.broken:
            out.say(f"! commit {oid} cannot be read: {why}")
        if not found.complete:
            out.say("! there are more commits than are walked; the oldest are NOT shown")
        shown = found.commits[: max(0, self._commits_left)]
        self._commits_left -= len(shown)
        for oid, commit in shown:
            out.say(f"## commit {oid}", _who("author", commit.author), _who("committer", commit.committer))
            out.say(*(f"parent     {parent}" for parent in commit.parents if len(commit.parents) > 1))
            if commit.more:
                names = ", ".join(dict.fromkeys(ascii_only(name, 64) for name in commit.more[:MAX_NAMED]))
                out.say(f"also has   {names}; a signature in it is NOT verified here")
            self._message(commit.message)
        if len(found.commits) > len(shown):
            out.say(f"… {len(found.commits) - len(shown)} more commits are NOT shown")

    def _message(self, message: bytes) -> None:
        cut = self._out.cut
        for line in message.removesuffix(b"\n").split(b"\n"):
            self._out.content("|", line)
        if self._out.cut > cut:
            self._out.say(f"… {self._out.cut - cut} more lines of this text are NOT shown")

    def _compare(self, command: Command, found: History, old: str, tip: str) -> None:
        """Compare the files of the new state with those of the old one, or of what a new ref builds on."""
        out = self._out
        base = old or (found.boundary[0] if found.boundary else "")
        if (base, tip) in self._compared:
            out.say(f"the same change of files as for {self._compared[base, tip]}")
            return
        self._compared[base, tip] = command.ref
        new = self._objects.commit(tip)
        before = self._objects.commit(base) if base else None
        if not isinstance(new, Commit):
            return
        if not base:
            out.say("compared with nothing: its history begins in this push")
            self._files.show(None, new.tree, known=True)
        elif isinstance(before, Commit):
            out.say(f"compared with {base}" + ("" if old else ", on which it builds"))
            if len(found.boundary) > 1 and not old:
                out.say(f"it builds on {len(found.boundary)} commits of the far end; this is the first of them")
            self._files.show(before.tree, new.tree, known=True)
        else:
            out.say(f"! compared with nothing: the files of {base} could not be read, so what is deleted is NOT shown")
            self._files.show(None, new.tree, known=False)

    def _unseen(self) -> None:
        """Show what the push carries and no comparison has shown."""
        out, objects = self._out, self._store.objects
        found, whole = reached(self._objects, [one.new for one in self._request.commands if one.new])
        blobs = [name for name in found if objects[name].kind == "blob" and name not in self._files.seen]
        if blobs:
            out.say("", "# only in between, or as it was before")
            out.say(f"! the push carries {counted(len(blobs), 'content')} that the comparison above does not have")
            for name in blobs[:MAX_UNSEEN]:
                self._files.whole(found[name], name)
            if len(blobs) > MAX_UNSEEN:
                out.say(f"! {len(blobs) - MAX_UNSEEN} more contents are NOT shown")
        loose = [name for name in self._pack.names if name not in found]
        if loose:
            out.say("", "# no ref leads here")
            why = "" if whole and not self._pack.left_out else ", or only through what could not be read"
            out.say(f"! {counted(len(loose), 'object')} in the packfile: part of nothing that is pushed{why}")
            out.say(*(f"{objects[name].kind} {name}, {objects[name].size} bytes" for name in loose[:MAX_NAMED]))
            if len(loose) > MAX_NAMED:
                out.say(f"… {len(loose) - MAX_NAMED} more are NOT named")


def _who(what: str, by: Signed) -> str:
    text = f"{what:<10} {ascii_only(by.who, 256)}"
    return f"{text}, {by.when}" if by.when else f"{text} (no time that can be read)"
