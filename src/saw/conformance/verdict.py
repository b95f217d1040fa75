"""What a case's result is: the probe's word, held against what the recorder saw.

The recorder wins: what arrived was allowed, whatever the probe says. A refusal is right when its reason is one that the case
expects. Of a target that is not ours a refusal for another reason counts as refused, its reason as unknown.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from saw.conformance.case import Case
from saw.conformance.transfer import Told

_RINGS = {"ring1": "ring 1", "ring2": "ring 2"}
Result = Literal["refused", "wrong_reason", "allowed", "error", "not_applicable"]


class TwinResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The allowed twin: ``works``, ``broken``, ``not_applicable``, or ``none`` with the stated reason as ``detail``."""

    id: str
    result: Literal["works", "broken", "not_applicable", "none"]
    detail: str = ""


class CaseResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the report.

    ``reason_ok`` is None where the reason is not known, ``arrived`` None without a recorder. ``layer`` is the layer that
    refused by its own word (``ring1``, ``ring2``), ``kernel``, or empty where nobody says; ``layer_ok`` whether it is the one
    that ``expected_layer`` names, None where that cannot be told.
    """

    id: str
    control: str
    suite: str
    title: str
    expected: tuple[str, ...]
    expected_layer: str
    layer: str
    layer_ok: bool | None
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


def answered(told: Told) -> str:
    """Return which layer refused: the word of an answer, ``kernel`` for an errno or a signal, empty where nobody says."""
    if told.layer or told.outcome != "refused":
        return told.layer
    return "kernel" if told.errno.startswith(("E", "signal:")) else ""


def as_expected(expected: str, layer: str) -> bool | None:
    """Return whether ``layer`` is the one that a case expects; None where that cannot be told.

    The kernel does not say which of its parts refused.
    """
    if layer in _RINGS:
        return expected.startswith(_RINGS[layer])
    return False if layer == "kernel" and expected.startswith(tuple(_RINGS.values())) else None


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
    layer, layer_ok = "", None
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
            layer = answered(told)
            layer_ok = as_expected(case.layer, layer)
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
        layer,
        layer_ok,
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
        case.id, case.control, case.suite, case.title, case.expected, case.layer, "", None, "not_applicable", None, None, twin,
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
