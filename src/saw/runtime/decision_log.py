"""Decisions in the workspace's journal, one JSON line each. The policy agent tells from there what nobody outside could see.

Such a decision has a number, counted from one since the process started, so that a reader sees which ones the journal has lost;
and a priority above that of the others, so that it is found among many calls that ring 2 records.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TextIO

#: How systemd reads a priority off a line (sd-daemon(3)).
_WARNING, _NOTICE = "<4>", "<5>"
_LONGEST = 4096
"""Where a text is cut (characters): the journal breaks lines of 48 KiB (LineMax of journald.conf(5)) in two."""
_REFUSED = frozenset({"message_refused", "session_refused", "session_failed"})


def is_told(record: Mapping[str, object]) -> bool:
    """Tell whether a decision is known here alone: what was refused, and calls of tools over stdio.

    What ring 1 lets go on to ring 2, and what ring 2 will have reviewed, is recorded there.
    """
    event = record.get("event")
    if event == "ring1_decision":
        return record.get("verdict") not in {"allow", "review"}
    return event == "tool_call" or event in _REFUSED


class DecisionLog:
    """Writes records to ``stream``; their number and priority are for the journal, ``journal`` says whether it reads."""

    def __init__(self, stream: TextIO, *, journal: bool | None = None) -> None:
        self._stream = stream
        self._journal = _read_by_journal(stream) if journal is None else journal
        self._count = 0

    def __call__(self, record: Mapping[str, object]) -> None:
        """Write one record. It names no query, header, body or argument."""
        record = {name: value[:_LONGEST] if isinstance(value, str) else value for name, value in record.items()}
        prefix = ""
        if is_told(record):
            self._count += 1
            record["n"] = self._count
            level = _NOTICE if record.get("verdict") == "allow" else _WARNING
            prefix = level if self._journal else ""
        self._stream.write(f"{prefix}{json.dumps(record, separators=(',', ':'))}\n")
        self._stream.flush()


def _read_by_journal(stream: TextIO) -> bool:
    """Tell whether the journal reads what is written to ``stream`` (``JOURNAL_STREAM`` of systemd.exec(5))."""
    try:
        state = os.fstat(stream.fileno())
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{state.st_dev}:{state.st_ino}"


__all__ = ["DecisionLog", "is_told"]
