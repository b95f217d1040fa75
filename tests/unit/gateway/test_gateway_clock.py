"""The clock that leases are judged by."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from saw.gateway.clock import Clock


class Time:
    """A wall clock and a monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.wall = 1_000_000.0
        self.running = 50.0

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.running += seconds


def build(time: Time, **options: float) -> Clock:
    return Clock(lambda: time.wall, lambda: time.running, 5.0, **options)


@pytest.mark.control("POL-05")
def test_a_clock_set_back_neither_runs_back_nor_is_trusted() -> None:
    time = Time()
    clock = build(time)
    time.pass_(10)
    assert clock.doubt == ""
    before = clock.now()
    time.wall -= 3600
    time.running += 1
    assert clock.now() > before
    assert "set back" in clock.doubt


def test_a_small_step_back_is_bridged_without_doubt() -> None:
    time = Time()
    clock = build(time)
    before = clock.now()
    time.wall -= 3
    assert clock.doubt == ""
    assert clock.now() >= before


def test_a_step_forward_counts_at_once() -> None:
    time = Time()
    clock = build(time)
    time.wall += 3600
    assert clock.now() == datetime.fromtimestamp(time.wall, UTC)
    assert clock.doubt == ""


def test_the_broker_ends_or_raises_the_doubt() -> None:
    time = Time()
    clock = build(time)
    time.wall += 3600
    clock.now()
    time.wall -= 3600
    assert clock.doubt
    clock.confirm(datetime.fromtimestamp(time.wall + 1, UTC))
    assert clock.doubt == ""
    clock.confirm(datetime.fromtimestamp(time.wall + 60, UTC))
    assert "behind" in clock.doubt


def test_a_start_before_the_last_saved_time_is_doubted() -> None:
    time = Time()
    assert "set back" in build(time, not_before=time.wall + 60).doubt
    assert build(time, not_before=time.wall - 60).doubt == ""
