"""A witness that looks by itself: it signs what continues in time, and says loudly, and for long enough, all that is not so."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from tree_rig import Log, Memory, leaf

from saw.audit import ocsf
from saw.audit.note import Checkpoint, Signer, open_checkpoint, sign_checkpoint
from saw.audit.tiles import Files
from saw.audit.witness_watch import Watch, WitnessSettings, clear_alarm, load_settings, status_of
from saw.cli.main import main
from saw.errors import ConfigError, SawError, UnavailableError

pytestmark = pytest.mark.control("AUD-02")
START = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)


class Served(Memory):
    """A log's files as they are served; ``away`` is a server that does not answer."""

    away = False

    def read(self, path: str) -> bytes | None:
        if self.away:
            raise UnavailableError("nobody answers", cure="")
        return self.get(path)


class Desk:
    """A witness of one log, whose clock is moved by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.log = folder, START, Log()
        (folder / "log.key.pub").write_text(self.log.signer.public.line + "\n")
        self.place = folder / "state"
        self.place.mkdir()
        self.settings = WitnessSettings(
            log="https://log.example.com/audit-tree", key=str(folder / "log.key.pub"), name="witness.example.com",
            state_dir=str(self.place), max_age_s=600,
        )  # fmt: skip

    def served(self, log: Log, raw: bytes | None = None, *, age_s: int = 0) -> Served:
        """What ``log`` serves; its checkpoint was signed ``age_s`` seconds ago."""
        files = Served(log.files)
        at = int(self.now.timestamp()) - age_s
        files["checkpoint"] = (
            raw or sign_checkpoint(Checkpoint("trail.example.com", log.size, log.root), log.signer, at).encode()
        )
        return files

    def grown(self, count: int, salt: str = "", log: Log | None = None) -> Served:
        log = log or self.log
        log.grow([leaf(log.size + number, salt) for number in range(count)])
        return self.served(log)

    def look(self, files: Files):
        return Watch(self.settings, self.now, files).look()

    def bad(self, files: Files) -> str:
        """The code with which a look ends; it is in the status, and nothing new was signed."""
        before = self.signed()
        with pytest.raises(SawError) as error:
            self.look(files)
        assert self.signed() == before
        status = self.status()
        assert not status["ok"]
        assert status["error"]["code"] == error.value.code
        return error.value.code

    def status(self):
        return status_of(self.settings, self.now)

    def signed(self) -> bytes:
        file = self.place / "checkpoint"
        return file.read_bytes() if file.exists() else b""

    def findings(self) -> list[str]:
        file = self.place / "findings.jsonl"
        events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        for event in events:
            ocsf.validate(event)
        return [kind for event in events for kind in event["finding_info"]["types"]]

    def later(self, **span: int) -> None:
        self.now += timedelta(**span)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_what_continues_is_signed_with_a_key_made_at_the_first_look(desk: Desk) -> None:
    assert desk.status()["state"] == "never_ran"
    assert not desk.status()["ok"]
    for count in (3, 0, 300):
        found = desk.look(desk.grown(count))
        assert (found.state, found.size) == ("witnessing", desk.log.size)
        key = Signer.parse((desk.place / "witness.key").read_text()).public
        note = open_checkpoint(desk.signed(), desk.log.signer.public, (key, desk.log.signer.public.timed))
        now = int(desk.now.timestamp())
        assert note.witnesses == {"witness.example.com": now, "trail.example.com": now}
        desk.later(seconds=60)
    assert (desk.place / "witness.key").stat().st_mode & 0o777 == 0o600
    assert (desk.place / "witness.key.pub").read_text().strip() == key.line
    status = desk.status()
    assert (status["ok"], status["size"], status["lag_s"], desk.findings()) == (True, 303, 60, [])


def test_a_second_view_and_a_fork_are_an_alarm_that_stays_until_it_is_cleared(desk: Desk) -> None:
    good = desk.grown(10)
    desk.look(good)
    for count, code in ((10, "split_view"), (12, "tree_forked")):
        fork = desk.grown(count, salt="x", log=Log())
        assert desk.bad(fork) == code
        assert desk.status()["alarm"]["code"] == code
        kept = sorted((desk.place / "evidence").glob(f"{code}-*"))
        assert [one.suffix for one in kept] == [".found", ".signed"]
        assert kept[0].read_bytes() == fork["checkpoint"]
        assert b"\n10\n" in kept[1].read_bytes()
        # the right tree again, also much later: it stays
        desk.later(seconds=30)
        good = desk.served(desk.log)
        assert desk.bad(good) == "alarm_stands"
        with pytest.raises(ConfigError, match="reason is empty"):
            clear_alarm(desk.settings, " ")
        assert clear_alarm(desk.settings, "case 7").cleared_by == "case 7"
        assert desk.look(good).state == "witnessing"
        assert desk.status()["ok"]
    assert desk.findings() == ["split_view", "tree_forked"]
    assert [json.loads(one.read_text())["cleared_by"] for one in (desk.place / "evidence").glob("alarm-*.json")] == [
        "case 7"
    ] * 2
    with pytest.raises(ConfigError, match="no alarm stands"):
        clear_alarm(desk.settings, "again")


def test_the_evidence_of_an_alarm_is_kept_however_much_else_is(desk: Desk) -> None:
    early = Log()
    early.grow([leaf(number) for number in range(4)])
    desk.look(desk.grown(10))
    folder = desk.place / "evidence"
    folder.mkdir()
    for number in range(100):
        (folder / f"tree_shrunk-{number}.found").write_text("x")
    assert desk.bad(desk.served(early)) == "tree_shrunk"
    assert len(list(folder.iterdir())) == 100, "of what is no alarm so many are kept"
    fork = desk.grown(12, salt="x", log=Log())
    assert desk.bad(fork) == "tree_forked"
    assert len(list(folder.iterdir())) == 102
    assert next(folder.glob("tree_forked-*.found")).read_bytes() == fork["checkpoint"]


def test_damaged_tiles_are_no_alarm_and_a_second_view_is_one_also_with_them(desk: Desk) -> None:
    desk.look(desk.grown(10))
    good = desk.grown(3)
    [name] = [name for name in good if name.startswith("tile/0/") and name.endswith("/13")]
    damaged = Served({**good, name: b"x" * len(good[name])})
    assert desk.bad(damaged) == "tiles_differ"
    assert (desk.status()["state"], desk.status()["alarm"]) == ("failing", None)
    assert desk.look(good).size == 13
    fork = desk.grown(13, salt="x", log=Log())
    assert desk.bad(Served({**damaged, "checkpoint": fork["checkpoint"]})) == "split_view"
    assert desk.status()["state"] == "alarm"


def test_what_was_cleared_is_an_alarm_again_while_it_is_so(desk: Desk) -> None:
    desk.look(desk.grown(10))
    fork = desk.grown(10, salt="x", log=Log())
    assert desk.bad(fork) == "split_view"
    clear_alarm(desk.settings, "seen")
    assert desk.bad(fork) == "split_view"


def test_a_tree_that_went_back_is_told_while_it_is_so_and_never_remembered(desk: Desk) -> None:
    early = Log()
    early.grow([leaf(number) for number in range(4)])
    desk.look(desk.grown(10))
    for _ in range(3):
        desk.later(seconds=60)
        assert desk.bad(desk.served(early)) == "tree_shrunk"
    assert desk.findings() == ["tree_shrunk"]
    assert desk.status()["size"] == 10
    assert desk.look(desk.grown(1)).size == 11
    assert desk.bad(desk.served(early)) == "tree_shrunk"
    assert desk.findings() == ["tree_shrunk"] * 2, "told again, as it was good between"


@pytest.mark.parametrize(("age_s", "taken"), [(600, True), (601, False), (-300, True), (-301, False)])
def test_a_checkpoint_is_neither_too_old_nor_of_the_future(desk: Desk, age_s: int, taken: bool) -> None:
    desk.log.grow([leaf(0)])
    files = desk.served(desk.log, age_s=age_s)
    if taken:
        assert desk.look(files).state == "witnessing"
    else:
        assert desk.bad(files) == ("log_silent" if age_s > 0 else "log_ahead")
        assert desk.findings() == ["log_silent" if age_s > 0 else "log_ahead"]


def test_a_log_that_shows_an_old_copy_for_ever_is_silent(desk: Desk) -> None:
    frozen = desk.grown(5)
    desk.look(frozen)
    desk.later(seconds=599)
    desk.look(frozen)
    desk.later(seconds=60)
    assert desk.bad(frozen) == "log_silent"
    assert desk.status()["state"] == "silent"
    assert desk.look(desk.served(desk.log)).state == "witnessing"


def test_a_log_without_its_time_is_not_witnessed(desk: Desk) -> None:
    raw = desk.log.grow([leaf(0)])
    assert desk.bad(desk.served(desk.log, raw)) == "log_untimed"
    stranger = Signer("trail.example.com", 4, b"9" * 32).sign(raw.decode().partition("\n\n")[0] + "\n", 1)
    assert desk.bad(desk.served(desk.log, raw + stranger.encode())) == "log_untimed"


def test_a_log_that_is_away_is_silent_when_it_was_away_for_too_long(desk: Desk) -> None:
    files = desk.grown(5)
    files.away = True
    assert desk.bad(files) == "unavailable", "never seen: no time is given"
    files.away = False
    desk.look(files)
    files.away = True
    desk.later(seconds=600)
    assert desk.look(files).state == "lagging"
    assert desk.status()["ok"]
    desk.later(seconds=1)
    assert desk.bad(files) == "log_silent"
    assert desk.bad(files) == "log_silent"
    assert desk.findings() == ["unavailable", "log_silent"]


def test_what_was_wrong_is_not_good_because_nobody_answers(desk: Desk) -> None:
    early = Log()
    early.grow([leaf(0)])
    desk.look(desk.grown(10))
    assert desk.bad(desk.served(early)) == "tree_shrunk"
    away = desk.served(desk.log)
    away.away = True
    assert desk.bad(away) == "unavailable"
    assert desk.status()["state"] == "failing"


def test_a_timer_that_ended_shows_in_the_status(desk: Desk) -> None:
    desk.look(desk.grown(5))
    desk.later(seconds=600)
    assert desk.status()["ok"]
    desk.later(seconds=1)
    assert (desk.status()["ok"], desk.status()["state"]) == (False, "silent")


def test_another_log_a_missing_tile_and_a_lost_key_end_a_look(desk: Desk) -> None:
    desk.look(desk.grown(5))
    other = Log(seed=b"2" * 32)
    assert desk.bad(desk.grown(6, log=other)) == "note_invalid"
    desk.log.grow([leaf(9)])
    bare = desk.served(desk.log)
    for name in [name for name in bare if name.startswith("tile/")]:
        del bare[name]
    assert desk.bad(bare) == "tree_invalid"
    assert desk.look(desk.served(desk.log)).size == 6
    (desk.place / "witness.key").rename(desk.place / "elsewhere")
    assert desk.bad(desk.served(desk.log)) == "config_invalid"
    assert not (desk.place / "witness.key").exists(), "another key is another witness"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"log": "http://log.example.com/"}, "log must be"),
        ({"log": "https://log.example.com:x/"}, "log must be"),
        ({"log": "https://user@log.example.com/"}, "log must be"),
        ({"key": "log.key.pub"}, "absolute"),
        ({"max_age_s": 59}, "max_age_s"),
        ({"max_age_s": 604801}, "max_age_s"),
        ({"name": "a b"}, "name must"),
        ({"server_name": "a/b"}, "server_name"),
        ({"more": 1}, "unknown field"),
        ({}, ""),
    ],
)
def test_a_configuration_is_checked_before_it_is_used(
    desk: Desk, change: dict[str, object], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = desk.folder / "witness.json"
    file.write_text(json.dumps({**msgspec.to_builtins(desk.settings), **change}))
    assert main(["audit", "witness", "check", "--config", str(file)]) == (1 if field else 0)
    if field:
        with pytest.raises(ConfigError, match=field):
            load_settings(file)
    else:
        assert load_settings(file) == desk.settings
        assert main(["audit", "witness", "status", "--config", str(file), "--json"]) == 1
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["state"] == "never_ran"


def test_by_hand_all_files_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "witness", "--key", "x", "--json"]) == 1
    assert "--checkpoint is missing" in capsys.readouterr().out
