"""Merkle trees as in RFC 6962, section 2.1: roots, inclusion and consistency proofs, and their verification.

A node is named by height and index: it spans the leaves ``index * 2**height`` up to the next node's first. Proofs are made
from nodes that somebody else may have stored; verification needs nothing but roots, sizes and the proof.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

#: Gives the hash of the whole subtree of a height and index.
Node = Callable[[int, int], bytes]

EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(entry: bytes) -> bytes:
    """Return the hash of a leaf."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def fold(hashes: Sequence[bytes]) -> bytes:
    """Return the root over whole subtrees, given from left to right with strictly decreasing sizes."""
    if not hashes:
        return EMPTY_ROOT
    root = hashes[-1]
    for left in reversed(hashes[:-1]):
        root = node_hash(left, root)
    return root


def whole(hashes: Sequence[bytes]) -> bytes:
    """Return the root over a power of two of equally high nodes."""
    level = list(hashes)
    while len(level) > 1:
        level = [node_hash(level[place], level[place + 1]) for place in range(0, len(level), 2)]
    return level[0]


class Edge:
    """The right edge of a tree that grows: the roots of its whole subtrees, from left to right. It is some hundred bytes."""

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        """Continue a tree of ``size`` leaves; ``hashes`` is what :attr:`hashes` was."""
        if len(hashes) != size.bit_count():
            raise ValueError(f"a tree of {size} has {size.bit_count()} whole subtrees")
        self.size = size
        self.hashes = list(hashes)

    def add(self, leaf: bytes) -> None:
        """Add a leaf's hash."""
        self.hashes.append(leaf)
        self.size += 1
        for _ in range((self.size & -self.size).bit_length() - 1):
            right, left = self.hashes.pop(), self.hashes.pop()
            self.hashes.append(node_hash(left, right))

    def root(self) -> bytes:
        """Return the root over everything that was added."""
        return fold(self.hashes)


def peaks(size: int) -> list[tuple[int, int]]:
    """Return height and index of the whole subtrees that make up a tree of ``size`` leaves, from left to right."""
    found, first = [], 0
    for height in reversed(range(size.bit_length())):
        if size >> height & 1:
            found.append((height, first >> height))
            first += 1 << height
    return found


def root_of(size: int, node: Node) -> bytes:
    """Return the root of the tree of the first ``size`` leaves."""
    return _range(0, size, node) if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, node: Node) -> list[bytes]:
    """Return the proof that leaf ``index`` is in the tree of ``size`` leaves (RFC 6962 PATH)."""
    if not 0 <= index < size:
        raise ValueError(f"leaf {index} is not in a tree of {size}")
    return _path(index, 0, size, node)


def consistency_proof(old: int, new: int, node: Node) -> list[bytes]:
    """Return the proof that the tree of ``old`` leaves is the beginning of that of ``new`` (RFC 6962 PROOF)."""
    if not 0 <= old <= new:
        raise ValueError(f"a tree of {new} has no beginning of {old}")
    return [] if old in (0, new) else _subproof(old, 0, new, True, node)


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Tell whether ``proof`` shows that ``leaf`` (a leaf's hash) is number ``index`` of the tree with ``size`` and ``root``."""
    if not 0 <= index < size:
        return False
    place, last, found = index, size - 1, leaf
    for step in proof:
        if last == 0:
            return False
        if place & 1 or place == last:
            found = node_hash(step, found)
            while place and not place & 1:
                place, last = place >> 1, last >> 1
        else:
            found = node_hash(found, step)
        place, last = place >> 1, last >> 1
    return last == 0 and found == root


def verify_consistency(old: int, new: int, proof: Sequence[bytes], old_root: bytes, new_root: bytes) -> bool:
    """Tell whether ``proof`` shows that the tree ``old``/``old_root`` is the beginning of ``new``/``new_root``."""
    if not 0 <= old <= new:
        return False
    if old == new:
        return not proof and old_root == new_root
    if old == 0:
        return not proof and old_root == EMPTY_ROOT
    steps = list(proof)
    if old & (old - 1) == 0:
        steps.insert(0, old_root)
    if not steps:
        return False
    place, last = old - 1, new - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    before = after = steps[0]
    for step in steps[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            before, after = node_hash(step, before), node_hash(step, after)
            while place and not place & 1:
                place, last = place >> 1, last >> 1
        else:
            after = node_hash(after, step)
        place, last = place >> 1, last >> 1
    return last == 0 and before == old_root and after == new_root


def _split(count: int) -> int:
    """Return the largest power of two below ``count`` (of at least 2)."""
    return 1 << (count - 1).bit_length() - 1


def _range(first: int, end: int, node: Node) -> bytes:
    """Return the hash over the leaves from ``first``, which begins a subtree, up to ``end``."""
    count = end - first
    if count & (count - 1) == 0:
        height = count.bit_length() - 1
        return node(height, first >> height)
    middle = first + _split(count)
    return node_hash(_range(first, middle, node), _range(middle, end, node))


def _path(index: int, first: int, end: int, node: Node) -> list[bytes]:
    if end - first == 1:
        return []
    middle = first + _split(end - first)
    if index < middle:
        return [*_path(index, first, middle, node), _range(middle, end, node)]
    return [*_path(index, middle, end, node), _range(first, middle, node)]


def _subproof(old: int, first: int, end: int, known: bool, node: Node) -> list[bytes]:
    """``old`` is absolute here; ``known``: the verifier has the root of what the old tree holds of this range."""
    if old == end:
        return [] if known else [_range(first, end, node)]
    middle = first + _split(end - first)
    if old <= middle:
        return [*_subproof(old, first, middle, known, node), _range(middle, end, node)]
    return [*_subproof(old, middle, end, False, node), _range(first, middle, node)]
