"""Decide a call of an MCP tool by the tool and its arguments."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from saw.policy.governance import Governance, duration
from saw.policy.linear_regex import LinearRegex
from saw.policy.model import ALLOW, DENY, Decision
from saw.policy.tool_rules import Argument, McpServer, Tool

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
}

_A_DAY = 86400
_LONG = 500
"""Longest list that an answer spells out (characters)."""
_MOST = 64
"""Most names that an answer lists."""


@lru_cache(maxsize=512)
def _regex(expression: str) -> LinearRegex:
    return LinearRegex(expression)


def _under(path: str, base: str) -> str | None:
    """Return why the text ``path`` is not at or below ``base``, or ``None``. Links are the sandbox's business."""
    if not path.startswith("/"):
        return "is not an absolute path"
    if not path.isprintable() or "\\" in path:
        return "has control characters or backslashes"
    if ".." in path.split("/"):
        return "has a .. segment"
    plain = posixpath.normpath(path)
    plain = plain[1:] if plain.startswith("//") else plain
    root = base.rstrip("/")
    return None if plain == root or plain.startswith(root + "/") else f"is not under {base}"


def argument_fault(value: object, rule: Argument) -> str | None:
    """Return why ``value`` breaks ``rule``, or ``None``."""
    if not isinstance(value, _TYPES.get(rule.type, ())) or (isinstance(value, bool) and rule.type != "boolean"):
        return f"is not of type {rule.type}"
    if rule.enum and not any(type(value) is type(known) and value == known for known in rule.enum):
        return "is not one of the listed values"
    if isinstance(value, str):
        if rule.max_length is not None and len(value) > rule.max_length:
            return f"is longer than {rule.max_length} characters"
        if rule.regex is not None and not _regex(rule.regex).matches(value):
            return "does not match the expression"
        return _under(value, rule.under) if rule.under is not None else None
    if isinstance(value, list | tuple):
        if rule.max_length is not None and len(value) > rule.max_length:
            return f"has more than {rule.max_length} elements"
        if rule.items is None:
            return "is an array without a rule for its elements"
        return next(
            (f"has an element that {fault}" for item in value if (fault := argument_fault(item, rule.items))), None
        )
    if isinstance(value, int | float):
        too_small = rule.min is not None and not value >= rule.min
        if too_small or (rule.max is not None and not value <= rule.max):
            return "is out of range"
    return None


def accepted(rule: Argument) -> str:
    """Return in words what ``rule`` accepts; the policy is no secret to the agent that it binds."""
    said = [f"a value of type {rule.type}"]
    if rule.enum:
        said.append(f"one of {', '.join(map(str, rule.enum))}"[:_LONG])
    if rule.under is not None:
        said.append(f"an absolute path at or below {rule.under}")
    if rule.regex is not None:
        said.append(f"as a whole like {rule.regex}"[:_LONG])
    if rule.min is not None:
        said.append(f"at least {rule.min}")
    if rule.max is not None:
        said.append(f"at most {rule.max}")
    if rule.max_length is not None:
        said.append(f"with at most {rule.max_length} {'elements' if rule.type == 'array' else 'characters'}")
    if rule.items is not None:
        said.append(f"each element {accepted(rule.items)}")
    return ", ".join(said)


class ArgumentFault(NamedTuple):
    """Why arguments break the rules of a tool: the argument, what is wrong with it, and what to send instead."""

    name: str
    detail: str
    step: str


def arguments_fault(rule: Tool, arguments: Mapping[str, object]) -> ArgumentFault | None:
    """Return why ``rule`` refuses ``arguments``, or ``None``. Values of arguments never appear in the answer."""
    for name, value in arguments.items():
        argument = rule.args.get(name)
        if argument is None:
            listed = ", ".join(sorted(rule.args)) or "none"
            detail = f"the argument {name[:128]!r} is not listed"
            return ArgumentFault(name[:128], detail, f"leave it out; arguments that may be sent: {listed}"[:_LONG])
        fault = argument_fault(value, argument)
        if fault:
            return ArgumentFault(name, f"the argument {name!r} {fault}", f"send {name} as {accepted(argument)}")
    for name, argument in rule.args.items():
        if argument.required and name not in arguments:
            return ArgumentFault(name, f"the argument {name!r} is missing", f"add {name}: {accepted(argument)}")
    return None


def decide_call(server: str, rules: McpServer, tool: str, arguments: Mapping[str, object]) -> Decision:
    """Return the decision on calling ``tool`` of the server that is named ``server`` and held to ``rules``.

    A tool that is not listed, or of class ``deny``, is ``tool_not_allowed``; an argument that is not listed, missing though
    required, or outside its rule is ``argument_not_allowed``; class ``review`` is ``review_required``. ``rule_missing`` says
    which tool and argument it is about, and what the rule accepts.
    """

    def deny(reason: str, detail: str, action_class: str, step: str, **missing: object) -> Decision:
        return Decision(
            verdict=DENY,
            reason=reason,
            detail=detail,
            policy=server,
            rule=tool,
            action_class=action_class,
            rule_missing={"server": server, "tool": tool[:128], **missing} if missing else None,
            next_steps=(step,),
        )

    rule = rules.tools.get(tool)
    if rule is None or rule.class_ == "deny":
        why = "is not listed" if rule is None else "is denied"
        usable = sorted(name for name, other in rules.tools.items() if other.class_ != "deny")
        detail = f"the tool {tool[:128]!r} of {server} {why}"
        step = f"use one of: {', '.join(usable)}"[:_LONG]
        return deny("tool_not_allowed", detail, "deny", step, tools=usable[:_MOST])
    fault = arguments_fault(rule, arguments)
    if fault is not None:
        known = rule.args.get(fault.name)
        accepts = {"accepts": accepted(known)} if known is not None else {"arguments": sorted(rule.args)[:_MOST]}
        return deny(
            "argument_not_allowed", f"{tool} of {server}: {fault.detail}", rule.class_, fault.step,
            argument=fault.name, **accepts,
        )  # fmt: skip
    if rule.class_ == "review":
        return deny("review_required", "a person must decide on this call first", "review", "propose the change")
    return Decision(verdict=ALLOW, policy=server, rule=tool, action_class=rule.class_)


def definition_changed(server: str, tool: str, action_class: str = "") -> Decision:
    """Return the refusal of ``tool`` while ``server`` defines it in another way than the policy pins."""
    return Decision(
        verdict=DENY,
        reason="definition_changed",
        detail=f"{server} lists {tool[:128]} with another definition than the one that was signed",
        policy=server,
        rule=tool,
        action_class=action_class,
        rule_missing={"server": server, "tool": tool[:128]},
        next_steps=(
            "go on without this tool",
            "ask the policy's owner to look at the new definition and to pin it, or the server's owner to undo the change",
        ),
    )


class ToolReview(NamedTuple):
    """Who decides on a call of a tool over stdio, how many of them, and how long the request stays open (seconds)."""

    group: str
    quorum: int
    expires_s: int


def tool_review(governance: Governance, tool: Tool) -> ToolReview:
    """Return who decides on ``tool``; without reviewers of its own one of the blueprint's owners, within a day."""
    expires = _A_DAY if tool.expires is None else duration(tool.expires)
    if tool.reviewers is None:
        return ToolReview(governance.blueprint.owner, 1, expires)
    return ToolReview(tool.reviewers.group, tool.reviewers.quorum, expires)


def decide_tool(governance: Governance, server: str, tool: str, arguments: Mapping[str, object]) -> Decision:
    """Return the decision on calling ``tool`` of ``server``, as :func:`decide_call`; an unknown server has no tools."""
    rules = governance.mcp.servers.get(server)
    if rules is None:
        return Decision(
            verdict=DENY, reason="tool_not_allowed", detail=f"no MCP server is named {server!r}", policy=server, rule=tool,
            action_class="deny", next_steps=("use a server of the policy",),
        )  # fmt: skip
    return decide_call(server, rules, tool, arguments)
