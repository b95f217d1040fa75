"""Recordings as asciicast version 2, which every player reads; and a player of our own for a terminal or a pipe."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import msgspec

from saw.sessions.recording import Event, Header

_CODES = {"o": "o", "e": "o", "i": "i", "r": "r", "m": "m"}


def lines(header: Header, events: Iterable[Event]) -> Iterator[str]:
    """Yield the lines of an asciicast v2 file. Bytes that are no UTF-8 become U+FFFD; both outputs become output."""
    told: dict[str, object] = {
        "version": 2,
        "width": header.columns,
        "height": header.rows,
        "timestamp": int(header.started),
        "title": f"{header.session} {header.principal} {header.workspace}",
    }
    if header.command:
        told["command"] = header.command
    if header.term:
        told["env"] = {"TERM": header.term}
    yield _line(told)
    decoders = {kind: codecs.getincrementaldecoder("utf-8")("replace") for kind in _CODES}
    last = 0.0
    for event in events:
        last = event.at
        if text := decoders[event.kind].decode(event.data, final=event.kind in "rm"):
            yield _line([round(event.at, 6), _CODES[event.kind], text])
    for kind in ("o", "e"):
        if rest := decoders[kind].decode(b"", final=True):
            yield _line([round(last, 6), "o", rest])


def play(
    events: Iterable[Event], out: BinaryIO, pause: Callable[[float], None] | None, *, idle_s: float, speed: float
) -> None:
    """Write what was shown to ``out``; with ``pause`` at the pace of the session, but no pause longer than ``idle_s``."""
    at = 0.0
    for event in events:
        if pause is not None and event.at > at:
            pause(min(event.at - at, idle_s) / speed)
        at = event.at
        if event.kind in "oe":
            out.write(event.data)
            out.flush()


def _line(value: object) -> str:
    return msgspec.json.encode(value).decode() + "\n"
