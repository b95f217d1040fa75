"""Compare what two bundles say of data: classes to work with, classes ruled out, and where data of a class may go."""

from __future__ import annotations

from saw.policy.data_classes import within
from saw.policy.governance import Governance
from saw.policy.reach_automata import Budget, TooLarge
from saw.policy.reach_item import Item, Region, Risk


def compare_data_classes(old: Governance, new: Governance) -> list[Item]:
    """Return what ``new`` allows of data beyond ``old``: a class to work with, one no longer ruled out, a wider way."""
    before, after = old.data_classes, new.data_classes
    items = [
        _item(f"data_classes.handles.{name}", f"work with {name} data", "was not handled", "high")
        for name in sorted(set(after.handles) - set(before.handles))
    ]
    items += [
        _item(f"data_classes.never.{name}", f"{name} data is no longer ruled out", "was ruled out", "high")
        for name in sorted(set(before.never) - set(after.never))
    ]
    items += [
        _item(
            "data_classes.assumed",
            f"calls of models do not hold {name} data unless they or a delegation say so",
            "every call of a model held it",
            "high",
        )
        for name in sorted((set(before.held) - set(after.held)) & set(after.handles))
    ]
    budget = Budget()
    for name, was in sorted(before.only_to.items()):
        if name not in after.handles:
            continue
        now = after.only_to.get(name)
        setting, what = f"data_classes.only_to.{name}", f"{name} data may go to {', '.join(now or ()) or 'any host'}"
        try:
            wider = now is None or not all(within(host.lower(), was, budget) for host in now)
        except TooLarge:
            items.append(_item(setting, what, f"was {', '.join(was)}", "high", exact=False))
            continue
        if wider:
            items.append(_item(setting, what, f"was {', '.join(was)}", "high"))
    return items


def _item(setting: str, what: str, why: str, risk: Risk, *, exact: bool = True) -> Item:
    return Item("setting", "data", what, why, Region(setting=setting), risk, (setting,), exact=exact)
