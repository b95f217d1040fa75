"""From denials to the smallest rules that would have allowed them, as a draft that somebody reviews.

A learned rule names one host, port, method, canonical path and program, never more; query parameters are pinned where the
record names them. What was denied for a reason that rules must not undo is told with that reason instead. Nothing that
the base allows is lost: where a learned rule would take the place of another one, it is not proposed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import Any

import msgspec

from saw.errors import SawError
from saw.policy import globs
from saw.policy.addresses import is_blocked_host
from saw.policy.denials import Denial
from saw.policy.errors import NotCanonical, PolicyError
from saw.policy.learned_rules import Asked, Proposal, network_rules
from saw.policy.loader import Bundle, endpoint_specificity, load_policy
from saw.policy.matcher import Matcher, parse_query
from saw.policy.model import CALL_PROTOCOLS, Binary, Decision, Endpoint, NetworkRule, Policy, Request
from saw.policy.paths import canonicalise_path
from saw.policy.providers import fits
from saw.policy.yamltext import dump, read

PROPOSABLE = frozenset({"host_not_allowed", "method_or_path_not_allowed", "binary_not_allowed"})
"""Reasons of a denial that say "no rule allows this"; every other reason is not a matter of missing rules."""

_OWNER = "ask the owner of the policy"
_WHY: dict[str, tuple[str, str]] = {
    "destination_blocked": ("the destination is blocked whatever a policy says", "use another service"),
    "deny_rule": ("a deny rule refuses it on purpose", f"{_OWNER} whether the deny rule still holds"),
    "review_required": ("a person decides on this write", "add an action rule by hand if it needs no review"),
    "action_denied": ("an action rule denies it on purpose", f"{_OWNER} whether the rule still holds"),
    "not_canonical": ("two parsers could read the request differently", "send the canonical form"),
    "model_not_allowed": ("which models may be used is decided per inference route", "edit inference.routes by hand"),
    "operation_not_allowed": ("a record does not hold what the body asked for", "add the operation to rules by hand"),
    "body_unreadable": ("the body could not be read as what the endpoint speaks", "send it as the policy guide says"),
    "body_too_large": ("the body is longer than the endpoint reads", "send less, or raise max_body_bytes by hand"),
    "budget_unenforced": ("the route's budget cannot be counted", f"{_OWNER} for prices"),
    "data_class_not_allowed": ("which service may see which data is not learned", "edit inference.routes by hand"),
    "price_unknown": ("what a model costs is not learned", "add its price to the route by hand"),
    "budget_exhausted": ("the budget was spent", "wait for the next period, or raise the limit by hand"),
    "rate_limited": ("too many calls or tokens in a short time", "wait, or raise the limit by hand"),
    "quota_exhausted": (
        "the calls or tokens of the period were used up",
        "wait for the next one, or raise the limit by hand",
    ),
    "budget_unbounded": ("what the call would cost at most is not known", "bound the call, or the route, by hand"),
    "tool_not_allowed": ("tools are granted by hand", "edit mcp.servers in governance.yaml"),
    "argument_not_allowed": ("arguments of tools are granted by hand", "edit mcp.servers in governance.yaml"),
    "definition_changed": ("the server changed what a tool is", "read its new definition, then pin it by hand"),
    "credential_unavailable": ("the policy allows it; its credential was missing", "provide the credential"),
    "resolution_failed": ("the policy allows it; the name did not resolve", "check the name"),
}
_STATE = ("the workspace or a service was not in a state to act; rules have no part in it", "nothing to change here")


class LearnError(SawError):
    """The proposed rules do not do what they were made for; nothing may be drafted from them."""

    code = "learn_failed"


class Left(msgspec.Struct, frozen=True):
    """A denial that no rule is proposed for, why, what to do instead, and how many records say the same."""

    denial: Denial
    reason: str
    cure: str
    times: int = 1


class Lesson(msgspec.Struct, frozen=True):
    """What was learned: proposals, the rules they make (YAML values by key), what was left and what was allowed already."""

    proposals: tuple[Proposal, ...]
    rules: dict[str, Any]
    left: tuple[Left, ...]
    already_allowed: int


class _Refuse(Exception):
    """No rule is proposed, for this reason and with this cure."""

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.cure = cure


def learn(
    base: Bundle,
    denials: Iterable[Denial],
    *,
    generalise_from: int = 0,
    allow_credentials: frozenset[str] = frozenset(),
) -> Lesson:
    """Return what the denials teach about ``base``.

    ``generalise_from``: from this many calls on that differ in one path segment only, that segment becomes ``*`` (0:
    never). ``allow_credentials``: ids of credentials that may travel with learned calls; without consent, a call that
    would carry a credential is not proposed. Raises :class:`LearnError` when the result does not hold.
    """
    scholar = _Scholar(base, allow_credentials)
    left: list[Left] = []
    already = 0
    single: dict[Asked, Proposal] = {}
    for denial, times in _counted(denials):
        try:
            proposal = scholar.proposal(denial)
        except _Refuse as refusal:
            left.append(Left(denial, refusal.reason, refusal.cure, times))
            continue
        if proposal is None:
            already += times
        else:
            single.setdefault(proposal.asked[0], proposal)
    proposals = [single[asked] for asked in sorted(single)]
    if generalise_from > 1:
        proposals = _generalised(scholar, proposals, generalise_from)
    rules = network_rules(base.policy, proposals)
    scholar.verify(rules, proposals)
    return Lesson(tuple(proposals), rules, tuple(left), already)


def _counted(denials: Iterable[Denial]) -> list[tuple[Denial, int]]:
    """Return each denial once, as it was first recorded, with the number of records that say the same."""
    first: dict[Denial, Denial] = {}
    times: dict[Denial, int] = {}
    for denial in denials:
        same = msgspec.structs.replace(denial, where="")
        first.setdefault(same, denial)
        times[same] = times.get(same, 0) + 1
    return [(denial, times[same]) for same, denial in first.items()]


class _Scholar:
    """Knows the base: what it decides, which endpoint decides, which deny rules and credentials lie where."""

    def __init__(self, base: Bundle, consent: frozenset[str]) -> None:
        self.base = base
        self.consent = consent
        self.matcher = Matcher.compile(base.policy, base.governance)
        self.tree = read(base.members["policy.yaml"], "policy.yaml")
        self.endpoints = [(rule, e) for rule in base.policy.network_policies.values() for e in rule.endpoints]
        self._alone = [self._only(endpoint) for _, endpoint in self.endpoints if endpoint.deny_rules]

    def _only(self, endpoint: Endpoint) -> Matcher:
        """Return a matcher of this endpoint, enforced, for the program ``/learn``: shows its deny rules to everybody."""
        strict = msgspec.structs.replace(endpoint, enforcement="enforce")
        rule = NetworkRule(endpoints=(strict,), binaries=(Binary(path="/learn"),))
        return Matcher(Policy(version=1, network_policies={"x": rule}), self.base.governance)

    def proposal(self, denial: Denial) -> Proposal | None:
        """Return the rule that would allow ``denial``, ``None`` if the base allows it; raise :class:`_Refuse` with why not."""
        _refuse_by_record(denial)
        request = _request(denial)
        decision = self.matcher.decide(request)
        if decision.allowed:
            return None
        if decision.reason not in PROPOSABLE:
            raise _Refuse(*_WHY.get(decision.reason, _STATE))
        if (denial.host.lower(), denial.port) in {
            (r.alias.lower(), r.port) for r in self.base.governance.inference.routes
        }:
            raise _Refuse(*_WHY["model_not_allowed"])
        for matcher in self._alone:
            if matcher.decide(msgspec.structs.replace(request, binary="/learn")).reason == "deny_rule":
                raise _Refuse(*_WHY["deny_rule"])
        asked = _asked(request, decision, query_known=denial.query_known)
        proposal = self._placed(asked)
        self._try(proposal)
        return proposal

    def _placed(self, asked: Asked) -> Proposal:
        covering = [
            endpoint
            for rule, endpoint in self.endpoints
            if asked.port in endpoint.all_ports
            and globs.host_glob(endpoint.host).fullmatch(asked.host)
            and (not endpoint.path or globs.path_glob(endpoint.path).fullmatch(asked.path))
            and any(globs.path_glob(binary.path).fullmatch(asked.binary) for binary in rule.binaries)
        ]
        if not covering:
            return Proposal((asked,), asked.path, asked.host, asked.path, "%2F" in asked.path, "")
        deciding = max(covering, key=endpoint_specificity)
        if deciding.protocol in CALL_PROTOCOLS:
            raise _Refuse(*_WHY["operation_not_allowed"])
        if not globs.is_exact(deciding.host):
            reason = f"the endpoint {deciding.host} decides such calls; a rule for one host would take its place"
            raise _Refuse(reason, "add the method and path to that endpoint by hand")
        return Proposal((asked,), asked.path, deciding.host, deciding.path, deciding.allow_encoded_slash, deciding.tls)

    def _try(self, proposal: Proposal) -> None:
        """Refuse a proposal that does not load with the base, is still denied, or would send a credential."""
        matcher = self._draft(network_rules(self.base.policy, [proposal]))
        for asked in proposal.asked:
            decision = matcher.decide(request_of(asked))
            if not decision.allowed:
                raise _Refuse(
                    *_WHY.get(decision.reason, (f"a rule alone does not allow it: {decision.detail}", _OWNER))
                )
            if decision.credential is not None and decision.credential not in self.consent:
                reason = (
                    f"the credential {decision.credential} would travel with it, which nobody granted for this call"
                )
                raise _Refuse(reason, f"allow it with --allow-credential {decision.credential} if that is meant")

    def _draft(self, rules: dict[str, Any]) -> Matcher:
        tree = {**self.tree, "network_policies": {**(self.tree.get("network_policies") or {}), **rules}}
        try:
            return Matcher.compile(load_policy(dump(tree).encode()), self.base.governance)
        except PolicyError as error:
            raise _Refuse(f"the rule cannot stand beside the base: {error.problems[0].reason}", _OWNER) from error

    def verify(self, rules: dict[str, Any], proposals: Sequence[Proposal]) -> None:
        """Decide every learned call with the draft; raise :class:`LearnError` if one is not allowed."""
        try:
            matcher = self._draft(rules)
        except _Refuse as refusal:
            raise LearnError(refusal.reason, cure="learn from fewer denials at a time") from refusal
        for asked in (asked for proposal in proposals for asked in proposal.asked):
            decision = matcher.decide(request_of(asked))
            if not decision.allowed:
                raise LearnError(
                    f"the draft would still deny {asked.method} {asked.path} at {asked.host}: {decision.detail}",
                    cure="learn from fewer denials at a time",
                )

    def may_generalise(self, proposal: Proposal) -> bool:
        """Return whether no deny rule, credential or other endpoint of the base lies where the glob may reach."""
        first = proposal.asked[0]
        for _, endpoint in self.endpoints:
            if first.port not in endpoint.all_ports or not globs.host_glob(endpoint.host).fullmatch(first.host):
                continue
            if any(globs.may_overlap(deny.path, proposal.path) for deny in endpoint.deny_rules or ()):
                return False
            if proposal.endpoint_path == proposal.path and globs.may_overlap(endpoint.path or "/**", proposal.path):
                return False
        for credential in self.base.governance.credentials:
            here = f"{first.host}:{first.port}" in {host.lower() for host in credential.hosts}
            overlap = any(globs.may_overlap(path, proposal.path) for path in credential.paths) and any(
                fits(credential.methods, asked.method) for asked in proposal.asked
            )
            if here and overlap and credential.id not in self.consent:
                return False
        try:
            self._try(proposal)
        except _Refuse:
            return False
        return True


def _refuse_by_record(denial: Denial) -> None:
    """Raise :class:`_Refuse` for what the record itself rules out."""
    if denial.tool:
        raise _Refuse(*_WHY["tool_not_allowed"])
    if denial.reason and denial.reason not in PROPOSABLE:
        raise _Refuse(*_WHY.get(denial.reason, _STATE))
    if denial.cut:
        raise _Refuse(
            f"the record may hold only the beginning of the {denial.cut}", "look up the call in ring 1's journal"
        )
    if denial.upgrade:
        reason = f"it asked to switch to {denial.upgrade[:40]}, and what would have been sent there is not known"
        raise _Refuse(reason, "add a websocket endpoint by hand; saw policy explain GET wss://HOST/PATH shows one")
    if denial.method == "CONNECT":
        reason = "a tunnel was refused, so what was to be asked inside is not known"
        raise _Refuse(reason, "add the host by hand with the methods and paths that are needed")
    for field in ("host", "port", "method", "path", "binary"):
        if not getattr(denial, field):
            raise _Refuse(f"the record does not name the {field}", "use ring 1's record of the same request_id")
    blocked = is_blocked_host(denial.host)
    if blocked:
        raise _Refuse(blocked, "use another service")
    try:
        ip_address(denial.host.strip("[]"))
    except ValueError:
        pass
    else:
        raise _Refuse("it names an address instead of a host", "add the address by hand if it is meant")
    if denial.scheme == "http" or (not denial.scheme and denial.port == 80):
        raise _Refuse("it would travel in plain text", "use https, or add host:port to plaintext by hand")


def _request(denial: Denial) -> Request:
    return Request(
        scheme="https",
        host=denial.host,
        port=denial.port,
        method=denial.method,
        path=denial.path,
        binary=denial.binary,
    )


def request_of(asked: Asked) -> Request:
    """Return the call that ``asked`` stands for."""
    query = "&".join(f"{_quote(key)}={_quote(value)}" for key, values in asked.query for value in values)
    path = f"{asked.path}?{query}" if query else asked.path
    return Request("https", asked.host, asked.port, asked.method, path, asked.binary)


def _quote(text: str) -> str:
    return "".join(
        char if char.isalnum() and char.isascii() else "".join(f"%{b:02X}" for b in char.encode()) for char in text
    )


def _asked(request: Request, decision: Decision, *, query_known: bool) -> Asked:
    """Return the call in canonical form; raise :class:`_Refuse` when a rule can only name more than this call."""
    try:
        target = decision.canonical_path or canonicalise_path(request.path)
    except NotCanonical as error:
        raise _Refuse(*_WHY["not_canonical"]) from error
    path, _, text = target.partition("?")
    query = parse_query(text) if query_known and text else {}
    if query is None:
        raise _Refuse("its query can be read in more than one way", "send the parameters without ;")
    for what, glob, compiled in (
        ("path", path, globs.path_glob),
        ("program", request.binary or "", globs.path_glob),
        ("host", request.host.lower(), globs.host_glob),
        *((f"query parameter {key}", value, globs.flat_glob) for key, values in query.items() for value in values),
    ):
        try:
            compiled(glob)
        except globs.GlobError as error:
            raise _Refuse(f"the {what} cannot be written as a rule: {error}", "write the rule by hand") from error
        if not globs.is_exact(glob):
            raise _Refuse(f"the {what} holds a *, which would stand for more than was asked", "write the rule by hand")
    pinned = tuple((key, tuple(dict.fromkeys(values))) for key, values in sorted(query.items()))
    return Asked(request.host.lower(), request.port, request.binary or "", path, request.method.upper(), pinned)


def _generalised(scholar: _Scholar, proposals: list[Proposal], least: int) -> list[Proposal]:
    """Join proposals that differ in one segment of the path, largest groups first."""
    groups: dict[tuple[object, ...], list[Proposal]] = {}
    key: tuple[object, ...]
    for proposal in proposals:
        asked = proposal.asked[0]
        segments = asked.path.split("/")[1:]
        placed = "" if proposal.endpoint_path == proposal.path else proposal.endpoint_path
        for index, segment in enumerate(segments):
            if segment and not asked.query:
                masked = "/" + "/".join([*segments[:index], "*", *segments[index + 1 :]])
                key = (asked.host, asked.port, asked.binary, asked.method, placed, masked)
                groups.setdefault(key, []).append(proposal)
    remaining = dict.fromkeys(proposals)
    joined: list[Proposal] = []
    for key, alike in sorted(groups.items(), key=lambda item: (-len(item[1]), str(item[0]))):
        members = [member for member in alike if member in remaining]
        if len(members) < least:
            continue
        glob, first = str(key[-1]), members[0]
        own = first.endpoint_path == first.path
        candidate = msgspec.structs.replace(
            first,
            asked=tuple(asked for member in members for asked in member.asked),
            path=glob,
            endpoint_path=glob if own else first.endpoint_path,
        )
        if scholar.may_generalise(candidate):
            joined.append(candidate)
            for member in members:
                del remaining[member]
    return [*joined, *remaining]
