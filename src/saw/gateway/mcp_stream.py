"""Server-sent events read as they come, each one whole, and written anew (HTML standard, "Server-sent events")."""

from __future__ import annotations

import re
from typing import NamedTuple

from saw.policy.mcp_messages import MAX_MESSAGE

_END = re.compile(rb"\r\n|\n|\r")
_ID = re.compile(rb"[\x20-\x7e]{0,1024}\Z")
_RETRY = re.compile(rb"[0-9]{1,9}\Z")
_BOM = b"\xef\xbb\xbf"


class EventUnreadable(Exception):
    """The stream is not one that can be read within bounds."""


class Event(NamedTuple):
    """One event: ``kind`` is its type, ``data`` what it carries, ``id`` and ``retry`` what resuming needs.

    ``id`` is None where the event says nothing of it. An event with nothing at all is a sign of life.
    """

    kind: bytes = b"message"
    data: bytes | None = None
    id: bytes | None = None
    retry: bytes | None = None

    def written(self, data: bytes | None) -> bytes:
        """Return the event with other ``data`` (one line), or with none."""
        lines = [b"id: " + self.id] if self.id is not None else []
        if self.retry is not None:
            lines.append(b"retry: " + self.retry)
        if data is not None:
            lines += [b"event: message", b"data: " + data]
        return b"\n".join([*lines, b"", b""]) if lines else b":\n\n"


class EventReader:
    """Cuts a stream into events; ``most`` bytes of one event are kept."""

    def __init__(self, most: int = MAX_MESSAGE) -> None:
        self._most = most
        self._rest = bytearray()
        self._first = True
        self._after_return = False
        self._lines: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> list[Event]:
        """Take in one more piece, of at least one byte, and return the events that are whole now.

        Raises :class:`EventUnreadable` for an event that is too long.
        """
        if self._after_return:
            # The two bytes of one line's end may come in two pieces.
            piece = piece.removeprefix(b"\n")
        found: list[Event] = []
        at = 0
        for end in _END.finditer(piece):
            self._rest += piece[at : end.start()]
            self._line(bytes(self._rest), found)
            self._rest.clear()
            at = end.end()
        self._after_return = piece.endswith(b"\r")
        self._rest += piece[at:]
        if self.held > self._most:
            raise EventUnreadable(f"an event of the stream is longer than {self._most} bytes")
        return found

    @property
    def held(self) -> int:
        """Return how many bytes of an event that is not whole yet are kept."""
        return self._size + len(self._rest)

    def _line(self, line: bytes, found: list[Event]) -> None:
        if self._first:
            line, self._first = line.removeprefix(_BOM), False
        if line:
            self._lines.append(line)
            self._size += len(line) + 1
            if self._size > self._most:
                raise EventUnreadable(f"an event of the stream is longer than {self._most} bytes")
            return
        if self._lines:
            found.append(_event(self._lines))
            self._lines, self._size = [], 0


def _event(lines: list[bytes]) -> Event:
    event, data = Event(), None
    for line in lines:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data = value if data is None else data + b"\n" + value
        elif name == b"event":
            event = event._replace(kind=value or b"message")
        elif name == b"id" and _ID.match(value):
            event = event._replace(id=value)
        elif name == b"retry" and _RETRY.match(value):
            event = event._replace(retry=value)
    return event._replace(data=data)
