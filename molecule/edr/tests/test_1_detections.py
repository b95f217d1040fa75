"""On a booted host, with the units as they are installed: each bad case becomes a finding, its harmless twin does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

testinfra_hosts = ["bare"]
pytestmark = pytest.mark.control("P0-03")
#: The standard test file in two pieces, so that no scanner takes this file for it.
EICAR = ("X5O!P%@AP[4\\PZX54(P^)7CC)7}", "$EICAR-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*")
#: bash dials a listener of the same host and is driven over the connection.
SHELL = """
import signal, socket, subprocess
listener = socket.create_server(("127.0.0.1", 0))
dial = f"exec /bin/bash -i >& /dev/tcp/127.0.0.1/{listener.getsockname()[1]} 0>&1"
shell = subprocess.Popen(["/bin/bash", "-c", dial], start_new_session=True)
peer, _ = listener.accept()
signal.pause()
"""


def test_units_run_with_the_rights_they_need_and_no_others(host):
    for unit in ("saw-edr.service", "saw-edr-scan.timer", "saw-edr-health.timer"):
        assert host.service(unit).is_enabled
        assert host.service(unit).is_running
    assert host.check_output("systemctl show saw-edr --property=User --value") == "saw-edr"
    held = int(host.check_output("grep CapEff /proc/$(systemctl show saw-edr -p MainPID --value)/status | cut -f2"), 16)
    assert held == 1 << 2 | 1 << 19, "CAP_DAC_READ_SEARCH and CAP_SYS_PTRACE"
    assert host.file("/var/lib/saw/edr").mode == 0o700
    assert host.service("auditd").is_running is False, "a container has no audit of its own"
    assert host.run("systemctl is-failed auditd.service audit-rules.service").rc != 0
    assert host.file("/etc/audit/audit.rules").contains("saw-tampering"), "the rules are ready for a kernel with audit"


def test_scans_find_malware_and_changed_system_files_alone(host, subjects):
    host.run_expect([0], "saw edr scan")
    before = subjects("malware") + subjects("system_file_changed")
    assert before == []
    host.run_expect([0], "printf %%s%%s %s %s > /home/e.com; echo harmless > /home/note.com", *EICAR)
    host.run_expect(
        [0], "install -d -m 700 -o games /home/closed && install -m 600 -o games /home/e.com /home/closed/e.com"
    )
    host.run_expect([0], "cp /bin/false /usr/bin/tac; touch /usr/bin/head")
    host.run_expect([0], "systemctl start saw-edr-scan.service")
    assert sorted(subjects("malware")) == ["/home/closed/e.com", "/home/e.com"], "private files are looked at too"
    assert subjects("system_file_changed") == ["/usr/bin/tac"]


def test_the_watcher_finds_units_cron_jobs_setuid_files_and_tampering_alone(host, subjects, until):
    host.run_expect([0], "echo note > /etc/systemd/system/note.txt")
    host.run_expect([0], "touch /usr/lib/systemd/system/ssh.service /etc/audit/rules.d/audit.rules")
    host.run_expect([0], "printf '[Service]\\nExecStart=/bin/true\\n' > /etc/systemd/system/door.service")
    host.run_expect([0], "echo '* * * * * root true' > /etc/cron.d/door")
    host.run_expect([0], "cp /bin/true /srv/plain; cp /bin/true /srv/door; chmod 4755 /srv/door")
    host.run_expect([0], "echo '-D' >> /etc/audit/rules.d/audit.rules")
    until(lambda: "/srv/door" in subjects("setuid_file"), "the setuid file")
    until(lambda: "/etc/cron.d/door" in subjects("persistence"), "the job")
    assert subjects("setuid_file") == ["/srv/door"]
    assert set(subjects("persistence")) == {"/etc/systemd/system/door.service", "/etc/cron.d/door"}
    assert subjects("tampering") == ["/etc/audit/rules.d/audit.rules"]


def test_the_watcher_finds_a_reverse_shell(host, subjects, until):
    assert subjects("reverse_shell") == []
    host.run_expect([0], "systemd-run --quiet --unit=dialled python3 -c %s", SHELL)
    try:
        until(lambda: subjects("reverse_shell"), "the reverse shell")
        assert subjects("reverse_shell")[0].endswith("/bash")
    finally:
        host.run("systemctl stop dialled.service")


def test_the_commands_of_the_page_run_as_they_are_written(host):
    page = (Path(__file__).resolve().parents[3] / "docs/edr.md").read_text(encoding="utf-8")
    commands = [line for line in page.splitlines() if line.startswith("saw edr ") and "DIGEST" not in line]
    assert len(commands) == 5
    assert [line for line in commands if host.run(line).rc not in {0, 1} or host.run(line).stderr] == []
    shown = host.run("saw edr integrity --json")
    assert (shown.rc, json.loads(shown.stdout)["changed"].keys()) == (1, {"/usr/bin/tac"})
    host.run_expect([0], f"saw edr integrity --accept {json.loads(shown.stdout)['digest']}")
    host.run_expect([0], "saw edr integrity")


def test_findings_are_in_the_hosts_log(host, subjects, until):
    wanted = len(subjects("persistence"))
    until(
        lambda: host.check_output("journalctl -o cat --no-pager | grep -c 'kind=\"persistence\"'") == str(wanted),
        "lines",
    )


def test_a_dead_watcher_is_red_and_a_finding(host, subjects):
    well = json.loads(host.run("saw edr status --json").stdout)
    assert well["problems"] == []
    host.run_expect([0], "systemctl stop saw-edr.service")
    host.run_expect([0], "systemctl start saw-edr-health.service")
    assert host.run("saw edr status").rc == 1
    assert any("the watcher does not run" in text for text in subjects("agent_unhealthy"))
    host.run_expect([0], "systemctl start saw-edr.service")
    assert host.run("saw edr status").rc == 0
