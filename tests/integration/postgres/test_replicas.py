"""Several brokers on one database, two in this process: what one takes the other knows, and one does for all."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from postgres_rig import Server, name_of
from review_world import OPERATOR, World
from session_world import EDGE as BASTION
from session_world import World as SessionWorld
from sqlalchemy import select

from saw.broker.bastion_sessions import SessionRequest
from saw.broker.config import BrokerConfig
from saw.broker.core import Broker
from saw.broker.errors import BrokerError
from saw.broker.postgres import EXCLUSIVE, LOCKS, REPLICAS, UPKEEP
from saw.broker.registry import get_row
from saw.broker.review_decisions import AskNonce
from saw.broker.schema import reviews
from saw.broker.secret_move import MoveRefused, move_secrets
from saw.broker.server import tls_context, upkeep_once
from saw.broker.session_views import key_digest
from saw.broker.setup import initialise
from saw.errors import ConfigError
from saw.files import write_private
from saw.secrets.settings import SealedSettings, SecretsSettings
from saw.sessions.messages import Redeem

pytestmark = pytest.mark.control("FLT-01")


@pytest.fixture
def world(tmp_path: Path, postgres: Server):
    found = World(tmp_path, postgresql=postgres.database())
    yield found
    found.broker.close()


@pytest.fixture
def other(world: World):
    """A second broker of the world's database and files."""
    found = Broker.open(world.config, lambda: world.now, os.urandom)
    yield found
    found.close()


def on(world: World, broker: Broker) -> World:
    """The same world, asked at another broker."""
    found = object.__new__(World)
    found.__dict__.update(world.__dict__, broker=broker)
    return found


def held(postgres: Server, config: BrokerConfig) -> tuple[int, int]:
    """How many replicas live by their locks, and how many of them do the upkeep."""
    with postgres.admin(name_of(str(config.postgresql))) as session:
        rows = session.execute(
            "SELECT classid::bigint, count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
            " AND (classid = %s OR classid = %s AND objid = %s)"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) GROUP BY classid",
            (REPLICAS, LOCKS, UPKEEP),
        ).fetchall()
    found = dict(rows)
    return found.get(REPLICAS, 0), found.get(LOCKS, 0)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 120
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < end, what
        pause.wait(0.05)


def cut(postgres: Server, config: BrokerConfig) -> None:
    """End the sessions by which brokers hear of each other."""
    with postgres.admin(name_of(str(config.postgresql))) as session:
        session.execute(
            "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity"
            " WHERE application_name = 'saw-broker-replica' AND datname = current_database()"
        )


@pytest.mark.control("REV-02")
def test_a_nonce_of_one_broker_is_used_at_another_and_once(world: World, other: Broker) -> None:
    there = on(world, other)
    review = world.open().id
    nonce = world.broker.decisions.nonce(review, AskNonce("ben"))["nonce"]
    said = world.statement(review, "ben", nonce=nonce)
    assert there.hand_in(said, "ben")["state"] == "approved"
    again = world.open(b"another call").id
    for place in (world, there):
        with pytest.raises(BrokerError) as caught:
            place.hand_in(place.statement(again, "ben", nonce=nonce), "ben")
        assert "nonce" in caught.value.code


@pytest.mark.control("REV-03")
def test_an_approval_is_claimed_at_one_broker_and_told_at_another(world: World, other: Broker) -> None:
    there = on(world, other)
    review = world.approved()
    claimed = there.claim()
    assert claimed is not None
    assert world.claim() is None
    assert world.tell(claimed).state == "done"
    assert there.view(review).state == "done"
    assert other.trail.verify()["complete"]


def state_at(broker: Broker) -> str:
    with broker.services.store.read() as connection:
        return str(get_row(connection, "ws-a").state)


async def killed_at(world: World, other: Broker) -> str:
    """Wait at ``other`` for up to ten minutes, kill at the world's broker, return what the wait brought."""
    reading = asyncio.Event()

    async def read() -> str:
        found = await asyncio.to_thread(state_at, other)
        reading.set()
        return found

    poll = asyncio.create_task(other.waker.poll("ws-a", read, lambda seen: seen != "active", 600))
    await asyncio.wait_for(reading.wait(), 60)
    await asyncio.to_thread(world.broker.registry.kill, OPERATOR, "ws-a", "test")
    return await asyncio.wait_for(poll, 120)


@pytest.mark.control("LIF-02")
def test_a_kill_at_one_broker_wakes_who_waits_at_another(world: World, other: Broker) -> None:
    assert asyncio.run(killed_at(world, other)) == "quarantined"


def test_brokers_hear_each_other_again_after_their_sessions_were_cut(
    world: World, other: Broker, postgres: Server
) -> None:
    async def scenario() -> None:
        looks: list[int] = []
        again = asyncio.Event()

        async def read() -> int:
            looks.append(1)
            if len(looks) > 1:
                again.set()
            return len(looks)

        poll = asyncio.create_task(other.waker.poll("ws-b", read, lambda _seen: False, 600))
        await asyncio.to_thread(cut, postgres, world.config)
        await asyncio.wait_for(again.wait(), 120)
        poll.cancel()

    asyncio.run(scenario())
    wait_until(lambda: held(postgres, world.config) == (2, 1), "both are back, and one does the upkeep")
    assert asyncio.run(killed_at(world, other)) == "quarantined"


def test_one_of_all_does_the_upkeep_and_another_takes_it_over(world: World, postgres: Server) -> None:
    second = Broker.open(world.config, lambda: world.now, os.urandom)
    assert (world.broker.upkeep.mine, second.upkeep.mine) == (True, False)
    assert held(postgres, world.config) == (2, 1)
    world.broker.close()
    wait_until(lambda: second.upkeep.mine, "the other one takes it over")
    world.open_broker()
    assert not world.broker.upkeep.mine
    second.close()
    wait_until(lambda: world.broker.upkeep.mine, "and back")
    assert held(postgres, world.config) == (1, 1)
    assert len(list((world.config.state / "replicas").iterdir())) == 1, "who left, or died, has no beacon"


def test_what_is_done_by_time_is_done_by_the_one_that_does_the_upkeep(world: World, other: Broker) -> None:
    review = world.open().id
    world.later(hours=2)

    def stored() -> str:
        with other.services.store.read() as connection:
            return str(connection.execute(select(reviews.c.state).where(reviews.c.id == review)).scalar_one())

    for broker, wanted in ((other, "pending"), (world.broker, "expired")):
        upkeep_once(broker, tls_context(broker, lambda: world.now), lambda: world.now)
        assert stored() == wanted
    assert not other.upkeep.mine


def test_a_broker_that_does_not_share_the_files_does_not_start_beside_one_and_may_alone(
    world: World, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(world.config.state, copy)
    elsewhere = msgspec.structs.replace(world.config, state_dir=str(copy))
    with pytest.raises(ConfigError, match="does not share") as caught:
        Broker.open(elsewhere, lambda: world.now, os.urandom)
    assert "state_dir" in caught.value.cure
    world.open()  # who was there first goes on
    world.broker.close()
    moved = Broker.open(elsewhere, lambda: world.now, os.urandom)
    try:
        with pytest.raises(ConfigError, match="does not share"):
            world.open_broker()
    finally:
        moved.close()
    world.open_broker()


def test_a_broker_that_comes_back_beside_one_that_does_not_share_refuses_every_call(
    world: World, postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(world.config.state, copy)
    monkeypatch.setattr("saw.broker.replicas.AGAIN_S", 600)  # long enough for the other one to come in between
    cut(postgres, world.config)
    replica = world.broker.upkeep
    wait_until(lambda: held(postgres, world.config) == (0, 0), "it was cut off")
    moved = Broker.open(msgspec.structs.replace(world.config, state_dir=str(copy)), lambda: world.now, os.urandom)
    try:
        replica._again.set()  # type: ignore[attr-defined]
        wait_until(lambda: world.broker.services.store._shut is not None, "it sees the other one")
        with pytest.raises(ConfigError, match="does not share"):
            world.open()
        assert moved.registry.show("ws-a")["state"] == "active"
    finally:
        moved.close()


def test_a_database_is_of_one_authority(world: World, tmp_path: Path) -> None:
    settings = {"state_dir": str(tmp_path / "other"), "operator_socket": str(tmp_path / "p.sock")}
    with pytest.raises(ConfigError, match="another authority"):
        initialise(msgspec.structs.replace(world.config, **settings), datetime.now(UTC))
    assert initialise(world.config, world.now) == []


@pytest.mark.control("ID-02")
def test_a_session_opens_at_one_broker_and_its_certificate_at_no_other_again(tmp_path: Path, postgres: Server) -> None:
    world = SessionWorld(tmp_path, postgresql=postgres.database())
    second = Broker.open(world.config, lambda: world.now, os.urandom)
    key = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    session = str(world.sessions.request(OPERATOR, SessionRequest("ws-a", key))["session_id"])
    redeem = Redeem(session, key_digest(key), "192.0.2.7", key)
    second.sessions.redeem(BASTION, redeem)
    for broker in (world.broker, second):
        with pytest.raises(BrokerError) as caught:
            broker.sessions.redeem(BASTION, redeem)
        assert caught.value.code == "session_used"
    assert world.sessions.watch(BASTION, session).state == "open"
    world.broker.registry.kill(OPERATOR, "ws-a", "test")
    assert second.sessions.watch(BASTION, session).state == "ended"
    second.close()
    world.broker.close()


def test_of_two_brokers_one_at_a_time_does_what_is_exclusive(world: World, other: Broker, postgres: Server) -> None:
    entered: list[str] = []

    def waits() -> bool:
        with postgres.admin(name_of(str(world.config.postgresql))) as session:
            query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND classid = %s"
            row = session.execute(query, (EXCLUSIVE,)).fetchone()
        return row is not None and row[0] > 0

    def enter() -> None:
        with other.services.store.exclusively("a refresh token"):
            entered.append("other")

    second = threading.Thread(target=enter)
    with world.broker.services.store.exclusively("a refresh token"):
        second.start()
        wait_until(lambda: waits() or bool(entered), "the other one waits")
        assert entered == []
        with other.services.store.exclusively("another token"):
            assert entered == []
    second.join(120)
    assert entered == ["other"]


def test_secrets_do_not_move_while_a_broker_serves_on_the_database(
    world: World, postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Broker.open(world.config, lambda: world.now, os.urandom)
    write_private(tmp_path / "saw-secrets", os.urandom(32))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    sealed = msgspec.structs.replace(world.config, secrets=SecretsSettings("sealed", SealedSettings()))
    back = msgspec.structs.replace(world.config, secrets=SecretsSettings("files", SealedSettings()))
    before = world.broker.trust()["ca_pem"]
    world.broker.close()
    with pytest.raises(MoveRefused, match="a broker serves on this database"):
        move_secrets(sealed, lambda: world.now)
    other.close()
    wait_until(lambda: held(postgres, world.config) == (0, 0), "both have left")
    assert move_secrets(sealed, lambda: world.now).removed > 0
    one = Broker.open(sealed, lambda: world.now, os.urandom)
    two = Broker.open(sealed, lambda: world.now, os.urandom)
    assert [broker.trust()["ca_pem"] for broker in (one, two)] == [before, before]
    two.close()
    one.close()
    wait_until(lambda: held(postgres, world.config) == (0, 0), "both have left")
    assert move_secrets(back, lambda: world.now).removed > 0
    world.open_broker()
    assert world.broker.trust()["ca_pem"] == before
