"""The relay of calls to MCP servers: what bounds it, and what it does when a part of it fails. The far end is a Unix socket."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from saw.audit.events import EventFactory
from saw.gateway.judge import Call, Refused, Verdict
from saw.gateway.mcp_exchange import Rules
from saw.gateway.mcp_relay import MOST_EACH, McpRelay
from saw.gateway.spool import Spool
from saw.gateway.tickets import Tickets
from saw.policy.mcp_answers import Definitions, ServerTools
from saw.policy.mcp_messages import MAX_MESSAGE
from saw.policy.tool_rules import Tool

pytestmark = [pytest.mark.control("RUN-05"), pytest.mark.control("POL-04")]

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CALL = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"read"}}'
ANSWER = b'{"jsonrpc":"2.0","id":1,"result":{"content":[]}}'
SAMPLING = b'{"jsonrpc":"2.0","id":3,"method":"sampling/createMessage"}'
Served = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def verdict(server: str = "web", method: str = "POST") -> Verdict:
    called = Call(
        listener="1", peer="", scheme="https", authority="mcp.example.com", port="443", method=method, target="/mcp",
        binary="/usr/bin/node", ancestors=(), request_id="r", headers={}, body=b"", body_complete=True,
    )  # fmt: skip
    return Verdict(
        call=called, time=NOW, allowed=True, host="mcp.example.com", port=443, workspace_id="ws-1", server=server
    )


def rules(_: Verdict) -> Rules:
    return Rules(lambda: ServerTools({"read": Tool(class_="auto")}, {"read"}), Definitions())


class Client:
    """One call as the server of the relay's socket would bring it; ``leave`` ends the connection."""

    def __init__(self, ticket: str, body: bytes = CALL, method: str = "POST") -> None:
        fields = [("host", "mcp.example.com"), ("x-saw-ticket", ticket), ("accept-encoding", "gzip"), ("cookie", "a=b")]
        self.scope = {
            "type": "http", "method": method, "raw_path": b"/mcp", "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in fields],
        }  # fmt: skip
        self.body = body
        self.left = asyncio.Event()
        self.status = 0
        self.answer = b""
        self.begun = asyncio.Event()
        self._asked = False

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self.body}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.answer += message.get("body", b"")
        if message.get("body") or message["type"] == "http.response.start":
            self.begun.set()

    async def through(self, relay: McpRelay) -> Client:
        async with asyncio.timeout(60):
            await relay(self.scope, self.receive, self.send)
        return self


class World:
    """A relay with its tickets, and the far end that ``serve`` is."""

    def __init__(self, folder: Path, by: Callable[[Verdict], Rules] = rules, limit: int = 100) -> None:
        self.arriving, self.sending = Tickets[Verdict](time.monotonic), Tickets[Verdict](time.monotonic)
        self.spool = Spool(folder, "edge", limit)
        self.socket = folder / "send.sock"
        factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "u")
        self.relay = McpRelay(by, self.arriving, self.sending, self.spool, factory, socket=self.socket, now=lambda: NOW)
        self.asked: list[bytes] = []

    def client(self, judged: Verdict | None = None, body: bytes = CALL) -> Client:
        judged = verdict() if judged is None else judged
        method = judged.call.method
        return Client(self.arriving.issue((method, "mcp.example.com", "/mcp"), judged), body, method)

    @asynccontextmanager
    async def far_end(self, serve: Served) -> AsyncIterator[None]:
        async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            size = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
            )
            self.asked.append(head + await reader.readexactly(size))
            await serve(reader, writer)
            writer.close()

        async with await asyncio.start_unix_server(served, self.socket):
            yield


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def said(body: bytes, kind: str = "application/json") -> Served:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\nx-saw-x: 1\r\nset-cookie: c\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()

    return serve


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_a_call_goes_on_with_its_own_headers_and_a_ticket_and_comes_back(world: World) -> None:
    async def work() -> None:
        async with world.far_end(said(ANSWER)):
            client = await world.client().through(world.relay)
        assert (client.status, json.loads(client.answer)) == (200, json.loads(ANSWER))
        (asked,) = world.asked
        assert asked.endswith(CALL) and b"cookie: a=b" in asked and b"accept-encoding: identity" in asked
        assert b"x-saw-send: " in asked and b"x-saw-ticket" not in asked
        ticket = asked.partition(b"x-saw-send: ")[2].partition(b"\r\n")[0].decode()
        assert not world.sending.drop(ticket), "a ticket that nobody used is taken back"

    run(work())


def test_without_a_ticket_or_with_one_for_another_call_nothing_is_sent(world: World) -> None:
    async def work() -> None:
        async with world.far_end(said(ANSWER)):
            for client in (
                Client("x" * 43),
                Client(world.arriving.issue(("GET", "mcp.example.com", "/mcp"), verdict())),
                world.client(verdict(server="")),
            ):
                assert (await client.through(world.relay)).status == 403
        assert world.asked == []

    run(work())


def test_a_server_that_is_not_there_is_told_as_such(world: World) -> None:
    async def work() -> None:
        client = await world.client().through(world.relay)
        assert (client.status, json.loads(client.answer)["reason"]) == (502, "answer_unreadable")

    run(work())


def test_so_many_calls_of_a_workspace_are_open_at_a_time_and_one_that_ends_makes_room(world: World) -> None:
    async def work() -> None:
        held, all_asked = asyncio.Event(), asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if len(world.asked) == MOST_EACH:
                all_asked.set()
            await held.wait()
            await said(ANSWER)(reader, writer)

        async with world.far_end(serve), asyncio.timeout(120):
            clients = [world.client() for _ in range(MOST_EACH)]
            calls = [asyncio.create_task(client.through(world.relay)) for client in clients]
            await all_asked.wait()
            assert (await world.client().through(world.relay)).status == 503
            held.set()
            assert {client.status for client in await asyncio.gather(*calls)} == {200}
            assert (await world.client().through(world.relay)).status == 200

    run(work())


def test_a_client_that_goes_away_ends_the_call_to_the_server(world: World) -> None:
    async def work() -> None:
        ended = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n: here\n\n")
            await writer.drain()
            assert await reader.read() == b""
            ended.set()

        async with world.far_end(serve), asyncio.timeout(60):
            client = world.client(verdict(method="GET"), b"")
            call = asyncio.create_task(client.through(world.relay))
            await client.begun.wait()
            client.left.set()
            await call
            await ended.wait()

    run(work())


@pytest.mark.control("AUD-01")
def test_what_cannot_be_recorded_is_not_passed_on_and_what_needs_no_record_is(tmp_path: Path) -> None:
    world = World(tmp_path, limit=0)

    async def work() -> None:
        async with world.far_end(said(b"data: " + SAMPLING + b"\n\ndata: " + ANSWER + b"\n\n", "text/event-stream")):
            assert b"result" not in (await world.client().through(world.relay)).answer
        world.socket.unlink(missing_ok=True)
        async with world.far_end(said(b"data: " + ANSWER + b"\n\n", "text/event-stream")):
            assert ANSWER in (await world.client().through(world.relay)).answer

    run(work())


def test_an_answer_to_who_may_not_have_it_any_more_is_an_error_with_the_reason(tmp_path: Path) -> None:
    def cut_off(_: Verdict) -> Rules:
        raise Refused("lease_expired", "the lease has ended")

    world = World(tmp_path, by=cut_off)

    async def work() -> None:
        async with world.far_end(said(ANSWER)):
            client = await world.client().through(world.relay)
        error = json.loads(client.answer)["error"]
        assert (client.status, error["data"]["reason"]) == (200, "answer_unreadable")
        assert "lease_expired" in error["message"]

    run(work())


class Waits(Definitions):
    """Definitions that cannot be noted for as long as ``go`` is not set."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.noting = threading.Event(), threading.Event()

    def note(self, *_: object) -> None:
        self.noting.set()
        assert self.go.wait(300)


def test_lists_that_wait_to_be_kept_hold_up_nothing_that_other_calls_need(tmp_path: Path) -> None:
    known = Waits()
    world = World(tmp_path, by=lambda _: Rules(lambda: ServerTools({"read": Tool(class_="auto")}, {"read"}), known))
    lists = b'{"jsonrpc":"2.0","id":1,"method":"tools/list"}'
    listed = b'{"jsonrpc":"2.0","id":1,"result":{"tools":[{"name":"read"}]}}'

    async def work() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        try:
            async with world.far_end(said(listed)), asyncio.timeout(60):
                calls = [asyncio.create_task(world.client(body=lists).through(world.relay)) for _ in range(20)]
                while not known.noting.is_set():  # noqa: ASYNC110 - another thread's work
                    await asyncio.sleep(0.01)
                assert await asyncio.to_thread(lambda: "decided") == "decided"
                known.go.set()
                assert {client.status for client in await asyncio.gather(*calls)} == {200}
        finally:
            known.go.set()

    run(work())


def test_long_answers_are_read_up_to_a_bound(world: World) -> None:
    def of(size: int) -> bytes:
        return ANSWER.replace(b"[]", json.dumps(["x" * (size - len(ANSWER) - 2)]).encode())

    async def told(body: bytes, kind: str) -> bytes:
        world.socket.unlink(missing_ok=True)
        async with world.far_end(said(body, kind)):
            return (await world.client().through(world.relay)).answer

    async def work() -> None:
        for kind, before, after in (("application/json", b"", b""), ("text/event-stream", b"data: ", b"\n\n")):
            longest = MAX_MESSAGE - len(before + after)
            assert b"xxx" in await told(before + of(longest) + after, kind)
            refused = await told(before + of(longest + 3) + after, kind)
            assert b"xxx" not in refused and b"answer_unreadable" in refused

    run(work())
