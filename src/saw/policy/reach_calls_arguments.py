"""Arguments of tools that are called over HTTP, cut into the classes that the rules of one or two bundles tell apart.

A class says for each bundle whether its rule for the tool accepts the arguments. Where one accepts what the other refuses there
is an example for every argument in which they differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from saw.policy.mcp import arguments_fault
from saw.policy.reach_arguments import NOTHING, find
from saw.policy.reach_automata import Budget, TooLarge
from saw.policy.tool_rules import Tool

Accepted = tuple[bool, ...]
"""For each table of tools, whether it accepts the arguments."""


def sample(tools: Sequence[Tool], budget: Budget) -> dict[str, object] | None:
    """Return the smallest arguments that all of ``tools`` accept, or ``None`` when there are none."""
    result: dict[str, object] = {}
    for name in sorted({name for tool in tools for name, rule in tool.args.items() if rule.required}):
        rules = [tool.args[name] for tool in tools if name in tool.args]
        value = find(rules, (), budget) if len(rules) == len(tools) else NOTHING
        if value is NOTHING:
            return None
        result[name] = value
    return result


def wider_arguments(old: Tool, new: Tool, budget: Budget) -> list[tuple[str, dict[str, object]]]:
    """Return for each argument that ``new`` takes and ``old`` refuses: its name and arguments that show it."""
    base = sample((new,), budget)
    if base is None:
        return []
    found: list[tuple[str, dict[str, object]]] = []
    for name in sorted({*old.args, *new.args}):
        before, after = old.args.get(name), new.args.get(name)
        if after is not None:
            value = find((after,), (before,) if before is not None else (), budget)
            if value is not NOTHING:
                found.append((name, {**base, name: value}))
                continue
        if before is not None and before.required and (after is None or not after.required):
            found.append((name, {key: value for key, value in base.items() if key != name}))
    return found


class ArgumentClasses:
    """The classes of arguments that ``tables``, the tools of at most two bundles, tell apart."""

    def __init__(self, tables: Sequence[Mapping[str, Tool]], budget: Budget) -> None:
        self._tables = tuple(tables)
        self._budget = budget

    @property
    def tools(self) -> tuple[str, ...]:
        """Return the names of the tools that are told apart by themselves."""
        return tuple(sorted({name for table in self._tables for name in table}))

    def key(self, tool: str, arguments: Mapping[str, object]) -> Accepted:
        """Return the class of ``arguments`` of ``tool``."""
        rules = (table.get(tool) for table in self._tables)
        return tuple(rule is not None and arguments_fault(rule, arguments) is None for rule in rules)

    def of(self, tool: str) -> Iterator[tuple[Accepted, dict[str, object] | None, str]]:
        """Yield each class of arguments of ``tool``: key, an example, and the argument in which it shows a difference.

        Raises :class:`TooLarge` where there is no telling in bounds, or no telling in JSON.
        """
        if not self._tables:
            yield (), None, ""
            return
        rules = [table.get(tool) for table in self._tables]
        known = [rule for rule in rules if rule is not None]
        unlisted = next(name for name in map("x{}".format, range(1000)) if all(name not in rule.args for rule in known))
        found: list[tuple[dict[str, object] | None, str]] = [({unlisted: 1}, "")]
        if known:
            found.append((sample(known, self._budget), ""))
        if len(rules) == 2 and rules[0] != rules[1]:
            for one, other in (rules, rules[::-1]):
                if one is not None and other is not None:
                    found += [(sent, name) for name, sent in wider_arguments(other, one, self._budget)]
        for sent, name in found:
            if sent is not None:
                if not all(map(_sendable, sent.values())):
                    raise TooLarge
                yield self.key(tool, sent), sent, name


def _sendable(value: object) -> bool:
    """Return whether JSON has a form for ``value``."""
    if isinstance(value, list | tuple):
        return all(map(_sendable, value))
    return not isinstance(value, float) or math.isfinite(value)


__all__ = ["ArgumentClasses", "sample", "wider_arguments"]
