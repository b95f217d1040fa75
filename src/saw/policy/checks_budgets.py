"""What budgets, prices, limits and aliases of models must fulfil beyond their types."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

from saw.policy.decode import Report, StructureReport
from saw.policy.globs import GlobError, flat_glob
from saw.policy.governance import CALENDAR, CallLimit, Governance, InferenceRoute, duration
from saw.policy.partial import Unknown

T = TypeVar("T")
LONGEST_WINDOW_S = 3600
"""The longest stretch that slides (seconds); what is longer is a quota by the calendar."""
MOST_IN_WINDOW = 100_000
"""Most requests that a limit with such a stretch can have: each is kept by itself."""
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,255}\Z")


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


def check_model(value: str, report: Report) -> None:
    """Report what cannot be the name of a model in an alias: it is written into calls as it is."""
    if not _MODEL.match(value):
        report(f"{value!r} is not the name of one model", "use letters, digits and . _ : / @ + -, at most 256")


def check_aliases(route: InferenceRoute, report: StructureReport) -> None:
    """Report aliases that stand for no model that may be asked for."""
    allowed = []
    for text in route.models:
        with suppress(GlobError):
            allowed.append(flat_glob(text))
    for name, target in route.aliases.items():
        where = ("aliases", name)
        if not _MODEL.match(target):
            report(where, f"{target!r} is not the name of one model", "write the service's own name of it")
        elif target in route.aliases:
            report(where, f"{target} is an alias itself", "name the model that it stands for")
        elif not any(pattern.fullmatch(target) for pattern in allowed):
            report(where, f"the model {target} is not among {', '.join(route.models)}", "list it under models")


def check_per(value: str, report: Report) -> None:
    """Report what is neither a calendar period nor a stretch that can be counted."""
    if value in CALENDAR:
        return
    try:
        seconds = duration(value)
    except ValueError:
        seconds = 0
    if not 1 <= seconds <= LONGEST_WINDOW_S:
        report(f"{value!r} is neither a time from 1s to 1h nor day, week or month", "write for example 1m")


def check_count(value: int | None, report: Report) -> None:
    """Report a number that is no limit; none is good."""
    if value is not None and not 1 <= value <= 10**15:
        report(f"{value} is not a number of requests or tokens", "write 1 to 1000000000000000")


def check_limit(limit: CallLimit, report: StructureReport) -> None:
    """Report a limit that limits nothing, or more than can be counted one by one."""
    if limit.requests is None and limit.tokens is None:
        report("requests", f"the limit {limit.id} limits nothing", "say requests or tokens")
    if limit.per not in CALENDAR and limit.requests is not None and limit.requests > MOST_IN_WINDOW:
        report("requests", f"more than {MOST_IN_WINDOW} requests in {limit.per}", "count by day, week or month")


def _limit_ids(value: Governance, report: StructureReport) -> None:
    for index, name in repeated(each(value.limits, lambda limit: limit.id)):
        report(("limits", index, "id"), f"the id {name} is used twice", "give each limit its own id")


def _limits_are_used(value: Governance, report: StructureReport) -> None:
    used = {name for _, names in each(value.inference.routes, lambda route: route.limits) for name in _texts(names)}
    for index, name in each(value.limits, lambda limit: limit.id):
        if name not in used:
            report(("limits", index), f"no route names the limit {name}, so it limits nothing", "name it in a route")


def _route_limits(value: Governance, report: StructureReport) -> None:
    ids = {name for _, name in each(value.limits, lambda limit: limit.id)}
    for index, names in each(value.inference.routes, lambda route: route.limits):
        for place, name in enumerate(_texts(names)):
            where = ("inference", "routes", index, "limits", place)
            if name not in ids:
                report(where, f"it names the unknown limit {name}", "list it under limits")
            elif name in _texts(names)[:place]:
                report(where, f"it names the limit {name} twice", "remove one")


def _texts(value: object) -> tuple[str, ...]:
    return tuple(one for one in value if isinstance(one, str)) if isinstance(value, tuple) else ()


GOVERNANCE_BUDGETS = (_budget_ids, _route_budgets, _budgets_are_used, _limit_ids, _route_limits, _limits_are_used)
"""The checks of a whole file that are about budgets and limits."""
