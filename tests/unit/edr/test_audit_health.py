"""What endpoint detection says of audit, from what the kernel told a real VM through ``auditctl``."""

from __future__ import annotations

from pathlib import Path

import pytest

from saw.edr.auditing import AuditState, audit_of, count_ours, parse_state

pytestmark = pytest.mark.control("P0-03")
STATUS = """enabled 1
failure 1
pid 344
rate_limit 0
backlog_limit 8192
lost 0
backlog 0
backlog_wait_time 60000
backlog_wait_time_actual 0
loginuid_immutable 0 unlocked
"""
RULES = """-w /etc/audit -p wa -k saw-tampering
-w /etc/somewhere -p wa -k theirs
-a always,exit -F arch=b64 -S chmod,fchmod -F a1&0x800 -F key=saw-setuid
"""
FILE = """# -w /not/a/rule -p wa -k saw-tampering
-w /etc/audit/ -p wa -k saw-tampering
-a always,exit -F arch=b64 -S chmod,fchmod -F a1&04000 -k saw-setuid
"""
RUNS = {"LoadState": "loaded", "ActiveState": "active", "ConditionResult": "yes"}


def asked(
    folder: Path, status: str = STATUS, rules: str = RULES, unit: dict[str, str] | None = None
) -> tuple[str, list[str]]:
    """Ask a program that answers as auditctl did, with rules of ours in a file."""
    folder.mkdir(exist_ok=True)
    (folder / "-s").write_text(status)
    (folder / "-l").write_text(rules)
    program = folder / "auditctl"
    program.write_text(f'#!/bin/sh\nexec cat -- "{folder}/$1"\n')
    program.chmod(0o755)
    (folder / "ours.rules").write_text(FILE)
    problems: list[str] = []
    text = audit_of(RUNS if unit is None else unit, problems, auditctl=str(program), rules=folder / "ours.rules")
    return text, problems


def test_what_the_kernel_says_is_read() -> None:
    assert parse_state(STATUS, RULES) == AuditState(1, 0, 2)
    assert parse_state("", RULES) is None
    assert parse_state("enabled 1\nlost many\n", RULES) is None
    assert (count_ours(FILE), count_ours("No rules\n")) == (2, 0)


def test_audit_that_runs_with_its_rules_is_well(tmp_path: Path) -> None:
    assert asked(tmp_path / "a") == ("running; 2 of 2 rules, 0 records lost", [])
    assert asked(tmp_path / "b", STATUS.replace("enabled 1", "enabled 2"))[1] == [], "locked is on"


@pytest.mark.parametrize(
    ("status", "rules", "words"),
    [
        (STATUS.replace("enabled 1", "enabled 0"), RULES, "the kernel's audit is switched off"),
        (STATUS.replace("lost 0", "lost 17"), RULES, "audit lost 17 records since the boot"),
        (STATUS, "No rules\n", "audit has 0 of 2 rules"),
        (STATUS, RULES.splitlines()[0], "audit has 1 of 2 rules"),
        ("", "", "the kernel does not say how its audit is"),
    ],
)
def test_audit_that_records_less_than_it_should_is_red(tmp_path: Path, status: str, rules: str, words: str) -> None:
    (problem,) = asked(tmp_path / "a", status, rules)[1]
    assert words in problem


@pytest.mark.parametrize(
    ("unit", "text", "red"),
    [
        ({"LoadState": "not-found"}, "not installed", True),
        ({"LoadState": "loaded", "ActiveState": "inactive", "ConditionResult": "yes"}, "not running", True),
        ({"LoadState": "loaded", "ActiveState": "inactive", "ConditionResult": "no"}, "off: the kernel gives", False),
    ],
)
def test_an_auditd_that_does_not_run_is_red_unless_the_kernel_has_no_audit(
    tmp_path: Path, unit: dict[str, str], text: str, red: bool
) -> None:
    said, problems = asked(tmp_path / "a", unit=unit)
    assert said.startswith(text)
    assert bool(problems) is red
