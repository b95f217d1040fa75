"""The smallest change of a bundle that would allow what a body asks for: a rule for the operation, or an action rule."""

from __future__ import annotations

import re
from typing import Any

from saw.policy.actions import reads, units
from saw.policy.change import Change, NoRemedy, exact
from saw.policy.decode import Steps
from saw.policy.loader import GOVERNANCE_FILE, POLICY_FILE, Bundle
from saw.policy.mcp_http import CALL_TOOL
from saw.policy.model import Decision, Endpoint, Request

_ENDPOINT = re.compile(r"endpoints\[(\d+)\]")
_GIVEN = {
    "read-only": ("query",),
    "read-write": ("query", "mutation"),
    "full": ("query", "mutation", "subscription"),
}


def operation_changes(bundle: Bundle, decision: Decision) -> tuple[Change, ...]:
    """Return what lets an operation pass that no rule allows; raise :class:`NoRemedy` where no rule could."""
    if decision.reason == "deny_rule":
        raise NoRemedy("a deny rule of the endpoint refuses it on purpose; change that rule by hand")
    label = _ENDPOINT.match(decision.rule)
    if decision.reason != "operation_not_allowed" or label is None or decision.rule_missing is None:
        raise NoRemedy(f"no rule allows such a call: {decision.detail}")
    at: Steps = ("network_policies", decision.policy, "endpoints", int(label[1]))
    endpoint = bundle.policy.network_policies[decision.policy].endpoints[int(label[1])]
    rule = {"allow": _match(endpoint, decision.rule_missing)}
    if endpoint.rules is not None:
        return (Change(POLICY_FILE, "append", (*at, "rules"), rule),)
    given = [{"allow": {"operation_type": kind}} for kind in _GIVEN.get(endpoint.access, ())]
    added = Change(POLICY_FILE, "add", (*at, "rules"), [*given, rule])
    return (Change(POLICY_FILE, "remove", (*at, "access")), added) if endpoint.access else (added,)


def _match(endpoint: Endpoint, missing: dict[str, object]) -> dict[str, Any]:
    if endpoint.protocol == "graphql":
        fields = missing.get("fields")
        named = [exact("field", str(field), flat=True) for field in fields] if isinstance(fields, list) else []
        match: dict[str, Any] = {"operation_type": missing["operation_type"], "fields": named}
        return match
    method = exact("method", str(missing["rpc_method"]), flat=True)
    tool = missing.get("tool")
    return {"method": method, "tool": exact("tool", str(tool), flat=True)} if tool else {"method": method}


def class_changes(request: Request, decision: Decision) -> tuple[Change, ...]:
    """Return the action rules that class everything that the body asks for ``auto``."""
    match: dict[str, Any] = {
        "host": request.host.lower(),
        "port": request.port,
        "path": exact("path", decision.canonical_path.partition("?")[0]),
    }
    found = units(decision.protocol, decision.operations)
    found = tuple(unit for unit in found if not reads(decision.protocol, unit)) or found
    said: list[dict[str, Any]] = []
    if decision.protocol == "graphql":
        for kind in dict.fromkeys(unit.kind for unit in found):
            fields = [exact("field", unit.name, flat=True) for unit in found if unit.kind == kind]
            said.append({"graphql": {"operation_type": [kind], "fields": fields}})
    elif decision.protocol == "json-rpc":
        said.append({"json_rpc": {"method": [exact("method", unit.kind, flat=True) for unit in found]}})
    else:
        tools = [exact("tool", unit.name, flat=True) for unit in found if unit.kind == CALL_TOOL]
        methods = [exact("method", unit.kind, flat=True) for unit in found if unit.kind != CALL_TOOL]
        said += [{"mcp": {"tool": tools}}] if tools else []
        said += [{"mcp": {"method": methods}}] if methods else []
    said = said or [{"method": [request.method.upper()]}]
    return tuple(
        Change(GOVERNANCE_FILE, "first", ("actions",), {"match": {**match, **one}, "class": "auto"}) for one in said
    )
