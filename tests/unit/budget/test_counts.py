"""Counts of requests and tokens: no window or period holds more than its limit, whoever races, dies or turns the clock back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saw.budget.counts import LOOKED_BACK_S, Count
from saw.budget.errors import Exhausted, QuotaExhausted, RateLimited
from saw.budget.ledger import KEEP_S, Balance, Ledger, Limit

NOW = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
BURST = Count(limit="coding/burst", subject="workspace:ws-1", unit="requests", per=60, most=3, amount=1)
FLOW = msgspec.structs.replace(BURST, limit="coding/flow", unit="tokens", most=1000, amount=400)
DAILY = msgspec.structs.replace(BURST, limit="coding/daily", per="day")
MONEY = Limit("coding/spend", "ws-1", "USD", "day", 100)

pytestmark = pytest.mark.control("BUD-01")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    found = Ledger(tmp_path / "ledger.db", life_s=600, monotonic=lambda: 0.0)
    yield found
    found.close()


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def told(ledger: Ledger, counts: list[Count], seconds: float, name: str = "next") -> dict[str, Any]:
    """Return the details of the refusal of these counts."""
    with pytest.raises((RateLimited, QuotaExhausted)) as refused:
        ledger.count(counts, name, at(seconds))
    return refused.value.details


def test_a_window_slides_and_says_when_the_call_fits(ledger: Ledger) -> None:
    for number, second in enumerate((0, 10, 20)):
        assert not ledger.count([BURST], f"c{number}", at(second))
    details = told(ledger, [BURST], 30)
    assert details == {
        "id": "coding/burst", "unit": "requests", "per": "60s", "limit": 3, "asked": 1, "left": 0, "retry_after_s": 31,
    }  # fmt: skip
    assert told(ledger, [BURST], 60)["retry_after_s"] == 1, "it may have been admitted late in its second"
    ledger.count([BURST], "c3", at(61))
    assert told(ledger, [BURST], 62)["retry_after_s"] == 9


@pytest.mark.parametrize("limit", [BURST, DAILY])
def test_a_request_that_was_never_sent_is_counted_no_more_and_once(ledger: Ledger, limit: Count) -> None:
    for name in "abc":
        ledger.count([limit, FLOW] if name == "a" else [limit], name, NOW)
    assert told(ledger, [limit], 1)["left"] == 0
    ledger.release("a", NOW)
    assert told(ledger, [limit], 1)["left"] == 0, "what was released was admitted"
    assert [ledger.uncount(name) for name in ("a", "a", "c", "unknown")] == [True, False, True, False]
    ledger.count([limit], "d", at(1))
    ledger.count([limit], "e", at(1))
    assert told(ledger, [limit], 2)["left"] == 0
    assert told(ledger, [msgspec.structs.replace(FLOW, amount=1001)], 1)["left"] == 1000


def test_tokens_count_as_what_is_asked_for_until_the_answer_says_what_was_used(ledger: Ledger) -> None:
    assert ledger.count([FLOW], "a", at(0))
    assert ledger.count([FLOW], "b", at(1))
    assert told(ledger, [FLOW], 2)["left"] == 200
    assert ledger.settle("a", 0, at(3), tokens=50)
    assert ledger.count([FLOW], "c", at(4))
    assert not ledger.settle("a", 0, at(4), tokens=0), "the first settlement counts"
    assert told(ledger, [FLOW], 5)["left"] == 150
    assert ledger.release("b", at(6))
    assert ledger.settle("c", 0, at(6), tokens=2000), "what an answer reports counts as it is"
    details = told(ledger, [FLOW], 7)
    assert (details["left"], details["retry_after_s"]) == (0, 58), (
        "when the call leaves that passed the limit by itself"
    )


def test_a_window_has_one_sum_for_each_second_however_many_calls_it_holds(ledger: Ledger) -> None:
    many = msgspec.structs.replace(FLOW, most=10**6, per=3600)
    for number in range(300):
        ledger.count([many], f"c{number}", at(number % 3))
        ledger.settle(f"c{number}", 0, at(number % 3), tokens=number % 2)
    looked = ledger._database.execute("SELECT at, amount FROM slid WHERE key = ?", (many.key(NOW),)).fetchall()
    assert looked == [(int(NOW.timestamp()) + second, amount) for second, amount in ((0, 0), (1, 1), (2, 149))]
    asked: list[str] = []
    ledger._database.set_trace_callback(asked.append)
    left = told(ledger, [msgspec.structs.replace(many, amount=10**6)], 3)["left"]
    ledger._database.set_trace_callback(None)
    assert left == 10**6 - 150
    assert not [one for one in asked if "counted" in one], "no row of a single call is looked at"


def test_a_ledger_of_before_is_added_up_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    before = Ledger(path)
    for number in range(2):
        before.count([FLOW], f"c{number}", NOW)
    before._database.execute("DROP TABLE slid")
    before.close()
    for _ in range(2):
        ledger = Ledger(path)
        assert told(ledger, [FLOW], 1)["left"] == 200
        ledger.close()


def test_sums_are_forgotten_once_no_window_reaches_them(ledger: Ledger) -> None:
    ledger.count([FLOW], "a", NOW)
    ledger.expire(at(LOOKED_BACK_S))
    assert len(ledger._database.execute("SELECT at FROM slid").fetchall()) == 1
    ledger.expire(at(LOOKED_BACK_S + 1))
    assert ledger._database.execute("SELECT at FROM slid").fetchall() == []
    assert ledger.settle("a", 0, at(LOOKED_BACK_S + 2), tokens=5), "what was counted may still be corrected"


def test_what_can_never_fit_names_no_time(ledger: Ledger) -> None:
    huge = msgspec.structs.replace(FLOW, amount=1001)
    with pytest.raises(RateLimited, match="waiting does not help") as refused:
        ledger.count([huge], "a", NOW)
    assert "retry_after_s" not in refused.value.details
    assert ledger.count([msgspec.structs.replace(FLOW, amount=1000)], "a", NOW)


def test_a_period_of_the_calendar_starts_anew_in_utc(ledger: Ledger) -> None:
    for number in range(3):
        ledger.count([DAILY], f"c{number}", at(number))
    with pytest.raises(QuotaExhausted, match="starts anew at 2026-11-30T00:00:00Z") as refused:
        ledger.count([DAILY], "next", at(86400 / 2 - 1))
    assert refused.value.details["resets_at"] == "2026-11-30T00:00:00Z"
    ledger.count([DAILY], "next", at(86400 / 2))


def test_tokens_of_a_period_are_corrected_as_those_of_a_window(ledger: Ledger) -> None:
    daily = msgspec.structs.replace(FLOW, per="day")
    assert [ledger.count([daily], name, NOW) for name in "ab"] == [True, True]
    assert told(ledger, [daily], 0)["left"] == 200
    ledger.settle("a", 0, NOW, tokens=10)
    ledger.keep("b", NOW)
    assert told(ledger, [msgspec.structs.replace(daily, amount=591)], 0)["left"] == 590
    ledger.count([daily], "c", NOW)
    assert ledger.expire(at(600)) == 1
    assert told(ledger, [daily], 600)["left"] == 190
    assert ledger.settle("c", 0, at(601), tokens=0), "an expired one takes what it used"
    assert told(ledger, [msgspec.structs.replace(daily, amount=591)], 601)["left"] == 590
    assert ledger.untold() == [], "where no money is spent, nobody is told"


def test_who_shares_a_limit_and_units_are_counted_apart(ledger: Ledger) -> None:
    other = msgspec.structs.replace(BURST, subject="workspace:ws-2", most=1)
    for number in range(3):
        ledger.count([BURST], f"c{number}", NOW)
    ledger.count([other], "other", NOW)
    for odd in ({"subject": 'workspace:ws-1", "requests'}, {"unit": "tokens"}, {"per": 61}, {"per": "day"}):
        ledger.count([msgspec.structs.replace(BURST, **odd)], f"{odd}", NOW)
    assert told(ledger, [other], 0)["left"] == 0


def test_all_of_a_call_is_counted_or_nothing(ledger: Ledger) -> None:
    last = msgspec.structs.replace(DAILY, most=1)
    ledger.count([last], "first", NOW)
    assert told(ledger, [BURST, FLOW, last], 0)["id"] == "coding/daily"
    with pytest.raises(QuotaExhausted):
        ledger.reserve(MONEY, 10, "paid", NOW, counts=[BURST, last])
    assert ledger.balance(MONEY, NOW) == Balance()
    with pytest.raises(Exhausted):
        ledger.reserve(MONEY, 101, "paid", NOW, counts=[BURST, FLOW])
    for number in range(3):
        ledger.reserve(MONEY, 10, f"p{number}", NOW, counts=[BURST])
    with pytest.raises(RateLimited):
        ledger.reserve(MONEY, 10, "paid", NOW, counts=[BURST])
    assert ledger.balance(MONEY, NOW) == Balance(30, 0)
    ledger.reserve(MONEY, 10, "p0", NOW, counts=[BURST])  # the same identifier is the same reservation


def test_a_clock_set_back_gives_nothing_back(ledger: Ledger) -> None:
    for number in range(3):
        ledger.count([BURST, DAILY], f"c{number}", at(number))
    assert told(ledger, [BURST], -86400)["retry_after_s"] == 59
    assert told(ledger, [DAILY], -86400)["left"] == 0


def test_a_clock_that_was_far_ahead_once_locks_nobody_out(tmp_path: Path) -> None:
    path, running = tmp_path / "ledger.db", [500.0]
    ledger, other = (Ledger(path, monotonic=lambda: running[0]) for _ in range(2))
    for number in range(3):
        ledger.count([BURST], f"ahead-{number}", at(30 * 86400))
    assert told(ledger, [BURST], 0)["retry_after_s"] == 61
    assert told(ledger, [BURST], 3600)["retry_after_s"] == 61, "the clock alone moves nothing as long as it is behind"
    running[0] += 0.75
    assert told(other, [BURST], 1)["retry_after_s"] == 61
    running[0] += 0.5
    assert told(ledger, [BURST], 1)["retry_after_s"] == 60
    assert told(other, [BURST], 1)["retry_after_s"] == 60, "two that look do not make it faster"
    running[0] += 0.5
    assert told(other, [BURST], 1)["retry_after_s"] == 60, "nor do they once one of them moved it"
    running[0] += 58.25
    assert told(ledger, [BURST], 2)["retry_after_s"] == 1
    running[0] += 1
    ledger.count([BURST], "after", at(62))
    start, end = ledger.period(MONEY, at(62))
    assert (start.month, start.day) == (12, 29)
    running[0] += 86400
    ledger.expire(at(63))
    assert ledger.period(MONEY, at(63))[0] == end, "the period that was opened too early ends as well"
    ledger.close()
    again = Ledger(path, monotonic=lambda: 0.0)
    assert again.period(MONEY, at(64))[0] == end
    for one in (other, again):
        one.close()


def test_what_no_window_holds_any_more_is_forgotten_with_its_charge(ledger: Ledger, tmp_path: Path) -> None:
    ledger.count([BURST], "a", NOW)
    ledger.count([FLOW], "open", NOW)
    ledger.expire(at(LOOKED_BACK_S))
    assert len(ledger._database.execute("SELECT charge FROM counted").fetchall()) == 2
    ledger.expire(at(KEEP_S + 1))
    ledger.expire(at(KEEP_S + 2))
    rows = ledger._database.execute("SELECT charge FROM counted").fetchall()
    assert rows == [("open",)], "it ended just now, and may still be corrected"
    ledger.expire(at(2 * KEEP_S + 3))
    ledger.expire(at(2 * KEEP_S + 4))
    assert ledger._database.execute("SELECT charge FROM counted").fetchall() == []


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(-30, 40), st.integers(1, 5), st.sampled_from([None, 0, 1, 4])), max_size=40),
    most=st.integers(1, 8),
    per=st.integers(1, 60),
)
def test_no_stretch_as_long_as_the_window_holds_more_than_the_limit(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[float, int, int | None]], most: int, per: int
) -> None:
    """Whatever the clock does: of what was admitted and counts, any ``per`` seconds of true time hold ``most`` at most."""
    clock = true = 0.0
    ledger = Ledger(tmp_path_factory.mktemp("l") / "ledger.db", monotonic=lambda: true)
    admitted: list[tuple[float, int]] = []
    for number, (step, amount, used) in enumerate(steps):
        clock, true = clock + step, true + abs(step)
        count = msgspec.structs.replace(FLOW, per=per, most=most, amount=amount)
        try:
            ledger.count([count], f"c{number}", at(clock))
        except RateLimited as error:
            wait = error.details.get("retry_after_s")
            assert (wait is None) == (amount > most)
            continue
        if used is not None:
            ledger.settle(f"c{number}", 0, at(clock), tokens=min(used, amount))
        admitted.append((true, amount if used is None else min(used, amount)))
        assert sum(size for when, size in admitted if when >= true - per) <= most
    ledger.close()


_WORKER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from saw.budget.counts import LOOKED_BACK_S, Count
from saw.budget.errors import RateLimited
from saw.budget.ledger import Ledger

path, name = Path(sys.argv[1]), sys.argv[2]
ledger = Ledger(path, life_s=600, monotonic=lambda: 0.0)
count = Count(limit="coding/burst", subject="workspace:ws-1", unit="requests", per=60, most=20, amount=1)
print("ready", flush=True)
sys.stdin.readline()
admitted = 0
for number in range(20):
    try:
        ledger.count([count], f"{name}-{number}", datetime(2026, 11, 29, 12, 0, tzinfo=UTC))
        admitted += 1
    except RateLimited:
        pass
print(admitted, flush=True)
sys.stdin.readline()
"""


def test_racing_processes_that_are_killed_admit_exactly_what_fits_and_forget_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(path), f"w{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(6)
    ]
    for worker in racing:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in racing:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    admitted = [int(worker.stdout.readline()) for worker in racing if worker.stdout is not None]
    for worker in racing:
        os.kill(worker.pid, signal.SIGKILL)
        worker.communicate(timeout=60)
    assert sum(admitted) == 20
    ledger = Ledger(path)
    burst = msgspec.structs.replace(BURST, most=20)
    assert told(ledger, [burst], 59)["left"] == 0
    ledger.count([burst], "later", at(61))
    ledger.close()
