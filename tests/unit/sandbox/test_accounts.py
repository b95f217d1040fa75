"""Accounts that roles make with a login shell keep it where the baseline closes the shells of system accounts."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROLES = Path(__file__).parents[3] / "roles"
FIRST_PERSON = 1000
"""UIDs from here on are people's (login.defs(5), UID_MIN); the baseline leaves their shells alone."""


def test_the_baseline_keeps_the_shell_of_each_account_that_sessions_run_a_command_through() -> None:
    made = [
        (found[1], found[2])
        for template in sorted(ROLES.glob("*/templates/*sysusers*"))
        for line in template.read_text(encoding="utf-8").splitlines()
        if (found := re.match(r'u (\S+) (\S+) ".*" \S+ \S*sh$', line))
    ]
    assert ("agent", "2000") in made
    system = {name for name, uid in made if not uid.isdecimal() or int(uid) < FIRST_PERSON}
    assert system == {"saw-forward"}
    defaults = yaml.safe_load((ROLES / "baseline/defaults/main.yml").read_text(encoding="utf-8"))
    assert system <= set(defaults["baseline_login_accounts"])


def test_the_baseline_keeps_the_shell_of_each_account_that_a_task_makes() -> None:
    """Such as the bastion's: without its shell nobody opens a session, and the two roles undo each other in each run."""
    made = {}
    for path in sorted(ROLES.glob("*/tasks/*.yml")):
        for task in yaml.safe_load(path.read_text(encoding="utf-8")) or ():
            user = task.get("ansible.builtin.user", {})
            if "shell" in user:
                variable = re.fullmatch(r"\{\{ (\w+) \}\}", user["name"])
                own = yaml.safe_load((path.parents[1] / "defaults/main.yml").read_text(encoding="utf-8"))
                made[own[variable[1]] if variable else user["name"]] = user["shell"]
    assert made == {"saw-session": "/opt/saw/libexec/saw-session"}
    defaults = yaml.safe_load((ROLES / "baseline/defaults/main.yml").read_text(encoding="utf-8"))
    assert made.keys() <= set(defaults["baseline_login_accounts"])
