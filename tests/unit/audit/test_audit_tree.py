"""The Merkle tree against RFC 6962 word by word; tiles in the public layout; what was changed has another root or no proof."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_rig import EMPTY, Log, leaf, mth, path, proof

from saw.audit import merkle
from saw.audit.tiles import Leaf, Tiles, TreeError, TreeWriter, join_entries, split_entries, tile_path

pytestmark = pytest.mark.control("AUD-02")

FEW = settings(max_examples=30, deadline=None)
STEPS = st.lists(st.integers(0, 300), min_size=1, max_size=5)


def grown(steps, total=None) -> tuple[Log, list[bytes]]:
    """A log that grew in steps, and its entries."""
    log, entries = Log(), []
    for step in steps:
        new = [leaf(len(entries) + number) for number in range(step)]
        log.grow(new)
        entries += [one.raw for one in new]
    return log, entries


@FEW
@given(STEPS)
def test_a_tree_that_grows_in_steps_has_the_root_of_the_whole(steps) -> None:
    log, entries = grown(steps)
    tiles = Tiles(log.files, len(entries))
    assert log.root == mth(entries) == tiles.root() == tiles.root_of_leaves()
    assert list(tiles.leaves()) == entries
    assert list(tiles.leaves(len(entries) // 2)) == entries[len(entries) // 2 :]


@FEW
@given(st.integers(1, 700), st.data())
def test_proofs_are_those_of_the_rfc_and_verify_for_nothing_else(size, data) -> None:
    log, entries = grown([size])
    tiles = Tiles(log.files, size)
    index = data.draw(st.integers(0, size - 1))
    found = merkle.inclusion_proof(index, size, tiles.node)
    assert found == path(index, entries)
    digest = merkle.leaf_hash(entries[index])
    assert merkle.verify_inclusion(digest, index, size, found, log.root)
    other = data.draw(st.integers(0, size + 2))
    assert merkle.verify_inclusion(digest, other, size, found, log.root) == (other == index)
    assert not merkle.verify_inclusion(merkle.leaf_hash(b"x"), index, size, found, log.root)
    assert not merkle.verify_inclusion(digest, index, size, [*found, EMPTY], log.root)
    if found:
        assert not merkle.verify_inclusion(digest, index, size, found[:-1], log.root)
        place = data.draw(st.integers(0, len(found) - 1))
        assert not merkle.verify_inclusion(digest, index, size, [*found[:place], EMPTY, *found[place + 1 :]], log.root)


@FEW
@given(st.integers(0, 600), st.integers(0, 300), st.data())
def test_a_beginning_is_consistent_and_a_fork_is_not(old, more, data) -> None:
    log, entries = grown([old, more])
    new = old + more
    old_root = mth(entries[:old])
    found = merkle.consistency_proof(old, new, Tiles(log.files, new).node)
    if 0 < old < new:
        assert found == proof(old, entries)
    assert merkle.verify_consistency(old, new, found, old_root, log.root)
    if old:
        assert not merkle.verify_consistency(old, new, found, mth([*entries[: old - 1], b"forged"]), log.root)
        assert not merkle.verify_consistency(old, new, found, old_root, mth([*entries[:-1], b"forged"]))
    assert not merkle.verify_consistency(old, new, [*found, EMPTY], old_root, log.root)
    assert not merkle.verify_consistency(new + 1, new, found, old_root, log.root)
    if found:
        place = data.draw(st.integers(0, len(found) - 1))
        forged = [*found[:place], b"\1" * 32, *found[place + 1 :]]
        assert not merkle.verify_consistency(old, new, forged, old_root, log.root)


@FEW
@given(st.integers(0, 600), st.integers(1, 400), st.integers(0, 6))
def test_a_crash_while_tiles_are_written_leaves_the_old_tree_and_the_next_run_the_new_one(old, more, after) -> None:
    log, entries = grown([old])
    new = [leaf(old + number) for number in range(more)]
    log.files.fail = after
    try:
        log.grow(new)
    except KeyboardInterrupt:
        assert Tiles(log.files, old).root() == Tiles(log.files, old).root_of_leaves() == mth(entries)
        log.files.fail = None
        log.grow(new)
    assert log.root == mth(entries + [one.raw for one in new]) == Tiles(log.files, log.size).root_of_leaves()


def test_a_large_tree_has_the_tiles_of_the_specification() -> None:
    log = Log()
    log.grow(leaf(number) for number in range(70_000))
    assert tile_path(0, 1234067) == "tile/0/x001/x234/067"
    assert tile_path("entries", 273, 112) == "tile/entries/273.p/112"
    names = set(log.files)
    assert {f"tile/0/{number:03d}" for number in range(273)} <= names
    assert names >= {"tile/0/273.p/112", "tile/1/000", "tile/1/001.p/17", "tile/2/000.p/1", "tile/entries/273.p/112"}
    assert not any(name.startswith("tile/3") for name in names)
    assert len(names) == 2 * 274 + 3
    tiles = Tiles(log.files, 70_000)
    for index in (0, 255, 65_535, 65_536, 69_999):
        steps = merkle.inclusion_proof(index, 70_000, tiles.node)
        assert merkle.verify_inclusion(merkle.leaf_hash(leaf(index).raw), index, 70_000, steps, log.root)
    writer = TreeWriter(log.files, "x", 70_000, log.root)
    assert writer.last == leaf(69_999)
    with pytest.raises(ValueError, match="not in a tree"):
        merkle.inclusion_proof(70_000, 70_000, tiles.node)


def test_a_partial_tile_goes_when_it_is_full_and_an_old_tree_reads_the_full_one() -> None:
    log, entries = grown([100, 300])
    assert not any(name.startswith(("tile/0/000.p", "tile/entries/000.p")) for name in log.files)
    assert Tiles(log.files, 100).root() == Tiles(log.files, 100).root_of_leaves() == mth(entries[:100])


@pytest.mark.parametrize("name", ["tile/0/001.p/44", "tile/entries/001.p/44", "tile/0/000", "tile/1/000.p/1"])
def test_a_tree_is_not_continued_on_tiles_that_are_missing_cut_or_changed(name) -> None:
    for change in (None, b"", b"\0" * 31, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])):
        log, entries = grown([300])
        assert log.files[name]
        if change is None:
            del log.files[name]
        else:
            log.files[name] = change(log.files[name]) if callable(change) else change
        if name == "tile/0/000":  # a tree of 300 is continued from the node above it
            assert Tiles(log.files, 300).root_of_leaves() == mth(entries)
            continue
        with pytest.raises(TreeError):
            log.grow([leaf(300)])
    log, entries = grown([300])
    log.grow([leaf(300)])
    assert log.root == mth([*entries, leaf(300).raw])


@FEW
@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(1, 5))
def test_entry_bundles_come_back_and_a_cut_one_is_refused(entries, cut) -> None:
    raw = join_entries(entries)
    assert split_entries(raw) == entries
    with pytest.raises(TreeError):
        split_entries(raw + b"\0\5abcde"[: 2 + cut - 1])


def test_an_entry_is_a_leaf_in_canonical_form_alone() -> None:
    good = leaf(1).raw
    assert Leaf.parse(good) == leaf(1)
    for bad in (
        b"{}",
        good + b" ",
        good.replace(b'"seq":2', b'"seq":2.0'),
        good.replace(b"edge", b"\\u0065dge"),
        b"\xff",
    ):
        with pytest.raises(TreeError):
            Leaf.parse(bad)
