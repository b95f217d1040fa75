"""The trail as a Merkle tree in files that a web server can serve and anybody can copy (C2SP ``tlog-tiles``).

Leaf number i is the event at position i + 1 in the order of arrival: canonical JSON of ``source``, ``seq`` and ``hash``, so the
tree says nothing of what happened, and fixes all of it. ``tile/entries/…`` holds leaves, ``tile/<L>/…`` hashes, 256 to a
tile, and ``checkpoint`` the signed size and root. Tiles are written before the checkpoint that covers them, so a crash
leaves the old tree.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import rfc8785

from saw import jsontext
from saw.audit import merkle
from saw.audit.chain import ChainedEvent
from saw.audit.note import Checkpoint
from saw.errors import SawError
from saw.files import write_atomic

WIDTH = 256
_HASH = 32


class TreeError(SawError):
    """Tiles are missing or contradict what they should hold."""

    code = "tree_invalid"


class Leaf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the tree fixes of an event."""

    source: str
    seq: int
    hash: str

    @classmethod
    def of(cls, item: ChainedEvent) -> Leaf:
        """Return the leaf of a chained event."""
        return cls(item.source, item.seq, item.hash)

    @classmethod
    def parse(cls, entry: bytes) -> Leaf:
        """Read an entry; raise :class:`TreeError` unless it is exactly what :attr:`raw` writes."""
        try:
            leaf = jsontext.decode(entry, kind=cls)
            canonical = leaf.raw
        except (msgspec.DecodeError, rfc8785.CanonicalizationError) as error:
            raise TreeError(f"an entry is no leaf of the trail: {error}", cure="copy the tiles again") from error
        if canonical != entry:
            raise TreeError("an entry is not in its canonical form", cure="copy the tiles again")
        return leaf

    @property
    def raw(self) -> bytes:
        """The entry's bytes."""
        return rfc8785.dumps({"source": self.source, "seq": self.seq, "hash": self.hash})


class Files(Protocol):
    """Where tiles are, by their paths in the layout."""

    def read(self, path: str) -> bytes | None:
        """Return a file, None when it is not there."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Write a file as a whole, durably."""
        ...

    def drop(self, path: str) -> None:
        """Remove a folder of partial tiles that are not needed any more."""
        ...


class Folder:
    """:class:`Files` in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, path: str) -> bytes | None:
        """Return a file, None when it is not there; raise :class:`TreeError` when it cannot be read."""
        try:
            return (self._directory / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise TreeError(f"cannot read {path}: {error.strerror}", cure="check the folder's permissions") from error

    def write(self, path: str, data: bytes) -> None:
        """Write a file atomically; others may read it."""
        place = self._directory / path
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(place, data)

    def drop(self, path: str) -> None:
        """Remove a folder."""
        shutil.rmtree(self._directory / path, ignore_errors=True)


def tile_path(level: int | str, number: int, width: int = WIDTH) -> str:
    """Return the path of a tile; ``level`` is ``entries`` for leaves, ``width`` below 256 makes it a partial one."""
    parts = [f"{number % 1000:03d}"]
    while number >= 1000:
        number //= 1000
        parts.append(f"x{number % 1000:03d}")
    path = f"tile/{level}/{'/'.join(reversed(parts))}"
    return path if width == WIDTH else f"{path}.p/{width}"


class Tiles:
    """A tree of ``size`` leaves as its tiles say. Nothing that it returns is proved before it was held against a root."""

    def __init__(self, files: Files, size: int) -> None:
        self._files = files
        self.size = size
        self._kept: dict[tuple[int, int], bytes] = {}

    def node(self, height: int, index: int) -> bytes:
        """Return the hash of a whole subtree (see :mod:`saw.audit.merkle`)."""
        level, up = divmod(height, 8)
        count = 1 << up
        number, first = divmod(index * count, WIDTH)
        raw = self.hashes(level, number)
        return merkle.whole([raw[_HASH * place : _HASH * (place + 1)] for place in range(first, first + count)])

    def hashes(self, level: int, number: int) -> bytes:
        """Return the hashes of one tile as far as this tree has them."""
        if (level, number) not in self._kept:
            if len(self._kept) >= WIDTH:
                self._kept.clear()
            width = min(WIDTH, (self.size >> 8 * level) - number * WIDTH)
            raw = self._tile(level, number, width)
            if len(raw) < width * _HASH:
                raise TreeError(f"{tile_path(level, number, width)} is cut off", cure="copy the tiles again")
            self._kept[level, number] = raw[: width * _HASH]
        return self._kept[level, number]

    def leaves(self, first: int = 0) -> Iterator[bytes]:
        """Yield the entries from number ``first`` on, in order."""
        for number in range(first // WIDTH, -(-self.size // WIDTH)):
            width = min(WIDTH, self.size - number * WIDTH)
            raw = self._tile("entries", number, width)
            found = split_entries(raw)
            if len(found) < width:
                raise TreeError(f"{tile_path('entries', number, width)} is cut off", cure="copy the tiles again")
            yield from found[max(0, first - number * WIDTH) : width]

    def root(self) -> bytes:
        """Return the root that the hash tiles say."""
        return merkle.root_of(self.size, self.node)

    def root_of_leaves(self) -> bytes:
        """Return the root over the entries themselves, reading every one; memory does not grow with the tree."""
        grown = Levels()
        for entry in self.leaves():
            grown.add(merkle.leaf_hash(entry))
        return grown.root()

    def _tile(self, level: int | str, number: int, width: int) -> bytes:
        """Return a tile's file; a partial one may have gone when it became a full one."""
        for wanted in (width, WIDTH):
            raw = self._files.read(tile_path(level, number, wanted))
            if raw is not None:
                return raw
        raise TreeError(f"{tile_path(level, number, width)} is missing", cure="copy the tiles again, all of them")


class Levels:
    """The right edge of a tree: for each level of tiles the hashes of its last, not yet full one."""

    def __init__(self) -> None:
        self.rows: list[list[bytes]] = [[]]

    def add(self, leaf: bytes) -> list[tuple[int, list[bytes]]]:
        """Add a leaf's hash; return level and hashes of each tile that became full by it."""
        full: list[tuple[int, list[bytes]]] = []
        level, value = 0, leaf
        while True:
            if level == len(self.rows):
                self.rows.append([])
            self.rows[level].append(value)
            if len(self.rows[level]) < WIDTH:
                return full
            full.append((level, self.rows[level]))
            value = merkle.whole(self.rows[level])
            self.rows[level] = []
            level += 1

    def root(self) -> bytes:
        """Return the root over everything that was added."""
        parts = []
        for row in reversed(self.rows):
            first = 0
            for height, _ in merkle.peaks(len(row)):
                parts.append(merkle.whole(row[first : first + (1 << height)]))
                first += 1 << height
        return merkle.fold(parts)


class TreeWriter:
    """Grows a tree in its files. The caller signs and writes the checkpoint when :meth:`finish` has returned it."""

    def __init__(self, files: Files, origin: str, size: int, root: bytes) -> None:
        """Continue the tree of ``size`` and ``root``; raise :class:`TreeError` when the tiles are not that tree."""
        self._files, self._origin, self.size = files, origin, size
        tiles = Tiles(files, size)
        if tiles.root() != root:
            raise TreeError("the tiles are not those of the checkpoint", cure="restore the folder from a copy")
        self._levels = Levels()
        self._levels.rows = [
            [tiles.node(8 * level, (size >> 8 * level) - width + place) for place in range(width)]
            for level in range(max(1, -(-size.bit_length() // 8)))
            for width in [(size >> 8 * level) % WIDTH]
        ]
        self._entries = list(tiles.leaves(size - size % WIDTH)) if size % WIDTH else []
        self.last = Leaf.parse(self._last_entry(tiles)) if size else None

    def _last_entry(self, tiles: Tiles) -> bytes:
        """Return the last entry, which has to be the leaf that its tile says."""
        [entry] = tiles.leaves(self.size - 1)
        if merkle.leaf_hash(entry) != tiles.node(0, self.size - 1):
            raise TreeError("the last entry is not the last leaf", cure="restore the folder from a copy")
        return entry

    def add(self, leaves: Iterable[Leaf]) -> None:
        """Append leaves; tiles that become full are written."""
        for leaf in leaves:
            entry = leaf.raw
            self._entries.append(entry)
            for level, row in self._levels.add(merkle.leaf_hash(entry)):
                number = (self.size >> 8 * (level + 1)) if level else self.size // WIDTH
                if level == 0:
                    self._full("entries", number, join_entries(self._entries))
                    self._entries = []
                self._full(level, number, b"".join(row))
            self.size += 1
            self.last = leaf

    def finish(self) -> Checkpoint:
        """Write the partial tiles of this size and return the checkpoint."""
        for level, row in enumerate(self._levels.rows):
            if row:
                number = self.size >> 8 * (level + 1)
                self._files.write(tile_path(level, number, len(row)), b"".join(row))
        if self._entries:
            path = tile_path("entries", self.size // WIDTH, len(self._entries))
            self._files.write(path, join_entries(self._entries))
        return Checkpoint(self._origin, self.size, self._levels.root())

    def _full(self, level: int | str, number: int, data: bytes) -> None:
        self._files.write(tile_path(level, number), data)
        self._files.drop(f"{tile_path(level, number)}.p")


def join_entries(entries: Iterable[bytes]) -> bytes:
    """Return an entry bundle: each entry behind its length in two bytes."""
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def split_entries(raw: bytes) -> list[bytes]:
    """Return the entries of a bundle; raise :class:`TreeError` when it is cut off within one."""
    found, place = [], 0
    while place < len(raw):
        end = place + 2 + int.from_bytes(raw[place : place + 2], "big")
        if end > len(raw) or place + 2 > len(raw):
            raise TreeError("an entry bundle is cut off", cure="copy the tiles again")
        found.append(raw[place + 2 : end])
        place = end
    return found
