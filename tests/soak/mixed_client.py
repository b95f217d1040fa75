"""The clients of ``mixed_traffic.py``, inside the sandbox: ``SECONDS WORKERS`` as arguments, one JSON object as the result.

Every worker makes one kind of call again and again until the time is over. A call's path names worker and number, so that each
can be looked for where decisions are recorded. Whatever answers otherwise than the policy says is told with its words.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import grpc.aio

API, MODELS, CHAT, GRPC = (
    "https://api.example.com",
    "https://inference.local",
    "wss://chat.example.com",
    "grpc.example.com:443",
)
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


KINDS: dict[str, Callable[[Any, str], Awaitable[None]]] = {
    "read": read, "write": write, "refused": refused, "hidden": hidden, "model": model, "other-model": other_model,
    "talk": talk, "greet": greet,
}  # fmt: skip


async def worker(kind: str, number: int, end: float, told: list[str]) -> int:
    """Make calls until ``end``; return how many were answered as they should be."""
    done = 0
    name = f"{kind}-{number}-"
    limit = aiohttp.ClientTimeout(total=CALL_S)
    async with (
        Session(trust_env=True, timeout=limit) as session,
        grpc.aio.secure_channel(GRPC, grpc.ssl_channel_credentials()) as channel,
    ):
        while time.monotonic() < end and len(told) < MOST_TOLD:
            try:
                await asyncio.wait_for(
                    KINDS[kind](channel if kind == "greet" else session, f"{name}{done}"), 2 * CALL_S
                )
            except Exception as error:  # noqa: BLE001 - whatever went wrong is what this looks for
                told.append(f"{name}{done}: {type(error).__name__}: {error}"[:600])
                return done
            done += 1
    return done


async def main(seconds: float, workers: int) -> dict[str, object]:
    """Run ``workers`` of each kind for ``seconds``."""
    end, told = time.monotonic() + seconds, []
    names = [(kind, number) for kind in KINDS for number in range(workers)]
    counts = await asyncio.gather(*(worker(kind, number, end, told) for kind, number in names))
    return {
        "done": {f"{kind}-{number}": count for (kind, number), count in zip(names, counts, strict=True)},
        "wrong": told,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(float(sys.argv[1]), int(sys.argv[2])))))
