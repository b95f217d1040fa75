"""Why a call is decided as it is: the rules that decided, where they stand, and what would have allowed it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from saw.policy.decode import Steps, locate, path_text
from saw.policy.errors import PolicyError
from saw.policy.loader import GOVERNANCE_FILE, POLICY_FILE, Bundle, load_members
from saw.policy.matcher import Matcher
from saw.policy.mcp import decide_tool
from saw.policy.model import Decision, Request
from saw.policy.remedies import Change, NoRemedy, apply_changes, call_changes, tool_changes
from saw.policy.tool_rules import McpServer
from saw.policy.yamltree import Node, parse

_LABEL = re.compile(r"(endpoints)\[(\d+)\](?:\.(?:(rules|deny_rules)\[(\d+)\]|(access|enforcement): ))?")
_ACTION = re.compile(r"; actions\[(\d+)\]\Z")
_SERVER = re.compile(r"; mcp\.servers\.([a-z0-9-]+)(?:\.tools\.([A-Za-z0-9_.-]+))?\Z")
_ROUNDS = 4
"""Most changes in turn: a rule, plain text, an action class, and one more."""


class Place(msgspec.Struct, frozen=True):
    """A rule: the member of the bundle, line and column (1-based), and the field."""

    file: str
    line: int
    column: int
    field: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column} {self.field}"


class Explanation(msgspec.Struct, frozen=True):
    """A decision and its reasons.

    ``rules`` are the places that decided, the last one had the last word; none means that nothing in the bundle is about the
    call. ``changes`` would allow it, all of them together; ``impossible`` says why there are none. ``notes`` are what else
    the changes do.
    """

    decision: Decision
    rules: tuple[Place, ...] = ()
    changes: tuple[Change, ...] = ()
    impossible: str = ""
    notes: tuple[str, ...] = ()


class _Places:
    """Finds places in the members of a bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self._roots: dict[str, Node] = {name: parse(raw, name)[0] for name, raw in bundle.members.items()}

    def at(self, file: str, steps: Steps) -> Place:
        """Return the place of the value that ``steps`` lead to; of a rule in a list, the rule itself."""
        node = locate(self._roots[file], steps)
        return Place(file, node.line, node.column, path_text(steps))


_ROUTE_FIELDS: dict[str, Steps] = {
    "model_not_allowed": ("models",),
    "budget_unenforced": ("budget",),
    "price_unknown": ("prices",),
    "data_class_not_allowed": ("data_classes",),
}
"""Where in a route the cause of a refusal is written."""


def _decided(bundle: Bundle, decision: Decision, request: Request) -> tuple[Place, ...]:
    places = _Places(bundle)
    found: list[Place] = []
    if decision.inference is not None:
        for index, route in enumerate(bundle.governance.inference.routes):
            if (route.alias.lower(), route.port) == (request.host.lower(), request.port):
                field = _ROUTE_FIELDS.get(decision.reason, ())
                found.append(places.at(GOVERNANCE_FILE, ("inference", "routes", index, *field)))
        return tuple(found)
    label = _LABEL.match(decision.rule)
    if decision.policy and label:
        steps: Steps = ("network_policies", decision.policy, "endpoints", int(label[2]))
        if label[3]:
            steps = (*steps, label[3], int(label[4]))
        elif label[5]:
            steps = (*steps, label[5])
        found.append(places.at(POLICY_FILE, steps))
    server = _SERVER.search(decision.rule)
    if server:
        found.append(places.at(GOVERNANCE_FILE, _tool_steps(bundle, decision, server)))
    action = _ACTION.search(decision.rule)
    if action:
        found.append(places.at(GOVERNANCE_FILE, ("actions", int(action[1]))))
    return tuple(found)


def _tool_steps(bundle: Bundle, decision: Decision, label: re.Match[str]) -> Steps:
    """Return the way to the server, tool or argument that decided on a call of MCP over HTTP."""
    name, tool = label[1], label[2] or str((decision.rule_missing or {}).get("tool", ""))
    server = bundle.governance.mcp.servers[name]
    steps: Steps = ("mcp", "servers", name)
    return (*steps, "tools", tool, *_argument(server, decision, tool)) if tool in server.tools else steps


def explain_call(bundle: Bundle, request: Request) -> Explanation:
    """Explain the decision on ``request``; an HTTP call, a push, or a call of an inference route."""
    decision = Matcher.compile(bundle.policy, bundle.governance).decide(request)
    rules = _decided(bundle, decision, request)
    if decision.allowed:
        return Explanation(decision, rules)
    changes: tuple[Change, ...] = ()
    changed, now = bundle, decision
    try:
        for _ in range(_ROUNDS):
            changes += call_changes(changed, request, now)
            changed = _with(bundle, changes)
            now = Matcher.compile(changed.policy, changed.governance).decide(request)
            if now.allowed:
                notes = _notes(decision, now, changes)
                if changed.policy != bundle.policy and _opens_addresses(bundle, changed, request):
                    notes += (f"{request.host.lower()} is named exactly then, so it may resolve to private addresses",)
                return Explanation(decision, rules, changes, notes=notes)
    except NoRemedy as reason:
        return Explanation(decision, rules, impossible=str(reason))
    return Explanation(decision, rules, impossible=f"no single rule allows it: {now.detail}")


def _notes(before: Decision, after: Decision, changes: tuple[Change, ...]) -> tuple[str, ...]:
    notes: list[str] = []
    if before.reason == "deny_rule":
        notes.append("a deny rule refuses this on purpose")
    path = before.canonical_path.partition("?")[0]
    own = (change.value["endpoints"][0] for change in changes if change.file == POLICY_FILE and len(change.at) == 2)
    if any(endpoint.get("path") == path for endpoint in own):
        notes.append(
            "for this path and program the new endpoint decides alone: what others allow there is refused then"
        )
    if before.action_class in {"review", "deny"} and before.reason in {"review_required", "action_denied"}:
        notes.append("nobody would look at such a call any more")
    if before.reason == "budget_unenforced":
        notes.append("nothing would limit what the route costs")
    if after.credential is not None:
        notes.append(f"the credential {after.credential} would travel with the call")
    return tuple(notes)


def _opens_addresses(before: Bundle, after: Bundle, request: Request) -> bool:
    """Return whether a host that a pattern covers so far is named by itself now."""
    old, new = (Matcher.compile(bundle.policy, bundle.governance) for bundle in (before, after))
    host = request.host.lower()
    return new.host_declared_exactly(host) and not old.host_declared_exactly(host)


def _with(bundle: Bundle, changes: tuple[Change, ...]) -> Bundle:
    try:
        return load_members(apply_changes(bundle.members, changes))
    except PolicyError as error:
        raise NoRemedy(f"a rule for it cannot stand in this bundle: {error.problems[0].reason}") from error


def _argument(server: McpServer, decision: Decision, tool: str) -> Steps:
    """Return the way from a tool to the argument that ``decision`` is about, where the tool lists it."""
    named = str((decision.rule_missing or {}).get("argument", ""))
    return ("args", named) if named in server.tools[tool].args else ()


def explain_tool(bundle: Bundle, server: str, tool: str, arguments: Mapping[str, object]) -> Explanation:
    """Explain the decision on a call of an MCP tool."""
    governance = bundle.governance
    decision = decide_tool(governance, server, tool, arguments)
    rules: tuple[Place, ...] = ()
    known = governance.mcp.servers.get(server)
    if known is not None:
        steps: Steps = ("mcp", "servers", server)
        if tool in known.tools:
            steps = (*steps, "tools", tool)
            steps = (*steps, *_argument(known, decision, tool))
        rules = (_Places(bundle).at(GOVERNANCE_FILE, steps),)
    if decision.allowed:
        return Explanation(decision, rules)
    try:
        changes = tool_changes(governance, server, tool, arguments)
        now = decide_tool(_with(bundle, changes).governance, server, tool, arguments)
    except NoRemedy as reason:
        return Explanation(decision, rules, impossible=str(reason))
    if not now.allowed:
        return Explanation(decision, rules, impossible=f"no single rule allows it: {now.detail}")
    return Explanation(decision, rules, changes)
