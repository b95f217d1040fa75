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
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from saw.errors import SawError
from saw.policy.mcp_answers import Definitions, Listed, after
from saw.policy.tool_rules import Tool
from saw.sqlite import change

LOG = logging.getLogger("saw.gateway")

PATIENCE_S = 2.0
"""How long a change waits for one of this gatekeeper, and then for one of another (seconds). Only lists wait for it."""
READ_PATIENCE_S = 1.0
"""How long a question waits (seconds), before the call that it is about is refused. It does not wait for changes."""
MOST = 65536
"""How many definitions may be known to have changed; a list that would add to them is not passed on."""
EVERY_S = 1.0
"""How often what could not be opened or written is tried again (seconds)."""
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
    """What a server said of its tools cannot be read or kept, so neither its list nor a call of a pinned tool passes.

    An agent is told this, so it says nothing of paths and disks; the journal has it.
    """

    code = "gatekeeper_unavailable"


class DefinitionsFull(DefinitionsUnavailable):
    """There is no room for more tools with another definition than the pinned one."""


class KeptDefinitions:
    """The definitions in the file ``path``. ``now`` is the time; a change waits ``patience_s`` seconds for those of others.

    Where the file cannot be opened, every use of it raises :class:`DefinitionsUnavailable`, until :meth:`run_forever` could open
    it: only pinned tools depend on it. Every method may be called from any thread.
    """

    def __init__(self, path: Path, now: Callable[[], datetime], patience_s: float = PATIENCE_S) -> None:
        self._path = path
        self._patience_s = patience_s
        self._now = now
        self._unwritten: dict[Server, dict[str, str]] = {}
        """What could not be written. What is in it is never changed, only replaced, so that one sees whether there is more."""
        self._opening, self._writing, self._reading, self._remembering = (threading.Lock() for _ in range(4))
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._closed = False
        self._logged: frozenset[tuple[str, str]] = frozenset()
        self.open()

    def open(self) -> bool:
        """Open the file unless it is open, or closed for good; return whether it is open."""
        with self._opening, ExitStack() as undo:
            if self._closed or self._reader is not None:
                return not self._closed
            try:
                self._path.touch(0o600)
                self._path.chmod(0o600)
                writer = _opened(self._path, self._patience_s)
                undo.callback(writer.close)
                with change(writer) as database:
                    database.execute(_SCHEMA)
                reader = _opened(self._path, READ_PATIENCE_S)
            except (OSError, sqlite3.Error) as error:
                self._unavailable("opened", error)
                return False
            undo.pop_all()
            self._writer, self._reader = writer, reader
            return True

    def _unavailable(self, what: str, error: Exception | None = None) -> DefinitionsUnavailable:
        """Return what to raise where the definitions cannot be ``what``; the journal has why, once for as long as it is so."""
        if error is not None and (what, str(error)) not in self._logged:
            self._logged |= {(what, str(error))}
            LOG.critical("pinned tools: the definitions %s cannot be %s: %s", self._path, what, error)
        return DefinitionsUnavailable(
            f"what servers say of their tools cannot be {what} on the perimeter host",
            cure="try again; if it stays so, tell the platform team, whose journal says why",
        )

    def _again(self, what: str) -> None:
        """Take note that the definitions can be ``what``, so that the journal has it when they cannot be again."""
        self._logged = frozenset(one for one in self._logged if one[0] != what)

    def of(self, workspace: str, server: str) -> Definitions:
        """Return what is known of a server's definitions; asking and noting raise :class:`DefinitionsUnavailable`."""
        return _OfServer(self, (workspace, server))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other thread write, also beyond the end of a transaction."""
        if not self._writing.acquire(timeout=self._patience_s):
            raise self._unavailable("written", TimeoutError("another thread is writing"))
        try:
            yield
        finally:
            self._writing.release()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Hold the only transaction that may write; it counts once the block is left. The thread is alone (:meth:`_alone`)."""
        if self._writer is None:
            raise self._unavailable("opened")
        try:
            with change(self._writer) as database:
                yield database
        except sqlite3.Error as error:
            raise self._unavailable("written", error) from error
        self._again("written")

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        if self._reader is None:
            raise self._unavailable("opened")
        with self._reading:
            try:
                yield self._reader
            except sqlite3.Error as error:
                raise self._unavailable("read", error) from error
        self._again("read")

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

    def note(
        self, place: Server, listed: Listed, tools: Mapping[str, Tool], names: Collection[str] | None = None
    ) -> None:
        """Take in one list of a server's, as :meth:`saw.policy.mcp_answers.Definitions.note` does."""
        if not any(tool.definition for tool in tools.values()):
            return

        def then(known: Mapping[str, str]) -> dict[str, str]:
            return after(known, listed, tools, names)

        try:
            unwritten = self._unwritten.get(place)
            with self._read() as database:
                known = _known(database, place)
            # Only to see that nothing changes: what another replica writes meanwhile is read again before writing.
            if unwritten is not None or then(known) != known:
                self._write(place, then)
        except BaseException:
            self._remember(place, {name: tools[name].definition or "" for name in listed.changed})
            raise

    def _remember(self, place: Server, changed: Mapping[str, str]) -> None:
        """Let count here what could not be written."""
        if changed:
            with self._remembering:
                self._unwritten[place] = {**self._unwritten.get(place, {}), **changed}

    def _write(self, place: Server, then: Callable[[Mapping[str, str]], Mapping[str, str]]) -> None:
        """Write what ``then`` makes of what is known of a server now, here and in the file."""
        with self._alone():
            unwritten = self._unwritten.get(place, {})
            with self._change() as database:
                known = _known(database, place)
                self._put(database, place, known, then({**known, **unwritten}))
            # It is on disk only now. What was remembered meanwhile is not, and stays.
            with self._remembering:
                if self._unwritten.get(place) is unwritten:
                    del self._unwritten[place]

    def _put(
        self, database: sqlite3.Connection, place: Server, known: Mapping[str, str], wanted: Mapping[str, str]
    ) -> None:
        at = self._now().timestamp()
        (count,) = database.execute("SELECT count(*) FROM changed").fetchone()
        if count + len(wanted.keys() - known.keys()) > MOST:
            raise DefinitionsFull(f"{MOST} tools have another definition than the pinned one", cure="see docs/mcp.md")
        database.executemany(
            "DELETE FROM changed WHERE workspace = ? AND server = ? AND tool = ?",
            [(*place, tool) for tool in known.keys() - wanted.keys()],
        )
        database.executemany(
            "INSERT OR REPLACE INTO changed VALUES (?, ?, ?, ?, ?)",
            [(*place, tool, pin, at) for tool, pin in wanted.items() if known.get(tool) != pin],
        )

    def retry(self) -> None:
        """Write what could not be written; raises :class:`DefinitionsUnavailable` where some of it still cannot.

        What does not fit holds up nothing else; where nothing can be written at all, the first failure ends it.
        """
        full: DefinitionsFull | None = None
        for place in list(self._unwritten):
            try:
                self._write(place, lambda known: known)
            except DefinitionsFull as error:
                full = error
        if full is not None:
            raise full

    def purge(self, workspaces: Collection[str]) -> int:
        """Remove what belongs to none of ``workspaces`` and is old enough; return how many definitions that were."""
        before = self._now().timestamp() - GONE_S
        with self._read() as database:
            old = database.execute("SELECT DISTINCT workspace FROM changed WHERE at < ?", (before,)).fetchall()
        gone = [(name, before) for (name,) in old if name not in workspaces]
        if not gone:
            return 0
        with self._alone(), self._change() as database:
            return database.executemany("DELETE FROM changed WHERE workspace = ? AND at < ?", gone).rowcount

    async def run_forever(self) -> None:
        """Open and write what could not be as soon as that is possible, until cancelled."""
        told = ""
        while True:
            await asyncio.sleep(EVERY_S)
            if self._reader is None and await asyncio.to_thread(self.open):
                LOG.warning("pinned tools: the definitions %s are open now", self._path)
            if self._reader is None or not self._unwritten:
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
        with self._opening:
            self._closed = True
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

    def note(self, listed: Listed, tools: Mapping[str, Tool], names: Collection[str] | None = None) -> None:
        self._kept.note(self._place, listed, tools, names)

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
