"""Live sessions end: at the word of the broker, with their recorder, with their recording, and without a broker by the lease."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from broker_rig import Lab
from session_rig import RULES, Bastion, Terminal, activate, running
from sso_rig import free_port, until

from saw.broker.config import Listen
from saw.sessions.messages import Closing


@pytest.fixture
def live(bastion: Bastion) -> Iterator[tuple[str, Terminal]]:
    """A session on a terminal that has shown that it works."""
    folder, session = bastion.certify()
    client = Terminal(bastion.line(folder, extra=("-tt",)))
    client.type("stty -echo; echo live-$((40+2))\n")
    client.until("live-42")
    yield session, client
    if client.process.poll() is None:
        client.process.kill()
        client.process.wait()


def legs(bastion: Bastion) -> list[str]:
    """The connections that recorders have to the workspace."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes().split(b"\0")
            if words[0] == b"ssh" and any(str(bastion.directory / "legs").encode() in word for word in words):
                found.append(place.name)
    return found


@pytest.mark.control("ID-03")
def test_an_operator_ends_a_live_session_and_the_trail_says_so_in_order(
    bastion: Bastion, live: tuple[str, Terminal]
) -> None:
    session, client = live
    listed = json.loads(bastion.saw("sessions", "--live", "--json").stdout)["sessions"]
    assert [(row["id"], row["workspace"], row["state"]) for row in listed] == [(session, "ws-a", "open")]
    assert bastion.saw("session", "end", session, "--reason", "lunch").returncode == 0
    assert client.ends() == 255
    assert b"the session has ended: ended_by_operator" in client.seen
    closed = bastion.closed(session)
    assert closed["reason"] == "ended_by_operator"
    assert [(name, reason) for name, _, reason in bastion.audited(session)] == [
        ("Authentication Ticket", "session requested"),
        ("Logon", "session opened"),
        ("session.end", "ended_by_operator"),
        ("Logoff", "ended_by_operator"),
        ("session.recording.store", ""),
    ]
    assert bastion.saw("replay", session, "--verify").returncode == 0
    until(lambda: not legs(bastion))


@pytest.mark.control("ID-03")
def test_a_connection_that_is_held_open_ends_too(bastion: Bastion, tmp_path: Path) -> None:
    folder, session = bastion.certify()
    control = tmp_path / "control"
    client = Terminal(bastion.line(folder, extra=("-tt", "-M", "-S", str(control), "-o", "ControlPersist=yes")))
    client.type("stty -echo; echo live-$((40+2))\n")
    client.until("live-42")
    assert control.exists()
    assert bastion.saw("session", "end", session, "--reason", "lunch").returncode == 0
    assert client.ends() == 255
    until(lambda: not control.exists())


@pytest.mark.control("ID-03")
@pytest.mark.parametrize("step", ["kill", "stopped"])
def test_a_workspace_takes_its_live_session_along(bastion: Bastion, step: str) -> None:
    lab = bastion.lab
    folder, session = bastion.certify()
    other, spared = bastion.certify()
    clients = [Terminal(bastion.line(keys, extra=("-tt",))) for keys in (folder, other)]
    for client in clients:
        client.type("stty -echo; echo live-$((40+2))\n")
        client.until("live-42")
    # One server stands for all workspaces here: the second session is one of another workspace as far as the broker knows.
    activate_once(lab, "ws-b")
    bastion.sql("UPDATE sessions SET workspace_id = 'ws-b' WHERE id = ?", spared)
    try:
        if step == "kill":
            lab.operator.request("POST", "/v1/workspaces/ws-a/kill", {"reason": "test"})
        else:
            lab.step("ws-a", step)
        assert clients[0].ends() == 255
        expected = "workspace_stopped" if step == "stopped" else "workspace_quarantined"
        assert bastion.closed(session)["reason"] == expected
        clients[1].type("echo still-$((40+3)); exit\n")
        clients[1].until("still-43")
        assert clients[1].ends() == 0
        refused = bastion.saw("ssh", "ws-a", "--", "true")
        assert "ws-a is" in refused.stderr
    finally:
        bastion.sql("UPDATE workspaces SET state = 'active' WHERE id = ?", "ws-a")


def activate_once(lab: Lab, name: str) -> None:
    if name not in {row["id"] for row in lab.operator.request("GET", "/v1/workspaces")["workspaces"]}:
        activate(lab, name)


@pytest.mark.control("ID-02")
def test_without_its_recorder_a_session_ends_and_nothing_goes_on_behind_it(
    bastion: Bastion, live: tuple[str, Terminal]
) -> None:
    session, client = live
    [recorder] = bastion.recorders()
    os.kill(recorder, signal.SIGKILL)
    client.ends()
    until(lambda: not legs(bastion))
    cut = bastion.saw("replay", session, "--from", str(bastion.recordings))
    assert cut.returncode == 1
    assert "does not say how the session ended" in cut.stderr
    there = bastion.saw("replay", session, "--from", str(bastion.recordings), "--unfinished")
    assert "live-42" in there.stdout
    # The key of the way on, which the killed recorder could not remove, goes with the next session.
    left = list((bastion.directory / "legs").iterdir())
    assert left
    folder, _ = bastion.certify()
    assert bastion.ssh(folder, "true").returncode == 0
    assert not any(path.exists() for path in left)


def test_a_report_whose_process_was_killed_is_sent_while_the_next_session_lives(
    bastion: Bastion, request: pytest.FixtureRequest
) -> None:
    forgotten = bastion.recordings / "ses-forgotten.closing"
    forgotten.write_bytes(msgspec.json.encode(Closing("closed")))
    os.utime(forgotten, (1, 1))
    _, client = request.getfixturevalue("live")
    until(lambda: not forgotten.exists(), 60)  # the broker, which does not know that session, was asked
    assert client.process.poll() is None


@pytest.mark.control("ID-02")
def test_a_client_that_goes_away_ends_its_session(bastion: Bastion, live: tuple[str, Terminal]) -> None:
    session, client = live
    client.process.kill()
    client.process.wait()
    assert bastion.closed(session)["reason"] == "client_gone"
    until(lambda: not legs(bastion))


@pytest.mark.control("ID-02")
def test_a_full_disk_ends_the_session_and_shows_nothing_that_is_not_recorded(bastion: Bastion, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(small)], check=True)
    try:
        bastion.configure(recordings_dir=str(small))
        folder, session = bastion.certify()
        done = bastion.ssh(folder, "head -c 200000 /dev/zero | tr '\\0' a")
        assert (done.returncode, len(done.stdout)) == (0, 200000), done.stderr
        bastion.closed(session)
        folder, session = bastion.certify()
        full = bastion.ssh(folder, "head -c 2000000 /dev/zero | tr '\\0' a; echo; sleep 1000")
        assert full.returncode == 255
        assert "cannot be recorded any more" in full.stderr
        assert bastion.closed(session)["reason"] == "recording_failed"
        kept = bastion.saw("replay", session, "--unfinished")
        assert kept.stdout.startswith(full.stdout)
        assert len(full.stdout) < 2000000
        until(lambda: not legs(bastion))
    finally:
        bastion.configure()
        subprocess.run(["umount", str(small)], check=True)


def reconfigure(lab: Lab, **changes: Any) -> None:
    """Give a broker that does not run another configuration."""
    lab.config = msgspec.structs.replace(lab.config, **changes)
    lab.config_file.write_bytes(msgspec.json.encode(lab.config))


@pytest.mark.thorough
@pytest.mark.control("ID-03")
def test_without_a_broker_a_session_lasts_as_long_as_its_lease_and_the_report_comes_later() -> None:
    directory = Path(tempfile.mkdtemp(prefix="saw-bastion-"))
    lab = Lab(directory, sessions=msgspec.structs.replace(RULES, lease_s=300))
    reconfigure(lab, listen=Listen("127.0.0.1", free_port()))
    try:
        lab.start()
        with running(lab, directory) as bastion:
            folder, _ = bastion.certify()
            patient = Terminal(bastion.line(folder, extra=("-tt",)))
            patient.type("stty -echo; echo live-$((40+2))\n")
            patient.until("live-42")
            lab.stop()
            reconfigure(lab, sessions=msgspec.structs.replace(RULES, lease_s=6))
            lab.start()
            folder, session = bastion.certify()
            client = Terminal(bastion.line(folder, extra=("-tt",)))
            until(lambda: bastion.show(session)["state"] == "open")
            lab.stop()
            assert client.ends() == 255
            assert b"the broker does not answer" in client.seen
            # A restart of the broker, and its absence within the lease, is no reason to end.
            patient.type("echo still-$((40+3)); exit\n")
            patient.until("still-43")
            assert patient.ends() == 0
            lab.start()
            assert bastion.closed(session)["reason"] == "broker_unreachable"
    finally:
        lab.stop()
        shutil.rmtree(directory)


@pytest.mark.thorough
@pytest.mark.control("ID-03")
def test_a_session_lasts_no_longer_than_a_session_may() -> None:
    directory = Path(tempfile.mkdtemp(prefix="saw-bastion-"))
    lab = Lab(directory, sessions=msgspec.structs.replace(RULES, max_duration_s=10))
    try:
        lab.start()
        with running(lab, directory) as bastion:
            folder, session = bastion.certify()
            assert Terminal(bastion.line(folder, extra=("-tt",))).ends() == 255
            assert bastion.closed(session)["reason"] == "max_duration"
    finally:
        lab.stop()
        shutil.rmtree(directory)
