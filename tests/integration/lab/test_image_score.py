"""The scanner scores a tree in which nothing runs: it sees the tree, not this machine, and changes nothing there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from saw.baseline.report import read_report
from saw.image.disk import digest_of
from saw.image.hardening import LEFT_OUT, score_tree
from saw.lab.process import run

ROOT = Path(__file__).resolve().parents[3]
TARS = sorted((ROOT / "build/cache").glob("base-host-*.tar"))
BANNER = yaml.safe_load((ROOT / "roles/baseline/defaults/main.yml").read_text())["baseline_banner"]
pytestmark = [
    pytest.mark.control("P0-07"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts in a namespace of its own"),
    pytest.mark.skipif(not TARS, reason="no base tree in build/cache: run `make workspace` once"),
]


def seen(tree: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, size and time of each path below ``tree``."""
    found = {str(path.relative_to(tree)): path.lstat() for path in tree.rglob("*")}
    return {name: (status.st_mode, status.st_size, status.st_mtime_ns) for name, status in found.items()}


@pytest.mark.thorough
def test_a_tree_is_scored_and_left_as_it_was(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    run("tar", "-C", str(tree), "--numeric-owner", "-xpf", str(TARS[-1]))
    (tree / "etc/issue").write_text(BANNER)
    before = seen(tree)
    told = score_tree(tree, tmp_path)
    assert seen(tree) == before
    assert told == {"baseline.dat": digest_of(tmp_path / "baseline.dat")}
    report = read_report(tmp_path / "baseline.dat")
    assert (report.scanner, report.warnings) == ("lynis", ())
    assert 50 <= report.index <= 75, "the tree of an untouched host"
    assert report.tests > 150
    found = {one.test for one in report.suggestions}
    assert "BANN-7126" not in found, "it did not see the banner of the tree"
    assert {"BANN-7130", "AUTH-9286"} <= found
    assert not found & set(LEFT_OUT)
