"""Agents on a real PostgreSQL: databases from before, two brokers at once, and a change at one that the other tells."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest
from agents_before import AFTER, fill_before, found_after
from postgres_rig import Server
from review_world import OPERATOR, World

from saw.broker import agent_list
from saw.broker import postgres as broker_postgres
from saw.broker.agent_states import AGENTS
from saw.broker.agents import RegisterAgent, RetireAgent, SucceedAgent
from saw.broker.core import Broker
from saw.broker.database_settings import parse_database
from saw.broker.errors import BrokerError
from saw.broker.store import Store
from saw.broker.wake import Waker

pytestmark = [pytest.mark.control("FLT-01"), pytest.mark.control("ID-04")]


def test_a_database_from_before_keeps_its_agents_and_gives_them_names(postgres: Server) -> None:
    url = postgres.database(empty=True)
    engine = broker_postgres.open_engine(parse_database(url))
    with engine.connect().execution_options(saw_write=True, saw_steps=True) as connection, connection.begin():
        fill_before(connection)
    engine.dispose()
    store = Store.open_postgresql(parse_database(url), Waker())
    with store.read() as connection:
        assert found_after(connection) == AFTER
    store.close()


def test_two_brokers_give_a_workspace_one_agent_and_tell_each_others_changes(tmp_path: Path, postgres: Server) -> None:
    world = World(tmp_path, postgresql=postgres.database())
    other = Broker.open(world.config, lambda: world.now, os.urandom)
    try:
        world.broker.agents.retire(OPERATOR, "agent-1", RetireAgent(reason="over"))
        outcomes: list[str] = []
        begin = threading.Barrier(2)

        def register(broker: Broker) -> None:
            begin.wait(60)
            try:
                broker.agents.register(OPERATOR, RegisterAgent(sponsor="Ada", workspace="ws-a"))
                outcomes.append("registered")
            except BrokerError as error:
                outcomes.append(error.code)

        threads = [threading.Thread(target=register, args=(broker,)) for broker in (world.broker, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert sorted(outcomes) == ["registered", "workspace_has_agent"]

        with other.services.store.read() as connection:
            seq = agent_list.page(connection, agent_list.Wanted())["seq"]

        def look() -> dict[str, object]:
            with other.services.store.read() as connection:
                return agent_list.changes(connection, seq)

        async def wait() -> dict[str, object]:
            async def read() -> dict[str, object]:
                return await asyncio.to_thread(look)

            waiting = asyncio.create_task(other.waker.poll(AGENTS, read, lambda found: bool(found["agents"]), 60))
            await asyncio.to_thread(world.broker.agents.succeed, OPERATOR, "agent-2", SucceedAgent(reason="newer"))
            return await waiting

        told = asyncio.run(wait())
        assert [(one["id"], one["state"]) for one in told["agents"]] == [("agent-2", "retired"), ("agent-4", "active")]
    finally:
        other.close()
        world.broker.close()
