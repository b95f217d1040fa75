"""Event logs: parsed whole or refused, replayed as the TPM extends."""

from __future__ import annotations

import struct

import msgspec
import pytest
from attest_lab import (
    EV_IPL,
    EV_NO_ACTION,
    SHA1,
    SoftTpm,
    boot_events,
    boot_pcrs,
    event_log,
    log_event,
    log_header,
    soft_evidence,
)
from hypothesis import given
from hypothesis import strategies as st

from saw.attest.event_log import MAX_EVENTS, MAX_LOG, EventLogError, parse, replay
from saw.attest.verifier import REPLAYED_PCRS, verify_evidence

pytestmark = pytest.mark.control("POL-03")


def test_replay_leads_to_the_values_of_the_boot():
    values, expected = replay(parse(event_log(boot_events()))), boot_pcrs(boot_events())
    assert {pcr: values[pcr] for pcr in REPLAYED_PCRS} == {pcr: expected[pcr] for pcr in REPLAYED_PCRS}


def test_startup_locality_sets_the_first_value_of_pcr_0():
    events = [(0, EV_NO_ACTION, b"StartupLocality\0\x03")]
    assert replay(parse(event_log(events)))[0] == bytes(31) + b"\x03"


@pytest.mark.parametrize("change", ["cut", "reordered", "extra", "changed"])
def test_a_doctored_log_does_not_verify(change):
    evidence, expected = soft_evidence(SoftTpm())
    assert verify_evidence(evidence, expected).ok
    events = boot_events()
    doctored = {
        "cut": events[:-1],
        "reordered": [events[1], events[0], *events[2:]],
        "extra": [*events, (4, EV_IPL, b"padding")],
        "changed": [(events[0][0], events[0][1], b"other"), *events[1:]],
    }[change]
    verdict = verify_evidence(msgspec.structs.replace(evidence, event_log=event_log(doctored)), expected)
    assert {failure.code for failure in verdict.failures} == {"event_log_mismatch"}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        event_log(boot_events()) + b"\0",
        event_log(boot_events()) + bytes(64),
        event_log(boot_events())[:-1],
        log_header([(SHA1, 20)]),
        log_header([]),
        log_header([(0x000B, 20)]),
        log_header([(0x000B, 32)] * 2),
        log_header().replace(b"Event03", b"Event02"),
        log_header() + struct.pack("<III", 24, EV_IPL, 2) + log_event((0, EV_IPL, b""))[12:],
        log_header() + struct.pack("<III", 0, EV_IPL, 1) + log_event((0, EV_IPL, b""))[12:],
        log_header() + log_event((0, EV_IPL, b""))[:-4] + struct.pack("<I", 2**32 - 1),
        bytes(MAX_LOG + 1),
        log_header() + log_event((0, EV_IPL, b"")) * (MAX_EVENTS + 1),
    ],
    ids=range(14),
)
def test_a_malformed_padded_or_oversize_log_is_refused(raw):
    with pytest.raises(EventLogError):
        parse(raw)


def test_as_many_events_as_allowed_are_read():
    assert len(parse(log_header() + log_event((0, EV_IPL, b"")) * MAX_EVENTS)) == MAX_EVENTS


@given(st.binary(max_size=400))
def test_any_bytes_parse_or_are_refused(raw):
    for candidate in (raw, log_header() + raw):
        try:
            parse(candidate)
        except EventLogError:
            continue
