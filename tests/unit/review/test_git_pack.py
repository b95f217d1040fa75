"""A packfile is read within bounds, by content, and what is wrong with it is said; the real git makes the good ones."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from git_rig import Repository, commit_of, entry, name_of, pack_of, tree_of
from hypothesis import given, settings
from hypothesis import strategies as st

from saw.review import git_pack
from saw.review.git_objects import Unreadable, name_problem, order_problems, read_commit, read_tag, read_tree
from saw.review.git_pack import Damaged, Store, apply_delta, read_pack
from saw.review.line_diff import Effort

pytestmark = pytest.mark.control("REV-02")
HELLO = b"hello world\n"


def read(data: bytes) -> tuple[git_pack.Pack, Store]:
    store = Store()
    return read_pack(data, store), store


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    made = Repository(tmp_path_factory.mktemp("packs") / "r")
    lines = [f"line {number} of a text that is long enough for deltas\n" for number in range(300)]
    for number in range(12):
        lines[number * 20] = f"changed in {number}\n"
        made.commit({"text": "".join(lines), f"dir/{number}": str(number)})
    return made


@pytest.mark.parametrize("options", [["--delta-base-offset"], []])
def test_what_git_packs_is_read_as_git_reads_it(repository: Repository, options: list[str]) -> None:
    given = b"HEAD\n"
    data = repository.raw("pack-objects", "--stdout", "--revs", "-q", "--depth=9", *options, given=given)
    pack, store = read(data)
    assert (pack.problems, pack.left_out, pack.bases) == ([], 0, {})
    listed = repository.git("rev-list", "--objects", "HEAD").splitlines()
    names = [line.partition(" ")[0] for line in listed]
    assert sorted(pack.names) == sorted(names)
    for line in repository.git("cat-file", "--batch-check", given="\n".join(names).encode()).splitlines():
        name, kind, size = line.split()
        assert (store.objects[name].kind, store.objects[name].size) == (kind, int(size))


def test_thin_deltas_need_what_the_far_end_has(repository: Repository) -> None:
    thin = repository.pack("HEAD", "^HEAD~1")
    pack, _ = read(thin)
    assert pack.bases
    assert any("NOT resolved" in problem for problem in pack.problems)
    store = Store()
    read_pack(repository.pack("HEAD~1"), store)
    again = read_pack(thin, store)
    assert (again.problems, again.bases, again.left_out) == ([], {}, 0)
    assert len(again.names) == again.declared


def test_a_repository_with_sha256_is_read(tmp_path: Path) -> None:
    made = Repository(tmp_path / "r", "--object-format=sha256")
    commit = made.commit({"a": "b\n"})
    store = Store("sha256")
    pack = read_pack(made.pack(commit), store)
    assert (pack.problems, commit in pack.names) == ([], True)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no packfile"),
        (b"PACK" + bytes(40), "no packfile"),
        (pack_of(entry(3, HELLO), checksum=bytes(20)), "checksum"),
        (pack_of(entry(3, HELLO), tail=b"more"), "4 bytes follow"),
        (pack_of(entry(3, HELLO), count=2), "object 2 of 2 cannot be read: the packfile ends"),
        (pack_of(entry(5, HELLO)), "its type 5 does not exist"),
        (pack_of(entry(0, HELLO)), "its type 0 does not exist"),
        (pack_of(entry(3, HELLO, size=5)), "more than the 5 bytes"),
        (pack_of(entry(3, HELLO, size=50)), "has 12 bytes and declares 50"),
        (pack_of(entry(3, b"", size=1 << 40)), "no more than"),
        (pack_of(entry(3, HELLO, raw=b"no stream at all")), "cannot be inflated"),
        (pack_of(entry(3, HELLO, raw=zlib.compress(HELLO)[:-6])), "cannot be"),
        (pack_of(entry(6, b"\x01\x01\x90\x01", base=b"\x05")), "does not begin an object"),
        (pack_of(b"\xb0" + b"\x80" * 12), "its size cannot be read"),
        (pack_of(entry(7, b"\x0c\x0c\x90\x0c", base=b"\x11" * 20)), "1 object are deltas|1 objects are deltas"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_pack_is_said(data: bytes, why: str) -> None:
    pack, _ = read(data)
    assert any(part in problem for problem in pack.problems for part in why.split("|"))


def test_its_twin_without_a_fault_is_read_and_so_is_what_comes_before_a_fault() -> None:
    pack, store = read(pack_of(entry(3, HELLO)))
    assert (pack.problems, store.data(name_of("blob", HELLO), "blob")) == ([], HELLO)
    pack, store = read(pack_of(entry(3, HELLO), entry(5, HELLO), entry(3, b"after")))
    assert store.data(name_of("blob", HELLO), "blob") == HELLO
    assert pack.left_out == 2


def test_a_bomb_is_not_inflated_beyond_what_it_declares_nor_kept_beyond_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bomb = bytes(4 * 1024 * 1024)
    lying, _ = read(pack_of(entry(3, bomb, size=100)))
    assert "more than the 100 bytes" in lying.problems[0]
    monkeypatch.setattr(git_pack, "MAX_OBJECT", 1024 * 1024)
    honest, store = read(pack_of(entry(3, bomb), entry(3, HELLO)))
    found = store.objects[name_of("blob", bomb)]
    assert (found.size, found.data, honest.problems) == (len(bomb), None, [])
    assert store.data(name_of("blob", HELLO), "blob") == HELLO, "what follows is read"


def test_deltas_that_make_more_than_they_may_or_go_round_in_circles_are_not_applied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = entry(3, bytes(0xFFFF))
    grows = b"\xff\xff\x03" + b"\x80\x80\x80\x04" + b"\xb0\xff\xff" * 140
    monkeypatch.setattr(git_pack, "MAX_OBJECT", 1024 * 1024)
    pack, store = read(pack_of(base, entry(6, grows, base=bytes([len(base)]))))
    assert any("NOT applied" in problem for problem in pack.problems)
    assert len(store.objects) == 1
    one, two = name_of("blob", b"one"), name_of("blob", b"two")
    circle = [entry(7, b"\x03\x03\x90\x03", base=bytes.fromhex(name)) for name in (one, two)]
    pack, _ = read(pack_of(*circle))
    assert (pack.left_out, sorted(pack.bases)) == (2, sorted([one, two]))


def test_a_chain_of_deltas_is_followed_as_far_as_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    entries, at = [entry(3, b"x")], len(entry(3, b"x"))
    for number in range(6):
        before = len(entries[-1])
        entries.append(
            entry(6, bytes([number + 1, number + 2]) + bytes([0x90, number + 1]) + b"\x01y", base=bytes([before]))
        )
        at += len(entries[-1])
    pack, store = read(pack_of(*entries))
    assert (pack.problems, name_of("blob", b"xyyyyyy") in store.objects) == ([], True)
    monkeypatch.setattr(git_pack, "MAX_CHAIN", 3)
    pack, store = read(pack_of(*entries))
    assert name_of("blob", b"xyyy") in store.objects
    assert name_of("blob", b"xyyyy") not in store.objects
    assert pack.left_out == 3


@pytest.mark.parametrize(
    "delta",
    [
        b"", b"\x03\x03", b"\x02\x03\x90\x03", b"\x03\x04\x90\x03", b"\x03\x03\x90\x04", b"\x03\x03\x00", b"\x03\x03\x03ab",
        b"\x03\x02\x90\x03", b"\x03\x03\x91", b"\x80" * 12,
    ],
)  # fmt: skip
def test_a_delta_that_does_not_fit_is_refused(delta: bytes) -> None:
    with pytest.raises(Damaged):
        apply_delta(b"abc", delta, 100, Effort())
    assert apply_delta(b"abc", b"\x03\x05\x90\x03\x02de", 100, Effort()) == b"abcde"
    with pytest.raises(Damaged, match="more than it declares"):
        apply_delta(b"abc", b"\x03\x02\x90\x03", 100, Effort())
    with pytest.raises(Damaged):
        apply_delta(b"abc", b"\x03\x05\x90\x03\x02de", 4, Effort())


def test_a_delta_of_very_many_instructions_is_not_followed_to_its_end() -> None:
    many = b"\x03\xe8\x07" + b"\x90\x01" * 1000
    with pytest.raises(Damaged, match="too many instructions"):
        apply_delta(b"abc", many, 2000, Effort(999))
    assert len(apply_delta(b"abc", many, 2000, Effort(1000))) == 1000


@settings(max_examples=60)
@given(st.binary(max_size=200), st.integers(0, 300), st.integers(1, 255))
def test_no_bytes_and_no_broken_pack_raise_anything(noise: bytes, at: int, change: int) -> None:
    good = bytearray(pack_of(entry(3, HELLO * 9), entry(6, b"\x6c\x6c\x90\x6c", base=b"\x11"), entry(2, b"")))
    good[at % len(good)] ^= change
    for data in (noise, b"PACK\0\0\0\2\0\0\0\3" + noise + bytes(20), bytes(good)):
        pack, store = read(data)
        assert pack.problems
        assert all(
            name_of(found.kind, found.data) == name for name, found in store.objects.items() if found.data is not None
        )


def test_commits_tags_and_trees_are_read_strictly() -> None:
    tree, parent = "1" * 40, "2" * 40
    commit = read_commit(commit_of(tree, parent, message="why"))
    assert (commit.tree, commit.parents, commit.message, commit.author.when) == (
        tree, (parent,), b"why\n", "2023-11-14T22:13:20+00:00",
    )  # fmt: skip
    for wrong in (
        b"",
        b"tree x\n\n",
        commit_of(tree).replace(b"author", b"autor"),
        b"tree " + b"1" * 40 + b"\n" + commit_of(tree),
    ):
        with pytest.raises(Unreadable):
            read_commit(wrong)
    odd = read_commit(commit_of(tree).replace(b"1700000000 +0000", b"999999999999 +9999"))
    assert odd.author.when == ""
    assert read_tag(b"object " + b"1" * 40 + b"\ntype commit\ntag v1\n\nhello").name == b"v1"
    with pytest.raises(Unreadable):
        read_tag(b"tag v1\n\n")
    assert [one.name for one in read_tree(tree_of(("100644", b"a", tree)), 20)] == [b"a"]
    for cut in (b"100644 a\0short", b"10x644 a\0" + bytes(20), b"100644"):
        with pytest.raises(Unreadable):
            read_tree(cut, 20)


@pytest.mark.parametrize(
    "name",
    [
        b".git",
        b".GIT",
        b".git.",
        b"git~1",
        b".g\xe2\x80\x8cit",
        b"..",
        b".",
        b"",
        b"a/b",
        b"a\\b",
        b"a\nb",
        b".git::$INDEX",
    ],
)
def test_names_that_mislead_are_told_and_others_are_not(name: bytes) -> None:
    assert name_problem(name)
    for fine in (b".gitignore", b".github", b"git", "stra\u00dfe".encode(), b"\xff"):
        assert not name_problem(fine)


def test_names_that_appear_twice_or_out_of_order_are_told() -> None:
    def entries(*names: bytes) -> list[str]:
        return order_problems(read_tree(tree_of(*(("100644", name, "1" * 40) for name in names)), 20))

    assert any("more than once" in problem for problem in entries(b"a", b"a"))
    assert any("not in order" in problem for problem in entries(b"b", b"a"))
    assert entries(b"a", b"b") == []
