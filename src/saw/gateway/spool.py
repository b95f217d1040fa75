"""The durable, chained audit spool: a call's row is on disk before its answer leaves, many rows per commit.

One thread of each process writes to the SQLite file (WAL, synchronous FULL). Rows go when the broker has acknowledged them;
the head of the chain stays, so the chain goes on over restarts and over years.
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

from saw import jsontext
from saw.audit.chain import ChainedEvent, ChainError, Head, link
from saw.gateway.errors import SpoolError
from saw.sqlite import change

MAX_BATCH = 256
PATIENCE_S = 1.0
"""How long a change waits for one that another process makes (seconds). Envoy waits for decisions, so this is short."""
_FULL = "restore the connection to the broker"
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
    """The chain of one source in ``directory``; ``limit`` is how many events may wait before recording is refused.

    Any number of processes may share it: the end of the chain is read in the transaction that makes it longer.
    """

    def __init__(self, directory: Path, source: str, limit: int) -> None:
        self._source = source
        self._limit = limit
        self._path = directory / "spool.db"
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        try:
            self._database = self._open()
        except sqlite3.Error as error:
            raise SpoolError(f"the audit spool {self._path} cannot be opened: {error}") from error
        self._thread = threading.Thread(target=self._run, name="saw-spool", daemon=True)
        self._thread.start()

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=PATIENCE_S)
        self._path.chmod(0o600)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        with change(database):
            for statement in _SCHEMA.split(";\n"):
                database.execute(statement)
            first = Head()
            database.execute("INSERT OR IGNORE INTO head VALUES (1, ?, ?, ?, 0)", (self._source, first.seq, first.hash))
            (source,) = database.execute("SELECT source FROM head").fetchone()
        if source != self._source:
            database.close()
            raise SpoolError(
                f"the audit spool {self._path} belongs to {source}, not {self._source}", cure="use its own state_dir"
            )
        return database

    def _read_head(self) -> tuple[Head, int]:
        seq, digest, acknowledged = self._database.execute("SELECT seq, hash, acknowledged FROM head").fetchone()
        return Head(seq, digest), acknowledged

    @property
    def head(self) -> Head:
        """Return the end of the chain as it is on disk."""
        with self._reading():
            return self._read_head()[0]

    @property
    def acknowledged(self) -> int:
        """Return the highest sequence number that the broker has."""
        with self._reading():
            return self._read_head()[1]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise SpoolError(
                    f"the audit spool {self._path} cannot be read: {error}", cure="look at the disk"
                ) from error

    async def record(self, event: Mapping[str, Any]) -> int:
        """Chain ``event`` and return its sequence number once it is on disk; raise :class:`SpoolError` when it is not."""
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
        good: list[tuple[_Entry, int]] = []
        refused: list[tuple[_Entry, SpoolError]] = []
        try:
            with change(self._database, self._lock):
                head, acknowledged = self._read_head()
                rows: list[ChainedEvent] = []
                for entry in batch:
                    if head.seq - acknowledged >= self._limit:
                        refused.append((entry, SpoolError("the audit spool is full", cure=_FULL)))
                        continue
                    try:
                        chained = link(self._source, head, entry.event)
                    except ChainError as error:
                        refused.append((entry, SpoolError(error.message)))
                        continue
                    head = Head(chained.seq, chained.hash)
                    rows.append(chained)
                    good.append((entry, chained.seq))
                self._database.executemany(
                    "INSERT INTO event VALUES (?, ?)", [(row.seq, msgspec.json.encode(row)) for row in rows]
                )
                self._database.execute("UPDATE head SET seq = ?, hash = ?", (head.seq, head.hash))
        except sqlite3.Error as error:
            for entry in batch:
                _finish(entry, SpoolError(f"the audit spool cannot be written: {error}", cure="free disk space"))
            return
        for entry, why in refused:
            _finish(entry, why)
        for entry, seq in good:
            _finish(entry, seq)

    def pending(self, limit: int = MAX_BATCH) -> list[ChainedEvent]:
        """Return the oldest events that the broker has not acknowledged, in order; raises :class:`SpoolError`."""
        with self._reading():
            rows: Iterable[tuple[bytes]] = self._database.execute(
                "SELECT chained FROM event WHERE seq > (SELECT acknowledged FROM head) ORDER BY seq LIMIT ?", (limit,)
            ).fetchall()
        return [jsontext.decode(row[0], kind=ChainedEvent) for row in rows]

    def acknowledge(self, seq: int) -> None:
        """Note that the broker has everything up to ``seq`` and drop those rows.

        Raises :class:`SpoolError` when that cannot be noted: then the rows stay, and are sent and acknowledged again.
        """
        try:
            with change(self._database, self._lock) as database:
                known = database.execute(
                    "UPDATE head SET acknowledged = ? WHERE acknowledged < ? AND seq >= ?", (seq, seq, seq)
                )
                if known.rowcount:
                    database.execute("DELETE FROM event WHERE seq <= ?", (seq,))
        except sqlite3.Error as error:
            raise SpoolError(
                f"the audit spool {self._path} cannot be written: {error}", cure="free disk space"
            ) from error

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
