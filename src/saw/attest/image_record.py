"""The release record of a golden image: what a workspace's boot must measure, and until when the image may be used.

Officers sign it in a DSSE envelope; the broker takes the expected measurements from a signed record alone.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec

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


class ReleaseRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``<image>.release.json``. ``created`` and ``not_after`` are RFC 3339 with zone; no image counts after the latter."""

    format: Literal["saw-image-release/2"]
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?\Z")]
    image_sha256: Hex
    inputs_digest: Annotated[str, msgspec.Meta(max_length=128)]
    created: datetime
    not_after: datetime
    boot: Boot

    def expected_pcrs(self) -> dict[int, str]:
        """Return the values that a boot must measure, by PCR number."""
        return {int(pcr): value for pcr, value in self.boot.pcrs.items() if pcr.isdecimal()}


def parse_record(payload: bytes) -> ReleaseRecord:
    """Read a record strictly; raise :class:`RecordInvalid` (``record_malformed``, ``record_incomplete``)."""
    try:
        record = msgspec.json.decode(payload, type=ReleaseRecord)
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
    missing = [str(pcr) for pcr in RELEASED_PCRS if str(pcr) not in record.boot.pcrs]
    if missing:
        raise RecordInvalid(
            "record_incomplete",
            f"the release record of {record.name} lacks PCR {', '.join(missing)}",
            cure="read all of them back from a reference boot",
        )
    return record
