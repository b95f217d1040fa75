"""The host's journal, read from a cursor on and followed by a ``journalctl``, and what of it is missing.

All entries are read and chosen from here: so the cursor is that of the newest entry, and when it is not in the journal any more
that is a gap and no guess. What is asked for first is always the entry that was read last. Fields that start with an underscore
are stated by journald and cannot be set by who writes an entry (systemd.journal-fields(7)).
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import time
from collections.abc import Callable
from typing import Any

import msgspec

from saw import jsontext
from saw.telemetry.config import TelemetryConfig, TelemetryError

#: Most entries of one reading.
BATCH = 500
_CHUNK = 65_536
#: Anybody may write an entry of any length. A line that is longer than this is not kept, and passed over in parts.
_LONGEST_LINE = 1024 * 1024
#: So many parts are passed over before the caller has its turn.
_MOST_PARTS = 256
#: No field's text can hold this: its quotes would be escaped (RFC 8259).
_CURSOR = re.compile(rb'"__CURSOR":"([^"\\]{1,400})"')
_CURSOR_ENDS = 512
_FIELDS = (
    "MESSAGE",
    "MESSAGE_ID",
    "PRIORITY",
    "SYSLOG_IDENTIFIER",
    "SYSLOG_FACILITY",
    "UNIT",
    "JOB_RESULT",
    "UNIT_RESULT",
    "N_DROPPED",
    "_TRANSPORT",
    "_SYSTEMD_UNIT",
    "_PID",
    "_UID",
    "_COMM",
    "_EXE",
    "_AUDIT_TYPE",
    "_AUDIT_TYPE_NAME",
    "_AUDIT_ID",
)
_PART = re.compile(r"([a-z])=([0-9a-f]+)")
#: What of a cursor names an entry in whichever file: boot, monotonic time, time, hash of its content.
_NAMES_ENTRY = ("b", "m", "t", "x")


class JournalError(TelemetryError):
    """The journal cannot be read."""

    code = "journal_unreadable"


class Entry(msgspec.Struct, frozen=True, rename=str.upper):
    """One entry as ``journalctl --output=json`` writes it. A field is a text, a list of bytes, several, or null (too long)."""

    cursor: str = msgspec.field(name="__CURSOR")
    time_us: str = msgspec.field(name="__REALTIME_TIMESTAMP")
    message: Any = None
    message_id: Any = None
    priority: Any = None
    syslog_identifier: Any = None
    syslog_facility: Any = None
    unit: Any = None
    job_result: Any = None
    unit_result: Any = None
    n_dropped: Any = None
    transport: str = msgspec.field(name="_TRANSPORT", default="")
    systemd_unit: str = msgspec.field(name="_SYSTEMD_UNIT", default="")
    pid: str = msgspec.field(name="_PID", default="")
    uid: str = msgspec.field(name="_UID", default="")
    comm: Any = msgspec.field(name="_COMM", default=None)
    exe: Any = msgspec.field(name="_EXE", default=None)
    audit_type: Any = msgspec.field(name="_AUDIT_TYPE", default=None)
    audit_type_name: Any = msgspec.field(name="_AUDIT_TYPE_NAME", default=None)
    audit_id: Any = msgspec.field(name="_AUDIT_ID", default=None)


class Untold(msgspec.Struct, frozen=True):
    """An entry that was passed over, since it is too long or not as it has to be."""

    cursor: str


class Gap(msgspec.Struct, frozen=True):
    """Entries that were in the journal and were not read: behind ``after`` and before ``before`` (cursors).

    ``since`` and ``until`` are the times of those two (microseconds since 1970, None when not known). ``entries`` counts what lay
    between, None where the journal's numbers do not tell.
    """

    after: str
    before: str
    since: int | None
    until: int | None
    entries: int | None


def words(value: object) -> str:
    """Return the text of a field; of several the first, and of bytes that are no UTF-8 what can be read of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if isinstance(value[0], str):
            return value[0]
        with contextlib.suppress(TypeError, ValueError):
            return bytes(value).decode("utf-8", "replace")
    return ""


def parts_of(cursor: str) -> dict[str, str]:
    """Return the parts of a cursor by their letter: ``s`` and ``i`` are the file's id and the entry's number (hex)."""
    return {found[1]: found[2] for part in cursor.split(";") if (found := _PART.fullmatch(part))}


def same(one: str, other: str) -> bool:
    """Tell whether two cursors name one entry, wherever journald has put it meanwhile."""
    left, right = parts_of(one), parts_of(other)
    return one == other or all(left.get(name) == right.get(name) is not None for name in _NAMES_ENTRY)


def gap_between(after: str, before: str) -> Gap:
    """Return the gap between an entry that is not there any more and the oldest one that is."""
    left, right = parts_of(after), parts_of(before)
    entries = None
    if left.get("s") == right.get("s") is not None and "i" in left and "i" in right:
        entries = max(0, int(right["i"], 16) - int(left["i"], 16) - 1)
    since, until = (int(found["t"], 16) if "t" in found else None for found in (left, right))
    return Gap(after, before, since, until, entries)


class Reading:
    """One ``journalctl`` that follows the journal behind ``cursor`` (empty: where ``config.first`` says)."""

    def __init__(self, config: TelemetryConfig, cursor: str) -> None:
        self._cursor = cursor
        self._checks = bool(cursor)
        self._rest = b""
        self._long = False
        command = [
            "journalctl",
            "--follow",
            "--quiet",
            "--no-pager",
            "--output=json",
            f"--output-fields={','.join(_FIELDS)}",
        ]
        command += [f"--directory={config.journal}"] if config.journal else []
        first = {"boot": ["--boot", "--no-tail"], "now": ["--lines=0"], "all": ["--no-tail"]}[config.first]
        command += [f"--cursor={cursor}", "--no-tail"] if cursor else first
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise JournalError(f"journalctl cannot be run: {error}", cure="install systemd") from error

    def read(self, wait_s: float) -> tuple[list[Entry | Untold], Gap | None]:
        """Return up to :data:`BATCH` new entries, oldest first, after at most about ``wait_s`` seconds, and the gap before them.

        Raises :class:`JournalError` when ``journalctl`` has ended.
        """
        found: list[Entry | Untold] = []
        gap: Gap | None = None
        end = time.monotonic() + wait_s
        while len(found) < BATCH:
            line = self._line(0.0 if found else end - time.monotonic())
            if line is None:
                break
            entry = _entry(line)
            if entry is None:
                continue
            if self._checks:
                self._checks = False
                if same(entry.cursor, self._cursor):
                    continue
                gap = gap_between(self._cursor, entry.cursor)
            found.append(entry)
        return found, gap

    def close(self) -> None:
        """End the ``journalctl``."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def _line(self, wait_s: float) -> bytes | None:
        """Return the next line, None when there is none yet; of one that is too long what is left of it: its cursor."""
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        stream = self._process.stdout.fileno()
        for _ in range(_MOST_PARTS):
            line, newline, rest = self._rest.partition(b"\n")
            if newline:
                cut, self._long = self._long, False
                self._rest = rest
                return _shortened(line) if cut else line
            if not select.select([stream], [], [], max(0.0, wait_s))[0]:
                return None
            chunk = os.read(stream, _CHUNK)
            if not chunk:
                raise JournalError(f"journalctl ended: {self._complaint()}", cure="journalctl --verify")
            self._rest += chunk
            self._long = self._long or (len(self._rest) > _LONGEST_LINE and b"\n" not in self._rest)
            if self._long and b"\n" not in self._rest:
                self._rest = _shortened(self._rest)
        return None

    def _complaint(self) -> str:
        code = self._process.wait()
        assert self._process.stderr is not None  # noqa: S101 - it was asked for
        return self._process.stderr.read(2000).decode(errors="replace").strip()[-300:] or f"code {code}"


def _entry(line: bytes) -> Entry | Untold | None:
    """Return the entry of a line; None for what is no entry at all."""
    try:
        return jsontext.decode(line, kind=Entry)
    except msgspec.MsgspecError:
        found = _CURSOR.search(line)
        return Untold(found[1].decode("ascii", "replace")) if found else None


def _shortened(part: bytes) -> bytes:
    """Return what names the entry of a line that is too long: its cursor, or the end, where that may begin."""
    found = _CURSOR.search(part)
    return found[0] if found else part[-_CURSOR_ENDS:]


Open = Callable[[TelemetryConfig, str], Reading]
__all__ = [
    "BATCH",
    "Entry",
    "Gap",
    "JournalError",
    "Open",
    "Reading",
    "Untold",
    "gap_between",
    "parts_of",
    "same",
    "words",
]
