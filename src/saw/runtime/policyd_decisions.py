"""Tells the broker what was decided inside the workspace, out of the journal of ring 1 and of the MCP mediators.

The journal is the spool: it survives a restart of every service and of the VM. Its cursor moves when the broker has what was
before it, so that each decision is told at least once, under the same ``uid``.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from saw import jsontext
from saw.audit.workspace_decisions import MOST, MOST_IDS, PATH, TEXT, Decided, Decisions
from saw.errors import SawError
from saw.files import write_atomic
from saw.runtime.decision_log import is_told

_UNITS = ("saw-decide.service", "saw-mcp-*.service")
_DECIDE = "saw-decide.service"
#: A mediator's unit. The servers that it speaks to have units with an @, and write what they like.
_MEDIATOR = re.compile(r"saw-mcp-([a-z0-9]([a-z0-9-]*[a-z0-9])?)\.service")
_BATCH = 2000
_MOST_BATCHES = 5
_MOST_PROCESSES = 16
_LONGEST_S = 60.0
_CALL = ("host", "method", "path", "binary", "policy", "rule", "upgrade")
_TOOL = ("server", "tool", "rule")


class JournalError(SawError):
    """The journal cannot be read."""

    code = "journal_unreadable"


class Entry(msgspec.Struct, frozen=True, rename={"cursor": "__CURSOR", "time_us": "__REALTIME_TIMESTAMP"}):
    """One entry as ``journalctl --output=json`` writes it; ``unit`` and ``process`` are stated by the journal itself."""

    cursor: str
    time_us: str
    message: Any = msgspec.field(name="MESSAGE", default=None)
    unit: str = msgspec.field(name="_SYSTEMD_UNIT", default="")
    process: str = msgspec.field(name="_SYSTEMD_INVOCATION_ID", default="")


class Place(msgspec.Struct, frozen=True):
    """How far the journal was told: its ``cursor``, and the last number of each process that wrote any."""

    cursor: str = ""
    numbers: Annotated[dict[str, int], msgspec.Meta(max_length=_MOST_PROCESSES)] = {}


class Journal:
    """What the units that decide wrote as warning or notice, in this host's journal or in that of ``directory``."""

    def __init__(self, directory: str | None = None) -> None:
        self._command = ("journalctl", *([f"--directory={directory}"] if directory else []))

    def after(self, cursor: str, limit: int) -> list[Entry]:
        """Return up to ``limit`` entries behind ``cursor`` (empty: from the beginning), oldest first."""
        options = ["--quiet", "--no-pager", "--all", "--output=json", "--priority=4..5"]
        options += [f"--unit={unit}" for unit in _UNITS]
        options += [f"--after-cursor={cursor}"] if cursor else []
        with subprocess.Popen(
            [*self._command, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None  # noqa: S101 - it was asked for
            assert process.stderr is not None  # noqa: S101 - it was asked for
            late = threading.Timer(_LONGEST_S, process.kill)
            late.start()
            found = list(_entries(process.stdout, limit))
            if len(found) >= limit:
                process.kill()
            problem = process.stderr.read().decode(errors="replace").strip()
            late.cancel()
        if process.returncode and not found:
            raise JournalError(
                f"journalctl ended with {process.returncode}: {problem[-300:]}", cure="journalctl --verify"
            )
        return found


class DecisionReports:
    """Reads decisions and tells them, at most every ``every`` seconds; ``place`` is the file that says how far it came."""

    def __init__(
        self,
        journal: Journal,
        tell: Callable[[Decisions], None],
        place: Path,
        boottime: Callable[[], float],
        every: float,
    ) -> None:
        self._journal = journal
        self._tell = tell
        self._file = place
        self._boottime = boottime
        self._every = every
        self._at: float | None = None

    def report(self) -> None:
        """Tell what is new; raises :class:`SawError` when the journal cannot be read or ``tell`` did not deliver."""
        now = self._boottime()
        if self._at is not None and now - self._at < self._every:
            return
        self._at = now
        place = self._place()
        for _ in range(_MOST_BATCHES):
            entries = self._journal.after(place.cursor, _BATCH)
            if not entries:
                return
            said, numbers = batch_of(entries, place.numbers)
            if said.decided or said.more or said.missing:
                self._tell(said)
            place = Place(entries[-1].cursor, numbers)
            write_atomic(self._file, msgspec.json.encode(place))
            if len(entries) < _BATCH:
                return

    def _place(self) -> Place:
        try:
            return jsontext.decode(self._file.read_bytes(), kind=Place)
        except (FileNotFoundError, msgspec.MsgspecError):
            return Place()


def batch_of(entries: Sequence[Entry], numbers: dict[str, int]) -> tuple[Decisions, dict[str, int]]:
    """Return the batch that ``entries`` are, and the last number of each process after them.

    ``numbers`` are those before them. A number that was left out is a decision that the journal has lost.
    """
    alike: dict[tuple[object, ...], Decided] = {}
    more: Counter[str] = Counter()
    missing = 0
    last = dict(numbers)
    for entry in entries:
        found = _decided(entry)
        if found is None:
            continue
        one, number = found
        missing += max(0, number - last.get(entry.process, 0) - 1)
        last[entry.process] = max(number, last.pop(entry.process, 0))
        key = tuple(getattr(one, name) for name in one.__struct_fields__ if name not in _OF_ONE)
        before = alike.get(key)
        if before is not None:
            alike[key] = msgspec.structs.replace(
                before,
                count=before.count + 1,
                last=max(before.last, one.last),
                request_ids=(*before.request_ids, *one.request_ids)[:MOST_IDS],
            )
        elif len(alike) < MOST:
            alike[key] = one
        else:
            more[one.reason or "allowed"] += 1
    kept = dict(list(last.items())[-_MOST_PROCESSES:])
    return Decisions(decided=tuple(alike.values()), more=dict(more.most_common(32)), missing=missing), kept


_OF_ONE = frozenset({"uid", "first", "last", "count", "request_ids"})


def _entries(lines: Iterator[bytes] | Any, limit: int) -> Iterator[Entry]:
    for line in lines:
        with contextlib.suppress(msgspec.MsgspecError):
            yield jsontext.decode(line, kind=Entry)
            limit -= 1
        if limit <= 0:
            return


def _decided(entry: Entry) -> tuple[Decided, int] | None:
    """Return the decision of an entry and its number; None for what is none, whatever its text looks like."""
    mediator = _MEDIATOR.fullmatch(entry.unit)
    if not isinstance(entry.message, str) or (entry.unit != _DECIDE and mediator is None):
        return None
    try:
        record = jsontext.decode(entry.message, kind=dict[str, Any])
    except msgspec.MsgspecError:
        return None
    number = record.get("n")
    if not is_told(record) or not isinstance(number, int) or isinstance(number, bool) or number < 1:
        return None
    time = int(entry.time_us) // 1000
    values: dict[str, Any] = {"policy_digest": record.get("policy_digest") or "", "first": time, "last": time}
    if mediator is None:
        port, asked = record.get("port"), record.get("request_id")
        values |= {"layer": "ring1", "reason": record.get("reason") or "host_not_allowed", "port": port or 0}
        values |= {name: _cut(record.get(name), PATH if name == "path" else TEXT) for name in _CALL}
        values["request_ids"] = (_cut(asked, TEXT),) if asked else ()
    else:
        call = record.get("event") == "tool_call"
        allowed = call and record.get("verdict") == "allow"
        values |= {"layer": "mcp", "verdict": "allow" if allowed else "deny"}
        values["reason"] = "" if allowed else record.get("reason") if call else record["event"]
        values |= {name: _cut(record.get(name), TEXT) for name in _TOOL} | {"server": mediator[1]}
        values["text"] = "" if call else _cut(record.get("reason"), TEXT)
    try:
        # One form on both sides: what the broker would not take must not stop all that comes after it.
        return msgspec.convert({"uid": f"{entry.process}:{number}", **values}, Decided), number
    except msgspec.ValidationError:
        return None


def _cut(value: object, limit: int) -> str:
    return value[:limit] if isinstance(value, str) else ""


__all__ = ["DecisionReports", "Entry", "Journal", "JournalError", "Place", "batch_of"]
