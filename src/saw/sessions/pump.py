"""Moves bytes from one descriptor to another without ever blocking, and shows them to somebody before they go on."""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections.abc import Callable

READ_BYTES = 64 * 1024


class Pump:
    """From ``source`` to ``sink``. ``tap`` sees every piece before it is written; nothing is read while a piece waits.

    ``closes`` says whether the end of the source is passed on by closing the sink.
    """

    def __init__(self, source: int, sink: int, tap: Callable[[bytes], None], *, closes: bool = False) -> None:
        self.source = source
        self.sink = sink
        self._tap = tap
        self._closes = closes
        self._waiting = b""
        self.at_end = False
        self.sink_gone = False
        for descriptor in (source, sink):
            os.set_blocking(descriptor, False)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.sink_gone or (self.at_end and not self._waiting)

    def interest(self) -> tuple[int, int] | None:
        """Return the descriptor and poll events that it waits for; None when there is nothing to wait for."""
        if self.done:
            return None
        return (self.sink, select.POLLOUT) if self._waiting else (self.source, select.POLLIN)

    def step(self) -> None:
        """Move what can be moved now."""
        if self.done:
            return
        if self._waiting:
            self._write()
            return
        try:
            piece = os.read(self.source, READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            # A terminal whose other side is closed answers EIO.
            if error.errno not in {errno.EIO, errno.ECONNRESET, errno.EBADF}:
                raise
            piece = b""
        if not piece:
            self.at_end = True
            self._close()
            return
        self._tap(piece)
        self._waiting = piece
        self._write()

    def _write(self) -> None:
        try:
            written = os.write(self.sink, self._waiting)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in {errno.EIO, errno.EPIPE, errno.ECONNRESET, errno.EBADF}:
                raise
            self.sink_gone = True
            self._waiting = b""
            return
        self._waiting = self._waiting[written:]
        if self.at_end:
            self._close()

    def _close(self) -> None:
        if self._closes and not self._waiting:
            self._closes = False
            with contextlib.suppress(OSError):
                os.close(self.sink)
