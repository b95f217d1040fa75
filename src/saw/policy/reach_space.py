"""All calls there are, cut into cells that no rule of the bundles at hand can tell apart.

A cell is one class of host, path, executables, query and body, for one port, scheme and method. Its representative is a real
request; what the matcher says on it, it says on the whole cell. So the matcher stays the only definition of the rules.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple
from urllib.parse import quote

from saw.policy import databases, globs
from saw.policy.actions import RECEIVE_PACK, git_service
from saw.policy.casefile import Push, push_body
from saw.policy.errors import NotCanonical
from saw.policy.gitproto import PushUnreadable, push_updates
from saw.policy.inference import _GET, _POST, Unreadable, requested_model
from saw.policy.matcher import parse_query
from saw.policy.model import CALL_PROTOCOLS, AnyOf, Match, Request
from saw.policy.paths import canonicalise_path
from saw.policy.reach_automata import Budget, Glob, Table, TextClass, TooLarge, partition
from saw.policy.reach_bodies import BodyClasses, Shape, Texts
from saw.policy.reach_calls_arguments import ArgumentClasses
from saw.policy.reach_domains import (
    LONGEST_REF,
    absolute_path,
    any_text,
    canonical_path,
    git_ref,
    host_name,
    query_value,
)
from saw.policy.reach_models import holding
from saw.policy.reach_side import PathView, Side
from saw.policy.websocket import MESSAGES, OPEN, PROTOCOL, STREAM_METHODS

STANDARD = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
OTHER = "OTHER"
"""Stands for all methods that no rule names."""
OPERATIONS: tuple[Literal["create", "update", "delete"], ...] = ("create", "update", "delete")
MAX_QUERIES = 512
"""Most shapes of a query that are tried for one path."""
MAX_CHAINS = 256
"""Most sets of executables that are told apart for one path."""

Key = tuple[object, ...]
"""Where a cell lies: port, host, path, scheme, method, executables, query, body. A prefix stands for all below it."""


class Extra(NamedTuple):
    """Further globs that cells must respect, besides those of the bundles."""

    hosts: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    refs: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()


class Cell(NamedTuple):
    """One cell: its key, a request that stands for it, and the ref and operation or the model that its body names.

    ``argument`` is that of a tool in which its rules differ on the two sides, for cells that stand for such a difference.
    """

    key: Key
    request: Request
    push: Push | None = None
    model: str = ""
    argument: str = ""


class Patterns:
    """Globs and exact words over one kind of text, and the classes that they make."""

    def __init__(
        self, found: Sequence[str], compile_: Callable[[str], Glob], fits: Callable[[str, str], bool], domain: Table
    ) -> None:
        self.globs = tuple(sorted({glob for glob in found if not globs.is_exact(glob)}))
        self.words = frozenset(found) - set(self.globs)
        self._compile = compile_
        self._fits = fits
        self._domain = domain

    def classes(self, budget: Budget) -> tuple[TextClass, ...]:
        """Return the classes of texts, words included where the domain has them."""
        return partition([self._compile(g) for g in self.globs], self._domain, sorted(self.words), budget)

    def key(self, text: str) -> str | int:
        """Return the class of ``text``: the word itself, or a mask of the globs that accept it."""
        if text in self.words:
            return text
        return sum(1 << index for index, glob in enumerate(self.globs) if self._fits(glob, text))


def class_key(found: TextClass) -> str | int:
    """Return the key of a class, as :meth:`Patterns.key` gives it for its texts."""
    return found.mask if found.word is None else found.word


def _compile_path(glob: str) -> Glob:
    if glob.startswith("ends:"):
        return Glob.ending(glob[6:])
    return Glob.holding(glob[6:]) if glob.startswith("with:") else Glob.path(glob)


def _path_fits(glob: str, path: str) -> bool:
    if glob.startswith("ends:"):
        return path.endswith(glob[6:])
    return glob[6:] in path if glob.startswith("with:") else globs.path_glob(glob).match(path) is not None


def _host_fits(glob: str, host: str) -> bool:
    return globs.host_glob(glob).fullmatch(host) is not None


def _flat_fits(glob: str, text: str) -> bool:
    return globs.flat_glob(glob).fullmatch(text) is not None


def _ref_fits(glob: str, ref: str) -> bool:
    return globs.path_glob(glob).match(ref) is not None


# What the matcher looks at besides the written globs; the mark * keeps them among the globs.
_GIT = ("ends:*/git-receive-pack", "ends:*/git-upload-pack")
_SLASH = "with:*%2F"
_MESSAGE = {method: message for message, method in MESSAGES.items()}


class Space:
    """The cells of one or two bundles."""

    def __init__(self, sides: Sequence[Side], budget: Budget, extra: Extra | None = None) -> None:
        self.sides = tuple(sides)
        self.budget = budget
        self.extra = extra or Extra()
        self._hosts: dict[int, Patterns] = {}
        self._paths: dict[tuple[str, int], Patterns] = {}
        self._classes: dict[tuple[object, ...], tuple[TextClass, ...]] = {}

    def ports(self) -> list[int]:
        """Return every port that a side reaches."""
        return sorted(set[int]().union(*(side.ports() for side in self.sides)))

    # ---------------------------------------------------------------- hosts and paths

    def _host_patterns(self, port: int) -> Patterns:
        known = self._hosts.get(port)
        if known is None:
            found = set(self.extra.hosts)
            for side in self.sides:
                names, patterns = side.hosts(port)
                found |= names | patterns
            known = self._hosts[port] = Patterns(sorted(found), Glob.host, _host_fits, host_name())
        return known

    def hosts(self, port: int) -> Iterator[tuple[str | int, str]]:
        """Yield key and representative of each class of hosts that a side reaches on ``port``."""
        patterns = self._host_patterns(port)
        covered = {word for word in patterns.words if any(_host_fits(glob, word) for glob in patterns.globs)}
        for word in sorted(patterns.words - covered):
            if any(side.reaches(word, port) for side in self.sides):
                yield word, word
        if patterns.globs:
            automata = [Glob.host(glob) for glob in patterns.globs]
            for found in partition(automata, host_name(), sorted(covered), self.budget):
                if any(side.reaches(found.text, port) for side in self.sides):
                    yield class_key(found), found.text

    def _path_patterns(self, host: str, port: int) -> Patterns:
        known = self._paths.get((host, port))
        if known is not None:
            return known
        found = {*_GIT, *self.extra.paths}
        encoded = False
        for side in self.sides:
            for placed in side.candidates(host, port):
                endpoint = placed.endpoint
                encoded = encoded or endpoint.allow_encoded_slash
                found |= {endpoint.path} if endpoint.path else set()
                found |= {rule.allow.path for rule in endpoint.rules or ()}
                found |= {match.path for match in endpoint.deny_rules or ()}
            found |= set(side.servers(host, port))
            found |= {action.match.path for _, action in side.actions(host, port)}
            found |= {glob for glob, _ in side.credentials(host, port)}
            if (host, port) in side.routes:
                found |= _POST | _GET
        if encoded:
            found.add(_SLASH)
        found.discard("/**")
        domain = canonical_path(encoded_slash=encoded)
        known = self._paths[host, port] = Patterns(sorted(found), _compile_path, _path_fits, domain)
        return known

    def paths(self, host: str, port: int) -> list[tuple[str | int, str]]:
        """Return key and representative of each class of canonical paths at ``host``."""
        patterns = self._path_patterns(host, port)
        return [(class_key(found), found.text) for found in self.classes("path", patterns)]

    def classes(self, kind: str, patterns: Patterns) -> tuple[TextClass, ...]:
        """Return the classes of ``patterns`` over one ``kind`` of text; the same question is worked out once."""
        name = (kind, patterns.globs, patterns.words)
        known = self._classes.get(name)
        if known is None:
            known = self._classes[name] = patterns.classes(self.budget)
        return known

    def look(self, host: str, port: int) -> None:
        """Pay for one :meth:`views`, which puts the path to every rule."""
        patterns = self._path_patterns(host, port)
        self.budget.spend(1 + (len(patterns.globs) + len(patterns.words)) // 4)

    def views(self, host: str, port: int, path: str) -> tuple[PathView, ...]:
        """Return what bears on ``path``, for each side."""
        return tuple(side.view(host, port, path) for side in self.sides)

    # ---------------------------------------------------------------- cells of one path

    def cells(self, prefix: Key, host: str, port: int, path: str) -> Iterator[Cell]:
        """Yield the cells of one class of paths; raises :class:`TooLarge` when there are too many."""
        local = _Local(self, host, port, path)
        plain = {(host, port) in side.plain for side in self.sides if side.reaches(host, port)}
        schemes = [scheme for scheme in ("https", "http") if (scheme == "http") in plain]
        chains = sorted(local.chains().items())
        queries = local.queries()
        for method in (*local.methods(), *local.streams()):
            name = local.unnamed() if method == OTHER else "GET" if method in databases.LASTING else method
            upgrade, message = ("websocket", _MESSAGE[method]) if method in STREAM_METHODS else ("", "")
            if method == databases.METHOD:
                upgrade = databases.UPGRADE
            bodies = local.bodies(method)
            for scheme, (bits, chain), (state, query) in itertools.product(schemes, chains, queries):
                for shape in bodies:
                    self.budget.spend(8)
                    asked = "&".join(filter(None, (query, shape.query)))
                    request = Request(
                        scheme=scheme,
                        host=host,
                        port=port,
                        method=name,
                        path=f"{path}?{asked}" if asked else path,
                        binary=chain[0],
                        ancestors=chain[1:],
                        headers=shape.headers,
                        body=shape.body,
                        body_complete=shape.complete,
                        upgrade=upgrade,
                        message=message,
                    )
                    key = (*prefix, scheme, method, bits, state, shape.key)
                    yield Cell(key, request, shape.push, shape.model, shape.argument)

    def locate(self, request: Request) -> list[Key]:
        """Return the cells of ``request``, one for each ref of a push; none when every matcher refuses its form."""
        host = request.host.lower()
        try:
            target = canonicalise_path(request.path, allow_encoded_slash=True)
        except NotCanonical:
            return []
        path, _, query = target.partition("?")
        patterns = self._path_patterns(host, request.port)
        prefix = (request.port, self._host_patterns(request.port).key(host), patterns.key(path))
        local = _Local(self, host, request.port, path)
        scheme = "https" if request.scheme == "https" else "http"
        method = request.method.upper()
        if request.upgrade:
            method = MESSAGES.get(request.message, OPEN)
            if databases.is_session(request.upgrade):
                method = databases.METHOD
        elif method not in local.methods():
            method = OTHER
        binaries = (request.binary, *request.ancestors) if request.binary else request.ancestors
        state = local.query_state(query)
        return [
            (*prefix, scheme, method, local.bits(binaries), state, key)
            for key in local.body_keys(request, method, query)
        ]


class _Local:
    """What is told apart at one host, port and path."""

    def __init__(self, space: Space, host: str, port: int, path: str) -> None:
        self.space = space
        self.path = path
        self.views = space.views(host, port, path)
        self.route = any((host, port) in side.routes for side in space.sides)
        self.lists = sorted({placed.binaries for view in self.views for placed, _, _ in view.endpoints})
        found = {binary for binaries in self.lists for binary in binaries}
        self.binaries = Patterns(sorted(found), Glob.path, _path_fits, absolute_path())
        endpoints = [placed.endpoint for view in self.views for placed, _, _ in view.endpoints]
        actions = [action for view in self.views for _, action in view.actions]
        tables = [view.tools for view in self.views if view.tools is not None]
        arguments = ArgumentClasses(tables, space.budget)
        self.spoken = BodyClasses(endpoints, actions, self._texts, space.extra.tools, arguments)

    def _texts(self, texts: Texts) -> tuple[TextClass, ...]:
        return self.space.classes(texts.kind, Patterns(texts.found, Glob.flat, _flat_fits, texts.domain))

    def _matches(self) -> Iterator[Match]:
        """Yield the rules that are about method, path and query."""
        for view in self.views:
            for placed, allow, deny in view.endpoints:
                if placed.endpoint.protocol not in CALL_PROTOCOLS:
                    yield from allow or ()
                    yield from deny

    # -- methods

    def methods(self) -> tuple[str, ...]:
        """Return the methods that some rule may name, and :data:`OTHER` for the rest."""
        named = {match.method.upper() for match in self._matches()} - {"*"}
        named |= {method for view in self.views for _, action in view.actions for method in action.match.method}
        named |= {method for view in self.views for methods, _ in view.secrets for method in methods}
        return (*STANDARD, *sorted(named - set(STANDARD) - databases.LASTING), OTHER)

    def streams(self) -> tuple[str, ...]:
        """Return what may be asked about WebSockets and sessions here: nothing where no endpoint is about them."""
        spoken = {placed.endpoint.protocol for view in self.views for placed, _, _ in view.endpoints}
        sessions = (databases.METHOD,) if databases.PROTOCOL in spoken else ()
        return (*MESSAGES.values(), *sessions) if PROTOCOL in spoken else sessions

    def unnamed(self) -> str:
        """Return a method that no rule names."""
        known = self.methods()
        return next(
            name for name in ("PROPFIND", "REPORT", *(f"X-{'A' * n}" for n in range(1, 20))) if name not in known
        )

    # -- executables

    def bits(self, binaries: Sequence[str]) -> int:
        """Return which lists of executables hold one of ``binaries``."""
        return sum(
            1 << index
            for index, accepted in enumerate(self.lists)
            if any(glob == binary or _binary_fits(glob, binary) for glob in accepted for binary in binaries)
        )

    def chains(self) -> dict[int, tuple[str, ...]]:
        """Return for every set of lists that a process and its parents can be on: such a process, nearest first."""
        # A route takes calls of every process, an endpoint only those of its lists.
        if self.route and not self.lists:
            return {0: ("/usr/bin/curl",)}
        single: dict[int, tuple[str, ...]] = {}
        for found in self.space.classes("binary", self.binaries):
            single.setdefault(self.bits((found.text,)), (found.text,))
        if not self.route:
            single.pop(0, None)
        result = dict(single)
        pending = sorted(result)
        while pending:
            bits = pending.pop()
            for more, chain in single.items():
                if bits | more not in result:
                    result[bits | more] = (*result[bits], *chain)
                    pending.append(bits | more)
            if len(result) > MAX_CHAINS:
                raise TooLarge
        return result

    # -- queries

    def _constraints(self) -> dict[str, list[tuple[str, ...]]]:
        found: dict[str, set[tuple[str, ...]]] = {}
        for match in self._matches():
            for key, value in match.query.items():
                if _sendable(key):
                    found.setdefault(key, set()).add(value.any if isinstance(value, AnyOf) else (value,))
        return {key: sorted(constraints) for key, constraints in sorted(found.items())}

    def queries(self) -> list[tuple[object, str]]:
        """Return state and text of every query that some rule tells apart; one without a query where none does."""
        constraints = self._constraints()
        if not constraints:
            return [((), "")]
        states: list[list[tuple[tuple[int, ...], tuple[tuple[str, str], ...]]]] = []
        total = 1
        for key, lists in constraints.items():
            patterns = Patterns([g for glob_list in lists for g in glob_list], Glob.flat, _flat_fits, query_value())
            atoms: dict[int, str] = {}
            for found in self.space.classes("query", patterns):
                atoms.setdefault(_on_lists(lists, found.text), found.text)
            total *= 2 ** len(atoms)
            if total > MAX_QUERIES:
                raise TooLarge
            chosen = itertools.chain.from_iterable(
                itertools.combinations(sorted(atoms), size) for size in range(len(atoms) + 1)
            )
            states.append([(subset, tuple((key, atoms[atom]) for atom in subset)) for subset in chosen])
        result: list[tuple[object, str]] = [
            (
                tuple(subset for subset, _ in combination),
                "&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for _, pairs in combination for k, v in pairs),
            )
            for combination in itertools.product(*states)
        ]
        return [*result, (None, "a;b")]

    def query_state(self, query: str) -> object:
        """Return the state of ``query`` (canonical), as :meth:`queries` numbers them."""
        constraints = self._constraints()
        if not constraints:
            return ()
        values = parse_query(query)
        if values is None:
            return None
        return tuple(
            tuple(sorted({_on_lists(lists, value) for value in values.get(key, ())}))
            for key, lists in constraints.items()
        )

    # -- bodies

    def _refs(self) -> Patterns:
        found = {"/" + ref for ref in self.space.extra.refs}
        for view in self.views:
            for _, action in view.actions:
                if action.match.git is not None and action.match.git.service == RECEIVE_PACK:
                    found.add("/" + action.match.git.ref)
        return Patterns(sorted(found), Glob.path, _ref_fits, git_ref())

    def _models(self) -> Patterns:
        routes = [view.route for view in self.views if view.route is not None]
        found = [glob for route in routes for way in route.ways for glob in (*way.models, *way.aliases)]
        found += [glob for route in routes for price in route.prices for glob in price.models]
        return Patterns(found, Glob.flat, _flat_fits, any_text())

    def bodies(self, method: str) -> list[Shape]:
        """Return a body for each class that some rule tells apart: refs of a push, models, or what a body asks for."""
        if self.route and method == "POST" and self.path in _POST:
            models = self._models()
            return [
                Shape((class_key(c), key), json.dumps({"model": c.text}).encode(), model=c.text, headers=headers)
                for c in self.space.classes("model", models)
                for key, headers in holding(self.views)
            ]
        result = self.spoken.shapes(method)
        if self.route:
            result += [Shape(("holds", key), headers=headers) for key, headers in holding(self.views) if key]
        if self._constraints() and any(shape.query for shape in result):
            raise TooLarge
        if git_service(method, self.path) != RECEIVE_PACK:
            return result
        refs = self._refs()
        result.append(Shape("probe", b"0000"))
        for found in self.space.classes("ref", refs):
            if len(found.text) > LONGEST_REF:
                continue
            for operation in OPERATIONS:
                push = Push(found.text[1:], operation)
                result.append(Shape((class_key(found), operation), push_body((push,)), False, push))
        return result if self.spoken.protocols else result[1:]

    def body_keys(self, request: Request, method: str, query: str) -> list[object]:
        """Return the keys of a request's body, as :meth:`bodies` gives them; none for one that is never allowed."""
        encoding = request.headers.get("content-encoding", "")
        if self.route and method == "POST" and self.path in _POST:
            try:
                model = requested_model(request.body, complete=request.body_complete, encoding=encoding)
            except Unreadable:
                return []
            return [(self._models().key(model), key) for key, _ in holding(self.views)]
        if self.route:
            more = [("holds", key) for key, _ in holding(self.views) if key]
            return [*self.spoken.keys(request, method, query), *more]
        if git_service(method, self.path) != RECEIVE_PACK:
            return self.spoken.keys(request, method, query)
        try:
            updates = push_updates(request.body, complete=request.body_complete, encoding=encoding)
        except PushUnreadable:
            return self.spoken.keys(request, method, query) if self.spoken.protocols else []
        refs = self._refs()
        return [(refs.key("/" + update.ref), update.operation) for update in updates] or ["probe"]


def _binary_fits(glob: str, binary: str) -> bool:
    return not globs.is_exact(glob) and globs.path_glob(glob).match(binary) is not None


def _on_lists(lists: Sequence[tuple[str, ...]], value: str) -> int:
    return sum(1 << i for i, accepted in enumerate(lists) if any(_flat_fits(glob, value) for glob in accepted))


def _sendable(key: str) -> bool:
    """Return whether a canonical query can hold ``key``."""
    if "\\" in key or any(char < " " or char == "\x7f" for char in key):
        return False
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True
