"""The action class of an allowed call: ``auto``, ``staged``, ``review`` or ``deny``.

The first rule of ``governance.yaml`` that matches decides; for a push each ref is classed by itself and the strictest class
counts. What no rule names: reads are ``auto``, writes ``review``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from saw.policy import globs, websocket
from saw.policy.calls import patterns
from saw.policy.gitproto import PushUnreadable, RefUpdate, push_updates
from saw.policy.globset import BORDER, BitTable, GlobSet, address_segments, bits_of, path_segments, places_of
from saw.policy.governance import Action, ActionMatch, Governance, duration
from saw.policy.mcp_http import CALL_TOOL
from saw.policy.mcp_http import READ_METHODS as MCP_READS
from saw.policy.model import READ_METHODS, Operation, Request
from saw.policy.tool_rules import ActionClass, Reviewers

_STRICTNESS: Mapping[str, int] = {"auto": 0, "staged": 1, "review": 2, "deny": 3}
RECEIVE_PACK = "receive-pack"
UPLOAD_PACK = "upload-pack"


class Classified(msgspec.Struct, frozen=True):
    """The class of a call, which rule gave it, and what a person should know."""

    action_class: ActionClass
    rule: str
    detail: str = ""


_NO_TOOLS: Mapping[str, Classified] = {}


class ReviewAsked(msgspec.Struct, frozen=True):
    """Who decides on a call of class ``review``, and how long the request stays open (seconds).

    ``reviewers`` is None where no rule names any; ``rule`` is the rule that asks.
    """

    rule: str
    reviewers: Reviewers | None = None
    expires_s: int = 86400


class Unit(NamedTuple):
    """What is classed by itself: an RPC method with its tool, or one root field of a GraphQL operation."""

    kind: str
    name: str = ""

    @property
    def text(self) -> str:
        """Return it in few words."""
        return f"{self.kind} {self.name}".strip()


def units(protocol: str, operations: Iterable[Operation]) -> tuple[Unit, ...]:
    """Return what of ``operations`` is classed by itself, each once."""
    if protocol == "graphql":
        found = [Unit(asked.kind, field) for asked in operations for field in asked.fields or ("",)]
    else:
        found = [Unit(asked.kind, asked.name) for asked in operations]
    return tuple(dict.fromkeys(found))


def reads(protocol: str, unit: Unit) -> bool:
    """Return whether ``unit`` is a read by what its protocol says: ``auto`` where no rule names it."""
    return unit.kind == "query" if protocol == "graphql" else protocol == "mcp" and unit.kind in MCP_READS


def protocol_of(match: ActionMatch) -> str:
    """Return which protocol's operations an action rule names, or ``""``."""
    return next((name for name in ("graphql", "mcp", "json_rpc") if getattr(match, name) is not None), "").replace(
        "_", "-"
    )


class UnitTest(NamedTuple):
    """What an action rule says of units: globs over the kind and the name, of which one each must fit; empty: any."""

    kinds: tuple[re.Pattern[str], ...]
    names: tuple[re.Pattern[str], ...]
    of_tools: bool = False

    @classmethod
    def of(cls, match: ActionMatch) -> UnitTest | None:
        """Return what ``match`` says of units, or ``None`` when it says nothing."""
        if match.graphql is not None:
            return cls(patterns(match.graphql.operation_type), patterns(match.graphql.fields))
        if match.mcp is not None:
            return cls(patterns(match.mcp.method), patterns(match.mcp.tool), bool(match.mcp.tool))
        return None if match.json_rpc is None else cls(patterns(match.json_rpc.method), ())

    def fits(self, unit: Unit) -> bool:
        """Return whether ``unit`` is meant."""
        if self.of_tools and unit.kind != CALL_TOOL:
            return False
        if self.kinds and not any(pattern.fullmatch(unit.kind) for pattern in self.kinds):
            return False
        return not self.names or any(pattern.fullmatch(unit.name) for pattern in self.names)


class _Rule(msgspec.Struct, frozen=True):
    label: str
    unit: UnitTest | None
    ref: re.Pattern[str] | None
    operations: frozenset[str]
    action_class: ActionClass
    reviewers: Reviewers | None
    expires_s: int

    def fits(self, update: RefUpdate | None) -> bool:
        """Return whether the rule is about this change of a ref; without one, whatever it says of refs."""
        if update is None:
            return True
        if self.operations and update.operation not in self.operations:
            return False
        return self.ref is None or self.ref.match("/" + update.ref) is not None


def git_service(method: str, path: str) -> str:
    """Return the smart HTTP service a request runs (``receive-pack``, ``upload-pack``), or ``""``."""
    if method == "POST":
        if path.endswith("/git-receive-pack"):
            return RECEIVE_PACK
        if path.endswith("/git-upload-pack"):
            return UPLOAD_PACK
    return ""


def passes_by_path(governance: Governance, method: str, hosts: Collection[str]) -> bool:
    """Return whether a rule lets calls of ``method`` to one of ``hosts`` pass without a person and without their bodies.

    ``hosts`` are names or globs in lower case. A glob may count for more than it matches.
    """
    for action in governance.actions:
        match, host = action.match, action.match.host.lower()
        if action.class_ not in {"auto", "staged"} or match.git or protocol_of(match):
            continue
        if match.method and method not in _methods(match.method):
            continue
        if any(name == host or not globs.is_exact(name) or globs.host_glob(host).fullmatch(name) for name in hosts):
            return True
    return False


class ActionTable:
    """The action rules, compiled. Immutable."""

    __slots__ = ("_by_place", "_git_globs", "_git_names", "_methods", "_ports", "_protocols", "_services", "_set")

    def __init__(self, governance: Governance) -> None:
        actions = governance.actions
        self._set = GlobSet([address_segments(action.match.host.lower(), action.match.path) for action in actions])
        rules = (_compile(index, action) for index, action in enumerate(actions))
        self._by_place = dict(zip(self._set.accepts, rules, strict=True))
        matches = [(place, action.match) for place, action in zip(self._set.accepts, actions, strict=True)]
        self._ports = self._table((place, [] if m.port is None else [m.port]) for place, m in matches)
        self._services = self._table((place, [m.git.service] if m.git else []) for place, m in matches)
        self._methods = self._table((place, _methods(m.method)) for place, m in matches)
        self._protocols = self._table((place, [p] if (p := protocol_of(m)) else []) for place, m in matches)
        hosts = dict.fromkeys(m.host.lower() for _, m in matches if m.git)
        self._git_names = frozenset(host for host in hosts if globs.is_exact(host))
        self._git_globs = tuple(globs.host_glob(host) for host in hosts if not globs.is_exact(host))

    def _table(self, wanted: Iterable[tuple[int, Iterable[Hashable]]]) -> BitTable:
        """Return which rules each key fits; a rule that names no key fits all of them."""
        places: dict[Hashable, list[int]] = {}
        everything: list[int] = []
        for place, keys in wanted:
            named = list(keys)
            if not named:
                everything.append(place)
            for key in named:
                places.setdefault(key, []).append(place)
        width = self._set.width
        return BitTable(places, width, bits_of(everything, width))

    def is_git_host(self, host: str) -> bool:
        """Return whether an action rule says that ``host`` speaks Git."""
        return host in self._git_names or any(pattern.fullmatch(host) for pattern in self._git_globs)

    def _about(self, request: Request, host: str, path: str, service: str, protocol: str = "") -> list[_Rule]:
        """Return the rules that are about this call, whatever they say of refs or operations, in order."""
        if not self._by_place:
            return []
        found = self._ports.get(request.port) & self._services.get(service) & self._methods.get(_method(request))
        found &= self._protocols.get(protocol)
        if found:
            segments = [*host.split("."), BORDER, *path_segments(path)]
            found &= self._set.walk(self._set.start, segments)
        return [self._by_place[place] for place in places_of(found)]

    def classify(self, request: Request, host: str, path: str, *, fetch_is_read: bool) -> Classified:
        """Return the class of an allowed ``request``; ``path`` is canonical and without the query.

        ``fetch_is_read``: the policy knows that a POST to ``git-upload-pack`` is a fetch here; so do rules about Git there.
        """
        method = _method(request)
        service = git_service(method, path)
        if service == RECEIVE_PACK:
            return self._push(request, host, path)
        for rule in self._about(request, host, path, service):
            return Classified(rule.action_class, rule.label)
        if method in READ_METHODS or (service == UPLOAD_PACK and (fetch_is_read or self.is_git_host(host))):
            return Classified("auto", "default: reads are auto")
        return Classified("review", "default: writes are reviewed")

    def classify_body(
        self,
        request: Request,
        host: str,
        path: str,
        protocol: str,
        operations: tuple[Operation, ...],
        *,
        tools: Mapping[str, Classified] = _NO_TOOLS,
    ) -> Classified:
        """Return the class of an allowed ``request`` whose body asks for ``operations``; the strictest of them counts.

        ``tools`` are classes that tools have by themselves: where an action rule is about one too, the stricter class counts.
        """
        rules = self._about(request, host, path, "", protocol)
        found = [self._of_unit(rules, protocol, unit, tools) for unit in units(protocol, operations)]
        if not found:
            rule = next((rule for rule in rules if rule.unit is None), None)
            if rule is not None:
                return Classified(rule.action_class, rule.label)
            return Classified("auto", "default: a session's own stream and end are auto")
        return max(found, key=lambda classified: _STRICTNESS[classified.action_class])

    @staticmethod
    def _of_unit(rules: list[_Rule], protocol: str, unit: Unit, tools: Mapping[str, Classified]) -> Classified:
        rule = next((rule for rule in rules if rule.unit is None or rule.unit.fits(unit)), None)
        own = tools.get(unit.name) if unit.kind == CALL_TOOL else None
        if rule is not None:
            found = Classified(rule.action_class, rule.label, unit.text)
            return own if own is not None and _STRICTNESS[own.action_class] > _STRICTNESS[rule.action_class] else found
        if own is not None:
            return own
        if reads(protocol, unit):
            return Classified("auto", "default: reads are auto", unit.text)
        return Classified("review", "default: writes are reviewed", unit.text)

    def body_reviews(
        self,
        request: Request,
        host: str,
        path: str,
        protocol: str,
        operations: tuple[Operation, ...],
        *,
        tools: Mapping[str, Classified] = _NO_TOOLS,
    ) -> tuple[ReviewAsked, ...]:
        """Return who must decide on a call that :meth:`classify_body` calls ``review``; each different answer once."""
        rules = self._about(request, host, path, "", protocol)
        by_label = {rule.label: rule for rule in rules}
        asked: dict[object, ReviewAsked] = {}
        found = [self._of_unit(rules, protocol, unit, tools) for unit in units(protocol, operations)]
        for classified in found or [self.classify_body(request, host, path, protocol, operations)]:
            if classified.action_class != "review":
                continue
            rule = by_label.get(classified.rule)
            if rule is None:
                asked.setdefault(None, ReviewAsked(classified.rule))
            else:
                one = ReviewAsked(rule.label, rule.reviewers, rule.expires_s)
                asked.setdefault((one.reviewers, one.expires_s), one)
        return tuple(asked.values())

    def reviews(self, request: Request, host: str, path: str) -> tuple[ReviewAsked, ...]:
        """Return who must decide on a call that :meth:`classify` calls ``review``; each different answer once.

        A push asks for every ref that is reviewed; raises :class:`PushUnreadable` for one that cannot be read.
        """
        service = git_service(request.method.upper(), path)
        rules = self._about(request, host, path, service)
        if service == RECEIVE_PACK:
            updates = _updates(request)
            found = [next((rule for rule in rules if rule.fits(update)), None) for update in updates]
        else:
            found = [next(iter(rules), None)]
        asked: dict[object, ReviewAsked] = {}
        for rule in found:
            if rule is None:
                asked.setdefault(None, ReviewAsked("default: writes are reviewed"))
            elif rule.action_class == "review":
                one = ReviewAsked(rule.label, rule.reviewers, rule.expires_s)
                asked.setdefault((one.reviewers, one.expires_s), one)
        return tuple(asked.values())

    def _push(self, request: Request, host: str, path: str) -> Classified:
        try:
            updates = _updates(request)
        except PushUnreadable as error:
            return Classified("deny", "git receive-pack", f"the push cannot be read: {error}")
        strictest = Classified("auto", "git probe", "flush packet without commands")
        rules = self._about(request, host, path, RECEIVE_PACK)
        for update in updates:
            detail = f"{update.operation} of {update.ref}"
            rule = next((rule for rule in rules if rule.fits(update)), None)
            if rule is not None:
                found = Classified(rule.action_class, rule.label, detail)
            else:
                found = Classified("review", "default: writes are reviewed", detail)
            if strictest.rule == "git probe" or _STRICTNESS[found.action_class] > _STRICTNESS[strictest.action_class]:
                strictest = found
        return strictest


def _updates(request: Request) -> tuple[RefUpdate, ...]:
    encoding = request.headers.get("content-encoding", "")
    return push_updates(request.body, complete=request.body_complete, encoding=encoding)


def _method(request: Request) -> str:
    """Return the method that rules know a call by; that of a message on a WebSocket, whichever its kind."""
    return websocket.TEXT if request.message else request.method.upper()


def _methods(written: tuple[str, ...]) -> set[str]:
    """Return the methods that a rule is about: HEAD where GET is."""
    return {*written, "HEAD"} if "GET" in written else set(written)


def _compile(index: int, action: Action) -> _Rule:
    match = action.match
    git = match.git
    return _Rule(
        label=f"actions[{index}]",
        unit=UnitTest.of(match),
        ref=globs.ref_glob(git.ref) if git and git.ref != "**" else None,
        operations=frozenset(git.operation) if git else frozenset(),
        action_class=action.class_,
        reviewers=action.reviewers,
        expires_s=duration(action.expires),
    )
