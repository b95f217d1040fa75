"""On a booted host, with the unit as it is installed: what happens there arrives at a collector as OCSF."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

testinfra_hosts = ["bare"]
pytestmark = pytest.mark.control("P0-05")
BOUND_S = 180.0


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < end, f"not within {BOUND_S:.0f} s: {what}"
        time.sleep(0.5)


@pytest.fixture
def arrived(host) -> Callable[[int], list[dict]]:
    """The events of a class that the collector has."""

    def read(class_uid: int) -> list[dict]:
        text = host.run("cat /root/collector/received.jsonl").stdout
        records = [
            record
            for line in text.splitlines()
            for resource in json.loads(line)["resourceLogs"]
            for scope in resource["scopeLogs"]
            for record in scope["logRecords"]
        ]
        events = [json.loads(record["body"]["stringValue"]) for record in records]
        return [event for event in events if event["class_uid"] == class_uid]

    return read


def test_the_unit_runs_as_its_own_user_with_no_capability(host):
    assert host.service("saw-telemetry").is_enabled
    assert host.service("saw-telemetry").is_running
    assert host.check_output("systemctl show saw-telemetry --property=User --value") == "saw-telemetry"
    held = host.check_output("grep CapEff /proc/$(systemctl show saw-telemetry -p MainPID --value)/status | cut -f2")
    assert int(held, 16) == 0
    assert host.file("/var/lib/saw/telemetry").mode == 0o700
    assert "not-a-real-token" not in host.check_output(
        "cat /etc/saw/telemetry.json /etc/systemd/system/saw-telemetry.service"
    )


def test_sign_ins_accounts_and_services_arrive(host, arrived):
    host.run_expect([0], "sudo -u games /usr/bin/true verysecret")
    host.run_expect([0], "useradd --system telemetry-test && userdel telemetry-test")
    options = "-F /dev/null -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    host.run_expect([0], f"ssh {options} nobody-here@127.0.0.1 || true")
    host.run_expect([0], "systemctl reset-failed; systemd-run --quiet --unit=telemetry-failing false")
    sign_ins = {"sudo": "games", "sshd": "nobody-here"}
    for service, user in sign_ins.items():
        until(
            lambda service=service, user=user: any(
                (event["service"]["name"], event["user"]["name"]) == (service, user) for event in arrived(3002)
            ),
            f"the sign-in by {service}",
        )
    *_, ran = [event for event in arrived(3002) if event["user"]["name"] == "games"]
    assert (ran["status"], ran["unmapped"]["saw"]["runs"]) == ("Success", "/usr/bin/true")
    assert "verysecret" not in host.check_output("cat /root/collector/received.jsonl")
    assert {event["status"] for event in arrived(3002) if event["user"]["name"] == "nobody-here"} == {"Failure"}
    until(
        lambda: (
            [event["activity_name"] for event in arrived(3001) if event["user"]["name"] == "telemetry-test"][-1:]
            == ["Delete"]
        ),
        "the account",
    )
    until(
        lambda: any(event["app"]["name"] == "telemetry-failing.service" for event in arrived(6002)),
        "the service that failed",
    )
    assert host.run("saw telemetry status").rc == 0


def test_another_user_cannot_speak_for_sshd(host, arrived):
    words = "Accepted publickey for forged from 10.0.0.9 port 4022 ssh2"
    host.run_expect([0], "runuser -u games -- logger -t sshd %s", words)
    until(lambda: any(event["unmapped"]["saw"].get("claims") == "sshd" for event in arrived(0)), "the claim")
    assert not any(event["user"]["name"] == "forged" for event in arrived(3002))


def test_what_happens_while_the_collector_is_away_arrives_when_it_is_back(host, arrived):
    host.run_expect([0], "systemctl stop test-collector")
    host.run_expect([0], "sudo -u daemon /usr/bin/true")
    host.run_expect([0], "systemctl kill --signal=SIGKILL saw-telemetry")
    until(lambda: host.run("saw telemetry status").rc == 1, "the problem")
    host.run_expect([0], "systemd-run --quiet --unit test-collector python3 /root/collector/collector.py")
    until(lambda: any(event["user"]["name"] == "daemon" for event in arrived(3002)), "the sign-in")
    until(lambda: host.run("saw telemetry status").rc == 0, "a good health")
    assert not any(event["finding_info"]["types"] == ["telemetry_gap"] for event in arrived(2004))


def test_the_commands_of_the_page_run_as_they_are_written(host):
    page = (Path(__file__).resolve().parents[3] / "docs/telemetry.md").read_text(encoding="utf-8")
    commands = [line for line in page.splitlines() if line.startswith("saw telemetry ")]
    assert len(commands) == 3
    assert [line for line in commands if host.run(line).rc != 0 or host.run(line).stderr] == []
