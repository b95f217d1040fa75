"""Bodies that name calls, cut into classes that no rule at hand can tell apart: GraphQL operations, RPC methods and tools.

A batch is allowed when each of its operations would be alone, and classed by the strictest, so single operations stand for all
bodies. What no endpoint of such a protocol reads is one class of its own, for endpoints that do not look into bodies.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote

from saw.policy import globs
from saw.policy.actions import UnitTest
from saw.policy.calls import BodyRefused, CallRule, allow_rules, deny_rules
from saw.policy.casefile import Push
from saw.policy.checks_calls import LARGEST_BODY
from saw.policy.governance import Action
from saw.policy.graphql import envelopes, operation_of
from saw.policy.jsonrpc import Message, messages
from saw.policy.mcp_http import (
    ASSUMED_VERSION,
    CALL_TOOL,
    KNOWN_METHODS,
    MAX_TOOL,
    METHOD_HEADER,
    READ_METHODS,
    SESSION_HEADER,
    TOOL,
    VERSION_HEADER,
    arguments_of,
    options,
    repeated,
    session_form,
    tools_of,
)
from saw.policy.model import CALL_PROTOCOLS, Endpoint, JsonRpcOptions, Match, Operation, Request
from saw.policy.reach_automata import DEAD, Budget, Table, TextClass, TooLarge
from saw.policy.reach_calls_arguments import ArgumentClasses

MAX_FIELD_SETS = 256
"""Most sets of root fields that are told apart."""
MAX_BODIES = 4096
"""Most bodies that are told apart for one path."""

_JSON = {"content-type": "application/json"}
_STREAM = {"accept": "text/event-stream"}
_SESSION = {SESSION_HEADER: "a"}
_STRANGE = "0000-00-00"
"""A revision that no policy lists."""
_OTHER_NAME = {METHOD_HEADER: "-"}
"""A header that names another method than any body."""
_INITIALIZE = "initialize"
_ALNUM = "xyzwvutsrqponmlkjihgfedcba0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTERS = "xyzwvutsrqponmlkjihgfedcba_ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_VISIBLE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in _ALNUM)


class Shape(NamedTuple):
    """A body that stands for a class of them, with what of the request belongs to it."""

    key: object
    body: bytes | None = None
    complete: bool = True
    push: Push | None = None
    model: str = ""
    headers: Mapping[str, str] = {}
    query: str = ""
    argument: str = ""


class Texts(NamedTuple):
    """Globs and words over one kind of text, and the automaton of the texts that there are."""

    kind: str
    found: tuple[str, ...]
    domain: Table


Classes = Callable[[Texts], tuple[TextClass, ...]]
"""Returns the classes of texts, each worked out once."""


@lru_cache(maxsize=2)
def graphql_name(*, absent: bool = False) -> Table:
    """Return the automaton of GraphQL's names, with ``absent`` also of the empty text, which stands for none."""
    rows: list[tuple[dict[str, int], int]] = [(dict.fromkeys("0123456789", DEAD), 1), ({}, 1)]
    return Table(rows, {0, 1} if absent else {1}, _LETTERS + "0123456789")


@lru_cache(maxsize=1)
def rpc_method() -> Table:
    """Return the automaton of RPC methods: visible ASCII."""
    return Table([({}, 1), ({}, 1)], {1}, _ALNUM + _VISIBLE)


@lru_cache(maxsize=2)
def tool_name(*, strict: bool) -> Table:
    """Return the automaton of tool names that are strict, or of those that are not; lengths are not its business."""
    plain = _ALNUM + "_.-"
    if strict:
        return Table([({}, 1), ({}, 1)], {1}, plain)
    others = "".join(char for char in _VISIBLE if char not in plain) + " é"
    return Table([(dict.fromkeys(others, 1), 0), ({}, 1)], {1}, plain + others)


class _Spoken(NamedTuple):
    """An endpoint of the views that looks into bodies, and its rules."""

    endpoint: Endpoint
    rules: tuple[CallRule, ...]
    matches: tuple[Match, ...]


class BodyClasses:
    """The classes of bodies that the endpoints and action rules of one path tell apart."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        actions: Iterable[Action],
        classes: Classes,
        tools: Sequence[str] = (),
        arguments: ArgumentClasses | None = None,
    ) -> None:
        self._classes = classes
        self._spoken = [
            _Spoken(e, (*allow_rules(e), *deny_rules(e)), _matches(e))
            for e in endpoints
            if e.protocol in CALL_PROTOCOLS
        ]
        self._actions = [action.match for action in actions]
        self._arguments = arguments or ArgumentClasses((), Budget())
        self._tools = (*tools, *self._arguments.tools)
        self._tests = [test for test in map(UnitTest.of, self._actions) if test is not None]
        self.protocols = frozenset(found.endpoint.protocol for found in self._spoken)
        self._limits = sorted({_limit(found.endpoint) for found in self._spoken})
        versions = {version for found in self._spoken for version in options(found.endpoint).versions}
        self._versions = sorted(versions)

    # -- sizes

    def _size(self, length: int) -> int:
        return sum(1 for limit in self._limits if limit < length)

    def _padded(self, body: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield each class of sizes and ``body`` in that size; too much beyond all limits is nobody's."""
        for size, limit in enumerate(self._limits):
            least = self._limits[size - 1] + 1 if size else 0
            if len(body) > limit:
                raise TooLarge
            yield size, body.ljust(least)

    # -- the classes

    def shapes(self, method: str) -> list[Shape]:
        """Return one body for each class; the one without a body stands for all that nobody reads."""
        result = [Shape(None)]
        if "graphql" in self.protocols and method in {"GET", "HEAD", "POST"}:
            result += self._graphql(method)
        if self.protocols & {"json-rpc", "mcp"} and method == "POST":
            result += self._rpc()
        if "mcp" in self.protocols and method in {"GET", "DELETE"}:
            result += self._forms(method)
        if len(result) > MAX_BODIES:
            raise TooLarge
        return result

    def keys(self, request: Request, method: str, query: str) -> list[object]:
        """Return the keys of what a request asks for, as :meth:`shapes` gives them."""
        found: list[object] = []
        if "graphql" in self.protocols and method in {"GET", "HEAD", "POST"}:
            found += self._graphql_keys(request, query)
        if not found and self.protocols & {"json-rpc", "mcp"} and method == "POST":
            found += self._rpc_keys(request, query)
        if not found and "mcp" in self.protocols and method in {"GET", "DELETE"}:
            found += self._form_keys(request, method, query)
        return found or [None]

    # -- GraphQL

    def _field_lists(self) -> list[tuple[str, ...]]:
        found = {match.fields for spoken in self._spoken for match in spoken.matches if match.fields}
        return sorted(found | {m.graphql.fields for m in self._actions if m.graphql is not None and m.graphql.fields})

    def _name_lists(self) -> list[tuple[str, ...]]:
        return sorted({(m.operation_name,) for spoken in self._spoken for m in spoken.matches if m.operation_name})

    def _registered(self) -> list[tuple[str, str | None]]:
        """Return hash and name of every way to call a registered query."""
        found: set[tuple[str, str | None]] = set()
        for spoken in self._spoken:
            for digest, query in spoken.endpoint.graphql_persisted_queries.items():
                found |= {(digest, None), (digest, query.operation_name or None)}
        return sorted(found, key=lambda pair: (pair[0], pair[1] or ""))

    def _operations(self) -> Iterator[tuple[tuple[object, ...], Operation]]:
        fields = self._atoms("graphql field", self._field_lists(), graphql_name())
        names = self._atoms("graphql name", self._name_lists(), graphql_name(absent=True))
        if 2 ** len(fields) > MAX_FIELD_SETS:
            raise TooLarge
        sets = itertools.chain.from_iterable(
            itertools.combinations(sorted(fields), size) for size in range(1, len(fields) + 1)
        )
        chosen = [tuple(found) for found in sets]
        for kind, (name, named), found in itertools.product(
            ("query", "mutation", "subscription"), sorted(names.items()), chosen
        ):
            yield (kind, name, found), Operation(kind, named, tuple(fields[atom] for atom in found))

    def _graphql(self, method: str) -> Iterator[Shape]:
        for key, asked in self._operations():
            if method != "POST" and asked.kind != "query":
                continue
            text = f"{asked.kind} {asked.name}{{{' '.join(asked.fields)}}}"
            yield from self._sent(("graphql", *key), {"query": text}, method)
        for digest, name in self._registered():
            sent: dict[str, object] = {"extensions": {"persistedQuery": {"version": 1, "sha256Hash": digest}}}
            if name is not None:
                sent["operationName"] = name
            yield from self._sent(("hash", digest, name), sent, method)

    def _sent(self, key: tuple[object, ...], value: dict[str, object], method: str) -> Iterator[Shape]:
        if method == "POST":
            for size, body in self._padded(_json(value)):
                yield Shape((*key, size), body, headers=_JSON)
            return
        pairs = [(k, v if isinstance(v, str) else _json(v).decode()) for k, v in value.items()]
        query = "&".join(f"{k}={quote(v, safe='')}" for k, v in pairs)
        for size, text in self._padded(query.encode()):
            # A GET is as long as its query; what is missing goes into a variable that nobody asks for.
            more = len(text) - len(query)
            filled = query + (f"&variables={quote(_json({'p': 'x' * more}).decode(), safe='')}" if more else "")
            if self._size(len(filled)) != size:
                raise TooLarge
            yield Shape((*key, size), query=filled)

    def _graphql_keys(self, request: Request, query: str) -> list[object]:
        try:
            sent = envelopes(request, query, LARGEST_BODY)
            post = request.method.upper() == "POST"
            size = self._size(len(request.body or b"") if post else len(query))
            if size == len(self._limits):
                return []
            found: list[object] = []
            for envelope in sent:
                if envelope.text is None:
                    pair = (envelope.digest, envelope.name)
                    found.append(("hash", *pair, size) if pair in self._registered() else None)
                    continue
                asked = operation_of(envelope.text, envelope.name)
                if asked.kind != "query" and not post:
                    return []
                fields = {_on(self._field_lists(), field) for field in asked.fields}
                found.append(("graphql", asked.kind, _on(self._name_lists(), asked.name), tuple(sorted(fields)), size))
        except BodyRefused:
            return []
        return found

    def _atoms(self, kind: str, lists: list[tuple[str, ...]], domain: Table) -> dict[int, str]:
        """Return for every set of lists that a text can be on: such a text."""
        found: dict[int, str] = {}
        for text in self._texts(kind, [glob for one in lists for glob in one], domain):
            found.setdefault(_on(lists, text), text)
        return found

    def _texts(self, kind: str, found: Iterable[str], domain: Table) -> list[str]:
        return [c.text for c in self._classes(Texts(kind, tuple(sorted(set(found))), domain))]

    # -- JSON-RPC and MCP

    def _method_key(self, method: str) -> tuple[object, ...]:
        special = method if "mcp" in self.protocols and method in {_INITIALIZE, CALL_TOOL} else ""
        rules = tuple(rule.is_about(method) for spoken in self._spoken for rule in spoken.rules)
        tests = tuple(not t.kinds or any(p.fullmatch(method) for p in t.kinds) for t in self._tests)
        known = (method in KNOWN_METHODS, method in READ_METHODS) if "mcp" in self.protocols else ()
        return special, rules, tests, known

    def _methods(self) -> dict[tuple[object, ...], str]:
        found = {m.method for spoken in self._spoken for m in spoken.matches if spoken.endpoint.protocol != "graphql"}
        for match in self._actions:
            found |= set(match.mcp.method if match.mcp else ()) | set(match.json_rpc.method if match.json_rpc else ())
        if "mcp" in self.protocols:
            found |= KNOWN_METHODS
        result: dict[tuple[object, ...], str] = {}
        for text in self._texts("rpc method", found - {"*"}, rpc_method()):
            if len(text) <= 128:
                result.setdefault(self._method_key(text), text)
        return result

    def _tool_lists(self) -> list[tuple[str, ...]]:
        found = {tools_of(m) for spoken in self._spoken for m in spoken.matches if spoken.endpoint.protocol == "mcp"}
        found |= {m.mcp.tool for m in self._actions if m.mcp is not None}
        found |= {(tool,) for tool in self._tools}
        return sorted(found - {()})

    def _tool_key(self, tool: str) -> tuple[int, bool]:
        return _on(self._tool_lists(), tool), TOOL.match(tool) is not None

    def _tool_names(self) -> dict[tuple[int, bool], str]:
        globs_ = [glob for one in self._tool_lists() for glob in one]
        result: dict[tuple[int, bool], str] = {}
        for strict in (True, False):
            for text in self._texts(f"tool {strict}", globs_, tool_name(strict=strict)):
                if len(text) <= MAX_TOOL:
                    result.setdefault(self._tool_key(text), text)
        return result

    def _headers(self) -> list[tuple[object, Mapping[str, str]]]:
        """Return the classes of the header that names the revision."""
        if not self._versions:
            return [(None, {})]
        told = [*self._versions, _STRANGE]
        if ASSUMED_VERSION not in told:
            told.append(ASSUMED_VERSION)
        return [(None, {}), *((version, {VERSION_HEADER: version}) for version in told)]

    def _header_key(self, request: Request) -> object:
        told = request.headers.get(VERSION_HEADER)
        if not self._versions or told is None:
            return None
        return told if told in {*self._versions, ASSUMED_VERSION} else _STRANGE

    def _asked(self) -> Iterator[tuple[tuple[object, ...], dict[str, object], str]]:
        """Yield the classes of messages: key, message, and the argument in which it differs from what a side allows."""
        for key, method in sorted(self._methods().items(), key=lambda pair: pair[1]):
            call: dict[str, object] = {"jsonrpc": "2.0", "id": 1, "method": method}
            if key[0] == CALL_TOOL:
                yield (key, "bad"), call, ""
                for tool, name in sorted(self._tool_names().items()):
                    for accepted, sent, argument in self._arguments.of(name):
                        params = {"name": name} if sent is None else {"name": name, "arguments": sent}
                        yield (key, (tool, accepted)), {**call, "params": params}, argument
            elif key[0] == _INITIALIZE:
                yield (key, "bad"), call, ""
                for version in (*self._versions, _STRANGE):
                    yield (key, version), {**call, "params": {"protocolVersion": version}}, ""
            else:
                yield (key, "good"), call, ""
                if "mcp" in self.protocols:
                    yield (key, "bad"), {**call, "params": []}, ""

    def _rpc(self) -> Iterator[Shape]:
        repeats = [(True, {}), (False, _OTHER_NAME)] if "mcp" in self.protocols else [(True, {})]
        for (key, value, argument), (version, headers), (same, told) in itertools.product(
            list(self._asked()), self._headers(), repeats
        ):
            for size, body in self._padded(_json(value)):
                place = ("rpc", *key, version, same, size)
                yield Shape(place, body, headers={**_JSON, **headers, **told}, argument=argument)

    def _rpc_keys(self, request: Request, query: str) -> list[object]:
        try:
            found = messages(request, query, LARGEST_BODY)
        except BodyRefused:
            return []
        if "mcp" in self.protocols and len(found) > 1 and any(m.method == _INITIALIZE for m in found):
            # No MCP endpoint reads such a batch; where a JSON-RPC endpoint does, it is as each of its calls is.
            version: object = _STRANGE if self._versions else None
        else:
            version = self._header_key(request)
        size = self._size(len(request.body or b""))
        if size == len(self._limits):
            return []
        same = "mcp" not in self.protocols or _repeats(request, found)
        return [("rpc", *self._message_key(message), version, same, size) for message in found]

    def _message_key(self, message: Message) -> tuple[object, object]:
        key = self._method_key(message.method)
        params = message.params
        if "mcp" not in self.protocols:
            return key, "good"
        if isinstance(params, list):
            return key, "bad"
        if key[0] == CALL_TOOL:
            name = (params or {}).get("name")
            plain = set(params or {}) <= {"name", "arguments", "_meta", "task"}
            plain = plain and isinstance((params or {}).get("arguments"), dict | None)
            good = plain and isinstance(name, str) and 1 <= len(name) <= MAX_TOOL
            if not good:
                return key, "bad"
            return key, (self._tool_key(str(name)), self._arguments.key(str(name), arguments_of(message) or {}))
        if key[0] == _INITIALIZE:
            wanted = (params or {}).get("protocolVersion")
            if not isinstance(wanted, str):
                return key, "bad"
            return key, wanted if wanted in self._versions else _STRANGE
        return key, "good"

    def _forms(self, method: str) -> Iterator[Shape]:
        form = _STREAM if method == "GET" else _SESSION
        for version, headers in self._headers():
            yield Shape(("form", method, version), headers={**form, **headers})

    def _form_keys(self, request: Request, method: str, query: str) -> list[object]:
        try:
            session_form(request, method, query)
        except BodyRefused:
            return []
        return [("form", method, self._header_key(request))]


def _repeats(request: Request, found: tuple[Message, ...]) -> bool:
    """Return whether the headers that repeat what the body calls say the same."""
    try:
        repeated(request, found)
    except BodyRefused:
        return False
    return True


def _matches(endpoint: Endpoint) -> tuple[Match, ...]:
    return (*(rule.allow for rule in endpoint.rules or ()), *(endpoint.deny_rules or ()))


def _limit(endpoint: Endpoint) -> int:
    if endpoint.protocol == "graphql":
        return endpoint.graphql_max_body_bytes
    if endpoint.protocol == "json-rpc":
        return (endpoint.json_rpc or JsonRpcOptions()).max_body_bytes
    return options(endpoint).max_body_bytes


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _on(lists: Sequence[tuple[str, ...]], text: str) -> int:
    """Return which lists have a glob that ``text`` fits, as the bits of a number."""
    return sum(1 << i for i, one in enumerate(lists) if any(globs.flat_glob(glob).fullmatch(text) for glob in one))


def call_words(endpoint: Endpoint, match: Match | None, label: str) -> tuple[str, ...]:
    """Return which operations a rule is about, in its own words; ``label`` names what an endpoint allows without rules."""
    if match is None:
        return (label,)
    if endpoint.protocol == "graphql":
        words = [match.operation_type or "*", match.operation_name, " ".join(match.fields)]
    else:
        words = [match.method, " ".join(tools_of(match))]
    return (" ".join(filter(None, words)),)
