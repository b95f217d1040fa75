"""What time alone does to sessions: the longest duration, a bastion that asks no more, a person who lost the workspace."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from session_world import ADA, EDGE, START, World

from saw.broker.clock import iso
from saw.broker.config import load_config
from saw.broker.schema import people, sso_sessions, workspaces
from saw.errors import ConfigError
from saw.sessions.messages import Closing


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.control("ID-03")
def test_a_session_is_told_to_end_when_it_has_lasted_long_enough(world: World) -> None:
    session = world.open()
    world.passes(595, session)
    assert world.state(session) == ("open", None)
    world.passes(5, session)
    assert world.state(session) == ("ending", "max_duration")
    world.sessions.close(EDGE, session, Closing("max_duration", digest="a" * 64))
    assert world.state(session) == ("closed", "max_duration")


@pytest.mark.control("ID-02")
def test_a_session_about_which_no_bastion_asks_is_closed_and_a_late_report_is_believed(world: World) -> None:
    session, kept = world.open(), world.open()
    world.passes(25, kept)
    assert world.state(session) == ("open", None)
    world.passes(10, kept)
    assert world.state(session) == ("closed", "bastion_lost")
    assert world.state(kept) == ("open", None)
    assert world.sessions.close(EDGE, session, Closing("closed", digest="b" * 64)) == {"changed": True}
    assert world.sessions.show(session)["recording"] == "b" * 64
    assert world.state(session) == ("closed", "closed")


@pytest.mark.control("ID-02")
def test_a_bastion_is_not_lost_for_what_it_could_not_ask_while_the_broker_was_away(world: World) -> None:
    session, kept = world.open(), world.open()
    world.now += timedelta(minutes=5)
    world.start()
    world.sessions.tick()
    assert world.state(session) == ("open", None)
    world.passes(25, kept)
    assert world.state(session) == ("open", None)
    world.passes(5, kept)
    assert world.state(session) == ("closed", "bastion_lost")
    assert world.state(kept) == ("open", None)


@pytest.mark.control("ID-03")
@pytest.mark.parametrize("loss", ["sponsor", "role", "provider"])
def test_a_person_who_is_no_longer_entitled_loses_the_session_at_the_next_look(world: World, loss: str) -> None:
    session, operators = world.open(person=ADA, sign_in="ss-1"), world.open()
    world.passes(10, session, operators)
    assert world.state(session) == ("open", None)
    change = {
        "sponsor": workspaces.update().values(sponsor="ben@example.com"),
        "role": people.update().values(roles='["auditor"]'),
        "provider": people.update().values(entitled_until=iso(world.now)),
    }[loss]
    with world.broker.services.store.write() as tx:
        tx.connection.execute(change)
    world.passes(5, session, operators)
    assert world.state(session) == ("ending", "not_entitled")
    assert world.state(operators) == ("open", None)


def test_a_live_session_is_a_use_of_its_sign_in(world: World) -> None:
    session = world.open(person=ADA, sign_in="ss-1")
    world.passes(60, session)
    with world.broker.services.store.read() as connection:
        assert connection.execute(sso_sessions.select()).one().seen_at > iso(START + timedelta(seconds=50))


@pytest.mark.parametrize("field", ["max_duration_s", "lease_s"])
def test_bounds_of_sessions_are_checked(tmp_path: Path, field: str) -> None:
    file = tmp_path / "broker.json"
    good = '{"trust_domain": "a.b", "state_dir": "/s", "operator_socket": "/o", "server_names": ["b"], "sessions": {"%s": %d}}'
    file.write_text(good % (field, 60))
    assert getattr(load_config(file).sessions, field) == 60
    file.write_text(good % (field, 1))
    with pytest.raises(ConfigError, match=field):
        load_config(file)
