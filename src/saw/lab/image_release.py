"""The signed release record of the lab's golden image: two of the three officers sign it, then it is promoted."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from saw.attest.image_record import PAYLOAD_TYPE, RecordInvalid, parse_record
from saw.files import write_atomic
from saw.lab.release import OFFICERS
from saw.lab.topology import Lab
from saw.policy.envelope import EnvelopeRefused, payload_of, read_envelope

RENEW_BEFORE = timedelta(days=30)
"""A record is signed again when less than this is left of it."""


def serves(signed: Path, record: dict[str, Any], now: datetime) -> bool:
    """Return whether ``signed`` holds ``record`` and counts for long enough."""
    try:
        found = parse_record(payload_of(read_envelope(signed.read_bytes(), PAYLOAD_TYPE)))
    except (OSError, EnvelopeRefused, RecordInvalid):
        return False
    same = (found.image_sha256, found.boot.pcrs, found.evidence) == (
        record["image_sha256"], record["boot"]["pcrs"], record.get("evidence", {}),
    )  # fmt: skip
    return same and found.not_after - now > RENEW_BEFORE


def release_image(lab: Lab, saw: Callable[..., dict[str, Any]], record_file: Path, now: datetime) -> dict[str, Any]:
    """Sign the record with two officers' keys, register it, let every ring use the image; return the broker's answer."""
    record = json.loads(record_file.read_text(encoding="utf-8"))
    signed = lab.directory / f"{record['name']}.release.signed.json"
    if not serves(signed, record, now):
        keys = [option for name in OFFICERS[:2] for option in ("--key", str(lab.keys_directory / f"{name}.key"))]
        saw("image", "sign", str(record_file), *keys, "--out", str(signed))
    answer = saw("image", "register", str(signed))
    beside = record_file.with_name("release.signed.json")  # the hypervisor looks for it there
    if not beside.exists() or beside.read_bytes() != signed.read_bytes():
        write_atomic(beside, signed.read_bytes())
    if answer["state"] in {
        "candidate",
        "deprecated",
    }:  # the embedded default went back to an image that it had gone past
        answer = saw("image", "promote", record["name"], "--reason", "golden image of the embedded default")
    return answer
