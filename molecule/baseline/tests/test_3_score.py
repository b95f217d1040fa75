"""An external scanner finds the host better than before, and no worse than the repository says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

testinfra_hosts = ["bare"]
ROOT = Path(__file__).resolve().parents[3]
KEPT = ROOT / "build/molecule/baseline"
FLOOR = ROOT / "molecule/baseline/tests/floor.yml"
SAW = Path(sys.executable).with_name("saw")


def saw(*words):
    return subprocess.run([SAW, "baseline", *words, "--json"], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.control("P0-07")
def test_the_score_rises_and_holds_the_floor(host, play):
    kept = host.run("ls -A /root /tmp /var/tmp").stdout
    done = play("baseline_scan", "-e", f"baseline_scan_output={KEPT}/after", "-e", f"baseline_scan_floor={FLOOR}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert host.run("ls -A /root /tmp /var/tmp").stdout == kept, "the scan left something behind"
    before, after = KEPT / "before/bare.dat", KEPT / "after/bare.dat"
    up = saw("compare", before, after)
    answer = json.loads(up.stdout)
    assert up.returncode == 0, answer
    assert answer["after"] - answer["before"] >= 10, answer
    assert {"BANN-7126", "USB-1000", "AUTH-9286"} <= {one["test"] for one in answer["gone"]}
    down = saw("compare", after, before)
    assert (down.returncode, json.loads(down.stdout)["problems"]) == (
        1,
        [f"the hardening index fell from {answer['after']} to {answer['before']}"],
    )
    low = saw("score", before, "--floor", FLOOR)
    assert low.returncode == 1, "the floor lies under the score of an untouched host"
