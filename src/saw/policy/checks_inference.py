"""What the services of an inference route, their classes of data and what is kept of calls must fulfil beyond their types."""

from __future__ import annotations

from contextlib import suppress

from saw.policy.checks_budgets import check_aliases
from saw.policy.decode import Report, StructureReport
from saw.policy.governance import Governance, InferenceRoute, Record
from saw.policy.partial import Unknown, is_whole

MOST_UPSTREAMS = 8
"""Most further services of one route: what each may see is compared with what each other may."""
_DAY_S = 86400


def check_classes(value: tuple[str, ...] | None, report: Report) -> None:
    """Report a list of classes of data that names none."""
    if value is not None and not value:
        report("the list is empty, so nothing could be sent there", "name a class of data, or remove the service")


def check_record(value: Record, report: StructureReport) -> None:
    """Report a time for which calls cannot be kept."""
    if not _DAY_S <= value.keep_s <= 3650 * _DAY_S:
        report("keep", f"{value.keep} is not a time from 1d to 3650d", "write for example 30d")


def check_upstreams(route: InferenceRoute, report: StructureReport) -> None:
    """Report services that no call could reach, and aliases of theirs that stand for no model that may be asked for."""
    if len(route.upstreams) > MOST_UPSTREAMS:
        report("upstreams", f"more than {MOST_UPSTREAMS} further services", "split the route")
        return
    if not is_whole(route) or not all(map(is_whole, route.upstreams)):
        return
    earlier: list[InferenceRoute] = []
    for place, way in enumerate(route.ways):
        if place:
            check_aliases(way, _inside(place - 1, set(route.upstreams[place - 1].aliases), report))
            if any(_hides(before, way) for before in earlier):
                why = "a service before it takes every call that it is for, so it is never used"
                report(("upstreams", place - 1), why, "put it first, or say data_classes of the other one")
        earlier.append(way)


def _inside(place: int, own: set[str], report: StructureReport) -> StructureReport:
    """Return a report for a service that takes what is said of its own aliases alone."""

    def told(where: object, reason: str, cure: str) -> None:
        name = where[1] if isinstance(where, tuple) else ""
        if name in own:
            report(("upstreams", place, "aliases", str(name)), reason, cure)

    return told


def _hides(before: InferenceRoute, way: InferenceRoute) -> bool:
    """Return whether every call that ``way`` is for goes to ``before``, as far as equal lists of models say so."""
    same = before.models == way.models and before.aliases == way.aliases
    seen = before.data_classes is None or (
        way.data_classes is not None and set(way.data_classes) <= set(before.data_classes)
    )
    return same and seen


def check_classes_are_handled(value: Governance, report: StructureReport) -> None:
    """Report a service for certain classes in a bundle that says of no class that it is handled: every call would pass."""
    if value.data_classes.handles:
        return
    for index, route in enumerate(value.inference.routes):
        with suppress(Unknown):
            if any(told is not None for told in (route.data_classes, *(way.data_classes for way in route.upstreams))):
                why = "no class of data is handled, so calls hold none and this would refuse none of them"
                report(("inference", "routes", index), why, "say data_classes.handles")
