"""The parts of the broker that need no process: configuration, tables, lifecycle, limits, waking."""

from __future__ import annotations

import asyncio
import json
import os
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine

from examples import examples
from saw.broker import schema
from saw.broker.config import BrokerConfig, load_config
from saw.broker.core import Broker
from saw.broker.errors import BusyError, ConflictError
from saw.broker.lifecycle import MAY_ATTEST, STEPS, State, check_step
from saw.broker.limits import RateLimit
from saw.broker.secret_place import open_secrets
from saw.broker.setup import RENEW_BEFORE, initialise, renew_server_certificate
from saw.broker.store import Store
from saw.broker.wake import Waker
from saw.cli.broker import main
from saw.errors import ConfigError
from saw.identity.x509 import Authority

NOW = datetime(2026, 11, 23, tzinfo=UTC)
GOOD = {
    "trust_domain": "saw.example",
    "state_dir": "/var/lib/saw/broker",
    "operator_socket": "/run/o.sock",
    "server_names": ["b.saw.internal"],
}


def test_the_migrations_make_exactly_the_tables_of_the_schema(tmp_path) -> None:
    Store.open_sqlite(tmp_path / "broker.db", Waker()).close()
    Store.open_sqlite(tmp_path / "broker.db", Waker()).close()
    engine = create_engine(f"sqlite:///{tmp_path / 'broker.db'}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    engine.dispose()
    assert (tmp_path / "broker.db").stat().st_mode & 0o777 == 0o600


def test_an_event_that_cannot_be_recorded_undoes_its_change(tmp_path) -> None:
    store = Store.open_sqlite(tmp_path / "broker.db", Waker())
    with pytest.raises(Exception, match="OCSF"), store.write() as tx:
        tx.touch()
        tx.record({"class_uid": 1})
    with store.read() as connection:
        assert connection.execute(schema.registry.select()).one().seq == 0
    with store.write() as tx:
        assert tx.touch() == 1
    store.close()


def test_a_good_configuration_loads_and_each_wrong_field_is_named(tmp_path) -> None:
    path = tmp_path / "broker.json"
    path.write_text(json.dumps(GOOD))
    assert load_config(path).listen.port == 8443
    for field, value in (
        ("trust_domain", "SAW"),
        ("state_dir", "relative"),
        ("server_names", []),
        ("listen", {"port": 70000}),
        ("tuf", {"timestamp_ttl_s": 1}),
        ("image", {"baseline_floor": 70}),
        ("image", {"baseline_floor": 70, "require": ["sbom"]}),
        ("colour", "red"),
    ):
        path.write_text(json.dumps({**GOOD, field: value}))
        with pytest.raises(ConfigError, match=field):
            load_config(path)
    for image in ({"baseline_floor": 70, "require": ["baseline"]}, {"baseline_floor": 0, "require": ["sbom"]}):
        path.write_text(json.dumps({**GOOD, "image": image}))
        assert load_config(path).image.baseline_floor == image["baseline_floor"]


def test_init_is_idempotent_and_keeps_every_key(tmp_path) -> None:
    config = BrokerConfig("saw.example", str(tmp_path / "state"), str(tmp_path / "o.sock"), ("b.saw.internal",))
    made = initialise(config, NOW)
    assert {"x509 authority", "ssh authority", "tuf online key", "database", "server certificate"} <= set(made)
    before = {path: path.read_bytes() for path in config.keys.rglob("*") if path.is_file()}
    assert initialise(config, NOW) == []
    assert {path: path.read_bytes() for path in config.keys.rglob("*") if path.is_file()} == before
    assert all(path.stat().st_mode & 0o077 == 0 for path in before if path.suffix in {".key", ""} or "key" in path.name)
    with pytest.raises(ConfigError, match="trust_domain"):
        initialise(BrokerConfig("other.example", config.state_dir, config.operator_socket, config.server_names), NOW)


def test_an_empty_register_never_takes_the_place_of_one_that_was_there(tmp_path) -> None:
    config = BrokerConfig("saw.example", str(tmp_path / "state"), str(tmp_path / "o.sock"), ("b.saw.internal",))
    file = tmp_path / "broker.json"
    file.write_bytes(msgspec.json.encode(config))
    initialise(config, NOW)
    place = config.state / "register.json"
    assert (json.loads(place.read_bytes()), place.stat().st_mode & 0o777) == ({"register": "sqlite"}, 0o600)
    place.unlink()
    assert initialise(config, NOW) == [], "an installation of before this file goes on"
    assert place.exists()
    assert main(["check", "--config", str(file)]) == 0

    kept = config.database.rename(tmp_path / "kept.db")
    for begin in (initialise, lambda *_: main(["check", "--config", str(file)])):
        with pytest.raises(ConfigError, match=r"broker\.db is gone.*backup"):
            begin(config, NOW)
    with pytest.raises(ConfigError, match="is gone"):
        Broker.open(config, lambda: NOW, os.urandom)
    assert not config.database.exists(), "a refusal makes nothing"
    kept.rename(config.database)
    assert initialise(config, NOW) == []

    place.write_text('{"register": "postgresql"}')
    with pytest.raises(ConfigError, match=r"names no database.*broker_database"):
        initialise(config, NOW)
    place.write_text('{"register": "elsewhere"}')
    with pytest.raises(ConfigError, match="not valid"):
        initialise(config, NOW)
    place.unlink()
    config.database.unlink()
    assert initialise(config, NOW) == ["database"], "on purpose it may"


def test_the_server_certificate_is_renewed_before_it_ends(tmp_path) -> None:
    config = BrokerConfig("saw.example", str(tmp_path / "state"), str(tmp_path / "o.sock"), ("b.saw.internal",))
    initialise(config, NOW)
    authority, secrets = Authority.load(config.keys / "x509"), open_secrets(config)
    assert not renew_server_certificate(config, secrets, authority, NOW + timedelta(days=19))
    assert renew_server_certificate(config, secrets, authority, NOW + timedelta(days=30) - RENEW_BEFORE)


@pytest.mark.control("ID-04")
@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.sampled_from(list(State)), max_size=12))
def test_no_sequence_of_steps_leads_to_active_or_out_of_the_end(wanted: list[State]) -> None:
    state = State.REQUESTED
    for to in wanted:
        try:
            check_step("ws", state, to)
        except ConflictError:
            assert to not in STEPS[state]
            continue
        assert state is not State.DECOMMISSIONED
        if state is State.QUARANTINED:
            assert to in {State.STOPPED, State.DECOMMISSIONED}
        state = to
        assert state is not State.ACTIVE


def test_only_started_workspaces_may_attest_and_every_live_state_can_be_killed() -> None:
    assert {State.ATTESTING, State.ACTIVE} == MAY_ATTEST
    for state in State:
        if state not in {State.QUARANTINED, State.DECOMMISSIONED}:
            check_step("ws", state, State.QUARANTINED)


def test_the_rate_limit_refuses_beyond_the_burst_and_recovers_with_time() -> None:
    now = [0.0]
    limit = RateLimit(3, 1.0, lambda: now[0])
    for _ in range(3):
        limit.take("ws")
    with pytest.raises(BusyError):
        limit.take("ws")
    limit.take("other")
    now[0] = 1.0
    limit.take("ws")


def test_a_change_between_reading_and_waiting_is_not_lost() -> None:
    async def scenario() -> int:
        waker = Waker()
        value = [0]
        reads = []

        async def read() -> int:
            reads.append(value[0])
            seen = value[0]
            if len(reads) == 1:
                value[0] = 1
                waker.wake({"key"})
            return seen

        assert await asyncio.wait_for(waker.poll("key", read, lambda seen: seen == 1, 30), 10) == 1
        return len(reads)

    assert asyncio.run(scenario()) == 2


def test_closing_ends_every_poll_with_what_it_has() -> None:
    async def scenario() -> int:
        waker = Waker()

        async def read() -> int:
            return 5

        poll = asyncio.create_task(waker.poll("key", read, lambda _seen: False, 30))
        await asyncio.sleep(0)
        waker.close()
        return await asyncio.wait_for(poll, 10)

    assert asyncio.run(scenario()) == 5
