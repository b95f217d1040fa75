"""The file below a VM's root disk is the golden image that was asked for, byte by byte.

The root disk is an overlay, so nearly all that a VM reads comes from the image file, and the boot measurements cover firmware
and kernel only. The driver therefore hashes the file before a root disk is laid on it, and before a start whenever the file is
not the very one that was hashed: device, inode, size, modification and change time are kept beside the VM's disks. A person
who can write there is root on the hypervisor, against whom this does not help.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec

from saw import jsontext
from saw.files import write_private
from saw.vm.programs import run
from saw.vm.spec import STATE, VmError, VmSpec, load_spec

RECORD = "image.verified"
IMAGES = Path("/var/lib/saw/images")
"""Where a hypervisor's images lie, unless somebody names another place."""


class ImageRefusedError(VmError):
    """The image file is not what its digest says, or is not a whole image."""

    code = "image_refused"


class Hashed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that was hashed, and what tells whether it is still the same one (stat(2); times in nanoseconds)."""

    path: str
    sha256: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def hash_image(path: Path) -> Hashed:
    """Hash the file at ``path``; raise :class:`VmError` when it is not there, or changes while it is read."""
    try:
        with path.open("rb") as stream:
            before = os.fstat(stream.fileno())
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            after = os.fstat(stream.fileno())
    except FileNotFoundError as error:
        raise missing(path) from error
    except OSError as error:
        raise VmError(f"image {path} cannot be read: {error.strerror}", cure="copy the image again") from error
    if _seen(path, digest, before) != (hashed := _seen(path, digest, after)):
        raise ImageRefusedError(f"image {path} changed while it was read", cure="wait until its copy is complete")
    return hashed


def find(sha256: str, name: str = "") -> Path:
    """Return an image file of this hypervisor with the digest ``sha256``; raise :class:`VmError` when there is none.

    Looked at are the files below ``IMAGES``, and those beside the images that its VMs lie on. Each that fits is read whole, those
    with ``name`` in their path first.
    """
    used = [Path(load_spec(found.parent.name).image) for found in STATE.glob("*/spec.json")]
    places = {IMAGES, *(path.parent for path in used), *(path.parent.parent for path in used)}
    files = {
        file.absolute() for place in places for pattern in ("*.qcow2", "*/*.qcow2") for file in place.glob(pattern)
    }
    for file in sorted(files, key=lambda file: (name not in file.parts and file.stem != name, file)):
        if file.is_file() and hash_image(file).sha256 == sha256:
            return file
    raise VmError(
        f"no file on this hypervisor is image {name or sha256} (SHA-256 {sha256})",
        cure=f"copy it to {IMAGES}/{name or 'NAME'}/image.qcow2",
        details={"image_sha256": sha256, "looked_at": sorted(str(file) for file in files)},
    )


def verify(spec: VmSpec, *, again: bool = False) -> None:
    """Make sure that the image file of ``spec`` has the digest of ``spec``; raise :class:`ImageRefusedError` otherwise.

    It is read when it is not the file that was verified for this VM before, and always with ``again``.
    """
    path = Path(spec.image)
    if not again and recorded(spec) == current(path, spec.image_sha256):
        return
    hashed = hash_image(path)
    matches(hashed, spec.image_sha256)
    remember(spec, hashed)


def matches(hashed: Hashed, wanted: str) -> None:
    """Raise :class:`ImageRefusedError` unless ``hashed`` is a whole image with the digest ``wanted``."""
    if hashed.sha256 != wanted:
        raise ImageRefusedError(
            f"image {hashed.path} has SHA-256 {hashed.sha256}, wanted is {wanted}",
            cure="copy the released image there again; if it was right before, find out who changed it",
            details={"image": hashed.path, "found": hashed.sha256, "wanted": wanted},
        )
    shown: dict[str, Any] = jsontext.decode(run("qemu-img", "info", "-f", "qcow2", "--output=json", hashed.path).stdout)
    outside = shown.get("backing-filename") or shown.get("format-specific", {}).get("data", {}).get("data-file")
    if outside:
        raise ImageRefusedError(
            f"image {hashed.path} reads from another file, {outside}, which its digest does not cover",
            cure="make it whole: qemu-img convert -O qcow2",
            details={"image": hashed.path, "outside": outside},
        )


def remember(spec: VmSpec, hashed: Hashed) -> None:
    """Keep ``hashed`` beside the VM's disks."""
    spec.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(spec.directory / RECORD, msgspec.json.encode(hashed))


def recorded(spec: VmSpec) -> Hashed | None:
    """Return what was verified for this VM, or None."""
    try:
        return jsontext.decode((spec.directory / RECORD).read_bytes(), kind=Hashed)
    except (OSError, msgspec.DecodeError):
        return None


def current(path: Path, sha256: str) -> Hashed:
    """Return how a file at ``path`` with the digest ``sha256`` would be recorded now."""
    try:
        return _seen(path, sha256, path.stat())
    except OSError as error:
        raise missing(path) from error


def missing(path: Path) -> VmError:
    """Return the error for an image that is not there."""
    return VmError(f"image {path} is not on this hypervisor", cure="run the image_build playbook")


def _seen(path: Path, sha256: str, status: os.stat_result) -> Hashed:
    return Hashed(
        str(path), sha256, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )
