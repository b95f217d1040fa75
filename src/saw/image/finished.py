"""Finished images on this machine: their records, what they were made of, and why a newer one is built."""

from __future__ import annotations

from pathlib import Path

import msgspec

from saw import jsontext
from saw.image.disk import ImageError
from saw.image.inputs import PACKAGES, Inputs
from saw.image.packages import FILE, PackageSet, compare, read_set, words
from saw.image.secure_boot import SignedBy


class GoldenImage(msgspec.Struct, frozen=True):
    """A finished image on this machine."""

    name: str
    directory: str
    image: str
    image_sha256: str
    inputs_digest: str
    created: str
    seconds: float
    kernel: str
    variant: str = "cpu"
    evidence: dict[str, str] = msgspec.field(default_factory=dict)
    """Files beside the image (path → SHA-256): bills of materials, provenance, package set, the scanner's report, and the owner's
    variable store."""
    packages: dict[str, str] = msgspec.field(default_factory=dict)
    """The package set: its ``digest``, when the archive was ``asked``, and the date of its ``index`` (RFC 3339)."""
    secure_boot: SignedBy | None = None
    root_hash: str = ""
    """The hash (lower-case hex) that a verified root is checked against; empty where the root is none."""


Finished = tuple[GoldenImage, Inputs]
"""The record of a finished image, and the inputs that it was made of."""


def finished_in(images: Path) -> list[Finished]:
    """Return all finished images below ``images``, by where they lie now: a build directory may have been moved."""
    found = []
    for record in images.glob("workspace-*/build.json"):
        try:
            image = jsontext.decode(record.read_bytes(), kind=GoldenImage)
            inputs = jsontext.decode(record.with_name("inputs.json").read_bytes(), kind=Inputs)
        except (OSError, msgspec.DecodeError):
            continue
        file = record.with_name("image.qcow2")
        if file.exists():
            here = msgspec.structs.replace(image, directory=str(record.parent), image=str(file))
            found.append((here, inputs))
    return found


def kinds_in(images: Path) -> list[list[Finished]]:
    """Return the finished images by kind, each the newest first: a variant with its options does not push out another."""
    kinds: dict[tuple[str, tuple[tuple[str, str], ...]], list[Finished]] = {}
    for image, inputs in sorted(finished_in(images), key=lambda item: item[0].created, reverse=True):
        kinds.setdefault((image.variant, tuple(sorted(inputs.options.items()))), []).append((image, inputs))
    return list(kinds.values())


def packages_of(image: GoldenImage) -> PackageSet | None:
    """Return the package set of a finished image, None where it has none that counts (it was built by an older release)."""
    try:
        found = read_set(Path(image.directory) / FILE)
    except ImageError:
        return None
    return found if found.digest == image.packages.get("digest") else None


def made_of(inputs: Inputs, sources: Inputs) -> bool:
    """Whether an image of ``inputs`` was made of ``sources``, whatever its packages."""
    packages = inputs.files.get(PACKAGES)
    return inputs.digest == (sources.given(PACKAGES, packages) if packages else sources).digest


def why(inputs: Inputs, packages: PackageSet, older: Inputs, newest: PackageSet | None) -> str:
    """Say why an image is built though there is an older one."""
    changed = [name for name in inputs.changed_since(older) if name != PACKAGES]
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    reasons = [f"{', '.join(changed[:5])}{more} changed"] if changed else []
    changes = compare(newest, packages) if newest else []
    if changes:
        reasons.append(words(changes))
    elif newest is None:
        reasons.append("the packages of the newest image are not known")
    return f"rebuilt: {'; '.join(reasons)}"
