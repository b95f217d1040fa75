"""Sessions through a real bastion: what goes through it, and what is recorded of that."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from session_rig import Bastion, Terminal
from sso_rig import until

pytestmark = pytest.mark.control("ID-02")


def replay(bastion: Bastion, session: str, *more: str) -> subprocess.CompletedProcess[str]:
    return bastion.saw("replay", session, *more)


def cast_of(bastion: Bastion, session: str, tmp_path: Path) -> tuple[dict[str, object], list[list[object]]]:
    """The header and the events of a recording, as a player reads it."""
    file = tmp_path / f"{session}.cast"
    done = replay(bastion, session, "--output", str(file))
    assert done.returncode == 0, done.stderr
    header, *events = [json.loads(line) for line in file.read_text().splitlines()]
    return header, events


def test_a_command_goes_through_with_its_streams_and_its_exit_code_and_is_recorded(bastion: Bastion) -> None:
    folder, session = bastion.certify()
    done = bastion.ssh(folder, "echo out; cat; echo err >&2; exit 7", text="typed\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\ntyped\n", "err\n"), bastion.log()
    closed = bastion.closed(session)
    assert (closed["reason"], closed["exit_code"], closed["bytes_in"], closed["bytes_out"]) == ("closed", 7, 6, 14)
    played = replay(bastion, session)
    assert sorted(played.stdout.splitlines()) == ["err", "out", "typed"], played.stderr
    told = json.loads(replay(bastion, session, "--json").stdout)
    assert (told["digest"], told["command"]) == (closed["recording"], "echo out; cat; echo err >&2; exit 7")
    assert [entry[:2] for entry in bastion.audited(session)] == [
        ("Authentication Ticket", "Success"),
        ("Logon", "Success"),
        ("Logoff", "Success"),
        ("session.recording.store", "Success"),
        ("session.replay", "Success"),
        ("session.replay", "Success"),
    ]


def test_a_terminal_goes_through_is_resized_and_is_played_back_without_what_was_typed(
    bastion: Bastion, tmp_path: Path
) -> None:
    folder, session = bastion.certify()
    client = Terminal(bastion.line(folder, extra=("-tt",)))
    client.type("stty -echo; PS1=; echo ready-$((40+2))\n")
    client.until("ready-42")
    client.type("read -r secret; echo got ${#secret}; stty size\n")
    client.type("hunter2hunter2\n")
    client.until("got 14")
    client.until("30 100")
    client.resize(77, 20)
    client.process.send_signal(28)
    client.type("until [ \"$(stty size)\" = '20 77' ]; do :; done; echo resized; exit 3\n")
    client.until("resized")
    assert client.ends() == 3
    assert bastion.closed(session)["terminal"] is True
    header, events = cast_of(bastion, session, tmp_path)
    assert (header["version"], header["width"], header["height"], header["env"]) == (2, 100, 30, {"TERM": "xterm"})
    shown = "".join(str(event[2]) for event in events if event[1] == "o")
    assert "got 14" in shown
    assert "hunter2" not in shown
    assert "77x20" in [event[2] for event in events if event[1] == "r"]
    assert [event[0] for event in events] == sorted(event[0] for event in events)
    assert "i" not in {event[1] for event in events}


def test_input_is_recorded_only_where_that_was_decided(bastion: Bastion, tmp_path: Path) -> None:
    bastion.configure(record_input=True)
    try:
        folder, session = bastion.certify()
        assert bastion.ssh(folder, "cat >/dev/null", text="typed\n").returncode == 0
        bastion.closed(session)
    finally:
        bastion.configure()
    assert [event[2] for event in cast_of(bastion, session, tmp_path)[1] if event[1] == "i"] == ["typed\n"]


def test_a_recording_is_unreadable_without_its_key_and_no_key_lies_on_the_bastion(bastion: Bastion) -> None:
    folder, session = bastion.certify()
    word = "unmistakable-output-of-a-session"
    assert word in bastion.ssh(folder, f"echo {word}").stdout
    bastion.closed(session)
    # it goes once the broker has it, which is told a moment before
    end = time.monotonic() + 60
    while (bastion.recordings / f"{session}.sawrec").exists():
        assert time.monotonic() < end, "the broker has it"
    path = bastion.stored(session)
    assert path.stat().st_mode & 0o777 == 0o600
    assert word.encode() not in path.read_bytes()
    until(lambda: not list((bastion.directory / "legs").iterdir()))
    key = bastion.lab.operator.request("POST", f"/v1/sessions/{session}/key")["key"]
    kept = [file.read_bytes() for file in bastion.directory.rglob("*") if file.is_file()]
    assert not any(bytes.fromhex(key) in raw or key.encode() in raw for raw in kept)


def test_a_recording_is_held_and_released_from_the_command_line(bastion: Bastion) -> None:
    folder, session = bastion.certify()
    bastion.ssh(folder, "true")
    bastion.closed(session)
    said = []
    for verb in ("hold", "hold", "release", "release"):
        done = bastion.saw("session", verb, session, "--reason", "case 7")
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip().removeprefix(f"the recording of {session} "))
    assert said == ["is held", "was held before", "is held no more", "was not held"]
    assert [name for name, _, reason in bastion.audited(session) if reason == "case 7"] == [
        "session.recording.hold",
        "session.recording.release",
    ]


def test_bytes_that_are_no_text_pass_unchanged(bastion: Bastion) -> None:
    folder, _ = bastion.certify()
    raw = bytes(range(256)) * 1024
    done = subprocess.run(
        bastion.line(folder, "cat", extra=("-T",)), input=raw, capture_output=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, raw), done.stderr


def test_files_go_through_and_each_is_named_with_its_size(bastion: Bastion, tmp_path: Path) -> None:
    source, target, back = tmp_path / "up", tmp_path / "there", tmp_path / "back"
    source.write_bytes(b"x" * 300_000)
    folder, session = bastion.certify()
    batch = f"put {source} {target}\nget {target} {back}\nrename {target} {target}.new\nrm {target}.new\n"
    done = subprocess.run(
        ["sftp", *bastion.options(folder), "-P", str(bastion.port), "-b", "-", "root@127.0.0.1"],
        input=batch, text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert back.read_bytes() == source.read_bytes()
    assert bastion.closed(session)["command"] == "sftp"
    remarks = [str(event[2]) for event in cast_of(bastion, session, tmp_path)[1] if event[1] == "m"]
    assert remarks == [
        f"sftp file {target} read 0 written 300000 bytes",
        f"sftp file {target} read 300000 written 0 bytes",
        f"sftp posix-rename {target} {target}.new",
        f"sftp remove {target}.new",
        "closed",
    ]


def test_scp_of_old_copies(bastion: Bastion, tmp_path: Path) -> None:
    source, target = tmp_path / "up", tmp_path / "there"
    source.write_bytes(b"y" * 70_000)
    folder, session = bastion.certify()
    line = ["scp", "-O", *bastion.options(folder), "-P", str(bastion.port)]
    done = subprocess.run(
        [*line, str(source), f"root@127.0.0.1:{target}"], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == source.read_bytes()
    assert bastion.closed(session)["bytes_in"] > 70_000


def test_a_way_that_breaks_before_the_login_is_tried_again_and_the_command_runs_once(
    bastion: Bastion, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    with bastion.breaking(2) as asked:
        folder, session = bastion.certify()
        done = bastion.ssh(folder, f"echo x >> {ran}; echo out")
        assert (done.returncode, done.stdout) == (0, "out\n"), done.stderr
    assert (asked, ran.read_text()) == ([3], "x\n")
    assert bastion.closed(session)["exit_code"] == 0


def test_a_way_that_stays_broken_is_told_and_not_tried_for_ever(bastion: Bastion, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    with bastion.breaking(99) as asked:
        folder, session = bastion.certify()
        done = bastion.ssh(folder, f"echo x >> {ran}")
    assert (done.returncode, asked, ran.exists()) == (255, [3], False)
    assert "let nobody in" in done.stderr
    assert bastion.closed(session)["exit_code"] == 255


def test_a_command_that_ends_with_255_itself_is_not_run_again(bastion: Bastion, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder, _ = bastion.certify()
    done = bastion.ssh(folder, f"echo x >> {ran}; exit 255")
    assert (done.returncode, ran.read_text(), done.stderr) == (255, "x\n", "")
