"""The far end behind ring 2 in these tests: tells in its answer what arrived, and serves Git repositories."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.parse

REPOSITORIES = os.environ["FAR_END_REPOSITORIES"]
LOG = os.environ.get("FAR_END_LOG")
"""File in which every request that arrived is written down."""


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
    path = scope["raw_path"].decode()
    if LOG:
        with open(LOG, "a", encoding="utf-8") as log:  # noqa: PTH123, ASYNC230 - one line
            log.write(json.dumps([scope["method"], path, headers, body.decode("latin-1")]) + "\n")
    if path.startswith("/team/"):
        await _git(scope, headers, path, body, send)
        return
    if path == "/v1/stream":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"first\n", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    if path == "/v1/redirect-to":
        to = urllib.parse.parse_qs(scope["query_string"].decode())["url"][0]
        head = [(b"location", to.encode()), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 302, "headers": head})
        await send({"type": "http.response.body", "body": b""})
        return
    told = {
        "method": scope["method"],
        "path": path,
        "query": scope["query_string"].decode(),
        "headers": headers,
        "length": len(body),
    }
    raw = json.dumps(told).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": raw})


async def _git(scope, headers, path, body, send):
    environment = {
        "PATH": os.environ["PATH"],
        "GIT_PROJECT_ROOT": REPOSITORIES,
        "GIT_HTTP_EXPORT_ALL": "1",
        "PATH_INFO": path,
        "QUERY_STRING": scope["query_string"].decode(),
        "REQUEST_METHOD": scope["method"],
        "CONTENT_TYPE": headers.get("content-type", ""),
        "CONTENT_LENGTH": str(len(body)),
        "HTTP_CONTENT_ENCODING": headers.get("content-encoding", ""),
        "GIT_PROTOCOL": headers.get("git-protocol", ""),
        "REMOTE_USER": "agent",
    }
    backend = await asyncio.create_subprocess_exec(
        "git", "http-backend", env=environment,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, words = await backend.communicate(body)
    head, found, content = output.partition(b"\r\n\r\n")
    if not found:
        head, content = b"Status: 500", b"git http-backend ended with %d: %s" % (backend.returncode, words)
    fields = [line.split(b": ", 1) for line in head.split(b"\r\n")]
    status = next((int(value.split()[0]) for name, value in fields if name == b"Status"), 200)
    passed = [(name.lower(), value) for name, value in fields if name != b"Status"]
    await send({"type": "http.response.start", "status": status, "headers": passed})
    await send({"type": "http.response.body", "body": content})
