"""Playbook image_build builds from a checkout: an installed collection, which is none, is told so before anything starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def play(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the playbook as it lies in an installed collection, in check mode."""
    installed = tmp_path / "installed/playbooks"
    installed.mkdir(parents=True)
    shutil.copy(ROOT / "playbooks/image_build.yml", installed)
    program = Path(sys.executable).with_name("ansible-playbook")
    return subprocess.run(
        [str(program), "-i", "localhost,", "--check", str(installed / "image_build.yml"), *options],
        capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path,
        env={**os.environ, "ANSIBLE_HOME": str(tmp_path / "home"), "ANSIBLE_FORCE_COLOR": "0", "COLUMNS": "500"},
    )  # fmt: skip


def test_an_installed_collection_is_told_to_name_a_checkout(tmp_path: Path) -> None:
    done = play(tmp_path)
    assert done.returncode != 0
    told = " ".join(done.stdout.split())
    assert f"{tmp_path}/installed is no checkout of the repository (packer/build.pkr.hcl is missing)" in told
    assert "-e image_build_repository=PATH" in told


def test_a_named_checkout_is_taken(tmp_path: Path) -> None:
    done = play(tmp_path, "-e", f"image_build_repository={ROOT}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_owners_keys_are_handed_on_one_by_one_and_left_out_where_none_is_named(tmp_path: Path) -> None:
    words = {"key": "/k/db.key", "certificate": "/k/db.crt", "variables": "/k/owner.fd"}
    told = [word for part, value in words.items() for word in ("-e", f"image_build_secure_boot_{part}={value}")]
    for given in (told, told[:2], []):
        (tmp_path / str(len(given))).mkdir()
        done = play(tmp_path / str(len(given)), "-v", "-e", f"image_build_repository={ROOT}", *given)
        assert done.returncode == 0, done.stdout + done.stderr
        for part, value in words.items():
            named = any(f"_{part}=" in word for word in given)
            assert (f'"--secure-boot-{part}", "{value}"' in " ".join(done.stdout.split())) is named, done.stdout


def test_a_verified_root_is_asked_for_and_left_out_by_default(tmp_path: Path) -> None:
    for told, asked in (([], False), (["-e", "image_build_root_verity=true"], True)):
        (tmp_path / str(asked)).mkdir()
        done = play(tmp_path / str(asked), "-v", "-e", f"image_build_repository={ROOT}", *told)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ('"--root-verity"' in done.stdout) is asked, done.stdout
