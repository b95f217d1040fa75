"""Several brokers on one database tell each message once; one that dies leaves its message to another, under the same id."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from notify_rig import Hooks
from postgres_rig import Server
from review_world import OPERATOR, World

from saw.broker.core import Broker
from saw.broker.notification_queue import CLAIM_FOR, Queue

pytestmark = [pytest.mark.control("REV-01"), pytest.mark.control("FLT-01")]

MANY = 24


@pytest.fixture
def hooks(tmp_path: Path) -> Iterator[Hooks]:
    found = Hooks(tmp_path / "hooks")
    found.start()
    yield found
    found.stop()


@pytest.fixture
def world(tmp_path: Path, postgres: Server, hooks: Hooks) -> Iterator[World]:
    found = World(tmp_path / "world", postgresql=postgres.database(), notifications=(hooks.channel(),))
    yield found
    found.broker.close()


@pytest.fixture
def other(world: World) -> Iterator[Broker]:
    """A second broker of the world's database and files."""
    found = Broker.open(world.config, lambda: world.now, os.urandom)
    yield found
    found.close()


def states(broker: Broker) -> list[str]:
    found = broker.notifications.listed(state="", channel="", after="", limit=100)["notifications"]
    return [one["state"] for one in found]


def await_delivered(broker: Broker) -> None:
    end, pause = time.monotonic() + 60, threading.Event()
    while set(states(broker)) != {"delivered"}:
        assert time.monotonic() < end, states(broker)
        pause.wait(0.05)


def test_two_brokers_that_both_deliver_tell_each_message_once(world: World, other: Broker, hooks: Hooks) -> None:
    async def scenario() -> None:
        running = [asyncio.create_task(broker.courier.run()) for broker in (world.broker, other)]
        for number in range(MANY):  # told at one, delivered by whoever is faster
            await asyncio.to_thread(world.open, b"%d" % number)
        await asyncio.to_thread(hooks.wait, MANY)
        await asyncio.to_thread(await_delivered, other)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    asyncio.run(scenario())
    assert len(hooks.got) == len({one.id for one in hooks.got}) == MANY
    assert all(one.verified() for one in hooks.got)
    assert other.trail.verify()["complete"]


def test_a_message_at_one_broker_wakes_the_courier_of_another(world: World, other: Broker, hooks: Hooks) -> None:
    async def scenario() -> None:
        running = asyncio.create_task(other.courier.run())
        for number in (1, 2):
            await asyncio.to_thread(world.open, b"%d" % number)
            await asyncio.to_thread(hooks.wait, number)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scenario())


def test_what_a_dead_broker_was_sending_another_sends_later_with_the_same_id(
    world: World, other: Broker, hooks: Hooks
) -> None:
    world.broker.registry.kill(OPERATOR, "ws-a", "test")
    claimed, _ = Queue(world.broker.services).claim("chat")
    assert claimed is not None
    assert asyncio.run(other.courier.step("chat")) != "", "it is the other one's as long as that may live"
    world.later(seconds=CLAIM_FOR.total_seconds())
    assert asyncio.run(other.courier.step("chat")) == ""
    [got] = hooks.wait(1)
    assert got.id == claimed.id
    Queue(world.broker.services).delivered(claimed)
    assert states(other) == ["delivered"]
    assert [
        one["attempts"] for one in other.notifications.listed(state="", channel="", after="", limit=9)["notifications"]
    ] == [2]


def test_a_broker_among_others_takes_nothing_back_at_its_start(world: World, hooks: Hooks) -> None:
    world.open()
    claimed, _ = Queue(world.broker.services).claim("chat")
    assert claimed is not None
    late = Broker.open(world.config, lambda: world.now, os.urandom)
    try:
        assert states(late) == ["sending"]
        assert asyncio.run(late.courier.step("chat")) != ""
    finally:
        late.close()
    assert hooks.got == []
