"""The bounded spool of events in one SQLite file that survives ``kill -9``: a hash chain, and how far the journal was read.

An event and the cursor of the entry that it was made of are written in one transaction, so a crash neither loses nor repeats
one. The spool never overwrites: what has no room is not taken, and stays in the journal. An event goes when every way has
acknowledged it. A spool that is made anew is another chain (:attr:`Spool.source`).
"""

from __future__ import annotations

import os
import re
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from saw import jsontext
from saw.audit.chain import ChainedEvent, Head, link
from saw.audit.ocsf import validate
from saw.sqlite import change
from saw.telemetry.config import TelemetryError, Way

#: So many delivered events are kept to be read, while there is room.
KEPT = 200
_SCHEMA = """
CREATE TABLE IF NOT EXISTS event (seq INTEGER PRIMARY KEY, chained BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS way (name TEXT PRIMARY KEY, seq INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS note (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""
_FULL = "full_since"


class Spool:
    """The spool in ``directory``; events of ``limit`` bytes may lie there. For several threads."""

    def __init__(self, directory: Path, limit: int, host: str) -> None:
        self.path = directory / "spool.db"
        self._limit = limit
        self._lock = threading.RLock()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            self._database = sqlite3.connect(self.path, isolation_level=None, timeout=30, check_same_thread=False)
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "journal_size_limit=4194304"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.executescript(_SCHEMA)
            with self._transaction():
                if not self._note("source"):
                    self._write_note("source", f"host.{_plain(host)}.{secrets.token_hex(4)}")
                self.source = self._note("source")
        except (sqlite3.Error, OSError) as error:
            raise TelemetryError(
                f"{self.path} cannot be opened: {error}", cure="look at the folder and its disk"
            ) from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    @property
    def cursor(self) -> str:
        """The cursor of the entry of the journal that was read last, empty before the first."""
        with self._reading():
            return self._note("cursor")

    @property
    def head(self) -> Head:
        """The end of the chain."""
        with self._reading():
            text = self._note("head")
        return jsontext.decode(text, kind=Head) if text else Head()

    @property
    def full_since(self) -> str:
        """Since when events have had no room, empty while there is some."""
        with self._reading():
            return self._note(_FULL)

    def append(
        self, read: Sequence[tuple[str, dict[str, Any] | None]], now: str, *, first: Iterable[dict[str, Any]] = ()
    ) -> int:
        """Write what was read, each entry's cursor with its event or None; return how many entries were taken.

        Those that were not have no room: they are to be read again. ``first`` are events about the spool and its gaps, which go
        before the others and have room whenever there is any.
        """
        with self._lock, self._transaction():
            room, trimmed = self._limit - self._bytes(), False
            head, taken, cursor = self.head, 0, ""
            items: list[tuple[int, bytes]] = []
            for place, event in [*(("", event) for event in first), *read]:
                if event is not None:
                    item = link(self.source, head, _valid(event))
                    raw = msgspec.json.encode(item)
                    if not trimmed and room < len(raw):  # what is only kept to be read goes first
                        trimmed = True
                        before = self._bytes()
                        self._trim(0)
                        room += before - self._bytes()
                    if room <= 0 or (place and room < len(raw)):
                        break
                    items.append((item.seq, raw))
                    room -= len(raw)
                    head = Head(item.seq, item.hash)
                taken += bool(place)
                cursor = place or cursor
            if taken or not read:  # a gap is not told before the entry behind it, for then it would be found again
                self._database.executemany("INSERT INTO event VALUES (?, ?)", items)
                self._write_note("head", msgspec.json.encode(head).decode())
            if cursor:
                self._write_note("cursor", cursor)
            if taken < len(read) or room <= 0:
                self._write_note(_FULL, self._note(_FULL) or now)
            elif taken:
                self._database.execute("DELETE FROM note WHERE name = ?", (_FULL,))
        return taken

    def has_room(self, more: int = 0) -> bool:
        """Whether anything can be taken: what waits is below the limit by ``more`` bytes."""
        with self._reading():
            return self._bytes(self._arrived()) + more < self._limit

    def use(self, ways: tuple[Way, ...], away: tuple[Way, ...] = ()) -> None:
        """Events go when these ways have acknowledged them; a way that is new begins with the oldest one there is.

        ``away`` are ways that are configured and not there now: one that was used before keeps its place, and its events wait.
        """
        kept = (*ways, *away)
        with self._lock, self._transaction():
            marks = ",".join("?" * len(kept))
            self._database.execute(f"DELETE FROM way WHERE name NOT IN ({marks})", kept)  # noqa: S608 - question marks
            self._database.executemany("INSERT OR IGNORE INTO way VALUES (?, 0)", [(name,) for name in ways])

    def pending(self, way: Way, limit: int) -> list[ChainedEvent]:
        """Return the oldest events that have not arrived on ``way``."""
        with self._reading():
            rows = self._database.execute(
                "SELECT chained FROM event WHERE seq > coalesce((SELECT seq FROM way WHERE name = ?), 0) ORDER BY seq LIMIT ?",
                (way, limit),
            ).fetchall()
            return [jsontext.decode(raw, kind=ChainedEvent) for (raw,) in rows]

    def acknowledged(self, way: Way, seq: int) -> None:
        """Note that everything up to ``seq`` has arrived on ``way``, and let go of what has arrived everywhere."""
        with self._lock, self._transaction():
            self._database.execute("UPDATE way SET seq = max(seq, ?) WHERE name = ?", (seq, way))
            self._trim(KEPT)

    def newest(self, limit: int) -> list[ChainedEvent]:
        """Return the newest events, oldest first, those that have arrived too."""
        with self._reading():
            rows = self._database.execute("SELECT chained FROM event ORDER BY seq DESC LIMIT ?", (limit,)).fetchall()
            return [jsontext.decode(raw, kind=ChainedEvent) for (raw,) in reversed(rows)]

    def waiting(self) -> dict[str, int]:
        """Return how many events wait, by way."""
        with self._reading():
            rows = self._database.execute(
                "SELECT name, (SELECT count(*) FROM event WHERE event.seq > way.seq) FROM way ORDER BY name"
            ).fetchall()
        return {str(name): int(count) for name, count in rows}

    def bytes_waiting(self) -> int:
        """Return how many bytes wait."""
        with self._reading():
            return self._bytes(self._arrived())

    def _trim(self, kept: int) -> None:
        last = min(self._arrived(), self.head.seq - kept)
        self._database.execute("DELETE FROM event WHERE seq <= ?", (last,))

    def _arrived(self) -> int:
        """Return the number up to which everything has arrived everywhere; 0 while there is no way."""
        return int(self._database.execute("SELECT coalesce(min(seq), 0) FROM way").fetchone()[0])

    def _bytes(self, after: int = 0) -> int:
        row = self._database.execute(
            "SELECT coalesce(sum(length(chained)), 0) FROM event WHERE seq > ?", (after,)
        ).fetchone()
        return int(row[0])

    def _note(self, name: str) -> str:
        row = self._database.execute("SELECT value FROM note WHERE name = ?", (name,)).fetchone()
        return "" if row is None else str(row[0])

    def _write_note(self, name: str, value: str) -> None:
        self._database.execute("INSERT OR REPLACE INTO note VALUES (?, ?)", (name, value))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except (sqlite3.Error, msgspec.MsgspecError) as error:
                raise TelemetryError(
                    f"{self.path} cannot be read: {error}", cure="look at the folder and its disk"
                ) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with change(self._database):
                yield
        except sqlite3.Error as error:
            raise TelemetryError(f"{self.path} cannot be written: {error}", cure="free space on its disk") from error


def _valid(event: dict[str, Any]) -> dict[str, Any]:
    validate(event)
    return event


def _plain(host: str) -> str:
    """Return the host's name as a part of the name of a chain."""
    return re.sub(r"[^a-z0-9-]+", "-", host.lower().partition(".")[0]).strip("-")[:40] or "unknown"


__all__ = ["KEPT", "Spool"]
