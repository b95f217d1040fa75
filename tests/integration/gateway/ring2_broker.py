"""The far side of the perimeter's broker link: states as a test wants them, and the events that arrived.

What it states and takes goes through the structures of the real two sides, so it cannot say what no broker says;
tests/integration/broker/test_perimeter_contract.py holds a real broker beside it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import ssl
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import uvicorn
from ring2_reviews import ROOT, Reviews

from saw.audit.chain import ChainedEvent
from saw.broker.perimeter import Shipment
from saw.gateway.state import parse_state
from saw.review.messages import ClaimReview


class Uvicorn:
    """A uvicorn server in a thread of its own, on a socket that was made in some namespace."""

    def __init__(self, app: Any, sock: Any, *, ws: Any = "none", **options: Any) -> None:
        config = uvicorn.Config(app, log_level="critical", lifespan="off", ws=ws, http="httptools", **options)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [sock]}, daemon=True)
        self._thread.start()

    def close(self, *, force: bool = True) -> None:
        """Stop and join; without ``force`` the calls under way are answered and their connections closed first."""
        self._server.should_exit = True
        self._server.force_exit = force
        self._thread.join(10)


def mutual_tls(certificate: Any, key: Any, authority: Any) -> dict[str, Any]:
    """Return uvicorn options for a server that demands a client certificate of ``authority``."""
    return {
        "ssl_certfile": str(certificate),
        "ssl_keyfile": str(key),
        "ssl_ca_certs": str(authority),
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
    }


class Broker:
    """An ASGI application with the perimeter calls of docs/architecture.md."""

    def __init__(self) -> None:
        self.seq = 0
        self.workspaces: dict[str, dict[str, Any]] = {}
        self.releases: dict[str, bytes] = {}
        self.events: list[ChainedEvent] = []
        self.answering = True
        self.reviews = Reviews()
        self._changed = threading.Condition()
        self._closed = False
        self.parted = False

    def part(self) -> None:
        """Let nobody wait until :attr:`parted` is taken back."""
        with self._changed:
            self.parted = True
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody wait any longer."""
        self.reviews.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def put(self, workspace_id: str, **fields: Any) -> None:
        """Change one workspace and raise the sequence number."""
        with self._changed:
            self.workspaces[workspace_id] = {**self.workspaces.get(workspace_id, {"id": workspace_id}), **fields}
            self.seq += 1
            self._changed.notify_all()

    def state(self) -> dict[str, Any]:
        """Return the state as the broker states it; leases given as seconds become times."""
        now = datetime.now(UTC)
        workspaces = []
        for entry in self.workspaces.values():
            lease = entry.get("lease_expires_at")
            if isinstance(lease, int | float):
                entry["lease_expires_at"] = lease = (now + timedelta(seconds=lease)).isoformat()
            workspaces.append({**entry, "lease_expires_at": lease})
        stated = {
            "seq": self.seq,
            "now": now.isoformat(),
            "workspaces": workspaces,
            "releases": {digest: base64.b64encode(raw).decode() for digest, raw in self.releases.items()},
            "policy_keys": {"threshold": 1, "keys": {"forged": "never to be believed"}},
        }
        parse_state(msgspec.json.encode(stated))
        return stated

    def _wait(self, after: int, wait: float) -> dict[str, Any]:
        with self._changed:
            self._changed.wait_for(lambda: self.seq != after or self._closed or self.parted, timeout=wait)
            return self.state()

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Serve one call."""
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        status, answer = 503, {}
        if self.answering and scope["path"] == "/v1/perimeter/state":
            query = dict(pair.split("=") for pair in scope["query_string"].decode().split("&"))
            assert query["after"].isdecimal()
            assert query["wait"].isdecimal()
            status, answer = 200, await asyncio.to_thread(self._wait, int(query["after"]), float(query["wait"]))
        elif self.answering and scope["path"] == "/v1/perimeter/events":
            status, answer = 200, self._accept(json.loads(body))
        elif self.answering and scope["path"].startswith(ROOT):
            query = scope["query_string"].decode()
            if scope["path"] == f"{ROOT}/claim" and not await self._claimant_waits(body, receive):
                return  # a claim that nobody is there to take would be lost
            status, answer = await asyncio.to_thread(self.reviews.serve, scope["method"], scope["path"], query, body)
        raw = msgspec.json.encode(answer)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": raw})

    async def _claimant_waits(self, body: bytes, receive: Any) -> bool:
        """Wait for something to claim, or the end of the wait; return whether the claimant is still there."""
        gone = asyncio.ensure_future(receive())
        end = time.monotonic() + msgspec.json.decode(body, type=ClaimReview).wait
        while not (gone.done() or self.parted) and (left := end - time.monotonic()) > 0:
            if await asyncio.to_thread(self.reviews.wait_for_approval, min(left, 0.1)):
                break
        await asyncio.wait([gone], timeout=0)
        there = not gone.done()
        gone.cancel()
        return there

    def _accept(self, shipment: dict[str, Any]) -> dict[str, Any]:
        sent = msgspec.convert(shipment, Shipment)
        last = self.events[-1].seq if self.events else 0  # they come in order
        self.events += [event for event in sent.events if event.seq > last]
        return {"accepted": self.events[-1].seq if self.events else 0}


MOST_KEPT = 64 * 1024
"""How much of a request's body a far end keeps (bytes)."""


class FarEnd:
    """An upstream service: it remembers every request that arrived and answers with a text, or as ``respond`` does."""

    def __init__(self) -> None:
        self.arrived: list[dict[str, Any]] = []
        self.respond: Any = None

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Record one request."""
        size, more, start, digest, body = 0, True, b"", hashlib.sha256(), b""
        while more:
            message = await receive()
            chunk = message.get("body", b"")
            start = start or chunk[:200]
            size += len(chunk)
            digest.update(chunk)
            body = (body + chunk)[:MOST_KEPT]
            more = message.get("more_body", False)
        self.arrived.append(
            {
                "method": scope["method"],
                "target": (
                    scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
                ).decode(),
                "headers": [(name.decode(), value.decode()) for name, value in scope["headers"]],
                "size": size,
                "start": start,
                "body": body,
                "sha256": digest.hexdigest(),
                "at": scope["server"][0],
            }
        )
        if self.respond is not None:
            await self.respond(scope, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"from the far end"})
