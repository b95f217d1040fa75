"""Events reach a real rsyslog over RELP and TLS: nothing is lost or out of order, whichever end dies in the middle."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from siem_rig import CLIENT, SERVER, Certificates, Siem
from telemetry_rig import BOUND_S, Host, until, users_of, whole

pytestmark = pytest.mark.control("P0-05")


def receiver(siem: Siem, **changes: object) -> dict[str, object]:
    given = {
        "host": "127.0.0.1",
        "port": siem.port,
        "name": SERVER,
        "ca_file": str(siem.folder / "saw/ca.pem"),
        "timeout_s": 10,
    }
    return {**given, "certificate_file": str(siem.client[0]), "key_file": str(siem.client[1]), **changes}


def unlike(siem: Siem) -> list:
    """What the collector has, each event once, in the order of its first arrival."""
    return list({one.hash: one for one in siem.events()}.values())


def test_every_event_arrives_in_order_and_the_collectors_file_proves_itself(host: Host, siem: Siem) -> None:
    host.configure(receiver=receiver(siem))
    users = host.journal.sign_ins(100)
    with host.running():
        until(lambda: len(users_of(siem.events())) == 100, "all at the collector")
        well = until(lambda: [one for one in [host.saw("status", "--json")] if one.returncode == 0], "a good health")
        assert json.loads(well[0].stdout)["waiting"] == {"collector": 0}
    got = siem.events()
    assert users_of(got) == users
    assert whole(got)
    line = siem.lines()[1]
    assert line.startswith("<110>1 2026-11-30T00:00:00.001Z host-1 saw - 300201 [saw@32473 source=")
    command = [sys.executable, "-m", "saw.cli.main", "audit", "verify", "--syslog", "--file", str(siem.file)]
    proved = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False)
    assert proved.returncode == 0, proved.stdout + proved.stderr


@pytest.mark.thorough
def test_a_collector_that_is_killed_and_away_while_events_are_made_misses_none(host: Host, siem: Siem) -> None:
    host.configure(receiver=receiver(siem))
    users: list[str] = []
    with host.running():
        users += host.journal.sign_ins(150)
        until(lambda: len(siem.lines()) >= 40, "some at the collector")
        siem.kill()
        users += host.journal.sign_ins(150, 150)
        until(lambda: "events do not leave for the collector" in host.saw("status").stdout, "the problem")
        until(lambda: users_of(host.chain())[-1:] == users[-1:], "all in the spool")
        siem.start()
        until(lambda: len(unlike(siem)) == 301, "all at the collector")
        until(lambda: host.saw("status").returncode == 0, "a good health")
    got = unlike(siem)
    assert users_of(got) == users
    assert whole(got)
    assert host.findings("telemetry_gap") == []


@pytest.mark.thorough
def test_a_service_that_is_killed_in_the_middle_leaves_no_gap_at_the_collector(host: Host, siem: Siem) -> None:
    host.configure(receiver=receiver(siem))
    users: list[str] = []
    for _ in range(3):
        with host.running() as process:
            seen = len(siem.lines())
            users += host.journal.sign_ins(200, len(users))
            until(lambda seen=seen: len(siem.lines()) > seen + 20, "some at the collector")
            host.kill(process)
    with host.running():
        until(lambda: len(unlike(siem)) == 601, "all at the collector")
    assert users_of(unlike(siem)) == users
    assert whole(unlike(siem))


def test_a_full_spool_empties_into_a_collector_that_is_back_and_the_gap_arrives(host: Host, siem: Siem) -> None:
    siem.kill()
    host.configure(receiver=receiver(siem), spool_bytes=65536)
    users = host.journal.sign_ins(120)
    with host.running():
        until(lambda: "the spool is full" in host.saw("status").stdout, "the full spool")
        kept = len(users_of(host.chain()))
        host.journal.rotate()
        last = host.journal.sign_ins(3, 120)
        siem.start()
        until(lambda: users_of(siem.events())[-1:] == last[-1:], "what is left at the collector")
    got = unlike(siem)
    assert users_of(got) == users[:kept] + last
    assert whole(got)
    (gap,) = [one.event for one in got if one.event.get("finding_info", {}).get("types") == ["telemetry_gap"]]
    assert gap["unmapped"]["saw"]["cause"] == "spool_full"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("authority", "is not the receiver that was named"),
        ("name", "is not the receiver that was named"),
        ("certificate", "needs certificate_file"),
    ],
)
def test_only_the_named_collector_gets_anything_and_status_says_why_another_does_not(
    host: Host, siem: Siem, case: str, words: str
) -> None:
    other = Certificates(host.folder / "other")
    stranger = other.issue(CLIENT)
    wrong = {
        "authority": {"ca_file": str(other.folder / "ca.pem")},
        "name": {"name": "other.example.com"},
        "certificate": {"certificate_file": str(stranger[0]), "key_file": str(stranger[1])},
    }[case]
    host.configure(receiver=receiver(siem, **wrong))
    host.journal.sign_ins(3)
    with host.running():
        until(lambda: host.saw("status").returncode == 1, "the problem")
        assert words in (host.folder / "service.log").read_text()
        assert "events do not leave for the collector" in host.saw("status").stdout
    assert siem.lines() == []


def test_a_full_spool_loses_nothing_while_the_journal_keeps_it(host: Host, siem: Siem) -> None:
    siem.kill()
    host.configure(receiver=receiver(siem), spool_bytes=65536)
    users = host.journal.sign_ins(200)
    with host.running():
        until(lambda: "the spool is full" in host.saw("status").stdout, "the full spool")
        siem.start()
        until(lambda: users_of(unlike(siem))[-1:] == users[-1:], "all at the collector")
    assert users_of(unlike(siem)) == users
    assert whole(unlike(siem))
    assert host.findings("telemetry_gap") == []
