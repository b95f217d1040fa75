"""The release record of a golden image: what a workspace's boot must measure, and until when the image may be used.

Officers sign it in a DSSE envelope; the broker takes the expected measurements from a signed record alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date, datetime
from typing import Annotated, Literal

import msgspec

from saw import jsontext
from saw.attest.verifier import RELEASED_PCRS
from saw.errors import SawError

PAYLOAD_TYPE = "application/vnd.saw.image-release+json"
"""DSSE payload type of a record."""

Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class RecordInvalid(SawError):
    """A release record cannot be used; ``code`` tells why."""

    code = "record_malformed"

    def __init__(self, code: str, message: str, *, cure: str) -> None:
        super().__init__(message, cure=cure)
        self.code = code


class Boot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PCR values (SHA-256 bank, lower-case hex) read back from a reference boot; keys are decimal PCR numbers."""

    pcrs: Annotated[dict[str, Hex], msgspec.Meta(max_length=24)]


class Advisories(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the PyPI and npm packages were held against: SHA-256 over the files, and how many records of each ecosystem."""

    sha256: Hex
    records: Annotated[dict[str, Annotated[int, msgspec.Meta(ge=1)]], msgspec.Meta(min_length=1, max_length=16)]


class Scan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a passed search for known vulnerabilities rests on: the database, when, and what somebody answers for.

    ``image_sha256`` is the image that was searched; searches before that was stated have none, and do not count where a search
    is asked for. ``advisories`` is absent where PyPI and npm packages were not looked at.
    """

    database_sha256: Hex
    scanned_at: datetime
    fail_on: Annotated[str, msgspec.Meta(max_length=32)]
    open: Annotated[int, msgspec.Meta(ge=0)]
    waived: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=512)], ...], msgspec.Meta(max_length=1000)] = ()
    waived_until: date | None = None
    image_sha256: Hex | None = None
    advisories: Advisories | None = None


class SecureBoot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whose key the boot image is signed with: SHA-256 of the certificate (DER), and of the variable store beside the image.

    ``pcr_7`` is what the build computed out of both; the reference boot has to have measured it.
    """

    certificate_sha256: Hex
    variables_sha256: Hex
    pcr_7: Hex


STORE = "secure-boot.fd"
"""The owner's variable store among the files beside an image."""


class Baseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an external scanner said of the image's tree when it was built, or later of a workspace on this image.

    Its report lies beside the image: ``baseline.dat`` of the tree, ``baseline-DIGEST.dat`` of a workspace. ``score`` is the
    scanner's hardening index, 0 to 100.
    """

    scanner: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    version: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    score: Annotated[int, msgspec.Meta(ge=0, le=100)]
    tests: Annotated[int, msgspec.Meta(ge=1)]


BASELINE_REPORT = "baseline.dat"
"""The scanner's report of the build's own tree, beside the image and among a record's evidence."""


def given_report(sha256: str) -> str:
    """Return the name of a scanner's report with this digest that somebody gave in the place of the build's own."""
    return f"baseline-{sha256[:12]}.dat"


def is_given_report(name: str) -> bool:
    """Tell whether a file beside an image is such a report."""
    return re.fullmatch(r"baseline-[0-9a-f]{12}\.dat", name) is not None


def cve_report(sha256: str) -> str:
    """Return the name of a report of known vulnerabilities with this digest: what a search found and how it was judged.

    It lies at the same place. A later search makes another file, so that a record which was signed keeps the one that it names.
    """
    return f"vulnerabilities-{sha256[:12]}.json"


def is_cve_report(name: str) -> bool:
    """Tell whether a file beside an image is such a report; those of older releases had no digest in their name."""
    return re.fullmatch(r"vulnerabilities(-[0-9a-f]{12})?\.json", name) is not None


Evidence = Literal["sbom", "provenance", "scan", "advisories", "secure_boot", "root_verity", "baseline"]
"""What a record may carry about how the image was made and boots, beside what its boot measures."""
_FILES: dict[str, tuple[str, ...]] = {
    "sbom": (
        "sbom/debian.cdx.json",
        "sbom/debian.spdx.json",
        "sbom/python.cdx.json",
        "sbom/npm.cdx.json",
        "sbom/npm.spdx.json",
    ),
    "provenance": ("provenance.json",),
}


class ReleaseRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``<image>.release.json``. ``created`` and ``not_after`` are RFC 3339 with zone; no image counts after the latter."""

    format: Literal["saw-image-release/2"]
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?\Z")]
    image_sha256: Hex
    inputs_digest: Annotated[str, msgspec.Meta(max_length=128)]
    created: datetime
    not_after: datetime
    boot: Boot
    evidence: Annotated[dict[Annotated[str, msgspec.Meta(max_length=128)], Hex], msgspec.Meta(max_length=64)] = {}
    """Files beside the image (path → SHA-256): bills of materials, provenance, the owner's variable store, and reports of a
    scanner and of a search."""
    scan: Scan | None = None
    baseline: Baseline | None = None
    variant: Literal["cpu", "gpu"] = "cpu"
    """What the image is made for; ``gpu`` has NVIDIA's driver. Records of ``cpu`` do not state it."""
    secure_boot: SecureBoot | None = None
    """Of an image that is signed for secure boot; its PCR values come from a boot with the owner's keys."""
    root_hash: Hex | None = None
    """Of an image whose root is read-only and verified: the hash that it is checked against. It stands on the kernel's command
    line, so PCR 4 and 11 have it; here people and programs read it."""
    edr: Literal["none", "embedded", "vendor_package"] = "none"
    """The endpoint detection in the image (docs/edr.md). Records of ``none`` do not state it."""

    def missing(self, required: Iterable[Evidence]) -> list[str]:
        """Return what of ``required`` the record does not carry, by file name or as the word in ``required``.

        A search counts with its report, and where it says that it was of this image.
        """
        lacking = [name for kind in required for name in _FILES.get(kind, ()) if name not in self.evidence]
        counts = self.scan and self.scan.image_sha256 and any(map(is_cve_report, self.evidence))
        scan = self.scan if counts else None
        held: dict[Evidence, object] = {
            "scan": scan,
            "advisories": scan and scan.advisories,
            "secure_boot": self.secure_boot,
            "root_verity": self.root_hash,
            "baseline": self.baseline,
        }
        return [*lacking, *(name for name, value in held.items() if name in required and value is None)]

    def expected_pcrs(self) -> dict[int, str]:
        """Return the values that a boot must measure, by PCR number."""
        return {int(pcr): value for pcr, value in self.boot.pcrs.items() if pcr.isdecimal()}


def parse_record(payload: bytes) -> ReleaseRecord:
    """Read a record strictly; raise :class:`RecordInvalid` (``record_malformed``, ``record_incomplete``)."""
    try:
        record = jsontext.decode(payload, kind=ReleaseRecord)
    except msgspec.DecodeError as error:
        raise RecordInvalid(
            "record_malformed", f"the release record is not valid: {error}", cure="correct the named field"
        ) from error
    if record.created.tzinfo is None or record.not_after.tzinfo is None or record.not_after <= record.created:
        raise RecordInvalid(
            "record_malformed",
            f"the release record of {record.name} has no window: created and not_after need a zone and an order",
            cure="write created before not_after, in UTC",
        )
    if record.scan is not None and record.scan.scanned_at.tzinfo is None:
        raise RecordInvalid(
            "record_malformed",
            f"scan.scanned_at of {record.name} has no zone",
            cure="write it in UTC, as saw image scan does",
        )
    if record.scan is not None and record.scan.image_sha256 not in (None, record.image_sha256):
        raise RecordInvalid(
            "record_malformed",
            f"the search that {record.name} states was of another image: SHA-256 {record.scan.image_sha256}",
            cure="search this one: saw image scan",
        )
    if record.evidence.get(STORE) != (record.secure_boot and record.secure_boot.variables_sha256):
        raise RecordInvalid(
            "record_malformed",
            f"secure_boot of {record.name} and {STORE} among its evidence are not one",
            cure="take both from the image's build.json",
        )
    if record.baseline is not None and not any(
        name == BASELINE_REPORT or is_given_report(name) for name in record.evidence
    ):
        raise RecordInvalid(
            "record_malformed",
            f"the release record of {record.name} states a baseline score and names no report of it",
            cure=f"name {BASELINE_REPORT} in evidence, as saw image record --baseline does",
        )
    missing = [str(pcr) for pcr in RELEASED_PCRS if str(pcr) not in record.boot.pcrs]
    if missing:
        raise RecordInvalid(
            "record_incomplete",
            f"the release record of {record.name} lacks PCR {', '.join(missing)}",
            cure="read all of them back from a reference boot",
        )
    if record.secure_boot and record.boot.pcrs["7"] != record.secure_boot.pcr_7:
        raise RecordInvalid(
            "record_malformed",
            f"PCR 7 of {record.name} is not what its owner's keys give: the reference boot ran with others, or with none",
            cure="copy the image's whole directory to the hypervisor, then saw vm measure again",
        )
    return record
