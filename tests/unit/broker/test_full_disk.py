"""A full disk under the broker's database: a refusal that says so, and room for kills."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import psycopg
import pytest
from review_world import OPERATOR, World
from sqlalchemy.exc import OperationalError
from starlette.applications import Starlette
from starlette.routing import Route

from saw.broker import attestation, full_disk, postgres
from saw.broker.errors import NotAttestedError, StorageFull
from saw.broker.full_disk import Reserve, translated
from saw.broker.http import guarded
from saw.broker.store import Store
from saw.broker.wake import Waker


def failing(code: int) -> OperationalError:
    fault = sqlite3.OperationalError("database or disk is full")
    fault.sqlite_errorcode = code
    return OperationalError("INSERT", {}, fault)


def test_the_word_of_the_database_for_a_full_disk_is_a_refusal_and_no_other_is(tmp_path: Path) -> None:
    with pytest.raises(StorageFull) as refused, translated(tmp_path):
        raise failing(sqlite3.SQLITE_FULL)
    assert (refused.value.status, refused.value.code, bool(refused.value.cure)) == (507, "storage_full", True)
    with pytest.raises(OperationalError), translated(tmp_path):
        raise failing(sqlite3.SQLITE_BUSY)


@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_FSYNC])
def test_a_write_that_fails_is_put_down_to_a_full_disk_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with pytest.raises(OperationalError), translated(tmp_path):
        raise failing(code)
    monkeypatch.setattr(full_disk, "takes_no_more", lambda place: place == tmp_path)
    with pytest.raises(StorageFull), translated(tmp_path):
        raise failing(code)
    with pytest.raises(OperationalError), translated(tmp_path):
        raise failing(sqlite3.SQLITE_IOERR_READ)


@pytest.mark.control("LIF-02")
def test_what_is_urgent_is_done_in_the_room_that_is_set_aside_before_anybody_else_writes(tmp_path: Path) -> None:
    store = Store.open_sqlite(tmp_path / "register.db", Waker())
    store.set_room_aside()
    order: list[str] = []

    def another() -> None:
        with store.write():
            order.append("another")

    other = threading.Thread(target=another)

    def kill() -> str:
        order.append("kill")
        if len(order) == 1:
            other.start()
            raise StorageFull
        assert not (tmp_path / "reserve").exists()
        return "killed"

    assert store.urgently(kill) == "killed"
    other.join(60)
    assert order == ["kill", "kill", "another"]
    with pytest.raises(StorageFull):
        store.urgently(lambda: (_ for _ in ()).throw(StorageFull()))
    store.close()


@pytest.mark.parametrize(("number", "answer"), [(errno.ENOSPC, (507, "storage_full")), (errno.EIO, (500, "internal"))])
def test_a_file_that_finds_no_room_is_refused_alike_and_names_no_place(number: int, answer: tuple[int, str]) -> None:
    async def write(_request: object, _caller: object) -> None:
        raise OSError(number, os.strerror(number), "/var/lib/saw/broker/tuf/x")

    app = Starlette(routes=[Route("/", guarded(lambda _: None, write))])  # type: ignore[arg-type,return-value]

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://broker") as client:
            return await client.get("/")

    found = asyncio.run(ask())
    assert (found.status_code, found.json()["code"]) == answer
    assert "/var" not in found.text


def test_room_is_set_aside_once_given_back_once_and_set_aside_again(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "reserve", 8192)
    assert not reserve.spend(), "there is none yet"
    for _ in range(2):
        reserve.keep()
        assert (tmp_path / "reserve").stat().st_blocks * 512 >= 8192
    assert reserve.spend()
    assert not reserve.spend()
    assert list(tmp_path.iterdir()) == []
    reserve.keep()
    assert reserve.spend()


def test_room_that_cannot_be_set_aside_is_said_and_holds_up_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reserve = Reserve(tmp_path / "gone" / "reserve")
    reserve.keep()
    assert "no room can be set aside for kills" in caplog.text
    assert not reserve.spend()


def test_postgresql_says_so_in_its_own_word() -> None:
    with pytest.raises(StorageFull), postgres.translated():
        raise psycopg.errors.DiskFull
    with pytest.raises(postgres.DatabaseUnavailable), postgres.translated():
        raise psycopg.errors.AdminShutdown


@pytest.mark.parametrize(
    "error", [StorageFull(), postgres.DatabaseBusy("busy", cure="again"), RuntimeError("a fault")], ids=repr
)
def test_a_database_without_room_or_time_says_nothing_about_a_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """What else goes wrong in granting ends as "not attested"."""
    world = World(tmp_path)
    found = SimpleNamespace(ok=True, policy_digest="d", clock=object(), failures=())
    release = SimpleNamespace(policy_digest="d", lease_ttl_s=60)
    for name, answer in (
        ("_verify", found), ("assigned_release", release), ("released_digests", ()), ("expected_boot", ({}, "")),
    ):  # fmt: skip
        monkeypatch.setattr(attestation, name, lambda *_, answer=answer: answer)

    def grant(*_: object) -> None:
        raise error

    part = world.broker.attestation
    monkeypatch.setattr(part, "_precondition", lambda *_: None)
    monkeypatch.setattr(part, "_grant", grant)
    expected = NotAttestedError if isinstance(error, RuntimeError) else type(error)
    with pytest.raises(expected):
        part.quote(OPERATOR, SimpleNamespace(nonce=b"n", workspace_id="ws-a"))  # type: ignore[arg-type]
    world.broker.close()
