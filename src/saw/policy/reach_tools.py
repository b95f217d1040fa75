"""Compare the MCP tools of two bundles: servers, tools, classes and the values that arguments may have."""

from __future__ import annotations

import json
from collections.abc import Mapping

from saw.policy.governance import Governance
from saw.policy.mcp import decide_tool, tool_review
from saw.policy.reach_automata import Budget, TooLarge
from saw.policy.reach_calls import verdict
from saw.policy.reach_calls_arguments import sample, wider_arguments
from saw.policy.reach_item import Item, Region, Risk, Witness
from saw.policy.reach_side import LEVELS, REFUSED, REVIEW
from saw.policy.tool_rules import Tool

_ABSENT = Tool()
_LONG = 300


def level(tool: Tool) -> int:
    """Return how much a tool's class allows, as an index of :data:`saw.policy.reach_side.LEVELS`."""
    return REFUSED if tool.class_ == "deny" else LEVELS.index(tool.class_)


def arguments_text(arguments: Mapping[str, object]) -> str:
    """Return ``arguments`` as JSON; values that are too long for a report are cut and marked."""
    return json.dumps(
        {name: _short(value) for name, value in sorted(arguments.items())}, ensure_ascii=True, default=str
    )


def _asked(governance: Governance, tool: Tool) -> tuple[str, int, int]:
    """Return who decides on calls of a tool over stdio, how many of them, and within which time."""
    asked = tool_review(governance, tool)
    return asked.group, asked.quorum, asked.expires_s


def _short(value: object) -> object:
    if isinstance(value, str) and len(value) > _LONG:
        return f"{value[:40]}… ({len(value)} characters)"
    if isinstance(value, list) and len(value) > _LONG:
        return f"a list of {len(value)} elements like {json.dumps(value[0], default=str)[:80]}"
    return value


class _Comparison:
    def __init__(self, old: Governance, new: Governance, budget: Budget) -> None:
        self.old = old
        self.new = new
        self.budget = budget
        self.items: list[Item] = []

    def _add(
        self, place: tuple[str, str, str], kind: str, risk: Risk, why: str, arguments: Mapping[str, object]
    ) -> None:
        server, tool, name = place
        before = decide_tool(self.old, server, tool, arguments)
        after = decide_tool(self.new, server, tool, arguments)
        witness = Witness(
            server=server, tool=tool, arguments=arguments_text(arguments), old=verdict(before), new=verdict(after)
        )
        class_ = self.new.mcp.servers[server].tools[tool].class_
        region = Region(server=server, tool=tool, argument=name, action_class=class_)
        what = f"tool {server}.{tool}" + (f" argument {name}" if name else "")
        rules = (f"mcp.servers.{server}.tools.{tool}" + (f".args.{name}" if name else ""),)
        self.items.append(Item("tool", kind, what, why, region, risk, rules, exact=True, witness=witness))

    def _unknown(self, server: str, tool: str) -> None:
        rules = (f"mcp.servers.{server}.tools.{tool}",)
        region = Region(server=server, tool=tool)
        why = "its arguments differ, and an exact answer is out of bounds"
        self.items.append(
            Item("tool", "possibly", f"tool {server}.{tool}", why, region, "critical", rules, exact=False)
        )

    def tool(self, server: str, name: str, old: Tool, new: Tool) -> None:
        """Compare one tool."""
        if old == new or level(new) == REFUSED:
            return
        base = sample((new,), self.budget)
        if base is None:
            return
        usable = level(old) != REFUSED and sample((old,), self.budget) is not None
        if not usable:
            review = level(new) == REVIEW
            why = "was refused and may now be asked of a reviewer" if review else "could not be called"
            self._add((server, name, ""), "tool", "medium" if review else "high", why, base)
            return
        if level(new) > level(old):
            lifted = level(old) == REVIEW
            why = f"was of class {old.class_} and is of class {new.class_} now"
            kind = "review-lifted" if lifted else "class"
            self._add((server, name, ""), kind, "critical" if lifted else "high", why, base)
        for argument, arguments in wider_arguments(old, new, self.budget):
            risk: Risk = "medium" if level(new) == REVIEW else "high"
            self._add((server, name, argument), "argument", risk, "was refused with this argument", arguments)

    def definition(self, server: str, name: str, old: Tool, new: Tool) -> None:
        """Tell where the tool may be what it was not allowed to be; which is better, only a reader of both can say."""
        if old.definition is None or old.definition == new.definition or REFUSED in (level(old), level(new)):
            return
        why = "may have any definition now" if new.definition is None else "is pinned to another definition now"
        rules = (f"mcp.servers.{server}.tools.{name}.definition",)
        region = Region(server=server, tool=name, setting="definition", action_class=new.class_)
        self.items.append(Item("tool", "definition", f"tool {server}.{name}", why, region, "medium", rules))

    def reviewers(self, server: str, name: str, old: Tool, new: Tool) -> None:
        """Tell where others decide, other numbers of them, or within another time; which is stricter, only a reader can say."""
        if level(old) != REVIEW or level(new) != REVIEW or _asked(self.old, old) == _asked(self.new, new):
            return
        base = sample((new,), self.budget)
        if base is not None:
            why = "is reviewed by others, by fewer, or may wait longer"
            self._add((server, name, ""), "reviewers", "medium", why, base)

    def run(self) -> list[Item]:
        """Compare all servers and tools."""
        for server, now in sorted(self.new.mcp.servers.items()):
            known = self.old.mcp.servers.get(server)
            for name, tool in sorted(now.tools.items()):
                self.definition(server, name, known.tools.get(name, _ABSENT) if known else _ABSENT, tool)
            if now.transport != "stdio":
                continue  # its tools are called over HTTP, and compared call by call
            before = self.old.mcp.servers.get(server)
            before = before if before is not None and before.transport == "stdio" else None
            if before is None or before.command != now.command:
                region = Region(server=server, setting="command")
                why = "runs another program" if before is not None else "did not run"
                what = f"MCP server {server}: {' '.join(now.command)}"
                rules = (f"mcp.servers.{server}.command",)
                self.items.append(Item("tool", "server", what, why, region, "high", rules))
            for name, tool in sorted(now.tools.items()):
                old = _ABSENT if before is None else before.tools.get(name, _ABSENT)
                try:
                    self.reviewers(server, name, old, tool)
                    self.tool(server, name, old, tool)
                except TooLarge:
                    self._unknown(server, name)
        return self.items


def compare_tools(old: Governance, new: Governance, budget: Budget) -> list[Item]:
    """Return what tools of ``new`` take that those of ``old`` refuse."""
    return _Comparison(old, new, budget).run()


__all__ = ["arguments_text", "compare_tools", "level"]
