"""Invariants: what no bundle may ever allow, written as data. Format: ``policies/invariants.yaml``, ``docs/reach.md``."""

from __future__ import annotations

import re
from contextlib import suppress
from ipaddress import ip_network
from typing import Annotated, Literal

import msgspec

from saw.policy import globs
from saw.policy.checks_governance import GOVERNANCE_CHECKS
from saw.policy.checks_policy import check_absolute, check_path_glob, port_is_valid
from saw.policy.decode import Checks, Decoder, Report, StructureReport
from saw.policy.errors import PolicyError, Problem
from saw.policy.governance import Limit
from saw.policy.model import Part, says
from saw.policy.partial import Unknown
from saw.policy.tool_rules import Argument
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
    "inference_within_budget",
    "data_only_to",
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
    "inference_within_budget": (frozenset({"limit", "period"}), frozenset({"hosts"})),
    "data_only_to": (frozenset({"data_class"}), frozenset({"hosts"})),
    "subset_of": (frozenset(), frozenset({"parent"})),
}
"""Fields that each kind must have, and those it may have, besides ``id``, ``kind`` and ``why``."""


class Invariant(Part, frozen=True):
    """One promise about every call, tool call, push or file. Which fields belong to which kind: ``docs/reach.md``.

    ``hosts`` are host globs, for ``credential_only_to`` with an optional ``:port``. ``refs`` are globs over full ref names.
    """

    id: Annotated[str, says("Name of the promise.", "no-metadata")]
    kind: Annotated[Kind, says("What is promised; docs/reach.md lists the fields of each kind.", "never_reach")]
    why: Annotated[str, says("The reason, for whoever breaks it.", "Metadata hands out the machine's credentials.")] = (
        ""
    )
    hosts: Annotated[tuple[str, ...], says("Host globs the promise is about.", ["*.google.internal"])] = ()
    ports: Annotated[tuple[int, ...], says("Ports the promise is about; empty: all.", [22])] = ()
    networks: Annotated[tuple[str, ...], says("Addresses that must not be dialled.", ["169.254.0.0/16"])] = ()
    paths: Annotated[tuple[str, ...], says("Path globs the promise is about; empty: all.", ["/v1/**"])] = ()
    allow_staged: Annotated[bool, says("Whether staged writes are as good as reviewed ones.", True)] = False
    credential: Annotated[str, says("Glob over credential ids.", "git-token")] = ""
    directories: Annotated[tuple[str, ...], says("Directories that stay closed.", ["/etc"])] = ()
    server: Annotated[str, says("Glob over MCP server names.", "files")] = "*"
    tool: Annotated[str, says("Glob over tool names.", "delete_*")] = ""
    args: Annotated[
        dict[str, Argument],
        says("Values that the tool must not be called with.", {"path": {"under": "/home/agent/.ssh"}}),
    ] = msgspec.field(default_factory=dict)
    refs: Annotated[tuple[str, ...], says("Globs over full ref names.", ["refs/heads/main"])] = ()
    operations: Annotated[
        tuple[Literal["create", "update", "delete"], ...], says("Changes of a ref; empty: all.", ["delete"])
    ] = ()
    limit: Annotated[
        Limit | None, says("Most that a route may cost in one period.", {"currency": "USD", "amount": "50.00"})
    ] = None
    period: Annotated[
        Literal["", "day", "week", "month"], says("The calendar period that the limit is about.", "month")
    ] = ""
    data_class: Annotated[str, says("A class of data; docs/policy.md.", "restricted")] = ""
    parent: Annotated[str, says("Bundle folder that holds all that this one allows.", "../base")] = ""


class Invariants(Part, frozen=True):
    """A whole file of invariants."""

    schema: Annotated[Literal[1], says("Version of the format.", 1)]
    invariants: Annotated[
        tuple[Invariant, ...],
        says("The promises.", [{"id": "no-metadata", "kind": "never_reach", "networks": ["169.254.0.0/16"]}]),
    ]


_DEFAULTS = Invariant(id="", kind="subset_of")


def split_address(text: str) -> tuple[str, int | None]:
    """Return host glob and port of ``host`` or ``host:port``."""
    host, colon, port = text.rpartition(":")
    return (host.lower(), int(port)) if colon and port.isdigit() else (text.lower(), None)


def _host(value: str, report: Report) -> None:
    host, port = split_address(value)
    try:
        globs.host_glob(host)
    except globs.GlobError as error:
        report(f"{value!r}: {error}", "name a host such as api.example.com or *.example.com")
    if port is not None and not port_is_valid(port):
        report(f"{value!r} has no valid port", "write a number from 1 to 65535")


def _port(value: int, report: Report) -> None:
    if not port_is_valid(value):
        report(f"{value} is not a port", "write a number from 1 to 65535")


def _network(value: str, report: Report) -> None:
    try:
        ip_network(value)
    except ValueError as error:
        report(f"{value!r} is not a network: {error}", "write for example 169.254.0.0/16")


def _ref(value: str, report: Report) -> None:
    try:
        globs.ref_glob(value)
    except globs.GlobError as error:
        report(str(error), "write for example refs/heads/main")


def _flat(value: str, report: Report) -> None:
    try:
        globs.flat_glob(value)
    except globs.GlobError as error:
        report(str(error), "write a name, with * as the wildcard")


def _id(value: str, report: Report) -> None:
    if not _ID.match(value):
        report(f"{value!r} is not an id", "use lower-case letters, digits and dashes")


def _is_written(value: Invariant, name: str) -> bool:
    try:
        return bool(getattr(value, name) != getattr(_DEFAULTS, name))
    except Unknown:
        return True


def _fields_fit(value: Invariant, report: StructureReport) -> None:
    needed, allowed = FIELDS[value.kind]
    written = {name for name in Invariant.__struct_fields__ if _is_written(value, name)} - {"id", "kind", "why"}
    for name in sorted(needed - written):
        report(name, f"{value.kind} needs {name}", f"add {name}")
    for name in sorted(written - needed - allowed):
        report(name, f"{name} has no part in {value.kind}", "remove it")
    if value.kind == "never_reach" and not written:
        report("", "never_reach names nothing", "add hosts, ports or networks")


def _hosts_without_port(value: Invariant, report: StructureReport) -> None:
    if value.kind != "credential_only_to":
        for index, host in enumerate(value.hosts):
            if split_address(host)[1] is not None:
                report(("hosts", index), "a port has its own field here", "write it under ports")


def _file(value: Invariants, report: StructureReport) -> None:
    seen: set[str] = set()
    for index, invariant in enumerate(value.invariants):
        with suppress(Unknown):
            if invariant.id in seen:
                report(("invariants", index, "id"), f"the id {invariant.id} is used twice", "give each its own id")
            seen.add(invariant.id)


INVARIANT_CHECKS = Checks(
    fields={
        **{key: check for key, check in GOVERNANCE_CHECKS.fields.items() if key[0] in {Argument, Limit}},
        (Invariant, "id"): _id,
        (Invariant, "server"): _flat,
        (Invariant, "tool"): _flat,
        (Invariant, "credential"): _flat,
    },
    structures={
        **{kind: check for kind, check in GOVERNANCE_CHECKS.structures.items() if kind is Argument},
        Invariant: (_fields_fit, _hosts_without_port),
        Invariants: (_file,),
    },
    items={
        (Invariant, "hosts"): _host,
        (Invariant, "ports"): _port,
        (Invariant, "networks"): _network,
        (Invariant, "paths"): check_path_glob,
        (Invariant, "refs"): _ref,
        (Invariant, "directories"): check_absolute,
    },
    keys={},
    unsupported={},
)


def load_invariants(raw: bytes, name: str = "invariants.yaml") -> Invariants:
    """Return the invariants in ``raw``; raise :class:`PolicyError` with all problems."""
    root, problems = parse(raw, name)
    decoder = Decoder(name, INVARIANT_CHECKS)
    value = decoder.structure(root, Invariants, "")
    problems += decoder.problems
    if problems or not isinstance(value, Invariants):
        raise PolicyError(problems or [Problem(name, 1, 1, "", "no invariants", "write invariants")])
    return value


__all__ = ["Invariant", "Invariants", "load_invariants", "split_address"]
