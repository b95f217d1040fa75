"""The far ends of the clients: small services that speak what a package index, a registry or a model service speaks."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
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


async def git(repositories: Path, scope: Any, body: bytes) -> Answer:
    """Answer one request of a Git client from the bare repositories below a folder (git-http-backend(1))."""
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    environment = {
        "PATH": os.environ["PATH"], "GIT_PROJECT_ROOT": str(repositories), "GIT_HTTP_EXPORT_ALL": "1",
        "PATH_INFO": scope["raw_path"].decode(), "QUERY_STRING": scope["query_string"].decode(),
        "REQUEST_METHOD": scope["method"], "CONTENT_TYPE": headers.get("content-type", ""), "CONTENT_LENGTH": str(len(body)),
        "HTTP_CONTENT_ENCODING": headers.get("content-encoding", ""), "GIT_PROTOCOL": headers.get("git-protocol", ""),
    }  # fmt: skip
    backend = await asyncio.to_thread(
        subprocess.run,
        ["git", "http-backend"],
        env=environment,
        input=body,
        capture_output=True,
        timeout=60,
        check=False,
    )
    head, between, content = backend.stdout.partition(b"\r\n\r\n")
    if not between or backend.returncode:
        return 500, "text/plain", f"git http-backend ended with {backend.returncode}: {backend.stderr!r}".encode()
    fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
    return int(fields.get("Status", "200").split()[0]), fields.get("Content-Type", "text/plain"), content


async def _echo(receive: Any, send: Any) -> None:
    while (message := await receive())["type"] != "websocket.disconnect":
        if message["type"] == "websocket.connect":
            await send({"type": "websocket.accept"})
        else:
            await send({"type": "websocket.send", "text": f"you said {message.get('text')}"})
