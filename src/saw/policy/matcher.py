"""The one matcher of both rings: a compiled policy that decides calls.

Order of a decision: canonical form, blocked destinations, endpoint by host and port, binary, most specific endpoint, deny
rules, allow rules, action class, credential. What nothing allows is denied. A matcher never changes; a new policy is a new
matcher.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network

from saw.policy import globs
from saw.policy.actions import ActionTable, ReviewAsked
from saw.policy.address_rules import AddressRules, Call, Entry, Judgement, Rule, parse_query
from saw.policy.addresses import is_blocked_host
from saw.policy.checks_governance import parse_address
from saw.policy.errors import NotCanonical, PolicyError
from saw.policy.globset import GlobSet, path_segments
from saw.policy.governance import Governance
from saw.policy.inference import CompiledRoute
from saw.policy.loader import cross_problems
from saw.policy.model import (
    ALLOW,
    DENY,
    Decision,
    EndpointAddress,
    Policy,
    Request,
)
from saw.policy.paths import canonicalise_path

__all__ = ["Matcher", "NotCanonical", "canonicalise_path", "parse_query"]

_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9._-]{0,251}[a-z0-9_-])?\Z")
_METHOD = re.compile(r"[A-Z][A-Z-]{0,31}\Z")
_NEVER = frozenset({"TRACE", "TRACK", "CONNECT"})
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
_REASONS = {"review": "review_required", "deny": "action_denied"}


class _Credentials:
    """The credentials of one host and port."""

    __slots__ = ("_ids", "_paths")

    def __init__(self, entries: list[tuple[str, str]]) -> None:
        self._paths = GlobSet([path_segments(glob) for glob, _ in entries])
        self._ids = dict(zip(self._paths.accepts, (identifier for _, identifier in entries), strict=True))

    def at(self, path: str) -> str | None:
        """Return the credential for ``path``, or ``None``."""
        found = self._paths.walk(self._paths.start, path_segments(path)) & self._paths.accepting
        return self._ids[(found & -found).bit_length() - 1] if found else None


class Matcher:
    """A compiled policy. Immutable; safe to share between threads."""

    __slots__ = (
        "_actions",
        "_addresses",
        "_credentials",
        "_exact",
        "_names",
        "_plain",
        "_routes",
        "_suffix",
        "_upstreams",
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
        self._plain = frozenset(parse_address(address) for address in governance.plaintext)
        routes = governance.inference.routes
        self._routes = {(route.alias.lower(), route.port): CompiledRoute.compile(route) for route in routes}
        self._upstreams = frozenset(route.upstream_address[0].lower() for route in routes)
        self._actions = ActionTable(governance)
        credentials: dict[tuple[str, int], list[tuple[str, str]]] = {}
        for credential in governance.credentials:
            for address in credential.hosts:
                entries = credentials.setdefault(parse_address(address), [])
                entries += [(glob, credential.id) for glob in credential.paths]
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
        return self._actions.reviews(request, request.host.lower(), request.path.partition("?")[0])

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
        if (request.scheme == "https") == ((host, request.port) in self._plain):
            detail = f"{request.scheme} is not what {host}:{request.port} speaks"
            return self._deny(request, "host_not_allowed", detail, target)
        if route is not None:
            return route.decide(request, method, target)
        return self._decide(request, host, method, target, candidates, approved=approved)

    def _unknown_host(self, request: Request, host: str, target: str) -> Decision:
        blocked = is_blocked_host(request.host)
        if blocked:
            return self._deny(request, "destination_blocked", blocked, target)
        if not _HOST.match(host):
            return self._deny(request, "not_canonical", "the host is not a plain host name", target)
        detail = f"no rule names {host}:{request.port}"
        return self._deny(request, "host_not_allowed", detail, target, missing=True)

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
        call = Call(path, query, method, binaries)
        unusable: Judgement | None = None
        for rules, state in candidates:
            found = rules.judge(state, call)
            if found.entry is None:
                continue
            if found.kind == "binary":
                unusable = unusable or found
            elif found.rule is None:
                detail = f"no rule allows {method} {path} at {host}:{request.port}"
                return self._deny(
                    request, "method_or_path_not_allowed", detail, target, missing=True, entry=found.entry
                )
            elif found.kind == "deny":
                detail = f"{method} {path} is refused by a deny rule"
                return self._deny(request, "deny_rule", detail, target, entry=found.entry, rule=found.rule.label)
            else:
                return self._allow(request, target, found.entry, found.rule, approved=approved)
        if unusable is not None:
            detail = f"{request.binary or 'an unknown process'} may not use {host}:{request.port}"
            return self._deny(request, "binary_not_allowed", detail, target, missing=True, entry=unusable.entry)
        detail = f"no endpoint of {host}:{request.port} covers {path}"
        return self._deny(request, "method_or_path_not_allowed", detail, target, missing=True)

    def _allow(self, request: Request, target: str, endpoint: Entry, rule: Rule, *, approved: bool) -> Decision:
        host = request.host.lower()
        path = target.partition("?")[0]
        action = self._actions.classify(request, host, path, fetch_is_read=rule.names_fetch)
        label = f"{endpoint.label}.{rule.label}"
        if action.action_class in _REASONS and not (approved and action.action_class == "review"):
            what = f" ({action.detail})" if action.detail else ""
            if action.action_class == "review":
                detail = f"a person must decide on this write first{what}; {action.rule}"
                steps: tuple[str, ...] = (
                    "propose the change in a form that needs no review",
                    "ask the sponsor for an action rule",
                )
            else:
                detail = f"this action is denied{what}; {action.rule}"
                steps = ("use another way that the policy allows",)
            return Decision(
                verdict=DENY,
                reason=_REASONS[action.action_class],
                detail=detail,
                policy=endpoint.key,
                rule=f"{label}; {action.rule}",
                action_class=action.action_class,
                canonical_path=target,
                next_steps=steps,
            )
        credential = None
        if not endpoint.audit:
            found = self._credentials.get((host, request.port))
            credential = found.at(path) if found else None
        return Decision(
            verdict=ALLOW,
            detail=action.detail,
            policy=endpoint.key,
            rule=label,
            action_class=action.action_class,
            credential=credential,
            canonical_path=target,
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
    ) -> Decision:
        absent: dict[str, object] | None = None
        steps: tuple[str, ...] = ()
        if missing:
            absent = {
                "host": request.host.lower(),
                "port": request.port,
                "method": request.method.upper(),
                "path": target.partition("?")[0],
                "binary": request.binary or "",
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
