"""Prove invariants over everything a bundle allows, or show a call that breaks them.

Every call-like invariant is put to every cell of :mod:`saw.policy.reach_space`, cut further by the invariant's own globs, so
that "holds" speaks of all calls there are. What cannot be told in bounds is ``unproven``, which is no "holds".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec

from saw.policy import globs
from saw.policy.actions import UPLOAD_PACK, git_service, reads, units
from saw.policy.addresses import _PRIVATE_4, _PRIVATE_6, blocked_networks, classify
from saw.policy.data_classes import data_fault
from saw.policy.loader import Bundle
from saw.policy.mcp import decide_tool
from saw.policy.mcp_http import CALL_TOOL
from saw.policy.model import Decision
from saw.policy.providers import fits
from saw.policy.reach_arguments import NOTHING, find
from saw.policy.reach_automata import Budget, TooLarge
from saw.policy.reach_budgets import budget_fault
from saw.policy.reach_calls import as_call, verdict
from saw.policy.reach_calls_arguments import sample
from saw.policy.reach_diff import diff_bundles
from saw.policy.reach_invariants import Invariant, Invariants, split_address
from saw.policy.reach_item import Witness
from saw.policy.reach_settings import Access, directories, inside, permits
from saw.policy.reach_side import AUTO, REFUSED, REVIEW, STAGED, Addresses, Side
from saw.policy.reach_space import Cell, Extra, Space
from saw.policy.reach_tools import arguments_text, level
from saw.policy.tool_rules import Tool

Verdict = Literal["holds", "broken", "unproven"]
CALL_KINDS = frozenset(
    {"never_reach", "no_write_without_review", "credential_only_to", "push_never", "push_needs_review", "tool_never"}
)


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """The verdict on one invariant; a broken one comes with a counter-example and the rules that allow it."""

    id: str
    kind: str
    verdict: Verdict
    detail: str
    why: str = ""
    rules: tuple[str, ...] = ()
    counter_example: Witness | None = None

    @property
    def ok(self) -> bool:
        """Return whether the invariant is proven to hold."""
        return self.verdict == "holds"


class _Case(NamedTuple):
    """One cell, decided."""

    side: Side
    cell: Cell
    decision: Decision
    level: int

    @property
    def path(self) -> str:
        """Return the canonical path, without the query."""
        return self.cell.request.path.partition("?")[0]


def _on_host(invariant: Invariant, host: str, port: int) -> bool:
    """Return whether the ``hosts`` and ``ports`` of an invariant take in this address; none written takes in all."""
    if invariant.ports and port not in invariant.ports:
        return False
    if invariant.kind == "credential_only_to" or not invariant.hosts:
        return True
    return any(globs.host_glob(glob).fullmatch(host) for glob in invariant.hosts)


def _is_write(case: _Case) -> bool:
    request = case.cell.request
    protocol = case.decision.protocol
    if protocol:
        return not all(reads(protocol, unit) for unit in units(protocol, case.decision.operations))
    if request.reads or case.cell.key[7] == "probe":
        return False
    if git_service(request.method, case.path) != UPLOAD_PACK:
        return True
    rule = case.side.action_label(request, case.path)
    action = case.side.action_of(rule)
    return action is not None and action.match.git is None


def _network_hit(invariant: Invariant, case: _Case) -> str | None:
    """Return an address of the invariant's networks that the gateway may dial for this call."""
    host, port = case.cell.request.host, case.cell.request.port
    route = case.side.routes.get((host, port))
    name = route.ways[case.decision.way].upstream_address[0] if route is not None else host
    opened = case.side.addresses(host, port)
    for text in invariant.networks:
        network = ip_network(text)
        for address in _samples(network, opened):
            if _literal(name) not in {None, address}:
                continue
            reach = classify(address)
            parsed = ip_address(address)
            private = any(parsed in n for n in opened.networks) if opened.networks else opened.private
            if reach == "public" or (reach == "private" and private):
                return address
        literal = _literal(name)
        if literal is not None and ip_address(literal) in network and classify(literal) != "blocked":
            return literal
    return None


def _literal(name: str) -> str | None:
    try:
        return str(ip_address(name.strip("[]")))
    except ValueError:
        return None


def _samples(network: IPv4Network | IPv6Network, opened: Addresses) -> list[str]:
    """Return addresses of ``network`` on both sides of every edge at which the classification may change."""
    edges = {int(network.network_address), int(network.broadcast_address)}
    for other in (*_PRIVATE_4, *_PRIVATE_6, *blocked_networks(), *opened.networks):
        if other.version == network.version:
            first, last = int(other.network_address), int(other.broadcast_address)
            edges |= {first - 1, first, last, last + 1}
    kind = type(network.network_address)
    # An IPv6 form that carries an IPv4 address takes its class from that; a public and a private one stand for all.
    carried = (0x08080808, 0x0A000001, 0x0808_0808 << 80, 0x0A00_0001 << 80) if network.version == 6 else ()
    low, high = int(network.network_address), int(network.broadcast_address)
    edges |= {low | value for value in carried}
    return [str(kind(edge)) for edge in sorted(edges) if low <= edge <= high]


def _breaks(invariant: Invariant, case: _Case) -> str | None:
    """Return what is wrong with a call under ``invariant``, or ``None``."""
    request = case.cell.request
    if case.level == REFUSED or not _on_host(invariant, request.host, request.port):
        return None
    if invariant.kind == "never_reach":
        if not invariant.networks:
            return f"{request.host}:{request.port} can be reached"
        address = _network_hit(invariant, case)
        return None if address is None else f"{request.host}:{request.port} may be dialled at {address}"
    if invariant.kind == "no_write_without_review":
        if invariant.paths and not any(globs.path_glob(glob).match(case.path) for glob in invariant.paths):
            return None
        least = AUTO if invariant.allow_staged else STAGED
        return "a write passes without review" if case.level >= least and _is_write(case) else None
    if invariant.kind == "credential_only_to":
        return _strays(invariant, case)
    if invariant.kind == "tool_never":
        return _tool_called(invariant, case)
    push = case.cell.push
    if push is None or (invariant.operations and push.operation not in invariant.operations):
        return None
    if not any(globs.ref_glob(glob).match("/" + push.ref) for glob in invariant.refs):
        return None
    if invariant.kind == "push_needs_review":
        return f"{push.operation} of {push.ref} passes without review" if case.level >= STAGED else None
    how = "can be asked of a reviewer" if case.level == REVIEW else "passes"
    return f"{push.operation} of {push.ref} {how}"


def _tool_called(invariant: Invariant, case: _Case) -> str | None:
    """Return which forbidden tool of an MCP server over HTTP is called.

    Where no server of ``governance.yaml`` says what its arguments may be, they may be the forbidden ones. Raises
    :class:`TooLarge` where it cannot be told which arguments pass.
    """
    request = case.cell.request
    if case.decision.protocol != "mcp":
        return None
    server = case.side.matcher.mcp_server(request.host, request.port, case.path)
    named = globs.flat_glob(invariant.server)
    if not named.fullmatch(request.host) and (server is None or not named.fullmatch(server.name)):
        return None
    called = (asked.name for asked in case.decision.operations if asked.kind == CALL_TOOL)
    tool = next((name for name in called if globs.flat_glob(invariant.tool).fullmatch(name)), None)
    if tool is None:
        return None
    detail = f"{tool} of {request.host} can be called"
    if server is None or not invariant.args:
        return detail
    arguments = _tool_arguments(server.rules.tools[tool], invariant, Budget(1_000_000))
    return None if arguments is None else f"{detail} with {arguments_text(arguments)}"


def _example(invariant: Invariant, case: _Case) -> Cell:
    """Return the call that breaks ``invariant``: that of ``case``, with the forbidden arguments where there are such."""
    request = case.cell.request
    server = case.side.matcher.mcp_server(request.host, request.port, case.path)
    if invariant.kind != "tool_never" or not invariant.args or server is None or request.body is None:
        return case.cell
    body = json.loads(request.body)
    rule = server.rules.tools[body["params"]["name"]]
    body["params"]["arguments"] = _tool_arguments(rule, invariant, Budget(1_000_000))
    return case.cell._replace(request=msgspec.structs.replace(request, body=json.dumps(body).encode()))


def _strays(invariant: Invariant, case: _Case) -> str | None:
    request = case.cell.request
    identifier = case.decision.credential
    host, port = request.host, request.port
    if case.decision.inference is not None:
        host, port = case.side.routes[host, port].ways[case.decision.way].upstream_address
    elif case.level == REVIEW:
        at = case.side.credentials(host, port)
        identifier = next(
            (c.id for glob, c in at if globs.path_glob(glob).match(case.path) and fits(c.methods, request.method)), None
        )
    if identifier is None or not globs.flat_glob(invariant.credential).fullmatch(identifier):
        return None
    return _away(invariant, identifier, host, port, case.path)


def _away(invariant: Invariant, identifier: str, host: str, port: int, path: str) -> str | None:
    """Return what is wrong with sending the credential ``identifier`` there, or ``None``."""
    for glob, wanted in map(split_address, invariant.hosts):
        if globs.host_glob(glob).fullmatch(host) and wanted in {None, port}:
            if not invariant.paths or any(globs.path_glob(p).match(path) for p in invariant.paths):
                return None
            return f"{identifier} goes to {host}:{port} outside {', '.join(invariant.paths)}"
    return f"{identifier} goes to {host}:{port}"


def _handed_in(bundle: Bundle, invariant: Invariant) -> Finding | None:
    """Return the finding on a secret that is handed in for a token elsewhere than the invariant says."""
    for index, credential in enumerate(bundle.governance.credentials):
        token = credential.oauth2
        if token is None or not globs.flat_glob(invariant.credential).fullmatch(credential.id):
            continue
        fault = _away(invariant, credential.id, *token.address, urlsplit(token.token_url).path or "/")
        if fault is not None:
            return _finding(invariant, "broken", f"{fault} for a token", (f"credentials[{index}].oauth2.token_url",))
    return None


class _Calls:
    """The walk over all calls for all invariants about calls."""

    def __init__(self, bundle: Bundle, invariants: list[Invariant]) -> None:
        self.side = Side(bundle)
        self.open = {invariant.id: invariant for invariant in invariants}
        self.found: dict[str, Finding] = {}
        extra = Extra(
            hosts=tuple(sorted({split_address(host)[0] for i in invariants for host in i.hosts})),
            paths=tuple(sorted({path for i in invariants for path in i.paths})),
            refs=tuple(sorted({ref for i in invariants for ref in i.refs})),
            tools=tuple(sorted({i.tool for i in invariants if i.tool})),
        )
        self.space = Space((self.side,), Budget(), extra)

    def run(self) -> dict[str, Finding]:
        for port in self.space.ports() if self.open else ():
            try:
                classes = list(self.space.hosts(port))
            except TooLarge:
                self._give_up([i for i in self.open.values() if not i.ports or port in i.ports], f"port {port}")
                continue
            for key, host in classes:
                self._host((port, key), host, port)
        return self.found

    def _host(self, prefix: tuple[object, ...], host: str, port: int) -> None:
        asked = [invariant for invariant in self.open.values() if _on_host(invariant, host, port)]
        if not asked:
            return
        try:
            for key, path in self.space.paths(host, port):
                self.space.look(host, port)
                for cell in self.space.cells((*prefix, key), host, port, path):
                    decision, outcome = self.side.decide(cell.request)
                    self._ask([i for i in asked if i.id in self.open], _Case(self.side, cell, decision, outcome.level))
        except TooLarge:
            self._give_up([i for i in asked if i.id in self.open], f"{host}:{port}")

    def _ask(self, asked: list[Invariant], case: _Case) -> None:
        for invariant in asked:
            detail = _breaks(invariant, case)
            if detail is not None:
                example = Witness(call=as_call(_example(invariant, case)), new=verdict(case.decision))
                where = f"{case.decision.policy}.{case.decision.rule}"
                rules = tuple(filter(None, (where, self._action(case))))
                del self.open[invariant.id]
                self.found[invariant.id] = _finding(invariant, "broken", detail, rules, example)

    def _action(self, case: _Case) -> str:
        if case.decision.inference is not None or not case.decision.allowed:
            return ""
        return self.side.action_label(case.cell.request, case.path)

    def _give_up(self, invariants: list[Invariant], where: str) -> None:
        for invariant in invariants:
            detail = f"the rules for {where} are too many to look through in bounds"
            self.found.setdefault(invariant.id, _finding(invariant, "unproven", detail))


def _finding(
    invariant: Invariant, verdict_: Verdict, detail: str, rules: tuple[str, ...] = (), example: Witness | None = None
) -> Finding:
    return Finding(invariant.id, invariant.kind, verdict_, detail, invariant.why, rules, example)


def _disk(bundle: Bundle, invariant: Invariant) -> Finding:
    access: Access = "read" if invariant.kind == "never_read" else "write"
    opened = directories(bundle.policy, access)
    for directory in invariant.directories:
        below = [path for path in opened if inside(path, directory)]
        if below or permits(bundle.policy, access, directory):
            file = below[0] if below else directory
            detail = f"the sandbox may {access} {file}"
            rules = tuple(path for path in opened if inside(file, path))
            return _finding(invariant, "broken", detail, rules, Witness(file=file, new=f"allow: {access}"))
    return _finding(invariant, "holds", f"no directory opens {', '.join(invariant.directories)} for {access}")


def _tool_arguments(tool: Tool, invariant: Invariant, budget: Budget) -> dict[str, object] | None:
    """Return arguments that ``tool`` accepts and that are what the invariant forbids, or ``None``."""
    arguments = sample((tool,), budget)
    for name, forbidden in sorted(invariant.args.items()):
        rule = tool.args.get(name)
        value = NOTHING if rule is None or arguments is None else find((rule, forbidden), (), budget)
        if arguments is None or value is NOTHING:
            return None
        arguments[name] = value
    return arguments


def _tools(bundle: Bundle, invariant: Invariant) -> Finding:
    budget = Budget(1_000_000)
    for server, rules in sorted(bundle.governance.mcp.servers.items()):
        if rules.transport != "stdio" or not globs.flat_glob(invariant.server).fullmatch(server):
            continue
        for name, tool in sorted(rules.tools.items()):
            if not globs.flat_glob(invariant.tool).fullmatch(name) or level(tool) == REFUSED:
                continue
            try:
                arguments = _tool_arguments(tool, invariant, budget)
            except TooLarge:
                return _finding(invariant, "unproven", f"the arguments of {server}.{name} are out of bounds")
            if arguments is not None:
                decision = decide_tool(bundle.governance, server, name, arguments)
                example = Witness(server=server, tool=name, arguments=arguments_text(arguments), new=verdict(decision))
                where = (f"mcp.servers.{server}.tools.{name}",)
                return _finding(invariant, "broken", f"{server}.{name} can be called", where, example)
    return _finding(invariant, "holds", "no such tool call is allowed")


def _budgets(bundle: Bundle, invariant: Invariant) -> Finding:
    limit, period = invariant.limit, invariant.period
    for index, route in enumerate(bundle.governance.inference.routes):
        if invariant.hosts and not any(
            globs.host_glob(glob).fullmatch(route.alias.lower()) for glob in invariant.hosts
        ):
            continue
        fault = (
            "no limit is written"
            if limit is None or not period
            else budget_fault(bundle.governance, route, limit, period)
        )
        if fault is not None:
            return _finding(invariant, "broken", fault, (f"inference.routes[{index}]",))
    return _finding(invariant, "holds", "every route draws on a budget that stops within the limit")


def _data(bundle: Bundle, invariant: Invariant) -> Finding:
    fault = data_fault(
        bundle.policy, bundle.governance, invariant.data_class, [host.lower() for host in invariant.hosts]
    )
    if fault is not None:
        return _finding(invariant, "broken", fault[0], (fault[1],))
    return _finding(invariant, "holds", "no such data is handled, or every destination lies within")


def _subset(bundle: Bundle, invariant: Invariant, parents: Mapping[str, Bundle]) -> Finding:
    parent = parents.get(invariant.parent)
    if parent is None:
        return _finding(invariant, "unproven", f"no parent bundle {invariant.parent} was given")
    diff = diff_bundles(parent, bundle)
    if not diff.gained:
        return _finding(invariant, "holds", f"nothing is allowed beyond {diff.old}")
    first = next((item for item in diff.gained if item.exact), diff.gained[0])
    detail = f"{len(diff.gained)} beyond {diff.old}: {first.what}"
    return _finding(invariant, "broken" if first.exact else "unproven", detail, first.rules, first.witness)


def prove(bundle: Bundle, invariants: Invariants, parents: Mapping[str, Bundle] | None = None) -> list[Finding]:
    """Return a finding for each of ``invariants``, in their order.

    ``parents`` holds the bundles that ``subset_of`` names by its ``parent`` field; an empty name is the default parent.
    """
    calls = _Calls(bundle, [i for i in invariants.invariants if i.kind in CALL_KINDS]).run()
    findings: list[Finding] = []
    for invariant in invariants.invariants:
        if invariant.kind == "tool_never":
            findings.append(calls.get(invariant.id) or _tools(bundle, invariant))
        elif invariant.kind == "credential_only_to" and (handed_in := _handed_in(bundle, invariant)) is not None:
            findings.append(calls.get(invariant.id) or handed_in)
        elif invariant.kind in CALL_KINDS:
            holds = _finding(invariant, "holds", "no call that the bundle allows breaks it")
            findings.append(calls.get(invariant.id, holds))
        elif invariant.kind in {"never_read", "never_write"}:
            findings.append(_disk(bundle, invariant))
        elif invariant.kind == "inference_within_budget":
            findings.append(_budgets(bundle, invariant))
        elif invariant.kind == "data_only_to":
            findings.append(_data(bundle, invariant))
        else:
            findings.append(_subset(bundle, invariant, parents or {}))
    return findings
