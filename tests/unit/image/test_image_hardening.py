"""The scanner of a build: one that is missing is named before anything is built; a scan that does not end leaves no report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from saw.errors import SawError
from saw.image import hardening
from saw.image.disk import ImageError

pytestmark = pytest.mark.control("P0-07")


def test_a_missing_scanner_is_named_and_one_that_is_there_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "lynis"
    there.touch()
    monkeypatch.setattr(hardening, "PARTS", (there,))
    hardening.refuse_without_scanner()
    monkeypatch.setattr(hardening, "PARTS", (there, tmp_path / "db"))
    with pytest.raises(ImageError, match=f"{tmp_path}/db") as refused:
        hardening.refuse_without_scanner()
    assert "apt-get install lynis" in refused.value.cure


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts in a namespace of its own")
def test_a_tree_in_which_no_scanner_can_run_gets_no_report(tmp_path: Path) -> None:
    for folder in ("proc", "run", "tmp", "dev"):
        (tmp_path / "tree" / folder).mkdir(parents=True)
    with pytest.raises(SawError, match=r"the scan that scores .* failed: .*chroot: failed to run command"):
        hardening.score_tree(tmp_path / "tree", tmp_path)
    assert not (tmp_path / "baseline.dat").exists()
    assert [path.name for path in (tmp_path / "tree/dev").iterdir()] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="works in namespaces of its own")
def test_a_scan_without_end_is_ended_and_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "PATIENCE_S", 1)
    monkeypatch.setattr(hardening, "_SCRIPT", "exec sleep 600")
    with pytest.raises(ImageError, match=r"the scan that scores .* was ended after 1 s") as late:
        hardening.score_tree(tmp_path, tmp_path)
    assert "build again" in late.value.cure
