"""Read policy files and bundle folders: everything that is wrong is told at once, with its place and its cure."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import TypeVar

import msgspec

from saw.policy import globs
from saw.policy.checks_governance import GOVERNANCE_CHECKS, parse_address
from saw.policy.checks_policy import POLICY_CHECKS
from saw.policy.decode import Checks, Decoder
from saw.policy.errors import PolicyError, Problem
from saw.policy.globset import is_mixed, mixed_key
from saw.policy.governance import Governance
from saw.policy.model import Endpoint, Match, Policy
from saw.policy.yamltree import parse

POLICY_FILE = "policy.yaml"
GOVERNANCE_FILE = "governance.yaml"
MEMBERS = (POLICY_FILE, GOVERNANCE_FILE)
"""The files of a bundle."""

MAX_PROBLEMS = 1000
"""Most problems of one file that are listed."""
MAX_ALIKE = 32
"""Most rules of one address with a query, and most partly wild segments with the same literal text: tried one by one."""
MAX_COMPARISONS = 2_000_000
"""Most steps spent on finding endpoints that overlap and disagree; a policy that needs more is refused."""

T = TypeVar("T", bound=msgspec.Struct)


class Bundle(msgspec.Struct, frozen=True):
    """The two files as they are on disk (``members``), and what they say."""

    members: dict[str, bytes]
    policy: Policy
    governance: Governance


def _load(raw: bytes, name: str, kind: type[T], checks: Checks) -> tuple[T | None, list[Problem]]:
    try:
        root, problems = parse(raw, name)
    except PolicyError as error:
        return None, list(error.problems)
    decoder = Decoder(name, checks)
    value = decoder.structure(root, kind, "")
    problems = sorted([*problems, *decoder.problems], key=lambda problem: (problem.line, problem.column))
    if len(problems) > MAX_PROBLEMS:
        rest = f"there are {len(problems) - MAX_PROBLEMS} more problems"
        problems = [*problems[:MAX_PROBLEMS], Problem(name, problems[-1].line, 1, "", rest, "correct the others first")]
    return (value if isinstance(value, kind) and not problems else None), problems


def load_policy(raw: bytes, name: str = POLICY_FILE) -> Policy:
    """Return the policy in ``raw``; raise :class:`PolicyError` with all problems."""
    value, problems = _load(raw, name, Policy, POLICY_CHECKS)
    if value is None:
        raise PolicyError(problems)
    _check_overlaps(value, name)
    _check_alike(value, name)
    return value


def load_governance(raw: bytes, name: str = GOVERNANCE_FILE) -> Governance:
    """Return the governance in ``raw``; raise :class:`PolicyError` with all problems."""
    value, problems = _load(raw, name, Governance, GOVERNANCE_CHECKS)
    if value is None:
        raise PolicyError(problems)
    return value


def load_members(members: dict[str, bytes], prefix: str = "") -> Bundle:
    """Return the bundle of these files; problems of both files are reported together."""
    problems = [
        Problem(prefix + name, 1, 1, "", "the file is missing", f"add {name}")
        for name in MEMBERS
        if name not in members
    ]
    problems += [
        Problem(prefix + name, 1, 1, "", "a bundle has no such member", "remove it")
        for name in members
        if name not in MEMBERS
    ]
    policy: Policy | None = None
    governance: Governance | None = None
    try:
        policy = load_policy(members.get(POLICY_FILE, b""), prefix + POLICY_FILE) if POLICY_FILE in members else None
    except PolicyError as error:
        problems += error.problems
    try:
        if GOVERNANCE_FILE in members:
            governance = load_governance(members[GOVERNANCE_FILE], prefix + GOVERNANCE_FILE)
    except PolicyError as error:
        problems += error.problems
    if policy is not None and governance is not None:
        problems += cross_problems(policy, governance, prefix)
    if problems or policy is None or governance is None:
        raise PolicyError(problems)
    return Bundle(dict(members), policy, governance)


def load_bundle_folder(path: Path | str) -> Bundle:
    """Return the bundle in the folder ``path``; other files there (tests, notes) are no part of it."""
    folder = Path(path)
    members: dict[str, bytes] = {}
    problems: list[Problem] = []
    for name in MEMBERS:
        try:
            members[name] = (folder / name).read_bytes()
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            problems.append(Problem(str(folder / name), 1, 1, "", reason, "a bundle folder holds both files"))
    if problems:
        raise PolicyError(problems)
    return load_members(members, f"{folder}/")


_TREATMENT = ("protocol", "tls", "enforcement", "allow_encoded_slash")
"""The fields in which endpoints of equal specificity must agree where they match the same call."""
_Placed = tuple[str, Endpoint]


def _check_overlaps(policy: Policy, name: str) -> None:
    """Refuse endpoints of equal specificity that match the same call and disagree on how it is treated."""
    groups: dict[object, dict[tuple[object, ...], list[_Placed]]] = {}
    for key, rule in policy.network_policies.items():
        for index, endpoint in enumerate(rule.endpoints):
            treatment = tuple(getattr(endpoint, field) for field in _TREATMENT)
            host = endpoint.host.lower() if globs.is_exact(endpoint.host) else "*"
            for port in set(endpoint.all_ports):
                group = groups.setdefault((port, host, endpoint_specificity(endpoint)), {})
                place = f"network_policies.{key}.endpoints[{index}]"
                group.setdefault(treatment, []).append((place, endpoint))
    problems: dict[tuple[str, str], Problem] = {}
    steps = 0
    for group in groups.values():
        for (one, lefts), (other, rights) in combinations(group.items(), 2):
            field = next(field for field, a, b in zip(_TREATMENT, one, other, strict=True) if a != b)
            for (where, left), (there, right) in product(lefts, rights):
                steps += 1
                if any(globs.begin_or_end_apart(*pair) for pair in _globs_of(left, right)):
                    continue
                steps += len(left.host + left.path) * len(right.host + right.path)
                if steps > MAX_COMPARISONS:
                    reason = "too many endpoints of equal specificity differ in how a call is treated"
                    raise PolicyError([Problem(name, 1, 1, where, reason, "make them agree, or split the policy")])
                if _overlap(left, right):
                    reason = f"it overlaps {there} at equal specificity and differs in {field}"
                    problem = Problem(name, 1, 1, where, reason, "make them agree, or one more specific")
                    problems[where, there] = problem
    if problems:
        raise PolicyError(list(problems.values())[:MAX_PROBLEMS])


def _check_alike(policy: Policy, name: str) -> None:
    """Refuse more rules at one address than can be tried one by one in the time that a decision may take."""
    queries: Counter[object] = Counter()
    mixed: dict[object, set[str]] = {}
    problems: dict[str, Problem] = {}
    for key, rule in policy.network_policies.items():
        for index, endpoint in enumerate(rule.endpoints):
            host = endpoint.host.lower()
            paths = [match.path for match in _matches(endpoint)] + [binary.path for binary in rule.binaries]
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
                    if count > MAX_ALIKE and len(problems) < MAX_PROBLEMS:
                        reason = f"{address[0]}:{port} has more than {MAX_ALIKE} {what} that are tried one by one"
                        place = f"network_policies.{key}.endpoints[{index}]"
                        problems[reason] = Problem(name, 1, 1, place, reason, "write fewer, broader ones")
    if problems:
        raise PolicyError(list(problems.values()))


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


def cross_problems(policy: Policy, governance: Governance, prefix: str = "") -> list[Problem]:
    """Return what is wrong between the two files, each of which is right by itself."""
    problems: list[Problem] = []

    def add(file: str, field: str, reason: str, cure: str) -> None:
        problems.append(Problem(prefix + file, 1, 1, field, reason, cure))

    endpoints = [
        (f"network_policies.{key}.endpoints[{index}]", endpoint)
        for key, rule in policy.network_policies.items()
        for index, endpoint in enumerate(rule.endpoints)
    ]
    exact = {(e.host.lower(), port) for _, e in endpoints if globs.is_exact(e.host) for port in e.all_ports}
    globbed: dict[tuple[str, int], list[re.Pattern[str]]] = {}
    for _, endpoint in endpoints:
        if not globs.is_exact(endpoint.host):
            for port in endpoint.all_ports:
                entry = globbed.setdefault((globs.literal_tail(endpoint.host.lower()), port), [])
                entry.append(globs.host_glob(endpoint.host))

    def declared(address: tuple[str, int]) -> bool:
        host, port = address
        found = globbed.get((globs.literal_tail(host), port), ())
        return address in exact or any(pattern.fullmatch(host) for pattern in found)

    aliases = [(route.alias.lower(), route.port) for route in governance.inference.routes]
    covered = [(alias, port) for alias, port in aliases if declared((alias, port))]
    if policy.landlock.compatibility == "best_effort" and not governance.landlock.allow_best_effort:
        cure = "use hard_requirement, or set landlock.allow_best_effort in governance.yaml"
        add(POLICY_FILE, "landlock.compatibility", "best_effort is not allowed by governance.yaml", cure)
    for where, endpoint in endpoints:
        if endpoint.enforcement == "audit" and not governance.allow_audit:
            cure = "use enforce, or set allow_audit: true in governance.yaml"
            add(POLICY_FILE, f"{where}.enforcement", "audit is not allowed by governance.yaml", cure)
        for alias, port in covered[:MAX_PROBLEMS]:
            here = len(problems) < MAX_PROBLEMS and port in endpoint.all_ports
            if here and globs.host_glob(endpoint.host).fullmatch(alias):
                add(POLICY_FILE, f"{where}.host", f"it covers the inference alias {alias}", "rename one of them")

    for index, credential in enumerate(governance.credentials):
        for address in credential.hosts:
            if not declared(parse_address(address)):
                where = f"credentials[{index}].hosts"
                add(GOVERNANCE_FILE, where, f"no endpoint of the policy is {address}", "remove it or add the endpoint")
    for address in governance.plaintext:
        if not declared(parse_address(address)):
            add(GOVERNANCE_FILE, "plaintext", f"no endpoint of the policy is {address}", "remove it")
    return problems
