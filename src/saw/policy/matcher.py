"""The one matcher of both rings: a compiled policy that decides calls.

Order of a decision: canonical form, blocked destinations, endpoint by host and port, binary, most specific endpoint, deny
rules, allow rules, action class, credential. What nothing allows is denied. A matcher never changes; a new policy is a new
matcher.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network

import msgspec

from saw.policy import databases, globs, grpc_calls, websocket
from saw.policy.actions import ActionTable, Classified, ReviewAsked, passes_by_path
from saw.policy.address_rules import AddressRules, Call, Entry, Judgement, parse_query
from saw.policy.addresses import is_blocked_host
from saw.policy.checks_governance import parse_address
from saw.policy.errors import NotCanonical, PolicyError
from saw.policy.globset import GlobSet, path_segments
from saw.policy.governance import Credential, Governance
from saw.policy.grpc_calls import is_grpc
from saw.policy.inference import CompiledRoute
from saw.policy.loader import cross_problems
from saw.policy.mcp_servers import HttpServer, http_servers
from saw.policy.model import (
    ALLOW,
    CALL_PROTOCOLS,
    DENY,
    Decision,
    EndpointAddress,
    Operation,
    Policy,
    Request,
)
from saw.policy.paths import canonicalise_path
from saw.policy.providers import fits

__all__ = ["Matcher", "NotCanonical", "canonicalise_path", "parse_query"]

_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9._-]{0,251}[a-z0-9_-])?\Z")
_METHOD = re.compile(r"[A-Z][A-Z-]{0,31}\Z")
_NEVER = frozenset({"TRACE", "TRACK", "CONNECT", databases.METHOD})
_OVERRIDES = frozenset(
    {
        "x-http-method-override",
        "x-http-method",
        "x-method-override",
        "x-original-url",
        "x-rewrite-url",
        "x-forwarded-path",
    }
)
_NO_OPERATIONS: tuple[Operation, ...] = ()
_REASONS = {"review": "review_required", "deny": "action_denied"}


def _missing(protocol: str, asked: Operation | None) -> dict[str, object]:
    """Return the operation in the words of a rule that would allow it."""
    if asked is None:
        return {}
    if protocol == "graphql":
        return {"operation_type": asked.kind, "operation_name": asked.name, "fields": list(asked.fields)}
    return {"rpc_method": asked.kind, **({"tool": asked.name} if asked.name else {})}


class _Credentials:
    """The credentials of one host and port."""

    __slots__ = ("_held", "_paths")

    def __init__(self, entries: list[tuple[str, Credential]]) -> None:
        self._paths = GlobSet([path_segments(glob) for glob, _ in entries])
        self._held = dict(zip(self._paths.accepts, (credential for _, credential in entries), strict=True))

    def at(self, path: str, method: str) -> str | None:
        """Return the credential for a call of ``method`` to ``path``, or ``None``."""
        found = self._paths.walk(self._paths.start, path_segments(path)) & self._paths.accepting
        while found:
            credential = self._held[(found & -found).bit_length() - 1]
            if fits(credential.methods, method):
                return credential.id
            found &= found - 1
        return None


class Matcher:
    """A compiled policy. Immutable; safe to share between threads.

    ``opens_streams``: it has endpoints for WebSockets, ``opens_sessions``: for sessions of PostgreSQL. ``sends_unread``: a gRPC
    call may be allowed, which goes on while its client still sends.
    """

    __slots__ = (
        "_actions",
        "_addresses",
        "_credentials",
        "_exact",
        "_names",
        "_plain",
        "_routes",
        "_servers",
        "_suffix",
        "_upstreams",
        "opens_sessions",
        "opens_streams",
        "sends_unread",
    )

    def __init__(self, policy: Policy, governance: Governance) -> None:
        exact: dict[tuple[str, int], list[Entry]] = {}
        suffix: dict[tuple[str, int], list[Entry]] = {}
        everything: set[tuple[str, int]] = set()
        for key, rule in policy.network_policies.items():
            for index, endpoint in enumerate(rule.endpoints):
                entry = Entry.of(key, index, rule)
                host = endpoint.host.lower()
                for port in dict.fromkeys(endpoint.all_ports):
                    everything.add((host, port))
                    if globs.is_exact(host):
                        exact.setdefault((host, port), []).append(entry)
                    else:
                        suffix.setdefault((globs.literal_tail(host), port), []).append(entry)
        self._exact = {address: AddressRules(found, with_host=False) for address, found in exact.items()}
        self._suffix = {address: AddressRules(found, with_host=True) for address, found in suffix.items()}
        self._names = frozenset(host for host, _ in exact)
        self.opens_streams = any(entry.streams for entries in (*exact.values(), *suffix.values()) for entry in entries)
        self.opens_sessions = any(e.endpoint.protocol == databases.PROTOCOL for found in exact.values() for e in found)
        posting = {
            entry.endpoint.host.lower()
            for entries in (*exact.values(), *suffix.values())
            for entry in entries
            if entry.takes(grpc_calls.METHOD)
        }
        self.sends_unread = passes_by_path(governance, grpc_calls.METHOD, posting)
        self._plain = frozenset(parse_address(address) for address in governance.plaintext)
        routes = governance.inference.routes
        self._routes = {
            (route.alias.lower(), route.port): CompiledRoute.compile(
                route, governance.paying(route), governance.data_classes
            )
            for route in routes
        }
        self._upstreams = frozenset(way.upstream_address[0].lower() for route in routes for way in route.ways)
        self._actions = ActionTable(governance)
        self._servers = http_servers(policy, governance)
        credentials: dict[tuple[str, int], list[tuple[str, Credential]]] = {}
        for credential in governance.credentials:
            for address in credential.hosts:
                entries = credentials.setdefault(parse_address(address), [])
                entries += [(glob, credential) for glob in credential.paths]
        self._credentials = {address: _Credentials(entries) for address, entries in credentials.items()}
        addresses = {EndpointAddress(host, port, (host, port) not in self._plain) for host, port in everything}
        addresses |= {EndpointAddress(host, port, tls=True) for host, port in self._routes}
        self._addresses = tuple(sorted(addresses))

    @classmethod
    def compile(cls, policy: Policy, governance: Governance) -> Matcher:
        """Return the matcher of a policy; raise :class:`PolicyError` when the two files disagree."""
        problems = cross_problems(policy, governance)
        if problems:
            raise PolicyError(problems)
        return cls(policy, governance)

    def endpoints(self) -> tuple[EndpointAddress, ...]:
        """Return every host (lower case, exact or glob) and port that ring 1 must terminate, inference aliases included."""
        return self._addresses

    def host_declared_exactly(self, host: str) -> bool:
        """Return whether the policy names ``host`` itself, which is what opens private addresses to it."""
        name = host.lower()
        return name in self._upstreams or name in self._names

    def speaks_git(self, host: str) -> bool:
        """Return whether an action rule says that ``host`` speaks Git."""
        return self._actions.is_git_host(host.lower())

    def allowed_ips(self, host: str, port: int) -> tuple[IPv4Network | IPv6Network, ...]:
        """Return the networks that ``allowed_ips`` opens for ``host`` and ``port``."""
        networks: dict[IPv4Network | IPv6Network, None] = {}
        for rules, _ in self._candidates(host.lower(), port):
            for entry in rules.entries:
                if entry.allowed_ips and globs.host_glob(entry.endpoint.host).fullmatch(host.lower()):
                    networks.update(dict.fromkeys(entry.allowed_ips))
        return tuple(networks)

    def _candidates(self, host: str, port: int) -> list[tuple[AddressRules, int]]:
        """Return the rules of this address, those of its exact name first, and the state that the host leads to."""
        exact = self._exact.get((host, port))
        found = [] if exact is None else [(exact, exact.start)]
        if self._suffix:
            globbed = self._suffix.get((globs.literal_tail(host), port))
            if globbed is not None:
                state = globbed.read_host(host)
                if state:
                    found.append((globbed, state))
        return found

    def reviews(self, request: Request) -> tuple[ReviewAsked, ...]:
        """Return who must decide on a call that is refused with ``review_required``; each different answer once.

        ``request`` has the canonical path. Raises :class:`saw.policy.gitproto.PushUnreadable` for a push of another kind.
        """
        decision = self.decide(request, approved=True)
        host, path = request.host.lower(), request.path.partition("?")[0]
        if decision.protocol:
            return self._actions.body_reviews(
                request, host, path, decision.protocol, decision.operations, tools=self._tools_at(request, path)
            )
        return self._actions.reviews(request, host, path)

    def mcp_server(self, host: str, port: int, path: str) -> HttpServer | None:
        """Return the MCP server that is called at this host (lower case), port and canonical path, if policy names its tools."""
        return self._servers.get((host, port, path))

    def mcp_server_named(self, name: str) -> HttpServer | None:
        """Return the MCP server over HTTP with this name."""
        return next((server for server in self._servers.values() if server.name == name), None)

    def _tools_at(self, request: Request, path: str) -> Mapping[str, Classified]:
        server = self._servers.get((request.host.lower(), request.port, path))
        return {} if server is None else server.classes

    def action_rule(self, request: Request, path: str) -> str:
        """Return which action rule classes an allowed call to the canonical ``path``."""
        host = request.host.lower()
        decision = self.decide(request, approved=True)
        if decision.protocol:
            tools = self._tools_at(request, path)
            classed = self._actions.classify_body(
                request, host, path, decision.protocol, decision.operations, tools=tools
            )
            return classed.rule
        return self._actions.classify(request, host, path, fetch_is_read=True).rule

    def decide(self, request: Request, *, approved: bool = False) -> Decision:
        """Return the decision on ``request``. Never raises for what a request contains.

        ``approved``: the people whom the policy names have agreed to it, so class ``review`` is no obstacle; all else is.
        """
        host = request.host.lower()
        method = request.method.upper()
        if not _METHOD.match(method) or method in _NEVER:
            return self._deny(request, "method_or_path_not_allowed", f"the method {method[:40]!r} is never allowed")
        if request.headers and not _OVERRIDES.isdisjoint(request.headers):
            header = min(_OVERRIDES.intersection(request.headers))
            detail = f"the header {header} could make the service act on another method or path"
            return self._deny(request, "method_or_path_not_allowed", detail)
        candidates = self._candidates(host, request.port)
        try:
            target = canonicalise_path(
                request.path, allow_encoded_slash=any(rules.keeps_slash(state) for rules, state in candidates)
            )
        except NotCanonical as error:
            return self._deny(request, "not_canonical", error.message)
        route = self._routes.get((host, request.port))
        if not candidates and route is None:
            return self._unknown_host(request, host, target)
        if databases.is_session(request.upgrade) and route is None and method == "GET":
            return self._session(request, host, target, candidates)
        if (request.scheme == "https") == ((host, request.port) in self._plain):
            detail = f"{request.scheme} is not what {host}:{request.port} speaks"
            return self._deny(request, "host_not_allowed", detail, target)
        if request.upgrade and (route is not None or method != "GET" or request.upgrade.lower() != websocket.PROTOCOL):
            detail = f"an upgrade to {request.upgrade[:40]!r} is not decided call by call, so it is never allowed"
            return self._deny(request, "method_or_path_not_allowed", detail, target, steps=("use plain HTTP requests",))
        if route is not None:
            return route.decide(request, method, target)
        if request.upgrade:
            return self._stream(request, host, target, candidates)
        return self._decide(request, host, method, target, candidates, approved=approved)

    def _unknown_host(self, request: Request, host: str, target: str) -> Decision:
        blocked = is_blocked_host(request.host)
        if blocked:
            return self._deny(request, "destination_blocked", blocked, target)
        if not _HOST.match(host):
            return self._deny(request, "not_canonical", "the host is not a plain host name", target)
        detail = f"no rule names {host}:{request.port}"
        return self._deny(request, "host_not_allowed", detail, target, missing=True)

    def _session(
        self, request: Request, host: str, target: str, candidates: list[tuple[AddressRules, int]]
    ) -> Decision:
        """Decide on opening a session of PostgreSQL. Nothing looks into it, so no person can decide on what is asked there."""
        if target != databases.TARGET:
            # A path says nothing to a server of PostgreSQL: rules and delegations with paths would be the client's to choose.
            detail = f"a session has no path, so it is opened at {databases.TARGET} alone"
            steps = (f"open the session at {databases.TARGET}; the client names the database when it starts",)
            return self._deny(request, "method_or_path_not_allowed", detail, target, steps=steps)
        opening = msgspec.structs.replace(request, method=databases.METHOD, message="")
        decision = self._decide(opening, host, databases.METHOD, target, candidates, approved=False)
        if decision.reason != "review_required":
            return decision
        detail = f"a session may write, and nobody can decide on each statement in it; {decision.rule}"
        step = f"ask the policy's owner for an action rule of class auto for {databases.METHOD} here"
        return msgspec.structs.replace(decision, reason="action_denied", detail=detail, next_steps=(step,))

    def _stream(self, request: Request, host: str, target: str, candidates: list[tuple[AddressRules, int]]) -> Decision:
        """Decide on opening a WebSocket, and on what the client may send there, once and for all of it."""
        opening = msgspec.structs.replace(request, message="")
        decision = self._decide(opening, host, websocket.OPEN, target, candidates, approved=False)
        if not decision.allowed:
            return decision
        path, _, query = target.partition("?")
        binaries = (request.binary, *request.ancestors) if request.binary else request.ancestors
        sendable = frozenset(
            method
            for method in (websocket.TEXT, websocket.BINARY)
            if self._judge(candidates, Call(path, query, method, binaries, request)).kind == "allow"
        )
        frames = websocket.frames_of(sendable)
        if frames != "none":
            sending = msgspec.structs.replace(request, message="text")
            action = self._actions.classify(sending, host, path, fetch_is_read=False)
            if action.action_class in _REASONS:
                detail = (
                    f"nobody can decide on each message of a WebSocket, and here a person would have to; {action.rule}"
                )
                if action.action_class == "deny":
                    detail = f"sending messages is denied; {action.rule}"
                steps = (
                    "use plain HTTP requests",
                    f"ask the policy's owner for an action rule of class auto for {websocket.TEXT} here",
                )
                return msgspec.structs.replace(
                    decision, verdict=DENY, reason="action_denied", detail=detail, rule=f"{decision.rule}; {action.rule}",
                    action_class=action.action_class, credential=None, next_steps=steps,
                )  # fmt: skip
            if action.action_class == "staged":
                decision = msgspec.structs.replace(decision, action_class="staged")
        if not websocket.permits(frames, request.message):
            detail = f"no rule allows the client to send {request.message} messages on the WebSocket at {path}"
            refused = self._deny(request, "method_or_path_not_allowed", detail, target, missing=True)
            return msgspec.structs.replace(refused, policy=decision.policy, rule=decision.rule)
        return msgspec.structs.replace(decision, frames=frames)

    def _judge(self, candidates: list[tuple[AddressRules, int]], call: Call) -> Judgement:
        """Return the first judgement of an endpoint that the caller may use, else of one that it may not."""
        unusable: Judgement | None = None
        for rules, state in candidates:
            found = rules.judge(state, call)
            if found.entry is None:
                continue
            if found.kind != "binary":
                return found
            unusable = unusable or found
        return unusable or Judgement("path")

    def _decide(
        self,
        request: Request,
        host: str,
        method: str,
        target: str,
        candidates: list[tuple[AddressRules, int]],
        *,
        approved: bool,
    ) -> Decision:
        path, _, query = target.partition("?")
        binaries = (request.binary, *request.ancestors) if request.binary else request.ancestors
        found = self._judge(candidates, Call(path, query, method, binaries, request))
        if found.entry is None:
            detail = f"no endpoint of {host}:{request.port} covers {path}"
            return self._deny(request, "method_or_path_not_allowed", detail, target, missing=True)
        spoken = found.entry.endpoint.protocol in CALL_PROTOCOLS and method not in websocket.STREAM_METHODS
        if spoken and found.kind not in {"allow", "binary"}:
            return self._refuse_body(request, target, found)
        if found.kind == "binary":
            detail = f"{request.binary or 'an unknown process'} may not use {host}:{request.port}"
            return self._deny(request, "binary_not_allowed", detail, target, missing=True, entry=found.entry)
        if found.rule is None:
            detail = f"no rule allows {method} {path} at {host}:{request.port}"
            return self._deny(request, "method_or_path_not_allowed", detail, target, missing=True, entry=found.entry)
        if found.kind == "deny":
            detail = f"{method} {path} is refused by a deny rule"
            return self._deny(request, "deny_rule", detail, target, entry=found.entry, rule=found.rule.label)
        return self._allow(request, target, found.entry, found, approved=approved)

    def _refuse_body(self, request: Request, target: str, found: Judgement) -> Decision:
        """Return the refusal of a call that an endpoint looks for in the body."""
        entry = found.entry
        assert entry is not None  # noqa: S101 - the caller saw to it
        protocol = entry.endpoint.protocol
        operations = found.reading.operations if found.reading else ()
        if found.body is not None:
            decision = self._deny(request, found.body.reason, found.body.detail, target, entry=entry)
            plain = (f"send one plain {protocol} request, as the policy guide describes it",)
            return msgspec.structs.replace(decision, protocol=protocol, next_steps=plain)
        asked = found.asked.text()[:200] if found.asked else ""
        if found.rule is not None:
            detail = f"{asked} is refused by a deny rule"
            decision = self._deny(request, "deny_rule", detail, target, entry=entry, rule=found.rule.label)
        else:
            detail = f"no rule allows {asked} at {request.host.lower()}:{request.port}"
            decision = self._deny(request, "operation_not_allowed", detail, target, missing=True, entry=entry)
            missing = {**(decision.rule_missing or {}), "protocol": protocol, **_missing(protocol, found.asked)}
            steps = ("ask for what the policy allows", "ask the policy's owner for the rule named in rule_missing")
            decision = msgspec.structs.replace(decision, rule_missing=missing, next_steps=steps)
        return msgspec.structs.replace(decision, protocol=protocol, operations=operations)

    def _allow(self, request: Request, target: str, endpoint: Entry, found: Judgement, *, approved: bool) -> Decision:
        rule, reading = found.rule, found.reading
        assert rule is not None  # noqa: S101 - an allowed call has one
        host = request.host.lower()
        path = target.partition("?")[0]
        if reading is None:
            action = self._actions.classify(request, host, path, fetch_is_read=rule.names_fetch)
            protocol, operations = "", _NO_OPERATIONS
        else:
            protocol, operations = endpoint.endpoint.protocol, reading.operations
            if protocol == "mcp" and (server := self._servers.get((host, request.port, path))) is not None:
                refused = server.refusal(request, reading)
                if refused is not None:
                    return msgspec.structs.replace(
                        refused, policy=endpoint.key, rule=f"{endpoint.label}.{rule.label}; {refused.rule}",
                        canonical_path=target, protocol=protocol, operations=operations,
                    )  # fmt: skip
            action = self._actions.classify_body(
                request, host, path, protocol, operations, tools=self._tools_at(request, path)
            )
        label = f"{endpoint.label}.{rule.label}"
        if action.action_class in _REASONS and not (approved and action.action_class == "review"):
            what = f" ({action.detail})" if action.detail else ""
            reason = _REASONS[action.action_class]
            if action.action_class == "review" and is_grpc(request.headers):
                reason = "action_denied"
                detail = (
                    f"a person would have to decide on this call, and a gRPC client cannot wait for that; {action.rule}"
                )
                steps: tuple[str, ...] = ("ask the policy's owner for an action rule of class auto for this path",)
            elif action.action_class == "review":
                detail = f"a person must decide on this write first{what}; {action.rule}"
                steps = (
                    "propose the change in a form that needs no review",
                    "ask the sponsor for an action rule",
                )
            else:
                detail = f"this action is denied{what}; {action.rule}"
                steps = ("use another way that the policy allows",)
            return Decision(
                verdict=DENY,
                reason=reason,
                detail=detail,
                policy=endpoint.key,
                rule=f"{label}; {action.rule}",
                action_class=action.action_class,
                canonical_path=target,
                next_steps=steps,
                protocol=protocol,
                operations=operations,
            )
        credential = None
        if not endpoint.audit:
            at = self._credentials.get((host, request.port))
            credential = at.at(path, request.method.upper()) if at else None
        return Decision(
            verdict=ALLOW,
            detail=action.detail,
            policy=endpoint.key,
            rule=label,
            action_class=action.action_class,
            credential=credential,
            canonical_path=target,
            protocol=protocol,
            operations=operations,
        )

    def _deny(
        self,
        request: Request,
        reason: str,
        detail: str,
        target: str = "",
        *,
        missing: bool = False,
        entry: Entry | None = None,
        rule: str = "",
        steps: tuple[str, ...] = (),
    ) -> Decision:
        absent: dict[str, object] | None = None
        if missing:
            absent = {
                "host": request.host.lower(),
                "port": request.port,
                "method": request.method.upper(),
                "path": target.partition("?")[0],
                "binary": request.binary or "",
            }
            if request.upgrade:
                absent |= {
                    "protocol": databases.PROTOCOL if databases.is_session(request.upgrade) else websocket.PROTOCOL
                }
            steps = (
                "use a destination, method and path that the policy allows",
                "ask the policy's owner for the rule named in rule_missing",
            )
        return Decision(
            verdict=DENY,
            reason=reason,
            detail=detail,
            policy=entry.key if entry else "",
            rule=f"{entry.label}.{rule}" if entry and rule else entry.label if entry else "",
            canonical_path=target,
            rule_missing=absent,
            next_steps=steps,
        )
