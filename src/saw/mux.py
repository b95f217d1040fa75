"""Many TCP connections over one pair of streams: the frames, and both ends. Forwarded ports of workspaces go through it.

A frame is kind (1 byte), connection (4), length (2) and so many bytes, numbers in network order. The near end takes connections
and numbers them from 1; the far end makes one TCP connection for each. Each direction of a connection has :data:`WINDOW` bytes
of credit, given back as they are written, so that one that stands still holds up no other. Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import struct
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from saw.errors import SawError

VERSION = 1
MAX_DATA = 16 * 1024
"""Most bytes of one frame's data."""
WINDOW = 256 * 1024
"""Bytes of one direction of a connection that may be on their way."""
MOST = 128
"""Most connections at a time."""
RESERVED = frozenset({3128, 9901})
"""Ports that are never forwarded: of ring 1, its proxy and its administration."""
_HEADER = struct.Struct(">BIH")
_U32 = struct.Struct(">I")
_READ = 64 * 1024


class Kind(enum.IntEnum):
    """What a frame says. ``HELLO`` comes from the far end, once, first; ``OPEN`` from the near one."""

    HELLO = 0
    OPEN = 1
    DATA = 2
    END = 3
    RESET = 4
    CREDIT = 5


class Frame(NamedTuple):
    """One frame: what it says, of which connection, and its bytes."""

    kind: Kind
    number: int
    data: bytes = b""


class NotForwarding(SawError):
    """What comes is not this protocol."""

    code = "not_forwarding"


Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


def may_be_forwarded(port: int) -> bool:
    """Tell whether a port of a workspace may be forwarded at all: one that takes no privilege, and none of ours."""
    return 1024 <= port <= 65535 and port not in RESERVED


def read_port(text: str) -> int | None:
    """Return the port that ``text`` names, None when it is none that may be forwarded."""
    port = int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else 0
    return port if str(port) == text and may_be_forwarded(port) else None


def encode(frame: Frame) -> bytes:
    """Return the bytes of ``frame``."""
    return _HEADER.pack(frame.kind, frame.number, len(frame.data)) + frame.data


class Frames:
    """Cuts a stream into frames, and refuses what is none with :class:`NotForwarding`."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, piece: bytes) -> list[Frame]:
        """Return the frames that are whole now."""
        self._rest += piece
        found, at = [], 0
        while len(self._rest) - at >= _HEADER.size:
            code, number, length = _HEADER.unpack_from(self._rest, at)
            _check(code, number, length)
            end = at + _HEADER.size + length
            if len(self._rest) < end:
                break
            found.append(Frame(Kind(code), number, bytes(self._rest[at + _HEADER.size : end])))
            at = end
        del self._rest[:at]
        return found


def _check(code: int, number: int, length: int) -> None:
    right: dict[int, bool] = {
        Kind.HELLO: number == 0 and length == 1,
        Kind.OPEN: length == 0,
        Kind.DATA: 1 <= length <= MAX_DATA,
        Kind.END: length == 0,
        Kind.RESET: length == 0,
        Kind.CREDIT: length == _U32.size,
    }
    if not right.get(code, False) or (number == 0 and code != Kind.HELLO):
        raise broken("a frame is malformed")


def broken(why: str) -> NotForwarding:
    """Return the error for a stream that does not follow the protocol."""
    return NotForwarding(f"this is no forwarding: {why}", cure="both ends must be of the same version of saw")


class _Connection:
    """One connection: what may be sent, and what has come and is not written yet (``None``: nothing more will come)."""

    def __init__(self) -> None:
        self.credit = WINDOW
        self.more = asyncio.Event()
        self.held = 0
        self.came: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None


class Mux:
    """One end. Without ``connect`` it is the near one, whose connections :meth:`carry` brings; with it the far one."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connect: Connect | None = None
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._connect = connect
        self._sending = asyncio.Lock()
        self._connections: dict[int, _Connection] = {}
        self._last = 0
        self.ready = asyncio.Event()
        """Set once the far end has spoken (near end)."""

    async def run(self) -> None:
        """Carry until the other end closes; raise :class:`NotForwarding` when it does not keep to the protocol.

        All connections are closed then.
        """
        frames = Frames()
        try:
            if self._connect is not None:
                await self._send(Frame(Kind.HELLO, 0, bytes([VERSION])))
            while piece := await self._reader.read(_READ):
                for frame in frames.feed(piece):
                    self._take(frame)
        except ConnectionError:
            pass  # the other end is gone, as with the end of the stream
        finally:
            tasks = [one.task for one in self._connections.values() if one.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection to its end (near end). Beyond :data:`MOST` it is closed at once."""
        if len(self._connections) >= MOST or not self.ready.is_set():
            writer.transport.abort()
            return
        self._last += 1
        connection = self._connections[self._last] = _Connection()
        task = connection.task = asyncio.create_task(self._near(self._last, connection, reader, writer))
        await asyncio.wait({task})

    def _take(self, frame: Frame) -> None:
        if self._connect is None and not self.ready.is_set():
            if frame != (Kind.HELLO, 0, bytes([VERSION])):
                raise broken("the far end did not say hello")
            self.ready.set()
            return
        if frame.kind is Kind.HELLO:
            raise broken("there was a hello before")
        if frame.kind is Kind.OPEN:
            self._opened(frame.number)
            return
        if frame.number > self._last:
            raise broken("the connection was never opened")
        connection = self._connections.get(frame.number)
        if connection is None:
            return  # it is over on this side; the frame was on its way
        if frame.kind is Kind.DATA:
            connection.held += len(frame.data)
            if connection.held > WINDOW:
                raise broken("more came than there was credit for")
            connection.came.put_nowait(frame.data)
        elif frame.kind is Kind.END:
            connection.came.put_nowait(None)
        elif frame.kind is Kind.RESET:
            if connection.task is not None:
                connection.task.cancel()
        else:
            connection.credit += _U32.unpack(frame.data)[0]
            if connection.credit > WINDOW:
                raise broken("more credit came than was used")
            connection.more.set()

    def _opened(self, number: int) -> None:
        if self._connect is None or number <= self._last:
            raise broken("the number of a connection came twice, or from the wrong end")
        # One that is over on the near side may not be over here yet.
        if len(self._connections) >= 2 * MOST:
            raise broken(f"there are more than {MOST} connections")
        self._last = number
        connection = self._connections[number] = _Connection()
        connection.task = asyncio.create_task(self._far(number, connection, self._connect))

    async def _near(
        self, number: int, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            with contextlib.suppress(OSError):
                await self._send(Frame(Kind.OPEN, number))
                await self._serve(number, connection, reader, writer)
        finally:
            writer.transport.abort()
            self._connections.pop(number, None)

    async def _far(self, number: int, connection: _Connection, connect: Connect) -> None:
        try:
            with contextlib.suppress(OSError):
                try:
                    reader, writer = await connect()
                except OSError:
                    await self._send(Frame(Kind.RESET, number))
                    return
                await self._serve(number, connection, reader, writer)
        finally:
            self._connections.pop(number, None)

    async def _serve(
        self, number: int, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Move bytes both ways until both have ended. What breaks, or is cancelled, is cut."""
        whole = False
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._outward(number, connection, reader))
                group.create_task(self._inward(number, connection, writer))
            whole = True
            writer.close()
            await writer.wait_closed()
        except* OSError:
            await self._send(Frame(Kind.RESET, number))
        finally:
            if not whole:
                writer.transport.abort()

    async def _outward(self, number: int, connection: _Connection, reader: asyncio.StreamReader) -> None:
        while True:
            while connection.credit <= 0:
                connection.more.clear()
                await connection.more.wait()
            piece = await reader.read(min(connection.credit, MAX_DATA))
            if not piece:
                await self._send(Frame(Kind.END, number))
                return
            connection.credit -= len(piece)
            await self._send(Frame(Kind.DATA, number, piece))

    async def _inward(self, number: int, connection: _Connection, writer: asyncio.StreamWriter) -> None:
        while (piece := await connection.came.get()) is not None:
            writer.write(piece)
            await writer.drain()
            connection.held -= len(piece)
            await self._send(Frame(Kind.CREDIT, number, _U32.pack(len(piece))))
        if writer.can_write_eof():
            writer.write_eof()

    async def _send(self, frame: Frame) -> None:
        async with self._sending:
            self._writer.write(encode(frame))
            await self._writer.drain()
