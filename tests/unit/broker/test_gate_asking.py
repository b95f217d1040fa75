"""A run that asks: it waits through whatever happens, claims what is there then, and says why it does not go on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_gates import AWX, GATES, MACHINES, STATED, Fleet

from saw.broker.review_decisions import Cancel
from saw.broker.reviewers import Retire
from saw.errors import SawError, UnavailableError
from saw.review.asking import CLAIM_TRIES, NotApproved, Question, new_claim
from saw.review.gate import AskGate, BoundFile, ClaimGate, EndGate, GateView


class Line:
    """The way to the broker: the calls arrive as they were meant, unless it is cut before or after."""

    def __init__(self, fleet: Fleet) -> None:
        self.gates = fleet.broker.gates
        self.calls: list[str] = []
        self.waits: list[str] = []
        self.cut: dict[str, list[str]] = {}

    def request(self, _method: str, path: str, json: object | None = None) -> dict[str, Any]:
        place, _, query = path.partition("?")
        self.waits += [query.removeprefix("wait=")] if query else []
        kind = {"/v1/gates": "ask", "/v1/gates/preview": "preview"}.get(place) or place.split("/")[-1]
        kind = kind if kind in {"ask", "preview", "claim", "result"} else "view"
        self.calls.append(kind)
        when = self.cut.get(kind, []) and self.cut[kind].pop(0)
        if when == "before":
            raise UnavailableError("the line is cut")
        answer = self._call(kind, place.split("/")[3] if kind in {"view", "claim", "result"} else "", json)
        if when == "after":
            raise UnavailableError("the line is cut")
        return msgspec.json.decode(msgspec.json.encode(answer))  # type: ignore[no-any-return]

    def _call(self, kind: str, identifier: str, json: object) -> object:
        if kind == "view":
            return self.gates.view(AWX, identifier)
        if kind in {"ask", "preview"}:
            return getattr(self.gates, kind)(AWX, msgspec.convert(json, AskGate))
        return getattr(self.gates, kind)(
            AWX, identifier, msgspec.convert(json, ClaimGate if kind == "claim" else EndGate)
        )


class Run:
    """A run with a clock of its own: each thing that is told about waiting takes ten seconds, and may make something happen."""

    def __init__(self, fleet: Fleet) -> None:
        self.line, self.now, self.told = Line(fleet), 0.0, []
        self.happens: list[Callable[[], object]] = []
        self.question = Question(self.line, lambda: self.now, self._pause, self._tell)
        self.statement = STATED

    def _pause(self, seconds: float) -> None:
        self.now += seconds

    def _tell(self, view: GateView | None, _waited: float) -> None:
        self.told.append(None if view is None else len(view.approved_by))
        self.now += 10
        if self.happens:
            self.happens.pop(0)()

    def through(self, timeout_s: float = 100) -> GateView:
        self.asked = self.question.ask(self.statement)
        claim = new_claim(os.urandom)
        return self.question.agreed(self.asked.id, claim, lambda: self.statement, timeout_s, 10)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path, gates=GATES, machines=MACHINES)


def test_a_run_waits_until_enough_people_agreed_and_has_the_claim(fleet: Fleet) -> None:
    run = Run(fleet)
    run.statement = msgspec.structs.replace(STATED, gate="update")
    run.happens = [lambda: fleet.decide(run.asked.id, "ben"), lambda: fleet.decide(run.asked.id, "cleo")]
    view = run.through()
    assert (view.state, view.approved_by) == ("executing", ("ben", "cleo"))
    assert run.told == [0, 1]


def test_a_broker_that_is_away_for_a_while_loses_nothing(fleet: Fleet) -> None:
    run = Run(fleet)
    run.line.cut = {"view": ["before", "after"], "claim": ["after", "before"]}
    run.happens = [lambda: None, lambda: None, lambda: fleet.decide(run.asked.id, "ben")]
    assert run.through().state == "executing"
    assert run.told == [None, None, 0]
    assert run.line.calls.count("claim") == 3
    other = Run(fleet)
    other.statement = msgspec.structs.replace(STATED, purpose="another")
    other.line.cut = {"claim": ["before"] * CLAIM_TRIES}
    other.happens = [lambda: fleet.decide(other.asked.id, "ben")]
    with pytest.raises(UnavailableError):
        other.through()


@pytest.mark.control("REV-02")
@pytest.mark.parametrize(
    ("happens", "code", "words"),
    [
        (
            lambda fleet, one: fleet.decide(one, "cleo", "deny", comment="not on a Friday"),
            "review_denied",
            "by cleo: not on a Friday",
        ),
        (lambda fleet, _one: fleet.later(hours=5), "review_expired", "nobody decided in time"),
        (lambda fleet, one: fleet.broker.decisions.cancel(AWX, one, Cancel("wrong")), "review_cancelled", "wrong"),
        (lambda _fleet, _one: None, "not_in_time", "still waits for maintainers"),
    ],
)
def test_why_a_run_does_not_go_on_is_said(
    fleet: Fleet, happens: Callable[[Fleet, str], object], code: str, words: str
) -> None:
    run = Run(fleet)
    run.happens = [lambda: happens(fleet, run.asked.id)]
    with pytest.raises(NotApproved) as caught:
        run.through()
    assert caught.value.code == code
    assert words in caught.value.message
    assert caught.value.cure
    assert caught.value.details["id"] == run.asked.id


def test_a_run_does_not_ask_without_waiting_before_its_time_is_over(fleet: Fleet) -> None:
    run = Run(fleet)
    with pytest.raises(NotApproved):
        run.through(timeout_s=10.5)
    assert run.line.waits == ["10", "1", "0"]


def test_a_run_that_was_stopped_waits_on_for_the_same_question(fleet: Fleet) -> None:
    first, second = Run(fleet), Run(fleet)
    with pytest.raises(NotApproved):
        first.through(timeout_s=20)
    second.happens = [lambda: fleet.decide(second.asked.id, "ben")]
    assert second.through().id == first.asked.id


@pytest.mark.control("REV-02")
def test_what_is_changed_while_a_run_waits_is_not_run(fleet: Fleet) -> None:
    run = Run(fleet)

    def approve_and_change() -> None:
        fleet.decide(run.asked.id, "ben")
        run.statement = msgspec.structs.replace(
            STATED, files=(BoundFile(path="update.yml", kind="file", sha256="2" * 64),)
        )

    run.happens = [approve_and_change]
    with pytest.raises(SawError) as caught:
        run.through()
    assert caught.value.code == "statement_changed"
    assert "~ file update.yml" in str(caught.value)


def test_an_approval_that_ceases_to_count_at_the_last_moment_is_waited_for_again(fleet: Fleet) -> None:
    run = Run(fleet)

    def approve_and_leave() -> None:
        fleet.decide(run.asked.id, "ben")
        fleet.broker.reviewers.retire(AWX, "ben", Retire(reason="left"))

    run.happens = [approve_and_leave, lambda: fleet.decide(run.asked.id, "cleo")]
    assert run.through().state == "executing"
    assert run.told == [0, 0]
