"""The broker killed, stopped, cut off from a perimeter, out of disk: what it acknowledged is kept, what it refuses is said."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from broker_rig import Lab, encode
from fault_room import MIB, Room, partitioned
from netns import Namespace
from policyd_lab import until

from saw.audit.chain import ChainedEvent, verify_chain
from saw.broker.full_disk import RESERVE
from saw.errors import SawError
from saw.policy.tuf_repository import adopt_publication

HERE, THERE = "127.0.0.1", "127.0.0.2"

pytestmark = pytest.mark.sqlite("the database's file lies on the disk that is filled")


def set_aside(room: Room) -> bool:
    """Tell whether room is set aside for kills: a file alone is no room."""
    file = room.seen / "reserve"
    return file.exists() and file.stat().st_blocks * 512 >= RESERVE


class Broker:
    """A real broker in a network namespace, its state on a disk of 16 MiB, with a workspace and what was acknowledged."""

    def __init__(self, stack: ExitStack) -> None:
        self.namespace = Namespace("broker")
        stack.callback(self.namespace.close)
        directory = Path(tempfile.mkdtemp(prefix="saw-broker-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        self.lab = Lab(directory)
        self.room = Room(directory / "state", 16 * MIB)
        stack.callback(self.room.close)
        shutil.copytree(directory / "state", self.room.seen, dirs_exist_ok=True)
        self.lab.enter = self.room.enter
        self.start()
        stack.callback(self._end)
        self.lab.workspace("ws-old")
        self.kept = ["ws-old"]
        until(lambda: set_aside(self.room), "room is set aside")

    def start(self) -> None:
        self.namespace.run(self.lab.start)

    def _end(self) -> None:
        process = self.lab.process
        if process is not None:
            process.kill()
            process.wait(10)

    def kill(self) -> None:
        self._end()
        self.lab.process = None

    def create(self, name: str) -> str:
        """Register a workspace; return the code of the refusal, empty for none."""
        body = {"id": name, "sponsor": "ada@example.com", "blueprint": "coding", "ring": "stable", "image": "workspace"}
        try:
            self.lab.operator.request("POST", "/v1/workspaces", body)
        except SawError as error:
            assert error.cure
            return error.code
        self.kept.append(name)
        return ""

    def fill_up(self, name: str) -> str:
        """Fill the disk until a workspace cannot be registered; return the code of that refusal."""
        for number in range(1000):
            self.room.fill()
            if code := self.create(f"{name}-{number}"):
                return code
        raise AssertionError("the disk never got full")

    def holds_what_it_acknowledged(self) -> None:
        found = {one["id"] for one in self.lab.operator.request("GET", "/v1/workspaces")["workspaces"]}
        assert set(self.kept) <= found
        events = [ChainedEvent(**event) for event in self.lab.events()]
        report = verify_chain(events)
        assert report.complete, report.findings
        created = [event.event["unmapped"]["saw"].get("workspace") for event in events if "unmapped" in event.event]
        assert set(self.kept) <= set(created)

    def edge(self, address: str = HERE) -> AbstractContextManager[httpx.Client]:
        """A perimeter that calls from ``address``."""
        return self.lab.tls("perimeter", f"edge-{address[-1]}", local=address)

    def state(self, client: httpx.Client, **query: Any) -> dict[str, str]:
        """What a perimeter is told: the state of each workspace."""
        told = self.namespace.run(lambda: client.get("/v1/perimeter/state", params={"after": 0, "wait": 0, **query}))
        return {one["id"]: one["state"] for one in told.json()["workspaces"]}


@pytest.fixture
def broker() -> Iterator[Broker]:
    with ExitStack() as stack:
        yield Broker(stack)


@pytest.mark.control("AUD-01")
@pytest.mark.control("AUD-02")
def test_a_killed_broker_has_all_that_it_acknowledged(broker: Broker) -> None:
    def register(row: int) -> None:
        for number in range(100):
            try:
                broker.create(f"ws-{row}-{number}")
            except (SawError, OSError, httpx.HTTPError):
                return

    threads = [threading.Thread(target=register, args=(row,)) for row in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: len(broker.kept) > 6, "calls are under way")
    broker.kill()
    for thread in threads:
        thread.join(60)
    assert broker.create("ws-refused") == "unavailable"
    broker.start()
    broker.holds_what_it_acknowledged()
    assert broker.create("ws-new") == ""


@pytest.mark.control("AUD-01")
def test_a_call_to_a_stopped_broker_is_done_once_when_it_goes_on(broker: Broker) -> None:
    assert broker.lab.process is not None
    waiting = threading.Thread(target=broker.create, args=("ws-waits",))
    with broker.edge() as edge:
        assert broker.state(edge) == {"ws-old": "requested"}
        broker.lab.process.send_signal(signal.SIGSTOP)
        try:
            waiting.start()
            with pytest.raises(httpx.TimeoutException):
                broker.namespace.run(lambda: edge.get("/v1/perimeter/state?after=0&wait=0", timeout=2))
            assert broker.kept == ["ws-old"]
        finally:
            broker.lab.process.send_signal(signal.SIGCONT)
        waiting.join(60)
        assert broker.state(edge).keys() == {"ws-old", "ws-waits"}
    assert broker.kept == ["ws-old", "ws-waits"]
    broker.holds_what_it_acknowledged()
    created = [
        event
        for event in broker.lab.events()
        if event["event"].get("unmapped", {}).get("saw", {}).get("workspace") == "ws-waits"
    ]
    assert [one["event"]["activity_name"] for one in created if one["event"]["class_uid"] == 3004].count("Create") == 1


@pytest.mark.control("LIF-02")
def test_a_perimeter_that_cannot_be_reached_holds_up_no_kill_and_learns_of_it_when_joined(broker: Broker) -> None:
    broker.lab.step("ws-old", "provisioning")
    with broker.edge(HERE) as near, broker.edge(THERE) as far:
        assert broker.state(far)["ws-old"] == "provisioning"
        with partitioned(broker.namespace.name, f"ip saddr {THERE}", f"ip daddr {THERE}"):
            with pytest.raises(httpx.TimeoutException):
                broker.namespace.run(lambda: far.get("/v1/perimeter/state?after=0&wait=0", timeout=2))
            broker.lab.operator.request("POST", "/v1/workspaces/ws-old/kill", {"reason": "drill"})
            assert broker.state(near)["ws-old"] == "quarantined"
        assert broker.state(far)["ws-old"] == "quarantined"


@pytest.mark.control("AUD-01")
@pytest.mark.control("AUD-02")
@pytest.mark.control("LIF-02")
def test_on_a_full_disk_changes_are_refused_with_the_reason_and_a_kill_is_made(broker: Broker) -> None:
    with broker.edge() as edge:
        before = broker.room.names()
        assert broker.fill_up("ws-a") == "storage_full"
        assert broker.state(edge)["ws-old"] == "requested", "perimeters are still told"
        with pytest.raises(SawError) as refused:
            broker.lab.step("ws-old", "provisioning")
        assert (refused.value.code, "free space" in refused.value.cure) == ("storage_full", True)
        killed = broker.lab.operator.request("POST", "/v1/workspaces/ws-old/kill", {"reason": "drill"})
        assert killed["state"] == "quarantined"
        assert broker.state(edge)["ws-old"] == "quarantined"
        assert broker.fill_up("ws-b") == "storage_full"
        assert broker.lab.process is not None
        assert broker.lab.process.poll() is None
    broker.room.free()
    assert broker.create("ws-new") == "", "without a restart"
    broker.holds_what_it_acknowledged()
    broker.kill()
    broker.start()
    broker.holds_what_it_acknowledged()
    assert broker.lab.operator.request("GET", "/v1/workspaces/ws-old")["state"] == "quarantined"
    until(lambda: set_aside(broker.room), "room is set aside again")
    assert {name for name in broker.room.names() - before if name.startswith(".")} == set(), "no part of a file is left"


@pytest.mark.control("POL-02")
def test_a_policy_that_finds_no_room_is_not_published_in_part(broker: Broker) -> None:
    _, publication = broker.lab.officers.publication(1)
    broker.lab.operator.request("POST", "/v1/policy/publish", encode(publication))
    adopt_publication(broker.lab.officers.directory, publication)
    store = broker.room.seen / "tuf"
    assert list(store.rglob("timestamp.json"))
    served = {path: path.read_bytes() for path in store.rglob("timestamp.json")}
    broker.room.fill()
    _, publication = broker.lab.officers.publication(2)
    with pytest.raises(SawError) as refused:
        broker.lab.operator.request("POST", "/v1/policy/publish", encode(publication))
    assert refused.value.code == "storage_full"
    assert {path: path.read_bytes() for path in store.rglob("timestamp.json")} == served
    broker.room.free()
    broker.lab.operator.request("POST", "/v1/policy/publish", encode(publication))
    assert {path: path.read_bytes() for path in store.rglob("timestamp.json")} != served
