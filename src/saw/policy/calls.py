"""Endpoints whose calls are named in the body: how a request becomes operations, and which rules fit them.

Order: the form of the request is read (:mod:`saw.policy.graphql`, :mod:`saw.policy.jsonrpc`, :mod:`saw.policy.mcp_http`), then
every operation is put to the deny rules, then every one needs a rule that allows it. A body that is not read whole is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from saw.policy import globs, strict_json
from saw.policy.model import AnyOf, Endpoint, Match, Operation, Request

MAX_DEPTH = 64
"""Deepest nesting of JSON that is read."""
_JSON = re.compile(r"application/json(?:[ \t]*;[ \t]*charset=\"?utf-8\"?)?\Z", re.IGNORECASE)


class BodyRefused(Exception):
    """The request cannot be read as what its endpoint speaks; ``reason`` is one of ``docs/architecture.md``."""

    def __init__(self, detail: str, reason: str = "body_unreadable") -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Reading(NamedTuple):
    """What a request asks for. Without ``operations`` it is one of the protocol's own forms, which ``form`` names.

    ``arguments`` are those of the tools that MCP calls, one for each operation; None for what calls no tool.
    """

    operations: tuple[Operation, ...]
    form: str = ""
    arguments: tuple[Mapping[str, object] | None, ...] = ()


class CallRule(NamedTuple):
    """One allow or deny rule over operations; ``None`` stands for any.

    ``kinds`` are exact, ``kind_globs`` globs; ``names`` and ``fields`` are globs, of which one must fit.
    """

    label: str
    kinds: frozenset[str] | None = None
    kind_globs: tuple[re.Pattern[str], ...] = ()
    names: tuple[re.Pattern[str], ...] | None = None
    fields: tuple[re.Pattern[str], ...] | None = None

    def is_about(self, kind: str) -> bool:
        """Return whether the rule is about operations of ``kind``, whatever else they are."""
        return self.kinds is None or kind in self.kinds or any(glob.fullmatch(kind) for glob in self.kind_globs)

    def fits(self, asked: Operation, *, every: bool) -> bool:
        """Return whether the rule is about ``asked``; ``every`` root field must fit to allow, any one to deny."""
        if not self.is_about(asked.kind):
            return False
        if self.names is not None and not any(pattern.fullmatch(asked.name) for pattern in self.names):
            return False
        if self.fields is None:
            return True
        fitting = (any(pattern.fullmatch(field) for pattern in self.fields or ()) for field in asked.fields)
        return (bool(asked.fields) and all(fitting)) if every else any(fitting)


def texts(value: str | AnyOf | None) -> tuple[str, ...]:
    """Return the globs of a matcher; empty for none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value.any


def patterns(found: Iterable[str]) -> tuple[re.Pattern[str], ...]:
    """Return compiled globs over plain text."""
    return tuple(globs.flat_glob(glob) for glob in found)


def rule_of(label: str, match: Match, endpoint: Endpoint) -> CallRule:
    """Return a rule of ``endpoint`` in the terms of operations."""
    if endpoint.protocol == "graphql":
        kind = match.operation_type or "*"
        return CallRule(
            label,
            None if kind == "*" else frozenset({kind}),
            names=patterns((match.operation_name,)) if match.operation_name else None,
            fields=patterns(match.fields) if match.fields else None,
        )
    if endpoint.protocol == "json-rpc":
        return CallRule(label, None if match.method == "*" else frozenset({match.method}))
    from saw.policy.mcp_http import mcp_rule

    return mcp_rule(label, match, endpoint)


_ACCESS: dict[str, frozenset[str]] = {
    "read-only": frozenset({"query"}),
    "read-write": frozenset({"query", "mutation"}),
    "full": frozenset({"query", "mutation", "subscription"}),
}


def allow_rules(endpoint: Endpoint) -> tuple[CallRule, ...]:
    """Return what an endpoint allows, in order."""
    if endpoint.protocol == "graphql" and endpoint.rules is None:
        return (CallRule(f"access: {endpoint.access}", _ACCESS[endpoint.access]),)
    written = tuple(rule_of(f"rules[{i}]", rule.allow, endpoint) for i, rule in enumerate(endpoint.rules or ()))
    if endpoint.protocol == "mcp":
        from saw.policy.mcp_http import profile_rules

        return (*written, *profile_rules(endpoint))
    return written


def deny_rules(endpoint: Endpoint) -> tuple[CallRule, ...]:
    """Return what an endpoint denies, in order."""
    if endpoint.enforcement == "audit":
        return ()
    return tuple(rule_of(f"deny_rules[{i}]", match, endpoint) for i, match in enumerate(endpoint.deny_rules or ()))


def reader(endpoint: Endpoint) -> Callable[[Request, str], Reading]:
    """Return how requests to ``endpoint`` are read: a function of the request and its canonical query."""
    if endpoint.protocol == "graphql":
        from saw.policy.graphql import reader_of

        return reader_of(endpoint)
    if endpoint.protocol == "json-rpc":
        from saw.policy.jsonrpc import json_rpc_reader

        return json_rpc_reader(endpoint)
    from saw.policy.mcp_http import mcp_reader

    return mcp_reader(endpoint)


class CallRules:
    """What one endpoint says of operations, compiled."""

    __slots__ = ("allow", "deny", "read")

    def __init__(self, endpoint: Endpoint) -> None:
        self.read = reader(endpoint)
        self.allow = allow_rules(endpoint)
        self.deny = deny_rules(endpoint)


class Ruled(NamedTuple):
    """How rules answer: the place of the endpoint whose rule decided, the rule's label, and the operation in question."""

    place: int
    label: str
    asked: Operation | None


def first_denied(rules: Sequence[tuple[int, CallRules]], asked: Iterable[Operation]) -> Ruled | None:
    """Return the first deny rule that is about one of ``asked``, or ``None``."""
    for operation in asked:
        for place, found in rules:
            for rule in found.deny:
                if rule.fits(operation, every=False):
                    return Ruled(place, rule.label, operation)
    return None


def first_allowing(rules: Sequence[tuple[int, CallRules]], asked: Operation) -> Ruled | None:
    """Return the first rule that allows ``asked``, or ``None``."""
    for place, found in rules:
        for rule in found.allow:
            if rule.fits(asked, every=True):
                return Ruled(place, rule.label, asked)
    return None


# ---------------------------------------------------------------- the body


def body_of(request: Request, limit: int) -> bytes:
    """Return the body of a request; raise :class:`BodyRefused` unless all of it is there, plain, JSON and within ``limit``."""
    if not request.body_complete or len(request.body or b"") > limit:
        raise BodyRefused(f"the body is longer than the {limit} bytes that are read", "body_too_large")
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in {"", "identity"}:
        raise BodyRefused(f"the content coding {encoding[:40]!r} is not read; send the body plain")
    kind = request.headers.get("content-type", "")
    if not _JSON.match(kind.strip()):
        raise BodyRefused(f"the content type {kind[:80]!r} is not application/json")
    return request.body or b""


def no_body(request: Request) -> None:
    """Raise :class:`BodyRefused` for a request with a body."""
    if request.body or not request.body_complete:
        raise BodyRefused(f"a {request.method.upper()} with a body can be read in two ways")


def json_depth_within(value: object, left: int = MAX_DEPTH) -> bool:
    """Return whether ``value`` is nested at most ``left`` deep."""
    if left < 0:
        return False
    if isinstance(value, dict):
        return all(json_depth_within(item, left - 1) for item in value.values())
    return all(json_depth_within(item, left - 1) for item in value) if isinstance(value, list) else True


def read_json(raw: bytes | str, limit: int) -> object:
    """Return strict JSON; raise :class:`BodyRefused` for anything that two parsers could read differently."""
    try:
        value = strict_json.loads(raw.encode() if isinstance(raw, str) else raw, limit=limit)
    except (strict_json.NotStrict, UnicodeEncodeError) as error:
        raise BodyRefused(f"not JSON: {error}") from None
    if not json_depth_within(value):
        raise BodyRefused(f"nested deeper than {MAX_DEPTH}")
    return value


def batch(value: object, most: int) -> list[object]:
    """Return the items of a batch, or the one item there is."""
    if not isinstance(value, list):
        return [value]
    if not 0 < len(value) <= most:
        raise BodyRefused(f"a batch of {len(value)}; 1 to {most} are read")
    return value


def lookalikes(value: dict[str, object], known: frozenset[str]) -> None:
    """Raise :class:`BodyRefused` for a key that a parser blind to case would take for one of ``known``."""
    lower = {name.casefold() for name in known}
    for key in value:
        if key not in known and key.casefold() in lower:
            raise BodyRefused(f"the key {key[:40]!r} is read differently by parsers that ignore case")
