"""Sessions of PostgreSQL at ring 2: ends the client's start, signs in for it, and passes bytes until one side ends.

Envoy brings an opened session here, as an HTTP/1.1 upgrade (RFC 9110, section 7.8) with the ticket of the decision on it. Both
ends are in the audit trail: who was let in or refused, and, when it is over, for how long and with how many bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import struct
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httptools
import msgspec

from saw.audit.events import EventFactory, Outcome
from saw.errors import SawError
from saw.gateway import pg_login, pg_wire
from saw.gateway.envoy_parts import STREAM_SECONDS
from saw.gateway.events import session_event
from saw.gateway.judge import Verdict
from saw.gateway.pg_login import Ready
from saw.gateway.pg_places import Places
from saw.gateway.pg_wire import CancelKey, SessionRefused, Startup
from saw.gateway.reviews import TICKET
from saw.gateway.spool import Spool
from saw.gateway.tickets import Tickets
from saw.policy.databases import UPGRADE, is_session

LOG = logging.getLogger("saw.gateway")

START_S = 30.0
"""Longest time that a client may take to say who it is (seconds)."""
_EARLY_S = 2.0
"""How much older than the decision on it a session may be for Envoy, which counts from the request's first byte (seconds)."""
_HEAD_LIMIT = 64 * 1024
_CHUNK = 64 * 1024
_ACCEPTED = f"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: {UPGRADE}\r\n\r\n".encode()


class _Running(msgspec.Struct, frozen=True):
    """A session that may be cancelled: whose it is, and what its server calls it."""

    workspace: str
    address: str
    host: str
    key: CancelKey


class _Bytes:
    """How many bytes went each way, who ended it, and with which code where it was never opened."""

    sent = 0
    received = 0
    end = "stopped"
    sqlstate = pg_wire.GOING_DOWN
    opened = False


class PostgresSessions:
    """Serves the socket behind Envoy's route for sessions. ``tickets``: those with which Envoy brings them.

    ``told``: what Envoy was told last for the workspace with a number. It ends what was opened under anything else.
    """

    def __init__(
        self,
        tickets: Tickets[Verdict],
        spool: Spool,
        factory: EventFactory,
        *,
        ca_file: Path,
        now: Callable[[], datetime],
        told: Callable[[int], object],
    ) -> None:
        self._tickets = tickets
        self._spool = spool
        self._factory = factory
        self._ca_file = ca_file
        self._now = now
        self._told = told
        self._tasks: set[asyncio.Task[Any]] = set()
        self._places = Places()
        self._running: dict[CancelKey, _Running] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of Envoy; never raises."""
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        except SawError as error:
            LOG.critical("a session is ended: %s", error.message)
        except Exception as error:  # noqa: BLE001 - any fault of ours must end the session, without its text
            LOG.critical("a session is ended: internal fault %s", type(error).__name__)
        finally:
            if task is not None:
                self._tasks.discard(task)
            with contextlib.suppress(OSError):
                writer.close()

    async def close(self) -> None:
        """End all sessions, and return once their ends are recorded."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        verdict = await self._brought(reader)
        if verdict is None:
            writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            await writer.drain()
            return
        workspace = verdict.workspace_id
        if self._places.full(workspace):
            refusal = _too_many()
            await self._refused(verdict, None, refusal)
            await _say(writer, _busy(refusal))
            return
        writer.write(_ACCEPTED)
        with self._places.start(workspace) as opened:
            start = await self._permitted(verdict, reader, writer)
            if start is not None:
                opened()
                await self._session(verdict, start, reader, writer)

    async def _brought(self, reader: asyncio.StreamReader) -> Verdict | None:
        """Return the decision that Envoy's request belongs to, or None when it belongs to none."""
        try:
            async with asyncio.timeout(START_S):
                head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.LimitOverrunError, TimeoutError):
            return None
        request = _Request()
        parser = httptools.HttpRequestParser(request)
        with contextlib.suppress(httptools.HttpParserUpgrade):
            parser.feed_data(head)
        told = request.headers
        if any(len(told.get(name, [])) != 1 for name in (TICKET, "host", "upgrade")):
            return None
        bound = (parser.get_method().decode("latin-1"), told["host"][0], request.target)
        verdict = self._tickets.redeem(told[TICKET][0], bound)
        fits = verdict is not None and verdict.dial is not None and verdict.dial.login is not None
        return verdict if fits and is_session(told["upgrade"][0]) else None

    async def _permitted(
        self, verdict: Verdict, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Startup | None:
        """Return how a session starts that may be opened; None where there is none, which is then recorded and told."""
        start: Startup | None = None
        try:
            start = await self._start(verdict, reader, writer)
            if start is not None:
                self._permit(verdict, start)
        except (SessionRefused, TimeoutError) as error:
            refusal = error if isinstance(error, SessionRefused) else _too_slow()
            await self._refused(verdict, start, refusal)
            await _say(writer, pg_wire.fatal(refusal.sqlstate, f"ring 2: {refusal.message}", refusal.cure))
            return None
        return start

    async def _session(
        self, verdict: Verdict, start: Startup, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        told = self._told(_number(verdict))
        # Nothing leaves before the trail knows of it.
        await self._record(verdict, "connect", start, "success", {})
        began, count = time.monotonic(), _Bytes()
        try:
            await self._opened(verdict, start, reader, writer, count)
        finally:
            detail: dict[str, object] = {
                "end": self._ended(verdict, told, count.end),
                "sent": count.sent,
                "received": count.received,
                "seconds": int(time.monotonic() - began),
            }
            if not count.opened:
                detail["sqlstate"] = count.sqlstate
            outcome: Outcome = "success" if count.opened else "failure"
            await asyncio.shield(self._record(verdict, "end", start, outcome, detail))

    def _ended(self, verdict: Verdict, told: object, end: str) -> str:
        """Return who ended a session, of which ring 2's own Envoy tells nothing but that the client's side is gone."""
        if end not in {"client", "broken"}:
            return end
        if self._told(_number(verdict)) != told:
            return "withdrawn"
        lasted = (self._now() - verdict.time).total_seconds()
        return "time" if lasted >= STREAM_SECONDS - _EARLY_S else end

    async def _start(
        self, verdict: Verdict, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Startup | None:
        """Return how the client starts; None where it wanted something to be cancelled, or went away."""
        asked: set[str] = set()
        async with asyncio.timeout(START_S):
            while True:
                (length,) = struct.unpack("!i", await reader.readexactly(4))
                if not 8 <= length <= pg_wire.MAX_START:
                    raise SessionRefused(pg_wire.PROTOCOL_VIOLATION, "the first packet is too short or too long")
                found = pg_wire.read_start(await reader.readexactly(length - 4))
                if isinstance(found, Startup):
                    if found.minor or found.unknown:
                        writer.write(pg_wire.negotiation(found.unknown))
                    return found
                if isinstance(found, CancelKey):
                    break
                if found in asked:
                    raise SessionRefused(pg_wire.PROTOCOL_VIOLATION, "encryption is asked for twice")
                asked.add(found)
                writer.write(pg_wire.NOT_HERE)
                await writer.drain()
        await self._cancel(verdict, found)
        return None

    def _permit(self, verdict: Verdict, start: Startup) -> None:
        """Refuse a session that is not the one which policy names."""
        login = verdict.dial.login if verdict.dial is not None else None
        if login is None or start.user != login.user:
            expected = login.user if login is not None else "nobody"
            raise SessionRefused(
                pg_wire.WRONG_LOGIN, f"policy lets this workspace in as {expected} only", cure=f"connect as {expected}"
            )
        if start.database not in login.databases:
            names = ", ".join(login.databases)
            raise SessionRefused(
                pg_wire.UNKNOWN_DATABASE, f"policy opens {names} here and no other database", cure=f"connect to {names}"
            )
        if self._places.closed(verdict.workspace_id):
            raise _too_many()

    async def _opened(
        self,
        verdict: Verdict,
        start: Startup,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        count: _Bytes,
    ) -> None:
        dial = verdict.dial
        assert dial is not None and dial.login is not None  # noqa: S101 - `_brought` saw to it
        host = verdict.host
        try:
            server = await pg_login.sign_in(dial.login, start, dial.address, host, self._ca_file)
        except SessionRefused as refusal:
            count.end, count.sqlstate = f"not opened: {refusal.message}", refusal.sqlstate
            await _say(writer, pg_wire.fatal(refusal.sqlstate, f"ring 2: {refusal.message}", refusal.cure))
            return
        except Exception as error:
            count.end, count.sqlstate = f"not opened: internal fault {type(error).__name__}", pg_wire.INTERNAL
            await _say(writer, pg_wire.fatal(pg_wire.INTERNAL, "ring 2: an internal fault"))
            raise
        count.opened = True
        ours = None
        try:
            if server.key is not None:
                ours = CancelKey(secrets.randbits(31), secrets.randbits(32))
                self._running[ours] = _Running(verdict.workspace_id, dial.address, host, server.key)
            key = b"" if ours is None else pg_wire.backend_key(ours)
            writer.write(pg_wire.AUTHENTICATED + key + server.said)
            await _pass(reader, writer, server, count)
        finally:
            if ours is not None:
                self._running.pop(ours, None)
            server.writer.transport.abort()

    async def _cancel(self, verdict: Verdict, key: CancelKey) -> None:
        """Have a session's statement cancelled, if it is one of the same workspace at the same server."""
        running = self._running.get(key)
        here = (verdict.workspace_id, verdict.host)
        known = running is not None and (running.workspace, running.host) == here
        await self._record(verdict, "cancel", None, "success" if known else "failure", {})
        if running is not None and known:
            with contextlib.suppress(OSError, TimeoutError, SawError):
                await pg_login.cancel(running.key, running.address, running.host, self._ca_file)

    async def _refused(self, verdict: Verdict, start: Startup | None, refusal: SessionRefused) -> None:
        detail: dict[str, object] = {"reason": refusal.message, "sqlstate": refusal.sqlstate}
        await self._record(verdict, "connect", start, "failure", detail)

    async def _record(
        self, verdict: Verdict, step: str, start: Startup | None, outcome: Outcome, detail: dict[str, object]
    ) -> None:
        if start is not None:
            names = {
                "user": start.user,
                "database": start.database,
                "application": dict(start.settings).get("application_name", ""),
            }
            detail = {**names, **detail}
        event = session_event(verdict, self._factory, self._now(), step, outcome=outcome, detail=detail)
        await self._spool.record(event)


class _Request:
    """What httptools reads of a request's head."""

    def __init__(self) -> None:
        self.target = ""
        self.headers: dict[str, list[str]] = {}

    def on_url(self, url: bytes) -> None:
        self.target += url.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server: Ready, count: _Bytes) -> None:
    """Pass bytes both ways until one side ends; what was read by then is passed on."""

    async def out() -> None:
        while data := await reader.read(_CHUNK):
            count.sent += len(data)
            server.writer.write(data)
            await server.writer.drain()
        count.end = "client"

    async def back() -> None:
        await writer.drain()
        while data := await server.reader.read(_CHUNK):
            count.received += len(data)
            writer.write(data)
            await writer.drain()
        count.end = "server"

    tasks = {asyncio.create_task(out()), asyncio.create_task(back())}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if any(task.exception() is not None for task in done):
            count.end = "broken"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    with contextlib.suppress(OSError):
        await server.writer.drain()


async def _say(writer: asyncio.StreamWriter, last: bytes) -> None:
    with contextlib.suppress(OSError):
        writer.write(last)
        await writer.drain()


def _number(verdict: Verdict) -> int:
    return verdict.workspace.number if verdict.workspace is not None else 0


def _busy(refusal: SessionRefused) -> bytes:
    """Return the refusal of a connection before it has become a session, in the form of the rings' own."""
    told = {"error": "policy_denied", "layer": "ring2", "reason": "gatekeeper_unavailable", "detail": refusal.message,
            "next_steps": [refusal.cure]}  # fmt: skip
    body = json.dumps(told).encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"retry-after: 1\r\nconnection: close\r\n\r\n" + body


def _too_many() -> SessionRefused:
    return SessionRefused(pg_wire.TOO_MANY, "too many sessions are open", cure="end some, then try again")


def _too_slow() -> SessionRefused:
    return SessionRefused(pg_wire.PROTOCOL_VIOLATION, f"the client did not say who it is within {START_S:.0f} seconds")
