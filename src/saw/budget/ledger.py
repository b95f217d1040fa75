"""The ledger: what calls may cost is reserved against a limit before they are made, and settled after.

One SQLite file (WAL, synchronous FULL); every change is one immediate transaction, so any number of threads and processes may
share it. An amount is a whole number of millionths of a currency. A reservation counts in full until it is settled or
released. One that nobody settles expires after its time and then counts as spent in full; should its true cost be told later,
that takes the place. Time never goes back: the ledger remembers the latest that it saw and counts in the period of that. While
the clock is behind it, that time goes on by what truly passes.
"""

from __future__ import annotations

import sqlite3
import threading
import time as clocks
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from saw.budget import counts as counting
from saw.budget.counts import Count
from saw.budget.errors import Exhausted, LedgerError
from saw.budget.windows import Period, window
from saw.errors import SawError
from saw.sqlite import change

LIFE_S = 3600
"""How long a reservation stays open without news, unless told otherwise (seconds)."""
KEEP_S = 7 * 86400
"""How long an ended charge that was told is kept, so that it cannot be settled twice (seconds)."""
MOST = 2**62
"""Amounts are below this, so that no sum of two leaves SQLite's integers."""

State = Literal["open", "settled", "released", "expired"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS account (key TEXT PRIMARY KEY, held INTEGER NOT NULL CHECK (held >= 0),
  spent INTEGER NOT NULL CHECK (spent >= 0)) STRICT;
CREATE TABLE IF NOT EXISTS charge (id TEXT PRIMARY KEY, account TEXT NOT NULL, reserved INTEGER NOT NULL, actual INTEGER,
  state TEXT NOT NULL, reserved_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, ended_at INTEGER, told INTEGER NOT NULL,
  detail TEXT NOT NULL, outcome TEXT NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS charge_open ON charge (expires_at) WHERE state = 'open';
CREATE INDEX IF NOT EXISTS charge_untold ON charge (id) WHERE told = 0;
CREATE TABLE IF NOT EXISTS clock (one INTEGER PRIMARY KEY CHECK (one = 1), latest INTEGER NOT NULL) STRICT;
INSERT OR IGNORE INTO clock VALUES (1, 0);
"""
_NO_MONEY = ""
"""Stands for the account of a charge that costs nothing and is kept for its tokens alone; nobody is told of its end."""


class Limit(msgspec.Struct, frozen=True):
    """What one subject may spend of a budget in one period.

    ``most`` is in millionths of ``currency``. A limit that is not ``hard`` is only counted. ``budget`` names the budget and
    ``subject`` who shares it; both together, with currency and period, are what a count belongs to.
    """

    budget: str
    subject: str
    currency: str
    period: Period
    most: int
    hard: bool = True

    def account(self, start: datetime) -> str:
        """Return the name under which the period that begins at ``start`` is counted."""
        return f"{self.budget}|{self.subject}|{self.currency}|{self.period}|{start:%Y-%m-%d}"


class Reservation(msgspec.Struct, frozen=True):
    """An amount that is set aside: until when its period lasts, and what is left of the limit after it."""

    id: str
    amount: int
    start: datetime
    end: datetime
    left: int


class Charge(msgspec.Struct, frozen=True):
    """What the ledger knows of one call. ``amount`` is what counts now; ``detail`` and ``outcome`` are the caller's own texts."""

    id: str
    account: str
    reserved: int
    amount: int
    state: State
    detail: str
    outcome: str


class Balance(msgspec.Struct, frozen=True):
    """What counts against a limit: ``held`` by open reservations and ``spent``."""

    held: int = 0
    spent: int = 0


class Ledger:
    """The ledger in the file ``path``; ``life_s`` is how long a reservation stays open without news.

    ``monotonic`` gives the seconds that truly pass. ``patience_s`` is how long a change waits for those of others (seconds); one
    that waited longer is not made.
    """

    def __init__(
        self,
        path: Path,
        *,
        life_s: int = LIFE_S,
        monotonic: Callable[[], float] = clocks.monotonic,
        patience_s: float = 60.0,
    ) -> None:
        self._patience_s = patience_s
        self._path = path
        self._life_s = life_s
        self._monotonic = monotonic
        self._behind: tuple[int, float] | None = None
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=patience_s)
            path.chmod(0o600)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            with self._change():
                for statement in (_SCHEMA + counting.SCHEMA).split(";\n"):
                    self._database.execute(statement)
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(f"the ledger {path} cannot be opened: {error}", cure="see docs/budgets.md") from error

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Hold the only transaction that may write; whatever is raised inside undoes it."""
        try:
            with change(self._database, self._lock, self._patience_s) as database:
                yield database
        except sqlite3.Error as error:
            raise LedgerError(f"the ledger {self._path} cannot be written: {error}", cure="free disk space") from error

    def _time(self, now: datetime) -> datetime:
        """Return ``now``, or the latest time seen when that is later; inside a transaction.

        A clock that was far ahead once must not stop time: as long as it is behind, the latest time moves on with the monotonic
        clock. It moves a second only after this ledger saw it stand for one, so it is never faster than true time, and a
        restart, or another process that moved it, only makes it wait anew.
        """
        latest = int(self._database.execute("SELECT latest FROM clock").fetchone()[0])
        seconds = int(now.timestamp())
        if seconds >= latest:
            self._behind = None
            if seconds == latest:
                return datetime.fromtimestamp(latest, UTC)
            self._database.execute("UPDATE clock SET latest = ?", (seconds,))
            return now
        running = self._monotonic()
        stood, since = self._behind or (latest, running)
        if stood != latest:
            since = running
        passed = int(running - since)
        self._behind = (latest + passed, since + passed)
        if passed:
            self._database.execute("UPDATE clock SET latest = ?", (latest + passed,))
        return datetime.fromtimestamp(latest + passed, UTC)

    def reserve(
        self,
        limit: Limit,
        amount: int,
        identifier: str,
        now: datetime,
        detail: str = "",
        *,
        counts: Sequence[Count] = (),
    ) -> Reservation:
        """Set ``amount`` aside under ``identifier``, which the caller makes up anew for every call, and count ``counts``.

        All of it or nothing. The same identifier again is the same reservation. Raises :class:`Exhausted` when a hard limit would
        be passed, :class:`RateLimited` or :class:`QuotaExhausted` when a count does not fit, and :class:`LedgerError`.
        """
        if not 0 <= amount < MOST or not 0 <= limit.most < MOST:
            raise LedgerError(f"the amount {amount} cannot be counted", cure="lower it")
        refused: SawError | None = None
        with self._change() as database:
            time = self._time(now)
            start, end = window(limit.period, time)
            account = limit.account(start)
            known = database.execute("SELECT account, reserved FROM charge WHERE id = ?", (identifier,)).fetchone()
            if known is not None and known != (account, amount):
                raise LedgerError(
                    f"the reservation {identifier} is there with another amount", cure="make up a new one"
                )
            held, spent = _counted(database, account)
            if known is None:
                bound = limit.most if limit.hard else MOST
                refused = _misfit(database, counts, time)
                if refused is None and held + spent + amount > bound:
                    refused = _exhausted(limit, amount, max(0, limit.most - held - spent), end)
                if refused is None:
                    database.execute("INSERT OR IGNORE INTO account VALUES (?, 0, 0)", (account,))
                    database.execute("UPDATE account SET held = held + ? WHERE key = ?", (amount, account))
                    self._open(database, identifier, account, amount, time=time, detail=detail, counts=counts)
                    held += amount
        if refused is not None:
            raise refused
        return Reservation(identifier, amount, start, end, max(0, limit.most - held - spent))

    def count(self, counts: Sequence[Count], identifier: str, now: datetime) -> bool:
        """Count a call that no budget pays for, all of ``counts`` or nothing; raises as :meth:`reserve`.

        Returns whether there are tokens to correct by :meth:`settle`, :meth:`keep` or :meth:`release` under ``identifier``.
        """
        with self._change() as database:
            time = self._time(now)
            refused = _misfit(database, counts, time)
            corrected = refused is None and any(count.unit == "tokens" for count in counts)
            if refused is None:
                if corrected:
                    self._open(database, identifier, _NO_MONEY, 0, time=time, detail="", counts=counts)
                else:
                    for count in counts:
                        counting.take(database, identifier, count, time, alone=True)
        if refused is not None:
            raise refused
        return corrected

    def _open(
        self,
        database: sqlite3.Connection,
        identifier: str,
        account: str,
        amount: int,
        *,
        time: datetime,
        detail: str,
        counts: Sequence[Count],
    ) -> None:
        seconds = int(time.timestamp())
        database.execute(
            "INSERT INTO charge VALUES (?, ?, ?, NULL, 'open', ?, ?, NULL, 1, ?, '')",
            (identifier, account, amount, seconds, seconds + self._life_s, detail),
        )
        for count in counts:
            counting.take(database, identifier, count, time)

    def settle(
        self, identifier: str, actual: int, now: datetime, outcome: str = "", *, tokens: int | None = None
    ) -> bool:
        """Put ``actual`` in the place of what was reserved, ``tokens`` of what was counted; return whether it changed anything.

        The first settlement counts. ``actual`` may be more than was reserved, and is recorded as it is. An expired reservation
        takes its true cost. ``tokens`` None: what was counted stays.
        """
        if not 0 <= actual < MOST:
            raise LedgerError(f"the amount {actual} cannot be counted", cure="see what the service reported")
        before: tuple[State, ...] = ("open", "expired")
        cost = lambda _reserved: actual  # noqa: E731 - as in its siblings
        return self._end(identifier, "settled", before, cost, now=now, outcome=outcome, tokens=tokens)

    def keep(self, identifier: str, now: datetime, outcome: str = "") -> bool:
        """Count an open reservation as spent in full, because nobody can say what the call cost."""
        return self._end(identifier, "settled", ("open",), lambda reserved: reserved, now=now, outcome=outcome)

    def release(self, identifier: str, now: datetime, outcome: str = "") -> bool:
        """Give an open reservation back, because the call certainly cost nothing."""
        return self._end(identifier, "released", ("open",), lambda _reserved: 0, now=now, outcome=outcome, tokens=0)

    def uncount(self, identifier: str) -> bool:
        """Count the request of a call no more that was never sent; return whether it was counted until now."""
        with self._change() as database:
            return counting.take_back(database, identifier)

    def _end(
        self,
        identifier: str,
        state: State,
        before: tuple[State, ...],
        cost: Callable[[int], int],
        *,
        now: datetime,
        outcome: str,
        tokens: int | None = None,
    ) -> bool:
        with self._change() as database:
            row = database.execute(
                "SELECT account, reserved, actual, state FROM charge WHERE id = ?", (identifier,)
            ).fetchone()
            if row is None or row[3] not in before:
                return False
            account, reserved, counted, was = row
            actual = cost(reserved)
            held, spent = (reserved, actual) if was == "open" else (0, actual - counted)
            _book(database, account, held, spent)
            counting.finish(database, identifier, tokens, was_open=was == "open", most=MOST)
            database.execute(
                "UPDATE charge SET state = ?, actual = ?, ended_at = ?, told = (account = ?), outcome = ? WHERE id = ?",
                (state, actual, int(self._time(now).timestamp()), _NO_MONEY, outcome, identifier),
            )
            return True

    def expire(self, now: datetime, outcome: str = "") -> int:
        """Count every reservation whose time is up as spent in full; return how many. Forgets what ended long ago."""
        with self._change() as database:
            seconds = int(self._time(now).timestamp())
            due = database.execute(
                "SELECT id, account, reserved FROM charge WHERE state = 'open' AND expires_at <= ?", (seconds,)
            ).fetchall()
            for identifier, account, reserved in due:
                _book(database, account, reserved, reserved)
                counting.finish(database, identifier, None, was_open=True, most=MOST)
                database.execute(
                    "UPDATE charge SET state = 'expired', actual = reserved, ended_at = ?, told = (account = ?), outcome = ?"
                    " WHERE id = ?",
                    (seconds, _NO_MONEY, outcome, identifier),
                )
            database.execute(
                "DELETE FROM charge WHERE state != 'open' AND told = 1 AND ended_at < ?", (seconds - KEEP_S,)
            )
            counting.forget(database, seconds, KEEP_S)
            return len(due)

    def untold(self, most: int = 256) -> list[Charge]:
        """Return ended charges that :meth:`told` was not called for since they ended, the oldest end first."""
        with self._lock:
            try:
                rows = self._database.execute(
                    "SELECT id, account, reserved, coalesce(actual, reserved), state, detail, outcome FROM charge"
                    " WHERE told = 0 ORDER BY ended_at, rowid LIMIT ?",
                    (most,),
                ).fetchall()
            except sqlite3.Error as error:
                raise LedgerError(f"the ledger {self._path} cannot be read: {error}") from error
        return [Charge(*row) for row in rows]

    def told(self, charges: Iterable[Charge]) -> None:
        """Note that these ends are in the audit trail; one that changed meanwhile stays untold."""
        with self._change() as database:
            database.executemany(
                "UPDATE charge SET told = 1 WHERE id = ? AND state = ?", [(item.id, item.state) for item in charges]
            )

    def detail(self, identifier: str) -> str | None:
        """Return the text that was kept with a charge, or None where there is none."""
        with self._lock:
            row = self._database.execute("SELECT detail FROM charge WHERE id = ?", (identifier,)).fetchone()
        return None if row is None else str(row[0])

    def period(self, limit: Limit, now: datetime) -> tuple[datetime, datetime]:
        """Return the period that is counted in now: that of ``now``, or of the latest time seen when that is later."""
        with self._lock:
            latest = int(self._database.execute("SELECT latest FROM clock").fetchone()[0])
        return window(limit.period, max(now, datetime.fromtimestamp(latest, UTC)))

    def balance(self, limit: Limit, now: datetime) -> Balance:
        """Return what counts in the period of ``now``, or of the latest time seen when that is later."""
        with self._lock:
            latest = int(self._database.execute("SELECT latest FROM clock").fetchone()[0])
            start, _ = window(limit.period, max(now, datetime.fromtimestamp(latest, UTC)))
            row = self._database.execute(
                "SELECT held, spent FROM account WHERE key = ?", (limit.account(start),)
            ).fetchone()
        return Balance(*row) if row else Balance()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()


def _counted(database: sqlite3.Connection, account: str) -> tuple[int, int]:
    """Return what is held and what is spent of an account; nothing of one that is not there yet."""
    row = database.execute("SELECT held, spent FROM account WHERE key = ?", (account,)).fetchone()
    return (int(row[0]), int(row[1])) if row else (0, 0)


def _misfit(database: sqlite3.Connection, counts: Sequence[Count], time: datetime) -> SawError | None:
    """Return why the first of ``counts`` that does not fit is refused, or None; no two of them share a key."""
    found = (counting.refusal(database, count, time) for count in counts)
    return next((refused for refused in found if refused is not None), None)


def _book(database: sqlite3.Connection, account: str, held: int, spent: int) -> None:
    """Take ``held`` from what is held and add ``spent`` to what is spent."""
    database.execute(
        "UPDATE account SET held = held - ?, spent = min(spent + ?, ?) WHERE key = ?", (held, spent, MOST, account)
    )


def _exhausted(limit: Limit, amount: int, left: int, end: datetime) -> Exhausted:
    asked, rest = money(amount, limit.currency), money(left, limit.currency)
    return Exhausted(
        f"the call may cost {asked}, and {rest} of {money(limit.most, limit.currency)} per {limit.period} is left of the"
        f" budget {limit.budget}; it starts anew at {end:%Y-%m-%dT%H:%M:%SZ}",
        cure="ask for a smaller answer, wait until then, or ask the policy's owner for a higher limit",
        details={
            "id": limit.budget,
            "currency": limit.currency,
            "limit": limit.most,
            "asked": amount,
            "left": left,
            "resets_at": f"{end:%Y-%m-%dT%H:%M:%SZ}",
        },
    )


def money(micros: int, currency: str) -> str:
    """Return ``micros`` millionths of ``currency`` as text, such as ``1.25 USD``: at least two decimals, never rounded."""
    whole, part = divmod(abs(micros), 1_000_000)
    decimals = f"{part:06d}".rstrip("0").ljust(2, "0")
    return f"{'-' if micros < 0 else ''}{whole}.{decimals} {currency}"
