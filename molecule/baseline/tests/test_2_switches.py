"""Areas switched off: what drifted in them stays as it is, and everything else is mended in the same run."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from itertools import combinations, permutations
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

testinfra_hosts = ["bare"]
pytestmark = pytest.mark.control("P0-01")
ROOT = Path(__file__).resolve().parents[3]


class Area(NamedTuple):
    """How one area drifts, the words by which ``--check --diff`` reports it, what tells, and the two answers."""

    drift: str
    words: str
    question: str
    drifted: str
    mended: str


SSHD = "/etc/ssh/sshd_config.d/50-saw-baseline.conf"
AREAS = {
    "kernel": Area(
        "sysctl --quiet --write net.ipv4.conf.all.accept_redirects=1", "-sysctl net.ipv4.conf.all.accept_redirects: 1",
        "sysctl -n net.ipv4.conf.all.accept_redirects", "1", "0",
    ),
    "modules": Area(
        "rm -f /etc/modprobe.d/50-saw-baseline.conf", "+install sctp /bin/false",
        "modprobe --showconfig | grep -c '^install sctp'", "0", "1",
    ),
    "mounts": Area(
        "mount -o remount,bind,exec,nosuid,nodev /tmp", "-mount /tmp: without noexec",
        "findmnt --noheadings --output OPTIONS --target /tmp | grep -c noexec", "0", "1",
    ),
    "pam": Area(
        "sed -i /authfail/d /etc/pam.d/common-auth; rm -f /etc/security/pwquality.conf.d/50-saw-baseline.conf", "+minlen = 14",
        "echo $(grep -c authfail /etc/pam.d/common-auth)-$(ls /etc/security/pwquality.conf.d | grep -c 50-saw)", "0-0", "1-1",
    ),
    "sudo": Area(
        "rm -f /etc/sudoers.d/50-saw-baseline", "+Defaults use_pty",
        "sudo --version >/dev/null && ls /etc/sudoers.d | grep -c 50-saw", "0", "1",
    ),
    "sshd": Area(
        f"sed -i 's/^PasswordAuthentication no/PasswordAuthentication yes/' {SSHD}", "-PasswordAuthentication yes",
        "sshd -T | grep ^passwordauth", "passwordauthentication yes", "passwordauthentication no",
    ),
    "umask": Area(
        "echo umask 000 > /etc/profile.d/50-saw-baseline.sh; sed -i 's/^UMASK.*/UMASK 000/' /etc/login.defs", "-umask 000",
        "echo $(grep -c 000 /etc/profile.d/50-saw-baseline.sh)-$(grep -c '^UMASK.000' /etc/login.defs)", "1-1", "0-0",
    ),
    "core_dumps": Area(
        "rm -f /etc/security/limits.d/50-saw-baseline.conf", "+* hard core 0",
        "ls /etc/security/limits.d | grep -c 50-saw", "0", "1",
    ),
    "journald": Area(
        "sed -i s/persistent/none/ /etc/systemd/journald.conf.d/50-saw-baseline.conf", "-Storage=none",
        "grep ^Storage /etc/systemd/journald.conf.d/50-saw-baseline.conf", "Storage=none", "Storage=persistent",
    ),
    "time_sync": Area(
        "systemctl disable --quiet systemd-timesyncd.service", "item=time_sync",
        "systemctl is-enabled systemd-timesyncd.service", "disabled", "enabled",
    ),
    "banner": Area(
        "echo 'Debian GNU/Linux 13' > /etc/issue.net; echo > /etc/ssh/sshd_config.d/51-saw-baseline-banner.conf",
        "-Debian GNU/Linux 13",
        "echo $(grep -c Linux /etc/issue.net)-$(sshd -T | grep ^banner)", "1-banner none", "0-banner /etc/issue.net",
    ),
    "accounts": Area(
        "usermod --shell /bin/bash games; sed -i 's/^PASS_MAX_DAYS.*/PASS_MAX_DAYS 99999/' /etc/login.defs",
        "-shell games: /bin/bash",
        "echo $(getent passwd games | cut -d: -f7)-$(grep -c '^PASS_MAX_DAYS.99999' /etc/login.defs)",
        "/bin/bash-1", "/usr/sbin/nologin-0",
    ),
    "files": Area("chmod 755 /etc/cron.d", "-mode /etc/cron.d: 0755", "stat -c %a /etc/cron.d", "755", "700"),
}  # fmt: skip
LOOK = "\n".join(f'echo "{name} $({area.question})"' for name, area in AREAS.items())
#: Which areas are off in each run. Every area is off in another three of the six, so that for any two of them there is a run
#: in which the one is off and the other is not: a switch that takes another area with it shows.
THREE_OF_SIX = dict(zip(AREAS, combinations("123456", 3), strict=False))
OFF = {number: {name for name, runs in THREE_OF_SIX.items() if number in runs} for number in "123456"}


class Runs(NamedTuple):
    """What each run left, by its number and by what was asked; and what the forecasts said."""

    forecast: dict[str, str]
    left_by_forecast: dict[str, dict[str, str]]
    left: dict[str, dict[str, str]]


def seen(folder: Path) -> dict[str, dict[str, str]]:
    return {file.name: dict(line.split(" ", 1) for line in file.read_text().splitlines()) for file in folder.iterdir()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, play) -> Iterator[Runs]:
    """The role without the areas of each run, once forecast and once in earnest, on a host that has drifted in all of them."""
    told, left = {}, []
    for mode in (["--check", "--diff"], []):
        folder = tmp_path_factory.mktemp("switches")
        values = {
            "switches": {number: sorted(off) for number, off in OFF.items()},
            "areas": list(AREAS),
            "drift": "\n".join(area.drift for area in AREAS.values()),
            "look": LOOK,
            "switches_folder": str(folder),
        }
        command = ["ansible-playbook", "-i", os.environ["MOLECULE_INVENTORY_FILE"], *mode]
        command += [ROOT / "molecule/baseline/switches.yml", "-e", json.dumps(values)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr
        left.append(seen(folder))
        if mode:
            parts = re.split(r"^TASK \[Drift before run (\d)\]", done.stdout, flags=re.MULTILINE)
            told = dict(zip(parts[1::2], parts[2::2], strict=True))
    yield Runs(told, *left)
    assert play("baseline").returncode == 0


def test_the_areas_are_those_of_the_role():
    defaults = yaml.safe_load((ROOT / "roles/baseline/defaults/main.yml").read_text())
    assert list(AREAS) == defaults["baseline_areas"]


def test_each_area_is_told_from_each_other_one_by_a_run():
    assert list(THREE_OF_SIX) == list(AREAS)
    assert all(any(a in off and b not in off for off in OFF.values()) for a, b in permutations(AREAS, 2))


@pytest.mark.parametrize("number", OFF)
def test_in_areas_that_are_off_drift_stays_and_all_else_is_mended(runs, number):
    wanted = {name: one.drifted if name in OFF[number] else one.mended for name, one in AREAS.items()}
    assert runs.left[number] == wanted


@pytest.mark.parametrize("number", OFF)
def test_a_forecast_is_silent_about_areas_that_are_off_and_names_all_else(runs, number):
    named = {name for name, one in AREAS.items() if one.words in runs.forecast[number]}
    assert named == AREAS.keys() - OFF[number]
    assert runs.left_by_forecast[number] == {name: one.drifted for name, one in AREAS.items()}, (
        "check mode changed something"
    )
