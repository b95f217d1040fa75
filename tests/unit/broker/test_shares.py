"""How often somebody may call the public side: nobody uses up the share of another."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from tool_world import ToolWorld

from saw.broker import apps
from saw.broker.apps import share_of
from saw.broker.context import Caller

pytestmark = pytest.mark.control("P0-05")
SOURCE = "host.host-1.00000000"
STRANGER = Caller("anonymous:", "203.0.113.9", "req")
ELSEWHERE = Caller("anonymous:", "10.210.1.2", "req")
MINE = Caller("workspace:ws-a", "10.210.1.2", "req")


@pytest.fixture
def world(tmp_path, monkeypatch: pytest.MonkeyPatch) -> ToolWorld:
    monkeypatch.setattr(apps, "time", SimpleNamespace(monotonic=lambda: 0.0))
    return ToolWorld(tmp_path)


def calls(world: ToolWorld, monkeypatch: pytest.MonkeyPatch, *told: tuple[Caller, str, dict[str, object]]) -> list:
    """What the calls of these callers lead to, in their order and all in one moment."""
    who = [told[0][0]]
    monkeypatch.setattr(apps, "tls_caller", lambda *_: who[0])

    async def go() -> list:
        transport = httpx.ASGITransport(apps.public_app(world.broker))
        async with httpx.AsyncClient(transport=transport, base_url="https://broker") as client:
            found = []
            for caller, path, body in told:
                who[0] = caller
                found.append(await client.post(path, json=body))
            return found

    return asyncio.run(go())


TELEMETRY = {"workspace_id": "ws-a", "kind": "telemetry", "telemetry": {"source": SOURCE, "events": []}}


def test_a_stranger_uses_up_no_share_of_a_workspace_that_tells_its_telemetry(
    world: ToolWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/v1/workspace/report"
    found = calls(world, monkeypatch, *[(STRANGER, path, TELEMETRY)] * 41, *[(MINE, path, TELEMETRY)] * 21)
    assert [one.json() for one in found[:40]] == [{"recorded": False, "verified": False}] * 40
    assert [one.status_code for one in found[40:]] == [429, *[200] * 20, 429]
    assert found[41].json() == {"recorded": True, "verified": True}


def test_a_stranger_keeps_no_workspace_from_attesting(world: ToolWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    path, body = "/v1/attest/nonce", {"workspace_id": "ws-a"}
    callers = [STRANGER] * 41 + [ELSEWHERE] * 41 + [MINE]
    codes = [one.status_code for one in calls(world, monkeypatch, *[(one, path, body) for one in callers])]
    assert [code == 429 for code in codes] == [False] * 40 + [True] + [False] * 40 + [True, False]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("anonymous:", "10.0.0.1", "ws-a"), ("anonymous:", "10.0.0.2", "ws-a"), False),
        (("anonymous:", "10.0.0.1", "ws-a"), ("anonymous:", "10.0.0.1", "ws-b"), False),
        (("anonymous:", "2001:db8::1", "ws-a"), ("anonymous:", "2001:db8::ffff:2", "ws-a"), True),
        (("anonymous:", "2001:db8::1", "ws-a"), ("anonymous:", "2001:db8:0:1::1", "ws-a"), False),
        (("anonymous:", "::ffff:10.0.0.1", "ws-a"), ("anonymous:", "::ffff:10.0.0.2", "ws-a"), False),
        (("anonymous:", "fe80::1%eth0", "ws-a"), ("anonymous:", "fe80::2%eth0", "ws-a"), True),
        (("workspace:ws-a", "10.0.0.1", "ws-a"), ("workspace:ws-a", "10.0.0.2", "ws-b"), True),
        (("workspace:ws-a", "10.0.0.1", "ws-a"), ("workspace:ws-b", "10.0.0.1", "ws-a"), False),
        (("workspace:ws-a", "10.0.0.1", "ws-a"), ("anonymous:", "10.0.0.1", "ws-a"), False),
    ],
)
def test_whose_share_it_is(one: tuple[str, str, str], other: tuple[str, str, str], same: bool) -> None:
    shares = {share_of(Caller(principal, address, "req"), workspace) for principal, address, workspace in (one, other)}
    assert (len(shares) == 1) is same
