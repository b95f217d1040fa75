"""Finished images, package sets and an archive that answers what a test says, without building anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from saw.image import package_state
from saw.image.base import set_of
from saw.image.base_os import variable_file
from saw.image.build import ImageBuild
from saw.image.finished import GoldenImage
from saw.image.inputs import PACKAGES, Inputs
from saw.image.packages import FILE, IndexAway, PackageSet, write_set

ROOT = Path(__file__).resolve().parents[3]
OLD = {"openssl": "3.5.1-1", "bash": "5.2-1"}


def package_set(packages: dict[str, str] | None = None, *security: str, asked: str = "2026-01-01") -> PackageSet:
    """A package set of trixie."""
    day = f"{asked}T00:00:00+00:00"
    return PackageSet("trixie", day, day, packages or OLD, security)


def small_repository(root: Path) -> Path:
    """A repository with the base system and a package list, and nothing else to build of."""
    target = variable_file(root)
    target.parent.mkdir(parents=True)
    shutil.copyfile(variable_file(ROOT), target)
    (root / "packer/packages").mkdir()
    for name in ("workspace", "edr", "gpu"):
        (root / f"packer/packages/{name}.txt").write_text("openssl\n")
    return root


def finished(
    build: ImageBuild, inputs: Inputs, created: str = "2026-01-01T00:00:00+00:00", packages: PackageSet | None = None
) -> GoldenImage:
    """Write what a finished build leaves; without ``packages``, one of a release that did not record them."""
    if packages:
        inputs = inputs.given(PACKAGES, packages.digest)
    target = build.images / f"{build.variant.prefix}{inputs.digest[:12]}"
    target.mkdir(parents=True)
    (target / "image.qcow2").write_bytes(b"disk")
    image = GoldenImage(
        target.name, str(target), str(target / "image.qcow2"), "0" * 64, inputs.digest, created, 1.0, "6.12.1",
        build.variant.name, packages=packages.note() if packages else {},
    )  # fmt: skip
    if packages:
        write_set(target / FILE, packages)
    (target / "inputs.json").write_bytes(msgspec.json.encode(inputs))
    (target / "build.json").write_bytes(msgspec.json.encode(image))
    return image


def cached(base: package_state.Base, packages: PackageSet) -> Path:
    """Put a tar with ``packages`` into the cache."""
    base.cache.mkdir(parents=True, exist_ok=True)
    tar = (
        base.cache
        / f"{package_state.base_kind(base.listing, base.system, base.variant, base.more)}{packages.digest[:16]}.tar"
    )
    write_set(set_of(tar), packages)
    tar.write_bytes(b"tar")
    return tar


@dataclass
class Archive:
    """Answers ``answer``, or is away; counts how often it was asked, and what was built."""

    answer: PackageSet = field(default_factory=package_set)
    away: str = ""
    asked: int = 0
    made: list[PackageSet] = field(default_factory=list)

    def ask(self, *_: object, **__: object) -> PackageSet:
        """Stand in for :func:`saw.image.base.ask_base`."""
        self.asked += 1
        if self.away:
            raise IndexAway(self.away)
        return self.answer

    def make(self) -> Callable[[ImageBuild, Inputs, PackageSet], GoldenImage]:
        """Stand in for :meth:`ImageBuild.make`."""

        def make(build: ImageBuild, inputs: Inputs, packages: PackageSet) -> GoldenImage:
            self.made.append(packages)
            cached(build.base, packages)
            plain = Inputs(inputs.digest, inputs.files, inputs.options)
            return finished(build, plain, f"2026-02-01T00:00:0{len(self.made)}+00:00", packages)

        return make


def install(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """Let the build ask ``archive``, and build nothing."""
    monkeypatch.setattr(package_state, "ask_base", archive.ask)
    monkeypatch.setattr(ImageBuild, "make", archive.make())
    return archive
