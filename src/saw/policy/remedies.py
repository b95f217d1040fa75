"""The smallest change of a bundle that would allow a refused call, where there is one.

Every change is tried before it is shown: the changed bundle loads, and its own matcher allows the call.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from saw.policy import databases, globs, websocket
from saw.policy.address_rules import parse_query
from saw.policy.casefile import Push, push_body
from saw.policy.change import Change, NoRemedy, exact
from saw.policy.checks_calls import LARGEST_BODY
from saw.policy.decode import Steps
from saw.policy.gitproto import PushUnreadable, push_updates
from saw.policy.governance import Governance
from saw.policy.inference import Unreadable, requested_model
from saw.policy.jsonrpc import messages
from saw.policy.loader import GOVERNANCE_FILE, POLICY_FILE, Bundle, endpoint_specificity
from saw.policy.matcher import Matcher
from saw.policy.mcp import argument_fault, decide_call
from saw.policy.mcp_http import arguments_of
from saw.policy.model import Decision, Request
from saw.policy.remedies_calls import class_changes, operation_changes
from saw.policy.yamltext import dump, read

__all__ = ["Change", "NoRemedy", "apply_changes", "call_changes", "tool_changes"]


def apply_changes(members: Mapping[str, bytes], changes: tuple[Change, ...]) -> dict[str, bytes]:
    """Return the members with ``changes`` made; comments of a changed member are lost."""
    trees = {name: read(members[name], name) for name in {change.file for change in changes}}
    for change in changes:
        _apply(trees[change.file], change)
    return {**members, **{name: dump(tree).encode() for name, tree in trees.items()}}


def _apply(tree: Any, change: Change) -> None:
    for index, step in enumerate(change.at[:-1]):
        if isinstance(step, str) and tree.get(step) is None:
            tree[step] = [] if isinstance(change.at[index + 1], int) else {}
        tree = tree[step]
    last = change.at[-1]
    value = copy.deepcopy(change.value)
    if change.operation == "remove":
        del tree[last]
    elif change.operation in {"append", "first"}:
        found = list(tree.get(last) or [])
        tree[last] = [value, *found] if change.operation == "first" else [*found, value]
    else:
        tree[last] = value


_FIXED = {
    "destination_blocked": "the destination is blocked whatever a policy says",
    "not_canonical": "two parsers could read the request differently; send its canonical form",
}


def call_changes(bundle: Bundle, request: Request, decision: Decision) -> tuple[Change, ...]:
    """Return the next changes that ``decision`` on ``request`` asks for; raise :class:`NoRemedy` when there are none."""
    if decision.reason in _FIXED:
        raise NoRemedy(_FIXED[decision.reason])
    route = decision.inference and next(
        index
        for index, route in enumerate(bundle.governance.inference.routes)
        if (route.alias.lower(), route.port) == (request.host.lower(), request.port)
    )
    if isinstance(route, int):
        return _route_changes(bundle.governance, route, request, decision)
    if decision.reason in {"tool_not_allowed", "argument_not_allowed"}:
        return _tool_changes_of(bundle.governance, request, decision)
    if decision.reason in {"review_required", "action_denied"}:
        label = decision.rule.partition("; mcp.servers.")[2]
        if label:
            server, _, tool = label.partition(".tools.")
            at: Steps = ("mcp", "servers", server, "tools", tool, "class")
            return (Change(GOVERNANCE_FILE, "replace", at, "auto"),)
        if decision.protocol:
            return class_changes(request, decision)
        return _action_changes(bundle, request, decision)
    if decision.protocol:
        return operation_changes(bundle, decision)
    if decision.reason == "deny_rule":
        return (_rule_change(bundle, request, decision, own_path=True),)
    if decision.rule_missing is None:
        raise NoRemedy(f"no rule allows such a call: {decision.detail}")
    return _missing_changes(bundle, request, decision)


def _tool_changes_of(governance: Governance, request: Request, decision: Decision) -> tuple[Change, ...]:
    """Return what lets the call of a tool pass that its server over HTTP refuses; its class stays as it is."""
    missing = decision.rule_missing or {}
    server, tool = str(missing["server"]), str(missing["tool"])
    rules = governance.mcp.servers[server]
    for message in messages(request, "", LARGEST_BODY):
        arguments = arguments_of(message)
        called = message.params.get("name") if isinstance(message.params, dict) else None
        if arguments is None or called != tool:
            continue
        if decide_call(server, rules, tool, arguments).reason == decision.reason:
            found = tool_changes(governance, server, tool, arguments)
            kept = rules.tools.get(tool)
            reviewed = kept is not None and kept.class_ == "review"
            return tuple(change for change in found if not reviewed or change.at[-1] != "class")
    raise NoRemedy(f"no rule allows such a call: {decision.detail}")


def _route_changes(governance: Governance, index: int, request: Request, decision: Decision) -> tuple[Change, ...]:
    at = ("inference", "routes", index)
    route = governance.inference.routes[index]
    if decision.reason == "budget_unenforced":
        removals = [Change(GOVERNANCE_FILE, "remove", (*at, "budget"))]
        if sum(other.budget == route.budget for other in governance.inference.routes) == 1:
            place = next(i for i, budget in enumerate(governance.budgets) if budget.id == route.budget)
            removals.append(Change(GOVERNANCE_FILE, "remove", ("budgets", place)))
        return tuple(removals)
    if decision.reason == "price_unknown":
        raise NoRemedy(f"only the owner knows what the model costs: {decision.detail}")
    if decision.reason == "data_class_not_allowed":
        raise NoRemedy(f"people decide which service may see which data: {decision.detail}")
    if decision.reason != "model_not_allowed":
        raise NoRemedy(f"an inference route takes no other calls: {decision.detail}")
    try:
        encoding = request.headers.get("content-encoding", "")
        model = requested_model(request.body, complete=request.body_complete, encoding=encoding)
    except Unreadable as error:
        raise NoRemedy(f"the call does not name one model: {error}") from error
    return (Change(GOVERNANCE_FILE, "append", (*at, "models"), exact("model", model, flat=True)),)


def _action_changes(bundle: Bundle, request: Request, decision: Decision) -> tuple[Change, ...]:
    path = decision.canonical_path.partition("?")[0]
    match = {"host": request.host.lower(), "port": request.port, "path": exact("path", path)}
    if not path.endswith("/git-receive-pack"):
        method = websocket.TEXT if request.upgrade else request.method.upper()
        method = databases.METHOD if databases.is_session(request.upgrade) else method
        action: dict[str, Any] = {"match": {**match, "method": [method]}, "class": "auto"}
        return (Change(GOVERNANCE_FILE, "first", ("actions",), action),)
    try:
        encoding = request.headers.get("content-encoding", "")
        updates = push_updates(request.body, complete=request.body_complete, encoding=encoding)
    except PushUnreadable as error:
        raise NoRemedy(f"the push cannot be read, so no rule can name its refs: {error}") from error
    matcher = Matcher.compile(bundle.policy, bundle.governance)
    changes: list[Change] = []
    for update in dict.fromkeys((update.ref, update.operation) for update in updates):
        body = push_body((msgspec.convert({"ref": update[0], "operation": update[1]}, Push),))
        if matcher.decide(msgspec.structs.replace(request, body=body, body_complete=False)).allowed:
            continue
        git = {"service": "receive-pack", "ref": exact("ref", update[0], flat=True), "operation": [update[1]]}
        changes.append(
            Change(GOVERNANCE_FILE, "first", ("actions",), {"match": {**match, "git": git}, "class": "staged"})
        )
    return tuple(changes)


def _missing_changes(bundle: Bundle, request: Request, decision: Decision) -> tuple[Change, ...]:
    if databases.is_session(request.upgrade):
        raise NoRemedy("a session needs a credential as well, which only the owner can name")
    host, port = request.host.lower(), request.port
    covering = [
        endpoint
        for rule in bundle.policy.network_policies.values()
        for endpoint in rule.endpoints
        if port in endpoint.all_ports and globs.host_glob(endpoint.host).fullmatch(host)
    ]
    own_path = bool(covering)
    changes = [_rule_change(bundle, request, decision, own_path=own_path)]
    if request.scheme == "http" and not covering:
        changes.append(Change(GOVERNANCE_FILE, "append", ("plaintext",), f"{host}:{port}"))
    return tuple(changes)


def _rule_change(bundle: Bundle, request: Request, decision: Decision, *, own_path: bool) -> Change:
    """Return a network rule for exactly this call.

    With ``own_path`` its endpoint is the one for this path alone, so that it stands beside, or in front of, what decides
    there now; where endpoints for the same path add up, it takes their treatment over.
    """
    if not request.binary:
        raise NoRemedy("a rule names the program, and the call does not; say which with --binary")
    path, _, text = decision.canonical_path.partition("?")
    host, port = request.host.lower(), request.port
    endpoint: dict[str, Any] = {"host": exact("host", host, flat=True), "port": port}
    program = exact("program", request.binary)
    beside = _deciding(bundle, request, path)
    alike = beside is not None and (beside.protocol == websocket.PROTOCOL) == bool(request.upgrade)
    if beside is not None and alike and globs.is_exact(beside.host) and decision.reason != "deny_rule":
        own_path = False
        endpoint |= {"path": beside.path} if beside.path else {}
        endpoint |= {"tls": beside.tls} if beside.tls else {}
        endpoint |= {"allow_encoded_slash": True} if beside.allow_encoded_slash else {}
    elif "%2F" in path:
        endpoint["allow_encoded_slash"] = True
    if own_path:
        endpoint["path"] = exact("path", path)
    match: dict[str, Any] = {"method": request.method.upper(), "path": exact("path", path)}
    query = parse_query(text)
    if query is None:
        raise NoRemedy("its query can be read in more than one way; send the parameters without ;")
    if query:
        match["query"] = {
            key: found[0] if len(found := list(dict.fromkeys(values))) == 1 else {"any": found}
            for key, values in query.items()
        }
        for values in query.values():
            for value in values:
                exact("query", value, flat=True)
    rules = [{"allow": match}]
    if request.message:
        method = "*" if request.message == "binary" else websocket.TEXT
        rules.append({"allow": {**match, "method": method}})
    protocol = websocket.PROTOCOL if request.upgrade else "rest"
    endpoint |= {"protocol": protocol, "enforcement": "enforce", "rules": rules}
    name = next(f"allow-{n}" for n in range(1, len(bundle.policy.network_policies) + 2) if _free(bundle, n))
    return Change(
        POLICY_FILE, "add", ("network_policies", name), {"endpoints": [endpoint], "binaries": [{"path": program}]}
    )


def _free(bundle: Bundle, number: int) -> bool:
    return f"allow-{number}" not in bundle.policy.network_policies


def _deciding(bundle: Bundle, request: Request, path: str) -> Any:
    """Return the endpoint that decides such calls of the program today, or ``None``."""
    found = [
        endpoint
        for rule in bundle.policy.network_policies.values()
        for endpoint in rule.endpoints
        if request.port in endpoint.all_ports
        and globs.host_glob(endpoint.host).fullmatch(request.host.lower())
        and globs.path_glob(endpoint.path or "/**").fullmatch(path)
        and any(
            globs.path_glob(binary.path).fullmatch(program)
            for binary in rule.binaries
            for program in (request.binary, *request.ancestors)
            if program
        )
    ]
    return max(found, key=endpoint_specificity) if found else None


_TYPE_OF: tuple[tuple[type, str], ...] = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"))


def _argument_for(name: str, value: object) -> dict[str, Any]:
    """Return the rule that accepts exactly ``value``."""
    for kind, word in _TYPE_OF:
        if isinstance(value, kind):
            if isinstance(value, float):
                return {"type": word, "min": value, "max": value}
            return {"type": word, "enum": [value]}
    if isinstance(value, list) and value:
        items = [_argument_for(name, item) for item in value]
        if all("enum" in item and item["type"] == items[0]["type"] for item in items):
            merged = list(dict.fromkeys(item["enum"][0] for item in items))
            return {"type": "array", "max_length": len(value), "items": {"type": items[0]["type"], "enum": merged}}
    raise NoRemedy(f"no rule can name the value of {name}; only texts, numbers, booleans and lists of one kind of them")


def tool_changes(governance: Governance, server: str, tool: str, arguments: Mapping[str, object]) -> tuple[Change, ...]:
    """Return the changes that allow this call of a tool; raise :class:`NoRemedy` when there are none."""
    known = governance.mcp.servers.get(server)
    if known is None:
        raise NoRemedy(f"no MCP server is named {server!r}, and how to start it is not known; add the server by hand")
    if not re.match(r"[A-Za-z0-9_.-]{1,128}\Z", tool):
        raise NoRemedy("this is no tool name")
    at: Steps = ("mcp", "servers", server, "tools", tool)
    rule = known.tools.get(tool)
    if rule is None:
        made = {name: {**_argument_for(name, value), "required": True} for name, value in arguments.items()}
        return (Change(GOVERNANCE_FILE, "add", at, {"class": "auto", "args": made}),)
    changes: list[Change] = []
    for name, value in arguments.items():
        argument = rule.args.get(name)
        if argument is None:
            changes.append(Change(GOVERNANCE_FILE, "add", (*at, "args", name), _argument_for(name, value)))
            continue
        fault = argument_fault(value, argument)
        if fault is None:
            continue
        if argument.enum and isinstance(value, str | int | bool) and "listed" in fault:
            changes.append(Change(GOVERNANCE_FILE, "append", (*at, "args", name, "enum"), value))
        else:
            raise NoRemedy(f"the argument {name} {fault}; one rule holds for all of its values, so widen it by hand")
    missing = [name for name, argument in rule.args.items() if argument.required and name not in arguments]
    if missing:
        raise NoRemedy(f"the call lacks {', '.join(missing)}; add it to the call")
    if rule.class_ in {"deny", "review"}:
        changes.append(Change(GOVERNANCE_FILE, "replace", (*at, "class"), "auto"))
    return tuple(changes)
