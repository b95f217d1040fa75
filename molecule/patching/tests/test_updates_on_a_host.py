"""On a booted host, with the units as they are installed: schedule, window, report, and a rolling run of the playbook."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

testinfra_hosts = ["bare"]
pytestmark = pytest.mark.control("P0-02")
ROOT = Path(__file__).resolve().parents[3]


def told(host, *words: str) -> dict:
    return json.loads(host.run(f"/opt/saw/bin/saw patch {' '.join(words)} --json").stdout)


def play(tmp_path: Path, playbook: str, variables: dict, *options: str) -> subprocess.CompletedProcess:
    (tmp_path / "variables.json").write_text(json.dumps({"patching_hosts": "hardened", **variables}))
    command = ["ansible-playbook", "--inventory", os.environ["MOLECULE_INVENTORY_FILE"], playbook]
    command += ["-e", f"@{tmp_path / 'variables.json'}", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=400, stdin=subprocess.DEVNULL)


def test_the_schedule_is_ours_and_debians_gave_way(host):
    for unit in ("saw-patching.timer", "saw-patching-report.timer", "saw-patching-reboot.timer"):
        assert host.service(unit).is_enabled
        assert host.service(unit).is_running
    for unit in ("apt-daily.timer", "apt-daily-upgrade.timer", "unattended-upgrades.service"):
        assert not host.service(unit).is_enabled
        assert not host.service(unit).is_running
    assert host.check_output("apt-mark showhold") == "kept"


def test_the_report_runs_with_the_rights_that_it_needs(host):
    host.run_expect([0], "systemctl start saw-patching-report.service")
    known = host.check_output("journalctl --no-pager -o cat -u saw-patching-report.service")
    assert "security updates" in known


def test_a_rolling_run_upgrades_from_the_listed_source_alone_and_a_restart_waits_for_its_window(host, tmp_path):
    assert host.run("cat /opt/probe/*").stdout.split() == ["1", "1", "1"]
    forecast = play(tmp_path, "secure_agent.workspace.patching_rolling", {}, "--check")
    assert forecast.returncode == 0, forecast.stdout
    assert "changed=0" in forecast.stdout
    host.run_expect([0], "touch /run/reboot-required")
    # a window that is not now
    done = play(tmp_path, "secure_agent.workspace.patching_rolling", {})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=1" in done.stdout
    state = {name: host.check_output(f"cat /opt/probe/{name}") for name in ("plain", "other", "kept")}
    assert state == {"plain": "2", "other": "1", "kept": "1"}
    host.run_expect([0], "rm /run/reboot-required")
    again = play(tmp_path, "secure_agent.workspace.patching_rolling", {})
    assert (again.returncode, "changed=0" in again.stdout) == (0, True), again.stdout


def test_the_unit_of_the_schedule_installs_too(host):
    host.run_expect([0], "dpkg --install /srv/repository/old/plain_1_all.deb")
    host.run_expect([0], "systemctl start saw-patching.service")
    assert host.check_output("cat /opt/probe/plain") == "2"
    assert told(host, "status")["problems"] == []


def test_a_running_workspace_keeps_the_host_from_restarting(host):
    host.run_expect([0], "touch /run/reboot-required")
    host.run_expect([0], "systemd-run --quiet --unit=saw-vm@ws-1 sleep infinity")
    try:
        refused = told(host, "reboot", "--outside-window", "--dry-run")
        assert refused["error"]["details"]["refusals"] == ["an engagement would be cut off: saw-vm@ws-1.service runs"]
    finally:
        host.run("systemctl stop saw-vm@ws-1.service")
    assert told(host, "reboot", "--outside-window", "--dry-run")["needed"] is True
    host.run_expect([0], "rm /run/reboot-required")


def test_the_commands_of_the_page_run_as_they_are_written(host):
    page = (ROOT / "docs/patching.md").read_text(encoding="utf-8")
    commands = [line for line in page.splitlines() if line.startswith("saw patch ")]
    assert len(commands) == 5
    assert [line for line in commands if host.run(f"PATH=/opt/saw/bin:$PATH {line}").rc not in {0, 1}] == []


def test_a_hold_past_its_end_is_refused_before_anything_changes(tmp_path):
    late = {"patching_holds": [{"package": "kept", "owner": "ann", "reason": "why", "until": "2026-01-31"}]}
    refused = play(tmp_path, "secure_agent.workspace.patching", late)
    assert (refused.returncode, "changed=0" in refused.stdout) == (2, True), refused.stdout
    assert "patching_holds holds kept past the end" in " ".join((refused.stdout + refused.stderr).split())
