"""The clients of ``mixed_traffic.py``, inside the sandbox: ``SECONDS WORKERS FOLDER`` as arguments, one JSON object as result.

Every worker makes one kind of call again and again until the time is over. A call's path names worker and number, so that each
can be looked for where decisions are recorded. Whatever answers otherwise than the policy says is told with its words.
What is done so far is written to FOLDER/done all along; a file FOLDER/stop ends the clients before their time.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import psycopg

API, MODELS, CHAT, GRPC = (
    "https://api.example.com",
    "https://inference.local",
    "wss://chat.example.com",
    "grpc.example.com:443",
)
GRAPH, TOOLS = "https://graph.example.com/graphql", "https://tools.example.com/mcp"
TOLD_EVERY_S = 2.0
CALL_S = 60
"""How long a call may take (seconds): one that takes longer is stuck."""
MOST_TOLD = 50
Session = aiohttp.ClientSession


class Otherwise(Exception):
    """An answer that the policy does not lead to."""


def must(is_so: bool, what: object) -> None:
    """Raise :class:`Otherwise` unless ``is_so``."""
    if not is_so:
        raise Otherwise(str(what)[:500])


async def read(session: Session, name: str) -> None:
    """Get what may be read."""
    async with session.get(f"{API}/v1/mixed/{name}") as answer:
        raw = await answer.read()
        must(answer.status == 200 and json.loads(raw)["path"] == f"/v1/mixed/{name}", (answer.status, raw))


async def write(session: Session, name: str) -> None:
    """Write a note of 32 KiB."""
    async with session.post(f"{API}/v1/notes", data=b"n" * 32768, headers={"x-name": name}) as answer:
        raw = await answer.read()
        must(answer.status == 200 and json.loads(raw)["length"] == 32768, (answer.status, raw))


async def refused(session: Session, name: str) -> None:
    """Ask for a path that nobody may read."""
    async with session.get(f"{API}/v2/mixed/{name}") as answer:
        raw = await answer.read()
        must(answer.status == 403 and json.loads(raw)["reason"] == "method_or_path_not_allowed", (answer.status, raw))


async def hidden(session: Session, name: str) -> None:
    """Dial a host that nobody may reach."""
    try:
        async with session.get(f"https://hidden.example.com/{name}") as answer:
            must(is_so=False, what=answer.status)
    except aiohttp.ClientHttpProxyError as error:
        must(error.status == 403, error)


async def model(session: Session, name: str) -> None:
    """Read a model's answer to its end, as it streams."""
    asked = {"model": "demo-1", "stream": True, "messages": [{"role": "user", "content": name}]}
    async with session.post(f"{MODELS}/v1/chat/completions", json=asked) as answer:
        raw = b"".join([piece async for piece in answer.content.iter_any()])
        must(answer.status == 200 and raw.endswith(b"data: [DONE]\n\n"), (answer.status, raw))


async def other_model(session: Session, name: str) -> None:
    """Ask for a model that the policy does not name."""
    asked = {"model": f"other-{name}", "messages": []}
    async with session.post(f"{MODELS}/v1/chat/completions", json=asked) as answer:
        raw = await answer.read()
        must(answer.status == 403 and json.loads(raw)["reason"] == "model_not_allowed", (answer.status, raw))


async def talk(session: Session, name: str) -> None:
    """Say ten things over a WebSocket."""
    async with session.ws_connect(f"{CHAT}/rooms/{name}") as stream:
        for number in range(10):
            await stream.send_str(f"{name} {number}")
            said = await stream.receive()
            must(said.data == f"you said {name} {number}", said)


async def greet(channel: grpc.aio.Channel, name: str) -> None:
    """Call a service over gRPC: one answer, and a stream of three."""
    said = await channel.unary_unary("/demo.Greeter/Hello")(name.encode(), timeout=CALL_S)
    must(said == b"hello " + name.encode(), said)
    many = [one async for one in channel.unary_stream("/demo.Greeter/Count")(name.encode(), timeout=CALL_S)]
    must(len(many) == 3, many)


async def query(session: Session, name: str) -> None:
    """Query a service of GraphQL."""
    async with session.post(GRAPH, json={"query": f'{{ viewer(id: "{name}") {{ login }} }}'}) as answer:
        raw = await answer.read()
        must(answer.status == 200 and name in json.loads(raw)["data"]["asked"], (answer.status, raw))


async def mutation(session: Session, name: str) -> None:
    """Ask that service for a change, which nobody may."""
    async with session.post(GRAPH, json={"query": f'mutation {{ drop(id: "{name}") }}'}) as answer:
        raw = await answer.read()
        must(answer.status == 403 and json.loads(raw)["reason"] == "operation_not_allowed", (answer.status, raw))


def _tool(tool: str, name: str) -> dict[str, Any]:
    return {
        "json": {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "tools/call",
            "params": {"name": tool, "arguments": {"q": name}},
        },
        "headers": {"accept": "application/json, text/event-stream"},
    }


async def tool(session: Session, name: str) -> None:
    """Call a tool of an MCP server."""
    async with session.post(TOOLS, **_tool("search_web", name)) as answer:
        raw = await answer.read()
        said = json.loads(raw)
        must(answer.status == 200 and said["result"]["content"][0]["text"] == f"found {name}", (answer.status, raw))


async def other_tool(session: Session, name: str) -> None:
    """Call a tool that the policy does not name."""
    async with session.post(TOOLS, **_tool("erase", name)) as answer:
        raw = await answer.read()
        must(answer.status == 403 and json.loads(raw)["reason"] == "operation_not_allowed", (answer.status, raw))


async def database(_: Session, name: str) -> None:
    """Open a session with a database by the way that ``saw-postgres`` gave, ask once and close it."""
    async with await psycopg.AsyncConnection.connect(user="agent", dbname="orders", application_name=name) as session:
        rows = await (await session.execute("SELECT repeat('x', 30000), current_user")).fetchone()
        must(rows == ("x" * 30000, "agent"), rows and rows[1])


KINDS: dict[str, Callable[[Any, str], Awaitable[None]]] = {
    "read": read, "write": write, "refused": refused, "hidden": hidden, "model": model, "other-model": other_model,
    "talk": talk, "greet": greet, "query": query, "mutation": mutation, "tool": tool, "other-tool": other_tool,
    "database": database,
}  # fmt: skip


class Told:
    """What the workers did, as it stands."""

    def __init__(self, folder: Path, end: float) -> None:
        self.done: dict[str, int] = {}
        self.wrong: list[str] = []
        self._folder, self._end = folder, end

    @property
    def goes_on(self) -> bool:
        """Return whether there is time, nobody said stop, and not too much went wrong."""
        return time.monotonic() < self._end and len(self.wrong) < MOST_TOLD

    def __str__(self) -> str:
        return json.dumps({"done": self.done, "wrong": self.wrong})

    async def telling(self) -> None:
        """Write it to the folder again and again, and end everything when somebody says so there."""
        while self.goes_on:
            new = self._folder / "done.new"
            new.write_text(str(self), encoding="utf-8")
            new.replace(self._folder / "done")
            if (self._folder / "stop").exists():
                self._end = 0.0
            await asyncio.sleep(min(TOLD_EVERY_S, max(0.0, self._end - time.monotonic())))


async def worker(kind: str, number: int, told: Told) -> None:
    """Make calls as long as it goes on, and count those that were answered as they should be."""
    worker = f"{kind}-{number}"
    told.done[worker] = 0
    limit = aiohttp.ClientTimeout(total=CALL_S)
    async with (
        Session(trust_env=True, timeout=limit) as session,
        grpc.aio.secure_channel(GRPC, grpc.ssl_channel_credentials()) as channel,
    ):
        while told.goes_on:
            name = f"{worker}-{told.done[worker]}"
            try:
                await asyncio.wait_for(KINDS[kind](channel if kind == "greet" else session, name), 2 * CALL_S)
            except Exception as error:  # noqa: BLE001 - whatever went wrong is what this looks for
                told.wrong.append(f"{name}: {type(error).__name__}: {error}"[:600])
                return
            told.done[worker] += 1


async def main(seconds: float, workers: int, folder: Path) -> str:
    """Run ``workers`` of each kind for ``seconds``."""
    told = Told(folder, time.monotonic() + seconds)
    await asyncio.gather(told.telling(), *(worker(kind, number, told) for kind in KINDS for number in range(workers)))
    return str(told)


if __name__ == "__main__":
    print(asyncio.run(main(float(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
