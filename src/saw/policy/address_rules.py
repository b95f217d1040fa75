"""The endpoints that share an address, and their rules, ready to decide: which endpoint, which rule.

Endpoints stand in the order of their specificity, the most specific first. Every question (which paths match, which
executables, which methods) is answered for all of them at once by the bits of one integer, so that the cost of a decision
hardly grows with the size of the policy.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Literal, NamedTuple
from urllib.parse import unquote_to_bytes

import msgspec

from saw.policy import databases, globs, websocket
from saw.policy.calls import BodyRefused, CallRules, Reading, first_allowing, first_denied
from saw.policy.globset import BORDER, BitTable, GlobSet, address_segments, bits_of, path_segments, places_of
from saw.policy.loader import endpoint_specificity
from saw.policy.model import CALL_PROTOCOLS, READ_METHODS, AnyOf, Endpoint, Match, NetworkRule, Operation, Request

_ACCESS: dict[str, frozenset[str] | None] = {
    "read-only": READ_METHODS,
    "read-write": READ_METHODS | {"POST", "PUT", "PATCH"},
    "full": None,
}
_PLAIN_HOST = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\Z")
_DISAGREE = "endpoints of equal specificity disagree on what is spoken here"
_REMEMBERED = 256
"""Most sets of callers, and of endpoints, whose bits are kept."""


def parse_query(query: str) -> dict[str, list[str]] | None:
    """Return the values of each key of a form-encoded query, or ``None`` when services may read it differently.

    That is the case for a ``;``, which some take for a separator, and for what is not UTF-8.
    """
    if ";" in query:
        return None
    result: dict[str, list[str]] = {}
    for pair in query.split("&"):
        if pair:
            key, _, value = pair.partition("=")
            try:
                name, text = (unquote_to_bytes(part.replace("+", " ")).decode("utf-8") for part in (key, value))
            except UnicodeDecodeError:
                return None
            result.setdefault(name, []).append(text)
    return result


class Call(NamedTuple):
    """What the rules of an address are asked: canonical path (without the query) and query, upper-case method, callers.

    ``method`` is one of :data:`saw.policy.databases.LASTING` where a WebSocket or a session is meant. ``request`` is
    the whole of it, for endpoints whose calls are named in the body.
    """

    path: str
    query: str
    method: str
    binaries: tuple[str, ...]
    request: Request


class Rule(msgspec.Struct, frozen=True):
    """One allow or deny rule; ``methods`` ``None`` means any. ``path`` is a glob."""

    label: str
    methods: frozenset[str] | None
    path: str
    query: tuple[tuple[str, tuple[re.Pattern[str], ...]], ...]
    names_fetch: bool

    def query_fits(self, query: dict[str, list[str]] | None, *, every: bool) -> bool:
        """Return whether the query matches; ``every`` value of a key must match to allow, any one to deny."""
        if query is None:
            return not every
        for key, patterns in self.query:
            fitting = 0
            values = query.get(key, ())
            for value in values:
                for pattern in patterns:
                    if pattern.fullmatch(value):
                        fitting += 1
                        break
            if not fitting or (every and fitting < len(values)):
                return False
        return True


AUDITED = Rule("enforcement: audit", None, "/**", (), names_fetch=False)
"""Stands for the rule that a call at an audited endpoint would have needed."""


class Entry(msgspec.Struct, frozen=True):
    """One endpoint of one network rule: ``key`` and ``label`` name it, ``rule`` and ``endpoint`` are what was written."""

    key: str
    label: str
    rule: NetworkRule
    endpoint: Endpoint
    allowed_ips: tuple[IPv4Network | IPv6Network, ...]

    @classmethod
    def of(cls, key: str, index: int, rule: NetworkRule) -> Entry:
        """Return the entry of the endpoint ``index`` of ``rule``."""
        endpoint = rule.endpoints[index]
        networks = tuple(ip_network(text) for text in endpoint.allowed_ips)
        return cls(key, f"endpoints[{index}]", rule, endpoint, networks)

    @property
    def audit(self) -> bool:
        """Return whether calls are allowed whatever the rules say."""
        return self.endpoint.enforcement == "audit"

    @property
    def streams(self) -> bool:
        """Return whether the endpoint is about WebSockets, and about nothing else."""
        return self.endpoint.protocol == websocket.PROTOCOL

    def takes(self, method: str) -> bool:
        """Return whether a call of ``method`` may be allowed here without a look at its body."""
        if self.streams or self.endpoint.protocol in CALL_PROTOCOLS:
            return False
        return self.audit or any(rule.methods is None or method in rule.methods for rule in _allow_rules(self.endpoint))


class Judgement(NamedTuple):
    """How an address answers: no endpoint covers the path, none may be used by the caller, a rule, or no rule at all.

    Where the body names the calls: ``reading`` is what it asks for, ``asked`` the operation that decided, and ``body`` why it
    cannot be read.
    """

    kind: Literal["path", "binary", "body", "deny", "allow", "no rule"]
    entry: Entry | None = None
    rule: Rule | None = None
    reading: Reading | None = None
    asked: Operation | None = None
    body: BodyRefused | None = None


def _rule(label: str, match: Match, *, allow: bool, stream: bool) -> Rule:
    method = match.method.upper()
    methods: frozenset[str] | None
    if stream:
        methods = websocket.RULE_METHODS[method]
    else:
        methods = None if method == "*" else frozenset({method, "HEAD"} if method == "GET" else {method})
    query = tuple(
        (key, tuple(globs.flat_glob(glob) for glob in (value.any if isinstance(value, AnyOf) else (value,))))
        for key, value in sorted(match.query.items())
    )
    return Rule(label, methods, match.path, query, allow and match.path.endswith("/git-upload-pack"))


def _allow_rules(endpoint: Endpoint) -> Iterable[Rule]:
    if endpoint.protocol in CALL_PROTOCOLS:
        return ()
    stream = endpoint.protocol == websocket.PROTOCOL
    if endpoint.rules is not None:
        return (_rule(f"rules[{i}]", rule.allow, allow=True, stream=stream) for i, rule in enumerate(endpoint.rules))
    if endpoint.protocol == databases.PROTOCOL:
        return (Rule("a session", frozenset({databases.METHOD}), "/**", (), names_fetch=False),)
    if not endpoint.protocol:
        return (Rule("any call (no protocol)", None, "/**", (), names_fetch=False),)
    methods = websocket.ACCESS[endpoint.access] if stream else _ACCESS[endpoint.access]
    return (Rule(f"access: {endpoint.access}", methods, "/**", (), names_fetch=False),)


def _deny_rules(endpoint: Endpoint) -> Iterable[Rule]:
    if endpoint.enforcement == "audit" or endpoint.protocol in CALL_PROTOCOLS:
        return ()
    stream = endpoint.protocol == websocket.PROTOCOL
    return (
        _rule(f"deny_rules[{i}]", match, allow=False, stream=stream)
        for i, match in enumerate(endpoint.deny_rules or ())
    )


class _Rules:
    """The allow or the deny rules of all endpoints of an address."""

    __slots__ = ("_by_place", "_methods", "_of_owner", "_remembered", "_set", "_streams", "everywhere")

    def __init__(self, rules: Sequence[tuple[int, Rule]]) -> None:
        self._set = GlobSet([path_segments(rule.path) for _, rule in rules])
        self._by_place = dict(zip(self._set.accepts, rules, strict=True))
        self.everywhere = bits_of(self._set.accepts, self._set.width) if all(r.path == "/**" for _, r in rules) else 0
        any_method: list[int] = []
        methods: dict[Hashable, list[int]] = {}
        owners: dict[Hashable, list[int]] = {}
        for place, (owner, rule) in self._by_place.items():
            owners.setdefault(owner, []).append(place)
            if rule.methods is None:
                any_method.append(place)
            for method in rule.methods or ():
                methods.setdefault(method, []).append(place)
        self._methods = BitTable(methods, self._set.width, bits_of(any_method, self._set.width))
        # A rule for any method is about HTTP calls; only rules of websocket and tcp endpoints name what stays open.
        streams: dict[Hashable, list[int]] = {
            method: places for method, places in methods.items() if method in databases.LASTING
        }
        self._streams = BitTable(streams, self._set.width)
        self._of_owner = BitTable(owners, self._set.width)
        self._remembered: dict[int, int] = {}

    def first(
        self, usable: int, index: Mapping[int, int], call: Call, segments: Sequence[str], *, allow: bool
    ) -> tuple[int, Rule] | None:
        """Return the first rule that fits, and its endpoint; ``index`` names the endpoints that the bits ``usable`` mean."""
        table = self._streams if call.method in databases.LASTING else self._methods
        found = table.get(call.method)
        if not found:
            return None
        found &= self.everywhere or self._set.walk(self._set.start, segments)
        if not found:
            return None
        mine = self._remembered.get(usable)
        if mine is None:
            mine = 0
            for place in places_of(usable):
                mine |= self._of_owner.get(index[place])
            if len(self._remembered) >= _REMEMBERED:
                self._remembered = {}
            self._remembered[usable] = mine
        parsed: dict[str, list[str]] | None = None
        unread = True
        for place in places_of(found & mine):
            rule = self._by_place[place]
            if rule[1].query:
                if unread:
                    parsed, unread = parse_query(call.query), False
                if not rule[1].query_fits(parsed, every=allow):
                    continue
            return rule
        return None


class AddressRules:
    """The endpoints of one exact host and port, or of all host globs with the same last labels and port. Immutable."""

    __slots__ = (
        "_allow",
        "_audit",
        "_audit_streams",
        "_calls",
        "_class_end",
        "_deny",
        "_exact",
        "_index",
        "_known",
        "_programs",
        "_set",
        "_slash",
        "_slash_hosts",
        "_spoken",
        "_whole",
        "entries",
    )

    def __init__(self, entries: Sequence[Entry], *, with_host: bool) -> None:
        self.entries = sorted(entries, key=lambda entry: endpoint_specificity(entry.endpoint), reverse=True)
        written = [entry.endpoint for entry in self.entries]
        paths = [endpoint.path or "/**" for endpoint in written]
        if with_host:
            hosts = [endpoint.host.lower() for endpoint in written]
            self._set = GlobSet([address_segments(host, path) for host, path in zip(hosts, paths, strict=True)])
        else:
            self._set = GlobSet([path_segments(path) for path in paths])
        places, width = self._set.accepts, self._set.width
        self._index = {place: index for index, place in enumerate(places)}
        self._whole = 0 if with_host or any(endpoint.path for endpoint in written) else bits_of(places, width)
        slash = [place for place, endpoint in zip(places, written, strict=True) if endpoint.allow_encoded_slash]
        self._slash = bits_of(slash, width)
        before_path = self._set.borders if with_host else [0] * len(places)
        keeping = [place for place, e in zip(before_path, written, strict=True) if e.allow_encoded_slash]
        self._slash_hosts = bits_of(keeping, width) if with_host else self._set.start if keeping else 0
        self._audit, self._audit_streams = (
            bits_of([p for p, e in zip(places, self.entries, strict=True) if e.audit and e.streams == kind], width)
            for kind in (False, True)
        )
        self._calls = {i: CallRules(e) for i, e in enumerate(written) if e.protocol in CALL_PROTOCOLS}
        self._spoken = bits_of([place for place, index in self._index.items() if index in self._calls], width)
        self._class_end = [place + 1 for place in places]
        for index in range(len(places) - 2, -1, -1):
            if endpoint_specificity(written[index]) == endpoint_specificity(written[index + 1]):
                self._class_end[index] = self._class_end[index + 1]
        exact: dict[Hashable, list[int]] = {}
        programs: dict[Hashable, list[int]] = {}
        for place, entry in zip(places, self.entries, strict=True):
            for binary in entry.rule.binaries:
                kind = exact if globs.is_exact(binary.path) else programs
                kind.setdefault(binary.path, []).append(place)
        self._exact = BitTable(exact, width)
        program_set = GlobSet([path_segments(str(glob)) for glob in programs])
        self._programs = (program_set, dict(zip(program_set.accepts, programs, strict=True)), BitTable(programs, width))
        self._known: dict[tuple[str, ...], int] = {}
        self._deny = _Rules([(i, rule) for i, endpoint in enumerate(written) for rule in _deny_rules(endpoint)])
        self._allow = _Rules([(i, rule) for i, endpoint in enumerate(written) for rule in _allow_rules(endpoint)])

    @property
    def start(self) -> int:
        """Return the state in which no part of the address was read."""
        return self._set.start

    def read_host(self, host: str) -> int:
        """Return the state after ``host`` and the border; zero when no host glob matches."""
        if not _PLAIN_HOST.match(host):
            return 0
        return self._set.walk(self._set.start, [*host.split("."), BORDER])

    def keeps_slash(self, state: int) -> bool:
        """Return whether an endpoint in ``state`` keeps encoded slashes."""
        return bool(state & self._slash_hosts)

    def _callers(self, binaries: tuple[str, ...]) -> int:
        known = self._known.get(binaries)
        if known is None:
            known = 0
            patterns, names, places = self._programs
            for binary in binaries:
                known |= self._exact.get(binary)
                if binary.startswith("/"):
                    for place in places_of(patterns.walk(patterns.start, path_segments(binary)) & patterns.accepting):
                        known |= places.get(names[place])
            if len(self._known) >= _REMEMBERED:
                self._known = {}
            self._known[binaries] = known
        return known

    def judge(self, state: int, call: Call) -> Judgement:
        """Return how these endpoints answer ``call``; ``state`` is :attr:`start`, or what :meth:`read_host` returned."""
        segments = path_segments(call.path)
        found = self._whole or self._set.walk(state, segments) & self._set.accepting
        if "%2F" in call.path:
            found &= self._slash
        if not found:
            return Judgement("path")
        usable = found & self._callers(call.binaries)
        if not usable:
            return Judgement("binary", self.entries[self._first(found)])
        best = self._first(usable)
        usable &= (1 << self._class_end[best]) - 1
        if usable & self._spoken and call.method not in websocket.STREAM_METHODS:
            return self._judge_body(usable, best, call)
        ruled = self._deny.first(usable, self._index, call, segments, allow=False)
        if ruled is not None:
            return Judgement("deny", self.entries[ruled[0]], ruled[1])
        ruled = self._allow.first(usable, self._index, call, segments, allow=True)
        if ruled is not None:
            return Judgement("allow", self.entries[ruled[0]], ruled[1])
        if call.method == databases.METHOD:
            return Judgement("no rule", self.entries[best])
        audited = usable & (self._audit_streams if call.method in websocket.STREAM_METHODS else self._audit)
        if audited:
            return Judgement("allow", self.entries[self._first(audited)], AUDITED)
        return Judgement("no rule", self.entries[best])

    def _judge_body(self, usable: int, best: int, call: Call) -> Judgement:
        """Return how the endpoints of the bits ``usable``, which all speak one protocol, answer what the body asks for."""
        audit = usable & self._audit
        if usable & ~self._spoken:
            # The loader refuses such a policy; whoever made this one did not ask it.
            return Judgement("body", self.entries[self._first(usable & self._spoken)], body=BodyRefused(_DISAGREE))
        try:
            reading = self._calls[best].read(call.request, call.query)
        except BodyRefused as refused:
            if audit:
                return Judgement("allow", self.entries[self._first(audit)], AUDITED)
            return Judgement("body", self.entries[best], body=refused)
        rules = [(index, self._calls[index]) for index in map(self._index.__getitem__, places_of(usable))]
        denied = first_denied(rules, reading.operations)
        if denied is not None:
            rule = Rule(denied.label, None, "/**", (), names_fetch=False)
            return Judgement("deny", self.entries[denied.place], rule, reading, denied.asked)
        found = [first_allowing(rules, asked) for asked in reading.operations]
        missing = next((asked for asked, rule in zip(reading.operations, found, strict=True) if rule is None), None)
        if missing is not None:
            if audit:
                return Judgement("allow", self.entries[self._first(audit)], AUDITED, reading)
            return Judgement("no rule", self.entries[best], None, reading, missing)
        place, label = next(((r.place, r.label) for r in found if r is not None), (best, reading.form))
        return Judgement("allow", self.entries[place], Rule(label, None, "/**", (), names_fetch=False), reading)

    def _first(self, mask: int) -> int:
        return self._index[(mask & -mask).bit_length() - 1]
