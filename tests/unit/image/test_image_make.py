"""`make image`: what its switches may be, and the answer of a build, which belongs to one run alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.control("P0-02")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile with a builder that answers ``$ANSWER`` or ends with ``$CODE``, and a release that shows what it was given."""
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    for name, text in {
        "scripts/bootstrap.sh": "",
        "scripts/image_release.sh": 'echo "released $(cat "$1")"; exit "${RELEASE:-0}"',
        ".venv/bin/python": 'echo "$ANSWER"; exit "${CODE:-0}"',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(checkout: Path, *words: str, **given: str) -> subprocess.CompletedProcess[str]:
    ours = {"PATH": os.environ["PATH"], "ANSWER": "one", **given}
    return subprocess.run(
        ["make", "--no-print-directory", "image", *words], cwd=checkout, env=ours, capture_output=True, text=True, check=False
    )  # fmt: skip


def test_the_answer_of_a_build_is_that_of_one_run(checkout: Path) -> None:
    (checkout / "build").mkdir()
    (checkout / "build/image.json").write_text("that of another run")
    assert "released one" in make(checkout).stdout
    failed = make(checkout, CODE="3")
    assert failed.returncode
    assert "released" not in failed.stdout
    assert make(checkout, RELEASE="4").returncode
    assert [path.name for path in (checkout / "build").iterdir()] == ["image.json"]
    assert (checkout / "build/image.json").read_text() == "that of another run"


@pytest.mark.parametrize("name", ["FRESH", "REUSE", "OLDER", "ROOT_VERITY"])
def test_a_switch_is_on_or_left_out(checkout: Path, name: str) -> None:
    assert make(checkout, f"{name}=1").returncode == 0
    assert make(checkout, f"{name}=").returncode == 0
    for value in ("0", "no", "2"):
        done = make(checkout, f"{name}={value}")
        assert done.returncode
        assert f"{name}={value} means nothing: give {name}=1, or leave it out" in done.stderr
        assert "released" not in done.stdout
