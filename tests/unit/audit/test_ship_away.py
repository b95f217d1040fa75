"""A receiver that is away for an hour: everything arrives once, in order, nothing is kept meanwhile but two small files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from saw.audit import Chain, EventFactory, Subject, otlp, ship, syslog
from saw.audit.otlp import Records
from saw.audit.receiver import WINDOW, DeliveryError, Receiver
from saw.audit.relp import Messages
from saw.audit.ship import Forwarder, Page, Placed, ShipSettings

pytestmark = pytest.mark.control("P0-05")
START = datetime(2026, 11, 30, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
LONGEST_PAUSE = timedelta(seconds=10)


class Time(threading.Event):
    """A clock that only waiting moves, ``speed`` times as far, and the word to stop."""

    speed = 12

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout or 0.0)
        self.now += timedelta(seconds=timeout or 0.0) * self.speed
        return self.is_set()


class Trail:
    """The broker's trail: two chains that go on being written while nobody takes them."""

    def __init__(self, time: Time) -> None:
        self.time = time
        self.chains = {name: Chain(name) for name in ("broker", "edge")}
        self.factory = EventFactory("saw-test", host="here", new_uid=lambda: str(len(self.stored)))
        self.stored: list[Placed] = []
        self.lost: set[int] = set()

    def write(self, source: str = "broker") -> None:
        event = self.factory.api_activity(self.time.now, Subject(principal="operator:root"), "test", message="n" * 50)
        item = self.chains[source].append(event)
        self.stored.append(
            Placed(item.source, item.seq, item.prev, item.event, item.hash, position=len(self.stored) + 1)
        )

    def read(self, after: int, limit: int, wait_s: int) -> Page:
        found = [item for item in self.stored[after : after + limit] if item.position not in self.lost]
        if not found and wait_s:
            self.time.set()
        before = self.stored[after - 1] if after else None
        told = None if before is None else ship.Before(before.source, before.seq, before.hash)
        return Page(tuple(found), found[-1].position if found else after, len(self.stored), told)


class Way:
    """A receiver that is away until a time; what it takes is kept. While it is away more is written at each attempt."""

    def __init__(self, kind: Messages | Records, trail: Trail, back: datetime, state: Path) -> None:
        self.message = kind.message
        self.trail, self.back, self.state = trail, back, state
        self.took: list[bytes] = []
        self.attempts, self.largest = 0, 0
        self.breaks_at = -1

    @contextmanager
    def open(self, _receiver: Receiver) -> Iterator[Way]:
        self.attempts += 1
        self.largest = max(self.largest, sum(path.stat().st_size for path in self.state.iterdir()))
        if self.trail.time.now < self.back:
            for _ in range(4):
                for source in self.trail.chains:
                    self.trail.write(source)
            raise DeliveryError("nobody listens", cure="start it")
        yield self

    def deliver(self, messages: Sequence[bytes], acknowledged: Callable[[int], None]) -> None:
        for number, raw in enumerate(messages, 1):
            if len(self.took) == self.breaks_at:
                self.breaks_at = -1
                raise DeliveryError("the connection broke", cure="start it")
            self.took.append(raw)
            acknowledged(number)

    def check(self) -> None:
        """It is there."""


@pytest.fixture(params=["relp", "otlp"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Rig:
    def __init__(self, folder: Path, protocol: str, patch: pytest.MonkeyPatch, away: timedelta = HOUR) -> None:
        self.time, self.state, self.protocol = Time(), folder / "state", protocol
        self.state.mkdir()
        self.trail = Trail(self.time)
        self.way = Way(Messages() if protocol == "relp" else Records(), self.trail, START + away, self.state)
        patch.setitem(ship.WAYS, protocol, self.way)
        receiver = Receiver(host="siem.example.com", port=6514, ca_file="/ca", protocol=protocol)  # type: ignore[arg-type]
        self.settings = ShipSettings("/sock", str(self.state), receiver, host="control")

    def run(self) -> None:
        Forwarder(self.settings, self.trail, lambda: self.time.now, self.time).run()

    def arrived(self) -> list[tuple[str, int, str]]:
        """Return source, number and hash of what arrived."""
        if self.protocol == "relp":
            found: list[Any] = [syslog.parse(raw.decode()) for raw in self.way.took]
        else:
            found = [
                one for raw in self.way.took for one in otlp.parse_export('{"resourceLogs":[' + raw.decode() + "]}")
            ]
        return [(item.source, item.seq, item.hash) for item in found]

    def wanted(self) -> list[tuple[str, int, str]]:
        return [
            (item.source, item.seq, item.hash) for item in self.trail.stored if item.position not in self.trail.lost
        ]

    def health(self) -> dict[str, Any]:
        return dict(msgspec.json.decode((self.state / "health.json").read_bytes()))


@pytest.fixture
def rig(tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, protocol, monkeypatch)


def test_after_an_hour_of_refusals_everything_arrives_once_and_in_order(rig: Rig) -> None:
    for _ in range(3):
        rig.trail.write()
    rig.run()
    assert len(rig.trail.stored) > 2 * WINDOW, "there was something to send"
    assert rig.arrived() == rig.wanted()
    assert rig.time.now - START >= HOUR
    said = rig.health()
    assert (said["state"], said["error"]["code"]) == ("shipping", "delivery_failed")
    assert HOUR - LONGEST_PAUSE * rig.time.speed <= datetime.fromisoformat(said["error_at"]) - START < HOUR


def test_meanwhile_nothing_is_kept_but_two_small_files_and_it_is_tried_within_ten_seconds(rig: Rig) -> None:
    rig.trail.write()
    rig.time.speed = 1
    rig.run()
    assert {path.name for path in rig.state.iterdir()} == {"cursor.json", "health.json"}
    assert rig.way.largest < 2048
    assert max(rig.time.pauses) <= LONGEST_PAUSE.total_seconds()
    assert rig.way.attempts >= HOUR / LONGEST_PAUSE


def test_a_receiver_that_goes_in_the_middle_gets_none_of_what_it_acknowledged_again(rig: Rig) -> None:
    rig.trail.write()
    rig.way.breaks_at = WINDOW + 7
    rig.run()
    assert rig.arrived() == rig.wanted()


def test_what_is_missing_in_the_trail_by_then_is_marked_as_a_gap(rig: Rig) -> None:
    for _ in range(5):
        rig.trail.write()
    rig.trail.lost = {3, 4}
    rig.run()
    assert rig.arrived() == rig.wanted()
    marked = [number for number, raw in enumerate(rig.way.took) if b'mark="gap"' in raw or b'"gap"' in raw]
    assert marked == [2], "the one behind the gap, and no other"


def test_a_forwarder_that_is_started_again_meanwhile_goes_on_where_it_was(rig: Rig) -> None:
    rig.trail.write()
    rig.way.back = START
    rig.run()
    first = len(rig.way.took)
    rig.time.clear()
    rig.way.back = rig.time.now + HOUR
    rig.run()
    assert len(rig.way.took) > first
    assert rig.arrived() == rig.wanted()
