"""The role drift_report, run for real in a mount namespace of its own: it forecasts, installs, repeats and ends the schedule."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
ROLE = ROOT / "roles/drift_report"
pytestmark = pytest.mark.control("P0-01")
#: Host → how it runs the role. All are this machine, one after the other.
STEPS = {
    "never": {"drift_report_enabled": False},
    "forecast": {"check": True},
    "first": {},
    "second": {},
    "ended": {"drift_report_enabled": False},
    "empty": {"drift_report_inventories": []},
}
ODD = '/srv/50% "of" $HOME/key'


def render(name: str, **variables: object) -> str:
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    environment = jinja2.Environment(  # noqa: S701 - configuration files, no HTML
        loader=jinja2.FileSystemLoader(ROLE / "templates"), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(name).render({**defaults, "ansible_managed": "by a test", **variables})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, tuple[int, int]], Path, str]:
    """Changed and failed tasks of each step, the folder of units as it was while the schedule was on, and all words."""
    folder = tmp_path_factory.mktemp("role")
    link = folder / "installed/ansible_collections/secure_agent/workspace"
    link.parent.mkdir(parents=True)
    link.symlink_to(ROOT)
    programs = Path(sys.executable).parent
    variables = {
        "drift_report_enabled": True, "drift_report_inventories": ["/etc/fleet/hosts.yml"], "drift_report_private_key": ODD,
        "drift_report_saw": str(programs / "saw"), "drift_report_waivers": "/etc/fleet/waivers.yml",
    }  # fmt: skip
    keep = {
        "name": "Keep",
        "ansible.builtin.command": f"cp -a /etc/systemd/system {folder}/kept",
        "changed_when": False,
    }
    plays = [
        {
            "hosts": host, "gather_facts": False, "check_mode": step.get("check", False), "connection": "local",
            "vars": {**variables, **{name: value for name, value in step.items() if name != "check"}},
            "roles": ["secure_agent.workspace.drift_report"],
            "post_tasks": [keep] if host == "second" else [],
        }
        for host, step in STEPS.items()
    ]  # fmt: skip
    (folder / "plays.yml").write_text(yaml.safe_dump(plays, sort_keys=False))
    inside = (
        "mount -t tmpfs tmpfs /etc/systemd/system && mkdir -p /var/lib/saw && mount -t tmpfs tmpfs /var/lib/saw &&"
        f" exec {programs}/ansible-playbook -i {','.join(STEPS)} -e ansible_python_interpreter={sys.executable} plays.yml"
    )
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", inside],
        capture_output=True, text=True, check=False, timeout=300, cwd=folder,
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(folder / "installed"), "ANSIBLE_HOME": str(folder / "home"),
             "ANSIBLE_NOCOLOR": "1", "ANSIBLE_PIPELINING": "1"},
    )  # fmt: skip
    recap = re.findall(r"^(\w+) +: ok=\d+ +changed=(\d+) +unreachable=0 +failed=(\d+)", done.stdout, re.MULTILINE)
    return (
        {host: (int(changed), int(failed)) for host, changed, failed in recap},
        folder / "kept",
        done.stdout + done.stderr,
    )


def test_it_is_off_unless_it_is_switched_on(run: tuple[dict[str, tuple[int, int]], Path, str]) -> None:
    assert run[0]["never"] == (0, 0), run[2]


def test_check_mode_forecasts_what_one_run_does_and_a_second_run_has_nothing_to_do(
    run: tuple[dict[str, tuple[int, int]], Path, str],
) -> None:
    counts = run[0]
    assert [counts[step] for step in ("forecast", "first", "second")] == [(1, 0), (1, 0), (0, 0)], run[2]


def test_the_schedule_is_on_at_boot_until_it_is_switched_off(run: tuple[dict[str, tuple[int, int]], Path, str]) -> None:
    assert (run[1] / "timers.target.wants/saw-drift-report.timer").is_symlink(), run[2]
    assert run[0]["ended"] == (1, 0), run[2]


def test_a_schedule_without_an_inventory_is_refused(run: tuple[dict[str, tuple[int, int]], Path, str]) -> None:
    assert run[0]["empty"] == (0, 1)
    assert "have to name something to look at" in run[2]


def test_the_unit_names_paths_alone_and_keeps_odd_ones_whole(run: tuple[dict[str, tuple[int, int]], Path, str]) -> None:
    text = (run[1] / "saw-drift-report.service").read_text()
    command = next(line for line in text.replace("\\\n", "").splitlines() if line.startswith("ExecStart="))
    assert ' drift check --report --state "/var/lib/saw/drift"' in command
    assert '--inventory "/etc/fleet/hosts.yml"' in command
    assert '--waivers "/etc/fleet/waivers.yml"' in command
    assert "--context" not in command
    assert 'Environment="ANSIBLE_PRIVATE_KEY_FILE=/srv/50%% \\"of\\" $HOME/key"' in text


@pytest.mark.parametrize(("schedule", "taken"), [("*-*-* 04:30:00 UTC", True), ("every day", False)])
def test_systemd_takes_the_units(tmp_path: Path, schedule: str, taken: bool) -> None:
    (tmp_path / "saw-drift-report.timer").write_text(
        render("saw-drift-report.timer.j2", drift_report_schedule=schedule)
    )
    words = {"drift_report_saw": sys.executable, "drift_report_inventories": [ODD], "drift_report_private_key": ODD}
    (tmp_path / "saw-drift-report.service").write_text(render("saw-drift-report.service.j2", **words))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / "saw-drift-report.timer")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) is taken, done.stderr
