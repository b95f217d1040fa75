"""What budgets and prices must fulfil beyond their types."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

from saw.policy.decode import Report, StructureReport
from saw.policy.governance import Governance, InferenceRoute
from saw.policy.partial import Unknown

T = TypeVar("T")


def repeated(ids: Iterator[tuple[int, object]]) -> Iterator[tuple[int, object]]:
    """Yield position and value of each that was there before."""
    seen: set[object] = set()
    for index, value in ids:
        if value in seen:
            yield index, value
        seen.add(value)


def each(values: tuple[T, ...], read: Callable[[T], object]) -> Iterator[tuple[int, object]]:
    """Yield position and what ``read`` makes of each value, where that is known."""
    for index, value in enumerate(values):
        with suppress(Unknown):
            yield index, read(value)


def check_price(value: str, report: Report) -> None:
    """Report a text that is no price."""
    if not re.match(r"(?:0|[1-9][0-9]{0,8})(?:\.[0-9]{1,6})?\Z", value):
        report(f"{value!r} is not a price of a million tokens", 'write for example "0.15"')


def check_optional_price(value: str | None, report: Report) -> None:
    """Report a text that is no price; none is good."""
    if value is not None:
        check_price(value, report)


def check_tokens(value: int | None, report: Report) -> None:
    """Report a number that is no number of tokens; none is good."""
    if value is not None and not 1 <= value <= 10**9:
        report(f"{value} is not a number of tokens", "write 1 to 1000000000")


def check_priced(route: InferenceRoute, report: StructureReport) -> None:
    """Report prices that nothing is paid by."""
    if route.budget is None and route.prices:
        report("prices", "prices have no part without a budget", "name a budget, or remove them")


def check_currency(value: str, report: Report) -> None:
    """Report what is no currency."""
    if not re.match(r"[A-Z]{3}\Z", value):
        report(f"{value!r} is not a currency", "write its three letters, for example USD")


def check_amount(value: str, report: Report) -> None:
    """Report what is no amount above zero."""
    if not re.match(r"(?:0|[1-9][0-9]{0,11})(?:\.[0-9]{1,6})?\Z", value) or not value.strip("0."):
        report(f"{value!r} is not an amount above zero", 'write for example "20.00"')


def _budget_ids(value: Governance, report: StructureReport) -> None:
    for index, name in repeated(each(value.budgets, lambda budget: budget.id)):
        report(("budgets", index, "id"), f"the id {name} is used twice", "give each budget its own id")


def _budgets_are_used(value: Governance, report: StructureReport) -> None:
    used = {route.budget for route in value.inference.routes}
    for index, name in each(value.budgets, lambda budget: budget.id):
        if name not in used:
            report(
                ("budgets", index), f"no route draws on the budget {name}, so it limits nothing", "name it in a route"
            )


def _route_budgets(value: Governance, report: StructureReport) -> None:
    ids = {budget.id for budget in value.budgets}
    for index, name in each(value.inference.routes, lambda route: route.budget):
        if name is not None and name not in ids:
            report(
                ("inference", "routes", index, "budget"), f"it names the unknown budget {name}", "list it under budgets"
            )


GOVERNANCE_BUDGETS = (_budget_ids, _route_budgets, _budgets_are_used)
"""The checks of a whole file that are about budgets."""
