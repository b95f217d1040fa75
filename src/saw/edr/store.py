"""The bounded spool of findings, and what is known of the host, in one SQLite file that survives ``kill -9``.

A finding and the state it was found against change in one transaction: a crash between them can neither lose the finding nor
report it twice. When too many findings wait for delivery, nothing is written and the state stays as it was, so that what still
stands is found again once there is room. What came and went meanwhile is lost, so that the gap itself is a finding then.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from saw import jsontext
from saw.audit.events import EventFactory
from saw.edr.detection import AT_ONCE, WORST_AT_ONCE, Detection, EdrError, Render, bounded, event_of
from saw.sqlite import change

Way = Literal["broker", "syslog"]
_GAP = "spool_full_since"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS finding (seq INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, event BLOB NOT NULL,
  broker INTEGER NOT NULL DEFAULT 0, syslog INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE IF NOT EXISTS known (area TEXT NOT NULL, path BLOB NOT NULL, mark TEXT NOT NULL, PRIMARY KEY (area, path))
  STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS note (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""


class SpoolFull(EdrError):
    """Too many findings wait for delivery."""

    code = "spool_full"


class Found(msgspec.Struct, frozen=True):
    """A finding in the spool: its number, its OCSF event, and where it has been delivered."""

    seq: int
    event: dict[str, Any]
    broker: bool
    syslog: bool


class Store:
    """The spool in ``directory``. ``limit`` findings may wait, and as many delivered ones are kept to be read.

    ``render`` makes the OCSF event of a detection. ``tells_gaps``: a time without room becomes a finding, which may be one more
    than ``limit``.
    """

    def __init__(
        self,
        directory: Path,
        limit: int,
        *,
        ways: tuple[Way, ...] = ("syslog",),
        render: Render = event_of,
        tells_gaps: bool = True,
    ) -> None:
        self._limit = limit
        self._ways = ways
        self._render = render
        self._tells_gaps = tells_gaps
        self.path = directory / "findings.db"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make(self.path)
            self._database = sqlite3.connect(self.path, isolation_level=None, timeout=30, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise EdrError(
                f"the findings in {self.path} cannot be opened: {error}", cure="look at the folder and its disk"
            ) from error

    def use(self, ways: tuple[Way, ...]) -> None:
        """From now on findings wait until they were delivered on ``ways``."""
        self._ways = ways

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def record(
        self,
        detections: Iterable[Detection],
        factory: EventFactory,
        time: datetime,
        *,
        workspace: str = "",
        known: Mapping[str, Mapping[str, str | None]] | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> list[int]:
        """Write what is new of ``detections`` and return its numbers.

        ``known`` is area → path → mark (None forgets the path) and ``notes`` name → value: both are written with the findings, or
        not at all. Raises :class:`SpoolFull` and :class:`EdrError`.
        """

        def event(one: Detection) -> bytes:
            return msgspec.json.encode(self._render(one, factory, time, workspace))

        # One look must fit into an empty spool, or it would never be written.
        worst = min(WORST_AT_ONCE, max(AT_ONCE, self._limit // 2))
        try:
            return self._record(bounded(detections, worst=worst), event, time, known or {}, notes or {})
        except SpoolFull:
            if self._tells_gaps and self.note(_GAP) is None:
                self.notes({_GAP: iso(time)})
            raise

    def _record(
        self,
        detections: list[Detection],
        event: Callable[[Detection], bytes],
        time: datetime,
        known: Mapping[str, Mapping[str, str | None]],
        notes: Mapping[str, str],
    ) -> list[int]:
        numbers: list[int] = []
        with self._transaction() as database:
            since = self.note(_GAP) if self._waiting(database) < self._limit else None
            gap = None if since is None else _gap(since, time)
            for one in detections if gap is None else [*detections, gap]:
                key = one.key.encode("utf-8", "backslashreplace").decode()  # names of files need not be UTF-8
                row = database.execute("SELECT 1 FROM finding WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    continue
                if self._waiting(database) >= self._limit and one is not gap:
                    raise SpoolFull(
                        f"{self._limit} findings wait for delivery",
                        cure="look why they are not delivered: saw edr status",
                    )
                done = database.execute("INSERT INTO finding (key, event) VALUES (?, ?)", (key, event(one)))
                numbers.append(int(done.lastrowid or 0))
            _keep(database, known)
            for name, value in notes.items():
                database.execute("INSERT OR REPLACE INTO note VALUES (?, ?)", (name, value))
            if gap is not None:
                database.execute("DELETE FROM note WHERE name = ?", (_GAP,))
        return numbers

    def known(self, area: str) -> dict[str, str]:
        """Return the marks of an area, by path."""
        rows = self._database.execute("SELECT path, mark FROM known WHERE area = ?", (area,)).fetchall()
        return {os.fsdecode(path): mark for path, mark in rows}

    def keep(self, known: Mapping[str, Mapping[str, str | None]]) -> None:
        """Write marks alone: area → path → mark, None forgets the path."""
        with self._transaction() as database:
            _keep(database, known)

    def note(self, name: str) -> str | None:
        """Return a note."""
        row = self._database.execute("SELECT value FROM note WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def notes(self, values: Mapping[str, str]) -> None:
        """Write notes."""
        with self._transaction() as database:
            database.executemany("INSERT OR REPLACE INTO note VALUES (?, ?)", list(values.items()))

    def waiting(self) -> int:
        """Return how many findings wait for delivery."""
        return self._waiting(self._database)

    def pending(self, way: Way, limit: int = 100) -> list[Found]:
        """Return the oldest findings that were not delivered on ``way``."""
        return self._rows(f"WHERE {_column(way)} = 0 ORDER BY seq LIMIT ?", (limit,))

    def newest(self, limit: int = 1000) -> list[Found]:
        """Return the newest findings, oldest first."""
        return self._rows("ORDER BY seq DESC LIMIT ?", (limit,))[::-1]

    def delivered(self, way: Way, seq: int) -> None:
        """Note that finding ``seq`` arrived on ``way``, and drop the oldest of those that arrived everywhere."""
        with self._transaction() as database:
            database.execute(f"UPDATE finding SET {_column(way)} = 1 WHERE seq = ?", (seq,))  # noqa: S608 - a fixed name
            database.execute(
                f"DELETE FROM finding WHERE NOT ({self._open}) AND seq <= "  # noqa: S608 - fixed names
                "(SELECT max(seq) FROM finding) - ?",
                (self._limit,),
            )

    def _rows(self, rest: str, values: tuple[object, ...]) -> list[Found]:
        rows = self._database.execute(f"SELECT seq, event, broker, syslog FROM finding {rest}", values)  # noqa: S608
        return [Found(seq, jsontext.decode(event), bool(one), bool(two)) for seq, event, one, two in rows]

    @property
    def _open(self) -> str:
        return " OR ".join(f"{_column(way)} = 0" for way in self._ways) or "FALSE"

    def _waiting(self, database: sqlite3.Connection) -> int:
        return int(database.execute(f"SELECT count(*) FROM finding WHERE {self._open}").fetchone()[0])  # noqa: S608

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with change(self._database) as database:
                yield database
        except sqlite3.Error as error:
            raise EdrError(f"{self.path} cannot be written: {error}", cure="free space on its disk") from error


def _keep(database: sqlite3.Connection, known: Mapping[str, Mapping[str, str | None]]) -> None:
    for area, marks in known.items():
        for path, mark in marks.items():
            if mark is None:
                database.execute("DELETE FROM known WHERE area = ? AND path = ?", (area, os.fsencode(path)))
            else:
                database.execute("INSERT OR REPLACE INTO known VALUES (?, ?, ?)", (area, os.fsencode(path), mark))


def _make(path: Path) -> None:
    """Make the empty file for its owner alone; root makes it for the owner of the folder, who works with it."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    try:
        owner = path.parent.stat()
        if os.geteuid() == 0:
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
    finally:
        os.close(descriptor)


def _column(way: Way) -> str:
    return {"broker": "broker", "syslog": "syslog"}[way]


def _gap(since: str, until: datetime) -> Detection:
    return Detection(
        "agent_unhealthy",
        f"the spool was full since {since}",
        "Findings had no room, and what came and went meanwhile was not told",
        f"spool_gap|{since}",
        "high",
        {"since": since, "until": iso(until)},
    )


def iso(time: datetime) -> str:
    """Return ``time`` as text with its zone."""
    return time.astimezone(UTC).isoformat(timespec="seconds")


__all__ = ["Found", "SpoolFull", "Store", "Way", "iso"]
