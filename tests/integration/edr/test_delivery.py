"""Findings leave the box, wait where they cannot, and survive what kills the watcher."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys

import pytest
from edr_rig import BOUND_S, Host, until

from saw.audit import validate

pytestmark = pytest.mark.control("P0-03")


def job(host: Host, name: str) -> None:
    (host.root / "etc/cron.d" / name).write_text("* * * * * root true\n")


def told(lines: list[str]) -> list[dict]:
    return [json.loads(line.partition("] ")[2]) for line in lines]


def test_a_finding_reaches_the_hosts_log_as_an_rfc_5424_line_with_the_ocsf_event(host: Host) -> None:
    with host.watching():
        job(host, "job")
        lines = until(lambda: [line for line in host.log.lines() if 'kind="persistence"' in line], "the line")
    (event,) = told(lines)
    validate(event)
    assert event["unmapped"]["saw"]["subject"] == f"{host.root}/etc/cron.d/job"
    head = lines[0].split(" ", 6)
    assert head[0] == "<83>1"  # authpriv, error
    assert (head[3], head[5]) == ("saw-edr", "finding")
    assert head[6].startswith(f'[saw@61509 kind="persistence" uid="{event["metadata"]["uid"]}"] {{')


def test_findings_wait_while_the_log_is_away_and_arrive_once_each_when_it_is_back(host: Host) -> None:
    host.configure(syslog=str(host.folder / "later"))
    with host.watching() as process:
        job(host, "first")
        until(lambda: host.subjects("persistence") == ["/etc/cron.d/first"], "the finding")
        process.send_signal(signal.SIGKILL)
        process.wait(BOUND_S)
    status = json.loads(host.saw("status", "--json").stdout)
    assert status["waiting"] >= 1
    host.configure()
    with host.watching():
        until(lambda: any("cron.d/first" in line for line in host.log.lines()), "the line that waited")
        host.looked_again()
        assert sum("cron.d/first" in line for line in host.log.lines()) == 1


def test_a_full_spool_is_red_and_what_still_stands_is_found_once_there_is_room(host: Host) -> None:
    host.configure(syslog=str(host.folder / "nobody"), spool_limit=3)  # three are taken by the baselines
    with host.watching():
        job(host, "late")
        host.looked_again()
        assert host.subjects("persistence") == []
        red = host.saw("status")
        assert (red.returncode, "the spool is full" in red.stdout) == (1, True), red.stdout
    host.configure()
    with host.watching():
        until(lambda: host.subjects("persistence") == ["/etc/cron.d/late"], "the finding that had no room")
        until(lambda: "the spool is full" not in host.saw("status").stdout, "room in the spool")
        assert [one.partition(" since ")[0] for one in host.subjects("agent_unhealthy")] == ["the spool was full"]


def test_what_was_written_before_a_kill_is_there_after_it(host: Host) -> None:
    writer = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from saw.edr.detection import Detection
from saw.edr.service import factory_of
from saw.edr.store import Store

store = Store(Path(sys.argv[1]), 10**6)
for number in range(10**6):
    one = Detection("persistence", f"/etc/{number}", "A unit is new", f"key{number}")
    store.record([one], factory_of(), datetime.now(UTC), known={"persistence": {f"/etc/{number}": "mark"}})
    print(number, flush=True)
"""
    state = host.config.state
    process = subprocess.Popen([sys.executable, "-c", writer, str(state)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(20)]
    process.kill()
    said += [int(line) for line in process.communicate()[0].splitlines()]
    database = sqlite3.connect(state / "findings.db")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    (findings,) = database.execute("SELECT count(*) FROM finding").fetchone()
    (known,) = database.execute("SELECT count(*) FROM known").fetchone()
    database.close()
    assert findings == known >= len(said), "a finding and what it was found against came apart"


def test_an_agent_that_gets_ill_is_a_finding_once_and_one_that_is_well_is_none(host: Host) -> None:
    host.configure(malware=None, integrity=None)
    with host.watching() as process:
        assert host.saw("status", "--report").returncode == 0
        assert host.found("agent_unhealthy") == []
        process.send_signal(signal.SIGKILL)
        process.wait(BOUND_S)
    host.config.beat.unlink()
    for _ in range(2):
        assert host.saw("status", "--report").returncode == 1
    (event,) = [one.event for one in host.found("agent_unhealthy")]
    assert "the watcher does not run" in event["unmapped"]["saw"]["subject"]
    assert any("agent_unhealthy" in line for line in host.log.lines()), "a dead watcher delivered nothing"
    with host.watching():
        host.saw("status", "--report")
    host.config.beat.unlink()
    host.saw("status", "--report")
    assert len(host.found("agent_unhealthy")) == 2
