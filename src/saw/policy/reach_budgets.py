"""Compare budgets and what their calls are counted at, and bound what they let through."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from saw.policy.governance import Budget, BudgetPeriod, Governance, InferenceRoute, Limit, Price
from saw.policy.reach_item import Item, Region, Risk

_SHARED = {"engagement": 0, "workspace": 1, "blueprint": 2}
"""How many share one limit: the more, the tighter."""
_LEFT_OPEN = {"deny": 0, "review": 1, "report": 2}
"""How much passes when the limit is reached."""
_PERIODS: dict[tuple[BudgetPeriod, BudgetPeriod], int] = {
    ("day", "day"): 1,
    ("day", "week"): 7,
    ("day", "month"): 31,
    ("week", "day"): 1,
    ("week", "week"): 1,
    ("week", "month"): 6,
    ("month", "day"): 1,
    ("month", "week"): 2,
    ("month", "month"): 1,
}
"""Most periods of the first kind that a calendar period of the second kind touches."""


def _name(route: InferenceRoute) -> str:
    return f"{route.alias.lower()}:{route.port}"


def _words(budget: Budget) -> str:
    return f"{budget.limit.amount} {budget.limit.currency} per {budget.period} and {budget.scope}"


def compare_budgets(old: Governance, new: Governance) -> list[Item]:
    """Return the limits that ``new`` loosens, takes away, or exchanges in a way that may loosen them."""
    return [*_routes(old, new), *_limits(old, new), *_counted(old, new)]


def _item(kind: str, what: str, why: str, *, region: Region, risk: Risk, rule: str, exact: bool = True) -> Item:
    return Item("budget", kind, what, why, region, risk, (rule,), exact=exact)


def _routes(old: Governance, new: Governance) -> Iterator[Item]:
    before = {_name(route): route for route in old.inference.routes}
    for index, route in enumerate(new.inference.routes):
        was = before.get(_name(route))
        if was is None or was.budget is None or was.budget == route.budget:
            continue
        rule = f"inference.routes[{index}].budget"
        limit = _words(old.budget(was.budget))
        region = Region(host=route.alias.lower(), port=route.port, budget=was.budget)
        if route.budget is None:
            yield _item(
                "unlimited",
                f"{_name(route)} without a budget",
                f"was limited to {limit}",
                region=region,
                risk="high",
                rule=rule,
            )
        else:
            what = f"{_name(route)} draws on {route.budget}: {_words(new.budget(route.budget))}"
            why = f"drew on {was.budget}: {limit}; what shares a limit has changed"
            yield _item("exchanged", what, why, region=region, risk="high", rule=rule, exact=False)


def _limits(old: Governance, new: Governance) -> Iterator[Item]:
    known = {budget.id: budget for budget in old.budgets}
    for index, now in enumerate(new.budgets):
        was = known.get(now.id)
        if was is None:
            continue
        rule, region = f"budgets[{index}]", Region(budget=now.id)
        if now.limit.currency != was.limit.currency:
            what = f"{now.id}: {now.limit.amount} {now.limit.currency}"
            why = f"was {was.limit.amount} {was.limit.currency}"
            yield _item("currency", what, why, region=region, risk="high", rule=f"{rule}.limit", exact=False)
        elif now.limit.value > was.limit.value:
            what = f"{now.id}: {now.limit.amount} {now.limit.currency}"
            yield _item("limit", what, f"was {was.limit.amount}", region=region, risk="medium", rule=f"{rule}.limit")
        if now.period != was.period:
            # A longer period holds each day of the old one; weeks and months cut each other.
            why = f"was per {was.period}"
            exact = was.period != "day"
            yield _item(
                "period",
                f"{now.id}: per {now.period}",
                why,
                region=region,
                risk="medium",
                rule=f"{rule}.period",
                exact=exact,
            )
        if _SHARED[now.scope] < _SHARED[was.scope]:
            why = f"one limit was shared by each {was.scope}"
            yield _item(
                "scope", f"{now.id}: for each {now.scope}", why, region=region, risk="high", rule=f"{rule}.scope"
            )
        if _LEFT_OPEN[now.on_exhaust] > _LEFT_OPEN[was.on_exhaust]:
            what = f"{now.id}: {now.on_exhaust} when the limit is reached"
            yield _item(
                "on_exhaust", what, f"was {was.on_exhaust}", region=region, risk="high", rule=f"{rule}.on_exhaust"
            )


def _counted(old: Governance, new: Governance) -> Iterator[Item]:
    """Yield where calls of a route that keeps its budget are counted at less, so that more of them fit."""
    before = {_name(route): route for route in old.inference.routes}
    for index, route in enumerate(new.inference.routes):
        was = before.get(_name(route))
        if was is None or route.budget is None or was.budget != route.budget or not (was.prices and route.prices):
            continue
        region = Region(host=route.alias.lower(), port=route.port, budget=route.budget)
        at = f"inference.routes[{index}]"
        if [price.models for price in route.prices] != [price.models for price in was.prices]:
            what, why = f"{_name(route)}: other prices", "which price a model has, has changed"
            yield _item("price", what, why, region=region, risk="medium", rule=f"{at}.prices", exact=False)
        else:
            for place, (now, then) in enumerate(zip(route.prices, was.prices, strict=True)):
                if any(new_rate < old_rate for new_rate, old_rate in zip(_rates(now), _rates(then), strict=True)):
                    what = f"{_name(route)}: {', '.join(now.models)} at {now.input} in and {now.output} out"
                    why = f"was counted at {then.input} and {then.output}"
                    yield _item("price", what, why, region=region, risk="medium", rule=f"{at}.prices[{place}]")
        for field in ("max_input_tokens", "max_output_tokens"):
            now_most, then_most = getattr(route, field), getattr(was, field)
            if now_most is not None and (then_most is None or now_most < then_most):
                what, why = f"{_name(route)}: {field} {now_most}", f"was {then_most}"
                yield _item("bound", what, why, region=region, risk="medium", rule=f"{at}.{field}", exact=False)


def _rates(price: Price) -> tuple[Decimal, ...]:
    """Return what a million tokens are counted at: input, output, read from and written to the service's cache."""
    entry = Decimal(price.input)
    read = entry if price.cache_read is None else Decimal(price.cache_read)
    write = 2 * entry if price.cache_write is None else Decimal(price.cache_write)
    return entry, Decimal(price.output), read, write


def budget_fault(governance: Governance, route: InferenceRoute, limit: Limit, period: BudgetPeriod) -> str | None:
    """Return why ``route`` may cost more than ``limit`` in a calendar ``period``, or ``None`` when it may not."""
    if route.budget is None:
        return f"{_name(route)} draws on no budget"
    budget = governance.budget(route.budget)
    if budget.on_exhaust != "deny":
        return f"the budget {budget.id} is no hard stop (on_exhaust: {budget.on_exhaust})"
    if budget.limit.currency != limit.currency:
        return f"the budget {budget.id} is in {budget.limit.currency}, not in {limit.currency}"
    most = budget.limit.value * _PERIODS[budget.period, period]
    if most > limit.value:
        return f"the budget {budget.id} lets {most} {limit.currency} through in one {period}"
    return None
