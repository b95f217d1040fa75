"""A gatekeeper that stood still answers nobody who is gone, and forgets nothing that its disk did not take."""

from __future__ import annotations

import asyncio
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saw.audit.events import EventFactory
from saw.gateway.app import AuthorizationApp
from saw.gateway.clock import Clock
from saw.gateway.contact import Contact
from saw.gateway.envoy_parts import METER_HEADER, METER_SEAT
from saw.gateway.errors import SpoolError
from saw.gateway.pulse import AFTER_S, STILL_S, Pulse
from saw.gateway.releases import TrustRoot
from saw.gateway.service import Gatekeeper
from saw.gateway.spool import Spool
from saw.gateway.state import PerimeterState, StateFile, WorkspaceEntry
from saw.gateway.view import EMPTY, View, ViewKeeper
from saw.gateway.xds import XdsWriter

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_a_pulse_tells_a_standstill_from_its_end_on_and_for_a_while_after() -> None:
    now = [100.0]
    pulse = Pulse(lambda: now[0])
    assert not pulse.stood_still()
    now[0] += STILL_S
    assert not pulse.stood_still()
    now[0] += 1
    assert pulse.stood_still(), "before the first beat after it"
    pulse.beat()
    assert pulse.stood_still(), "and behind it"
    for _ in range(2):
        now[0] += 0.6 * AFTER_S
        pulse.beat()
    assert not pulse.stood_still()


class Judged:
    """Notes who asked, and refuses."""

    def __init__(self) -> None:
        self.asked = 0

    async def decide(self, _call: Any) -> Any:
        self.asked += 1
        raise SpoolError("full")


@pytest.mark.control("POL-04")
@pytest.mark.parametrize(("still", "gone", "asked"), [(True, True, 0), (True, False, 1), (False, True, 1)])
def test_after_a_standstill_a_call_is_decided_only_for_somebody_who_still_waits(
    tmp_path: Path, still: bool, gone: bool, asked: int
) -> None:
    judged, sent = Judged(), []
    spool = Spool(tmp_path, "edge", 10)
    factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "u")

    async def serve() -> None:
        app = AuthorizationApp(judged, spool, factory, stood_still=lambda: still)  # type: ignore[arg-type]
        messages = [{"type": "http.request", "body": b""}, *([{"type": "http.disconnect"}] if gone else [])]

        async def receive() -> Any:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        await app({"type": "http", "path": "/check", "headers": []}, receive, send)

    asyncio.run(serve())
    spool.close()
    assert (judged.asked, bool(sent)) == (asked, bool(asked))
    assert not sent or b"cannot write its audit record" in sent[1]["body"]


def test_what_is_told_of_a_charge_counts_also_after_a_standstill(tmp_path: Path) -> None:
    """Envoy does not wait for that answer; what it told is here, and is settled once however often it is told."""
    settled: list[str] = []

    class Metered:
        async def settle(self, told: Any) -> None:
            settled.append(told.charge)

    async def serve() -> None:
        factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "u")
        app = AuthorizationApp(Judged(), None, factory, meter=Metered(), stood_still=lambda: True)  # type: ignore[arg-type]
        messages = [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            assert message

        headers = [(b"x-saw-listener", METER_SEAT.encode()), (METER_HEADER.encode(), b"c-1")]
        await app({"type": "http", "path": "/", "headers": headers}, receive, send)

    asyncio.run(serve())
    assert settled == ["c-1"]


@pytest.mark.control("LIF-02")
def test_a_state_that_the_disk_does_not_take_is_asked_for_until_it_does(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    contact, clock = Contact(tmp_path, 90.0, None), Clock(NOW.timestamp, lambda: 0.0, 5.0)
    keeper = ViewKeeper(TrustRoot({}, 1), clock, file, lambda: 0.0, 90.0, ca_pem=b"", contact=contact)

    def told(state: Any, seq: int) -> PerimeterState:
        return PerimeterState(seq=seq, now=NOW, workspaces=(WorkspaceEntry(id="ws-1", number=1, state=state),))

    def kept() -> str:
        cache = file.load()
        assert cache is not None
        return cache.state.workspaces[0].state

    asyncio.run(keeper.take(told("active", 1)))
    assert (keeper.after, kept()) == (1, "active")
    takes = file.save

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    file.save = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space"):
        asyncio.run(keeper.take(told("quarantined", 2)))
    assert keeper.view.workspaces["ws-1"].state == "quarantined", "it counts at once"
    assert (keeper.after, kept()) == (None, "active"), "and is asked for again"
    file.save = takes  # type: ignore[method-assign]
    asyncio.run(keeper.take(told("quarantined", 2)))
    assert (keeper.after, kept()) == (2, "quarantined")


@pytest.mark.control("AUD-01")
def test_an_acknowledgement_that_cannot_be_noted_is_an_error_and_holds_up_nothing_after_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "edge", 10)

    def record() -> int:
        return asyncio.run(spool.record({"n": 1}))

    assert [record(), record()] == [1, 2]
    with sqlite3.connect(tmp_path / "spool.db", isolation_level=None) as other:
        other.execute("CREATE TRIGGER full BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'full'); END")
        with pytest.raises(SpoolError, match="cannot be written: full"):
            spool.acknowledge(1)
        assert (spool.acknowledged, [event.seq for event in spool.pending()], record()) == (0, [1, 2], 3)
        other.execute("DROP TRIGGER full")
    other.close()
    spool.acknowledge(1)
    assert [event.seq for event in spool.pending()] == [2, 3]
    spool.close()


@pytest.mark.control("LIF-02")
def test_a_listener_is_taken_away_on_a_full_disk_and_added_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _text: str, *, mode: int) -> None:
        raise OSError(28, f"No space left for {path.name}, {mode}")

    monkeypatch.setattr("saw.gateway.xds.write_atomic", full)
    writer = XdsWriter.__new__(XdsWriter)
    writer._directory = tmp_path
    path = tmp_path / "lds.json"
    path.write_text("one and two")
    with pytest.raises(OSError, match=r"No space left for lds\.json"):
        writer._replace("lds.json", "one and two and three")
    assert path.read_text() == "one and two"
    assert writer._replace("lds.json", "one")
    assert (path.read_text(), [entry.name for entry in tmp_path.iterdir()]) == ("one", ["lds.json"])


def test_listeners_that_could_not_be_written_the_first_time_are_written_without_a_new_state() -> None:
    keeper, written = SimpleNamespace(view=EMPTY), []
    gatekeeper = Gatekeeper.__new__(Gatekeeper)
    gatekeeper._keeper = keeper  # type: ignore[assignment]
    gatekeeper._published = None
    view = View(seq=1, workspaces={}, releases={}, graces={}, floors={})

    async def watch() -> None:
        done = asyncio.Event()

        def publish(shown: View) -> None:
            written.append(shown)
            done.set()

        gatekeeper._publish = publish  # type: ignore[method-assign]
        watching = asyncio.create_task(gatekeeper._watch_streams())
        keeper.view = view
        async with asyncio.timeout(60):
            await done.wait()
        watching.cancel()

    asyncio.run(watch())
    assert written == [view]
