"""The page on PostgreSQL and replicas as it is written: a database is made, a broker's file copied into it, and backed up."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import pytest
from page import run_page
from postgres_rig import Server, programs
from review_world import World

from saw.broker.core import Broker

pytestmark = pytest.mark.control("FLT-01")


def test_the_page_on_replicas(postgres: Server, tmp_path: Path) -> None:
    world = World(tmp_path / "old")
    world.broker.close()
    config = msgspec.structs.replace(world.config, postgresql=f"postgresql://page@/page?host={postgres.directory}")
    file = tmp_path / "broker.json"
    file.write_bytes(msgspec.json.encode(config))
    places = {"--no-createdb saw": "--no-createdb page", "--owner=saw": "--owner=page", "UTF-8 saw": "UTF-8 page"}
    places |= {"saw.dump saw": "saw.dump page", "/etc/saw/broker.json": str(file)}
    path = f"{Path(sys.executable).parent}:{programs()}:/usr/bin:/bin"
    environment = {"PATH": path, "PGHOST": str(postgres.directory), "PGUSER": "saw"}
    run_page("docs/replicas.md", tmp_path, environment, lambda _: {}, places)
    broker = Broker.open(config, lambda: world.now, os.urandom)
    try:
        assert broker.registry.show("ws-a")["state"] == "active"
    finally:
        broker.close()
    assert (tmp_path / "saw.dump").read_bytes().startswith(b"PGDMP")
