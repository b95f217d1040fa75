"""What bastions hand in is what they announced, is kept once, and goes when its time is over."""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from recorded import record
from session_world import EDGE, OPERATOR, RULES, World

from saw.broker.config import load_config
from saw.broker.context import Caller
from saw.broker.errors import BrokerError
from saw.broker.holds import AddHold, ReleaseHold
from saw.errors import ConfigError
from saw.identity.sealed import SealKey
from saw.sessions.recording import events, verify

KEEP_DAYS = 30


@pytest.fixture
def world(tmp_path: Path) -> World:
    rules = msgspec.structs.replace(RULES, max_recording_bytes=1024**2, keep_recordings_days=KEEP_DAYS)
    return World(tmp_path, rules)


class Handed:
    """A session that is over, and its recording on the bastion."""

    def __init__(self, world: World, directory: Path, said: str = "hello") -> None:
        self.world = world
        self.session = world.open()
        self.key = SealKey(bytes.fromhex(world.sessions.recording_key(OPERATOR, self.session)["key"]), os.urandom)
        file = directory / self.session
        self.closing = record(file, self.session, self.key, said)
        self.raw = file.read_bytes()

    def close(self) -> None:
        assert self.world.sessions.close(EDGE, self.session, self.closing) == {"changed": True}

    def hand_in(self, raw: bytes | None = None, caller: Caller = EDGE) -> dict[str, object]:
        async def pieces() -> AsyncIterator[bytes]:
            whole = self.raw if raw is None else raw
            for start in range(0, len(whole), 65536):
                yield whole[start : start + 65536]

        return asyncio.run(self.world.broker.recordings.receive(caller, self.session, pieces()))

    def refused(self, raw: bytes | None = None, caller: Caller = EDGE) -> str:
        with pytest.raises(BrokerError) as error:
            self.hand_in(raw, caller)
        return error.value.code

    def kept(self) -> list[str]:
        place = self.world.broker.recordings.place
        return sorted(file.name for file in place.iterdir()) if place.is_dir() else []


@pytest.fixture
def handed(world: World, tmp_path: Path) -> Handed:
    return Handed(world, tmp_path)


@pytest.mark.control("ID-02")
def test_a_recording_that_was_announced_is_kept_once_and_can_be_read_with_its_key(handed: Handed) -> None:
    handed.close()
    assert handed.hand_in() == {"changed": True}
    file = handed.world.broker.recordings.file(handed.session)
    assert file.read_bytes() == handed.raw
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(file.parent.stat().st_mode)) == (0o600, 0o700)
    assert verify(file, handed.session, handed.key, digest=handed.closing.digest).ending is not None
    assert [event.data for event in events(file, handed.session, handed.key)] == [b"hello"]
    assert handed.hand_in(b"anything") == {"changed": False}
    assert file.read_bytes() == handed.raw
    assert handed.kept() == [f"{handed.session}.sawrec"]


@pytest.mark.control("ID-02")
@pytest.mark.parametrize("change", ["byte", "cut", "other", "nothing"])
def test_what_was_not_announced_is_refused_and_the_announced_one_is_taken_afterwards(
    handed: Handed, tmp_path: Path, change: str
) -> None:
    handed.close()
    middle = len(handed.raw) // 2
    wrong = {
        "byte": handed.raw[:middle] + bytes([handed.raw[middle] ^ 1]) + handed.raw[middle + 1 :],
        "cut": handed.raw[:-200],
        "other": Handed(handed.world, tmp_path, "something else").raw,
        "nothing": b"",
    }[change]
    assert handed.refused(wrong) == "recording_differs"
    assert handed.kept() == []
    with pytest.raises(BrokerError, match="not here yet"):
        handed.world.broker.recordings.file(handed.session)
    assert handed.hand_in() == {"changed": True}


@pytest.mark.control("ID-02")
def test_only_the_bastion_of_a_session_hands_in_and_only_after_its_end(handed: Handed) -> None:
    assert handed.refused() == "session_not_recorded"
    handed.close()
    assert handed.refused(caller=Caller("bastion:other", "192.0.2.9", "r")) == "foreign_session"
    assert handed.kept() == []
    assert handed.hand_in() == {"changed": True}


def test_one_that_is_too_large_and_one_that_finds_no_room_leave_nothing(handed: Handed) -> None:
    handed.close()
    assert handed.refused(bytes(1024**2 + 1)) == "too_large"
    assert handed.kept() == []
    place = handed.world.broker.recordings.place
    place.rmdir()
    place.write_text("a file is in the way of the folder")
    assert handed.refused() == "no_room"
    place.unlink()
    assert handed.hand_in() == {"changed": True}


def test_recordings_go_with_their_keys_when_their_time_is_over(handed: Handed, tmp_path: Path) -> None:
    world, later = handed.world, None
    handed.close()
    handed.hand_in()
    world.now += timedelta(days=KEEP_DAYS - 1)
    later = Handed(world, tmp_path)
    later.close()
    later.hand_in()
    world.broker.recordings.tick()
    assert handed.kept() == sorted(f"{one.session}.sawrec" for one in (handed, later))
    world.now += timedelta(days=1)
    world.broker.recordings.tick()
    assert handed.kept() == [f"{later.session}.sawrec"]
    with pytest.raises(BrokerError, match="was removed at") as gone:
        world.broker.recordings.file(handed.session)
    assert gone.value.code == "recording_removed"
    with pytest.raises(BrokerError, match="has no recording") as keyless:
        world.sessions.recording_key(OPERATOR, handed.session)
    assert "removed at" in keyless.value.cure
    assert handed.hand_in() == {"changed": False}, "nor does it come back"
    assert world.sessions.recording_key(OPERATOR, later.session)["digest"] == later.closing.digest


def test_a_part_that_a_killed_broker_left_is_gone_after_its_restart(handed: Handed) -> None:
    handed.close()
    handed.hand_in()
    (handed.world.broker.recordings.place / ".incoming-abc").write_bytes(handed.raw[:10])
    handed.world.start()
    assert handed.kept() == [f"{handed.session}.sawrec"]


def test_a_part_that_another_broker_is_taking_in_stays(handed: Handed) -> None:
    handed.close()
    handed.hand_in()
    part = handed.world.broker.recordings.place / ".incoming-abc"
    with part.open("wb") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        handed.world.start()
        assert part.exists()
    handed.world.start()
    assert not part.exists()


def test_a_recording_that_is_held_stays_until_it_is_released(handed: Handed) -> None:
    world, recordings = handed.world, handed.world.broker.recordings
    handed.close()
    handed.hand_in()
    assert recordings.hold(OPERATOR, handed.session, "case 7") is True
    assert recordings.hold(OPERATOR, handed.session, "another") is False
    held = world.sessions.show(handed.session)["recording_held"]
    assert (held["by"], held["reason"]) == (OPERATOR.principal, "case 7")
    world.now += timedelta(days=10 * KEEP_DAYS)
    recordings.tick()
    assert handed.kept() == [f"{handed.session}.sawrec"]
    assert recordings.release(OPERATOR, handed.session, "closed") is True
    assert recordings.release(OPERATOR, handed.session, "closed") is False
    recordings.tick()
    assert handed.kept() == []
    with pytest.raises(BrokerError) as gone:
        recordings.hold(OPERATOR, handed.session, "too late")
    assert gone.value.code == "session_not_recorded"


@pytest.mark.parametrize(("field", "value"), [("max_recording_bytes", 1), ("keep_recordings_days", -1)])
def test_bounds_that_make_no_sense_are_named(world: World, tmp_path: Path, field: str, value: int) -> None:
    file = tmp_path / "broker.json"
    rules = msgspec.structs.replace(world.config.sessions, **{field: value})
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(world.config, sessions=rules)))
    with pytest.raises(ConfigError, match=f"sessions.{field} must be"):
        load_config(file)


def test_a_recording_stays_while_its_workspace_is_held(handed: Handed) -> None:
    world, holds = handed.world, handed.world.broker.holds
    handed.close()
    handed.hand_in()
    hold = holds.add(OPERATOR, AddHold("case 7", "ws-a"))["id"]
    world.now += timedelta(days=10 * KEEP_DAYS)
    world.broker.recordings.tick()
    assert handed.kept() == [f"{handed.session}.sawrec"]
    # One hold of the recording itself, and one of its workspace: both have to be released.
    assert world.broker.recordings.hold(OPERATOR, handed.session, "case 8")
    listed = [one["session"] for one in holds.listed(everything=False)["holds"]]
    assert sorted(listed, key=str) == sorted([None, handed.session], key=str)
    assert holds.release(OPERATOR, hold, ReleaseHold("closed"))["changed"]
    world.broker.recordings.tick()
    assert handed.kept() == [f"{handed.session}.sawrec"]
    assert world.broker.recordings.release(OPERATOR, handed.session, "closed")
    world.broker.recordings.tick()
    assert handed.kept() == []
