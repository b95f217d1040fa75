"""What an agent is told of the policy in force: where it may go, what people look at first, and nothing that is secret.

References of credentials, reviewers, prices and what deny rules say stay out: an agent needs none of them to keep to the policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from saw.policy.databases import PROTOCOL, UPGRADE
from saw.policy.governance import Action, Governance, InferenceRoute
from saw.policy.model import Endpoint, Match, Policy
from saw.policy.tool_rules import McpServer

MAX_VIEW = 128 * 1024
"""Longest view (bytes of JSON)."""
MOST = 500
"""Most entries of one list: hosts, classes of calls, servers, routes, folders."""
MOST_INSIDE = 60
"""Most entries of a list inside of an entry: rules, programs, tools."""


class Where(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Calls that the policy allows to one host. ``allow`` are the rules, of which one must match; ``exceptions`` is how many
    rules take something away again; ``programs`` may make the calls."""

    host: str
    ports: tuple[int, ...]
    programs: tuple[str, ...]
    scheme: str = "https"
    protocol: str = ""
    path: str = ""
    access: str = ""
    allow: tuple[dict[str, Any], ...] = ()
    exceptions: int = 0


class Classed(msgspec.Struct, frozen=True, rename={"class_": "class"}):
    """What happens to allowed calls that match: ``auto`` and ``staged`` pass, ``review`` waits for a person, ``deny`` is refused.
    The first that matches counts."""

    class_: str
    match: dict[str, Any]


class Server(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """An MCP server; ``tools`` are class and arguments by name."""

    transport: str
    tools: dict[str, dict[str, Any]]
    url: str = ""


class Route(msgspec.Struct, frozen=True):
    """A model service under a local name; ``models`` are the names of its aliases, and globs."""

    host: str
    port: int
    models: tuple[str, ...]


class Files(msgspec.Struct, frozen=True):
    """Folders that may be read, or read and written; what is not listed is not there."""

    read_only: tuple[str, ...]
    read_write: tuple[str, ...]
    include_workdir: bool


class PolicyView(msgspec.Struct, frozen=True, kw_only=True):
    """The policy in force. ``truncated``: it is larger than what is told; budgets and limits are told by their names."""

    policy_digest: str
    revision: int
    blueprint: str
    version: str
    hosts: tuple[Where, ...]
    classes: tuple[Classed, ...]
    otherwise: str
    mcp: dict[str, Server]
    models: tuple[Route, ...]
    files: Files
    budgets: tuple[str, ...]
    limits: tuple[str, ...]
    truncated: bool
    ask: str


OTHERWISE = "reads pass, writes wait for a review, tools that are not listed are refused"
ASK = (
    "POST http://policy.local/v1/requests with {host, method, path, reason} asks people for more. It is a request and never a "
    "grant: nothing is allowed before a signed policy says so. A delegation, a lease or a budget may refuse what is listed here."
)


def view_policy(digest: str, revision: int, policy: Policy, governance: Governance) -> PolicyView:
    """Return the view of a loaded policy, which takes :data:`MAX_VIEW` bytes at most."""
    plain = frozenset(governance.plaintext)
    hosts = tuple(
        _where(endpoint, tuple(binary.path for binary in rule.binaries), plain)
        for rule in policy.network_policies.values()
        for endpoint in rule.endpoints
    )
    files = policy.filesystem_policy
    found = PolicyView(
        policy_digest=digest,
        revision=revision,
        blueprint=governance.blueprint.name,
        version=governance.blueprint.version,
        hosts=hosts[:MOST],
        classes=tuple(_classed(action) for action in governance.actions[:MOST]),
        otherwise=OTHERWISE,
        mcp={name: _server(server) for name, server in list(governance.mcp.servers.items())[:MOST]},
        models=tuple(
            Route(one.alias, one.port, _models(one)[:MOST_INSIDE]) for one in governance.inference.routes[:MOST]
        ),
        files=Files(files.read_only[:MOST], files.read_write[:MOST], files.include_workdir),
        budgets=tuple(budget.id for budget in governance.budgets[:MOST]),
        limits=tuple(limit.id for limit in governance.limits[:MOST]),
        truncated=_is_cut(policy, governance),
        ask=ASK,
    )
    return _bounded(found)


def _models(route: InferenceRoute) -> tuple[str, ...]:
    """Return the names of models that some service of ``route`` answers to, each once."""
    return tuple(dict.fromkeys(name for way in route.ways for name in (*way.aliases, *way.models)))


def _is_cut(policy: Policy, governance: Governance) -> bool:
    """Tell whether a list is longer than what is told of it."""
    endpoints = [endpoint for rule in policy.network_policies.values() for endpoint in rule.endpoints]
    servers, routes = governance.mcp.servers.values(), governance.inference.routes
    files = policy.filesystem_policy
    whole = (
        endpoints, governance.actions, servers, routes, governance.budgets, governance.limits,
        files.read_only, files.read_write,
    )  # fmt: skip
    inside = (
        *(rule.binaries for rule in policy.network_policies.values() if rule.endpoints),
        *(endpoint.rules or () for endpoint in endpoints),
        *(server.tools for server in servers),
        *(tool.args for server in servers for tool in server.tools.values()),
        *(_models(route) for route in routes),
    )
    return any(len(part) > MOST for part in whole) or any(len(part) > MOST_INSIDE for part in inside)


def _bounded(view: PolicyView) -> PolicyView:
    """Return ``view`` with so much left out of its longest lists that it keeps to :data:`MAX_VIEW`."""
    while len(msgspec.json.encode(view)) > MAX_VIEW:
        size = max(len(view.hosts), len(view.classes), len(view.mcp), len(view.models)) // 2
        view = msgspec.structs.replace(
            view,
            hosts=view.hosts[:size],
            classes=view.classes[:size],
            mcp=dict(list(view.mcp.items())[:size]),
            models=view.models[:size],
            files=view.files if size else Files((), (), view.files.include_workdir),
            budgets=view.budgets if size else (),
            limits=view.limits if size else (),
            truncated=True,
        )
    return view


def _where(endpoint: Endpoint, programs: tuple[str, ...], plain: frozenset[str]) -> Where:
    rules = endpoint.rules or ()
    scheme = "http" if all(f"{endpoint.host}:{port}" in plain for port in endpoint.all_ports) else "https"
    return Where(
        host=endpoint.host,
        ports=endpoint.all_ports,
        programs=programs[:MOST_INSIDE],
        scheme=UPGRADE if endpoint.protocol == PROTOCOL else scheme,
        protocol=endpoint.protocol,
        path=endpoint.path,
        access=endpoint.access,
        allow=tuple(_said(rule.allow) for rule in rules[:MOST_INSIDE]),
        exceptions=len(endpoint.deny_rules or ()),
    )


def _said(match: msgspec.Struct) -> dict[str, Any]:
    """Return what a rule says, without what it leaves open."""
    plain = type(match)() if isinstance(match, Match) else None
    return {
        name: msgspec.to_builtins(value)
        for name in match.__struct_fields__
        if (value := getattr(match, name)) not in (None, (), "", {})
        and (plain is None or value != getattr(plain, name))
    }


def _classed(action: Action) -> Classed:
    return Classed(action.class_, {name: value for name, value in _said(action.match).items() if value != "/**"})


def _server(server: McpServer) -> Server:
    tools = {
        name: {"class": tool.class_, "arguments": list(tool.args)[:MOST_INSIDE]}
        for name, tool in list(server.tools.items())[:MOST_INSIDE]
    }
    return Server(transport=server.transport, tools=tools, url=server.url)


def as_text(view: PolicyView) -> str:
    """Return the view in a few lines, for people and for small contexts."""
    return "\n".join(_lines(view)) + "\n"


def _lines(view: PolicyView) -> Iterator[str]:
    yield f"policy {view.policy_digest[:16]} revision {view.revision} of blueprint {view.blueprint} {view.version}"
    yield "you may call:" if view.hosts or view.models else "you may call nothing"
    for where in view.hosts:
        ports = ",".join(str(port) for port in where.ports)
        rules = "; ".join(_rule(rule) for rule in where.allow) or where.access or "anything"
        less = f", with {where.exceptions} exceptions" if where.exceptions else ""
        place = f"{where.scheme}://{where.host or '(addresses)'}:{ports}{where.path}"
        yield f"  {place}  {rules}{less}  by {' '.join(where.programs)}"
    for route in view.models:
        yield f"  https://{route.host}:{route.port}  models {' '.join(route.models)}"
    for classed in view.classes:
        yield f"class {classed.class_}: {_rule(classed.match)}"
    yield f"otherwise: {view.otherwise}"
    for name, server in view.mcp.items():
        tools = ", ".join(f"{tool} ({told['class']})" for tool, told in server.tools.items()) or "no tool"
        yield f"mcp server {name} ({server.transport}): {tools}"
    yield f"files: read {' '.join(view.files.read_only) or 'nothing'}; write {' '.join(view.files.read_write) or 'nothing else'}"
    if view.budgets:
        yield f"budgets: {' '.join(view.budgets)}"
    if view.limits:
        yield f"limits: {' '.join(view.limits)}"
    if view.truncated:
        yield "the policy is longer than this"
    yield view.ask


def _rule(rule: Mapping[str, Any]) -> str:
    head = [str(rule[name]) for name in ("method", "host", "path") if isinstance(rule.get(name), str)]
    rest = [f"{name}={msgspec.json.encode(value).decode()}" for name, value in rule.items() if str(value) not in head]
    return " ".join([*head, *rest]) or "anything"
