"""The release record of a finished image, before anybody signs it: what was built, what its boot measures, and the evidence.

    release.json      the record
    reference.json    the reference boot that it rests on

Both lie beside the image and are made for its very bytes. What is there for these bytes is not made again, so a run that was cut
off goes on where it was; the boot, which takes most of the time, is kept before the record is written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from saw import jsontext
from saw.attest.image_record import (
    BASELINE_REPORT,
    Baseline,
    RecordInvalid,
    given_report,
    is_cve_report,
    is_given_report,
    parse_record,
)
from saw.attest.verifier import RELEASED_PCRS
from saw.baseline.report import read_report
from saw.errors import ConfigError
from saw.files import write_atomic
from saw.image.disk import ImageError, digest_of
from saw.image.expected import differences, expected_pcrs, uki_sections, unified_kernel
from saw.image.finished import GoldenImage
from saw.image.hardening import scored
from saw.image.inputs import Inputs
from saw.image.verified_root import root_hash_of

RECORD = "release.json"
REFERENCE = "reference.json"
_LAST_PCR = 13
"""PCR 14 and above are the workspace's own."""
_FAR = "9999-12-31T00:00:00Z"
"""Stands in for the end that a record gets when it is signed."""

Say = Callable[[str], None]
BootOnce = Callable[[Path], dict[str, Any]]
"""Boots the image file once and returns what :func:`saw.vm.measure.reference_boot` does."""


class Measured(msgspec.Struct, frozen=True):
    """A reference boot: digest of the image, PCR → lower-case hex, on which firmware, and how many seconds it took."""

    image_sha256: str
    pcrs: dict[str, str]
    firmware_sha256: str
    seconds: float = 0.0


class Recorded(msgspec.Struct, frozen=True):
    """The record as it lies beside the image, whether this run changed it or booted the image, and on which firmware it rests."""

    record: dict[str, Any]
    file: str
    changed: bool
    booted: bool
    firmware_sha256: str


def make_record(
    folder: Path,
    boot: BootOnce,
    say: Say,
    *,
    again: bool = False,
    firmware: str = "",
    baseline: tuple[Baseline, Path] | None = None,
) -> Recorded:
    """Make sure that the image in ``folder`` has a record which holds for its bytes.

    ``again`` boots it anew; so does ``firmware`` (:func:`saw.vm.measure.firmware_sha256`) where the earlier boot was on another
    one: PCR 0 and 7 are those of the hypervisor's firmware. ``baseline`` is a scanner's score of a host on this image with its
    report, which takes the place of what the build found in the tree; the build's own report stays where it is. Raises
    :class:`ImageError` when the image or its evidence is not what the build left, and when the boot measured something else than
    follows from the image.
    """
    image, inputs = _built(folder)
    file = folder / "image.qcow2"
    known = _known(folder / RECORD, image.image_sha256)
    evidence = {**image.evidence, **_reports(folder, known, image)}
    _unchanged(folder, image, evidence)
    owners = {"7": (image.secure_boot.pcr_7,)} if image.secure_boot else {}
    program = unified_kernel(file)
    _names_the_root(image, program)
    expected = {**expected_pcrs(program), **owners}
    earlier = None if again else _reference(folder / REFERENCE, image.image_sha256, firmware)
    if earlier is None or differences(owners, earlier.pcrs):  # a boot without the owner's keys is none of this image
        say("reference boot (its measurements become the expected ones)")
        measured, booted = _checked(boot(file), image), True
        say(f"reference boot took {measured.seconds} s")
    else:
        say("reference boot: done before for these bytes")
        measured, booted = earlier, False
    if wrong := differences(expected, measured.pcrs):
        raise ImageError(
            f"the reference boot of {image.name} measured something else than its image: {'; '.join(wrong)}",
            cure="find out what was booted in its place, and whether the whole folder lay there; then run this with --again",
            details={"problems": wrong},
        )
    if booted:
        write_atomic(folder / REFERENCE, msgspec.json.encode(measured) + b"\n")
    record: dict[str, Any] = {
        "format": "saw-image-release/2", "name": image.name, "image_sha256": image.image_sha256,
        "inputs_digest": image.inputs_digest, "created": image.created,
        "evidence": evidence,
        "boot": {"pcrs": {pcr: value for pcr, value in measured.pcrs.items() if int(pcr) <= _LAST_PCR}},
        **({} if image.variant == "cpu" else {"variant": image.variant}),
        **({"edr": inputs.options["edr"]} if "edr" in inputs.options else {}),
        **({"secure_boot": msgspec.to_builtins(image.secure_boot)} if image.secure_boot else {}),
        **({"root_hash": image.root_hash} if image.root_hash else {}),
        **{part: known[part] for part in ("scan",) if part in known},
    }  # fmt: skip
    score = next(filter(is_given_report, evidence), BASELINE_REPORT)
    if baseline:
        record["baseline"] = msgspec.to_builtins(baseline[0])
        for name in (BASELINE_REPORT, score):
            evidence.pop(name, None)
        evidence |= _keep(baseline[1], folder)
    elif score in evidence:
        record["baseline"] = msgspec.to_builtins(scored(read_report(folder / score)))
        if score != BASELINE_REPORT:
            evidence.pop(BASELINE_REPORT, None)
    _strict(record)
    text = json.dumps(record, indent=2) + "\n"
    changed = not (folder / RECORD).is_file() or (folder / RECORD).read_text(encoding="utf-8") != text
    if changed:
        write_atomic(folder / RECORD, text)
    say(f"record {folder / RECORD}: {'written' if changed else 'as it was'}")
    return Recorded(record, str(folder / RECORD), changed, booted, measured.firmware_sha256)


def answered(source: Path, raw: bytes) -> Measured:
    """Read the answer of ``saw vm measure --json`` that lies in ``source``; raises :class:`ConfigError`."""
    try:
        lines = raw.decode().strip().splitlines()
        return jsontext.decode(lines[-1] if lines else "", kind=Measured)
    except (UnicodeDecodeError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{source} is no answer of saw vm measure: {error}", cure="keep what it prints with --json"
        ) from error


def _built(folder: Path) -> tuple[GoldenImage, Inputs]:
    try:
        image = jsontext.decode((folder / "build.json").read_bytes(), kind=GoldenImage)
        inputs = jsontext.decode((folder / "inputs.json").read_bytes(), kind=Inputs)
    except (OSError, msgspec.DecodeError) as error:
        raise ImageError(
            f"{folder} is no finished image: {error}", cure="name build/images/NAME, or build the image: make image"
        ) from error
    return image, inputs


def _unchanged(folder: Path, image: GoldenImage, evidence: dict[str, str]) -> None:
    """Hold the image and its ``evidence`` against what the build, and searches after it, left."""
    for path, wanted in {"image.qcow2": image.image_sha256, **evidence}.items():
        try:
            found = digest_of(folder / path)
        except OSError as error:
            raise ImageError(f"cannot read {folder / path}: {error.strerror}", cure="build the image again") from error
        if found != wanted:
            raise ImageError(
                f"{folder / path} has SHA-256 {found}, built was {wanted}",
                cure="find out who changed it, then build the image again",
            )


def _names_the_root(image: GoldenImage, program: bytes) -> None:
    """Hold the root hash that the build states against the one that the boot image hands to the kernel."""
    line = uki_sections(program).get(".cmdline", b"").rstrip(b"\0").decode("utf-8", "replace")
    found = root_hash_of(line)
    if found != image.root_hash:
        raise ImageError(
            f"the boot image of {image.name} names the root hash {found or 'of no root'}, "
            f"the build {image.root_hash or 'none'}",
            cure="build the image again",
        )


def _checked(answer: dict[str, Any], image: GoldenImage) -> Measured:
    try:
        measured = msgspec.convert(answer, type=Measured)
    except msgspec.ValidationError as error:
        raise ImageError(f"the reference boot's answer cannot be read: {error}", cure="report this") from error
    if measured.image_sha256 != image.image_sha256:
        raise ImageError(
            f"the reference boot was one of SHA-256 {measured.image_sha256}, {image.name} has {image.image_sha256}",
            cure="boot this image: saw vm measure --image FILE --json",
        )
    if missing := _missing(measured):
        raise ImageError(f"the reference boot reported no PCR {', '.join(missing)}", cure="run this again")
    return measured


def _missing(measured: Measured) -> list[str]:
    return [str(pcr) for pcr in RELEASED_PCRS if str(pcr) not in measured.pcrs]


def _reference(file: Path, image_sha256: str, firmware: str) -> Measured | None:
    """Return what an earlier reference boot of these bytes measured, on ``firmware`` where one is named, or None."""
    try:
        found = jsontext.decode(file.read_bytes(), kind=Measured)
    except (OSError, msgspec.DecodeError):
        return None
    other = found.image_sha256 != image_sha256 or (firmware and found.firmware_sha256 != firmware)
    return None if other or _missing(found) else found


def _known(file: Path, image_sha256: str) -> dict[str, Any]:
    """Return the record of these bytes that is there, or an empty one."""
    try:
        found = jsontext.decode(file.read_bytes(), kind=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return {}
    return found if found.get("image_sha256") == image_sha256 else {}


def _reports(folder: Path, known: dict[str, Any], image: GoldenImage) -> dict[str, str]:
    """Return the reports that the record there names and that came after the build.

    Raises :class:`ImageError` where one is not that file any more.
    """
    named = {
        name: digest
        for name, digest in known.get("evidence", {}).items()
        if name not in image.evidence and (name == BASELINE_REPORT or is_given_report(name) or is_cve_report(name))
    }
    for name, digest in named.items():
        if not (folder / name).is_file() or digest_of(folder / name) != digest:
            raise ImageError(
                f"{folder / name} is not the report that {folder / RECORD} names",
                cure=f"remove {folder / RECORD}, run this again, then scan again",
            )
    return named


def _keep(report: Path, folder: Path) -> dict[str, str]:
    """Copy ``report`` into ``folder``, whole or not at all, under a name of its own; return that with its SHA-256."""
    temporary = folder / ".baseline.new"
    shutil.copyfile(report, temporary)
    digest = digest_of(temporary)
    os.replace(temporary, folder / given_report(digest))
    return {given_report(digest): digest}


def _strict(record: dict[str, Any]) -> None:
    """Read ``record`` as the broker will; raises :class:`ImageError`."""
    try:
        parse_record(msgspec.json.encode({**record, "not_after": _FAR}))
    except RecordInvalid as error:
        raise ImageError(f"the record would not be taken: {error.message}", cure=error.cure) from error
