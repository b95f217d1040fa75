"""The far ends of the clients: small services that speak what a package index, a registry or a model service speaks."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

Answer = tuple[int, str, bytes]


class App:
    """An ASGI application: files by host and path, a JSON echo for the rest, and WebSockets that repeat what they are told."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.arrived: list[tuple[str, str, str]] = []
        self.handlers: dict[str, Callable[[Any, bytes], Awaitable[Answer]]] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request or WebSocket."""
        if scope["type"] == "websocket":
            await _echo(receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        host = dict(scope["headers"]).get(b"host", b"").decode()
        path = scope["raw_path"].decode()
        self.arrived.append((scope["method"], host, path))
        if (host, path) in self.files:
            status, (kind, raw) = 200, self.files[host, path]
        elif host in self.handlers:
            status, kind, raw = await self.handlers[host](scope, body)
        elif host == "api.example.com":
            told = {"method": scope["method"], "path": path, "length": len(body)}
            status, kind, raw = 200, "application/json", json.dumps(told).encode()
        else:
            status, kind, raw = 404, "text/plain", b"no such file"
        head = [(b"content-type", kind.encode()), (b"content-length", str(len(raw)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else raw})


async def _echo(receive: Any, send: Any) -> None:
    while (message := await receive())["type"] != "websocket.disconnect":
        if message["type"] == "websocket.connect":
            await send({"type": "websocket.accept"})
        else:
            await send({"type": "websocket.send", "text": f"you said {message.get('text')}"})
