"""Where the mediators of MCP servers ask people, through the policy agent: a socket in the workspace, one question a connection.

Mediators have no network. The policy agent has the way to the broker and the workspace's identity, and passes on four questions
about tools and nothing else. The answer to a question that cannot be passed on is a refusal, so nothing is called without one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Protocol

import msgspec

from saw.errors import SawError
from saw.review.messages import Digest, Message, ReviewId, Secret
from saw.review.tool import MAX_PARAMS, MaybeDigest, Params, Server, ToolView

SOCKET = "/run/saw/review/tools.sock"
MAX_QUESTION = MAX_PARAMS // 3 * 4 + 16 * 1024
"""Longest question (bytes): parameters travel in base64."""
MAX_ANSWER = 64 * 1024
"""Longest answer (bytes)."""
MAX_ASKING = 32
"""Most questions at a time."""
LONGEST_WAIT_S = 30
_READ_S = 10.0
_CREDENTIALS = struct.Struct("3i")


class Ask(Message, frozen=True, kw_only=True, tag="ask"):
    """Ask people about a call."""

    policy_digest: Digest
    server: Server
    params: Params


class Wait(Message, frozen=True, kw_only=True, tag="wait"):
    """Look at a review; while it is pending, for up to ``wait_s`` seconds."""

    id: ReviewId
    wait_s: Annotated[int, msgspec.Meta(ge=0, le=LONGEST_WAIT_S)] = 0


class Claim(Message, frozen=True, kw_only=True, tag="claim"):
    """Claim the one right to make a call."""

    id: ReviewId
    policy_digest: Digest
    server: Server
    params: Params
    claim: Secret


class End(Message, frozen=True, kw_only=True, tag="end"):
    """Tell how a call ended."""

    id: ReviewId
    claim: Secret
    outcome: Literal["done", "failed", "unknown"]
    answer_sha256: MaybeDigest = ""
    detail: Annotated[str, msgspec.Meta(max_length=512)] = ""


Question = Ask | Wait | Claim | End


class Refusal(Message, frozen=True, kw_only=True):
    """Why there is no review to tell of: the broker's refusal, or that it cannot be asked (``review_unavailable``)."""

    code: str
    message: str
    cure: str = ""


class Reply(Message, frozen=True, kw_only=True):
    """One of the two."""

    view: ToolView | None = None
    refused: Refusal | None = None


class ReviewRefused(SawError):
    """The broker refused; ``code`` is its own, or ``review_unavailable`` where it could not be asked."""

    code = "review_refused"

    def __init__(self, code: str, message: str, cure: str = "") -> None:
        super().__init__(message, cure=cure)
        self.code = code


def unavailable(why: str) -> ReviewRefused:
    """Return what a question ends with that nobody answered: nothing is known of it."""
    return ReviewRefused("review_unavailable", why[:300], "call again later with the same arguments")


class Broker(Protocol):
    """What a question is passed on to."""

    def review(self, question: Question) -> ToolView:
        """Return the review; raise :class:`ReviewRefused`."""
        ...


class ReviewDesk:
    """Serves ``path`` for the user ``uid`` alone until :meth:`close`; ``log`` gets a line for each question that failed here."""

    def __init__(self, path: Path, uid: int, broker: Broker, log: Callable[[str], None]) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o711)
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            self._server = _Server(str(path), uid, broker, log)
        finally:
            os.umask(before)
        if uid != os.getuid():
            os.chown(path, uid, -1)
        self._thread = threading.Thread(target=self._server.serve_forever, name="reviews", daemon=True)

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

    def __init__(self, path: str, uid: int, broker: Broker, log: Callable[[str], None]) -> None:
        self.uid = uid
        self.broker = broker
        self.log = log
        self.room = threading.BoundedSemaphore(MAX_ASKING)
        super().__init__(path, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - the base class's form
        """Say that one question failed; the others go on."""
        import sys

        self.log(f"a question about a tool failed: {sys.exc_info()[1]!r}"[:300])


class _Handler(socketserver.StreamRequestHandler):
    timeout = _READ_S
    server: _Server

    def handle(self) -> None:
        """Read one question, pass it on, answer it."""
        raw = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(raw)[1] != self.server.uid:
            return
        if not self.server.room.acquire(blocking=False):
            self._reply(unavailable(f"{MAX_ASKING} questions are asked at this moment"))
            return
        try:
            line = self.rfile.readline(MAX_QUESTION + 1)
            self._reply(self._ask(line))
        finally:
            self.server.room.release()

    def _ask(self, line: bytes) -> ToolView | ReviewRefused:
        try:
            question = msgspec.json.decode(line, type=Question)
        except msgspec.DecodeError as error:
            return ReviewRefused("malformed", f"the question cannot be read: {error}"[:300])
        try:
            return self.server.broker.review(question)
        except ReviewRefused as error:
            return error

    def _reply(self, found: ToolView | ReviewRefused) -> None:
        if isinstance(found, ReviewRefused):
            refused = Refusal(code=found.code, message=found.message, cure=found.cure)
            reply = Reply(refused=refused)
        else:
            reply = Reply(view=found)
        with contextlib.suppress(OSError):
            self.wfile.write(msgspec.json.encode(reply) + b"\n")
