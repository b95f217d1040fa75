"""Decide a call of an MCP tool by the tool and its arguments."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from functools import lru_cache

from saw.policy.governance import Argument, Governance
from saw.policy.linear_regex import LinearRegex
from saw.policy.model import ALLOW, DENY, Decision

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
}


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


def decide_tool(governance: Governance, server: str, tool: str, arguments: Mapping[str, object]) -> Decision:
    """Return the decision on calling ``tool`` of ``server`` with ``arguments``.

    An unknown server or tool is ``tool_not_allowed``; an argument that is not listed, missing though required, or outside
    its rule is ``argument_not_allowed``; class ``review`` is ``review_required``, class ``deny`` is ``tool_not_allowed``.
    The values of arguments never appear in the answer.
    """

    def deny(reason: str, detail: str, action_class: str, step: str) -> Decision:
        return Decision(
            verdict=DENY,
            reason=reason,
            detail=detail,
            policy=server,
            rule=tool,
            action_class=action_class,
            next_steps=(step,),
        )

    known_server = governance.mcp.servers.get(server)
    if known_server is None:
        return deny("tool_not_allowed", f"no MCP server is named {server!r}", "deny", "use a server of the policy")
    rule = known_server.tools.get(tool)
    if rule is None or rule.class_ == "deny":
        why = "is not listed" if rule is None else "is denied"
        usable = ", ".join(sorted(name for name, other in known_server.tools.items() if other.class_ != "deny"))
        return deny("tool_not_allowed", f"the tool {tool[:128]!r} {why}", "deny", f"use one of: {usable}")
    for name, value in arguments.items():
        argument = rule.args.get(name)
        if argument is None:
            detail = f"the argument {name[:128]!r} is not listed"
            return deny("argument_not_allowed", detail, rule.class_, "leave it out")
        fault = argument_fault(value, argument)
        if fault:
            detail = f"the argument {name!r} {fault}"
            return deny("argument_not_allowed", detail, rule.class_, "change the argument")
    for name, argument in rule.args.items():
        if argument.required and name not in arguments:
            detail = f"the argument {name!r} is missing"
            return deny("argument_not_allowed", detail, rule.class_, "add it")
    if rule.class_ == "review":
        return deny("review_required", "a person must decide on this call first", "review", "propose the change")
    return Decision(verdict=ALLOW, policy=server, rule=tool, action_class=rule.class_)
