"""A socket in the workspace where programs of one other user ask the policy agent: a line in, a line out, one a connection."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

_READ_S = 10.0
_CREDENTIALS = struct.Struct("3i")


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What a desk takes: ``longest`` question (bytes), ``most`` questions at a time, ``busy``: the answer to one too many."""

    name: str
    longest: int
    most: int
    busy: bytes


class Desk:
    """Serves ``path`` for the user ``uid`` alone until :meth:`close`; ``answer`` makes a line of a line, in a thread of its own.

    ``log`` gets a line for each question that failed here.
    """

    def __init__(
        self, path: Path, uid: int, answer: Callable[[bytes], bytes], log: Callable[[str], None], rules: Rules
    ) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o711)
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            self._server = _Server(str(path), uid, answer, log, rules)
        finally:
            os.umask(before)
        if uid != os.getuid():
            os.chown(path, uid, -1)
        self._thread = threading.Thread(target=self._server.serve_forever, name=rules.name, daemon=True)

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def close(self) -> None:
        """Answer no longer."""
        self._server.shutdown()
        self._server.server_close()
        self._path.unlink(missing_ok=True)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, path: str, uid: int, answer: Callable[[bytes], bytes], log: Callable[[str], None], rules: Rules
    ) -> None:
        self.uid = uid
        self.answer = answer
        self.log = log
        self.rules = rules
        self.room = threading.BoundedSemaphore(rules.most)
        super().__init__(path, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - the base class's form
        """Say that one question failed; the others go on."""
        self.log(f"a question about {self.rules.name} failed: {sys.exc_info()[1]!r}"[:300])


class _Handler(socketserver.StreamRequestHandler):
    timeout = _READ_S
    server: _Server

    def handle(self) -> None:
        """Read one question, have it answered."""
        raw = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(raw)[1] != self.server.uid:
            return
        if not self.server.room.acquire(blocking=False):
            self._reply(self.server.rules.busy)
            return
        try:
            self._reply(self.server.answer(self.rfile.readline(self.server.rules.longest + 1)))
        finally:
            self.server.room.release()

    def _reply(self, line: bytes) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(line + b"\n")
