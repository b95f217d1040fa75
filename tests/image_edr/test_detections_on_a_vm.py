"""A real VM of an image with endpoint detection: each bad case becomes a finding at the broker, its harmless twin does not."""

from __future__ import annotations

import pytest
from edr_findings import DOOR, Findings
from vm_access import Workspace, wait_until

pytestmark = pytest.mark.control("P0-03")
#: Under emulation on a busy machine a scan of everything takes long.
SCAN_S = 2400


def test_a_quiet_workspace_reports_what_it_took_as_known_and_no_attack(
    workspace: Workspace, findings: Findings
) -> None:
    areas = {"protected", "persistence", "setuid"}
    wait_until("what was taken as known", lambda: areas <= set(findings.subjects("baseline_taken")), patience=900)
    told = [one for one in findings.all() if one["kind"] not in {"baseline_taken", "agent_unhealthy"}]
    ours = [one for one in told if one.get("package") == "saw (policy in force)"]
    assert {one["severity"] for one in ours} <= {"Low"}, "units of the sandbox, as the signed policy has them"
    assert [one for one in told if one not in ours] == []
    assert workspace.show()["state"] == "active"


def test_what_is_written_into_the_stopped_disk_is_found_at_the_next_boot(rooted: Workspace, findings: Findings) -> None:
    findings.await_subject("persistence", "/etc/systemd/system/door.service")
    findings.await_subject("tampering", "/etc/audit/rules.d/door.rules")
    findings.await_subject("setuid_file", "/srv/door")
    ours = tuple(f"/run/systemd/system/{name}" for name in ("saw-", "run-saw-", "sandbox.slice"))
    units = {one for one in findings.subjects("persistence") if not one.startswith(ours)}
    system = "/etc/systemd/system"
    assert units == {
        f"{system}/door.service",
        f"{system}/implant.service",
        f"{system}/multi-user.target.wants/implant.service",
    }
    assert findings.subjects("tampering") == ["/etc/audit/rules.d/door.rules"]
    assert findings.subjects("setuid_file") == ["/srv/door"]
    assert rooted.show()["state"] == "active", "what is in the root file system is not measured"


def test_audit_runs_in_the_vm_with_every_rule_and_its_log_is_bounded(rooted: Workspace) -> None:
    limits = "grep -E '^(max_log|num_logs)' /etc/audit/auditd.conf"
    _, text = rooted.root(f"systemctl is-active auditd; /opt/saw/bin/saw edr status --json; {limits}", timeout=600)
    assert text.startswith("active\n"), text
    assert "rules, 0 records lost" in text
    assert "audit has" not in text
    assert "max_log_file = 8" in text
    assert "max_log_file_action = ROTATE" in text


def test_what_root_does_in_the_running_vm_is_found_and_audit_keeps_who_did_it(
    rooted: Workspace, findings: Findings
) -> None:
    code, text = rooted.root(
        f"set -e; printf '{DOOR}' > /etc/systemd/system/second.service; cp /bin/true /srv/second; chmod 4755 /srv/second",
        timeout=600,
    )
    assert code == 0, text
    findings.await_subject("persistence", "/etc/systemd/system/second.service")
    findings.await_subject("setuid_file", "/srv/second")
    kept = "ausearch --input-logs -k saw-setuid | grep -c second; ausearch --input-logs -k saw-persistence | grep -c second"
    code, text = rooted.root(kept, timeout=600)
    assert code == 0, text
    assert all(int(line) > 0 for line in text.split())


@pytest.mark.parametrize(
    ("attack", "words", "cure"),
    [
        ("auditctl -e 0", "the kernel's audit is switched off", "auditctl -e 1"),
        ("auditctl -D", "audit has 0 of", "augenrules --load"),
    ],
)
def test_audit_that_is_switched_off_without_touching_a_file_is_found(
    rooted: Workspace, findings: Findings, attack: str, words: str, cure: str
) -> None:
    assert all(words not in one for one in findings.subjects("agent_unhealthy"))
    code, text = rooted.root(
        f"{attack} >/dev/null; systemctl start saw-edr-health.service; {cure} >/dev/null", timeout=600
    )
    assert code == 0, text
    findings.await_subject("agent_unhealthy", words)


def test_the_scan_finds_malware_and_changed_system_files_alone(rooted: Workspace, findings: Findings) -> None:
    findings.await_subject("malware", "/srv/e.com", SCAN_S)
    findings.await_subject("system_file_changed", "/usr/bin/tac", SCAN_S)
    assert findings.subjects("malware") == ["/srv/e.com"]
    assert findings.subjects("system_file_changed") == ["/usr/bin/tac"], "the image's database fits the image"
    del rooted
