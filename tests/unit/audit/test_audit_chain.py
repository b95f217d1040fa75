"""The hash chain: growth is accepted, every kind of tampering is found and named."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saw.audit import ZERO, Chain, ChainedEvent, EventFactory, EventInvalid, Head, Subject, event_hash, verify_chain

NOW = datetime(2026, 11, 23, 7, 0, tzinfo=UTC)


def chain_of(count: int) -> list[ChainedEvent]:
    factory = EventFactory("saw-test", host="unit", new_uid=lambda: "uid-1")
    chain = Chain("edge")
    return [
        chain.append(factory.api_activity(NOW, Subject(principal="operator:root"), f"test.call-{number}"))
        for number in range(count)
    ]


LONG = chain_of(12)
HEAD = Head(LONG[-1].seq, LONG[-1].hash)


def codes(events: list[ChainedEvent], head: Head | None = HEAD) -> set[str]:
    return {finding.code for finding in verify_chain(events, head).findings}


def test_a_whole_chain_is_complete_and_dense_from_one() -> None:
    report = verify_chain(LONG, HEAD)
    assert report.complete
    assert (report.count, report.head) == (12, HEAD)
    assert LONG[0].prev == ZERO
    assert [event.seq for event in LONG] == list(range(1, 13))


def test_a_chain_that_grew_beyond_the_known_head_is_complete() -> None:
    assert verify_chain(LONG, Head(5, LONG[4].hash)).complete


def test_a_part_of_a_chain_verifies_from_the_head_before_it() -> None:
    assert verify_chain(LONG[4:], HEAD, start=Head(4, LONG[3].hash)).complete
    assert not verify_chain(LONG[4:], HEAD).complete


def test_an_empty_chain_is_complete_unless_a_head_is_known() -> None:
    assert verify_chain([]).complete
    assert codes([]) == {"truncated"}


@pytest.mark.control("AUD-02")
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10))
def test_a_removed_event_is_found(index: int) -> None:
    assert "removed" in codes(LONG[:index] + LONG[index + 1 :])


@pytest.mark.control("AUD-02")
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12))
def test_a_truncated_tail_is_found_against_the_known_head(cut: int) -> None:
    assert codes(LONG[:-cut]) == {"truncated"}
    assert codes(LONG[:-cut], None) == set()


@pytest.mark.control("AUD-02")
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 11), st.sampled_from(["message", "time", "severity_id"]))
def test_a_changed_event_is_found(index: int, field: str) -> None:
    event = dict(LONG[index].event)
    event[field] = 5 if field != "message" else "nothing happened"
    changed = msgspec.structs.replace(LONG[index], event=event)
    assert "changed" in codes([*LONG[:index], changed, *LONG[index + 1 :]])


@pytest.mark.control("AUD-02")
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10))
def test_a_changed_event_with_a_fitting_hash_breaks_the_next_link_or_the_head(index: int) -> None:
    old = LONG[index]
    event = {**old.event, "message": "rewritten"}
    forged = ChainedEvent(old.source, old.seq, old.prev, event, event_hash(old.source, old.seq, old.prev, event))
    assert "relinked" in codes([*LONG[:index], forged, *LONG[index + 1 :]])


@pytest.mark.control("AUD-02")
def test_a_rewritten_last_event_is_found_against_the_known_head() -> None:
    old = LONG[-1]
    event = {**old.event, "message": "rewritten"}
    forged = ChainedEvent(old.source, old.seq, old.prev, event, event_hash(old.source, old.seq, old.prev, event))
    assert codes([*LONG[:-1], forged]) == {"relinked"}


@pytest.mark.control("AUD-02")
@settings(max_examples=60, deadline=None)
@given(st.permutations(range(12)))
def test_any_other_order_is_found(order: list[int]) -> None:
    events = [LONG[index] for index in order]
    assert verify_chain(events, HEAD).complete == (order == list(range(12)))


@pytest.mark.control("AUD-02")
def test_a_repeated_event_and_one_of_another_source_are_found() -> None:
    assert "duplicate" in codes([*LONG[:3], LONG[2], *LONG[3:]])
    assert "foreign" in codes([*LONG, msgspec.structs.replace(LONG[0], source="other")])


def test_an_invalid_event_is_not_chained_and_moves_nothing() -> None:
    chain = Chain("edge")
    with pytest.raises(EventInvalid):
        chain.append({"class_uid": 6003})
    assert chain.head == Head()
    assert chain.append(LONG[0].event).seq == 1
