"""What is old and kept elsewhere loses its content, and nothing else does; what was removed untold is found."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retention_world import CHOICE, DAYS, EDGE, RetentionWorld
from review_world import OPERATOR

from saw.audit import Head, link, verify_chain
from saw.audit.choose import Choice
from saw.audit.merkle import Edge, leaf_hash
from saw.audit.removal import OPERATION, Removals, ranges_of, removal_of
from saw.audit.tiles import Levels
from saw.broker import retention
from saw.broker.config import load_config
from saw.broker.errors import MalformedError
from saw.broker.holds import AddHold, ReleaseHold
from saw.broker.perimeter import Shipment
from saw.broker.schema import audit_events
from saw.errors import ConfigError

pytestmark = pytest.mark.control("AUD-02")


@pytest.fixture
def world(tmp_path: Path):
    found = RetentionWorld(tmp_path)
    yield found
    found.broker.close()


def codes(world: RetentionWorld) -> set[tuple[str, str, int]]:
    return {(one.code, one.source, one.seq) for one in world.broker.trail.verify()["findings"]}


def test_what_is_old_and_signed_goes_is_told_and_the_whole_trail_is_proved_still(world: RetentionWorld) -> None:
    world.say("ws-a", "the first word", 3)
    world.ship_in(2)
    end = world.size()
    before = world.rows()
    world.old()
    world.say("ws-a", "young")
    world.sign()
    assert world.pass_by() == end
    assert world.gone() == list(range(1, end + 1))
    after = world.rows()
    assert [(row.source, row.seq, row.prev, row.hash) for row in before] == [
        (row.source, row.seq, row.prev, row.hash) for row in after[:end]
    ]
    told = removal_of("broker", msgspec.json.decode(after[-1].event))
    assert told is not None
    assert (told.count, told.days, told.size) == (end, DAYS, end + 1)
    assert [(one.source, one.ranges) for one in told.chains] == [("broker", ((1, end - 2),)), ("edge", ((1, 2),))]
    report = world.broker.trail.verify()
    assert report["complete"], report
    assert report["removed"] == {"events": end, "first": "2026-11-26T08:00:00.000Z", "last": "2026-11-26T08:00:00.000Z"}
    assert {one["source"]: one["removed"] for one in report["chains"]} == {"broker": end - 2, "edge": 2}
    assert world.pass_by() == 0
    world.old()
    assert world.pass_by() == 1  # the young one, and never what told of the removal
    world.old(500)
    world.sign()
    assert world.pass_by() == 0
    assert world.broker.trail.verify()["complete"]
    assert world.operations().count(OPERATION) == 2


def test_what_is_young_unsigned_or_unshipped_stays_and_its_neighbour_goes(tmp_path: Path) -> None:
    world = RetentionWorld(tmp_path, witnessed=True, shipped=True)
    world.say("ws-a", count=4)
    end = world.size()
    assert world.broker.retention.tick() == 0  # young
    world.old()
    assert world.broker.retention.tick() == 0  # there is no checkpoint
    world.sign(end - 1)
    assert world.broker.retention.tick() == 0  # the witness did not sign
    world.sign(end - 1, witnessed=True)
    assert world.broker.retention.tick() == 0  # there is no cursor
    world.acknowledge(end - 2)
    assert world.pass_by() == end - 2
    world.acknowledge(end)
    assert world.pass_by() == 1
    assert world.gone() == list(range(1, end))
    world.broker.close()


def test_a_cursor_of_another_trail_releases_nothing(tmp_path: Path) -> None:
    world = RetentionWorld(tmp_path, shipped=True)
    world.say(count=2)
    world.old()
    world.sign()
    world.acknowledge(world.size())
    file = tmp_path / "cursor.json"
    right = file.read_bytes()
    file.write_bytes(right.replace(world.rows()[-1].hash.encode(), b"0" * 64))
    assert world.pass_by() == 0
    file.write_bytes(right)
    assert world.pass_by() == world.size() - 1
    world.broker.close()


@pytest.mark.parametrize("defect", ["lie", "other_key", "cut"])
def test_a_checkpoint_that_is_not_of_this_trail_removes_nothing(world: RetentionWorld, defect: str) -> None:
    world.say(count=3)
    world.old()
    world.sign(lie=defect == "lie")
    file = world.place / "tiles/checkpoint"
    if defect == "other_key":
        (world.place / "log.key.pub").write_text(RetentionWorld(world.place / "other").signer.public.line)
    elif defect == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    for _ in range(3):
        assert world.broker.retention.tick() == 0
    assert world.gone() == []
    events = world.broker.trail.page("broker", 0, 1000)["events"]
    findings = [item for item in events if item.event["class_uid"] == 2004]
    assert [item.event["finding_info"]["types"] for item in findings] == (
        [["trail_not_signed"]] if defect == "lie" else []
    )
    (world.place / "log.key.pub").write_text(world.signer.public.line)
    world.sign()
    assert world.pass_by() > 3


def test_content_that_nobody_removed_rightly_is_found(world: RetentionWorld) -> None:
    world.say(count=6)
    world.ship_in(3)
    world.old()
    world.say(count=2)
    world.sign(8)
    world.pass_by()
    assert world.broker.trail.verify()["complete"]
    columns = audit_events.c
    place = (columns.source == "edge") & (columns.seq == 2)
    with world.broker.services.store.write() as tx:
        tx.connection.execute(audit_events.update().where(place).values(event="", at=None))
    assert codes(world) == {("removed", "edge", 2)}
    # and so are a changed hash of what went, and a telling that was changed itself
    with world.broker.services.store.write() as tx:
        tx.connection.execute(
            audit_events.update().where((columns.source == "broker") & (columns.seq == 3)).values(hash="0" * 64)
        )
    assert ("relinked", "broker", 4) in codes(world)
    last = world.rows()[-1]
    with world.broker.services.store.write() as tx:
        wide = last.event.replace('"ranges":[[1,', '"ranges":[[1,9999],[1,')
        assert wide != last.event
        tx.connection.execute(audit_events.update().where(columns.position == last.position).values(event=wide))
    found = codes(world)
    assert ("changed", "broker", last.seq) in found
    assert ("removed", "broker", 1) in found


def test_what_somebody_changed_is_not_removed(world: RetentionWorld) -> None:
    world.say(text="as it was", count=2)
    place = audit_events.c.position == world.size()
    world.old()
    world.sign()
    with world.broker.services.store.write() as tx:
        text = world.rows()[-1].event.replace("as it was", "as it is")
        tx.connection.execute(audit_events.update().where(place).values(event=text))
    world.pass_by()
    end = world.rows()[-2]
    assert end.event
    assert codes(world) == {("changed", "broker", end.seq)}


def test_readers_go_past_what_was_removed_and_the_shipper_gets_its_place(world: RetentionWorld) -> None:
    world.say("ws-a", count=3)
    made = world.ship_in(2)
    world.old()
    world.say("ws-a", "young")
    world.sign()
    count = world.pass_by()
    trail = world.broker.trail
    log = trail.log(0, 1000, CHOICE)["events"]
    assert [one["position"] for one in log] == list(range(1, len(log) + 1))
    assert [one["event"] for one in log[:count]] == [{}] * count
    assert [one["event"]["message"] for one in trail.log(0, 1000, Choice(workspace="ws-a"))["events"]] == ["young"]
    assert trail.log(0, 1000, Choice(until=2**52))["events"][0]["position"] > count
    assert len(trail.back(None, 100, CHOICE)["events"]) == len(log) - count
    # What a perimeter host tells again is known by its hash; an event of it that is empty is refused.
    assert world.broker.views.accept_events(EDGE, Shipment("edge", tuple(made))) == {"accepted": 2}
    assert world.gone() == list(range(1, count + 1))
    with pytest.raises(MalformedError, match="does not match"):
        world.broker.views.accept_events(EDGE, Shipment("edge", (link("edge", world.chain.head, {}),)))


@pytest.mark.sqlite(
    "PostgreSQL's own files keep what VACUUM has not reached; the rows are gone, which the others here show"
)
def test_the_words_are_gone_from_the_file(world: RetentionWorld) -> None:
    word = "a-name-that-nobody-else-has"
    world.say(text=word, count=20)

    def there() -> bool:
        with sqlite3.connect(world.config.database) as raw:
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return word.encode() in world.config.database.read_bytes()

    assert there()
    world.old()
    world.sign()
    world.pass_by()
    assert not there()


def test_a_step_is_bounded_and_several_are_told_apart(world: RetentionWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "STEP", 5)
    monkeypatch.setattr("saw.broker.covered.LEAVES", 4)
    world.say(count=12)
    end = world.size()
    world.old()
    world.sign()
    steps = [world.broker.retention.tick() for _ in range(12)]
    assert max(steps) == 5
    assert sum(steps) == end
    assert world.operations().count(OPERATION) == len([one for one in steps if one])
    assert world.broker.trail.verify()["removed"]["events"] == end


def test_what_is_held_keeps_nothing_behind_it_from_its_turn(
    world: RetentionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STEP", 2)
    monkeypatch.setattr(retention, "STEPS", 2)
    world.say("ws-a", count=9)
    world.say("ws-b")
    place = world.size()
    hold = world.broker.holds.add(OPERATOR, AddHold("case 7", "ws-a"))["id"]
    world.old()
    for _ in range(10):
        world.say("ws-b", "young")
        world.sign()  # each time there is another checkpoint
        world.broker.retention.catch_up()
    assert place in world.gone()
    world.broker.holds.release(OPERATOR, hold, ReleaseHold("closed"))
    for _ in range(20):
        world.broker.retention.catch_up()
    assert world.gone() == list(range(1, place + 2)), "and the event that told of the hold"


KILLED = """\
import os, signal, sys
from datetime import datetime
from pathlib import Path
import msgspec
from saw.broker.config import load_config
from saw.broker.core import Broker
from saw.broker.store import Transaction

how, place, now = sys.argv[1:]
broker = Broker.open(load_config(place), lambda: datetime.fromisoformat(now), os.urandom)
record = Transaction.record

def killed(self, *events):
    if how == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    record(self, *events)
    if how == "behind":
        os.kill(os.getpid(), signal.SIGKILL)

Transaction.record = killed
broker.retention.tick()
print(broker.retention.tick(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_broker_that_is_killed_has_removed_and_told_or_neither(world: RetentionWorld) -> None:
    world.say(count=4)
    world.old()
    world.sign()
    end = world.size()
    told = {"trust_domain": "saw.example", "state_dir": world.config.state_dir, "server_names": ["b.saw.internal"]}
    told |= {"operator_socket": world.config.operator_socket, "audit": msgspec.to_builtins(world.config.audit)}
    if world.config.postgresql is not None:
        told["database"] = world.config.postgresql
    config = world.place / "broker.json"
    config.write_bytes(msgspec.json.encode(told))
    world.broker.close()
    for how, gone in (("before", 0), ("behind", 0), ("never", end)):
        command = [sys.executable, "-c", KILLED, how, str(config), world.now.isoformat()]
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        world.crash()
        assert len(world.gone()) == gone
        assert world.operations().count(OPERATION) == (1 if gone else 0)
        assert world.broker.trail.verify()["complete"]
        world.broker.services.store.close()
    world.open_broker()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"retention": "34d"}, "audit.retention"),
        ({"retention": "400"}, "audit.retention"),
        ({"retention": "40000d"}, "audit.retention"),
        ({"checkpoint": "tiles/checkpoint"}, "absolute"),
        ({"witnesses": ["key"]}, "absolute"),
        ({"shipped": None}, "audit.shipped"),
        ({"keep": 1}, "keep"),
    ],
)
def test_settings_are_read_strictly(tmp_path: Path, change: dict[str, object], said: str) -> None:
    kept = {"retention": "35d", "checkpoint": "/t/checkpoint", "key": "/k", "shipped": "/var/lib/saw/audit/cursor.json"}
    base = {"trust_domain": "saw.example", "state_dir": "/s", "operator_socket": "/o", "server_names": ["b.internal"]}
    file = tmp_path / "broker.json"
    file.write_bytes(msgspec.json.encode({**base, "audit_socket": "/a", "audit": {**kept, **change}}))
    if said:
        with pytest.raises(ConfigError, match=said):
            load_config(file)
    else:
        audit = load_config(file).audit
        assert audit is not None
        assert audit.days == 35


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), max_size=40), st.integers(0, 40))
def test_exactly_what_is_named_counts_as_removed(going: list[bool], more: int) -> None:
    """Whatever is emptied: verification passes exactly when each empty event is one that a later event names."""
    head, events = Head(), []
    for number in range(len(going)):
        events.append(link("broker", head, {"n": number + 1}))
        head = Head(events[-1].seq, events[-1].hash)
    named = [item.seq for item, goes in zip(events, going, strict=True) if goes]
    if named:
        said = {
            "chains": msgspec.to_builtins(ranges_of(("broker", seq) for seq in named)),
            "count": len(named), "first": 1, "last": 2, "before": 3, "days": 40, "size": 1, "root": "0" * 64,
        }  # fmt: skip
        event = {"api": {"operation": OPERATION}, "unmapped": {"saw": {"removed": said}}}
        events.append(link("broker", head, event))
    emptied = {*named, *([more] if 1 <= more <= len(going) else [])}
    stored = [msgspec.structs.replace(one, event={}) if one.seq in emptied else one for one in events]
    report = verify_chain(stored, told=Removals(stored).tell)
    assert report.complete == (emptied <= set(named))
    assert report.removed == len(named)
    assert {finding.seq for finding in report.findings} == emptied - set(named)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_the_edge_of_a_tree_grows_to_the_root_that_tiles_have(first: int, more: int) -> None:
    levels, edge = Levels(), Edge()
    for number in range(first + more):
        if number == first:
            edge = Edge(edge.size, edge.hashes)
        leaf = leaf_hash(str(number).encode())
        levels.add(leaf)
        edge.add(leaf)
    assert edge.root() == levels.root()
