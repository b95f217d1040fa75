"""Packages that stand in for others of the same name, in a repository signed with a key that is made here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests/integration/patching"))
from patching_rig import Repository, Signer

TOLD = {"Origin": "Debian", "Label": "Debian", "Suite": "stable", "Codename": "trixie"}


def package(folder: Path, name: str, version: str, files: Mapping[str, str], needs: str = "") -> Path:
    """Build one package of ``files`` (path: text; scripts may be run); ``needs`` is its field Depends."""
    tree = folder / name
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: A <a@example.com>\nDescription: stands in\n"
    for path, text in {"DEBIAN/control": control + (f"Depends: {needs}\n" if needs else ""), **files}.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
        (tree / path).chmod(0o755 if text.startswith("#!") else 0o644)
    deb = folder / f"{name}.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zgzip", "--build", tree, deb], check=True, stdout=sys.stderr)
    return deb


def repository(folder: Path, version: str, packages: Mapping[str, Mapping[str, str]], needs: Mapping[str, str]) -> None:
    """Make ``folder`` anew with ``archive.asc`` and the repository ``packages``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        signer = Signer(Path(scratch) / "gpg")
        (folder / "archive.asc").write_text(signer.public)
        made = Repository(folder / "packages", TOLD, signer)
        for name, files in packages.items():
            made.add(package(Path(scratch), name, version, files, needs.get(name, "")))
        signer.close()
