"""What a sponsor hands to an agent for one engagement, and that a part of it can be handed on but never more.

A delegation only narrows: a call needs the policy's consent first, and then a delegation that covers it. A record that is
made from another one (``parent``) lies within it: :func:`wider` names everything that does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Literal

import msgspec

from saw import jsontext
from saw.errors import SawError
from saw.policy import globs
from saw.policy.actions import UPLOAD_PACK, git_service
from saw.policy.model import READ_METHODS, Part
from saw.policy.reach_automata import Automaton, Budget, Glob, Table, TooLarge, partition
from saw.policy.reach_domains import any_text, canonical_path, host_name

FORMAT: Literal["saw-delegation/1"] = "saw-delegation/1"
STATEMENT_TYPE = "saw-delegation+jws"
"""``typ`` of the JWS that carries a record."""
MAX_RECORD = 32 * 1024
"""Largest record (bytes)."""
MAX_DEPTH = 8
"""Most records in a line from the sponsor's own to the last one made from it."""

Approval = Literal["policy", "review", "read-only"]
_BOUND: dict[str, int] = {"read-only": 0, "review": 1, "policy": 2}
_METHOD = re.compile(r"[A-Z][A-Z-]{0,31}|WEBSOCKET_TEXT")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,255}")
_CLASS = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
MAX_CLASSES = 16
"""Most classes of data that a record brings."""
MAX_TOOLS = 64
"""Most entries of ``tools``, and most globs in one of them."""


class DelegationInvalid(SawError):
    """A delegation record cannot be used; ``details`` lists the ``problems``."""

    code = "delegation_invalid"


class Resource(Part, frozen=True):
    """Calls to a host that the agent may make. ``methods`` empty means every method; globs are those of the policy."""

    host: str
    ports: tuple[int, ...] = (443,)
    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ("/**",)


class Tools(Part, frozen=True):
    """Tools of MCP servers that the agent may call: globs over the names that the policy gives to servers, and over tools."""

    server: str
    tools: tuple[str, ...] = ("*",)


class Delegation(Part, frozen=True):
    """One record. Times are RFC 3339 with zone; ``parent`` is the id of the record it was made from, or empty.

    ``approval`` bounds what the agent may do on its own: ``policy`` as the policy's action classes say, ``review`` every
    write waits for a person, ``read-only`` no write at all. ``tools``, where it is there, names every tool of MCP servers that
    may be called, over HTTP and over stdio; absent it says nothing of tools, and an empty list is none. An absent one is not
    written either, so that a record without it has the bytes, and the readers, that it always had. ``data_classes``, written in
    the same way, are classes of data that the engagement brings: while the record counts, every call of a model holds them too.
    """

    format: Literal["saw-delegation/1"]
    id: str
    sponsor: str
    workspace: str
    agent: str
    task: str
    resources: tuple[Resource, ...]
    not_before: datetime
    expires: datetime
    approval: Approval = "policy"
    parent: str = ""
    tools: tuple[Tools, ...] | msgspec.UnsetType = msgspec.UNSET
    data_classes: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the classes of data that the engagement brings."""
        return () if self.data_classes is msgspec.UNSET else self.data_classes

    def live(self, now: datetime) -> bool:
        """Return whether the record counts at ``now``."""
        return self.not_before <= now < self.expires


def parse_delegation(raw: bytes) -> Delegation:
    """Read a record strictly; raise :class:`DelegationInvalid` with every problem."""
    if len(raw) > MAX_RECORD:
        raise DelegationInvalid(f"the delegation has {len(raw)} bytes", cure=f"keep it below {MAX_RECORD}")
    try:
        record = jsontext.decode(raw, kind=Delegation)
    except msgspec.DecodeError as error:
        raise DelegationInvalid(f"the delegation is not valid: {error}", cure="correct the named field") from error
    check_delegation(record)
    return record


def check_delegation(record: Delegation) -> None:
    """Raise :class:`DelegationInvalid` that names every field which cannot be used."""
    problems = [
        f"{name} must be 1 to 256 characters of letters, digits and . _ @ : -"
        for name in ("id", "sponsor", "workspace", "agent")
        if not _LABEL.fullmatch(getattr(record, name))
    ]
    if record.parent and not _LABEL.fullmatch(record.parent):
        problems.append("parent is not the id of a record")
    if not 1 <= len(record.task) <= 2000 or not record.task.isprintable():
        problems.append("task must be 1 to 2000 printable characters")
    if record.not_before.tzinfo is None or record.expires.tzinfo is None:
        problems.append("not_before and expires need a zone")
    elif record.not_before >= record.expires:
        problems.append("expires must be after not_before")
    if not 1 <= len(record.resources) <= 64:
        problems.append("resources must list 1 to 64 resources")
    for index, resource in enumerate(record.resources):
        problems += [f"resources[{index}]: {text}" for text in _resource_problems(resource)]
    if record.tools is not msgspec.UNSET:
        problems += _tools_problems(record.tools)
    if len(record.classes) > MAX_CLASSES:
        problems.append(f"data_classes must be at most {MAX_CLASSES}")
    problems += [f"{name[:64]!r} is not a class of data" for name in record.classes if not _CLASS.fullmatch(name)]
    if problems:
        raise DelegationInvalid(
            "the delegation cannot be used: " + "; ".join(problems),
            cure="correct the named fields",
            details={"problems": problems},
        )


def _resource_problems(resource: Resource) -> list[str]:
    problems = []
    try:
        globs.host_glob(resource.host)
    except globs.GlobError as error:
        problems.append(f"host {resource.host[:64]!r}: {error}")
    if not 1 <= len(resource.ports) <= 16 or not all(0 < port < 65536 for port in resource.ports):
        problems.append("ports must list 1 to 16 ports")
    if len(resource.methods) > 16 or not all(_METHOD.fullmatch(method) for method in resource.methods):
        problems.append("methods must be at most 16 upper-case HTTP methods")
    if not 1 <= len(resource.paths) <= 32:
        problems.append("paths must list 1 to 32 path globs")
    for path in resource.paths:
        try:
            globs.path_glob(path)
        except globs.GlobError as error:
            problems.append(f"path {path[:64]!r}: {error}")
    return problems


def _tools_problems(tools: Sequence[Tools]) -> list[str]:
    problems = [f"tools must list at most {MAX_TOOLS} servers"] if len(tools) > MAX_TOOLS else []
    for index, entry in enumerate(tools):
        if not 1 <= len(entry.tools) <= MAX_TOOLS:
            problems.append(f"tools[{index}]: tools must list 1 to {MAX_TOOLS} globs")
        for glob in (entry.server, *entry.tools):
            try:
                globs.flat_glob(glob)
            except globs.GlobError as error:
                problems.append(f"tools[{index}]: {glob[:64]!r}: {error}")
    return problems


class ToolScope:
    """The tools of a record, compiled. Immutable."""

    __slots__ = ("_parts",)

    def __init__(self, tools: Sequence[Tools] | msgspec.UnsetType) -> None:
        self._parts = (
            None
            if tools is msgspec.UNSET
            else tuple((globs.flat_glob(part.server), tuple(map(globs.flat_glob, part.tools))) for part in tools)
        )

    def covers(self, server: str, tool: str) -> bool:
        """Return whether a call of ``tool`` lies within; ``server`` is its name in the policy, empty where it has none there.

        A record that says nothing of tools covers all of them. One that does covers none of a server without a name.
        """
        if self._parts is None:
            return True
        return bool(server) and any(
            servers.fullmatch(server) and any(glob.fullmatch(tool) for glob in tools) for servers, tools in self._parts
        )


class Scope:
    """The resources of a record, compiled. Immutable."""

    __slots__ = ("_parts",)

    def __init__(self, resources: Sequence[Resource]) -> None:
        self._parts = tuple(
            (
                globs.host_glob(resource.host),
                frozenset(resource.ports),
                _methods(resource),
                tuple(globs.path_glob(path) for path in resource.paths),
            )
            for resource in resources
        )

    def covers(self, host: str, port: int, method: str, path: str) -> bool:
        """Return whether a call lies within; ``host`` is lower case, ``path`` canonical and without a query."""
        return any(
            port in ports
            and (methods is None or method in methods)
            and hosts.fullmatch(host)
            and any(glob.fullmatch(path) for glob in paths)
            for hosts, ports, methods, paths in self._parts
        )

    def names(self, host: str, port: int) -> bool:
        """Return whether any call to a host (lower case) and port lies within."""
        return any(port in ports and hosts.fullmatch(host) for hosts, ports, _, _ in self._parts)


def is_read(method: str, path: str, *, git_host: bool, inference: bool) -> bool:
    """Return whether a call is a read for ``approval``: reading methods, a Git fetch, a question to a model."""
    fetch = git_host and git_service(method, path) == UPLOAD_PACK
    return method in READ_METHODS or fetch or inference


def wider(child: Delegation, parent: Delegation) -> tuple[str, ...]:
    """Return each way in which ``child`` goes beyond ``parent``; empty means that it lies within.

    Globs are compared by the texts that they accept, not by their spelling. Each resource of the child must lie within one
    resource of the parent; a pair of globs that cannot be compared with bounded work counts as wider.
    """
    found = []
    if child.parent != parent.id:
        found.append(f"it is not made from {parent.id}")
    if child.sponsor != parent.sponsor:
        found.append("it has another sponsor")
    if child.not_before < parent.not_before:
        found.append("it begins earlier")
    if child.expires > parent.expires:
        found.append("it ends later")
    if _BOUND[child.approval] > _BOUND[parent.approval]:
        found.append(f"its approval is {child.approval}, that of {parent.id} is {parent.approval}")
    found += [
        f"it leaves out the {name} data that {parent.id} brings" for name in parent.classes if name not in child.classes
    ]
    budget = Budget()
    for index, resource in enumerate(child.resources):
        if not any(_within(resource, other, budget) for other in parent.resources):
            found.append(f"resources[{index}] ({resource.host}) lies within no resource of {parent.id}")
    return (*found, *_more_tools(child, parent, budget))


def _more_tools(child: Delegation, parent: Delegation, budget: Budget) -> list[str]:
    """Return each way in which the tools of ``child`` go beyond those of ``parent``."""
    if parent.tools is msgspec.UNSET:
        return []
    if child.tools is msgspec.UNSET:
        return [f"it says nothing of tools, and {parent.id} names some"]
    wholes = parent.tools
    return [
        f"tools[{index}] ({part.server}) lies within no entry of {parent.id}"
        for index, part in enumerate(child.tools)
        if not any(_tools_within(part, whole, budget) for whole in wholes)
    ]


def _tools_within(part: Tools, whole: Tools, budget: Budget) -> bool:
    try:
        return all(
            _accepts_all([*map(Glob.flat, parts)], [*map(Glob.flat, wholes)], any_text(), budget)
            for parts, wholes in (((part.server,), (whole.server,)), (part.tools, whole.tools))
        )
    except TooLarge:
        return False


def _within(part: Resource, whole: Resource, budget: Budget) -> bool:
    methods, allowed = _methods(part), _methods(whole)
    if not set(part.ports) <= set(whole.ports) or (allowed is not None and (methods is None or not methods <= allowed)):
        return False
    try:
        return _accepts_all([Glob.host(part.host)], [Glob.host(whole.host)], host_name(), budget) and _accepts_all(
            [Glob.path(path) for path in part.paths],
            [Glob.path(path) for path in whole.paths],
            canonical_path(encoded_slash=True),
            budget,
        )
    except TooLarge:
        return False


def _accepts_all(parts: Sequence[Automaton], wholes: Sequence[Automaton], domain: Table, budget: Budget) -> bool:
    """Return whether every text that one of ``parts`` accepts is accepted by one of ``wholes``."""
    of_parts = (1 << len(parts)) - 1
    for found in partition([*parts, *wholes], domain, (), budget):
        if found.mask & of_parts and not found.mask >> len(parts):
            return False
    return True


def _methods(resource: Resource) -> frozenset[str] | None:
    """Return the methods of a resource, HEAD where GET is; None stands for every method."""
    if not resource.methods:
        return None
    return frozenset(resource.methods) | ({"HEAD"} if "GET" in resource.methods else set())
