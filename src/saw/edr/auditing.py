"""Whether auditd records what it is to record: the daemon, the kernel's switch, our rules, and records that were lost.

Root can switch audit off without touching a file (``auditctl -e 0``, ``auditctl -D``), so that the kernel itself is asked.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import msgspec

AUDITCTL = "/usr/sbin/auditctl"
RULES = Path("/etc/audit/rules.d/50-saw-edr.rules")
_OURS = re.compile(r"(?:-k |-F key=)saw-")
_STATUS = re.compile(r"^(enabled|lost) (\d+)$", re.MULTILINE)
_COMMAND_S = 30


class AuditState(msgspec.Struct, frozen=True):
    """What the kernel says: its switch (0 off, 1 on, 2 locked), records lost since the boot, and how many of our rules it has."""

    enabled: int
    lost: int
    rules: int


def parse_state(status: str, rules: str) -> AuditState | None:
    """Read the output of ``auditctl -s`` and ``auditctl -l`` (auditctl(8)); None when it is not that."""
    found = {name: int(value) for name, value in _STATUS.findall(status)}
    if found.keys() != {"enabled", "lost"}:
        return None
    return AuditState(found["enabled"], found["lost"], count_ours(rules))


def count_ours(rules: str) -> int:
    """Return how many of these lines are rules with a key of ours."""
    return sum(1 for line in rules.splitlines() if line.startswith("-") and _OURS.search(line))


def audit_of(unit: Mapping[str, str], problems: list[str], *, auditctl: str = AUDITCTL, rules: Path = RULES) -> str:
    """Say how audit is, and add to ``problems`` why it is not well. ``unit`` is what systemd says of ``auditd.service``."""
    if unit.get("LoadState") != "loaded":
        problems.append("auditd is not installed")
        return "not installed"
    if unit.get("ActiveState") != "active":
        if unit.get("ConditionResult") == "no":
            return "off: the kernel gives this host no audit"
        problems.append("auditd does not run (systemctl status auditd)")
        return "not running"
    state = parse_state(_said(auditctl, "-s"), _said(auditctl, "-l"))
    if state is None:
        problems.append("the kernel does not say how its audit is (auditctl -s)")
        return "running; the kernel says nothing"
    if not state.enabled:
        problems.append("the kernel's audit is switched off (auditctl -e 1)")
    wanted = count_ours(rules.read_text(encoding="utf-8")) if rules.exists() else 0
    if state.rules < wanted or not wanted:
        problems.append(f"audit has {state.rules} of {wanted} rules of {rules} (augenrules --load)")
    if state.lost:
        problems.append(f"audit lost {state.lost} records since the boot")
    return f"running; {state.rules} of {wanted} rules, {state.lost} records lost"


def _said(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


__all__ = ["AuditState", "audit_of", "count_ours", "parse_state"]
