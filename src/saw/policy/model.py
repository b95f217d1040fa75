"""The words of the policy: what ``policy.yaml`` may say, what is asked of it, and what it answers.

The policy side follows the public schema version 1 of NVIDIA OpenShell; ``docs/policy.md`` lists where this
implementation is narrower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

MAX_FILE_BYTES = 4 * 1024 * 1024
"""Largest policy or governance file that is read (bytes)."""

ALLOW = "allow"
DENY = "deny"
READ_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that default to action class ``auto``; every other method is a write."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Common settings of every parsed structure: immutable, no unknown fields."""


class FilesystemPolicy(Part, frozen=True):
    """Absolute directories the sandbox may read, or read and write; what is not listed is inaccessible."""

    include_workdir: bool = False
    read_only: tuple[str, ...] = ()
    read_write: tuple[str, ...] = ()


class Landlock(Part, frozen=True):
    """Whether a kernel without the needed Landlock ABI stops the start (``hard_requirement``) or only weakens it."""

    compatibility: Literal["best_effort", "hard_requirement"] = "hard_requirement"


class Process(Part, frozen=True):
    """Names of the user and group that sandboxed processes run as; never root."""

    run_as_user: str = "agent"
    run_as_group: str = "agent"


class AnyOf(Part, frozen=True):
    """A query matcher that accepts any of several globs."""

    any: tuple[str, ...]


class Match(Part, frozen=True):
    """The shape of a request: method, path glob and query globs (``key: glob`` or ``key: {any: [glob]}``)."""

    method: str = "*"
    path: str = "/**"
    query: dict[str, str | AnyOf] = msgspec.field(default_factory=dict)


class AllowRule(Part, frozen=True):
    """One entry of ``rules``."""

    allow: Match


class Endpoint(Part, frozen=True):
    """One destination and what may be asked of it. Fields that this version cannot enforce are refused by the loader."""

    host: str = ""
    port: int | None = None
    ports: tuple[int, ...] = ()
    path: str = ""
    protocol: Literal["", "rest", "websocket", "graphql", "mcp", "json-rpc", "tcp"] = ""
    tls: Literal["", "terminate", "passthrough", "skip"] = ""
    enforcement: Literal["enforce", "audit"] = "enforce"
    access: Literal["", "read-only", "read-write", "full"] = ""
    rules: tuple[AllowRule, ...] | None = None
    deny_rules: tuple[Match, ...] | None = None
    allowed_ips: tuple[str, ...] = ()
    allow_encoded_slash: bool = False

    @property
    def all_ports(self) -> tuple[int, ...]:
        """Return the ports of this endpoint; ``ports`` wins over ``port``."""
        if self.ports:
            return self.ports
        return () if self.port is None else (self.port,)


class Binary(Part, frozen=True):
    """An executable (exact path or glob) that may use the rule's endpoints. Attribution, not a boundary."""

    path: str


class NetworkRule(Part, frozen=True):
    """Grants every listed binary the use of every listed endpoint."""

    endpoints: tuple[Endpoint, ...]
    binaries: tuple[Binary, ...]
    name: str = ""


class Policy(Part, frozen=True):
    """A whole ``policy.yaml``."""

    version: Literal[1]
    filesystem_policy: FilesystemPolicy = FilesystemPolicy(include_workdir=True)
    landlock: Landlock = Landlock()
    process: Process = Process()
    network_policies: dict[str, NetworkRule] = msgspec.field(default_factory=dict)


class EndpointAddress(msgspec.Struct, frozen=True, order=True):
    """A host (exact or glob), a port, and whether clients and upstream speak TLS there."""

    host: str
    port: int
    tls: bool


class Request(msgspec.Struct, frozen=True):
    """A call to decide on.

    ``path`` is as received, with the query. ``binary`` is the resolved executable of the calling process and
    ``ancestors`` those of its parents, nearest first; both are unknown where a proxy cannot tell. ``headers`` has
    lower-case names. ``body`` is the start of the body as far as it was seen, ``body_complete`` whether that is all.
    """

    scheme: str
    host: str
    port: int
    method: str
    path: str
    binary: str | None = None
    ancestors: tuple[str, ...] = ()
    headers: Mapping[str, str] = {}
    body: bytes | None = None
    body_complete: bool = True


class Decision(msgspec.Struct, frozen=True):
    """The answer to a :class:`Request`.

    ``verdict`` is ``allow`` or ``deny``; ``reason`` is empty when allowed, else one of the reasons in
    ``docs/architecture.md``. ``policy`` is the ``network_policies`` key (or ``inference``), ``rule`` which rule of it
    decided. ``action_class`` is ``auto``, ``staged``, ``review`` or ``deny``. ``credential`` and ``inference`` are ids
    out of ``governance.yaml``. ``canonical_path`` is the only path (with query) that may be sent on.
    """

    verdict: str
    reason: str = ""
    detail: str = ""
    policy: str = ""
    rule: str = ""
    action_class: str = "auto"
    credential: str | None = None
    inference: str | None = None
    canonical_path: str = ""
    rule_missing: dict[str, object] | None = None
    next_steps: tuple[str, ...] = ()

    @property
    def allowed(self) -> bool:
        """Return whether the verdict is ``allow``."""
        return self.verdict == ALLOW
