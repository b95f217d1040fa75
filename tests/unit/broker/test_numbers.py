"""Numbers of workspaces: each is one workspace's, given back at its end, and never sought among all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from review_world import OPERATOR, World
from sqlalchemy import create_engine, event, select
from workspaces_before import fill_before

from saw.addressing import HIGHEST, Band
from saw.broker.config import load_config
from saw.broker.errors import BrokerError
from saw.broker.number_settings import NumberSettings, problems_of_numbers
from saw.broker.numbers import first_gap
from saw.broker.registry import CreateWorkspace, Step
from saw.broker.schema import freed_numbers, workspace_requests, workspaces
from saw.broker.store import Store
from saw.broker.wake import Waker
from saw.errors import ConfigError


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.broker.close()


def with_numbers(world: World, settings: NumberSettings) -> None:
    """Have the broker of ``world`` give numbers by ``settings``."""
    services = world.broker.services
    object.__setattr__(services, "config", msgspec.structs.replace(services.config, numbers=settings))


def add(world: World, name: str, place: str = "", **more: Any) -> int:
    wanted = CreateWorkspace(name, "Ada", "coding", "stable", "i", place=place, **more)
    return int(world.broker.registry.create(OPERATOR, wanted)["number"])


def end(world: World, name: str) -> None:
    world.broker.registry.transition(OPERATOR, name, Step("decommissioned", "over"))


def held(world: World) -> list[int]:
    with world.broker.services.store.read() as connection:
        wanted = select(workspaces.c.number).where(workspaces.c.state != "decommissioned")
        return sorted(connection.execute(wanted).scalars())


def fill(world: World, numbers: Iterator[int] | range) -> None:
    """Put rows down that have these numbers, past the registry."""
    with world.broker.services.store.write() as tx:
        like = tx.connection.execute(select(workspaces)).first()
        assert like is not None
        rows = [
            {**like._asdict(), "id": f"w{number}", "number": number, "agent_id": f"a{number}"} for number in numbers
        ]
        tx.connection.execute(workspaces.insert(), rows)


def test_numbers_go_on_past_250(world: World) -> None:
    first = max(held(world))
    fill(world, range(first + 1, 251))
    assert [add(world, name) for name in ("n1", "n2")] == [251, 252]


def test_the_lowest_that_was_given_back_is_given_first(world: World) -> None:
    numbers = [add(world, f"n{index}") for index in range(5)]
    assert len(set(numbers)) == 5
    for index in (3, 1):
        end(world, f"n{index}")
    assert [add(world, f"again{index}") for index in range(3)] == [numbers[1], numbers[3], numbers[4] + 1]


def test_the_last_one_is_given_and_then_none(world: World) -> None:
    most = max(held(world)) + 2
    with_numbers(world, NumberSettings(most=most))
    assert [add(world, "n1"), add(world, "n2")] == [most - 1, most]
    with pytest.raises(BrokerError) as refused:
        add(world, "n3")
    assert (refused.value.code, refused.value.details["numbers"]) == ("no_free_number", most)
    assert "numbers.most" in refused.value.cure
    end(world, "n1")
    assert add(world, "n4") == most - 1
    with_numbers(world, NumberSettings(most=most + 1))
    assert add(world, "n5") == most + 1


def test_the_highest_number_there_is_can_be_given(world: World) -> None:
    with_numbers(world, NumberSettings(most=HIGHEST))
    fill(world, range(HIGHEST - 1, HIGHEST))
    assert add(world, "n1") == HIGHEST
    # Above it there is nothing; below it there are gaps, which are looked for before anybody is refused.
    assert add(world, "n2") == max(number for number in held(world) if number < 1000)


def test_a_place_has_numbers_of_its_own_and_nobody_else_gets_them(world: World) -> None:
    low = max(held(world))
    with_numbers(
        world, NumberSettings(most=low + 6, places={"east": Band(low + 2, low + 3), "west": Band(30_000, 30_001)})
    )
    assert [add(world, "e1", "east"), add(world, "w1", "west")] == [low + 2, 30_000]
    assert [add(world, f"n{index}") for index in range(4)] == [low + 1, low + 4, low + 5, low + 6]
    for place, name in (("", "n9"), ("south", "s1")):
        with pytest.raises(BrokerError) as refused:
            add(world, name, place)
        assert refused.value.code == ("unknown_place" if place else "no_free_number")
    assert add(world, "e2", "east") == low + 3
    with pytest.raises(BrokerError, match="of east are in use") as full:
        add(world, "e3", "east")
    assert "numbers.places.east" in full.value.cure
    end(world, "e1")
    with pytest.raises(BrokerError):
        add(world, "n9")
    assert add(world, "e3", "east") == low + 2


def test_a_perimeter_is_told_of_the_numbers_that_it_asks_for(world: World) -> None:
    fill(world, range(250, 253))
    end(world, "w251")

    def told(*band: int) -> list[int]:
        return [entry["number"] for entry in world.broker.views.perimeter_state(*band)["workspaces"]]

    everyone = held(world)
    assert told() == everyone
    assert told(1, 250) == [number for number in everyone if number <= 250]
    assert told(251, 64_000) == [252]
    assert told(2000, 3000) == []


def test_registrations_at_once_get_different_numbers(world: World) -> None:
    before = held(world)
    with ThreadPoolExecutor(8) as pool:
        given_ = list(pool.map(lambda index: add(world, f"n{index}"), range(40)))
    assert sorted(given_) == list(range(max(before) + 1, max(before) + 41))
    assert held(world) == sorted(before + given_)


def test_the_database_refuses_a_number_twice(world: World) -> None:
    with pytest.raises(Exception, match=r"UNIQUE|unique"):
        fill(world, range(held(world)[0], held(world)[0] + 1))


def test_a_number_that_an_older_broker_gave_is_not_given_again(world: World) -> None:
    number = add(world, "n1")
    with world.broker.services.store.write() as tx:
        tx.connection.execute(freed_numbers.insert().values(number=number))
    assert add(world, "n2") == number + 1


def test_one_place_is_part_of_the_request_and_none_is_as_before(world: World) -> None:
    with_numbers(world, NumberSettings(places={"east": Band(700, 800)}))
    number = add(world, "n1", "east", idempotency_key="key-1234")
    assert add(world, "n1", "east", idempotency_key="key-1234") == number == 700
    add(world, "n2", idempotency_key="key-5678")
    asked = {"id": "n2", "sponsor": "Ada", "blueprint": "coding", "ring": "stable", "image": "i"}
    before = json.dumps(["create", "n2", {**asked, "agent": "", "idempotency_key": "key-5678"}], separators=(",", ":"))
    with world.broker.services.store.read() as connection:
        query = select(workspace_requests.c.request_sha256).where(workspace_requests.c.workspace_id == "n2")
        assert connection.execute(query).scalar_one() == hashlib.sha256(before.encode()).hexdigest()
    with pytest.raises(BrokerError) as refused:
        add(world, "n1", idempotency_key="key-1234")
    assert refused.value.code == "idempotency_mismatch"


@pytest.mark.sqlite("the plan of a question to its file")
def test_no_registration_looks_at_every_workspace(world: World) -> None:
    with_numbers(world, NumberSettings(most=HIGHEST))
    fill(world, range(max(held(world)) + 1, 5001))
    end(world, "w400")
    engine, said = world.broker.services.store._engine, []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if statement.startswith("SELECT") and "number" in statement and "sponsor" not in statement:
            said.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    assert [add(world, "n1"), add(world, "n2")] == [400, 5001]
    event.remove(engine, "before_cursor_execute", note)
    assert said
    with engine.connect() as connection:
        for statement, parameters in said:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            steps = [str(row[3]) for row in plan if "workspaces" in str(row[3])]
            assert all(step.startswith("SEARCH") and "INDEX" in step for step in steps), steps


def test_an_upgraded_register_keeps_its_numbers_and_knows_the_gaps(tmp_path: Path) -> None:
    path = tmp_path / "broker.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        fill_before(connection)
        names = "sponsor, blueprint, ring, image, image_sha256, state, state_reason, state_since, created_at, watch_seq"
        copied = f"INSERT INTO workspaces (id, number, agent_id, {names}) SELECT 'ws-z', 6, 'z', {names}"
        connection.exec_driver_sql(f"{copied} FROM workspaces WHERE id = 'ws-a'")
    engine.dispose()
    store = Store.open_sqlite(path, Waker())
    with store.read() as connection:
        assert connection.execute(select(freed_numbers.c.number).order_by(freed_numbers.c.number)).scalars().all() == [
            2,
            3,
            4,
            5,
        ]
        rows = dict(connection.execute(select(workspaces.c.id, workspaces.c.number)).all())
    assert rows == {"ws-a": 1, "ws-b": 2, "ws-z": 6}
    store.close()


# --- The settings -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.lists(st.tuples(st.integers(1, 60), st.integers(0, 10)), max_size=4))
def test_bands_without_a_place_are_the_rest(most: int, kept: list[tuple[int, int]]) -> None:
    settings = NumberSettings(most, {str(index): Band(at, at + more) for index, (at, more) in enumerate(kept)})
    if list(problems_of_numbers(settings)):
        return
    found = [number for band in settings.bands("") for number in range(band.first, band.last + 1)]
    assert found == [
        number for number in range(1, most + 1) if not any(number in band for band in settings.places.values())
    ]


@given(st.sets(st.integers(5, 12)))
def test_the_first_gap_is_the_lowest_free_number(used: set[int]) -> None:
    free = [number for number in range(5, 13) if number not in used]
    assert first_gap(sorted(used), Band(5, 12)) == (free[0] if free else None)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"most": 0}, ">= 1"),
        ({"most": HIGHEST + 1}, "<= 64000"),
        ({"places": {"a": {"first": 5, "last": 4}}}, "numbers.places.a: first is above last"),
        ({"places": {"": {"first": 1, "last": 2}}}, "numbers.places must have names"),
        ({"places": {"a": {"first": 1, "last": 5}, "b": {"first": 5, "last": 9}}}, "places.a and numbers.places.b share numbers"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(tmp_path: Path, numbers: dict[str, Any], words: str) -> None:
    good = {"trust_domain": "a.b", "state_dir": "/s", "operator_socket": "/o", "server_names": ["a"]}
    file = tmp_path / "broker.json"
    file.write_text(json.dumps({**good, "numbers": {"most": 64_000, "places": {"a": {"first": 2, "last": 2}}}}))
    assert load_config(file).numbers.places == {"a": Band(2, 2)}
    file.write_text(json.dumps({**good, "numbers": numbers}))
    with pytest.raises(ConfigError, match=words):
        load_config(file)
