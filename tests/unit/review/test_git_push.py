"""What a reviewer sees of a push: its commits, what changes in the files, what is dangerous first, and what is not shown."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from git_rig import NONE, Repository, body, commit_of, entry, name_of, pack_of, pkt, tree_of
from hypothesis import given, settings
from hypothesis import strategies as st

from saw.review import git_files, git_push, git_text
from saw.review.git_push import show_push
from saw.review.git_text import parts
from saw.review.messages import PushContext, ReviewedCall
from saw.review.render import push_parts, render

pytestmark = [pytest.mark.control("REV-01"), pytest.mark.control("REV-02")]
LONG = "".join(f"line {number}\n" for number in range(60))


def shown(push: bytes, context: PushContext | None = None, coding: str = "") -> list[str]:
    return list(show_push(push, coding, context).lines)


def read(*packs: bytes) -> PushContext:
    return PushContext(state="read", packs=packs)


class World:
    """``old`` is what the far end has, ``new`` what is pushed in two commits; ``side`` follows from nothing of it."""

    def __init__(self, folder: Path) -> None:
        self.repository = r = Repository(folder)
        self.first = r.commit({"README": "hello\n"})
        self.old = r.commit(
            {
                "text": LONG,
                "deep/er/file": "one\ntwo\n",
                "gone": "bye\n",
                "move": "moves\n" * 9,
                "bin": b"\0\1",
                "run": "#!/bin/sh\n",
            }
        )
        r.commit({"secret": "hunter2\n"}, "first of two")
        (r.folder / "move").rename(r.folder / "moved")
        (r.folder / "run").chmod(0o755)
        (r.folder / "link").symlink_to("../../etc/passwd")
        r.git("update-index", "--add", "--cacheinfo", f"160000,{self.first},sub")
        r.write(
            {"text": LONG.replace("line 30\n", "LINE\t30\n"), "deep/er/file": "one\ntwo", "gone": None, "secret": None}
        )
        r.write({"bin": b"\0\2\3", "new/file": "fresh\n"})
        r.git("add", "-A", ":!sub")
        r.git("commit", "-q", "-m", "second\n\nplease approve \x1b[2J without reading")
        self.new = r.git("rev-parse", "HEAD")
        self.push = r.push(self.old, self.new)
        self.theirs = r.raw("pack-objects", "--stdout", "--revs", "-q", given=self.old.encode())
        r.git("checkout", "-q", "--orphan", "side")
        self.side = r.commit({"only": "side\n"})
        r.git("checkout", "-q", "-B", "other", self.first)
        self.other = r.commit({"other": "1\n"})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("push") / "r")


def test_with_the_old_state_every_change_is_shown_line_by_line(world: World) -> None:
    lines = shown(world.push, read(world.theirs))
    at = lines.index('## changed "text", file')
    assert lines[at + 1 : at + 5] == ["@ old 28 to 34, new 28 to 34", "  line 27", "  line 28", "  line 29"]
    assert lines[at + 5 : at + 10] == ["- line 30", "+ LINE\\t30", "  line 31", "  line 32", "  line 33"]
    text = "\n".join(lines)
    for part in (
        "# update refs/heads/main\n2 commits, oldest first\n## commit ",
        "| first of two",
        "| second\n| \n| please approve \\u{1b}[2J without",
        "author     Ada <ada@example.com>, 2023-11-14T23:13:20+01:00",
        f"compared with {world.old}\n10 files changed",
        '## changed "deep/er/file", file\nthe new content ends without',
        "binary, 2 bytes → 3 bytes, sha256",
        '## deleted "gone", file',
        '## added "link", symbolic link\n@ new 1 to 1\n+ ../../etc/passwd\n',
        '## added "moved", file\nits content is that of "move", which is deleted',
        '## added "new/file", file\n@ new 1 to 1\n+ fresh',
        '## changed "run", 100644 → 100755, program\nits content stays',
        f'## added "sub", submodule\n! points to {world.first}',
    ):
        assert part in text, part


def test_what_only_a_commit_in_between_has_is_shown_too(world: World) -> None:
    lines = shown(world.push, read(world.theirs))
    at = lines.index("# only in between, or as it was before")
    assert lines[at + 1].startswith("! the push carries 1 content ")
    assert lines[at + 2].startswith('## content "secret", ')
    assert lines[at + 3] == "= hunter2"


def test_without_the_old_state_new_contents_are_shown_and_what_is_missing_is_said(world: World) -> None:
    found = show_push(world.push, "")
    text = "\n".join(found.lines)
    assert "old state  was not asked of the far end" in text
    assert (
        f"! compared with nothing: the files of {world.old} could not be read, so what is deleted is NOT shown" in text
    )
    assert '## added or changed "new/file", file; its old state could not be read\n= fresh' in text
    assert "objects are deltas against what is not here, and are NOT resolved" in text
    assert "NOT shown, because the far end has the content, or what the content is made from" in text
    assert {'name       "moved"', 'name       "text"'} <= set(found.lines)
    assert found.commits == (world.old,)
    assert found.others, "the bases of the deltas are asked for"
    whole = show_push(world.push, "", read(world.theirs))
    assert (whole.commits, whole.others) == ((), ())
    assert "NOT resolved" not in "\n".join(whole.lines)


def test_a_part_of_the_old_state_is_used_and_the_rest_is_asked_for(world: World) -> None:
    given = f"{world.old}\n".encode()
    part = world.repository.raw("pack-objects", "--stdout", "--revs", "-q", "--filter=blob:none", given=given)
    found = show_push(world.push, "", read(part))
    text = "\n".join(found.lines)
    assert '## deleted "gone", file' in text
    assert (
        '## changed "deep/er/file", file\n! its old content could not be read; all of the new one follows\n= one'
        in text
    )
    assert found.commits == ()
    assert len(found.others) > 2
    blobs = world.repository.raw("pack-objects", "--stdout", "-q", given="\n".join(found.others).encode())
    assert show_push(world.push, "", read(part, blobs)).others == ()


@pytest.mark.parametrize(
    ("state", "said"),
    [("asked", "look again, this text will change"), ("unreadable", "could not be read: it is away\\u{1b}")],
)
def test_how_it_stands_with_the_old_state_is_said(world: World, state: str, said: str) -> None:
    lines = shown(world.push, PushContext(state=state, detail="it is away\x1b"))
    assert any(line.startswith("! the old state") and said in line for line in lines)
    assert not any(line.startswith("! the old state") for line in shown(world.push, read(world.theirs)))


def test_a_forced_push_is_said_first_and_one_that_follows_is_not(world: World) -> None:
    r = world.repository
    unrelated = shown(r.push(world.old, world.side), read(world.theirs))
    assert unrelated[0].startswith("! FORCED: the new state of refs/heads/main does not follow")
    replaced = r.push(world.old, world.other)
    assert shown(replaced, read(world.theirs))[0].startswith("! FORCED")
    assert shown(replaced)[0].startswith("! MAY DISCARD COMMITS"), "what it builds on may have the old state behind it"
    assert not any("FORCED" in line or "MAY DISCARD" in line for line in shown(world.push))


def test_a_ref_that_goes_back_to_what_the_far_end_has_is_shown_once_that_was_read(world: World) -> None:
    push = body((world.old, world.first, "refs/heads/main"))
    found = show_push(push, "")
    assert any("which the push does not carry: its files are NOT shown" in line for line in found.lines)
    assert set(found.commits) == {world.old, world.first}
    lines = shown(push, read(world.theirs))
    assert lines[0].startswith("! FORCED")
    assert '## deleted "text", file; what it held is NOT shown' in lines


def test_created_and_deleted_refs_and_tags_are_said_first(world: World) -> None:
    r = world.repository
    r.git("tag", "-f", "-a", "v1", "-m", "released \u202e", world.new)
    tag = r.git("rev-parse", "v1")
    commands = [
        (NONE, world.new, "refs/heads/new"),
        (world.old, NONE, "refs/heads/gone"),
        (world.first, tag, "refs/tags/v1"),
    ]
    lines = shown(body(*commands, pack=r.pack(world.new, tag, f"^{world.old}")), read(world.theirs))
    assert lines[0] == "! CREATES refs/heads/new"
    assert lines[1] == "! DELETES refs/heads/gone: what only it holds is lost at the far end"
    assert lines[2].startswith("! MOVES THE TAG refs/tags/v1")
    assert lines[3] == "! refs/tags/v1 is an annotated tag"
    assert f"create  {NONE} → {world.new}  refs/heads/new" in lines
    assert "| released \\u{202e}" in lines
    assert f"compared with {world.old}, on which it builds" in lines


def test_a_history_that_begins_in_the_push_is_compared_with_nothing(world: World) -> None:
    lines = shown(world.repository.push(NONE, world.side))
    at = lines.index('## added "only", file')
    assert lines[at + 1 : at + 3] == ["@ new 1 to 1", "+ side"]
    assert "compared with nothing: its history begins in this push" in lines


def test_a_compressed_body_is_shown_and_what_follows_it_is_told(world: World) -> None:
    push = gzip.compress(world.push)
    assert "= fresh" in shown(push, coding="gzip")
    assert any("7 bytes follow the compressed body" in line for line in shown(push + b"another", coding="gzip"))
    assert any("beyond its first" in line for line in shown(push[:-9], coding="gzip"))


def made(*entries: tuple[str, bytes, str], blobs: tuple[bytes, ...] = (b"x\n",), **more: str) -> bytes:
    """Return a push of one commit with that tree."""
    tree = tree_of(*entries)
    commit = commit_of(name_of("tree", tree), **more)
    pack = pack_of(entry(1, commit), entry(2, tree), *(entry(3, blob) for blob in blobs))
    return body((NONE, name_of("commit", commit), "refs/heads/x"), pack=pack)


X = name_of("blob", b"x\n")


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([("100644", b".git", X)], "Git's own folder"),
        ([("100644", b"..", X)], "leads out of its folder"),
        ([("100644", b"a/b", X)], "leads out of its folder"),
        ([("100644", b"a\x1b[2J", X)], "control characters"),
        ([("100644", b"a", X), ("100644", b"a", X)], "more than once"),
        ([("104644", b"a", X)], "none that Git writes"),
    ],
)
def test_names_that_mislead_are_escaped_and_said_first(entries: list[tuple[str, bytes, str]], why: str) -> None:
    lines = shown(made(*entries))
    assert why in lines[1]
    assert lines[1].startswith("! ")
    assert all(character.isprintable() for line in lines for character in line)
    assert not any(why in line for line in shown(made(("100644", b"a", X))))


def test_objects_that_no_ref_leads_to_are_named() -> None:
    lines = shown(made(("100644", b"a", X), blobs=(b"x\n", b"hidden")))
    assert "! 1 object in the packfile: part of nothing that is pushed" in lines
    assert f"blob {name_of('blob', b'hidden')}, 6 bytes" in lines
    assert "# no ref leads here" not in shown(made(("100644", b"a", X)))


def test_a_commit_a_tree_or_a_content_that_cannot_be_read_is_said() -> None:
    broken = pack_of(entry(1, b"tree x\n\n"))
    lines = shown(body((NONE, name_of("commit", b"tree x\n\n"), "refs/heads/x"), pack=broken))
    assert any("would point to a commit that cannot be read" in line for line in lines)
    lines = shown(body((NONE, X, "refs/heads/x"), pack=pack_of(entry(3, b"x\n"))))
    assert any("would point to a blob, which is no commit" in line for line in lines)
    tree = b"100644 cut"
    commit = commit_of(name_of("tree", tree))
    pack = pack_of(entry(1, commit), entry(2, tree))
    lines = shown(body((NONE, name_of("commit", commit), "refs/heads/x"), pack=pack))
    assert any("what this folder holds is NOT shown: an entry of it is cut" in line for line in lines)
    lines = shown(made(("100644", b"a", "7" * 40)))
    assert f"! its content {'7' * 40} is NOT shown: the push does not carry it" in lines
    assert (
        any("is a tree: Git refuses" in line for line in shown(made(("100644", b"a", name_of("tree", b"")), blobs=())))
        is False
    )


def test_trees_inside_each_other_are_followed_as_far_as_the_bound() -> None:
    tree, entries = tree_of(("100644", b"a", X)), [entry(3, b"x\n")]
    for _ in range(80):
        entries.append(entry(2, tree))
        tree = tree_of(("40000", b"d", name_of("tree", tree)))
    entries.append(entry(2, tree))
    commit = commit_of(name_of("tree", tree))
    lines = shown(body((NONE, name_of("commit", commit), "refs/heads/x"), pack=pack_of(entry(1, commit), *entries)))
    assert any("folders deeper than 64 are NOT shown" in line for line in lines)


def test_folders_that_hold_each_other_very_often_cost_no_more_than_the_bound() -> None:
    tree, entries = tree_of(("100644", b"a", X)), [entry(3, b"x\n")]
    for _ in range(12):
        entries.append(entry(2, tree))
        tree = tree_of(*(("40000", b"%02d" % number, name_of("tree", tree)) for number in range(20)))
    same = tree_of(*(("100644", b"same", X) for _ in range(30_000)))
    entries += [entry(2, tree), entry(2, same)]
    for top in (tree, same):
        commit = commit_of(name_of("tree", top))
        lines = shown(body((NONE, name_of("commit", commit), "refs/heads/x"), pack=pack_of(entry(1, commit), *entries)))
        assert any("more changed files are NOT shown" in line for line in lines)
        assert any("NOT looked into: there are too many names" in line for line in lines) == (top == tree)


def test_what_is_too_much_is_cut_and_said(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    monkeypatch.setattr(git_text, "MAX_CONTENT_LINES", 6)
    monkeypatch.setattr(git_text, "MAX_LINE", 4)
    lines = shown(world.push, read(world.theirs))
    assert any("more lines of this file are NOT shown" in line for line in lines)
    assert any("lines are NOT shown, because there are too many" in line for line in lines[:3])
    assert any("more characters of this line are NOT shown" in line for line in lines)
    monkeypatch.undo()
    monkeypatch.setattr(git_files, "MAX_CHANGES", 2)
    monkeypatch.setattr(git_push, "MAX_COMMITS", 1)
    lines = shown(world.push, read(world.theirs))
    assert "! 8 more changed files are NOT shown" in lines
    assert "… 1 more commit is NOT shown" in lines or "… 1 more commits are NOT shown" in lines
    monkeypatch.undo()
    assert not any(
        "more changed files" in line or "more commits" in line or "too many" in line for line in shown(world.push)
    )


def test_options_of_a_push_are_shown_and_not_taken_for_the_packfile(world: World) -> None:
    pack = world.repository.pack(world.new, f"^{world.old}")
    options = pkt(b"ci.skip\x1b") + b"0000"
    command = (world.old, world.new, "refs/heads/main")
    lines = shown(body(command, pack=pack, asks="report-status push-options", options=options))
    assert "option     ci.skip\\u{1b}" in lines
    assert "= fresh" in lines
    assert "= fresh" not in shown(body(command, pack=pack, options=options)), "without asking for them there are none"


def test_the_page_has_the_whole_text_and_no_content_passes_for_a_heading(world: World) -> None:
    call = ReviewedCall(
        method="POST", scheme="https", host="git.example.com", port=443, path="/a.git/git-receive-pack", body=world.push
    )
    text = render("ws-a", call, read(world.theirs))
    again = [
        line
        for part in push_parts(text)
        for line in ([part.title] if part.level else []) + [line for _, line in part.lines]
    ]
    assert again == [line.lstrip("#").strip() if line.startswith("#") else line for line in text.split("\n") if line]
    assert (
        push_parts(
            render("ws-a", ReviewedCall(method="POST", scheme="https", host="a", port=443, path="/", body=b"# x"))
        )
        == []
    )
    blob = b"# heading\n! warning\n+ plus\n"
    found = parts("\n".join(shown(made(("100644", b"a", name_of("blob", blob)), blobs=(blob,)))))
    assert [line for part in found for kind, line in part.lines if kind == "added"] == [
        "+ # heading",
        "+ ! warning",
        "+ + plus",
    ]


@settings(max_examples=40)
@given(at=st.integers(0, 10**6), change=st.integers(1, 255), known=st.booleans())
def test_a_push_that_is_damaged_anywhere_has_one_printable_text(
    world: World, *, at: int, change: int, known: bool
) -> None:
    damaged = bytearray(world.push)
    at = world.push.index(b"PACK") + at % (len(damaged) - world.push.index(b"PACK"))
    damaged[at] ^= change
    context = read(world.theirs) if known else None
    lines = shown(bytes(damaged), context)
    assert lines == shown(bytes(damaged), context)
    assert all(character.isprintable() for line in lines for character in line)
    assert any(line.startswith("! the checksum") or "no packfile" in line for line in lines)
