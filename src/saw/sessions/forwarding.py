"""What a session for a forwarded port does, read off its frames: each connection, and its bytes in both directions.

What is no such frame is refused, so that nobody brings anything else through. The content of connections is not kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from saw.mux import MOST, Frame, Frames, Kind, broken

_ASKED = frozenset({Kind.OPEN, Kind.DATA, Kind.END, Kind.RESET, Kind.CREDIT})
_ANSWERED = _ASKED - {Kind.OPEN} | {Kind.HELLO}


@dataclass
class _Connection:
    sent: int = 0
    received: int = 0
    ends: int = 0


class ForwardLog:
    """Remarks about what goes to ``port`` and comes back. Used as :class:`saw.sessions.sftp.SftpLog` is."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._out, self._back = Frames(), Frames()
        self._open: dict[int, _Connection] = {}
        self._last = 0

    def asked(self, piece: bytes) -> list[str]:
        """Take what the client sends; return remarks. Raises :class:`saw.mux.NotForwarding`."""
        remarks: list[str] = []
        for frame in self._out.feed(piece):
            if frame.kind not in _ASKED:
                raise broken("it comes from the wrong end")
            if frame.kind is Kind.OPEN:
                remarks.append(self._opened(frame.number))
            elif (found := self._of(frame)) is not None:
                found.sent += len(frame.data) if frame.kind is Kind.DATA else 0
                remarks += self._ended(frame, found)
        return remarks

    def answered(self, piece: bytes) -> list[str]:
        """Take what the workspace sends; return remarks. Raises :class:`saw.mux.NotForwarding`."""
        remarks: list[str] = []
        for frame in self._back.feed(piece):
            if frame.kind not in _ANSWERED:
                raise broken("it comes from the wrong end")
            if frame.kind is not Kind.HELLO and (found := self._of(frame)) is not None:
                found.received += len(frame.data) if frame.kind is Kind.DATA else 0
                remarks += self._ended(frame, found)
        return remarks

    def finish(self) -> list[str]:
        """Return remarks about connections that were not ended."""
        return [f"{self._said(number, one)} (not ended)" for number, one in sorted(self._open.items())]

    def _opened(self, number: int) -> str:
        if number <= self._last:
            raise broken("the number of a connection came twice")
        if len(self._open) >= 2 * MOST:
            raise broken(f"there are more than {MOST} connections")
        self._last = number
        self._open[number] = _Connection()
        return f"forward port {self._port} connection {number} opened"

    def _of(self, frame: Frame) -> _Connection | None:
        if frame.number > self._last:
            raise broken("the connection was never opened")
        return self._open.get(frame.number)

    def _ended(self, frame: Frame, one: _Connection) -> list[str]:
        one.ends += frame.kind is Kind.END
        if frame.kind is not Kind.RESET and one.ends < 2:
            return []
        del self._open[frame.number]
        return [self._said(frame.number, one) + (" (cut)" if frame.kind is Kind.RESET else "")]

    def _said(self, number: int, one: _Connection) -> str:
        return f"forward port {self._port} connection {number} ended: {one.sent} bytes in, {one.received} bytes out"
