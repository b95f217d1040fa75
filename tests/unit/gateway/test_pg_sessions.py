"""Sessions of PostgreSQL at the gatekeeper: only with a ticket, only so many, and a key to cancel counts in its own workspace."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from saw.audit.events import EventFactory
from saw.gateway import pg_login, pg_wire
from saw.gateway.judge import Call, Dial, Verdict
from saw.gateway.pg_login import Login
from saw.gateway.pg_sessions import MOST_EACH, PostgresSessions, _Running
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


def sessions() -> tuple[PostgresSessions, Tickets[Verdict], Trail]:
    tickets, trail = Tickets[Verdict](lambda: 0.0), Trail()
    factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: str(uuid.uuid4()))
    made = PostgresSessions(tickets, trail, factory, ca_file=Path("/none"), now=lambda: NOW)  # type: ignore[arg-type]
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
def test_only_the_named_login_and_only_so_many_at_a_time() -> None:
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
    found._open["ws-1"] = MOST_EACH + 1
    with pytest.raises(SessionRefused) as refusal:
        found._permit(VERDICT, Startup("agent", "orders", ()))
    assert refusal.value.sqlstate == pg_wire.TOO_MANY


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
