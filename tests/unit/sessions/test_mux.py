"""Connections over one stream: whole and in order, apart from each other, and refused where the protocol is not kept."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from saw import mux
from saw.mux import Frame, Frames, Kind, Mux, NotForwarding, encode

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
LONG_S = 60


async def ends() -> tuple[Streams, Streams]:
    one, other = socket.socketpair()
    return await asyncio.open_connection(sock=one), await asyncio.open_connection(sock=other)


class Pair:
    """Both ends: ``port`` is where the near one listens."""

    def __init__(self, near: Mux, port: int, tasks: list[asyncio.Task[None]], far: asyncio.StreamWriter) -> None:
        self.near, self.port, self.tasks, self.far = near, port, tasks, far

    async def connect(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.port)


@asynccontextmanager
async def pair(handle: Handle | None) -> AsyncIterator[Pair]:
    """A near end that listens and a far end in front of a server that runs ``handle``; None: nobody listens there."""
    server = await asyncio.start_server(handle or (lambda *_: None), "127.0.0.1", 0)
    target = server.sockets[0].getsockname()[1]
    if handle is None:
        server.close()
        await server.wait_closed()
    one, other = await ends()
    near, far = Mux(*one), Mux(*other, lambda: asyncio.open_connection("127.0.0.1", target))
    tasks = [asyncio.create_task(near.run()), asyncio.create_task(far.run())]
    listener = await asyncio.start_server(near.carry, "127.0.0.1", 0)
    await near.ready.wait()
    try:
        yield Pair(near, listener.sockets[0].getsockname()[1], tasks, other[1])
    finally:
        listener.close()
        server.close()
        one[1].close()
        other[1].close()
        await asyncio.wait(tasks, timeout=LONG_S)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()
    writer.close()


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), LONG_S))


def test_many_connections_carry_much_more_than_their_credit_whole_and_in_order() -> None:
    async def one(there: Pair, size: int) -> None:
        reader, writer = await there.connect()
        sent = os.urandom(size)

        async def send() -> None:
            writer.write(sent)
            writer.write_eof()

        sending = asyncio.create_task(send())
        assert await reader.read(-1) == sent
        await sending
        writer.close()

    async def body() -> None:
        async with pair(echo) as there:
            await asyncio.gather(*(one(there, size) for size in (1, 5 * mux.WINDOW, 0, 70_000, 3 * mux.WINDOW + 1)))

    run(body)


def test_one_that_is_not_read_holds_up_no_other() -> None:
    async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await _reader.readexactly(1)
        if first == b"!":
            writer.write(b"quick")
        else:
            writer.write(bytes(64 * mux.WINDOW))
        writer.close()

    async def body() -> None:
        async with pair(flood) as there:
            _, slow = await there.connect()
            slow.write(b"?")
            for _ in range(3):
                reader, writer = await there.connect()
                writer.write(b"!")
                assert await reader.read(-1) == b"quick"
                writer.close()
            slow.transport.abort()

    run(body)


def test_where_nobody_listens_the_connection_is_cut_and_the_next_is_tried_again() -> None:
    async def body() -> None:
        async with pair(None) as there:
            for _ in range(2):
                reader, _ = await there.connect()
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await reader.readexactly(1)

    run(body)


def test_a_client_that_goes_cuts_the_far_connection() -> None:
    gone = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x")
        try:
            while await reader.read(1):
                pass
        except ConnectionError:
            pass
        gone.set()

    async def body() -> None:
        async with pair(wait) as there:
            reader, writer = await there.connect()
            assert await reader.readexactly(1) == b"x"
            writer.transport.abort()
            await gone.wait()

    run(body)


def test_the_end_of_the_stream_ends_every_connection() -> None:
    async def body() -> None:
        async with pair(echo) as there:
            reader, writer = await there.connect()
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            there.far.close()
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
            await asyncio.wait(there.tasks)
            assert [task.exception() for task in there.tasks] == [None, None]

    run(body)


def test_beyond_the_most_a_connection_is_closed_at_once_and_those_before_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mux, "MOST", 2)

    async def body() -> None:
        async with pair(echo) as there:
            kept = [await there.connect() for _ in range(2)]
            for reader, writer in kept:
                writer.write(b"x")
                assert await reader.readexactly(1) == b"x"
            reader, _ = await there.connect()
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
            for reader, writer in kept:
                writer.write(b"y")
                assert await reader.readexactly(1) == b"y"
                writer.close()

    run(body)


def test_frames_are_cut_at_any_place_alike() -> None:
    frames = [Frame(Kind.HELLO, 0, b"\1"), Frame(Kind.OPEN, 1), Frame(Kind.DATA, 1, b"abc"), Frame(Kind.END, 1)]
    raw = b"".join(encode(frame) for frame in frames)
    for size in (1, 2, 7, len(raw)):
        cut = Frames()
        assert [one for at in range(0, len(raw), size) for one in cut.feed(raw[at : at + size])] == frames


BAD_FRAMES = {
    "kind": b"\6\0\0\0\1\0\0",
    "text": b"SSH-2.0-OpenSSH\r\n",
    "empty data": b"\2\0\0\0\1\0\0",
    "long data": b"\2\0\0\0\1\x40\1",
    "long open": b"\1\0\0\0\1\0\1x",
    "credit": b"\5\0\0\0\1\0\1x",
    "number": b"\1\0\0\0\0\0\0",
    "hello": b"\0\0\0\0\1\0\1\1",
}


@pytest.mark.parametrize("name", sorted(BAD_FRAMES))
def test_what_is_no_frame_is_refused(name: str) -> None:
    with pytest.raises(NotForwarding):
        Frames().feed(BAD_FRAMES[name])


HELLO = Frame(Kind.HELLO, 0, bytes([mux.VERSION]))
TO_THE_NEAR_END = {
    "no hello": [Frame(Kind.DATA, 1, b"x")],
    "other version": [Frame(Kind.HELLO, 0, b"\x63")],
    "two hellos": [HELLO, HELLO],
    "open": [HELLO, Frame(Kind.OPEN, 1)],
    "unknown": [HELLO, Frame(Kind.DATA, 1, b"x")],
}
TO_THE_FAR_END = {
    "hello": [HELLO],
    "twice": [Frame(Kind.OPEN, 1), Frame(Kind.OPEN, 1)],
    "unopened": [Frame(Kind.OPEN, 1), Frame(Kind.DATA, 2, b"x")],
    "too much": [Frame(Kind.OPEN, 1), *[Frame(Kind.DATA, 1, bytes(mux.MAX_DATA))] * (mux.WINDOW // mux.MAX_DATA + 1)],
    "credit": [Frame(Kind.OPEN, 1), Frame(Kind.CREDIT, 1, b"\0\0\0\1")],
    "too many": [Frame(Kind.OPEN, number + 1) for number in range(2 * mux.MOST + 1)],
}


@pytest.mark.parametrize(("far", "name"), [(False, n) for n in TO_THE_NEAR_END] + [(True, n) for n in TO_THE_FAR_END])
def test_who_does_not_keep_to_the_protocol_is_refused(far: bool, name: str) -> None:
    async def never() -> Streams:
        await asyncio.Event().wait()
        raise AssertionError

    async def body() -> None:
        one, (_, other) = await ends()
        end = Mux(*one, never if far else None)
        other.write(b"".join(encode(frame) for frame in (TO_THE_FAR_END if far else TO_THE_NEAR_END)[name]))
        with pytest.raises(NotForwarding):
            await end.run()
        other.close()
        one[1].close()

    run(body)
