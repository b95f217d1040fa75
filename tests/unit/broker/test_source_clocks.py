"""A source whose clock is wrong: its events keep their order, carry the time of arrival, and the difference is said."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from portal_world import EDGE, OPERATOR, World
from starlette.datastructures import Headers

from saw.audit import ChainedEvent, Subject
from saw.audit.choose import Choice
from saw.broker.errors import MalformedError, StorageFull
from saw.broker.perimeter import Shipment
from saw.broker.source_clocks import BOUND, HEADER, sent_at
from saw.gateway.link import BrokerLink

pytestmark = pytest.mark.control("AUD-01")
HOURS = timedelta(hours=3)
NONE = timedelta(0)


class Source:
    """The perimeter ``edge`` with a clock of its own, ``off`` from the broker's."""

    def __init__(self, world: World, off: timedelta = NONE) -> None:
        self.world, self.off = world, off

    def ms(self, waited: timedelta = NONE) -> int:
        return int((self.world.now + self.off - waited).timestamp() * 1000)

    def event(self, request: str, waited: timedelta = NONE) -> ChainedEvent:
        made = self.world.factory.http_activity(
            self.world.now + self.off - waited, Subject(workspace="ws-a", request_id=request), method="GET", scheme="https",
            host="api.example.com", port=443, path="/", allowed=True,
        )  # fmt: skip
        return self.world.chain.append(made)

    def ship(self, *events: ChainedEvent, tells: bool = True) -> None:
        self.world.broker.views.accept_events(EDGE, Shipment("edge", events), self.ms() if tells else None)

    def findings(self) -> list[dict[str, Any]]:
        page = self.world.broker.trail.page("broker", 0, 1000)["events"]
        return [item.event for item in page if item.event.get("finding_info", {}).get("types") == ["clock_skew"]]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize("off", [HOURS, -HOURS])
def test_events_of_a_wrong_clock_keep_their_order_and_say_when_they_arrived(world: World, off: timedelta) -> None:
    edge = Source(world, off)
    edge.ship(edge.event("first"))
    world.broker.registry.kill(OPERATOR, "ws-b", "drill")
    world.now += timedelta(seconds=1)
    edge.ship(edge.event("second"), edge.event("third"))
    page = world.broker.trail.page("edge", 0, 100)
    assert [item.event["http_request"]["uid"] for item in page["events"]] == ["first", "second", "third"]
    log = world.broker.trail.log(0, 1000, Choice())["events"]
    uids = [item["event"].get("http_request", {}).get("uid") for item in log if item["source"] == "edge"]
    assert uids == ["first", "second", "third"]
    places = {item["event"]["http_request"]["uid"]: item["position"] for item in log if item["source"] == "edge"}
    killed = next(item["position"] for item in log if item["event"].get("entity", {}).get("uid") == "ws-b")
    assert places["first"] < killed < places["second"]
    with world.broker.services.store.read() as connection:
        rows = (
            connection.exec_driver_sql("SELECT at FROM audit_events WHERE source = 'edge' ORDER BY seq").scalars().all()
        )
    assert rows[-1] == int(world.now.timestamp() * 1000), "by the broker's clock"
    assert world.broker.trail.verify()["complete"]


def test_a_clock_that_is_ahead_is_told_with_how_far(world: World) -> None:
    edge = Source(world, HOURS)
    edge.ship(edge.event("first"))
    (finding,) = edge.findings()
    said = finding["unmapped"]["saw"]
    assert (said["source"], said["ahead_s"], said["by"], said["principal"]) == (
        "edge",
        10_800,
        "sender",
        EDGE.principal,
    )
    assert finding["message"] == "The clock of edge is 10800 seconds ahead of the broker's"
    assert (finding["severity"], finding["time"]) == ("Medium", int(world.now.timestamp() * 1000))


def test_a_clock_that_is_behind_is_told_at_the_second_shipment_in_a_row(world: World) -> None:
    edge = Source(world, -HOURS)
    edge.ship(edge.event("first"))
    assert edge.findings() == [], "it may have been on its way"
    edge.off = NONE
    edge.ship(edge.event("second"))
    edge.off = -HOURS
    edge.ship(edge.event("third"))
    assert edge.findings() == []
    edge.ship(edge.event("fourth"))
    assert [one["unmapped"]["saw"]["ahead_s"] for one in edge.findings()] == [-10_800]


@pytest.mark.parametrize(
    ("off", "count"),
    [(NONE, 0), (BOUND, 0), (-BOUND, 0), (BOUND + timedelta(seconds=1), 1), (-BOUND - timedelta(seconds=1), 1)],
)
def test_clocks_may_differ_by_the_bound(world: World, off: timedelta, count: int) -> None:
    edge = Source(world, off)
    edge.ship(edge.event("first"))
    edge.ship(edge.event("second"))
    assert len(edge.findings()) == count


def test_events_that_waited_for_hours_are_no_wrong_clock(world: World) -> None:
    edge = Source(world)
    for tells in (True, False):
        edge.ship(edge.event("old", HOURS), edge.event("older", 2 * HOURS), tells=tells)
        edge.ship(edge.event("old", HOURS), tells=tells)
    assert edge.findings() == []


def test_a_sender_that_tells_no_time_is_known_by_an_event_of_the_future(world: World) -> None:
    edge = Source(world, HOURS)
    edge.ship(edge.event("first"), edge.event("old", 2 * HOURS), tells=False)
    (finding,) = edge.findings()
    assert (finding["unmapped"]["saw"]["ahead_s"], finding["unmapped"]["saw"]["by"]) == (10_800, "event")


def test_it_is_told_once_an_hour_and_at_once_when_it_was_right_between(world: World) -> None:
    edge = Source(world, HOURS)
    edge.ship(edge.event("first"))
    world.now += timedelta(minutes=59)
    edge.ship(edge.event("second"))
    assert len(edge.findings()) == 1
    world.now += timedelta(minutes=1)
    edge.ship(edge.event("third"))
    assert len(edge.findings()) == 2
    edge.off = NONE
    edge.ship(edge.event("fourth"))
    edge.off = HOURS
    edge.ship(edge.event("fifth"))
    assert len(edge.findings()) == 3


@pytest.mark.parametrize("text", ["", "-5", "1e9", "12.5", "9" * 16, "\u0665"])
def test_a_header_that_is_no_time_is_refused(text: str) -> None:
    raw = [(HEADER.encode(), text.encode("utf-8"))]
    with pytest.raises(MalformedError):
        sent_at(Headers(raw=raw))


def test_without_the_header_nothing_is_known_and_with_it_the_time_is() -> None:
    assert sent_at(Headers({})) is None
    assert sent_at(Headers({HEADER: "1800000000000"})) == 1_800_000_000_000


def test_a_gatekeeper_says_what_time_it_has(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = Source(world)
    waiting, got = [edge.event("first")], []

    def answer(request: httpx.Request) -> httpx.Response:
        got.append(request.headers)
        return httpx.Response(200, json={"accepted": 1})

    spool: Any = SimpleNamespace(pending=lambda: waiting, acknowledge=lambda _number: waiting.clear())
    config: Any = SimpleNamespace(name="edge", broker_name="broker.internal")
    link = BrokerLink(config, SimpleNamespace(), spool, clock=lambda: 1_800_000_000.25)  # type: ignore[arg-type]

    async def connected(_link: BrokerLink) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="https://broker.internal")

    monkeypatch.setattr(BrokerLink, "_connected", connected)
    assert asyncio.run(link.ship_once())
    assert [sent_at(Headers(dict(one))) for one in got] == [1_800_000_000_250]


def test_a_finding_that_was_undone_with_its_shipment_comes_with_the_next_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge = Source(world, HOURS)
    first = edge.event("first")

    def undone(*_: object) -> None:
        raise StorageFull

    with monkeypatch.context() as now:
        now.setattr(world.broker.views, "_store_event", undone)
        with pytest.raises(StorageFull):
            edge.ship(first)
    assert edge.findings() == []
    edge.ship(first)
    assert len(edge.findings()) == 1
