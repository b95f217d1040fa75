"""Provenance of a golden image: an in-toto statement (v1) with a SLSA provenance predicate (v1) beside the image.

It is no promise of its own: the release record, which officers sign, names its digest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rfc8785

from saw import __version__
from saw.files import write_atomic
from saw.image.disk import digest_of
from saw.image.inputs import PACKAGES, Inputs
from saw.image.packages import PackageSet

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://github.com/secure-agent/workspace/blob/main/docs/images.md#provenance"
BUILDER = "https://github.com/secure-agent/workspace/blob/main/src/saw/image/build.py"
FILE = "provenance.json"


@dataclass(frozen=True)
class Build:
    """One finished build: image name and SHA-256, its inputs, packages, the base tree's archive, wheels, and when (RFC 3339)."""

    name: str
    image_sha256: str
    inputs: Inputs
    packages: PackageSet
    base: Path
    wheels: Path
    begun: str
    ended: str
    variant: str = "cpu"


def statement(build: Build, byproducts: dict[str, str]) -> dict[str, Any]:
    """Return the statement; ``byproducts`` are files beside the image (path → SHA-256), the bills of materials."""
    parameters: dict[str, Any] = {
        "suite": build.packages.suite, "inputs_digest": build.inputs.digest, "packages": build.packages.note(),
    }  # fmt: skip
    if build.variant != "cpu":
        parameters["variant"] = build.variant
    materials = [
        {"uri": f"file:{path}", "digest": {"sha256": digest}}
        for path, digest in build.inputs.files.items()
        if path != PACKAGES
    ]
    materials.append({"uri": f"file:{build.base.name}", "digest": {"sha256": digest_of(build.base)}})
    materials += [
        {"uri": f"file:{wheel.name}", "digest": {"sha256": digest_of(wheel)}} for wheel in _wheels(build.wheels)
    ]
    return {
        "_type": STATEMENT,
        "subject": [{"name": build.name, "digest": {"sha256": build.image_sha256}}],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {**parameters, **build.inputs.options},
                "resolvedDependencies": materials,
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"saw": __version__}},
                "metadata": {"startedOn": build.begun, "finishedOn": build.ended},
                "byproducts": [
                    {"name": path, "digest": {"sha256": digest}} for path, digest in sorted(byproducts.items())
                ],
            },
        },
    }


def write_provenance(build: Build, byproducts: dict[str, str], target: Path) -> dict[str, str]:
    """Write ``target``/provenance.json in canonical form (RFC 8785); return its path → SHA-256."""
    write_atomic(target / FILE, rfc8785.dumps(statement(build, byproducts)))
    return {FILE: digest_of(target / FILE)}


def _wheels(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.whl"))
