"""Entries of the journal as journalctl writes them, and the event that each becomes - or does not, for its harmless twin."""

from __future__ import annotations

import itertools
import json
import sqlite3
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from saw.audit import EventFactory, validate, verify_chain
from saw.audit.receiver import Receiver
from saw.errors import ConfigError
from saw.telemetry import services
from saw.telemetry.config import Log, Select, TelemetryConfig, TelemetryError, read_config
from saw.telemetry.forward import AT_ONCE, Courier, parts
from saw.telemetry.health import health_of
from saw.telemetry.journal import Entry, Reading, gap_between, same, words
from saw.telemetry.spool import KEPT, Spool
from saw.telemetry.told import Claims, Host
from saw.telemetry.translate import event_of, gap_event

pytestmark = pytest.mark.control("P0-05")
COUNTER = itertools.count()
HOST = Host(EventFactory("saw-telemetry", host="host-1", new_uid=lambda: f"uid-{next(COUNTER)}"), "host-1")
ALL = Select(services=("saw-*.service",), logs=(Log("saw-*.service", 4, text=True), Log("app.service", 4)))
NOW = datetime(2026, 11, 30, tzinfo=UTC)


def entry(**fields: Any) -> Entry:
    given = {
        "__CURSOR": "s=1;i=2",
        "__REALTIME_TIMESTAMP": "1795996800000000",
        "_TRANSPORT": "syslog",
        "_UID": "0",
        "_PID": "7",
    }
    return msgspec.json.decode(json.dumps({**given, **fields}), type=Entry)


def told(select: Select = ALL, **fields: Any) -> dict[str, Any] | None:
    event = event_of(HOST, entry(**fields), select)
    if event is not None:
        validate(event)
    return event


def by(name: str, text: str, **fields: Any) -> dict[str, Any] | None:
    return told(SYSLOG_IDENTIFIER=name, MESSAGE=text, **fields)


@pytest.mark.parametrize(
    ("name", "text", "told_as"),
    [
        (
            "sshd",
            "Accepted publickey for agent from 10.0.0.9 port 4022 ssh2: ED25519 SHA256:abc",
            ("agent", "Logon", "Success", "10.0.0.9"),
        ),
        (
            "sshd-session",
            "Accepted password for ann from fe80::1%eth0 port 1 ssh2",
            ("ann", "Logon", "Success", "fe80::1%eth0"),
        ),
        ("sshd", "Failed password for root from 10.0.0.9 port 4022 ssh2", ("root", "Logon", "Failure", "10.0.0.9")),
        (
            "sshd",
            "Failed none for invalid user bob from 10.0.0.9 port 4022 ssh2",
            ("bob", "Logon", "Failure", "10.0.0.9"),
        ),
        (
            "sshd",
            "Failed none for invalid user x from 1.2.3.4 port 5 ssh2 from 10.0.0.9 port 4022 ssh2",
            ("x from 1.2.3.4 port 5 ssh2", "Logon", "Failure", "10.0.0.9"),
        ),
        (
            "sshd-session",
            "Connection closed by authenticating user root 10.0.0.9 port 4022 [preauth]",
            ("root", "Logon", "Failure", "10.0.0.9"),
        ),
        (
            "sshd-session",
            "Connection reset by invalid user bob 10.0.0.9 port 4022 [preauth]",
            ("bob", "Logon", "Failure", "10.0.0.9"),
        ),
        (
            "sshd",
            "Disconnecting invalid user bob 10.0.0.9 port 4022: Too many authentication failures [preauth]",
            ("bob", "Logon", "Failure", "10.0.0.9"),
        ),
        ("sshd", "Disconnected from user ann 10.0.0.9 port 4022", ("ann", "Logoff", "Success", "10.0.0.9")),
        (
            "sudo",
            "     ann : TTY=pts/0 ; PWD=/home/ann ; USER=root ; COMMAND=/usr/bin/id -u",
            ("root", "Logon", "Success", None),
        ),
        ("sudo", "root : PWD=/root ; USER=games ; COMMAND=/usr/bin/true", ("games", "Logon", "Success", None)),
        (
            "sudo",
            "ann : user NOT in sudoers ; TTY=pts/0 ; PWD=/ ; USER=root ; COMMAND=/usr/bin/id",
            ("root", "Logon", "Failure", None),
        ),
        (
            "sudo",
            "ann : 3 incorrect password attempts ; TTY=pts/0 ; PWD=/ ; USER=root ; COMMAND=/usr/bin/id",
            ("root", "Logon", "Failure", None),
        ),
        (
            "su",
            "pam_unix(su:session): session opened for user root(uid=0) by ann(uid=1000)",
            ("root", "Logon", "Success", None),
        ),
        ("su", "pam_unix(su:session): session closed for user root", ("root", "Logoff", "Success", None)),
        (
            "su",
            "pam_unix(su:auth): authentication failure; logname= uid=1000 euid=0 tty=/dev/pts/0 ruser=ann rhost=  user=root",
            ("root", "Logon", "Failure", None),
        ),
    ],
)
def test_sign_ins(name: str, text: str, told_as: tuple[str, str, str, str | None]) -> None:
    event = by(name, text)
    assert event is not None
    user, activity, status, address = told_as
    assert (event["class_uid"], event["user"], event["activity_name"], event["status"]) == (
        3002,
        {"name": user},
        activity,
        status,
    )
    assert event["src_endpoint"].get("ip") == address
    assert event["is_remote"] is (address is not None)
    assert event["device"]["hostname"] == "host-1"
    assert told(Select(sign_ins=False), SYSLOG_IDENTIFIER=name, MESSAGE=text) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sshd", "Server listening on 0.0.0.0 port 22."),
        ("sshd", "Connection closed by 10.0.0.9 port 4022 [preauth]"),
        ("sshd", "Accepted publickey for agent"),
        ("sudo", "pam_unix(sudo:session): session opened for user root(uid=0) by (uid=1000)"),
        ("cron", "pam_unix(cron:session): session opened for user root(uid=0) by (uid=0)"),
        ("useradd", "failed adding user 'ann', exit code: 9"),
        ("passwd", "nothing changed"),
        ("app", "new user: name=ann, UID=1001, GID=1001, home=/home/ann, shell=/bin/sh, from=none"),
    ],
)
def test_what_is_no_sign_in_and_no_change_is_not_told(name: str, text: str) -> None:
    assert by(name, text) is None


def test_what_a_certificate_says_of_a_sign_in_is_told() -> None:
    event = by(
        "sshd",
        "Accepted publickey for agent from 10.0.0.9 port 1 ssh2: ED25519-CERT SHA256:abc ID ses-1 (serial 5) CA ED25519 SHA256:x",
    )
    assert event is not None
    said = event["unmapped"]["saw"]
    assert (said["certificate"], said["serial"], said["key"]) == ("ses-1", "5", "SHA256:abc")


@pytest.mark.parametrize(
    "text",
    [
        "ann : TTY=pts/0 ; PWD=/tmp/x ; USER=root ; COMMAND=/bin/true ; USER=games ; COMMAND=/usr/bin/id",
        "ann : TTY=pts/0 ; PWD=/tmp ; USER=games ; COMMAND=/usr/bin/id ; USER=root",
    ],
)
def test_a_folder_or_argument_that_looks_like_sudos_own_words_is_not_believed(text: str) -> None:
    event = by("sudo", text)
    assert event is not None
    assert event["user"] == {"name": "unknown"}
    assert event["unmapped"]["saw"]["ambiguous"] is True


@pytest.mark.parametrize(
    ("name", "text", "account", "activity"),
    [
        (
            "useradd",
            "new user: name=ann, UID=1001, GID=1001, home=/home/ann, shell=/bin/sh, from=none",
            "ann",
            "Create",
        ),
        ("userdel", "delete user 'ann'", "ann", "Delete"),
        ("groupadd", "new group: name=staff2, GID=1002", "staff2", "Create"),
        ("usermod", "add 'ann' to group 'sudo'", "ann", "Attach Policy"),
        ("gpasswd", "user ann removed by root from group sudo", "ann", "Detach Policy"),
        ("usermod", "lock user 'ann' password", "ann", "Lock"),
        ("passwd", "pam_unix(passwd:chauthtok): password changed for ann", "ann", "Password Change"),
        ("usermod", "change user 'ann' shell from '/bin/sh' to '/bin/bash'", "ann", "Other"),
    ],
)
def test_account_changes(name: str, text: str, account: str, activity: str) -> None:
    event = by(name, text)
    assert event is not None
    assert (event["class_uid"], event["user"]["name"], event["activity_name"]) == (3001, account, activity)
    assert told(Select(accounts=False), SYSLOG_IDENTIFIER=name, MESSAGE=text) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sshd", "Accepted publickey for root from 10.0.0.9 port 4022 ssh2"),
        ("sudo", "ann : TTY=pts/0 ; PWD=/ ; USER=root ; COMMAND=/usr/bin/id"),
        ("useradd", "new user: name=ann, UID=1001, GID=1001, home=/home/ann, shell=/bin/sh, from=none"),
    ],
)
def test_what_another_user_writes_in_the_name_of_such_a_program_is_told_as_a_claim_alone(name: str, text: str) -> None:
    forged = by(name, text, _UID="2000", _EXE="/usr/bin/logger")
    assert forged is not None
    assert (forged["class_uid"], forged["severity"]) == (0, "Medium")
    assert forged["unmapped"]["saw"] == {
        "claims": name, "journal": {"pid": "7", "uid": "2000", "program": "/usr/bin/logger"},
    }  # fmt: skip
    assert "root" not in forged["message"]
    assert (
        by("sudo", "ann : PWD=/ ; USER=root ; COMMAND=/usr/bin/id", _UID="1000", _EXE="/usr/bin/sudo")["class_uid"]
        == 3002
    )  # type: ignore[index]


def unit(message_id: str, name: str, **fields: str) -> dict[str, Any] | None:
    given = {"_TRANSPORT": "journal", "_PID": "1", "MESSAGE_ID": message_id, "UNIT": name, "MESSAGE": "said"}
    return told(**{**given, **fields})


def test_services_start_stop_and_fail() -> None:
    started = unit(services.STARTED, "saw-policyd.service", JOB_RESULT="done")
    assert started is not None
    assert (started["class_uid"], started["activity_name"], started["app"]["name"]) == (
        6002,
        "Start",
        "saw-policyd.service",
    )
    failed = unit(services.FAILED, "cron.service", UNIT_RESULT="exit-code")
    assert failed is not None
    assert (failed["status"], failed["status_detail"]) == ("Failure", "exit-code")
    assert unit(services.STARTED, "cron.service") is None, "only failures of units that are not named"
    assert unit(services.FAILED, "cron.service", _PID="40") is None, "the word of another process"
    assert unit("0" * 32, "saw-policyd.service") is None


def test_records_of_audit_are_told_without_what_was_run() -> None:
    text = (
        "SYSCALL arch=c000003e syscall=90 success=yes exit=0 a0=7f a1=9ed ppid=10 pid=11 auid=1000 uid=0 euid=0 ses=3 "
        'comm="chmod" exe="/usr/bin/chmod" key="saw-setuid"'
    )
    record = {"_TRANSPORT": "audit", "_AUDIT_TYPE": "1300", "_AUDIT_TYPE_NAME": "SYSCALL", "_AUDIT_ID": "77"}
    event = told(**record, MESSAGE=text)
    assert event is not None
    said = event["unmapped"]["saw"]["audit"]
    assert (event["class_uid"], said["key"], said["auid"], said["exe"]) == (0, "saw-setuid", "1000", "/usr/bin/chmod")
    assert told(**record, MESSAGE=text.replace("saw-setuid", "theirs")) is None
    for kind, name in (("1309", "EXECVE"), ("1327", "PROCTITLE"), ("1307", "CWD")):
        assert (
            told(**{**record, "_AUDIT_TYPE": kind, "_AUDIT_TYPE_NAME": name}, MESSAGE='a0="mysql" a1="-pverysecret"')
            is None
        )
    denied = told(
        **{**record, "_AUDIT_TYPE": "1400", "_AUDIT_TYPE_NAME": "AVC"},
        MESSAGE='apparmor="DENIED" profile="x" name="/a"',
    )
    assert denied is not None
    assert denied["unmapped"]["saw"]["audit"]["apparmor"] == "DENIED"
    assert told(Select(audit=False), **{**record, "_AUDIT_TYPE": "1400"}, MESSAGE='apparmor="DENIED"') is None
    assert told(**{**record, "_TRANSPORT": "syslog"}, MESSAGE=text) is None, "the word of a program"


def test_the_kernel_and_chosen_logs() -> None:
    kernel = {"_TRANSPORT": "kernel", "SYSLOG_FACILITY": "0", "MESSAGE": "I/O error"}
    assert told(**kernel, PRIORITY="3")["message"] == "kernel: I/O error"  # type: ignore[index]
    assert told(**kernel, PRIORITY="4") is None
    assert told(**{**kernel, "SYSLOG_FACILITY": "1"}, PRIORITY="3") is None, "written to /dev/kmsg"
    ours = {"_SYSTEMD_UNIT": "saw-policyd.service", "PRIORITY": "4", "MESSAGE": "refused\nline"}
    assert told(**ours)["message"] == "saw-policyd.service: refused\\nline"  # type: ignore[index]
    assert told(**{**ours, "PRIORITY": "5"}) is None
    assert told(**{**ours, "_SYSTEMD_UNIT": "saw-telemetry.service"}) is None, "its own words would go round"
    silent = told(_SYSTEMD_UNIT="app.service", PRIORITY="3", MESSAGE="token=verysecret")
    assert silent is not None
    assert "verysecret" not in json.dumps(silent)


@pytest.mark.parametrize("name", ["sudo", "sshd"])
def test_no_argument_folder_or_environment_is_carried(name: str) -> None:
    text = "ann : TTY=pts/0 ; PWD=/srv/verysecret ; USER=root ; ENV=A=verysecret ; COMMAND=/usr/bin/mysql -pverysecret"
    event = by(name, text)
    assert "verysecret" not in json.dumps(event)
    assert name != "sudo" or event["unmapped"]["saw"]["runs"] == "/usr/bin/mysql"  # type: ignore[index]


def test_what_journald_threw_away_is_a_gap() -> None:
    fields = {"MESSAGE_ID": "a596d6fe7bfa4994828e72309e95d61e", "UNIT": "app.service", "N_DROPPED": "12"}
    event = told(_TRANSPORT="driver", **fields)
    assert event is not None
    assert (event["finding_info"]["types"], event["unmapped"]["saw"]["entries"]) == (["telemetry_gap"], 12)
    assert told(_TRANSPORT="journal", **fields) is None, "the word of a program"


def test_fields_may_be_bytes_several_or_too_long() -> None:
    assert words([104, 105, 255]) == "hi\ufffd"
    assert words(["one", "two"]) == "one"
    assert words([[1], [2]]) == words(None) == words([400]) == words(7) == ""
    assert by("sshd", None) is None  # type: ignore[arg-type]


def test_a_cursor_names_an_entry_in_whichever_file_and_its_numbers_count_a_gap() -> None:
    old = "s=aa;i=5;b=bb;m=10;t=20;x=cc"
    assert same(old, "s=dd;i=9;b=bb;m=10;t=20;x=cc"), "journald moved it"
    assert not same(old, "s=aa;i=6;b=bb;m=11;t=21;x=cc")
    assert not same("nonsense", "other")
    assert gap_between(old, "s=aa;i=f;b=bb;m=30;t=40;x=ee").entries == 9
    gap = gap_between(old, "s=dd;i=f;b=bb;m=30;t=40;x=ee")
    assert gap.entries is None
    validate(gap_event(HOST, gap, NOW))


def made(number: int, size: int = 0) -> dict[str, Any]:
    return HOST.factory.log(NOW, HOST.subject(), message=f"{number} " + "x" * size)


def test_the_spool_is_bounded_and_lets_go_only_of_what_arrived_everywhere(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 65536, "Host-1.example.com")
    spool.use(("broker", "collector"))
    read = [(f"c{number}", made(number, 1000)) for number in range(100)]
    taken = spool.append(read, "now")
    assert 0 < taken < 100
    assert spool.cursor == f"c{taken - 1}"
    assert spool.bytes_waiting() <= 65536
    assert spool.append(read[taken:], "later") == 0
    assert (spool.full_since, spool.has_room(16384)) == ("now", False)
    spool.acknowledged("collector", taken)
    assert spool.append(read[taken:], "later") == 0, "the broker has none yet"
    assert [one.seq for one in spool.pending("broker", 1000)] == list(range(1, taken + 1))
    spool.acknowledged("broker", taken - 1)
    assert spool.append(read[taken : taken + 5], "later") == 5, "room again"
    assert spool.full_since == ""
    assert spool.pending("collector", 1)[0].seq == taken + 1
    assert verify_chain(spool.newest(1000)).findings[0].code == "removed", "the first ones went"
    assert spool.source.startswith("host.host-1.")
    spool.close()
    again = Spool(tmp_path, 65536, "host-1")
    assert (again.source, again.head.seq, again.cursor) == (spool.source, taken + 5, f"c{taken + 4}")
    assert (tmp_path / "spool.db").stat().st_mode & 0o777 == 0o600
    again.close()


def test_a_way_that_is_away_for_a_moment_keeps_its_place_and_one_that_is_off_does_not(tmp_path: Path) -> None:
    config = TelemetryConfig(
        state_dir=str(tmp_path / "state"),
        run_dir=str(tmp_path / "run"),
        workspace=str(tmp_path / "workspace.json"),
        receiver=Receiver("siem.example.com", 20514, "/ca.pem"),
    )
    (tmp_path / "workspace.json").write_text("{}")
    assert config.ways() == config.configured() == ("broker", "collector")
    spool = Spool(tmp_path / "state", 2**20, "host-1")
    spool.use(config.ways(), config.configured())
    spool.append([(f"c{number}", made(number)) for number in range(KEPT + 50)], "now")
    spool.acknowledged("broker", 10)
    (tmp_path / "workspace.json").unlink()
    assert config.ways() == ("collector",)
    spool.use(config.ways(), config.configured())
    spool.acknowledged("collector", KEPT + 50)
    assert (spool.waiting(), len(spool.pending("broker", 1000))) == ({"broker": KEPT + 40, "collector": 0}, KEPT + 40)
    problems = health_of(config, "host-1", NOW).problems
    assert any(f"{KEPT + 40} events wait for the broker, which is not there" in one for one in problems)
    off = msgspec.structs.replace(config, broker=False)
    spool.use(off.ways(), off.configured())
    assert spool.waiting() == {"collector": 0}
    spool.use(config.ways(), config.configured())
    assert spool.waiting() == {"collector": 0}, "a host that never was a workspace does not wait for a broker"
    spool.close()


def test_a_spool_that_cannot_be_read_is_an_error_that_is_told_and_ends_no_thread(tmp_path: Path) -> None:
    config = TelemetryConfig(receiver=Receiver("siem.example.com", 20514, "/ca.pem"))
    spool = Spool(tmp_path, 2**20, "host-1")
    spool.use(("collector",))
    spool.append([("c", made(1))], "now")
    courier = Courier(config, spool, "collector", "host-1")
    with sqlite3.connect(spool.path) as other:
        other.execute("UPDATE event SET chained = ?", (b"{",))
    other.close()
    with pytest.raises(TelemetryError, match="cannot be read"):
        spool.pending("collector", 1)
    with sqlite3.connect(spool.path) as other:
        other.execute("ALTER TABLE event RENAME TO gone")
    other.close()
    for read in (lambda: spool.pending("collector", 1), lambda: spool.newest(1), spool.waiting, spool.bytes_waiting):
        with pytest.raises(TelemetryError, match="cannot be read"):
            read()
    courier.start()
    try:
        until(lambda: "cannot be read" in courier.trouble, "the problem")
    finally:
        courier.end(60)
    spool.close()


def test_a_thread_that_ended_by_itself_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, 2**20, "host-1")
    courier = Courier(TelemetryConfig(), spool, "collector", "host-1")
    monkeypatch.setattr(courier, "_run", lambda: None)
    courier._thread = threading.Thread(target=courier._run)
    courier.start()
    until(lambda: "has ended" in courier.trouble, "the problem")
    courier.end(60)
    assert courier.trouble == "", "told to end, it is no trouble"
    spool.close()


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def test_a_gap_is_written_with_the_entry_behind_it_or_not_at_all(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 65536, "host-1")
    spool.use(("collector",))
    spool.append([("c0", made(0, 60_000 // 8)) for _ in range(8)], "now")
    big = [("c9", made(9, 8000))]
    assert spool.append(big, "now", first=[made(1)]) == 0
    assert [one.event["message"][:2] for one in spool.newest(1)] == ["0 "], "no gap without what comes behind it"
    spool.acknowledged("collector", 8)
    assert spool.append(big, "now", first=[made(1)]) == 1
    assert [one.event["message"][:2] for one in spool.newest(2)] == ["1 ", "9 "]
    spool.close()


def test_delivered_events_are_kept_to_be_read_up_to_a_number(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2**20, "host-1")
    spool.use(("collector",))
    spool.append([(f"c{number}", made(number)) for number in range(KEPT + 50)], "now")
    spool.acknowledged("collector", KEPT + 50)
    assert len(spool.newest(1000)) == KEPT
    spool.use(())
    spool.append([("c", made(1))], "now")
    assert len(spool.newest(1000)) == KEPT + 1, "without a way nothing goes"
    spool.close()


def test_reports_to_the_broker_are_bounded(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2**20, "host-1")
    spool.append([(f"c{number}", made(number, 4000)) for number in range(20)], "now")
    spool.append([(f"d{number}", made(number)) for number in range(100)], "now")
    found = spool.newest(1000)
    cut = list(parts(found))
    assert [one for part in cut for one in part] == found
    assert all(len(msgspec.json.encode(part)) < 60_000 and len(part) <= AT_ONCE for part in cut)
    spool.close()


@pytest.mark.parametrize(
    ("text", "words_of_it"),
    [
        ('{"colour": 1}', "colour"),
        ('{"journal": "relative"}', "journal"),
        ('{"receiver": {"host": "h", "port": 0, "ca_file": "/ca"}}', "receiver.port must be 1 to 65535"),
        ('{"receiver": {"host": "h", "port": 1, "ca_file": "ca"}}', "must be absolute"),
        ('{"select": {"kernel": 9}}', "kernel"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused_by_its_field(tmp_path: Path, text: str, words_of_it: str) -> None:
    file = tmp_path / "telemetry.json"
    file.write_text("{}")
    assert read_config(file).ways() == ()
    file.write_text(text)
    with pytest.raises(ConfigError, match=words_of_it):
        read_config(file)


@pytest.mark.parametrize(
    "text",
    [
        "ann : (command continued) ; USER=root ; COMMAND=/usr/bin/id",
        "ann : (command continued) user NOT in sudoers ; TTY=pts/0 ; PWD=/ ; USER=root ; COMMAND=/usr/bin/id",
        "     ann : (command continued) --set COMMAND=/bin/x",
    ],
)
def test_a_line_of_sudo_that_goes_on_is_doubt_and_neither_a_sign_in_nor_a_refusal(text: str) -> None:
    event = by("sudo", text)
    assert event is not None
    assert (event["class_uid"], event["unmapped"]["saw"]["ambiguous"], event["unmapped"]["saw"]["by"]) == (
        0,
        True,
        "ann",
    )
    assert "root" not in json.dumps(event)
    claim = by("sudo", text, _UID="1000")
    assert claim is not None
    assert claim["unmapped"]["saw"]["claims"] == "sudo"


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("ann : TTY=pts/0 ; PWD=/very/long", "Success"),
        ("ann : TTY=pts/0 ; PWD=/ ; USER=root ;", "Success"),
        ("ann : user NOT in sudoers ; TTY=pts/0 ; PWD=/very/long", "Failure"),
    ],
)
def test_the_beginning_of_a_line_of_sudo_is_told_without_the_end(text: str, outcome: str) -> None:
    event = by("sudo", text)
    assert event is not None
    assert (event["status"], event["user"], event["unmapped"]["saw"]["ambiguous"]) == (
        outcome,
        {"name": "unknown"},
        True,
    )


@pytest.mark.parametrize(
    "text", ["ann : (command continued) and more words", "ann : problem with defaults entries ; TTY=pts/0 ; PWD=/ ;"]
)
def test_what_says_nothing_of_a_call_of_sudo_is_not_told(text: str) -> None:
    assert by("sudo", text) is None


AGENTS = ("saw-agent@claw.service", "saw-mcp-server-files@3.service", "saw-mcp-files.service", "saw-shell.service")


@pytest.mark.parametrize("unit", [*AGENTS, "saw-shell@2.service", "saw-openshell-podman.service"])
@pytest.mark.parametrize("pattern", ["saw-*.service", "*", "saw-[am]*", "saw-s*"])
def test_what_an_agent_writes_is_not_told_by_a_rule_for_many_units(unit: str, pattern: str) -> None:
    fields = {"_SYSTEMD_UNIT": unit, "PRIORITY": "3", "MESSAGE": "verysecret"}
    assert told(Select(logs=(Log(pattern, 4, text=True),)), **fields) is None
    ours = {**fields, "_SYSTEMD_UNIT": "saw-attestd.service"}
    assert (told(Select(logs=(Log("saw-*.service", 4, text=True),)), **ours) or {})["message"].endswith("verysecret")


@pytest.mark.parametrize("unit", AGENTS)
def test_a_rule_that_names_units_of_agents_tells_their_entries_without_a_word(unit: str) -> None:
    select = Select(logs=(Log(f"{unit[:11]}*", 4, text=True),))
    event = told(select, _SYSTEMD_UNIT=unit, PRIORITY="3", MESSAGE="verysecret")
    assert event is not None
    assert event["message"] == f"{unit}: an entry of priority 3"
    assert "verysecret" not in json.dumps(event)


def test_entries_that_claim_to_be_somebody_elses_are_bounded_and_counted() -> None:
    host = Host(HOST.factory, "host-1", claims=Claims(2))

    def claim(second: int) -> dict[str, Any] | None:
        fields = {
            "SYSLOG_IDENTIFIER": "sshd",
            "MESSAGE": "Disconnected from user ann 10.0.0.9 port 4022",
            "_UID": "1000",
        }
        return event_of(host, entry(**fields, __REALTIME_TIMESTAMP=str(second * 1_000_000)), ALL)

    found = [claim(second) for second in (60, 61, 62, 63, 119, 120, 121, 122)]
    assert [None if one is None else one["unmapped"]["saw"].get("more", 0) for one in found] == [
        0, 0, None, None, None, 3, 0, None,
    ]  # fmt: skip
    proven = {"SYSLOG_IDENTIFIER": "sshd", "MESSAGE": "Disconnected from user ann 10.0.0.9 port 4022"}
    assert event_of(host, entry(**proven, __REALTIME_TIMESTAMP="123000000"), ALL) is not None


def test_a_line_that_is_too_long_leaves_its_cursor_wherever_it_stands_and_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = "9," * (4 * 2**20)
    forged = json.dumps(json.dumps({"__CURSOR": "s=0;i=0"}))
    good = json.dumps({"__CURSOR": "s=1;i=9", "__REALTIME_TIMESTAMP": "1"})
    (tmp_path / "lines").write_text(
        f'{{"__CURSOR":"s=1;i=1","MESSAGE":[{fill}9]}}\n{{"MESSAGE":[{fill}{forged}],"__CURSOR":"s=1;i=2"}}\n'
        f'{{"MESSAGE":[{fill}{forged}],"__CURSOR":"s=1;i=3","X":[{fill}9]}}\n{good}\n'
    )
    (tmp_path / "journalctl").write_text(f"#!/bin/sh\ncat {tmp_path}/lines\nexec sleep 600\n")
    (tmp_path / "journalctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    reading, found, most = Reading(TelemetryConfig(), ""), list[str](), 0
    end = time.monotonic() + 60
    while len(found) < 4 and time.monotonic() < end:
        entries, gap = reading.read(0.5)
        assert gap is None
        most = max(most, len(reading._rest))
        found += [f"{type(one).__name__} {one.cursor}" for one in entries]
    reading.close()
    assert found == ["Untold s=1;i=1", "Untold s=1;i=2", "Untold s=1;i=3", "Entry s=1;i=9"]
    assert most < 2 * 2**20
