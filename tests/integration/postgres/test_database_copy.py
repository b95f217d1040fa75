"""From a broker's SQLite file to PostgreSQL: everything arrives and works on, or nothing does."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import msgspec
import pytest
from broker_rig import cli_here
from postgres_rig import Server
from review_world import World
from sqlalchemy import select

from saw.broker.config import BrokerConfig
from saw.broker.core import Broker
from saw.broker.database_settings import parse_database
from saw.broker.schema import audit_events, registry, reviewers
from saw.broker.setup import initialise
from saw.broker.store import Store
from saw.broker.wake import Waker
from saw.errors import ConfigError

pytestmark = pytest.mark.control("FLT-01")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A broker with SQLite that has decided one review, and is stopped."""
    world = World(tmp_path_factory.mktemp("old"))
    world.first = world.approved()  # type: ignore[attr-defined]
    world.broker.close()
    return world


def copy(config: BrokerConfig, directory: Path, *more: str):
    file = directory / "broker.json"
    file.write_bytes(msgspec.json.encode(config))
    return cli_here("broker", "database", "copy", "--config", str(file), *more)


def count(config: BrokerConfig) -> int:
    store = Store.open_postgresql(parse_database(str(config.postgresql)), Waker())
    with store.read() as connection:
        found = (
            len(connection.execute(select(reviewers)).all()) + connection.execute(select(registry.c.seq)).scalar_one()
        )
    store.close()
    return int(found)


def test_a_copy_goes_on_where_the_file_ended(old: World, postgres: Server, tmp_path: Path) -> None:
    config = msgspec.structs.replace(old.config, postgresql=postgres.database())
    done = copy(config, tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["ok"], set(told["chains"])) == (True, {"broker"})
    broker = Broker.open(config, lambda: old.now, os.urandom)
    try:
        world = object.__new__(World)
        world.__dict__.update(old.__dict__, broker=broker, config=config)
        claimed = world.claim()
        assert claimed is not None
        assert claimed.id == old.first  # type: ignore[attr-defined]
        world.tell(claimed)
        assert world.decide(world.open(b"the next one").id, "ben")["state"] == "approved", "keys count on"
        report = broker.trail.verify()
        assert (report["complete"], report["chains"][0]["head"]["seq"] > told["chains"]["broker"]) == (True, True)
    finally:
        broker.close()
    again = copy(config, tmp_path)
    assert again.returncode == 1
    assert "not empty" in again.stderr
    assert old.config.database.exists()


def test_nothing_is_copied_from_a_file_whose_chain_is_not_whole(old: World, postgres: Server, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(old.config.state, cut)
    config = msgspec.structs.replace(old.config, postgresql=postgres.database(), state_dir=str(cut))
    store = Store.open_sqlite(config.database, Waker())
    with store.write() as tx:
        tx.connection.execute(audit_events.delete().where(audit_events.c.seq == 2))
    store.close()
    done = copy(config, tmp_path)
    assert done.returncode == 1
    assert "audit chain broker is not complete" in done.stderr
    assert count(config) == 0


def test_what_cannot_be_copied_is_named_with_its_cure(old: World, postgres: Server, tmp_path: Path) -> None:
    assert "database is missing" in copy(old.config, tmp_path).stderr
    config = msgspec.structs.replace(
        old.config, postgresql=postgres.database(), operator_socket=str(tmp_path / "operator.sock")
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(config.operator_socket)
        listener.listen()
        refused = copy(config, tmp_path)
    assert refused.returncode == 1
    assert "a broker serves at" in refused.stderr
    assert "systemctl stop saw-broker" in refused.stderr
    (tmp_path / "empty").mkdir()
    empty = msgspec.structs.replace(config, state_dir=str(tmp_path / "empty"))
    assert "there is no" in copy(empty, tmp_path).stderr
    assert count(config) == 0


def test_the_way_over_leads_by_a_copy_and_nobody_falls_back_to_the_file(
    old: World, postgres: Server, tmp_path: Path
) -> None:
    shutil.copytree(old.config.state, tmp_path / "state", ignore=shutil.ignore_patterns("register.json"))
    before = msgspec.structs.replace(old.config, state_dir=str(tmp_path / "state"))
    config = msgspec.structs.replace(before, postgresql=postgres.database())
    with pytest.raises(ConfigError, match=r"the database is empty.*saw broker database copy"):
        initialise(config, old.now)
    assert count(config) == 0
    assert initialise(before, old.now) == [], "nothing happened to the file"

    assert copy(config, tmp_path).returncode == 0
    assert initialise(config, old.now) == []
    Broker.open(config, lambda: old.now, os.urandom).close()
    for dropped in (initialise, lambda known, now: Broker.open(known, lambda: now, os.urandom)):
        with pytest.raises(ConfigError, match=r"names no database.*broker_database"):
            dropped(before, old.now)
    file = tmp_path / "broker.json"
    file.write_bytes(msgspec.json.encode(before))
    checked = cli_here("broker", "check", "--config", str(file))
    assert checked.returncode == 1
    assert "register of this installation is in PostgreSQL" in checked.stderr
