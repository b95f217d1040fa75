"""Counts of requests and tokens against limits, inside a transaction of the ledger's.

A window that slides counts what was admitted in its last seconds, so no stretch of that length ever holds more than the limit.
It is added up from one sum for each second, however many calls it holds.
The ledger's time has whole seconds, so what was admitted leaves a window up to a second late and never early. A calendar period
is counted in the ledger's accounts, as money is. A request counts once it is admitted, whatever becomes of it; only one that must
be kept and cannot be counts no more. Tokens count as many as the call may use at most, until its answer says how many it used.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from datetime import datetime
from typing import Literal

import msgspec

from saw.budget.errors import QuotaExhausted, RateLimited
from saw.budget.windows import Period, window
from saw.errors import SawError

Unit = Literal["requests", "tokens"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS counted (charge TEXT NOT NULL, key TEXT NOT NULL, calendar INTEGER NOT NULL, unit TEXT NOT NULL,
  at INTEGER NOT NULL, reserved INTEGER NOT NULL, amount INTEGER NOT NULL CHECK (amount >= 0), alone INTEGER NOT NULL,
  PRIMARY KEY (charge, key)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS counted_at ON counted (alone, at);
CREATE TABLE IF NOT EXISTS slid (key TEXT NOT NULL, at INTEGER NOT NULL, amount INTEGER NOT NULL CHECK (amount >= 0),
  PRIMARY KEY (key, at)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS slid_at ON slid (at);
INSERT OR IGNORE INTO slid SELECT key, at, sum(amount) FROM counted WHERE calendar = 0 GROUP BY key, at;
DROP INDEX IF EXISTS counted_in;
"""
LOOKED_BACK_S = 7200
"""How long sums, and what was counted without a charge, are kept (seconds): longer than any window."""


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """What a call takes of a limit: ``amount`` of ``most`` in ``per``, a number of seconds that slides or a calendar period.

    ``limit`` names the limit and ``subject`` who shares it; both together, with unit and ``per``, are what a count belongs to.
    """

    limit: str
    subject: str
    unit: Unit
    per: int | Period
    most: int
    amount: int

    def key(self, time: datetime) -> str:
        """Return the name under which ``time`` is counted; no two subjects share one, whatever they are called."""
        start = "" if isinstance(self.per, int) else f"{window(self.per, time)[0]:%Y-%m-%d}"
        return json.dumps([self.limit, self.subject, self.unit, self.per, start])


def refusal(database: sqlite3.Connection, count: Count, time: datetime) -> SawError | None:
    """Return why ``count`` does not fit at ``time``, or None where it does."""
    key = count.key(time)
    if isinstance(count.per, int):
        seconds = int(time.timestamp())
        within = (key, seconds - count.per)
        total: int = database.execute(
            "SELECT coalesce(sum(amount), 0) FROM slid WHERE key = ? AND at >= ?", within
        ).fetchone()[0]
        if total + count.amount <= count.most:
            return None
        rows = database.execute("SELECT at, amount FROM slid WHERE key = ? AND at >= ? ORDER BY at", within)
        return _limited(count, rows, seconds, count.most - total)
    row = database.execute("SELECT held + spent FROM account WHERE key = ?", (key,)).fetchone()
    left = max(0, count.most - (row[0] if row else 0))
    return None if count.amount <= left else _exhausted(count, left, window(count.per, time)[1])


def take(database: sqlite3.Connection, charge: str, count: Count, time: datetime, *, alone: bool = False) -> None:
    """Count what :func:`refusal` let pass; ``charge`` is the name under which tokens are corrected later, ``alone``: never."""
    key, calendar = count.key(time), not isinstance(count.per, int)
    at = int(time.timestamp())
    database.execute(
        "INSERT INTO counted VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (charge, key, calendar, count.unit, at, count.amount, count.amount, alone),
    )
    if calendar:
        held, spent = (count.amount, 0) if count.unit == "tokens" else (0, count.amount)
        database.execute("INSERT OR IGNORE INTO account VALUES (?, 0, 0)", (key,))
        database.execute("UPDATE account SET held = held + ?, spent = spent + ? WHERE key = ?", (held, spent, key))
    else:
        database.execute(
            "INSERT INTO slid VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET amount = amount + excluded.amount",
            (key, at, count.amount),
        )


def finish(database: sqlite3.Connection, charge: str, tokens: int | None, *, was_open: bool, most: int) -> None:
    """Put ``tokens`` in the place of what was counted for an ended charge; None: what was counted stays.

    ``was_open``: it had not ended before, so that what is held of a calendar period is now spent. ``most`` bounds a sum.
    """
    rows = database.execute(
        "SELECT key, calendar, at, reserved, amount FROM counted WHERE charge = ? AND unit = 'tokens'", (charge,)
    ).fetchall()
    for key, calendar, at, reserved, counted in rows:
        actual = counted if tokens is None else tokens
        if calendar:
            held, spent = (reserved, actual) if was_open else (0, actual - counted)
            database.execute(
                "UPDATE account SET held = held - ?, spent = min(spent + ?, ?) WHERE key = ?", (held, spent, most, key)
            )
        else:
            database.execute(
                "UPDATE slid SET amount = amount + ? WHERE key = ? AND at = ?", (actual - counted, key, at)
            )
        database.execute("UPDATE counted SET amount = ? WHERE charge = ? AND key = ?", (actual, charge, key))


def take_back(database: sqlite3.Connection, charge: str) -> bool:
    """Count the request of ``charge`` no more; return whether it was counted. A second time changes nothing."""
    rows = database.execute(
        "SELECT key, calendar, at, amount FROM counted WHERE charge = ? AND unit = 'requests' AND amount > 0", (charge,)
    ).fetchall()
    for key, calendar, at, amount in rows:
        if calendar:
            database.execute("UPDATE account SET spent = max(0, spent - ?) WHERE key = ?", (amount, key))
        else:
            database.execute("UPDATE slid SET amount = max(0, amount - ?) WHERE key = ? AND at = ?", (amount, key, at))
        database.execute("UPDATE counted SET amount = 0 WHERE charge = ? AND key = ?", (charge, key))
    return bool(rows)


def forget(database: sqlite3.Connection, now: int, keep_s: int) -> None:
    """Forget what no window holds any more: with its charge where it has one, which is kept ``keep_s`` after its end."""
    database.execute("DELETE FROM slid WHERE at < ?", (now - LOOKED_BACK_S,))
    database.execute("DELETE FROM counted WHERE alone = 1 AND at < ?", (now - LOOKED_BACK_S,))
    database.execute(
        "DELETE FROM counted WHERE alone = 0 AND at < ? AND NOT EXISTS (SELECT 1 FROM charge WHERE id = counted.charge)",
        (now - keep_s,),
    )


def _details(count: Count, left: int) -> dict[str, object]:
    per = f"{count.per}s" if isinstance(count.per, int) else count.per
    return {
        "id": count.limit,
        "unit": count.unit,
        "per": per,
        "limit": count.most,
        "asked": count.amount,
        "left": left,
    }


def _limited(count: Count, rows: Iterable[tuple[int, int]], now: int, room: int) -> RateLimited:
    """Return the refusal by a window: with the seconds after which the call fits, or none where it never can.

    ``rows`` are what each second of the window holds, oldest first; ``room`` is what they leave of it, below zero where they
    pass it.
    """
    left = max(0, room)
    per = f"{count.most} {count.unit} in any {count.per} s"
    details = _details(count, left)
    if count.amount > count.most:
        return RateLimited(
            f"the call may use {count.amount} {count.unit}, and the limit {count.limit} is {per}",
            cure="ask for a smaller answer, or send less; waiting does not help",
            details=details,
        )
    missing, wait = count.amount - room, 1
    for at, amount in rows:
        missing -= amount
        wait = at + int(count.per) + 1 - now
        if missing <= 0:
            break
    return RateLimited(
        f"the limit {count.limit} is {per}, and {left} are left; the call asks for {count.amount}",
        cure=f"make the call again in {wait} seconds",
        details={**details, "retry_after_s": wait},
    )


def _exhausted(count: Count, left: int, end: datetime) -> QuotaExhausted:
    until = f"{end:%Y-%m-%dT%H:%M:%SZ}"
    return QuotaExhausted(
        f"the call asks for {count.amount} {count.unit}, and {left} of {count.most} per {count.per} are left of the limit"
        f" {count.limit}; it starts anew at {until}",
        cure="wait until then, or ask the policy's owner for a higher limit",
        details={**_details(count, left), "resets_at": until},
    )
