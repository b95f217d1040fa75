"""The journal becomes events: each once, whatever ends the service; what is missing is said; a full spool waits."""

from __future__ import annotations

import json

import pytest
from telemetry_rig import Host, ssh, until, users_of, whole

pytestmark = pytest.mark.control("P0-05")


def test_entries_from_before_and_from_now_become_events_in_order_and_once(host: Host) -> None:
    before = host.journal.sign_ins(5)
    with host.running():
        until(lambda: len(users_of(host.chain())) == 5, "what was there already")
        later = host.journal.sign_ins(5, 5)
        until(lambda: len(users_of(host.chain())) == 10, "what came then")
    with host.running():
        last = host.journal.sign_ins(1, 10)
        until(lambda: users_of(host.chain())[-1:] == last, "what came after a restart")
    assert users_of(host.chain()) == before + later + last
    assert whole(host.chain())
    assert [one["unmapped"]["saw"]["source"] for one in host.findings("telemetry_began")] == [host.chain()[0].source]
    assert host.findings("telemetry_gap") == []


@pytest.mark.thorough
def test_what_was_written_before_a_kill_is_there_once_after_it(host: Host) -> None:
    users: list[str] = []
    for _ in range(3):
        with host.running() as process:
            seen = len(users)
            users += host.journal.sign_ins(150, seen)
            until(lambda seen=seen: len(users_of(host.chain())) > seen, "some of them")
            host.kill(process)
    with host.running():
        until(lambda: len(users_of(host.chain())) >= len(users), "all of them")
    assert users_of(host.chain()) == users
    assert whole(host.chain())


def test_what_the_journal_forgot_before_it_was_read_is_a_gap_with_its_bounds(host: Host) -> None:
    host.journal.sign_ins(3)
    with host.running():
        until(lambda: len(users_of(host.chain())) == 3, "the first ones")
    host.journal.sign_ins(4, 3)
    host.journal.rotate()
    host.journal.sign_ins(2, 7)
    with host.running():
        until(lambda: len(users_of(host.chain())) == 5, "what is left")
    (gap,) = host.findings("telemetry_gap")
    said = gap["unmapped"]["saw"]
    assert (said["cause"], gap["severity"]) == ("journal_rotated", "High")
    assert said["after_cursor"] != said["before_cursor"]
    assert said["since"] == "2026-11-30T00:00:00.003+00:00"
    assert said["until"] == "2026-11-30T00:00:00.008+00:00"
    order = [one.event.get("user", {}).get("name") or one.event["finding_info"]["types"][0] for one in host.chain()]
    assert order[-3:] == ["telemetry_gap", "user7", "user8"], "the gap stands where the entries would"
    with host.running():
        host.journal.sign_ins(1, 9)
        until(lambda: len(users_of(host.chain())) == 6, "what came then")
    assert len(host.findings("telemetry_gap")) == 1, "a journal that is whole has no gap"


def test_a_full_spool_takes_nothing_loses_nothing_and_is_red(host: Host) -> None:
    host.configure(spool_bytes=65536)
    users = host.journal.sign_ins(120)
    with host.running():
        until(lambda: "the spool is full" in host.saw("status").stdout, "the full spool")
        kept = users_of(host.chain())
        assert 0 < len(kept) < 120
        assert kept == users[: len(kept)]
        status = json.loads(host.saw("status", "--json").stdout)
        assert (status["ok"], status["bytes_waiting"] <= 65536, bool(status["full_since"])) == (False, True, True)
    host.configure()
    with host.running():
        until(lambda: len(users_of(host.chain())) == 120, "what waited in the journal")
        until(lambda: not json.loads(host.saw("status", "--json").stdout)["full_since"], "room again")
    assert users_of(host.chain()) == users
    assert host.findings("telemetry_gap") == []


def test_what_the_journal_forgot_while_the_spool_was_full_is_a_gap_that_says_so(host: Host) -> None:
    host.configure(spool_bytes=65536)
    host.journal.sign_ins(120)
    with host.running():
        until(lambda: "the spool is full" in host.saw("status").stdout, "the full spool")
    kept = len(users_of(host.chain()))
    host.journal.rotate()
    host.journal.sign_ins(1, 120)
    host.configure()
    with host.running():
        until(lambda: users_of(host.chain())[-1:] == ["user120"], "what is left")
    assert len(users_of(host.chain())) == kept + 1
    (gap,) = host.findings("telemetry_gap")
    assert gap["unmapped"]["saw"]["cause"] == "spool_full"
    assert gap["unmapped"]["saw"]["full_since"]


def test_a_journal_that_cannot_be_read_is_red(host: Host) -> None:
    host.configure(journal=str(host.folder / "nowhere"))
    with host.running():
        said = until(
            lambda: [text for text in [host.saw("status")] if "the journal is not read" in text.stdout], "the problem"
        )
    assert said[0].returncode == 1


def test_an_entry_of_any_length_is_passed_over_and_told_and_what_comes_behind_it_is_read(host: Host) -> None:
    """Many binary fields, each short enough to be written out: one entry that is a line of many MiB."""
    before = host.journal.sign_ins(1)
    for number in range(2):
        host.journal.write(
            [{"SYSLOG_IDENTIFIER": "sshd", "_UID": "1000"}], [b"\xff" * 4000 + b"%d" % one for one in range(400)]
        )
        host.journal.sign_ins(1, 1 + number)
    with host.running():
        until(lambda: len(users_of(host.chain())) == 3, "what lies between and behind them")
    assert users_of(host.chain()) == [*before, "user1", "user2"]
    gaps = [one["unmapped"]["saw"] for one in host.findings("telemetry_gap")]
    assert [one["cause"] for one in gaps] == ["not_told"] * 2
    assert len({one["cursor"] for one in gaps}) == 2
    with host.running():
        last = host.journal.sign_ins(1, 3)
        until(lambda: users_of(host.chain())[-1:] == last, "what came after a restart")
    assert len(host.findings("telemetry_gap")) == 2, "each is told once"
    assert whole(host.chain())


def test_the_commands_tell_what_there_is_and_refuse_what_is_wrong(host: Host) -> None:
    nothing = host.saw("status")
    assert (nothing.returncode, "there is no sign of life" in nothing.stdout) == (1, True)
    assert "events go nowhere" in nothing.stdout
    assert host.saw("tail").returncode != 0
    host.journal.write([ssh("Failed password for root from 10.0.0.9 port 4022 ssh2")])
    with host.running():
        until(lambda: users_of(host.chain()) == ["root"], "the event")
    assert "sshd: root was refused" in host.saw("tail").stdout
    shown = json.loads(host.saw("tail", "--limit", "1", "--json").stdout)["events"]
    assert [one["event"]["status"] for one in shown] == ["Failure"]
    host.config_file.write_text('{"spool_bytes": 1}')
    refused = host.saw("check")
    assert (refused.returncode != 0, "spool_bytes" in refused.stderr) == (True, True)
