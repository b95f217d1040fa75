"""A broker whose disk is full: no change is acknowledged, what is stored is read, and with room it goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from review_world import OPERATOR, World
from sqlalchemy import event

from saw.broker.registry import Step
from saw.broker.store import RegisterFull

pytestmark = [
    pytest.mark.control("AUD-01"),
    pytest.mark.sqlite("PostgreSQL looks after its own disk, and says 53100 when it is full"),
]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.broker.close()


def limit(world: World, pages: int) -> None:
    """Let the register have no more than this many pages; fewer than it has means: not one more."""
    engine = world.broker.services.store._engine
    engine.dispose()

    def small(connection: Any, _record: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={pages}")

    event.listen(engine, "connect", small)


def head(world: World) -> int:
    return int(world.broker.trail.page("broker", 0, 1)["head"].seq)


def test_nothing_is_acknowledged_while_the_disk_is_full_and_it_goes_on_with_room(world: World) -> None:
    limit(world, 1)
    done, refused = 0, None
    while refused is None and done < 2000:  # what is left of the last page is used up first
        before, version = head(world), world.broker.registry.show("ws-a")["version"]
        try:
            world.broker.registry.transition(
                OPERATOR, "ws-a", Step("attesting" if done % 2 else "stopped", "night " * 40)
            )
            done += 1
        except RegisterFull as error:
            refused = error
    assert refused is not None
    assert (refused.code, refused.status) == ("database_full", 503)
    assert "nothing was changed" in refused.message
    assert (head(world), world.broker.registry.show("ws-a")["version"]) == (before, version)
    assert version == 1 + done
    with pytest.raises(RegisterFull):
        world.broker.registry.kill(OPERATOR, "ws-a", "x" * 4000)
    assert world.broker.registry.show("ws-a")["state"] != "quarantined"
    limit(world, 1_000_000)
    assert world.broker.registry.kill(OPERATOR, "ws-a", "drill")["state"] == "quarantined"
    assert world.broker.trail.verify()["complete"]


def test_another_fault_of_the_file_is_not_called_a_full_disk(world: World) -> None:
    with pytest.raises(Exception, match="no such table") as caught, world.broker.services.store.write() as tx:
        tx.connection.exec_driver_sql("SELECT * FROM nowhere")
    assert not isinstance(caught.value, RegisterFull)
