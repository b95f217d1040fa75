"""Invariants: what no bundle may ever allow, written as data. Format: ``policies/invariants.yaml``, ``docs/reach.md``."""

from __future__ import annotations

import json
import re
from ipaddress import ip_network
from typing import Any, Literal

import msgspec

from saw.policy import globs
from saw.policy.checks_governance import GOVERNANCE_CHECKS
from saw.policy.checks_policy import StructureReport, check_absolute, port_is_valid
from saw.policy.decode import Checks, Decoder, Report
from saw.policy.errors import PolicyError, Problem
from saw.policy.governance import Argument
from saw.policy.model import Part
from saw.policy.yamltree import parse

Kind = Literal[
    "never_reach",
    "no_write_without_review",
    "credential_only_to",
    "never_read",
    "never_write",
    "tool_never",
    "push_never",
    "push_needs_review",
    "subset_of",
]

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")
FIELDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "never_reach": (frozenset(), frozenset({"hosts", "ports", "networks"})),
    "no_write_without_review": (frozenset({"hosts"}), frozenset({"ports", "paths", "allow_staged"})),
    "credential_only_to": (frozenset({"credential", "hosts"}), frozenset({"paths"})),
    "never_read": (frozenset({"directories"}), frozenset()),
    "never_write": (frozenset({"directories"}), frozenset()),
    "tool_never": (frozenset({"tool"}), frozenset({"server", "args"})),
    "push_never": (frozenset({"refs"}), frozenset({"hosts", "operations"})),
    "push_needs_review": (frozenset({"refs"}), frozenset({"hosts", "operations"})),
    "subset_of": (frozenset(), frozenset({"parent"})),
}
"""Fields that each kind must have, and those it may have, besides ``id``, ``kind`` and ``why``."""


class Invariant(Part, frozen=True):
    """One promise about every call, tool call, push or file. Which fields belong to which kind: ``docs/reach.md``.

    ``hosts`` are host globs, for ``credential_only_to`` with an optional ``:port``. ``refs`` are globs over full ref names.
    """

    id: str
    kind: Kind
    why: str = ""
    hosts: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    networks: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    allow_staged: bool = False
    credential: str = ""
    directories: tuple[str, ...] = ()
    server: str = "*"
    tool: str = ""
    args: dict[str, Argument] = msgspec.field(default_factory=dict)
    refs: tuple[str, ...] = ()
    operations: tuple[Literal["create", "update", "delete"], ...] = ()
    parent: str = ""


class Invariants(Part, frozen=True):
    """A whole file of invariants."""

    schema: Literal[1]
    invariants: tuple[Invariant, ...]


def split_address(text: str) -> tuple[str, int | None]:
    """Return host glob and port of ``host`` or ``host:port``."""
    host, colon, port = text.rpartition(":")
    return (host.lower(), int(port)) if colon and port.isdigit() else (text.lower(), None)


def _hosts(values: tuple[str, ...], report: Report) -> None:
    for value in values:
        host, port = split_address(value)
        try:
            globs.host_glob(host)
        except globs.GlobError as error:
            report(f"{value!r}: {error}", "name a host such as api.example.com or *.example.com")
        if port is not None and not port_is_valid(port):
            report(f"{value!r} has no valid port", "write a number from 1 to 65535")


def _ports(values: tuple[int, ...], report: Report) -> None:
    for value in values:
        if not port_is_valid(value):
            report(f"{value} is not a port", "write a number from 1 to 65535")


def _networks(values: tuple[str, ...], report: Report) -> None:
    for value in values:
        try:
            ip_network(value)
        except ValueError as error:
            report(f"{value!r} is not a network: {error}", "write for example 169.254.0.0/16")


def _paths(values: tuple[str, ...], report: Report) -> None:
    for value in values:
        try:
            globs.path_glob(value)
        except globs.GlobError as error:
            report(str(error), "write for example /v1/**")


def _refs(values: tuple[str, ...], report: Report) -> None:
    for value in values:
        try:
            globs.ref_glob(value)
        except globs.GlobError as error:
            report(str(error), "write for example refs/heads/main")


def _directories(values: tuple[str, ...], report: Report) -> None:
    for value in values:
        check_absolute(value, report)


def _flat(value: str, report: Report) -> None:
    try:
        globs.flat_glob(value)
    except globs.GlobError as error:
        report(str(error), "write a name, with * as the wildcard")


def _id(value: str, report: Report) -> None:
    if not _ID.match(value):
        report(f"{value!r} is not an id", "use lower-case letters, digits and dashes")


def _invariant(value: Invariant, report: StructureReport) -> None:
    needed, allowed = FIELDS[value.kind]
    defaults = Invariant(id=value.id, kind=value.kind)
    common = {"id", "kind", "why"}
    written = {name for name in value.__struct_fields__ if getattr(value, name) != getattr(defaults, name)} - common
    for name in sorted(needed - written):
        report(name, f"{value.kind} needs {name}", f"add {name}")
    for name in sorted(written - needed - allowed):
        report(name, f"{name} has no part in {value.kind}", "remove it")
    if value.kind == "never_reach" and not written:
        report("", "never_reach names nothing", "add hosts, ports or networks")
    if value.kind != "credential_only_to" and any(split_address(host)[1] is not None for host in value.hosts):
        report("hosts", "a port has its own field here", "write it under ports")


def _file(value: Invariants, report: StructureReport) -> None:
    ids = [invariant.id for invariant in value.invariants]
    for name in sorted({name for name in ids if ids.count(name) > 1}):
        report("invariants", f"the id {name} is used twice", "give each invariant its own id")


_CHECKS = Checks(
    fields={
        **{key: check for key, check in GOVERNANCE_CHECKS.fields.items() if key[0] is Argument},
        (Invariant, "id"): _id,
        (Invariant, "hosts"): _hosts,
        (Invariant, "ports"): _ports,
        (Invariant, "networks"): _networks,
        (Invariant, "paths"): _paths,
        (Invariant, "refs"): _refs,
        (Invariant, "directories"): _directories,
        (Invariant, "server"): _flat,
        (Invariant, "tool"): _flat,
        (Invariant, "credential"): _flat,
    },
    structures={
        **{kind: check for kind, check in GOVERNANCE_CHECKS.structures.items() if kind is Argument},
        Invariant: _invariant,
        Invariants: _file,
    },
    keys={},
    unsupported={},
)


def load_invariants(raw: bytes, name: str = "invariants.yaml") -> Invariants:
    """Return the invariants in ``raw``; raise :class:`PolicyError` with all problems."""
    root, problems = parse(raw, name)
    decoder = Decoder(name, _CHECKS)
    value = decoder.structure(root, Invariants, "")
    problems += decoder.problems
    if problems or not isinstance(value, Invariants):
        raise PolicyError(problems or [Problem(name, 1, 1, "", "no invariants", "write invariants")])
    return value


_EXAMPLES: dict[str, object] = {
    "id": "no-metadata",
    "kind": "never_reach",
    "why": "Metadata services hand out the machine's own credentials.",
    "hosts": ["*.google.internal"],
    "ports": [22],
    "networks": ["169.254.0.0/16"],
    "paths": ["/v1/**"],
    "allow_staged": True,
    "credential": "git-token",
    "directories": ["/etc"],
    "server": "files",
    "tool": "delete_*",
    "args": {"path": {"under": "/home/agent/.ssh"}},
    "refs": ["refs/heads/main"],
    "operations": ["delete"],
    "parent": "../base",
}


def invariants_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a file of invariants, with an example for every field."""
    (reference,), components = msgspec.json.schema_components([Invariants])
    for field, value in components["Invariant"]["properties"].items():
        value["examples"] = [_EXAMPLES[field]]
    for component in components.values():
        if "description" in component:
            component["description"] = re.sub(r"\s+", " ", component["description"].replace("``", "")).strip()
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "invariants.yaml",
        **reference,
        "$defs": components,
    }
    result: dict[str, Any] = json.loads(json.dumps(schema))
    return result


__all__ = ["Invariant", "Invariants", "invariants_schema", "load_invariants", "split_address"]
