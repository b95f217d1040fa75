"""What the rules of a policy must fulfil together, and what the two files must agree on.

Each check works on what could be read: a fault elsewhere hides only what depends on it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import combinations, product
from typing import NamedTuple

from saw.policy import globs
from saw.policy.checks_governance import parse_address
from saw.policy.checks_mcp import server_problems
from saw.policy.data_classes import MAX_WORK, strays
from saw.policy.databases import session_problems
from saw.policy.decode import Steps, path_text
from saw.policy.globset import is_mixed, mixed_key
from saw.policy.governance import Governance
from saw.policy.model import Endpoint, Match, NetworkRule, Policy
from saw.policy.partial import Unknown
from saw.policy.reach_automata import Budget

MAX_PROBLEMS = 1000
"""Most problems of one file that are listed."""
MAX_ALIKE = 32
"""Most rules of one address with a query, and most partly wild segments with the same literal text: tried one by one."""
MAX_COMPARISONS = 2_000_000
"""Most steps spent on finding endpoints that overlap and disagree; a policy that needs more is refused."""

Told = Callable[[Steps, str, str], None]
"""Called with the way to what is wrong, the reason and the cure."""

_TREATMENT = (
    "protocol",
    "tls",
    "enforcement",
    "allow_encoded_slash",
    "graphql_max_body_bytes",
    "persisted_queries",
    "graphql_persisted_queries",
    "mcp",
    "json_rpc",
)
"""The fields in which endpoints of equal specificity must agree where they match the same call."""


class _Placed(NamedTuple):
    """An endpoint and the way to it; of the endpoint a part may be unknown."""

    steps: Steps
    endpoint: Endpoint
    rule: NetworkRule


def _placed(policy: Policy) -> Iterator[_Placed]:
    with suppress(Unknown):
        for key, rule in policy.network_policies.items():
            with suppress(Unknown):
                for index, endpoint in enumerate(rule.endpoints):
                    yield _Placed(("network_policies", key, "endpoints", index), endpoint, rule)


def _knows_all_endpoints(policy: Policy) -> bool:
    """Return whether host and ports of every endpoint could be read, so that what is not there is known not to be."""
    try:
        for rule in policy.network_policies.values():
            for endpoint in rule.endpoints:
                _ = endpoint.host, endpoint.all_ports
    except Unknown:
        return False
    return True


def _knows_protocols(policy: Policy) -> bool:
    """Return whether protocol and path of every endpoint could be read."""
    try:
        return all((placed.endpoint.protocol, placed.endpoint.path) for placed in _placed(policy))
    except Unknown:
        return False


def rule_problems(policy: Policy, tell: Told) -> None:
    """Tell everything that is wrong with the rules of ``policy`` taken together."""
    _overlaps(policy, tell)
    _alike(policy, tell)


def _overlaps(policy: Policy, tell: Told) -> None:
    """Tell endpoints of equal specificity that match the same call and disagree on how it is treated."""
    groups: dict[object, dict[tuple[object, ...], list[_Placed]]] = {}
    for placed in _placed(policy):
        with suppress(Unknown):
            endpoint = placed.endpoint
            treatment = tuple(_comparable(getattr(endpoint, field)) for field in _TREATMENT)
            host = endpoint.host.lower() if globs.is_exact(endpoint.host) else "*"
            specific = endpoint_specificity(endpoint)
            for port in set(endpoint.all_ports):
                groups.setdefault((port, host, specific), {}).setdefault(treatment, []).append(placed)
    told: set[tuple[Steps, Steps]] = set()
    steps = 0
    for group in groups.values():
        for (one, lefts), (other, rights) in combinations(group.items(), 2):
            field = next(field for field, a, b in zip(_TREATMENT, one, other, strict=True) if a != b)
            for (where, left, _), (there, right, _) in product(lefts, rights):
                steps += 1
                if any(globs.begin_or_end_apart(*pair) for pair in _globs_of(left, right)):
                    continue
                steps += len(left.host + left.path) * len(right.host + right.path)
                if steps > MAX_COMPARISONS:
                    reason = "too many endpoints of equal specificity differ in how a call is treated"
                    tell(where, reason, "make them agree, or split the policy")
                    return
                if (where, there) not in told and len(told) < MAX_PROBLEMS and _overlap(left, right):
                    told.add((where, there))
                    # The later of the two is the one that somebody added.
                    late, early = max(where, there, key=_order(policy)), min(where, there, key=_order(policy))
                    reason = f"it overlaps {path_text(early)} at equal specificity and differs in {field}"
                    tell((*late, field), reason, "make them agree, or one more specific")


def _comparable(value: object) -> object:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


def _order(policy: Policy) -> Callable[[Steps], tuple[int, int]]:
    places = {key: index for index, key in enumerate(policy.network_policies)}
    return lambda steps: (places[str(steps[1])], int(steps[3]))


def _alike(policy: Policy, tell: Told) -> None:
    """Tell more rules at one address than can be tried one by one in the time that a decision may take."""
    queries: Counter[object] = Counter()
    mixed: dict[object, set[str]] = {}
    told: set[str] = set()
    for placed in _placed(policy):
        with suppress(Unknown):
            endpoint = placed.endpoint
            host = endpoint.host.lower()
            binaries = [binary.path for binary in placed.rule.binaries]
            paths = [match.path for match in _matches(endpoint)] + binaries
            segments = [part for path in (endpoint.path, *paths) for part in path.split("/") if is_mixed(part)]
            segments += [label for label in host.split(".") if is_mixed(label)]
            asked = sum(bool(match.query) for match in _matches(endpoint))
            for port in set(endpoint.all_ports):
                address = (host if globs.is_exact(host) else "*." + globs.literal_tail(host), port)
                queries[address] += asked
                for segment in segments:
                    mixed.setdefault((address, mixed_key(segment)), set()).add(segment)
                alike = max((len(mixed[address, mixed_key(segment)]) for segment in segments), default=0)
                for count, what in (
                    (queries[address], "rules with a query"),
                    (alike, "globs with wildcards beside text"),
                ):
                    reason = f"{address[0]}:{port} has more than {MAX_ALIKE} {what} that are tried one by one"
                    if count > MAX_ALIKE and len(told) < MAX_PROBLEMS and reason not in told:
                        told.add(reason)
                        tell(placed.steps, reason, "write fewer, broader ones")


def _matches(endpoint: Endpoint) -> list[Match]:
    return [rule.allow for rule in endpoint.rules or ()] + list(endpoint.deny_rules or ())


def _globs_of(left: Endpoint, right: Endpoint) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return the two host globs, and the two path globs."""
    return (left.host.lower(), right.host.lower()), (left.path or "/**", right.path or "/**")


def _overlap(left: Endpoint, right: Endpoint) -> bool:
    hosts, paths = _globs_of(left, right)
    return globs.may_overlap(*hosts, ".") and globs.may_overlap(*paths)


def endpoint_specificity(endpoint: Endpoint) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the key by which the most specific of several matching endpoints is found: host first, then path."""
    return globs.specificity(endpoint.host), globs.specificity(endpoint.path or "/**")


class _Declared:
    """The addresses that the endpoints of a policy name."""

    def __init__(self, policy: Policy) -> None:
        self.complete = _knows_all_endpoints(policy)
        self._exact: set[tuple[str, int]] = set()
        self._globbed: dict[tuple[str, int], list[re.Pattern[str]]] = {}
        for placed in _placed(policy):
            with suppress(Unknown):
                host = placed.endpoint.host.lower()
                for port in placed.endpoint.all_ports:
                    if globs.is_exact(host):
                        self._exact.add((host, port))
                    else:
                        found = self._globbed.setdefault((globs.literal_tail(host), port), [])
                        found.append(globs.host_glob(host))

    def has(self, address: tuple[str, int]) -> bool:
        """Return whether an endpoint names ``address``."""
        host, port = address
        found = self._globbed.get((globs.literal_tail(host), port), ())
        return address in self._exact or any(pattern.fullmatch(host) for pattern in found)


def agreement_problems(policy: Policy, governance: Governance, of_policy: Told, of_governance: Told) -> None:
    """Tell what is wrong between the two files."""
    with suppress(Unknown):
        if policy.landlock.compatibility == "best_effort" and not governance.landlock.allow_best_effort:
            cure = "use hard_requirement, or set landlock.allow_best_effort in governance.yaml"
            of_policy(("landlock", "compatibility"), "best_effort is not allowed by governance.yaml", cure)
    with suppress(Unknown):
        if not governance.allow_audit:
            _audited(policy, of_policy)
    declared = _Declared(policy)
    with suppress(Unknown):
        _covered_aliases(policy, governance, declared, of_policy)
    if declared.complete:
        _undeclared(governance, declared, of_governance)
    with suppress(Unknown):
        endpoints = ((placed.steps, placed.endpoint) for placed in _placed(policy))
        complete = declared.complete and _knows_protocols(policy)
        server_problems(endpoints, governance, of_policy, of_governance, complete=complete, most=MAX_PROBLEMS)
    with suppress(Unknown):
        placed_endpoints = ((placed.steps, placed.endpoint) for placed in _placed(policy))
        session_problems(placed_endpoints, governance, of_policy)
    with suppress(Unknown):
        _data_stays(policy, governance, of_policy, of_governance)


def _data_stays(policy: Policy, governance: Governance, of_policy: Told, of_governance: Told) -> None:
    budget, told = Budget(MAX_WORK), 0
    for name, hosts in governance.data_classes.only_to.items():
        for stray in strays(policy, governance, hosts, budget):
            told += 1
            if told > MAX_PROBLEMS:
                return
            tell = of_policy if stray.in_policy else of_governance
            reason = f"{name} data may go to {', '.join(hosts)} only, and {stray.host} lies outside"
            tell(stray.steps, reason, "remove the destination, or let officers widen data_classes.only_to")


def _audited(policy: Policy, of_policy: Told) -> None:
    for placed in _placed(policy):
        with suppress(Unknown):
            if placed.endpoint.enforcement == "audit":
                cure = "use enforce, or set allow_audit: true in governance.yaml"
                of_policy((*placed.steps, "enforcement"), "audit is not allowed by governance.yaml", cure)


def _covered_aliases(policy: Policy, governance: Governance, declared: _Declared, of_policy: Told) -> None:
    aliases: list[tuple[str, int]] = []
    for route in governance.inference.routes:
        with suppress(Unknown):
            aliases.append((route.alias.lower(), route.port))
    covered = [address for address in aliases if declared.has(address)][:MAX_PROBLEMS]
    told = 0
    for placed in _placed(policy) if covered else ():
        with suppress(Unknown):
            for alias, port in covered:
                here = told < MAX_PROBLEMS and port in placed.endpoint.all_ports
                if here and globs.host_glob(placed.endpoint.host).fullmatch(alias):
                    told += 1
                    of_policy((*placed.steps, "host"), f"it covers the inference alias {alias}", "rename one of them")


def _undeclared(governance: Governance, declared: _Declared, of_governance: Told) -> None:
    def look(steps: Steps, addresses: tuple[str, ...], cure: str) -> None:
        for index, address in enumerate(addresses):
            if not declared.has(parse_address(address)):
                of_governance((*steps, index), f"no endpoint of the policy is {address}", cure)

    with suppress(Unknown):
        for index, credential in enumerate(governance.credentials):
            with suppress(Unknown):
                look(("credentials", index, "hosts"), credential.hosts, "remove it or add the endpoint")
    with suppress(Unknown):
        look(("plaintext",), governance.plaintext, "remove it")
