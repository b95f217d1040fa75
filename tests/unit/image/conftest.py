"""The directory of an image with bills that the real tools made, shared by the tests of bills and of searches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from image_rig import package_set

from saw.image.disk import digest_of
from saw.image.inputs import Inputs
from saw.image.provenance import Build, write_provenance
from saw.image.sbom import Sources, make_sboms

ROOT = Path(__file__).resolve().parents[3]
STATUS = """\
Package: linux-image-6.12-cloud-amd64
Status: install ok installed
Maintainer: Kernel Team <kernel@example.org>
Architecture: amd64
Source: linux
Version: 6.12.10-1
Description: kernel

Package: openssh-server
Status: install ok installed
Maintainer: OpenSSH Team <ssh@example.org>
Architecture: amd64
Source: openssh
Version: 1:10.0p1-7
Depends: linux-image-6.12-cloud-amd64
Description: server
"""


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """A tree with a package database, two wheels, and the locked MCP servers without their files."""
    top = tmp_path_factory.mktemp("sources")
    (top / "tree/var/lib/dpkg").mkdir(parents=True)
    (top / "tree/var/lib/dpkg/status").write_text(STATUS, encoding="utf-8")
    (top / "wheels").mkdir()
    for name in ("typing_extensions-4.16.0-py3-none-any.whl", "secure_agent_workspace-0.1.0-py3-none-any.whl"):
        (top / "wheels" / name).write_bytes(name.encode())
    (top / "mcp").mkdir()
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(ROOT / "packer/mcp" / name, top / "mcp" / name)
    lock = json.loads((top / "mcp/package-lock.json").read_text(encoding="utf-8"))
    for place, about in lock["packages"].items():
        if place:  # the files that `npm ci` would bring, as far as a bill reads them
            (top / "mcp" / place).mkdir(parents=True)
            (top / "mcp" / place / "package.json").write_text(
                json.dumps({"name": place.split("node_modules/")[-1], **about}), encoding="utf-8"
            )
    return Sources(top / "tree", top / "wheels", top / "mcp")


@pytest.fixture(scope="session")
def built(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an image with its bills, provenance and unsigned record."""
    folder = tmp_path_factory.mktemp("image")
    (folder / "image.qcow2").write_bytes(b"disk")
    base = folder / "base.tar"
    base.write_bytes(b"base")
    bills = make_sboms(sources, folder, name="workspace-1", seed="1" * 64)
    made = Build(
        "workspace-1", digest_of(folder / "image.qcow2"), Inputs("1" * 64, {"uv.lock": "2" * 64}), package_set(), base,
        sources.wheels, "2026-11-29T00:00:00+00:00", "2026-11-29T00:10:00+00:00",
    )  # fmt: skip
    record = {
        "format": "saw-image-release/2", "name": "workspace-1", "image_sha256": digest_of(folder / "image.qcow2"),
        "inputs_digest": "1" * 64, "created": "2026-11-29T00:10:00+00:00",
        "evidence": {**bills, **write_provenance(made, bills, folder)},
        "boot": {"pcrs": {str(pcr): f"{pcr:064x}" for pcr in range(14)}},
    }  # fmt: skip
    (folder / "release.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.fixture
def image(built: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(built, tmp_path / "image"))
