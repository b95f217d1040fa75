"""What a case's result is: the probe's word, held against what the recorder saw.

The recorder wins: what arrived was allowed, whatever the probe says. A refusal is right when its reason is one that the case
expects. Of a target that is not ours a refusal for another reason counts as refused, its reason as unknown.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from saw.conformance.case import Case
from saw.conformance.transfer import Told

Result = Literal["refused", "wrong_reason", "allowed", "error", "not_applicable"]


class TwinResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The allowed twin: ``works``, ``broken``, ``not_applicable``, or ``none`` with the stated reason as ``detail``."""

    id: str
    result: Literal["works", "broken", "not_applicable", "none"]
    detail: str = ""


class CaseResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the report. ``reason_ok`` is None where the reason is not known; ``arrived`` None without a recorder."""

    id: str
    control: str
    suite: str
    title: str
    expected: tuple[str, ...]
    layer: str
    result: Result
    reason_ok: bool | None
    arrived: bool | None
    twin: TwinResult
    evidence: dict[str, str | int | tuple[str, ...]]

    @property
    def finding(self) -> bool:
        """Tell whether somebody must look at it."""
        if self.result == "not_applicable":
            return False
        return self.result != "refused" or self.reason_ok is False or self.twin.result == "broken"


def reasons(told: Told, *, dropped: bool) -> list[str]:
    """Return the reasons that a refusal has, the most telling first."""
    found = [told.reason, told.errno, f"status:{told.status}" if told.status else "", "dropped" if dropped else ""]
    return [reason for reason in found if reason]


def judge(
    case: Case,
    told: Told | None,
    arrivals: list[str] | None,
    twin: TwinResult,
    *,
    ours: bool,
    tried: str,
    problem: str = "",
) -> CaseResult:
    """Return the result of ``case``; ``arrivals`` is None where nothing recorded, ``tried`` says what was attempted."""
    arrived = None if arrivals is None else bool(arrivals)
    evidence: dict[str, str | int | tuple[str, ...]] = {"tried": tried}
    if arrivals:
        evidence["arrived"] = tuple(arrivals[:5])
    result: Result = "error"
    reason_ok: bool | None = None
    if told is None:
        evidence["problem"] = problem or "the probe gave no answer"
    else:
        evidence["probe"] = told.outcome
        evidence |= {name: value for name in ("detail", "errno", "reason", "status") if (value := getattr(told, name))}
    if arrived:
        result = "allowed"
        if told is not None and told.outcome != "allowed":
            evidence["problem"] = f"the probe said {told.outcome}, and it arrived"
    elif told is None or told.outcome == "error":
        result = "error"
    elif told.outcome == "not_possible":
        result = "not_applicable"
        evidence["problem"] = told.detail
    else:
        dropped = told.outcome == "allowed" and case.arrival and arrived is False
        if told.outcome == "allowed" and not dropped:
            result = "allowed"
        else:
            given = reasons(told, dropped=dropped)
            evidence["refused_by"] = given[0] if given else "unknown"
            if set(given) & set(case.expected):
                result, reason_ok = "refused", True
            else:
                result, reason_ok = ("wrong_reason", False) if ours else ("refused", None)
    return CaseResult(
        case.id,
        case.control,
        case.suite,
        case.title,
        case.expected,
        case.layer,
        result,
        reason_ok,
        arrived,
        twin,
        evidence,
    )


def missing(case: Case, why: str) -> CaseResult:
    """Return the result of a case that this target cannot be tried with."""
    twin = TwinResult(case.twin, "not_applicable" if case.twin else "none", why if case.twin else case.no_twin)
    return CaseResult(
        case.id, case.control, case.suite, case.title, case.expected, case.layer, "not_applicable", None, None, twin,
        {"problem": why},
    )  # fmt: skip


def judge_twin(case: Case, told: Told | None, arrivals: list[str] | None) -> TwinResult:
    """Return whether what must be possible is possible."""
    if told is None:
        return TwinResult(case.id, "broken", "the probe gave no answer")
    if told.outcome == "not_possible":
        return TwinResult(case.id, "not_applicable", told.detail)
    if told.outcome == "allowed" and (not case.recorded or arrivals is None or arrivals):
        return TwinResult(case.id, "works", told.detail[:200])
    if told.outcome == "allowed":
        return TwinResult(case.id, "broken", "it was sent, and nothing arrived")
    given = reasons(told, dropped=False)
    return TwinResult(case.id, "broken", f"{told.outcome}: {given[0] if given else ''} {told.detail[:200]}".strip())
