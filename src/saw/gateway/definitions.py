"""What is known of the definitions of MCP tools, on disk, for every gatekeeper of a perimeter host.

Kept is which pinned tools a server last listed with another definition; one SQLite file (WAL, synchronous FULL). It is read for
each call of a pinned tool and written only where a list changes something, before that list goes on to the agent. What cannot be
written counts all the same in this process, and is written as soon as that is possible.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from saw.errors import SawError
from saw.policy.mcp_answers import Definitions, Listed, after
from saw.policy.tool_rules import Tool
from saw.sqlite import change

LOG = logging.getLogger("saw.gateway")

PATIENCE_S = 5.0
"""How long a change waits for those of other replicas (seconds). Nothing but the list itself waits for it."""
READ_PATIENCE_S = 1.0
"""How long a question waits (seconds), before the call that it is about is refused. It does not wait for changes."""
MOST = 65536
"""How many definitions may be known to have changed; a list that would add to them is not passed on."""
EVERY_S = 1.0
"""How often what could not be written is tried again (seconds)."""
PURGE_S = 60.0
"""How often what belongs to workspaces that are gone is removed (seconds)."""
GONE_S = 3600.0
"""How old it has to be for that (seconds): one replica may know of a new workspace before the one that removes does."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS changed (workspace TEXT NOT NULL, server TEXT NOT NULL, tool TEXT NOT NULL, pin TEXT NOT NULL,
  at REAL NOT NULL, PRIMARY KEY (workspace, server, tool)) STRICT, WITHOUT ROWID;
"""
Server = tuple[str, str]
"""A workspace and the name of a server."""


class DefinitionsUnavailable(SawError):
    """What a server said of its tools cannot be read or kept, so neither its list nor a call of a pinned tool passes."""

    code = "gatekeeper_unavailable"


class KeptDefinitions:
    """The definitions in the file ``path``. ``now`` is the time; a change waits ``patience_s`` seconds for those of others.

    Where the file cannot be opened, every use of it raises :class:`DefinitionsUnavailable`: only pinned tools depend on it. Every
    method may be called from any thread.
    """

    def __init__(self, path: Path, now: Callable[[], datetime], patience_s: float = PATIENCE_S) -> None:
        self._path = path
        self._patience_s = patience_s
        self._now = now
        self._unwritten: dict[Server, dict[str, str]] = {}
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        try:
            path.touch(0o600)
            path.chmod(0o600)
            self._writer = _opened(path, patience_s)
            with change(self._writer) as database:
                database.execute(_SCHEMA)
            self._reader = _opened(path, READ_PATIENCE_S)
        except (OSError, sqlite3.Error) as error:
            self._problem = f"the definitions {path} cannot be opened: {error}"
            LOG.critical("pinned tools cannot be called: %s", self._problem)
        else:
            self._problem = ""

    def of(self, workspace: str, server: str) -> Definitions:
        """Return what is known of a server's definitions; asking and noting raise :class:`DefinitionsUnavailable`."""
        return _OfServer(self, (workspace, server))

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        if self._problem or self._writer is None:
            raise DefinitionsUnavailable(self._problem, cure="look at the disk, then restart the gatekeeper")
        try:
            with change(self._writer, self._writing, self._patience_s) as database:
                yield database
        except sqlite3.Error as error:
            raise DefinitionsUnavailable(
                f"the definitions {self._path} cannot be written: {error}", cure="free disk space"
            ) from error

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        if self._problem or self._reader is None:
            raise DefinitionsUnavailable(self._problem, cure="look at the disk, then restart the gatekeeper")
        with self._reading:
            try:
                yield self._reader
            except sqlite3.Error as error:
                raise DefinitionsUnavailable(
                    f"the definitions {self._path} cannot be read: {error}", cure="look at the disk"
                ) from error

    def pin(self, place: Server, tool: str) -> str | None:
        """Return the pin that ``tool`` was last listed without, None where it was listed with its pin or never."""
        mine = self._unwritten.get(place, {}).get(tool)
        if mine is not None:
            return mine
        with self._read() as database:
            row = database.execute(
                "SELECT pin FROM changed WHERE workspace = ? AND server = ? AND tool = ?", (*place, tool)
            ).fetchone()
        return None if row is None else str(row[0])

    def note(self, place: Server, listed: Listed, tools: Mapping[str, Tool]) -> None:
        """Take in one list of a server's, judged by the pins of ``tools``."""
        with self._read() as database:
            known = {**_known(database, place), **self._unwritten.get(place, {})}
        wanted = after(known, listed, tools)
        if wanted == known and place not in self._unwritten:
            return
        try:
            with self._change() as database:
                self._put(database, place, wanted)
                self._unwritten.pop(place, None)
        except DefinitionsUnavailable:
            changed = {name: wanted[name] for name in listed.changed if name in wanted}
            if changed:
                self._unwritten[place] = {**self._unwritten.get(place, {}), **changed}
            raise

    def _put(self, database: sqlite3.Connection, place: Server, wanted: Mapping[str, str]) -> None:
        known, at = _known(database, place), self._now().timestamp()
        (count,) = database.execute("SELECT count(*) FROM changed").fetchone()
        if count + len(wanted.keys() - known.keys()) > MOST:
            raise DefinitionsUnavailable(
                f"{MOST} tools have another definition than the pinned one", cure="see docs/mcp.md"
            )
        database.executemany(
            "DELETE FROM changed WHERE workspace = ? AND server = ? AND tool = ?",
            [(*place, tool) for tool in known.keys() - wanted.keys()],
        )
        database.executemany(
            "INSERT OR REPLACE INTO changed VALUES (?, ?, ?, ?, ?)",
            [(*place, tool, pin, at) for tool, pin in wanted.items() if known.get(tool) != pin],
        )

    def retry(self) -> None:
        """Write what could not be written; raises :class:`DefinitionsUnavailable` where it still cannot."""
        for place in list(self._unwritten):
            with self._change() as database:
                changed = self._unwritten.get(place, {})
                self._put(database, place, {**_known(database, place), **changed})
            if self._unwritten.get(place) is changed:
                self._unwritten.pop(place, None)

    def purge(self, workspaces: Collection[str]) -> int:
        """Remove what belongs to none of ``workspaces`` and is old enough; return how many definitions that were."""
        before = self._now().timestamp() - GONE_S
        with self._read() as database:
            old = database.execute("SELECT DISTINCT workspace FROM changed WHERE at < ?", (before,)).fetchall()
        gone = [(name, before) for (name,) in old if name not in workspaces]
        if not gone:
            return 0
        with self._change() as database:
            return database.executemany("DELETE FROM changed WHERE workspace = ? AND at < ?", gone).rowcount

    async def run_forever(self) -> None:
        """Write what could not be written as soon as that is possible, until cancelled."""
        told = ""
        while True:
            await asyncio.sleep(EVERY_S)
            if not self._unwritten:
                continue
            try:
                await asyncio.to_thread(self.retry)
                told = ""
            except DefinitionsUnavailable as error:
                if error.message != told:
                    LOG.critical("other replicas do not know of a changed definition: %s", error.message)
                told = error.message

    async def purge_forever(self, workspaces: Callable[[], Collection[str] | None]) -> None:
        """Remove what belongs to workspaces that are gone, until cancelled; ``workspaces`` is None where they are not known."""
        while True:
            await asyncio.sleep(PURGE_S)
            there = workspaces()
            if there is None:
                continue
            try:
                await asyncio.to_thread(self.purge, there)
            except DefinitionsUnavailable as error:
                LOG.error("definitions of workspaces that are gone stay: %s", error.message)  # noqa: TRY400 - it says it

    def close(self) -> None:
        """Close the file."""
        for database, lock in ((self._writer, self._writing), (self._reader, self._reading)):
            if database is not None:
                with lock:
                    database.close()


class _OfServer(Definitions):
    """The definitions of one server, as one workspace was shown them."""

    def __init__(self, kept: KeptDefinitions, place: Server) -> None:
        super().__init__()
        self._kept = kept
        self._place = place

    def note(self, listed: Listed, tools: Mapping[str, Tool]) -> None:
        self._kept.note(self._place, listed, tools)

    def changed(self, name: str, rule: Tool | None) -> bool:
        return rule is not None and rule.definition is not None and self._kept.pin(self._place, name) == rule.definition


def _opened(path: Path, patience_s: float) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=patience_s)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
    except BaseException:
        database.close()
        raise
    return database


def _known(database: sqlite3.Connection, place: Server) -> dict[str, str]:
    return dict(database.execute("SELECT tool, pin FROM changed WHERE workspace = ? AND server = ?", place).fetchall())
