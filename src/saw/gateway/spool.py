"""The durable, chained audit spool: a call's row is on disk before its answer leaves, many rows per commit.

One writer thread owns the SQLite file (WAL, synchronous FULL). Rows go when the broker has acknowledged them; the head
of the chain stays, so the chain goes on over restarts and over years.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from saw.audit.chain import ChainedEvent, ChainError, Head, link
from saw.budget.ledger import undone
from saw.gateway.errors import SpoolError

MAX_BATCH = 256
_SCHEMA = """
CREATE TABLE IF NOT EXISTS head (one INTEGER PRIMARY KEY CHECK (one = 1), source TEXT NOT NULL, seq INTEGER NOT NULL,
  hash TEXT NOT NULL, acknowledged INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS event (seq INTEGER PRIMARY KEY, chained BLOB NOT NULL) STRICT;
"""


class _Entry(msgspec.Struct):
    event: Mapping[str, Any]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[int]


class Spool:
    """The chain of one source in ``directory``; ``limit`` is how many events may wait before recording is refused."""

    def __init__(self, directory: Path, source: str, limit: int) -> None:
        self._source = source
        self._limit = limit
        self._path = directory / "spool.db"
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        try:
            self._database = self._open()
            self._head, self._acknowledged = self._read_head()
        except sqlite3.Error as error:
            raise SpoolError(f"the audit spool {self._path} cannot be opened: {error}") from error
        self._thread = threading.Thread(target=self._run, name="saw-spool", daemon=True)
        self._thread.start()

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        self._path.chmod(0o600)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.executescript(_SCHEMA)
        return database

    def _read_head(self) -> tuple[Head, int]:
        row = self._database.execute("SELECT source, seq, hash, acknowledged FROM head").fetchone()
        if row is None:
            first = Head()
            self._database.execute("INSERT INTO head VALUES (1, ?, ?, ?, 0)", (self._source, first.seq, first.hash))
            return first, 0
        if row[0] != self._source:
            raise SpoolError(
                f"the audit spool {self._path} belongs to {row[0]}, not {self._source}", cure="use its own state_dir"
            )
        return Head(row[1], row[2]), row[3]

    @property
    def head(self) -> Head:
        """Return the end of the chain as it is on disk."""
        return self._head

    @property
    def acknowledged(self) -> int:
        """Return the highest sequence number that the broker has."""
        return self._acknowledged

    async def record(self, event: Mapping[str, Any]) -> int:
        """Chain ``event`` and return its sequence number once it is on disk; raise :class:`SpoolError` when it is not."""
        if self._head.seq - self._acknowledged >= self._limit:
            raise SpoolError("the audit spool is full", cure="restore the connection to the broker")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[int] = loop.create_future()
        self._queue.put(_Entry(event, loop, done))
        return await done

    def _run(self) -> None:
        stopping = False
        while not stopping:
            batch: list[_Entry] = []
            item = self._queue.get()
            while item is not None:
                batch.append(item)
                if len(batch) == MAX_BATCH:
                    break
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            stopping = item is None
            if batch:
                self._commit(batch)

    def _commit(self, batch: list[_Entry]) -> None:
        head = self._head
        rows: list[ChainedEvent] = []
        good: list[_Entry] = []
        for entry in batch:
            try:
                chained = link(self._source, head, entry.event)
            except ChainError as error:
                _finish(entry, SpoolError(error.message))
                continue
            head = Head(chained.seq, chained.hash)
            rows.append(chained)
            good.append(entry)
        try:
            with self._change() as database:
                database.executemany(
                    "INSERT INTO event VALUES (?, ?)", [(row.seq, msgspec.json.encode(row)) for row in rows]
                )
                database.execute("UPDATE head SET seq = ?, hash = ?", (head.seq, head.hash))
        except SpoolError as error:
            for entry in good:
                _finish(entry, error)
            return
        self._head = head
        for entry, row in zip(good, rows, strict=True):
            _finish(entry, row.seq)

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Hold a transaction that is on disk when the block ends; raise :class:`SpoolError` when it is not, and undo it."""
        with self._lock, undone(self._database):
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                raise SpoolError(f"the audit spool cannot be written: {error}", cure="free disk space") from error

    def pending(self, limit: int = MAX_BATCH) -> list[ChainedEvent]:
        """Return the oldest events that the broker has not acknowledged, in order; raise :class:`SpoolError`."""
        try:
            with self._lock:
                rows: Iterable[tuple[bytes]] = self._database.execute(
                    "SELECT chained FROM event WHERE seq > ? ORDER BY seq LIMIT ?", (self._acknowledged, limit)
                ).fetchall()
        except sqlite3.Error as error:
            raise SpoolError(f"the audit spool cannot be read: {error}", cure="look at the disk") from error
        return [msgspec.json.decode(row[0], type=ChainedEvent) for row in rows]

    def acknowledge(self, seq: int) -> None:
        """Note that the broker has everything up to ``seq`` and drop those rows.

        Raises :class:`SpoolError` when that cannot be noted: then the rows stay, and are sent and acknowledged again.
        """
        if not self._acknowledged < seq <= self._head.seq:
            return
        with self._change() as database:
            database.execute("UPDATE head SET acknowledged = ?", (seq,))
            database.execute("DELETE FROM event WHERE seq <= ?", (seq,))
        self._acknowledged = seq

    def close(self) -> None:
        """Write what is queued and close the file."""
        self._queue.put(None)
        self._thread.join()
        self._database.close()


def _finish(entry: _Entry, outcome: int | SpoolError) -> None:
    def settle() -> None:
        if entry.done.cancelled():
            return
        if isinstance(outcome, SpoolError):
            entry.done.set_exception(outcome)
        else:
            entry.done.set_result(outcome)

    try:
        entry.loop.call_soon_threadsafe(settle)
    except RuntimeError:
        return
