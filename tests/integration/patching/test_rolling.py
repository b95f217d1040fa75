"""The rolling playbook, on hosts that really upgrade: it stops at a host that is not well, and goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from patching_rig import BOUND_S, Host

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.control("P0-02")


def test_it_stops_at_a_host_that_is_not_well_and_goes_on_when_that_is_mended(
    make_host: Callable[[str], Host], tmp_path: Path
) -> None:
    first, second = make_host("first"), make_host("second")
    inventory = {
        "all": {
            "hosts": {
                name: {"place": str(one.command().parent)} for name, one in (("first", first), ("second", second))
            },
            "vars": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable},
        }
    }
    (tmp_path / "inventory.json").write_text(json.dumps(inventory))
    told = {
        "patching_hosts": "all",
        "patching_rolling_saw": "{{ place }}/saw",
        "patching_rolling_failed": ["{{ place }}/bin/systemctl"],
    }

    def roll() -> subprocess.CompletedProcess[str]:
        command = [
            str(Path(sys.executable).with_name("ansible-playbook")),
            "--inventory",
            str(tmp_path / "inventory.json"),
        ]
        command += [str(ROOT / "playbooks/patching_rolling.yml"), "--extra-vars", json.dumps(told)]
        return subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False, cwd=ROOT)

    first.run("apt-mark", "hold", "kept")
    stopped = roll()
    assert stopped.returncode == 2, stopped.stdout + stopped.stderr
    assert "first is not well, so the hosts after it are left alone: kept is held" in " ".join(stopped.stdout.split())
    assert (first.version("plain"), second.version("plain")) == ("2", "1"), stopped.stdout

    first.hold("kept")
    (second.folder / "run/reboot-required").write_text("")
    went_on = roll()
    assert went_on.returncode == 0, went_on.stdout + went_on.stderr
    assert "second: the host needs a restart" in went_on.stdout
    assert "there is no reboot window" in " ".join(went_on.stdout.split())
    changed = {line.split()[0]: "changed=1" in line for line in went_on.stdout.splitlines() if "changed=" in line}
    assert changed == {"first": False, "second": True}
    assert [one.version("kept") for one in (first, second)] == ["1", "2"]
