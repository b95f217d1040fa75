"""Calls of model services that policy has kept: on the perimeter's disk, encrypted, for as long as policy says.

One SQLite file (WAL, synchronous FULL). What a call said and who made it is under AES-256-GCM, bound to the record and to what of
it it is; readable beside it are only when, how large, of which workspace and until when, and of the answer its status, its pieces
and whether all of it is there. A record is on disk before its call
leaves. Where the store is full or cannot be written, :class:`RecordUnavailable` is raised, and the call is refused.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from saw import jsontext
from saw.errors import ConfigError, SawError
from saw.identity.sealed import KEY_BYTES, SealBroken, SealKey
from saw.sqlite import change

MAX_ANSWER = 16 * 1024 * 1024
"""How much of one answer is kept (bytes)."""
MAX_LISTED = 500
"""Most records that one question lists."""
Answered = Literal["none", "open", "whole", "cut", "broken_off"]
"""What there is of an answer: none is kept, it goes on, all of it, or a part. ``cut``: it was too long, there was no room, or a
piece is lost. ``broken_off``: nothing more came of it, and no end; the client left, or the service ended it."""
SILENT_S = 960.0
"""After how long without a piece an answer counts as broken off (seconds). Envoy ends what says nothing for 900. A piece or an
end that comes all the same takes that back."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS record (id TEXT PRIMARY KEY, at REAL NOT NULL, until REAL NOT NULL, workspace TEXT NOT NULL,
  bytes INTEGER NOT NULL, answer TEXT NOT NULL, answer_bytes INTEGER NOT NULL, status INTEGER NOT NULL, pieces INTEGER,
  facts BLOB NOT NULL, body BLOB) STRICT;
CREATE INDEX IF NOT EXISTS record_until ON record (until);
CREATE INDEX IF NOT EXISTS record_at ON record (at);
CREATE INDEX IF NOT EXISTS record_open ON record (at) WHERE answer = 'open';
CREATE TABLE IF NOT EXISTS piece (record TEXT NOT NULL, place INTEGER NOT NULL, sealed BLOB NOT NULL,
  PRIMARY KEY (record, place)) STRICT;
CREATE TABLE IF NOT EXISTS heard (record TEXT PRIMARY KEY, at REAL NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS held (one INTEGER PRIMARY KEY CHECK (one = 1), bytes INTEGER NOT NULL) STRICT;
"""
PATIENCE_S = 1.0
"""How long a change waits for another one (seconds), before the call that must be kept is refused."""
LEFT_FREE = 64 * 1024 * 1024
"""How much of the disk no record takes (bytes)."""
_ROW = 512
"""What a row takes beside its contents (bytes), so that many small calls fill the store as well."""


class RecordUnavailable(SawError):
    """A call that must be kept cannot be, so it must not happen."""

    code = "record_unavailable"


class RecordUnknown(SawError):
    """There is no such record (any more)."""

    code = "record_unknown"


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Who asked which model when, under what; times are RFC 3339. ``data_classes``: what the call held. ``size``: of its body."""

    time: str
    workspace: str
    sponsor: str
    agent: str
    delegation: str
    review: str
    policy_digest: str
    request_id: str
    route: str
    service: str
    path: str
    model: str
    model_sent: str
    data_classes: tuple[str, ...]
    content: str
    size: int


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """A record without what was said. ``until``: when it is removed (seconds since 1970). ``status`` 0: no answer was told."""

    id: str
    until: float
    answer: Answered
    answer_bytes: int
    status: int
    facts: Facts


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """A record with what was said; ``body`` is None where only the facts are kept."""

    listed: Listed
    body: bytes | None
    answer: bytes


def load_key(path: Path) -> bytes:
    """Read the key of the store, which nobody else may read; raise :class:`ConfigError` otherwise."""
    try:
        mode = path.stat().st_mode
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", cure="make it with `saw gateway init`, or put it back"
        ) from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path} can be read by others", cure=f"chmod 0600 {path}")
    if len(raw) != KEY_BYTES:
        raise ConfigError(f"{path} has {len(raw)} bytes, and a key has {KEY_BYTES}", cure="put the right file back")
    return raw


Room = Callable[[Path], int]


def free_room(path: Path) -> int:
    """Return how many bytes are free on the disk of ``path``."""
    found = os.statvfs(path.parent)
    return found.f_bavail * found.f_frsize


def purge_file(path: Path, now: float) -> int:
    """Remove from ``path`` what was kept long enough, where nothing is kept any more; this takes no key."""
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=PATIENCE_S)) as database:
            database.execute("PRAGMA secure_delete=ON")
            with change(database):
                database.execute("DELETE FROM piece WHERE record IN (SELECT id FROM record WHERE until <= ?)", (now,))
                gone = database.execute("DELETE FROM record WHERE until <= ?", (now,)).rowcount
                database.execute("DELETE FROM held")  # counted anew when something is kept again
    except sqlite3.Error as error:
        raise RecordUnavailable(f"records in {path} cannot be removed: {error}", cure="look at the disk") from error
    return int(gone)


class RecordStore:
    """The records in ``path``; they take ``limit`` bytes at most.

    Every method may be called from any thread, and several processes may have the same file open: how much is held is counted in
    the file, in the transaction of each change.
    """

    def __init__(
        self, path: Path, key: bytes, limit: int, *, random: Callable[[int], bytes] = os.urandom, room: Room = free_room
    ) -> None:
        self._path = path
        self._room = room
        self._key = SealKey(key, random)
        self._limit = limit
        self._lock = threading.Lock()
        try:
            path.touch(0o600)
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=PATIENCE_S)
            path.chmod(0o600)
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.executescript(_SCHEMA)
            if self._database.execute("SELECT COUNT(*) FROM held").fetchone() == (0,):
                self._database.execute(
                    "INSERT OR IGNORE INTO held SELECT 1, COALESCE(SUM(bytes + answer_bytes + ?), 0) FROM record",
                    (_ROW,),
                )
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"the records {path} cannot be opened: {error}", cure="look at the disk") from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            with change(self._database, self._lock, PATIENCE_S) as database:
                yield database
        except sqlite3.Error as error:
            raise RecordUnavailable(f"the record cannot be written: {error}", cure="free disk space") from error

    def keep(self, record: str, at: float, until: float, facts: Facts, body: bytes | None, *, answer: bool) -> None:
        """Write a record of a call; ``answer``: what is answered belongs to it. Raises :class:`RecordUnavailable`."""
        sealed = self._key.seal(_bound(record, "facts"), msgspec.json.encode(facts))
        said = None if body is None else self._key.seal(_bound(record, "body"), body)
        size = len(sealed) + len(said or b"")
        with self._writing() as database:
            self._make_room(database, size + _ROW)
            database.execute(
                "INSERT INTO record VALUES (?, ?, ?, ?, ?, ?, 0, 0, NULL, ?, ?)",
                (record, at, until, facts.workspace, size, "open" if answer else "none", sealed, said),
            )

    def _make_room(self, database: sqlite3.Connection, size: int) -> None:
        """Count ``size`` bytes more as held, or raise :class:`RecordUnavailable`.

        The last of the disk's room is left to the audit spool and the ledger, without which no call at all is decided.
        """
        if self._room(self._path) < LEFT_FREE + size:
            raise RecordUnavailable("the disk under the records of calls is nearly full", cure="free disk space")
        taken = database.execute("UPDATE held SET bytes = bytes + ? WHERE bytes + ? <= ?", (size, size, self._limit))
        if taken.rowcount != 1:
            raise RecordUnavailable(
                "the records of calls are full",
                cure="ask the platform team for more room, or the policy's owner to have less kept",
            )

    def add(self, record: str, place: int, text: bytes, at: float = 0.0) -> bool:
        """Write a piece of an answer that came ``at`` (seconds since 1970); return whether it is on disk.

        One that does not fit leaves the answer cut.
        """
        sealed = self._key.seal(_bound(record, f"answer:{place}"), text)
        try:
            with self._writing() as database:
                row = database.execute("SELECT answer, answer_bytes FROM record WHERE id = ?", (record,)).fetchone()
                if row is None or row[0] not in {"open", "broken_off"}:
                    return False
                if row[1] + len(sealed) > MAX_ANSWER:
                    database.execute("UPDATE record SET answer = 'cut' WHERE id = ?", (record,))
                    return False
                found = database.execute("INSERT OR IGNORE INTO piece VALUES (?, ?, ?)", (record, place, sealed))
                if found.rowcount != 1:
                    return False
                self._make_room(database, len(sealed))
                database.execute(
                    "UPDATE record SET answer = 'open', answer_bytes = answer_bytes + ? WHERE id = ?",
                    (len(sealed), record),
                )
                database.execute(
                    "INSERT INTO heard VALUES (?, ?) ON CONFLICT DO UPDATE SET at = max(at, excluded.at)", (record, at)
                )
                _complete(database, record)
        except RecordUnavailable:
            self._cut(record)
            raise
        return True

    def _cut(self, record: str) -> None:
        with self._writing() as database:
            database.execute(
                "UPDATE record SET answer = 'cut' WHERE id = ? AND answer IN ('open', 'broken_off')", (record,)
            )

    def end(self, record: str, pieces: int, status: int) -> None:
        """Note that an answer came in ``pieces``, numbered from 0; it is whole once all of them are here, which may be later.

        One that counted as broken off goes on, until :meth:`purge` gives it up again.
        """
        with self._writing() as database:
            database.execute(
                "UPDATE record SET status = ?, pieces = ?, answer = iif(answer = 'broken_off', 'open', answer) "
                "WHERE id = ? AND pieces IS NULL",
                (status, pieces, record),
            )
            _complete(database, record)

    def forget(self, record: str) -> None:
        """Remove the record of a call that was refused after all."""
        self._remove("id = ?", (record,))

    def purge(self, now: float, *, silent_s: float = SILENT_S) -> int:
        """Remove what was kept long enough, and give up answers of which nothing came for ``silent_s``; return how many went.

        Where the end of one was told, and so in how many pieces it came, some of these are lost.
        """
        with self._writing() as database:
            database.execute(
                "UPDATE record SET answer = iif(pieces IS NULL, 'broken_off', 'cut') WHERE answer = 'open' "
                "AND at < ?1 AND coalesce((SELECT heard.at FROM heard WHERE heard.record = record.id), 0) < ?1",
                (now - silent_s,),
            )
            database.execute("DELETE FROM heard WHERE record NOT IN (SELECT id FROM record WHERE answer = 'open')")
        return self._remove("until <= ?", (now,))

    def _remove(self, where: str, values: tuple[object, ...]) -> int:
        with self._writing() as database:
            database.execute(
                f"DELETE FROM piece WHERE record IN (SELECT id FROM record WHERE {where})",  # noqa: S608 - our own words
                values,
            )
            freed = database.execute(
                f"SELECT COALESCE(SUM(bytes + answer_bytes + ?), 0) FROM record WHERE {where}",  # noqa: S608 - our own words
                (_ROW, *values),
            ).fetchone()[0]
            gone = database.execute(f"DELETE FROM record WHERE {where}", values).rowcount  # noqa: S608 - our own words
            database.execute("UPDATE held SET bytes = MAX(0, bytes - ?)", (freed,))
        return int(gone)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._database
            except sqlite3.Error as error:
                raise RecordUnavailable(f"the records cannot be read: {error}", cure="look at the disk") from error

    def listed(self, *, workspace: str = "", before: float | None = None, limit: int = 50) -> list[Listed]:
        """Return records without what was said, the newest first: of one workspace, older than ``before``, at most ``limit``."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT id, until, answer, answer_bytes, status, facts FROM record WHERE (? = '' OR workspace = ?) "
                "AND (? IS NULL OR at < ?) ORDER BY at DESC, id LIMIT ?",
                (workspace, workspace, before, before, min(limit, MAX_LISTED)),
            ).fetchall()
        return [self._as_listed(row) for row in rows]

    def read(self, record: str) -> Whole:
        """Return a whole record; raise :class:`RecordUnknown`, or :class:`RecordUnavailable` where it does not open."""
        with self._reading() as database:
            row = database.execute(
                "SELECT id, until, answer, answer_bytes, status, facts, body FROM record WHERE id = ?", (record,)
            ).fetchone()
            pieces = database.execute(
                "SELECT place, sealed FROM piece WHERE record = ? ORDER BY place", (record,)
            ).fetchall()
        if row is None:
            raise RecordUnknown(f"there is no record {record[:64]}", cure="list them with `saw inference log`")
        body = None if row[6] is None else self._open(record, "body", row[6])
        answer = b"".join(self._open(record, f"answer:{place}", sealed) for place, sealed in pieces)
        return Whole(listed=self._as_listed(row), body=body, answer=answer)

    def _as_listed(self, row: tuple[object, ...]) -> Listed:
        record = str(row[0])
        facts = jsontext.decode(self._open(record, "facts", row[5]), kind=Facts)
        return msgspec.convert(
            {"id": record, "until": row[1], "answer": row[2], "answer_bytes": row[3], "status": row[4], "facts": facts},
            Listed,
        )

    def _open(self, record: str, what: str, sealed: object) -> bytes:
        try:
            return self._key.open(_bound(record, what), sealed if isinstance(sealed, bytes) else b"")
        except SealBroken as error:
            raise RecordUnavailable(
                f"the {what.partition(':')[0]} of record {record} cannot be opened",
                cure="the file was changed, or the key is another one",
            ) from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()


def _complete(database: sqlite3.Connection, record: str) -> None:
    """Call an answer whole once there are as many pieces as it came in."""
    database.execute(
        "UPDATE record SET answer = 'whole' WHERE id = ? AND answer IN ('open', 'broken_off') "
        "AND pieces = (SELECT COUNT(*) FROM piece WHERE record = ?)",
        (record, record),
    )


def _bound(record: str, what: str) -> bytes:
    return f"saw-record/1:{record}:{what}".encode()
