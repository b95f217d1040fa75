"""`make image` from the build on with all of its programs: score, record, search and signatures, or why there is none of them.

The image is a small one with bills that the real tools made; its build and its boot are answered, everything after is real.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from uki_parts import LYNIS, Golden, golden_folder

from saw.attest.image_record import PAYLOAD_TYPE, ReleaseRecord, parse_record
from saw.image.disk import digest_of
from saw.image.sbom import Sources, make_sboms
from saw.policy.envelope import verify_envelope
from saw.policy.keys import create_key, key_id, load_public_key

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.control("IMG-01")


@dataclass
class Checkout:
    """The Makefile with its programs, an image that the build answers, the keys of two officers, a tracker's database."""

    folder: Path
    golden: Golden
    keys: tuple[Path, ...]
    database: Path

    def make(self, *, ok: bool = True, **given: Any) -> str:
        """Run ``make image``; return what it printed."""
        words = {"MEASURED": self.golden.measured("measured.json"), **given}
        done = subprocess.run(
            ["make", "--no-print-directory", "image", *(f"{name}={value}" for name, value in words.items())],
            cwd=self.folder, capture_output=True, text=True, check=False, timeout=240,
            env={**os.environ, "MAKEFLAGS": ""},
        )  # fmt: skip
        assert (done.returncode == 0) is ok, done.stdout + done.stderr
        return done.stdout + done.stderr

    def track(self, **openssh: str) -> Path:
        """Write the tracker's database, with one vulnerability of openssh."""
        settled = {"status": "resolved", "fixed_version": "6.1.1-1", "urgency": "low"}
        known = {
            "linux": {"CVE-2025-1000": {"releases": {"trixie": settled}}},
            "openssh": {"CVE-2026-1": {"releases": {"trixie": openssh}}},
        }
        self.database.write_text(json.dumps(known), encoding="utf-8")
        return self.database

    def floor(self, index: int) -> Path:
        """Write a floor under the score."""
        path = self.folder / "floor.yml"
        path.write_text(f"scanner: lynis\nindex: {index}\n", encoding="utf-8")
        return path

    @property
    def signed(self) -> Path:
        return self.golden.folder / "release.signed.json"

    def record(self) -> ReleaseRecord:
        """The record as two officers signed it."""
        keys = {key_id(key): key for key in (load_public_key(path.with_suffix(".pub")) for path in self.keys)}
        return parse_record(verify_envelope(self.signed.read_bytes(), PAYLOAD_TYPE, keys, 2)[0])


@pytest.fixture
def checkout(sources: Sources, tmp_path: Path) -> Checkout:
    folder = tmp_path / "checkout"
    for name in ("Makefile", "scripts/image_release.sh"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    golden = golden_folder(tmp_path / "image")
    built = json.loads((golden.folder / "build.json").read_text())
    built["evidence"] |= make_sboms(sources, golden.folder, name=golden.name, seed="1" * 64)
    (golden.folder / "build.json").write_text(json.dumps(built))
    answer = tmp_path / "answer.json"
    answer.write_text(json.dumps({**built, "directory": str(golden.folder), "reason": "built: for a test"}))
    python = Path(sys.executable)
    for name, text in {
        "scripts/bootstrap.sh": "",
        ".venv/bin/python": f'case "$*" in *saw.image.build*) exec cat {answer};; esac; exec {python} "$@"',
        ".venv/bin/saw": f'exec {python.with_name("saw")} "$@"',
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    for name in ("scripts/bootstrap.sh", "scripts/image_release.sh", ".venv/bin/python", ".venv/bin/saw"):
        (folder / name).chmod(0o755)
    keys = []
    for name in ("ada", "ben"):
        create_key(tmp_path / "keys", name)
        keys.append(tmp_path / f"keys/{name}.key")
    return Checkout(folder, golden, tuple(keys), tmp_path / "tracker.json")


@pytest.mark.thorough
def test_one_command_scores_searches_and_signs_and_a_second_one_changes_nothing(checkout: Checkout) -> None:
    given = {
        "DATABASE": checkout.track(status="resolved", fixed_version="1:10.0p1-7", urgency="high"),
        "BASELINE_FLOOR": checkout.floor(74), "SIGN_KEY": " ".join(map(str, checkout.keys)),
    }  # fmt: skip
    said = checkout.make(**given)
    assert "index:       74" in said
    assert "not searched" not in said
    assert f"next: saw image register {checkout.signed}" in said
    record = checkout.record()
    assert record.missing(["sbom", "provenance", "scan", "baseline"]) == []
    assert (record.baseline and record.baseline.score, record.scan and record.scan.open) == (74, 0)
    assert record.scan is not None
    assert record.scan.image_sha256 == checkout.golden.sha256
    assert record.scan.database_sha256 == digest_of(checkout.database)
    raw = checkout.signed.read_bytes()
    checkout.make(**given)
    assert checkout.signed.read_bytes() == raw


@pytest.mark.thorough
def test_the_bare_command_scores_and_says_what_it_was_given_nothing_for(checkout: Checkout) -> None:
    said = checkout.make()
    assert "index:       74" in said
    assert "not searched: give the mirrored database of the distribution's security tracker, DATABASE=FILE" in said
    assert "not signed: no key was given (SIGN_KEY=" in said
    record = json.loads((checkout.golden.folder / "release.json").read_text())
    assert (record["baseline"]["score"], "scan" in record) == (74, False)
    assert not checkout.signed.exists()


@pytest.mark.thorough
@pytest.mark.parametrize("what", ["vulnerability", "floor", "no score"])
def test_what_does_not_hold_ends_the_command_and_nothing_is_signed(checkout: Checkout, what: str) -> None:
    given: dict[str, Any] = {"SIGN_KEY": checkout.keys[0]}
    if what == "vulnerability":
        given["DATABASE"] = checkout.track(status="resolved", fixed_version="1:10.0p1-8", urgency="low")
        words = "CVE-2026-1"
    elif what == "floor":
        given["BASELINE_FLOOR"] = checkout.floor(75)
        words = "the hardening index is 74, below the floor of 75"
    else:
        built = json.loads((checkout.golden.folder / "build.json").read_text())
        del built["evidence"]["baseline.dat"]
        (checkout.golden.folder / "build.json").write_text(json.dumps(built))
        (checkout.golden.folder / "baseline.dat").unlink()
        given["BASELINE_FLOOR"] = checkout.floor(75)
        words = "there is no score to hold against"
    assert words in checkout.make(ok=False, **given)
    assert not checkout.signed.exists()


def test_a_report_that_somebody_made_better_ends_the_command(checkout: Checkout) -> None:
    (checkout.golden.folder / "baseline.dat").write_text(LYNIS.format(index=99))
    assert "baseline.dat has SHA-256" in checkout.make(ok=False, SIGN_KEY=checkout.keys[0])
    assert not checkout.signed.exists()
