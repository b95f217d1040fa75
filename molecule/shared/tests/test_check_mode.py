"""What every scenario promises after it converged: another look finds nothing to change (control P0-01)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

testinfra_hosts = ["localhost"]


@pytest.mark.control("P0-01")
def test_check_mode_reports_no_change():
    scenario = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"])
    command = [
        "ansible-playbook",
        "--check",
        "--inventory",
        os.environ["MOLECULE_INVENTORY_FILE"],
        scenario / "converge.yml",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [int(count) for count in re.findall(r"changed=(\d+)", done.stdout)]
    assert counts
    assert sum(counts) == 0, done.stdout
