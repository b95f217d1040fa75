"""Of a workspace's own certificates those that ended are forgotten; what counts, and what is another's, stays."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from review_world import World
from sqlalchemy import select

from saw.broker import certificates
from saw.broker.clock import iso
from saw.broker.schema import certificates as table

pytestmark = pytest.mark.control("ID-02")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.broker.close()


def note(world: World, sha256: str, name: str = "ws-a", hours: float = 1) -> None:
    with world.broker.services.store.write() as tx:
        certificates.note_svid(tx.connection, name, sha256, world.now, world.now + timedelta(hours=hours))


def kept(world: World) -> set[str]:
    with world.broker.services.store.read() as connection:
        return set(connection.execute(select(table.c.sha256)).scalars())


def test_what_ended_is_forgotten_when_the_next_one_is_made(world: World) -> None:
    stamp = iso(world.now)
    with world.broker.services.store.write() as tx:
        row = {"name": "ws-a", "issued_at": stamp, "expires_at": stamp}
        tx.connection.execute(table.insert().values(sha256="perimeter", kind="perimeter", **row))
    note(world, "one")
    note(world, "another", name="ws-b")
    world.later(minutes=30)
    note(world, "two")
    assert kept(world) == {"perimeter", "one", "two", "another"}
    world.later(minutes=31)
    note(world, "three")
    assert kept(world) == {"perimeter", "two", "three", "another"}


def test_many_that_ended_go_some_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "FORGOTTEN", 2)
    for number in range(5):
        note(world, f"old-{number}")
    world.later(hours=2)
    left = []
    for number in range(3):
        note(world, f"new-{number}")
        left.append(len([one for one in kept(world) if one.startswith("old")]))
    assert left == [3, 1, 0]
    assert {"new-0", "new-1", "new-2"} <= kept(world)
