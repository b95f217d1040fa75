"""docs/baseline.md as it is written: its commands judge two reports, and its floor is one."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import yaml
from page import ROOT, run_page

from saw.baseline.judge import read_floor

HEAD = """\
report_version_major=1
report_datetime_start=2026-11-28 20:39:34
lynis_version=3.0.8
os_fullname=Debian GNU/Linux 13 (trixie)
suggestion[]=FILE-6310|To decrease the impact of a full /home file system, place /home on a separate partition|-|-|
"""
TAIL = "lynis_tests_done=239\nreport_datetime_end=2026-11-28 20:40:08\nhardening_index={index}\nfinish=true\n"


def test_the_commands_judge_two_reports(tmp_path: Path) -> None:
    page = (ROOT / "docs/baseline.md").read_text(encoding="utf-8")
    floor = re.search(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert floor is not None
    (tmp_path / "floor.yml").write_text(floor[1])
    for name, index in (("before", 61), ("after", 77)):
        (tmp_path / f"scans/{name}").mkdir(parents=True)
        (tmp_path / f"scans/{name}/control.dat").write_text(HEAD + TAIL.format(index=index))
    printed = run_page("docs/baseline.md", tmp_path, {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert "waived:      1" in printed[0]


def test_the_floor_of_this_repository_is_one_and_lies_between_an_untouched_host_and_what_was_measured() -> None:
    page = (ROOT / "docs/baseline.md").read_text(encoding="utf-8")
    measured = re.search(r"^\| hardening index \| 61 \| ([0-9]+) \|$", page, re.MULTILINE)
    assert measured is not None
    assert 61 < read_floor(ROOT / "molecule/baseline/tests/floor.yml").index < int(measured[1])
    assert yaml.safe_load((ROOT / "molecule/baseline/tests/floor.yml").read_text())["scanner"] == "lynis"
