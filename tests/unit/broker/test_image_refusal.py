"""Why a workspace may not attest on an image: not signed, ended, revoked, unknown; and the twin that may."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from saw.attest.image_record import RecordInvalid, parse_record
from saw.attest.verifier import RELEASED_PCRS
from saw.broker.errors import ConflictError
from saw.broker.images import admit, refusal

END = datetime(2026, 12, 1, tzinfo=UTC)
BEFORE = END - timedelta(seconds=1)
RECORD = {
    "format": "saw-image-release/2", "name": "img", "image_sha256": "1" * 64, "inputs_digest": "inputs",
    "created": "2026-11-01T00:00:00Z", "not_after": "2026-12-01T00:00:00Z",
    "boot": {"pcrs": {str(pcr): "0" * 64 for pcr in RELEASED_PCRS}},
}  # fmt: skip


def image(**fields: Any) -> Any:
    base = {
        "name": "img",
        "record": msgspec.json.encode(RECORD).decode(),
        "envelope": "{}",
        "state": "stable",
        "state_reason": "cve",
    }
    return SimpleNamespace(**{**base, **fields})


@pytest.mark.control("P0-04")
@pytest.mark.parametrize(
    ("row", "now", "code"),
    [
        (None, BEFORE, "image_unknown"),
        (image(envelope=""), BEFORE, "image_unsigned"),
        (image(state="revoked"), BEFORE, "image_revoked"),
        (image(), END, "image_expired"),
    ],
)
def test_an_image_that_does_not_count_attests_nobody(row: Any, now: datetime, code: str) -> None:
    assert refusal(row, now).partition(":")[0] == code
    for state in ("candidate", "stable", "deprecated"):
        assert refusal(image(state=state), BEFORE) == ""


@pytest.mark.control("P0-04")
def test_a_new_workspace_needs_an_image_that_its_ring_may_use() -> None:
    canary = frozenset({"canary"})
    admit(image(), "stable", canary, BEFORE)
    admit(image(state="candidate"), "canary", canary, BEFORE)
    for row, ring, now in (
        (image(state="candidate"), "stable", BEFORE),
        (image(state="deprecated"), "canary", BEFORE),
        (image(), "stable", END),
    ):
        with pytest.raises(ConflictError):
            admit(row, ring, canary, now)


def test_a_record_with_every_pcr_and_a_window_is_read_and_others_are_not() -> None:
    assert parse_record(msgspec.json.encode(RECORD)).expected_pcrs()[11] == "0" * 64
    for wrong in (
        {"boot": {"pcrs": {"0": "0" * 64}}},
        {"not_after": "2026-11-01T00:00:00Z"},
        {"format": "saw-image-release/1"},
    ):
        with pytest.raises(RecordInvalid):
            parse_record(msgspec.json.encode({**RECORD, **wrong}))
