"""The operators' socket where people can sign in: whoever changes something there is told of, once an hour, nobody else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from portal_world import ORIGIN, World
from starlette.routing import Route

from saw.broker.apps import operator_app
from saw.broker.config import load_config
from saw.broker.errors import StorageFull
from saw.broker.local_changes import changes
from saw.broker.notification_settings import Kind, Webhook
from saw.broker.operator_routes import operator_routes
from saw.broker.peer import SCOPE_KEY, Peer
from saw.broker.sso.operate import call_of
from saw.errors import ConfigError

pytestmark = pytest.mark.control("ID-01")

HOOK = Webhook(name="chat", url="https://hooks.example.com/saw", secret_file="/nowhere/chat")
ROOT, STRANGER = (
    Peer(0, frozenset({0}), None, "operator-socket"),
    Peer(2_000_123, frozenset({0}), None, "operator-socket"),
)
"""``STRANGER`` has no name on this machine."""


class Socket:
    """The operators' application as it is behind the socket, with the peer that the kernel would name."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.app = operator_app(world.broker)

    def ask(self, method: str, path: str, body: object = None, peer: Peer = ROOT) -> int:
        async def with_peer(scope: Any, receive: Any, send: Any) -> None:
            await self.app({**scope, SCOPE_KEY: peer}, receive, send)

        async def call() -> int:
            transport = httpx.ASGITransport(with_peer)
            async with httpx.AsyncClient(transport=transport, base_url="http://broker") as client:
                return (await client.request(method, path, json=body)).status_code

        return asyncio.run(call())

    def kill(self, workspace: str = "ws-a", peer: Peer = ROOT) -> int:
        return self.ask("POST", f"/v1/workspaces/{workspace}/kill", {"reason": "test"}, peer)

    def findings(self) -> list[dict[str, Any]]:
        page = self.world.broker.trail.page("broker", 0, 1000)["events"]
        return [item.event for item in page if item.event.get("finding_info", {}).get("types") == ["local_change"]]

    def messages(self) -> list[str]:
        found = self.world.broker.notifications.listed(state="", channel="", after="", limit=100)["notifications"]
        return [one["kind"] for one in found if one["kind"] == "local_change"]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path, operate=True, notifications=(HOOK,))
    yield found
    found.close()


@pytest.fixture
def socket(world: World, monkeypatch: pytest.MonkeyPatch) -> Socket:
    monkeypatch.setattr("saw.broker.apps.operator_gid", lambda _group: 0)
    return Socket(world)


def test_a_change_over_the_socket_is_told_with_account_and_call(socket: Socket) -> None:
    assert socket.kill() == 200
    (finding,) = socket.findings()
    said = finding["unmapped"]["saw"]
    assert (finding["severity"], finding["is_alert"]) == ("High", True)
    assert said["uid"] == 0
    assert (said["user"], said["principal"], said["workspace"]) == ("root", "operator:root", "ws-a")
    assert said["call"] == "POST /v1/workspaces/{id}/kill"
    assert "root (uid 0)" in finding["message"]
    assert socket.messages() == ["local_change"]


def test_the_message_leads_to_what_the_account_did(socket: Socket) -> None:
    socket.kill(peer=STRANGER)
    with socket.world.broker.services.store.read() as connection:
        body = connection.exec_driver_sql("SELECT body FROM notifications WHERE kind = 'local_change'").scalar_one()
    said = msgspec.json.decode(body)["data"]
    assert (said["account"], said["urgent"]) == ("2000123", True)
    assert said["link"] == f"{ORIGIN}/audit?person=operator%3A2000123"
    page = socket.world["eve"].get(said["link"].removeprefix(ORIGIN))
    assert page.status_code == 200
    assert "2000123 (uid 2000123) changes things over the control host" in page.text
    assert "ws-a" in page.text
    assert said["command"] == "saw audit search --principal operator:2000123"


def test_an_account_is_told_of_once_an_hour_and_each_one_by_itself(socket: Socket) -> None:
    world = socket.world
    socket.kill("ws-a")
    world.now += timedelta(minutes=59)
    socket.kill("ws-b")
    assert len(socket.findings()) == len(socket.messages()) == 1
    socket.kill("ws-b", STRANGER)
    assert [one["unmapped"]["saw"]["uid"] for one in socket.findings()] == [0, 2_000_123]
    world.now += timedelta(minutes=1)
    socket.kill("ws-b")
    assert len(socket.findings()) == len(socket.messages()) == 3
    world.now -= timedelta(hours=5)
    socket.kill("ws-b")
    assert len(socket.findings()) == 4, "a clock that was put back keeps nobody quiet"


def test_what_is_refused_is_told_too_and_reading_is_not(socket: Socket) -> None:
    for path in ("/v1/workspaces", "/v1/policy/state", "/v1/audit/verify"):
        assert socket.ask("GET", path) == 200
    assert socket.findings() == []
    assert socket.kill("ws-nowhere") == 404
    assert len(socket.findings()) == 1


def test_a_stranger_who_is_not_let_in_raises_none(socket: Socket) -> None:
    assert socket.kill(peer=Peer(2_000_124, frozenset({2_000_124}), None, "operator-socket")) == 403
    assert socket.findings() == []


def test_somebody_who_signed_in_raises_none(socket: Socket) -> None:
    assert socket.world["eve"].post("/workspaces/ws-a/kill", reason="scans", confirm="ws-a").status_code == 303
    assert socket.world.state("ws-a") == "quarantined"
    assert socket.findings() == []


def test_without_the_calls_for_people_the_finding_is_smaller(tmp_path: Path) -> None:
    world = World(tmp_path, operate=False)
    socket = Socket(world)
    assert socket.kill() == 200
    assert [one["severity"] for one in socket.findings()] == ["Medium"]
    world.close()


def test_without_sign_in_the_socket_is_the_usual_way(world: World) -> None:
    socket = Socket(world)
    config = msgspec.structs.replace(world.config, sso=None)
    object.__setattr__(world.broker.services, "config", config)
    assert socket.kill() == 200
    assert socket.findings() == []


def test_the_account_of_a_program_raises_none_and_others_do(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saw.broker.apps.operator_gid", lambda _group: 0)
    socket = Socket(world)
    assert world.config.sso is not None
    settings = msgspec.structs.replace(world.config.sso, automation=("2000123",))
    object.__setattr__(world.broker.services, "config", msgspec.structs.replace(world.config, sso=settings))
    assert socket.kill(peer=STRANGER) == 200
    assert socket.findings() == []
    assert socket.kill("ws-b") == 200
    assert len(socket.findings()) == 1


def test_a_full_disk_does_not_keep_a_kill_and_the_log_has_it(
    socket: Socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    notifications = socket.world.broker.notifications
    tell = notifications.tell

    def full(*words: Any, kind: Kind | str, **how: Any) -> int:
        if kind == Kind.LOCAL_CHANGE:
            raise StorageFull
        return tell(*words, kind=kind, **how)

    monkeypatch.setattr(type(notifications), "tell", lambda _self, *words, **how: full(*words, **how))
    with caplog.at_level(logging.WARNING, "saw.broker"):
        assert socket.kill() == 200
    assert (socket.world.state("ws-a"), socket.findings()) == ("quarantined", [])
    assert "root (uid 0) asks for POST /v1/workspaces/{id}/kill over the socket" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr("saw.broker.apps.operator_gid", lambda _group: 0)
    socket.kill("ws-b")
    assert len(socket.findings()) == 1, "what could not be told is not taken for told"


def test_every_call_that_is_no_question_is_a_change(world: World) -> None:
    served = [route for route in operator_app(world.broker).routes if isinstance(route, Route)]
    calls = {call_of(route) for route in served if route.path != "/healthz"}
    assert calls == {call_of(one) for one in operator_routes(world.broker, _route)}
    quiet = {call for call in calls if not changes(*call)}
    assert {call for call in quiet if call[0] != "GET"} == {
        ("POST", "/v1/findings/drift"),
        ("POST", "/v1/gates/preview"),
    }


def _route(path: str, method: str, _handler: Any) -> Route:
    return Route(path, print, methods=[method])


@pytest.mark.parametrize(
    ("name", "good"), [("saw-deploy", True), ("ada@example.com", True), ("", False), ("a b", False), ("-x", False)]
)
def test_names_of_accounts_are_checked(world: World, tmp_path: Path, name: str, good: bool) -> None:
    raw = msgspec.to_builtins(world.config)
    raw["sso"]["automation"] = [name]
    path = tmp_path / "broker.json"
    path.write_bytes(msgspec.json.encode(raw))
    if good:
        assert load_config(path).sso.automation == (name,)  # type: ignore[union-attr]
    else:
        with pytest.raises(ConfigError, match=r"sso\.automation must list names of accounts"):
            load_config(path)
