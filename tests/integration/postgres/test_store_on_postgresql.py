"""The broker's store on a real PostgreSQL: the same tables, the same guarantees as on SQLite; what goes wrong is a refusal."""

from __future__ import annotations

import asyncio
import threading
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from postgres_rig import Server, name_of, running_postgres
from sqlalchemy import func, select

from saw.broker import postgres as broker_postgres
from saw.broker import schema
from saw.broker.database_settings import parse_database
from saw.broker.errors import MalformedError
from saw.broker.postgres import LOCKS, WRITERS, DatabaseBusy, DatabaseUnavailable
from saw.broker.replica_wake import LONGEST, Told, hear
from saw.broker.store import Store
from saw.broker.wake import PERIMETER, SPONSORS, WORKSPACES, Waker
from saw.errors import ConfigError

pytestmark = pytest.mark.control("FLT-01")


def opened(url: str) -> Store:
    return Store.open_postgresql(parse_database(url), Waker())


@pytest.fixture
def store(postgres: Server):
    found = opened(postgres.database())
    yield found
    found.close()


def seq(store: Store) -> int:
    with store.read() as connection:
        return int(connection.execute(select(schema.registry.c.seq)).scalar_one())


def test_the_steps_make_exactly_the_tables_of_the_schema(postgres: Server) -> None:
    url = postgres.database(empty=True)
    opened(url).close()
    store = opened(url)
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
    store.close()


def test_of_brokers_that_start_at_once_one_makes_the_tables(postgres: Server) -> None:
    url = postgres.database(empty=True)
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def begin() -> None:
        try:
            start.wait(60)
            opened(url).close()
        except BaseException as error:  # noqa: BLE001 - a thread's failure is the test's
            errors.append(error)

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert seq(opened(url)) == 0


@pytest.mark.control("AUD-01")
def test_an_event_that_cannot_be_recorded_undoes_its_change(store: Store) -> None:
    with pytest.raises(Exception, match="OCSF"), store.write() as tx:
        tx.touch()
        tx.record({"class_uid": 1})
    assert seq(store) == 0
    with store.write() as tx:
        assert tx.touch() == 1
    assert seq(store) == 1


def test_a_reader_sees_one_moment_and_may_not_write(store: Store) -> None:
    with store.read() as connection:
        assert connection.execute(select(schema.registry.c.seq)).scalar_one() == 0
        with store.write() as tx:
            tx.touch()
        assert connection.execute(select(schema.registry.c.seq)).scalar_one() == 0
    assert seq(store) == 1
    with pytest.raises(DatabaseUnavailable), store.read() as connection:
        connection.execute(schema.registry.update().values(seq=9))
    assert seq(store) == 1


def test_what_cannot_be_stored_is_refused_and_what_can_is_kept(store: Store) -> None:
    row = {"source": "s", "seq": 1, "hash": "h"}
    for wrong in ({"hash": "a\0b"}, {"hash": "h" * 65}, {"seq": 2**63}):
        with pytest.raises(MalformedError) as caught, store.write() as tx:
            tx.connection.execute(schema.audit_heads.insert().values(**{**row, **wrong}))
        assert caught.value.code == "not_storable"
    with store.write() as tx:
        tx.connection.execute(schema.audit_heads.insert().values(**{**row, "seq": 2**40}))


def test_sums_of_large_counters_are_whole_numbers(store: Store) -> None:
    heads = schema.audit_heads
    with store.write() as tx:
        for name in ("a", "b"):
            tx.connection.execute(heads.insert().values(source=name, seq=2**62, hash="h"))
    with store.read() as connection:
        total = connection.execute(select(func.sum(heads.c.seq))).scalar_one()
        part = connection.exec_driver_sql("SELECT 1.5::numeric").scalar_one()
    assert (type(total), total) == (int, 2**63)
    assert part == Decimal("1.5")


def test_every_session_writes_through_whatever_the_defaults_are(postgres: Server) -> None:
    url = postgres.database()
    name = name_of(url)
    for told, wanted in (("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")):
        with postgres.admin() as session:
            session.execute(f"ALTER DATABASE {name} SET synchronous_commit = '{told}'".encode())
        store = opened(url)
        with store.write() as tx:
            assert tx.connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == wanted
        store.close()


def test_a_server_that_keeps_less_is_refused_and_one_that_keeps_all_is_taken(postgres: Server) -> None:
    opened(postgres.database()).close()
    with postgres.admin() as session:
        session.execute("CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
        session.execute(
            "CREATE DATABASE words TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C.UTF-8'"
        )
        session.execute("CREATE DATABASE standby TEMPLATE template0")
        session.execute("ALTER DATABASE standby SET default_transaction_read_only = on")
    for name, reason in (("ascii", "UTF-8"), ("words", "sorts text by a language")):
        with pytest.raises(ConfigError, match=reason) as caught:
            opened(postgres.url(name))
        assert "createdb" in caught.value.cure
    with pytest.raises(DatabaseUnavailable, match="read-only"):
        opened(postgres.url("standby"))
    with pytest.raises(DatabaseUnavailable, match="does not exist"):
        opened(postgres.url("nowhere"))


def test_a_change_whose_session_is_cut_is_not_made_and_the_next_one_is(postgres: Server, store: Store) -> None:
    with pytest.raises(DatabaseUnavailable) as caught, store.write() as tx:
        tx.touch()
        mine = tx.connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        with postgres.admin() as session:
            session.execute("SELECT pg_terminate_backend(%s, 60000)", (mine,))
        tx.touch()
    assert (caught.value.status, caught.value.code) == (503, "database_unavailable")
    assert "nothing was changed" in caught.value.message
    assert seq(store) == 0, "a session that was cut is replaced"
    with store.write() as tx:
        assert tx.touch() == 1


def test_a_change_whose_session_is_cut_at_its_end_says_that_nobody_knows(postgres: Server, store: Store) -> None:
    with pytest.raises(DatabaseUnavailable, match="not known") as caught, store.write() as tx:
        tx.touch()
        mine = tx.connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        commit = tx.connection.engine.dialect.do_commit

        def cut(session: object) -> None:
            tx.connection.engine.dialect.do_commit = commit  # type: ignore[method-assign]
            with postgres.admin() as admin:
                admin.execute("SELECT pg_terminate_backend(%s, 60000)", (mine,))
            commit(session)  # type: ignore[arg-type]

        tx.connection.engine.dialect.do_commit = cut  # type: ignore[method-assign,assignment]
    assert "look before" in caught.value.cure
    assert seq(store) == 0


def test_a_service_names_the_place(postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = name_of(postgres.database())
    file = tmp_path / "services"
    file.write_text(f"[saw]\nhost={postgres.directory}\nuser=saw\ndbname={name}\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    store = opened("postgresql:///?service=saw")
    assert seq(store) == 0
    store.close()
    with pytest.raises(DatabaseUnavailable, match="definition of service"):
        opened("postgresql:///?service=other")


def test_who_waits_too_long_for_another_writer_is_told_and_nothing_was_changed(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = broker_postgres._CONNECT["options"].replace("lock_timeout=10s", "lock_timeout=50ms")
    monkeypatch.setitem(broker_postgres._CONNECT, "options", short)
    url = postgres.database()
    store = opened(url)
    with postgres.admin(name_of(url)) as other:
        other.execute(f"SELECT pg_advisory_lock({LOCKS}, {WRITERS})".encode())
        with pytest.raises(DatabaseBusy) as caught, store.write() as tx:
            tx.touch()
        assert (caught.value.status, caught.value.code) == (503, "database_busy")
        assert seq(store) == 0, "readers wait for nobody"
    with store.write() as tx:
        assert tx.touch() == 1
    store.close()


def test_without_its_server_every_call_is_refused_until_it_is_back() -> None:
    with running_postgres() as server:
        url = server.database()
        store = opened(url)
        with store.write() as tx:
            tx.touch()
        server.stop("immediate")
        for door in (store.read, store.write):
            with pytest.raises(DatabaseUnavailable, match="nothing was changed"), door():
                raise AssertionError("nobody comes in")
        with pytest.raises(DatabaseUnavailable, match="cannot be reached"):
            opened(url)
        server.start(fsync="off")
        with pytest.raises(ConfigError, match="fsync"):
            opened(url)
        server.stop()
        server.start()
        assert seq(store) == 1
        with store.write() as tx:
            assert tx.touch() == 2
        store.close()


def test_a_wait_ends_when_another_broker_writes_and_no_undone_change_ends_it(postgres: Server) -> None:
    async def scenario() -> None:
        waker = Waker()
        seen: list[int] = []
        reading = asyncio.Event()

        async def read() -> int:
            seen.append(1)
            reading.set()
            return len(seen)

        poll = asyncio.create_task(waker.poll("ws-a", read, lambda count: count > 1, 600))
        await asyncio.wait_for(reading.wait(), 60)
        hear(waker, 7, '[7,["ws-a"]]')  # its own: woken already
        hear(waker, 7, '[8,["ws-b"]]')
        await asyncio.sleep(0)
        assert len(seen) == 1
        hear(waker, 7, '[8,["ws-a"]]')
        await asyncio.wait_for(poll, 60)
        for payload in ('[8,["*everyone*"]]', "", "[8]", '{"a":1}'):
            seen.clear()
            reading.clear()
            poll = asyncio.create_task(waker.poll("ws-a", read, lambda count: count > 1, 600))
            await asyncio.wait_for(reading.wait(), 60)
            hear(waker, 7, payload)
            await asyncio.wait_for(poll, 60)

    asyncio.run(scenario())
    url = postgres.database()
    store = opened(url)
    with postgres.admin(name_of(url)) as listener:
        listener.execute("LISTEN saw_broker_wake")
        with pytest.raises(ZeroDivisionError), store.write() as tx:
            tx.touch("undone")
            raise ZeroDivisionError
        with store.write() as tx:
            tx.touch("ws-a")
        with store.write() as tx:
            tx.wake(*(f"ws-{number:064}" for number in range(LONGEST // 60)))
        got = [told.payload for told in listener.notifies(timeout=60, stop_after=2)]
    first, second = (msgspec.json.decode(payload, type=Told) for payload in got)
    assert first == Told(store.replica, (PERIMETER, SPONSORS, "*trail*", WORKSPACES, "ws-a"))
    assert second == Told(store.replica, ("*everyone*",))
    store.close()
