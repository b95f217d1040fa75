"""Sessions of PostgreSQL at the gatekeeper: only with a ticket, only so many, and a key to cancel counts in its own workspace."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from saw.audit.events import EventFactory
from saw.gateway import pg_login, pg_wire
from saw.gateway.judge import Call, Dial, Verdict
from saw.gateway.pg_login import Login, Ready
from saw.gateway.pg_places import MOST, MOST_EACH, ROOM, ROOM_EACH, STARTING_EACH
from saw.gateway.pg_sessions import PostgresSessions, _Running
from saw.gateway.pg_wire import CancelKey, SessionRefused, Startup
from saw.gateway.tickets import Tickets

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CALL = Call("1", "", "http", "db.example.com", "5432", "GET", "/", "", (), "r", {}, b"", True)
DIAL = Dial(
    "192.0.2.1:5432", "db.example.com:5432", "postgres", "/", None, (), login=Login("c", "agent", ("orders",), "x")
)
VERDICT = Verdict(call=CALL, time=NOW, allowed=True, host="db.example.com", port=5432, workspace_id="ws-1", dial=DIAL)
BOUND = ("GET", "db.example.com", "/")


class Trail:
    """Stands for the spool."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    async def record(self, event: dict[str, Any]) -> int:
        self.rows.append(event)
        return len(self.rows)

    def of(self, step: str) -> list[tuple[str, dict[str, Any]]]:
        """Return outcome and detail of each row of one step."""
        rows = [row for row in self.rows if row["api"]["operation"] == f"postgres.{step}"]
        return [(row["status"], row["unmapped"]["saw"]) for row in rows]


def sessions(
    now: Callable[[], datetime] = lambda: NOW, told: Callable[[int], object] = lambda _: None
) -> tuple[PostgresSessions, Tickets[Verdict], Trail]:
    tickets, trail = Tickets[Verdict](lambda: 0.0), Trail()
    factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: str(uuid.uuid4()))
    made = PostgresSessions(tickets, trail, factory, ca_file=Path("/none"), now=now, told=told)  # type: ignore[arg-type]
    return made, tickets, trail


def brought(found: PostgresSessions, head: str) -> Verdict | None:
    async def run() -> Verdict | None:
        reader = asyncio.StreamReader()
        reader.feed_data(head.encode())
        reader.feed_eof()
        return await found._brought(reader)

    return asyncio.run(run())


def head(
    ticket: str, *, upgrade: str = "postgres", host: str = "db.example.com", path: str = "/", more: str = ""
) -> str:
    lines = f"host: {host}\r\nconnection: upgrade\r\nupgrade: {upgrade}\r\nx-saw-ticket: {ticket}\r\n{more}\r\n"
    return f"GET {path} HTTP/1.1\r\n{lines}"


@pytest.mark.control("POL-04")
def test_a_session_comes_with_the_ticket_of_its_own_decision_once() -> None:
    found, tickets, _ = sessions()
    good = tickets.issue(BOUND, VERDICT)
    assert brought(found, head(good)) == VERDICT
    assert brought(found, head(good)) is None
    for wrong in (
        lambda t: head(t, upgrade="websocket"),
        lambda t: head(t, host="api.example.com"),
        lambda t: head(t, path="/x"),
        lambda t: head(t, more=f"x-saw-ticket: {t}\r\n"),
        lambda _: head("a" * 43),
    ):
        assert brought(found, wrong(tickets.issue(BOUND, VERDICT))) is None
    without = msgspec.structs.replace(VERDICT, dial=msgspec.structs.replace(DIAL, login=None))
    assert brought(found, head(tickets.issue(BOUND, without))) is None


@pytest.mark.control("POL-04")
def test_only_the_named_login() -> None:
    found, _, _ = sessions()
    found._permit(VERDICT, Startup("agent", "orders", ()))
    for start, state in (
        (Startup("Agent", "orders", ()), pg_wire.WRONG_LOGIN),
        (Startup("agent", "Orders", ()), pg_wire.UNKNOWN_DATABASE),
        (Startup("agent", "agent", ()), pg_wire.UNKNOWN_DATABASE),
    ):
        with pytest.raises(SessionRefused) as refusal:
            found._permit(VERDICT, start)
        assert refusal.value.sqlstate == state


@pytest.mark.control("POL-04")
@pytest.mark.parametrize(
    ("workspace", "host", "key", "good"),
    [
        ("ws-1", "db.example.com", CancelKey(1, 2), True),
        ("ws-2", "db.example.com", CancelKey(1, 2), False),
        ("ws-1", "other.example.com", CancelKey(1, 2), False),
        ("ws-1", "db.example.com", CancelKey(1, 3), False),
        ("ws-1", "db.example.com", CancelKey(7, 8), False),
    ],
    ids=["its own", "another workspace", "another server", "a wrong secret", "the server's own key"],
)
def test_a_key_cancels_in_its_own_workspace_at_its_own_server(
    monkeypatch: pytest.MonkeyPatch, workspace: str, host: str, key: CancelKey, good: bool
) -> None:
    found, _, trail = sessions()
    found._running[CancelKey(1, 2)] = _Running("ws-1", "192.0.2.1:5432", "db.example.com", CancelKey(7, 8))
    sent: list[CancelKey] = []

    async def cancel(real: CancelKey, *_: object) -> None:
        sent.append(real)

    doing: Callable[..., Coroutine[Any, Any, None]] = cancel
    monkeypatch.setattr(pg_login, "cancel", doing)
    asyncio.run(found._cancel(msgspec.structs.replace(VERDICT, workspace_id=workspace, host=host), key))
    assert sent == ([CancelKey(7, 8)] if good else [])
    assert [row["status"] for row in trail.rows] == ["Success" if good else "Failure"]


START = pg_wire.startup_packet("agent", "orders", [])
CANCEL = pg_wire.cancel_packet(CancelKey(1, 2))


class Wire:
    """Envoy's end of one connection: what ring 2 wrote there, and whether it is over."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.reader = reader
        self.said = b""
        self.over = False
        self.transport = self

    def write(self, data: bytes) -> None:
        self.said += data

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def close(self) -> None:
        self.over = True

    abort = close

    @property
    def status(self) -> bytes:
        return self.said[9:12]


class Envoy:
    """Brings connections of workspaces to ``serve``, as many at a time as there are."""

    def __init__(self, found: PostgresSessions, tickets: Tickets[Verdict], trail: Trail) -> None:
        self.found, self.tickets, self.trail = found, tickets, trail
        self._tasks: list[asyncio.Task[None]] = []

    async def brings(self, workspace: str, sent: bytes = b"") -> Wire:
        """Bring one connection; return it once it is answered."""
        ticket = self.tickets.issue(BOUND, msgspec.structs.replace(VERDICT, workspace_id=workspace))
        wire = Wire(asyncio.StreamReader())
        wire.reader.feed_data(head(ticket).encode() + sent)
        self._tasks.append(asyncio.create_task(self.found.serve(wire.reader, wire)))  # type: ignore[arg-type]
        await until(lambda: bool(wire.status))
        return wire

    async def opens(self, workspace: str, count: int = 1) -> list[Wire]:
        """Open sessions, and return them once they are let in."""
        before = len(self.let_in())
        wires = [await self.brings(workspace, START) for _ in range(count)]
        await until(lambda: len(self.let_in()) == before + count)
        return wires

    def let_in(self) -> list[dict[str, Any]]:
        return [detail for status, detail in self.trail.of("connect") if status == "Success"]

    async def refuses(self, workspace: str, sent: bytes = START) -> Wire:
        """Bring a connection that is ended at once; its refusal is recorded with the code for too many."""
        before = len(self.trail.of("connect"))
        wire = await self.brings(workspace, sent)
        await until(lambda: wire.over)
        (row,) = self.trail.of("connect")[before:]
        assert (row[0], row[1]["sqlstate"]) == ("Failure", pg_wire.TOO_MANY)
        return wire


async def until(there: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not there():  # noqa: ASYNC110 - what is waited for are states of several parts
            await asyncio.sleep(0)


def lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have signing in take as long as the test does."""

    async def sign_in(*_: object) -> Ready:
        await asyncio.Event().wait()
        raise AssertionError

    async def cancel(*_: object) -> None:
        pass

    monkeypatch.setattr(pg_login, "sign_in", sign_in)
    monkeypatch.setattr(pg_login, "cancel", cancel)


def played(run: Callable[[Envoy], Coroutine[Any, Any, None]], *given: Callable[..., Any]) -> Envoy:
    """Have ``run`` bring connections, then end all that are there."""
    envoy = Envoy(*sessions(*given))

    async def play() -> None:
        await run(envoy)
        await envoy.found.close()

    asyncio.run(play())
    assert (envoy.found._places.starting.total(), envoy.found._places.open.total()) == (0, 0)
    return envoy


def shown(wire: Wire) -> dict[str, Any]:
    """Return what ring 2 answers where it takes no connection."""
    found: dict[str, Any] = json.loads(wire.said.partition(b"\r\n\r\n")[2])
    return found


@pytest.mark.control("POL-04")
def test_the_65th_session_is_refused_and_statements_can_still_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    lasting(monkeypatch)

    async def run(envoy: Envoy) -> None:
        wires = await envoy.opens("ws-1", MOST_EACH)
        assert {wire.status for wire in wires} == {b"101"}
        refused = await envoy.refuses("ws-1")
        assert (refused.status, b"C53300" in refused.said) == (b"101", True)
        envoy.found._running[CancelKey(1, 2)] = _Running("ws-1", "a", "db.example.com", CancelKey(7, 8))
        await envoy.brings("ws-1", CANCEL)
        await until(lambda: bool(envoy.trail.of("cancel")))
        await until(lambda: envoy.found._places.starting.total() == 0)
        assert [status for status, _ in envoy.trail.of("cancel")] == ["Success"]
        silent = [await envoy.brings("ws-1") for _ in range(ROOM_EACH)]
        assert {wire.status for wire in silent} == {b"101"}
        busy = await envoy.refuses("ws-1")
        assert (busy.status, shown(busy)["reason"], shown(busy)["layer"]) == (b"503", "gatekeeper_unavailable", "ring2")
        await envoy.opens("ws-2")
        for wire in silent:
            wire.reader.feed_eof()
        await until(lambda: envoy.found._places.starting.total() == 0)
        assert (await envoy.refuses("ws-1")).status == b"101"

    assert len(played(run).let_in()) == MOST_EACH + 1


@pytest.mark.control("POL-04")
def test_a_workspace_that_opens_512_and_says_nothing_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lasting(monkeypatch)

    async def run(envoy: Envoy) -> None:
        silent = [await envoy.brings("ws-1") for _ in range(MOST)]
        statuses = [wire.status for wire in silent]
        assert (statuses.count(b"101"), statuses.count(b"503")) == (STARTING_EACH, MOST - STARTING_EACH)
        assert len(envoy.trail.of("connect")) == MOST - STARTING_EACH
        await envoy.opens("ws-2", MOST_EACH)
        for wire in silent:
            wire.reader.feed_eof()
        await until(lambda: envoy.found._places.starting.total() == 0)
        await envoy.opens("ws-1", MOST_EACH)

    played(run)


@pytest.mark.control("POL-04")
def test_the_513th_session_of_all_is_refused_and_statements_can_still_be_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lasting(monkeypatch)

    async def run(envoy: Envoy) -> None:
        for number in range(MOST // MOST_EACH):
            await envoy.opens(f"ws-{number}", MOST_EACH)
        assert (await envoy.refuses("ws-x")).status == b"101"
        await envoy.brings("ws-x", CANCEL)
        await until(lambda: bool(envoy.trail.of("cancel")))
        await until(lambda: envoy.found._places.starting.total() == 0)
        for number in range(ROOM // STARTING_EACH):
            assert {(await envoy.brings(f"ws-a{number}")).status for _ in range(STARTING_EACH)} == {b"101"}
        assert (await envoy.refuses("ws-x")).status == b"503"

    played(run)


class Signed:
    """A server that is ready, whose end the test has: ``near`` is what it says, ``wire`` what it is told."""

    def __init__(self) -> None:
        self.near = asyncio.StreamReader()
        self.wire = Wire(self.near)

    async def sign_in(self, *_: object) -> Ready:
        return Ready(self.near, self.wire, b"ready", None)  # type: ignore[arg-type]


@pytest.mark.control("AUD-01")
@pytest.mark.parametrize(
    ("changes", "after", "who", "end"),
    [
        (False, 0, "client", "client"),
        (True, 0, "client", "withdrawn"),
        (False, 600, "client", "time"),
        (False, 590, "client", "client"),
        (True, 600, "server", "server"),
        (False, 0, "stop", "stopped"),
        (False, 0, "fault", "broken"),
        (True, 0, "fault", "withdrawn"),
    ],
)
def test_the_end_of_a_session_says_who_ended_it(
    monkeypatch: pytest.MonkeyPatch, changes: bool, after: int, who: str, end: str
) -> None:
    world: dict[str, Any] = {"now": NOW, "told": "a"}

    async def run(envoy: Envoy) -> None:
        signed = Signed()
        monkeypatch.setattr(pg_login, "sign_in", signed.sign_in)
        (wire,) = await envoy.opens("ws-1")
        wire.reader.feed_data(b"abc")
        signed.near.feed_data(b"defg")
        await until(lambda: wire.said.endswith(b"defg") and signed.wire.said == b"abc")
        world["now"] = NOW + timedelta(seconds=after)
        world["told"] = "b" if changes else "a"
        if who == "client":
            wire.reader.feed_eof()
        elif who == "fault":
            wire.reader.set_exception(ConnectionResetError())
        elif who == "server":
            signed.near.feed_eof()
        if who != "stop":
            await until(lambda: wire.over)
        assert signed.wire.over == (who != "stop")

    envoy = played(run, lambda: world["now"], lambda _: world["told"])
    ((status, detail),) = envoy.trail.of("end")
    assert (status, detail["end"], detail["sent"], detail["received"]) == ("Success", end, 3, 4)
    assert "sqlstate" not in detail


@pytest.mark.control("AUD-01")
@pytest.mark.parametrize(
    ("fault", "end", "state"),
    [
        (
            SessionRefused("28P01", "the server refuses the session"),
            "not opened: the server refuses the session",
            "28P01",
        ),
        (RuntimeError("s3cret"), "not opened: internal fault RuntimeError", "XX000"),
        (None, "stopped", "57P01"),
    ],
    ids=["refused", "a fault", "the gatekeeper stops"],
)
def test_a_session_that_was_never_opened_ends_as_a_failure(
    monkeypatch: pytest.MonkeyPatch, fault: Exception | None, end: str, state: str
) -> None:
    lasting(monkeypatch)
    told: list[bytes] = []

    async def sign_in(*_: object) -> Ready:
        assert fault is not None
        raise fault

    if fault is not None:
        monkeypatch.setattr(pg_login, "sign_in", sign_in)

    async def run(envoy: Envoy) -> None:
        (wire,) = await envoy.opens("ws-1")
        if fault is not None:
            await until(lambda: wire.over)
            told.append(wire.said)

    envoy = played(run)
    ((status, detail),) = envoy.trail.of("end")
    assert (status, detail["end"], detail["sqlstate"]) == ("Failure", end, state)
    assert all(f"C{state}".encode() in said and b"s3cret" not in said for said in told)
    assert len(envoy.let_in()) == 1
