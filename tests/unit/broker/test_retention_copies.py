"""``saw audit verify`` on copies of a trail from which retention removed something: alone, with an archive, against the tree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from retention_world import CHOICE, RetentionWorld

from saw.audit import Head, link
from saw.audit.ship import Placed
from saw.audit.syslog import mark_of, message
from saw.cli.main import main

pytestmark = pytest.mark.control("AUD-02")
Said = dict[str, Any]


class Desk:
    """Another machine: an archive that was exported before the removal, and an export from after it."""

    def __init__(self, world: RetentionWorld) -> None:
        self.world, self.place = world, world.place
        world.say("ws-a", "the first word", 3)
        world.ship_in(2)
        self.archive = self.export("archive.jsonl")
        self.end = world.size()
        world.old()
        world.say("ws-a", "young")
        world.sign()
        (self.place / "tiles/checkpoint").rename(self.place / "checkpoint")
        self.tiles = self.place / f"tiles-{world.size()}"
        (self.place / "tiles/checkpoint").write_bytes((self.place / "checkpoint").read_bytes())
        assert world.pass_by() == self.end
        self.copy = self.export("trail.jsonl")

    def export(self, name: str) -> Path:
        """Write what ``saw audit export`` does."""
        file, trail = self.place / name, self.world.broker.trail
        sources = trail.page("broker", 0, 1)["sources"]
        events = [item for source in sources for item in trail.page(source, 0, 1000)["events"]]
        file.write_bytes(b"".join(msgspec.json.encode(item) + b"\n" for item in events))
        return file

    def tree(self) -> list[str]:
        key = str(self.place / "log.key.pub")
        return ["--checkpoint", str(self.place / "checkpoint"), "--key", key, "--tiles", str(self.tiles)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory):
    world = RetentionWorld(tmp_path_factory.mktemp("desk"))
    yield Desk(world)
    world.broker.close()


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*options: object) -> Said:
        code = main(["audit", "verify", *map(str, options), "--json"])
        said: Said = json.loads(capsys.readouterr().out)
        if code:
            said["codes"] = {(one["code"], one["source"], one["seq"]) for one in said["error"]["details"]["findings"]}
        return said

    return run


def test_a_copy_says_what_was_removed_and_an_archive_gives_it_back(desk: Desk, verify: Callable[..., Said]) -> None:
    said = verify("--file", desk.copy)
    assert (said["complete"], said["removed"]["events"]) == (True, desk.end)
    assert said["removed"]["first"] == "2026-11-26T08:00:00.000Z"
    whole = verify("--file", desk.copy, "--archive", desk.archive)
    assert (whole["complete"], whole["removed"]["events"]) == (True, 0)
    assert main(["audit", "verify", "--archive", str(desk.archive)]) == 1  # of which copy?
    assert {one["events"] for one in whole["chains"]} == {one["events"] for one in said["chains"]}


def test_against_the_tree_too(desk: Desk, verify: Callable[..., Said]) -> None:
    said = verify(*desk.tree(), "--file", desk.copy)
    assert (said["complete"], said["newer"], said["removed"]["events"]) == (True, 1, desk.end)
    whole = verify(*desk.tree(), "--file", desk.copy, "--archive", desk.archive)
    assert (whole["complete"], whole["removed"]["events"]) == (True, 0)
    # The archive proves itself by the same tree, as a part of it.
    assert verify(*desk.tree(), "--file", desk.archive, "--part")["complete"]


def test_an_archive_that_was_changed_gives_nothing_back(
    desk: Desk, verify: Callable[..., Said], tmp_path: Path
) -> None:
    changed = tmp_path / "changed.jsonl"
    changed.write_text(desk.archive.read_text().replace("the first word", "another word"))
    for options in (["--file", desk.copy], [*desk.tree(), "--file", desk.copy]):
        said = verify(*options, "--archive", changed)
        found = {code for code, _, _ in said["codes"]}
        assert "changed" in found
        assert found <= {"changed", "removed"}


def test_what_nobody_told_of_is_found_in_a_copy_alone_and_against_the_tree(
    desk: Desk, verify: Callable[..., Said], tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in desk.copy.read_text().splitlines()]
    young = next(one for one in lines if one["event"].get("message") == "young")
    young["event"] = {}
    emptied = tmp_path / "emptied.jsonl"
    emptied.write_text("".join(json.dumps(one) + "\n" for one in lines))
    untold = tmp_path / "untold.jsonl"
    untold.write_text("".join(json.dumps(one) + "\n" for one in lines if "retention.remove" not in json.dumps(one)))
    for options in ([], desk.tree()):
        assert verify(*options, "--file", emptied)["codes"] == {("removed", "broker", young["seq"])}
        assert len(verify(*options, "--file", untold)["codes"]) == desk.end + 1


def test_a_removal_that_names_another_tree_is_found(desk: Desk, verify: Callable[..., Said], tmp_path: Path) -> None:
    lines = [json.loads(line) for line in desk.copy.read_text().splitlines()]
    place = next(at for at, one in enumerate(lines) if "retention.remove" in json.dumps(one))
    lines[place]["event"]["unmapped"]["saw"]["removed"]["root"] = "0" * 64
    forged = link("broker", Head(lines[place]["seq"] - 1, lines[place]["prev"]), lines[place]["event"])
    lines[place] = msgspec.to_builtins(forged)
    file = tmp_path / "forged.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert {code for code, _, _ in verify(*desk.tree(), "--file", file)["codes"]} == {"tree_forked"}


def test_a_receiver_that_was_told_an_event_before_it_was_removed_keeps_it(
    desk: Desk, verify: Callable[..., Said], tmp_path: Path
) -> None:
    archived = {(one["source"], one["seq"]): one for one in map(json.loads, desk.archive.read_text().splitlines())}
    log = desk.world.broker.trail.log(0, 1000, CHOICE)["events"]
    shipped = []
    for again in (False, True):
        for one in log:
            with_content = archived.get((one["source"], one["seq"])) if not again else None
            item = msgspec.convert({**one, **(with_content or {})}, Placed)
            mark = mark_of(Head(item.seq - 1, item.prev), item)
            assert (mark == "removed") == (not item.event)
            shipped.append(message(item, item.position, mark, "host", 1 << 20))
    file = tmp_path / "audit.log"
    file.write_bytes(b"".join(raw + b"\n" for raw in shipped))
    said = verify("--syslog", "--file", file)
    assert (said["complete"], said["removed"]["events"]) == (True, 0)
    file.write_bytes(b"".join(raw + b"\n" for raw in shipped[len(log) :]))
    assert verify("--syslog", "--file", file)["removed"]["events"] == desk.end


def test_people_are_told_on_a_line_of_its_own(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "verify", "--file", str(desk.copy)]) == 0
    said = capsys.readouterr().out
    assert f"retention removed the content of {desk.end} events, from 2026-11-26T08:00:00.000Z to" in said
    assert main(["audit", "verify", "--file", str(desk.archive)]) == 0
    assert "retention removed" not in capsys.readouterr().out
