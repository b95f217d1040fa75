"""The ledger: what is reserved and spent never passes a hard limit, whoever races, dies or turns the clock back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from saw.budget.errors import Exhausted, LedgerError
from saw.budget.ledger import Balance, Ledger, Limit, money
from saw.budget.windows import window

NOW = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
CAP = Limit("coding/spend", "ws-1", "USD", "day", 100)

pytestmark = pytest.mark.control("BUD-01")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    found = Ledger(tmp_path / "ledger.db", life_s=600)
    yield found
    found.close()


def test_what_fits_is_admitted_and_what_does_not_is_refused_with_what_is_left(ledger: Ledger) -> None:
    assert ledger.reserve(CAP, 60, "a", NOW).left == 40
    with pytest.raises(Exhausted) as refused:
        ledger.reserve(CAP, 41, "b", NOW)
    assert refused.value.details == {
        "id": "coding/spend", "currency": "USD", "asked": 41, "left": 40, "limit": 100,
        "resets_at": "2026-11-30T00:00:00Z",
    }  # fmt: skip
    assert ledger.reserve(CAP, 40, "b", NOW).left == 0
    assert ledger.balance(CAP, NOW) == Balance(100, 0)


def test_a_settlement_takes_the_place_of_the_reservation_once(ledger: Ledger) -> None:
    ledger.reserve(CAP, 60, "a", NOW)
    assert ledger.settle("a", 25, NOW)
    assert not ledger.settle("a", 1, NOW), "the first settlement counts"
    assert not ledger.release("a", NOW)
    assert not ledger.keep("a", NOW)
    assert ledger.balance(CAP, NOW) == Balance(0, 25)
    assert not ledger.settle("unknown", 1, NOW)


def test_more_than_was_reserved_is_recorded_as_it_is_and_the_budget_denies_then(ledger: Ledger) -> None:
    ledger.reserve(CAP, 60, "a", NOW)
    assert ledger.settle("a", 130, NOW)
    assert ledger.balance(CAP, NOW) == Balance(0, 130)
    with pytest.raises(Exhausted) as refused:
        ledger.reserve(CAP, 1, "b", NOW)
    assert refused.value.details["left"] == 0


def test_a_limit_that_is_not_hard_only_counts(ledger: Ledger) -> None:
    soft = Limit("coding/spend", "ws-1", "USD", "day", 100, hard=False)
    ledger.reserve(soft, 90, "a", NOW)
    assert ledger.reserve(soft, 90, "b", NOW).left == 0
    assert ledger.balance(soft, NOW) == Balance(180, 0)
    with pytest.raises(Exhausted):
        ledger.reserve(CAP, 1, "c", NOW)


def test_a_release_gives_back_and_a_keep_spends_in_full(ledger: Ledger) -> None:
    ledger.reserve(CAP, 60, "a", NOW)
    ledger.reserve(CAP, 40, "b", NOW)
    assert ledger.release("a", NOW)
    assert ledger.keep("b", NOW)
    assert ledger.balance(CAP, NOW) == Balance(0, 40)


def test_the_same_identifier_is_the_same_reservation_and_never_a_second_amount(ledger: Ledger) -> None:
    ledger.reserve(CAP, 60, "a", NOW)
    assert ledger.reserve(CAP, 60, "a", NOW).left == 40
    with pytest.raises(LedgerError, match="another amount"):
        ledger.reserve(CAP, 1, "a", NOW)
    assert ledger.balance(CAP, NOW) == Balance(60, 0)


@pytest.mark.parametrize("amount", [-1, 2**62])
def test_amounts_that_cannot_be_counted_are_refused(ledger: Ledger, amount: int) -> None:
    with pytest.raises(LedgerError, match="cannot be counted"):
        ledger.reserve(CAP, amount, "a", NOW)
    ledger.reserve(CAP, 1, "a", NOW)
    with pytest.raises(LedgerError, match="cannot be counted"):
        ledger.settle("a", amount, NOW)


def test_subjects_budgets_currencies_and_periods_are_counted_apart(ledger: Ledger) -> None:
    ledger.reserve(CAP, 100, "a", NOW)
    for number, other in enumerate(
        (
            Limit("coding/spend", "ws-2", "USD", "day", 100),
            Limit("coding/other", "ws-1", "USD", "day", 100),
            Limit("coding/spend", "ws-1", "EUR", "day", 100),
            Limit("coding/spend", "ws-1", "USD", "month", 100),
        )
    ):
        assert ledger.reserve(other, 100, f"b-{number}", NOW).left == 0


def test_the_next_period_starts_anew(ledger: Ledger) -> None:
    ledger.reserve(CAP, 100, "a", NOW)
    with pytest.raises(Exhausted):
        ledger.reserve(CAP, 1, "b", NOW + timedelta(hours=11, minutes=59))
    assert ledger.reserve(CAP, 100, "b", NOW + timedelta(hours=12)).left == 0


def test_a_clock_set_back_opens_no_period_that_is_over(ledger: Ledger) -> None:
    ledger.reserve(CAP, 1, "old", NOW - timedelta(days=1))
    ledger.reserve(CAP, 100, "a", NOW)
    with pytest.raises(Exhausted):
        ledger.reserve(CAP, 1, "b", NOW - timedelta(days=1))
    assert ledger.balance(CAP, NOW - timedelta(days=1)) == Balance(100, 0)


def test_a_reservation_nobody_settles_expires_as_spent_in_full_and_takes_its_true_cost_later(ledger: Ledger) -> None:
    ledger.reserve(CAP, 60, "a", NOW)
    assert ledger.expire(NOW + timedelta(seconds=599)) == 0
    assert ledger.expire(NOW + timedelta(seconds=600)) == 1
    assert ledger.balance(CAP, NOW) == Balance(0, 60)
    assert [(one.state, one.amount) for one in ledger.untold()] == [("expired", 60)]
    ledger.told(ledger.untold())
    assert ledger.untold() == []
    assert not ledger.release("a", NOW), "what expired is spent"
    assert ledger.settle("a", 7, NOW)
    assert ledger.balance(CAP, NOW) == Balance(0, 7)
    assert [(one.state, one.amount) for one in ledger.untold()] == [("settled", 7)]


def test_ends_are_told_in_the_order_in_which_they_came(ledger: Ledger) -> None:
    for name in ("c", "a", "b", "0"):
        ledger.reserve(CAP, 1, name, NOW)
    for second, name in enumerate(("b", "c", "0", "a")):
        ledger.settle(name, 1, NOW + timedelta(seconds=second // 2))
    assert [one.id for one in ledger.untold()] == ["c", "b", "a", "0"], "within a second, as they began"
    assert [one.id for one in ledger.untold(1)] == ["c"]


def test_every_end_is_told_until_it_is_noted(ledger: Ledger) -> None:
    ledger.reserve(CAP, 1, "a", NOW, "who")
    assert ledger.untold() == []
    ledger.settle("a", 1, NOW, "how")
    (charge,) = ledger.untold()
    assert (charge.detail, charge.outcome, charge.reserved) == ("who", "how", 1)
    ledger.told([charge])
    ledger.expire(NOW + timedelta(days=8))
    assert not ledger.settle("a", 2, NOW)


def test_windows_are_calendar_periods_in_utc() -> None:
    sunday = datetime(2026, 11, 29, 1, 30, tzinfo=UTC)
    assert window("day", sunday)[0] == datetime(2026, 11, 29, tzinfo=UTC)
    assert window("week", sunday) == (datetime(2026, 11, 23, tzinfo=UTC), datetime(2026, 11, 30, tzinfo=UTC))
    assert window("month", sunday) == (datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC))
    assert window("month", datetime(2026, 12, 31, tzinfo=UTC))[1] == datetime(2027, 1, 1, tzinfo=UTC)


def test_money_is_exact() -> None:
    assert [money(n, "USD") for n in (0, 1, 1_250_000, 20_000_000, -5)] == [
        "0.00 USD", "0.000001 USD", "1.25 USD", "20.00 USD", "-0.000005 USD",
    ]  # fmt: skip


def test_a_ledger_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text("not a database, but long enough to be looked at as one" * 40)
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(tmp_path / "ledger.db")


_WORKER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from saw.budget.errors import Exhausted
from saw.budget.ledger import Ledger, Limit

path, name, tries, hang = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "hang"
ledger = Ledger(path, life_s=600)
limit = Limit("coding/spend", "ws-1", "USD", "day", 100)
now = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
print("ready", flush=True)
sys.stdin.readline()
admitted = 0
for number in range(tries):
    try:
        ledger.reserve(limit, 7, f"{name}-{number}", now)
        admitted += 1
    except Exhausted:
        pass
print(admitted, flush=True)
if hang:
    sys.stdin.readline()
"""


def workers(path: Path, count: int, tries: int, mode: str = "end") -> list[subprocess.Popen[str]]:
    found = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(path), f"w{number}", str(tries), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    for worker in found:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    return found


def start(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()


def told(worker: subprocess.Popen[str]) -> int:
    assert worker.stdout is not None
    return int(worker.stdout.readline())


def test_racing_processes_admit_exactly_what_fits(tmp_path: Path) -> None:
    """16 processes ask 50 times each for 7 of 100: 14 times 7 fit, and not once more."""
    path = tmp_path / "ledger.db"
    racing = workers(path, 16, 50)
    for worker in racing:
        start(worker)
    admitted = [told(worker) for worker in racing]
    for worker in racing:
        worker.communicate(timeout=60)
    assert sum(admitted) == 14
    ledger = Ledger(path)
    assert ledger.balance(CAP, NOW) == Balance(98, 0)
    ledger.close()


def test_a_process_killed_between_reserving_and_settling_leaves_its_reservation_counted(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    (worker,) = workers(path, 1, 14, "hang")
    start(worker)
    assert told(worker) == 14
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate(timeout=60)
    ledger = Ledger(path, life_s=600)
    with pytest.raises(Exhausted):
        ledger.reserve(CAP, 7, "next", NOW)
    assert ledger.expire(NOW + timedelta(seconds=600)) == 14
    assert ledger.balance(CAP, NOW) == Balance(0, 98)
    with pytest.raises(Exhausted):
        ledger.reserve(CAP, 7, "next", NOW)
    ledger.close()


class Spending(RuleBasedStateMachine):
    """Any order of steps, on one file opened anew at times, against a plain account of what must count."""

    identifiers = Bundle("identifiers")

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(os.environ["LEDGER_TEST"]) / f"{id(self)}.db"
        self.path.unlink(missing_ok=True)
        self.ledger = Ledger(self.path, life_s=600)
        self.now = self.latest = NOW
        self.count = 0
        self.calls: dict[str, list[object]] = {}  # identifier -> [day, counts, state, expires]

    def teardown(self) -> None:
        self.ledger.close()

    def _time(self) -> datetime:
        self.latest = max(self.latest, self.now)
        return self.latest

    def counted(self) -> int:
        day = max(self.latest, self.now).date()
        return sum(int(str(call[1])) for call in self.calls.values() if call[0] == day)

    @initialize()
    def begin(self) -> None:
        assert self.ledger.balance(CAP, self.now) == Balance()
        self.ledger.expire(self.now)  # so that it has seen the time that the account here begins with

    @rule(target=identifiers, amount=st.integers(0, 130))
    def reserve(self, amount: int) -> str:
        name, self.count = f"c{self.count}", self.count + 1
        time = self._time()
        fits = self.counted() + amount <= CAP.most
        try:
            self.ledger.reserve(CAP, amount, name, self.now)
        except Exhausted:
            assert not fits
            return name
        assert fits
        self.calls[name] = [time.date(), amount, "open", time + timedelta(seconds=600)]
        return name

    @rule(name=identifiers, actual=st.integers(0, 200))
    def settle(self, name: str, actual: int) -> None:
        call = self.calls.get(name)
        changes = call is not None and call[2] in {"open", "expired"}
        assert self.ledger.settle(name, actual, self.now) is changes
        if call is not None and changes:
            self._time()
            call[1:3] = [actual, "settled"]

    @rule(name=consumes(identifiers))
    def release(self, name: str) -> None:
        call = self.calls.get(name)
        changes = call is not None and call[2] == "open"
        assert self.ledger.release(name, self.now) is changes
        if call is not None and changes:
            self._time()
            call[1:3] = [0, "released"]

    @rule()
    def expire(self) -> None:
        time = self._time()
        self.ledger.expire(self.now)
        for call in self.calls.values():
            if call[2] == "open" and call[3] <= time:  # type: ignore[operator]
                call[2] = "expired"

    @rule(minutes=st.sampled_from([-2880, -700, 5, 11, 700]))
    def pass_time(self, minutes: int) -> None:
        self.now += timedelta(minutes=minutes)

    @rule()
    def reopen(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(self.path, life_s=600)

    @invariant()
    def what_counts_is_exact_and_only_a_reported_overrun_passes_the_limit(self) -> None:
        balance = self.ledger.balance(CAP, self.now)
        assert balance.held + balance.spent == self.counted()
        held = sum(int(str(call[1])) for call in self.calls.values() if call[2] == "open")
        assert balance.held <= held


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDGER_TEST", str(tmp_path))


TestSpending = Spending.TestCase
TestSpending.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
