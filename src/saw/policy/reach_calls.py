"""Compare two bundles call by call: every cell of the calls there are, decided by both matchers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from saw.policy.actions import reads, units
from saw.policy.casefile import Call
from saw.policy.mcp_http import CALL_TOOL
from saw.policy.model import CALL_PROTOCOLS, AnyOf, Decision, Match, Request
from saw.policy.reach_automata import Budget, TooLarge
from saw.policy.reach_bodies import call_words
from saw.policy.reach_item import RISKS, Item, Region, Risk, Witness
from saw.policy.reach_side import REFUSED, REVIEW, STAGED, Outcome, Side
from saw.policy.reach_space import OTHER, STANDARD, Cell, Key, Space

NEW_CALL = "call"
REVIEW_LIFTED = "review-lifted"
UNKNOWN = "possibly"

_WHY = {
    NEW_CALL: "was refused",
    REVIEW_LIFTED: "needed a person's review and no longer does",
    "class": "was staged and is now carried out at once",
    "review": "was refused and may now be asked of a reviewer",
    "reviewers": "is reviewed by others, by fewer, or may wait longer",
    "credential": "was sent without this credential",
    "upstream": "went to another model service",
    "addresses": "could not be dialled at private addresses",
    UNKNOWN: "the two bundles differ here, and an exact answer is out of bounds",
}
_WHY_LOST = {
    NEW_CALL: "is refused now",
    REVIEW_LIFTED: "needs a person's review now",
    "class": "is staged now",
    "review": "may no longer be asked of a reviewer",
    "reviewers": "was reviewed by others, by fewer, or could wait longer",
    "credential": "is sent without this credential now",
    "upstream": "goes to another model service now",
    "addresses": "is no longer dialled at private addresses",
}

_SCHEMES = {"https": "wss", "http": "ws"}


def gains(old: Outcome, new: Outcome) -> str | None:
    """Return in which way ``new`` gives more than ``old``, or ``None``."""
    if new.level >= STAGED:
        if old.level < STAGED:
            return REVIEW_LIFTED if old.level == REVIEW else NEW_CALL
        if new.upstream != old.upstream:
            return "upstream"
        if new.secret is not None and new.secret.beyond(old.secret):
            return "credential"
        return "class" if new.level > old.level else None
    if new.level == REVIEW:
        if old.level == REFUSED:
            return "review"
        if old.level == REVIEW and new.review != old.review:
            return "reviewers"
    return None


class Calls(NamedTuple):
    """What was found: items, and the cells (or prefixes of their keys) in which something was gained."""

    gained: tuple[Item, ...]
    lost: tuple[Item, ...]
    cells: frozenset[Key]


class _Group:
    """The cells of one rule that were gained in one way."""

    def __init__(self) -> None:
        self.methods: set[str] = set()
        self.operations: set[str] = set()
        self.best: tuple[tuple[int, int, int], Cell, Decision, Decision] | None = None

    def add(self, cell: Cell, before: Decision, after: Decision) -> None:
        """Take one more cell; the shortest call is kept as the example."""
        self.methods.add(str(cell.key[4]))
        if cell.push is not None:
            self.operations.add(cell.push.operation)
        request = cell.request
        rank = (len(request.ancestors), len(request.path), 0 if request.reads else 1)
        if self.best is None or rank < self.best[0]:
            self.best = (rank, cell, before, after)


class CallComparison:
    """The comparison of the calls of two bundles."""

    def __init__(self, old: Side, new: Side, budget: Budget) -> None:
        self.old = old
        self.new = new
        self.space = Space((old, new), budget)
        self._upstreams = {way.upstream for route in old.governance.inference.routes for way in route.ways}
        self._gained: dict[tuple[object, ...], _Group] = {}
        self._lost: dict[tuple[object, ...], _Group] = {}
        self._unknown: dict[tuple[str, ...], Item] = {}
        self._cells: set[Key] = set()

    def run(self) -> Calls:
        """Return everything that was gained and lost."""
        if (self.old.policy, self.old.governance) != (self.new.policy, self.new.governance):
            for port in self.space.ports():
                try:
                    classes = list(self.space.hosts(port))
                except TooLarge:
                    self._give_up((port,), "", port, "")
                    continue
                for key, host in classes:
                    self._host((port, key), host, port)
        gained = [_item(group, key, self.new, lost=False) for key, group in self._gained.items()]
        lost = [_item(group, key, self.old, lost=True) for key, group in self._lost.items()]
        return Calls((*gained, *self._unknown.values()), tuple(lost), frozenset(self._cells))

    def _host(self, prefix: Key, host: str, port: int) -> None:
        if self._alike(host, port):
            return
        try:
            paths = self.space.paths(host, port)
        except TooLarge:
            self._give_up(prefix, host, port, "")
            return
        address = (host, port)
        same = (address in self.old.plain) == (address in self.new.plain)
        old, new = self.old.addresses(host, port), self.new.addresses(host, port)
        wider, narrower = new.beyond(old), old.beyond(new)
        for key, path in paths:
            try:
                self.space.look(host, port)
                before, after = self.space.views(host, port, path)
                if same and not wider and not narrower and before.same_as(after):
                    continue
                for cell in self.space.cells((*prefix, key), host, port, path):
                    self._cell(cell, wider, narrower)
            except TooLarge:
                self._give_up((*prefix, key), host, port, path)

    def _alike(self, host: str, port: int) -> bool:
        """Return whether nothing that bears on ``host`` differs, without looking at paths."""

        def all_of(side: Side) -> object:
            candidates = [
                (msgspec.structs.replace(p.endpoint, port=None, ports=(), allowed_ips=()), p.binaries)
                for p in side.candidates(host, port)
            ]
            credentials = [(glob, c.methods, side.secret_of(c)) for glob, c in side.credentials(host, port)]
            route = side.routes.get((host, port))
            service = route and ([side.secret(way.credential) for way in route.ways], side.passing(route))
            actions = [action for _, action in side.actions(host, port)]
            tools = {path: server.tools for path, server in side.servers(host, port).items()}
            plain = (host, port) in side.plain
            return candidates, credentials, service, actions, plain, side.addresses(host, port), tools

        return all_of(self.old) == all_of(self.new)

    def _cell(self, cell: Cell, wider: bool, narrower: bool) -> None:
        before, old = self.old.decide(cell.request)
        after, new = self.new.decide(cell.request)
        both = old.level >= STAGED and new.level >= STAGED
        kind = gains(old, new) or ("addresses" if both and wider else None)
        if kind is not None:
            self._cells.add(cell.key)
            risk = self._risk(kind, cell, new, after)
            key = (kind, risk, *_rule_of(self.new, cell, after), cell.argument)
            self._gained.setdefault(key, _Group()).add(cell, before, after)
        kind = gains(new, old) or ("addresses" if both and narrower else None)
        if kind is not None:
            key = (kind, None, *_rule_of(self.old, cell, before), cell.argument)
            self._lost.setdefault(key, _Group()).add(cell, before, after)

    def _risk(self, kind: str, cell: Cell, new: Outcome, after: Decision) -> Risk:
        if kind in {REVIEW_LIFTED, "credential", "upstream"}:
            return "critical"
        if kind in {"class", "addresses"}:
            return "high"
        if kind in {"review", "reviewers"}:
            return "medium"
        request = cell.request
        known = self.old.reaches(request.host, request.port)
        if after.inference is not None:
            return "critical" if new.upstream not in self._upstreams else "medium"
        if not known:
            return "critical" if new.secret is not None else "high"
        fetch = after.action_class == "auto" and request.path.endswith("/git-upload-pack")
        read = request.reads or fetch
        if after.protocol:
            read = all(reads(after.protocol, unit) for unit in units(after.protocol, after.operations))
        return "medium" if read and request.scheme == "https" and "audit" not in after.rule else "high"

    def _give_up(self, prefix: Key, host: str, port: int, path: str) -> None:
        """Report everything below ``prefix`` as possibly gained."""
        self._cells.add(prefix)
        candidates = self.new.candidates(host, port) if host else ()
        rules = tuple(sorted({f"{p.key}.endpoints[{p.position}]" for p in candidates}))
        hosts = " ".join(sorted({p.endpoint.host for p in candidates})) or host or "any host"
        what = f"calls to {hosts}:{port}" + (f" below {path}" if path else "")
        region = Region(host=hosts, port=port, path=path)
        name = (hosts, str(port), path)
        self._unknown[name] = Item("call", UNKNOWN, what, _WHY[UNKNOWN], region, "critical", rules, exact=False)

    def covers(self, request: Request, cells: frozenset[Key]) -> bool:
        """Return whether ``request`` lies in one of ``cells``."""
        if any(len(key) == 1 and key[0] == request.port for key in cells):
            return True
        try:
            found = self.space.locate(request)
        except TooLarge:
            return True
        return any(key[:size] in cells for key in found for size in (1, 2, 3, len(key)))


def _rule_of(side: Side, cell: Cell, decision: Decision) -> tuple[object, ...]:
    """Return what tells one rule's calls from another's: rule, action rule, class, credential, scheme, port, host."""
    rule = decision.rule.partition("; ")[0]
    if decision.inference is not None:
        label = ""
    elif decision.allowed:
        label = side.action_label(cell.request, decision.canonical_path.partition("?")[0])
    else:
        label = decision.rule.partition("; ")[2]
    host = cell.request.host if decision.inference else ""
    if decision.way:
        host = f"{host} {decision.way}"
    return (
        decision.policy,
        rule,
        label,
        decision.action_class,
        decision.credential or "",
        cell.request.scheme,
        cell.request.port,
        host,
    )


def _item(group: _Group, key: tuple[object, ...], side: Side, *, lost: bool) -> Item:
    assert group.best is not None  # noqa: S101 - a group is made with its first cell
    _, cell, before, after = group.best
    decision = before if lost else after
    kind, risk, policy, rule, label = (part if part is None else str(part) for part in key[:5])
    if decision.inference is not None:
        route = side.routes[cell.request.host, cell.request.port].ways[decision.way]
        region = Region(
            host=route.alias,
            port=route.port,
            scheme=cell.request.scheme,
            methods=_methods(group.methods),
            models=(*route.aliases, *route.models),
            upstream=route.upstream,
            credential=decision.credential or "",
        )
        region = _with_secret(region, side, decision)
        rules: tuple[str, ...] = (f"inference.routes {route.alias}",)
    else:
        region = _region(group, side, cell, (str(policy), str(rule), str(label)))
        region = msgspec.structs.replace(
            region,
            action_class=decision.action_class,
            credential=decision.credential or "",
            tool=_tool(decision) if cell.argument else "",
            argument=cell.argument,
        )
        region = _with_secret(region, side, decision)
        rules = (f"network_policies.{policy}.{rule}", str(label))
    found: Risk | None = next((known for known in RISKS if known == risk), None)
    why = (_WHY_LOST if lost else _WHY)[str(kind)]
    witness = Witness(call=as_call(cell), old=verdict(before), new=verdict(after))
    return Item("call", str(kind), _what(region), why, region, found, tuple(filter(None, rules)), True, witness)


def _with_secret(region: Region, side: Side, decision: Decision) -> Region:
    """Return ``region`` with where the secret of its calls lies, and how it becomes what is sent."""
    secret = side.secret(decision.credential)
    return region if secret is None else msgspec.structs.replace(region, ref=secret.ref, provider=secret.provider)


def _tool(decision: Decision) -> str:
    """Return the tool that the one message of a representative calls."""
    return next((asked.name for asked in decision.operations if asked.kind == CALL_TOOL), "")


def _region(group: _Group, side: Side, cell: Cell, names: tuple[str, str, str]) -> Region:
    policy, rule, label = names
    network = side.policy.network_policies[policy]
    index = int(rule.partition("[")[2].partition("]")[0])
    endpoint = network.endpoints[index]
    match = Match(path=endpoint.path or "/**")
    calls: tuple[str, ...] = ()
    if ".rules[" in rule and endpoint.rules is not None:
        match = endpoint.rules[int(rule.rpartition("[")[2].rstrip("]"))].allow
    if endpoint.protocol in CALL_PROTOCOLS:
        calls = call_words(endpoint, match if ".rules[" in rule else None, rule.partition("].")[2])
        match = Match(path=endpoint.path or "/**")
    action = side.action_of(label)
    git = action.match.git if action is not None else None
    pushes = cell.push is not None
    return Region(
        host=endpoint.host.lower(),
        port=cell.request.port,
        scheme=cell.request.scheme,
        methods=_methods(group.methods),
        path=match.path,
        query=tuple(_query(match)),
        binaries=tuple(binary.path for binary in network.binaries),
        refs=((git.ref if git else "**"),) if pushes else (),
        operations=tuple(sorted(group.operations)) if pushes else (),
        calls=calls,
    )


def _query(match: Match) -> Iterator[str]:
    for key, value in sorted(match.query.items()):
        yield f"{key}={'|'.join(value.any) if isinstance(value, AnyOf) else value}"


def _methods(found: Iterable[str]) -> tuple[str, ...]:
    methods = set(found)
    if OTHER in methods and methods.issuperset(STANDARD):
        return ("any method",)
    return tuple(sorted(methods - {OTHER})) + (("any other method",) if OTHER in methods else ())


def _what(region: Region) -> str:
    text = f"{', '.join(region.methods)} {region.scheme}://{region.host}:{region.port}{region.path}"
    if region.query:
        text += f"?{'&'.join(region.query)}"
    if region.calls:
        text += f" asking for {', '.join(region.calls)}"
    if region.argument:
        text += f", tool {region.tool} with other values of {region.argument}"
    if region.models:
        text += f" models {', '.join(region.models)} at {region.upstream}"
    if region.refs:
        text += f" ({', '.join(region.operations)} of {', '.join(region.refs)})"
    if region.credential:
        text += f" with credential {region.credential} ({', '.join(filter(None, (region.ref, region.provider)))})"
    return text


def as_call(cell: Cell) -> Call:
    """Return the representative of ``cell`` in the form of ``tests.yaml``."""
    request = cell.request
    return Call(
        url=f"{_SCHEMES[request.scheme] if request.upgrade else request.scheme}://{request.host}:{request.port}{request.path}",
        method=request.method,
        message=request.message,
        binary=request.binary,
        ancestors=request.ancestors,
        headers=dict(request.headers),
        body=request.body.decode() if request.body is not None and cell.push is None else None,
        push=(cell.push,) if cell.push is not None else (),
    )


def verdict(decision: Decision) -> str:
    """Return a decision in few words: class and credential when allowed, else the reason."""
    if not decision.allowed:
        return f"deny: {decision.reason}"
    return f"allow: {decision.action_class}" + (f" with {decision.credential}" if decision.credential else "")


__all__ = ["CallComparison", "Calls", "as_call", "gains", "verdict"]
