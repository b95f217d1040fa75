"""The audit trail in the browser: what a search finds is what the command finds, page by page and as a copy."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from portal_world import OPERATOR, ORIGIN, START, World

from saw.audit.choose import Choice
from saw.broker.errors import ForbiddenError
from saw.broker.registry import Step
from saw.broker.schema import people
from saw.broker.sso.trail_pages import PAGE

MORNING = int(START.timestamp() * 1000)
pytestmark = pytest.mark.control("AUD-01")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Some hundred events of two chains about two workspaces."""
    world = World(tmp_path_factory.mktemp("audit"))
    for number in range(20):
        for name in ("ws-a", "ws-b"):
            world.broker.registry.transition(OPERATOR, name, Step("stopped", f"night {number}"))
            world.broker.registry.transition(OPERATOR, name, Step("attesting", f"day {number}"))
        world.charge("ws-a", 1)
    world["fay"].post("/workspaces/ws-a/kill", confirm="ws-a", reason="x")
    yield world
    world.close()


def every(world: World, choice: Choice) -> list[dict[str, Any]]:
    """What ``saw audit search`` reads."""
    found: list[dict[str, Any]] = []
    after = 0
    while True:
        page = world.broker.trail.log(after, 1000, choice)
        found += page["events"]
        if page["next"] == after:
            return found
        after = page["next"]


def searched(world: World, query: str) -> list[int]:
    """Every position that the pages show for a query, the newest first."""
    found: list[int] = []
    path = f"/audit?{query}"
    while path:
        text = world["fay"].get(path).text
        page = [int(one) for one in re.findall(r'<th scope="row">(\d+)<br>', text)]
        assert len(page) <= PAGE
        found += page
        following = re.search(r'href="([^"]+)" rel="next"', text)
        path = following[1].replace("&amp;", "&") if following else ""
    return found


@pytest.mark.parametrize(
    ("query", "choice"),
    [
        ("", Choice()),
        ("workspace=ws-a", Choice(workspace="ws-a")),
        ("workspace=ws-", Choice(workspace="ws-")),
        ("person=operator:root&class=3004", Choice(principal="operator:root", kind="3004")),
        ("person=fay@example.com", Choice(principal="user:fay@example.com")),
        ("class=entity+management&workspace=ws-b", Choice(workspace="ws-b", kind="Entity Management")),
        ("source=edge", Choice(source="edge")),
        ("verdict=refused", Choice(verdict="refused")),
        ("text=night+7", Choice(text="night 7")),
        ("since=2026-11-29T08:00&until=2026-11-29T08:01", Choice(since=MORNING, until=MORNING + 60_000)),
        ("since=2026-11-29T09:00", Choice(since=MORNING + 3_600_000)),
    ],
)
def test_a_search_finds_what_the_command_finds(world: World, query: str, choice: Choice) -> None:
    wanted = [item["position"] for item in every(world, choice)]
    assert searched(world, query) == wanted[::-1]
    copy = world["fay"].get(f"/audit/download?{query}")
    assert copy.headers["content-type"] == "application/x-ndjson"
    assert copy.headers["content-disposition"] == 'attachment; filename="audit.ndjson"'
    lines = [msgspec.json.decode(line) for line in copy.content.splitlines()]
    # the download itself is recorded first, so it may be in its own copy
    assert [line for line in lines if line["position"] in wanted] == msgspec.to_builtins(every(world, choice))[
        : len(wanted)
    ]
    assert len(lines) - len(wanted) in {0, 1}


@given(
    st.integers(1, 7), st.integers(1, 40), st.sampled_from([Choice(), Choice(workspace="ws-b"), Choice(source="edge")])
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_looking_back_in_steps_of_any_size_finds_everything_once(
    world: World, limit: int, span: int, choice: Choice
) -> None:
    found: list[int] = []
    before = None
    while before != 0:
        page = world.broker.trail.back(before, limit, choice, span)
        assert len(page["events"]) <= limit
        assert before is None or page["next"] < before
        found += [item["position"] for item in page["events"]]
        before = page["next"]
    assert found == [item["position"] for item in every(world, choice)][::-1]


def test_who_takes_a_copy_away_is_in_the_trail_and_who_may_not_gets_none(world: World) -> None:
    before = len(world.audited("audit.download"))
    assert world["ada"].get("/audit/download").status_code == 403
    assert world["dan"].get("/audit/download").status_code == 403
    assert world["eve"].get("/audit/download?workspace=ws-b").status_code == 200
    assert world.audited("audit.download")[before:] == [("user:eve@example.com", "Success")]


@pytest.mark.parametrize("lost", [True, False])
def test_a_copy_ends_when_the_role_is_lost_meanwhile(tmp_path: Path, lost: bool) -> None:
    world = World(tmp_path)
    services = world.broker.services
    make = services.events.api_activity
    with services.store.write() as tx:
        tx.record(*(make(START, OPERATOR.subject("ws-a"), f"call {number}") for number in range(1500)))
    whole = len(every(world, Choice())) + 1
    lines: list[bytes] = []

    async def send(message: dict[str, Any]) -> None:
        if message.get("body"):
            lines.extend(message["body"].splitlines())
            if lost:
                with services.store.write() as tx:
                    tx.connection.execute(people.update().values(roles='["user"]'))

    asked: list[bool] = []

    async def receive() -> dict[str, Any]:
        if asked:
            await asyncio.Event().wait()  # the browser stays
        asked.append(True)
        return {"type": "http.request", "body": b"", "more_body": False}

    secret = world["fay"].headers["cookie"]
    headers = [(b"host", ORIGIN.partition("//")[2].encode()), (b"cookie", secret.encode())]
    scope = {
        "type": "http", "method": "GET", "path": "/audit/download", "raw_path": b"", "query_string": b"", "headers": headers,
        "scheme": "https", "server": ("saw.example.com", 8445), "client": None, "http_version": "1.1", "root_path": "",
    }  # fmt: skip
    if lost:
        # the answer breaks off, so that it does not pass for the whole
        with pytest.raises(ForbiddenError):
            asyncio.run(world.app(scope, receive, send))
    else:
        asyncio.run(world.app(scope, receive, send))
    assert len(lines) == (1000 if lost else whole)
    world.close()


def test_an_event_is_shown_whole_and_as_text(world: World) -> None:
    world.broker.registry.transition(OPERATOR, "ws-b", Step("stopped", "<img src=x onerror=alert(1)>"))
    text = world["eve"].get("/audit?workspace=ws-b").text
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "&#34;metadata&#34;" in text
    assert "POST inference.local/v1<" in world["eve"].get("/audit?source=edge").text
