"""One bundle, laid out for comparison: what of it bears on one host and port, and what a decision of it amounts to."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import Any, NamedTuple

import msgspec

from saw.policy import globs
from saw.policy.actions import ActionTable
from saw.policy.checks_governance import parse_address
from saw.policy.databases import Postgres
from saw.policy.governance import Action, Credential, DataClasses, Governance, InferenceRoute
from saw.policy.inference import passing
from saw.policy.loader import Bundle
from saw.policy.matcher import Matcher
from saw.policy.model import Decision, Endpoint, Match, Policy, Request
from saw.policy.providers import OAuth2, SigV4
from saw.policy.references import parse_reference
from saw.policy.tool_rules import McpServer, Tool

LEVELS = ("refused", "review", "staged", "auto")
"""What a decision amounts to, from least to most."""
REFUSED, REVIEW, STAGED, AUTO = range(4)

Network = IPv4Network | IPv6Network


class Placed(NamedTuple):
    """An endpoint with the rule it is in: key of the rule, position in the rule, executables that may use it."""

    key: str
    position: int
    endpoint: Endpoint
    binaries: tuple[str, ...]


class Secret(NamedTuple):
    """What a credential puts into a call: where the secret is kept, the header, its format, how it is turned into what is sent.

    Its id does not matter.
    """

    ref: str
    header: str
    format: str
    token: OAuth2 | None = None
    sigv4: SigV4 | None = None
    postgres: Postgres | None = None

    def beyond(self, other: Secret | None) -> bool:
        """Return whether this gives a call something that ``other`` does not; the same role with fewer databases does not."""
        if (
            other is None
            or self.postgres is None
            or other.postgres is None
            or self.postgres.user != other.postgres.user
        ):
            return self != other
        more = set(self.postgres.databases) - set(other.postgres.databases)
        return bool(more) or self._replace(postgres=None) != other._replace(postgres=None)

    @property
    def provider(self) -> str:
        """Return how the secret becomes what is sent, in words; empty where it is sent itself."""
        if self.postgres is not None:
            return f"as {self.postgres.user} of PostgreSQL to {', '.join(self.postgres.databases)}"
        if self.sigv4 is not None:
            return f"signature for {self.sigv4.service} in {self.sigv4.region}"
        return "" if self.token is None else f"token of {self.token.token_url}"


class Addresses(NamedTuple):
    """Which private addresses a name may stand for: those of ``networks``, or every one (``private``), or none."""

    networks: tuple[Network, ...]
    private: bool

    def beyond(self, other: Addresses) -> bool:
        """Return whether this opens private addresses that ``other`` does not."""
        if not self.networks:
            return self.private and (bool(other.networks) or not other.private)
        if not other.networks:
            return not other.private
        four = list(collapse_addresses(n for n in other.networks if isinstance(n, IPv4Network)))
        six = list(collapse_addresses(n for n in other.networks if isinstance(n, IPv6Network)))
        return not all(
            any(n.subnet_of(m) for m in four) if isinstance(n, IPv4Network) else any(n.subnet_of(m) for m in six)
            for n in self.networks
        )


class Outcome(NamedTuple):
    """What a decision gives the caller: a level of :data:`LEVELS`, a secret, a model service, and who reviews."""

    level: int
    secret: Secret | None
    upstream: str
    review: tuple[str, int, str] | None


_ELSEWHERE: dict[str, Any] = {"port": None, "ports": (), "rules": None, "deny_rules": None, "allowed_ips": ()}
"""What of an endpoint is compared apart from it, or does not bear on one call."""

NOTHING = Outcome(REFUSED, None, "", None)


class PathView(NamedTuple):
    """All of a bundle that bears on one host, port and path; two equal views decide every call alike."""

    endpoints: tuple[tuple[Placed, tuple[Match, ...] | None, tuple[Match, ...]], ...]
    actions: tuple[tuple[int, Action], ...]
    secrets: tuple[tuple[tuple[str, ...], Secret], ...]
    route: InferenceRoute | None
    passing: object
    tools: Mapping[str, Tool] | None = None
    data: DataClasses = DataClasses()

    def same_as(self, other: PathView) -> bool:
        """Return whether both decide alike whatever else is asked; labels do not matter."""

        def essence(view: PathView) -> object:
            endpoints = [
                (msgspec.structs.replace(placed.endpoint, **_ELSEWHERE), allow, deny, placed.binaries)
                for placed, allow, deny in view.endpoints
            ]
            actions = [(a.match, a.class_, a.reviewers, a.expires) for _, a in view.actions]
            service = view.route and (view.route.models, view.route.aliases, view.route.upstream, view.passing)
            return endpoints, actions, view.secrets, service, view.tools

        return essence(self) == essence(other)


class Side:
    """A bundle and its matcher, with tables by host and port."""

    def __init__(self, bundle: Bundle) -> None:
        self.policy: Policy = bundle.policy
        self.governance: Governance = bundle.governance
        self.matcher = Matcher.compile(bundle.policy, bundle.governance)
        self.table = ActionTable(bundle.governance)
        self.exact: dict[tuple[str, int], list[Placed]] = {}
        self.globbed: dict[int, list[Placed]] = {}
        for key, rule in bundle.policy.network_policies.items():
            binaries = tuple(binary.path for binary in rule.binaries)
            for index, endpoint in enumerate(rule.endpoints):
                placed = Placed(key, index, endpoint, binaries)
                for port in dict.fromkeys(endpoint.all_ports):
                    host = endpoint.host.lower()
                    if globs.is_exact(host):
                        self.exact.setdefault((host, port), []).append(placed)
                    else:
                        self.globbed.setdefault(port, []).append(placed)
        self.plain = frozenset(parse_address(address) for address in self.governance.plaintext)
        self.routes = {(route.alias.lower(), route.port): route for route in self.governance.inference.routes}
        self._servers: dict[tuple[str, int], dict[str, McpServer]] = {}
        for server in self.governance.mcp.servers.values():
            if (at := server.address) is not None:
                self._servers.setdefault((at.host, at.port), {})[at.path] = server
        self._credentials: dict[tuple[str, int], list[tuple[str, Credential]]] = {}
        for credential in self.governance.credentials:
            for address in credential.hosts:
                entries = self._credentials.setdefault(parse_address(address), [])
                entries += [(glob, credential) for glob in credential.paths]

    def ports(self) -> set[int]:
        """Return every port that is reached."""
        return {port for _, port in self.exact} | set(self.globbed) | {port for _, port in self.routes}

    def hosts(self, port: int) -> tuple[set[str], set[str]]:
        """Return the exact names and the globs by which this side tells hosts apart on ``port``."""
        named = (*self.exact, *self.routes, *self._credentials, *self.plain, *self._servers)
        names = {host for host, at in named if at == port}
        patterns = {placed.endpoint.host.lower() for placed in self.globbed.get(port, ())}
        for action in self.governance.actions:
            if action.match.port in {None, port}:
                host = action.match.host.lower()
                (names if globs.is_exact(host) else patterns).add(host)
        return names, patterns

    def candidates(self, host: str, port: int) -> tuple[Placed, ...]:
        """Return the endpoints that cover ``host``, in the matcher's order."""
        globbed = (p for p in self.globbed.get(port, ()) if globs.host_glob(p.endpoint.host).fullmatch(host))
        return (*self.exact.get((host, port), ()), *globbed)

    def actions(self, host: str, port: int) -> tuple[tuple[int, Action], ...]:
        """Return the action rules that may match a call to ``host``, in order."""
        return tuple(
            (index, action)
            for index, action in enumerate(self.governance.actions)
            if action.match.port in {None, port} and globs.host_glob(action.match.host).fullmatch(host)
        )

    def credentials(self, host: str, port: int) -> tuple[tuple[str, Credential], ...]:
        """Return path globs and credentials that apply at ``host``, in order."""
        return tuple(self._credentials.get((host, port), ()))

    def servers(self, host: str, port: int) -> Mapping[str, McpServer]:
        """Return the MCP servers over HTTP at this address, by path."""
        return self._servers.get((host, port), {})

    def reaches(self, host: str, port: int) -> bool:
        """Return whether a rule or route names ``host``."""
        return (host, port) in self.routes or bool(self.candidates(host, port))

    def secret(self, identifier: str | None) -> Secret | None:
        """Return what the credential with this id puts into a call."""
        if identifier is None:
            return None
        return self.secret_of(self.governance.credential(identifier))

    def secret_of(self, credential: Credential) -> Secret:
        """Return what ``credential`` puts into a call."""
        ref = parse_reference(credential.ref).text()
        token = credential.oauth2
        if token is not None and token.client_secret is not None:
            token = msgspec.structs.replace(token, client_secret=parse_reference(token.client_secret).text())
        put = credential.inject
        header, form = ("", "") if put is None else (put.header.lower(), put.format)
        return Secret(ref, header, form, token, credential.sigv4, credential.postgres)

    def addresses(self, host: str, port: int) -> Addresses:
        """Return which private addresses the gateway would dial for ``host``, or for the model service behind it."""
        route = self.routes.get((host, port))
        if route is not None:
            host, port = route.upstream_address
        return Addresses(
            tuple(sorted(self.matcher.allowed_ips(host, port), key=str)), self.matcher.host_declared_exactly(host)
        )

    def view(self, host: str, port: int, path: str) -> PathView:
        """Return what bears on calls to ``path`` (canonical, without query)."""

        def on_path(matches: tuple[Match, ...]) -> tuple[Match, ...]:
            return tuple(match for match in matches if globs.path_glob(match.path).match(path))

        endpoints = []
        for placed in self.candidates(host, port):
            endpoint = placed.endpoint
            if endpoint.path and not globs.path_glob(endpoint.path).match(path):
                continue
            if "%2F" in path and not endpoint.allow_encoded_slash:
                continue
            allow = None if endpoint.rules is None else on_path(tuple(rule.allow for rule in endpoint.rules))
            endpoints.append((placed, allow, on_path(endpoint.deny_rules or ())))
        actions = tuple(
            (index, action)
            for index, action in self.actions(host, port)
            if globs.path_glob(action.match.path).match(path)
        )
        route = self.routes.get((host, port))
        paid = self.passing(route) if route else None
        server = self.servers(host, port).get(path)
        tools = None if server is None else server.tools
        secrets = tuple(
            (tuple(sorted(c.methods)), self.secret_of(c))
            for glob, c in self.credentials(host, port)
            if globs.path_glob(glob).match(path)
        )
        if route:
            routed = [self.secret(way.credential) for way in route.ways]
            secrets = tuple(((), secret) for secret in routed if secret is not None)
        return PathView(tuple(endpoints), actions, secrets, route, paid, tools, self.governance.data_classes)

    def passing(self, route: InferenceRoute) -> object:
        """Return what of budget, prices and classes of data bears on which calls of ``route`` pass, and which way they go."""
        data = self.governance.data_classes
        ways = [(way.models, way.aliases, way.upstream, way.data_classes) for way in route.ways]
        return passing(route, self.governance.paying(route)), ways, data.handles, data.held

    def decide(self, request: Request) -> tuple[Decision, Outcome]:
        """Return the matcher's decision and what it amounts to."""
        decision = self.matcher.decide(request)
        if decision.allowed:
            route = None
            if decision.inference:
                route = self.routes[request.host.lower(), request.port].ways[decision.way]
            level = STAGED if decision.action_class == "staged" else AUTO
            return decision, Outcome(level, self.secret(decision.credential), route.upstream if route else "", None)
        if decision.reason != "review_required":
            return decision, NOTHING
        action = self.action_of(decision.rule)
        if action is None or action.reviewers is None:
            return decision, Outcome(REVIEW, None, "", ("", 1, action.expires if action else ""))
        return decision, Outcome(REVIEW, None, "", (action.reviewers.group, action.reviewers.quorum, action.expires))

    def action_of(self, rule: str) -> Action | None:
        """Return the action rule that the text of a decision's rule names, or ``None`` for a default."""
        _, bracket, rest = rule.rpartition("actions[")
        return self.governance.actions[int(rest.rstrip("]"))] if bracket else None

    def action_label(self, request: Request, path: str) -> str:
        """Return which action rule classes an allowed call to the canonical ``path``."""
        return self.matcher.action_rule(request, path)
