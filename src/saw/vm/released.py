"""No VM is made of, and none started on, an image without a current release record that enough officers signed.

The record is verified here, on the hypervisor, under the root that was pinned here: a broker that is lost, or somebody who
calls ``saw vm`` by hand, boots nothing that the officers did not release. It lies beside the image (``release.signed.json``, or
any name that ends so, where several images share a folder), or was handed over by the broker (:mod:`saw.vm.trust`). One that
counts is enough.

A reference boot (``saw vm measure``) runs before there is a record, and is no workspace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from saw import jsontext
from saw.attest.image_record import ReleaseRecord
from saw.errors import ConfigError
from saw.policy.envelope import MAX_ENVELOPE
from saw.vm import golden, secure_boot, trust
from saw.vm.spec import VmSpec
from saw.vm.trust import RecordRefusedError

SETTINGS = Path("/etc/saw/hypervisor.json")
BESIDE = "*release.signed.json"
MOST = 64
"""How many signed records beside an image are looked at."""
CURE = (
    "put its release.signed.json beside it, or hand it over: saw image hand-over NAME on the controller, saw vm accept here; "
    "the playbooks do this by themselves"
)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``/etc/saw/hypervisor.json``. Without the file records are required."""

    image_records: Literal["required", "unchecked"] = "required"


def required() -> bool:
    """Tell whether this hypervisor asks for records; a file that cannot be read is refused, not taken for a no."""
    try:
        settings = jsontext.decode(SETTINGS.read_bytes(), kind=Settings)
    except FileNotFoundError:
        return True
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{SETTINGS} cannot be used: {error}", cure="apply the role hypervisor again") from error
    return settings.image_records == "required"


def present() -> datetime:
    """Return the time against which a record's end is held."""
    return datetime.now(UTC)


def accept(raw: bytes, *, pin: bool = False, dry: bool = False) -> trust.Taken:
    """Take a hand-over (:func:`saw.vm.trust.take`). A hypervisor that asks for no records and has no root leaves it alone."""
    if not pin and not required() and not (trust.place() / "root.json").exists():
        return trust.Taken(changed=False, root_version=0, records=(), revoked=0)
    return trust.take(raw, present(), pin=pin, dry=dry)


def require(spec: VmSpec) -> ReleaseRecord | None:
    """Return the record that lets ``spec`` run, None where none is asked for; raise :class:`RecordRefusedError` otherwise."""
    if not spec.needs_record or not required():
        return None
    if not Path(spec.image).exists():
        raise golden.missing(Path(spec.image))
    record = find(Path(spec.image), spec.image_sha256)
    store = secure_boot.template_of(spec)
    named = record.secure_boot.variables_sha256 if record.secure_boot else None
    if named != (None if store is None else hashlib.sha256(store).hexdigest()):
        raise RecordRefusedError(
            "record_other_image",
            f"the variable store beside {spec.image} is not the one that the release record of {record.name} names",
            cure="copy the image's whole directory here again",
        )
    return record


def find(image: Path, sha256: str) -> ReleaseRecord:
    """Return a record for the image file ``image`` with the digest ``sha256`` that counts now.

    Raises :class:`RecordRefusedError` with the reason of the record that comes nearest: one about another image says least.
    """
    root, gone, now = trust.pinned_root(), trust.revoked(), present()
    refusals = []
    for file in _candidates(image, sha256):
        try:
            record = trust.check_record(_read(file), root, gone, now)
        except RecordRefusedError as error:
            refusals.append((1 if error.code == "image_revoked" else 2, str(file), error))
            continue
        if record.image_sha256 == sha256:
            return record
        words = f"it is about another image, {record.name} ({record.image_sha256})"
        refusals.append((3, str(file), RecordRefusedError("record_other_image", words, cure=CURE)))
    details: dict[str, object] = {"image": str(image), "image_sha256": sha256}
    if not refusals:
        raise RecordRefusedError(
            "record_missing", f"image {image} has no signed release record", cure=CURE, details=details
        )
    _, file_name, nearest = min(refusals, key=lambda item: item[:2])
    raise RecordRefusedError(
        nearest.code,
        f"image {image} is not released: {nearest.message}",
        cure=nearest.cure,
        details={**details, "record": file_name},
    )


def _candidates(image: Path, sha256: str) -> Iterator[Path]:
    yield from sorted((trust.place() / "records").glob(f"{sha256}.*.json"))
    yield from sorted(file for file in image.parent.glob(BESIDE) if file.is_file())[:MOST]


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(MAX_ENVELOPE + 1)
    except OSError as error:
        raise RecordRefusedError(
            "record_malformed", f"{file} cannot be read: {error.strerror}", cure="copy it again"
        ) from error
