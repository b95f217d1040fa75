"""The words of the policy: what ``policy.yaml`` may say, what is asked of it, and what it answers.

The policy side follows the public schema version 1 of NVIDIA OpenShell; ``docs/policy.md`` lists where this
implementation is narrower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

MAX_FILE_BYTES = 4 * 1024 * 1024
"""Largest policy or governance file that is read (bytes)."""

ALLOW = "allow"
DENY = "deny"
READ_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that default to action class ``auto``; every other method is a write."""
CALL_PROTOCOLS = frozenset({"graphql", "json-rpc", "mcp"})
"""Protocols of an endpoint whose calls are named in the body of the request, not by method and path."""
BODY_LIMIT = 65536
"""Largest body (bytes) of such a request where the endpoint does not say."""


def says(description: str, *examples: Any) -> msgspec.Meta:
    """Return what the schema and the reference page say of a field: its meaning and an example or more that load."""
    return msgspec.Meta(description=description, examples=list(examples))


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Common settings of every parsed structure: immutable, no unknown fields.

    Each field is annotated with :func:`says`, the one source of the schemas, the editors' help and the reference page.
    """


class FilesystemPolicy(Part, frozen=True):
    """Absolute directories the sandbox may read, or read and write; what is not listed is inaccessible."""

    include_workdir: Annotated[
        bool,
        says("Whether the account's project folder may be written. Absent block: true; present block: false.", False),
    ] = False
    read_only: Annotated[
        tuple[str, ...], says("Directories and files that may be read; absolute, without wildcards.", ["/usr", "/etc"])
    ] = ()
    read_write: Annotated[
        tuple[str, ...],
        says(
            "Directories, files and a GPU's device nodes that may be read and written; never the root.", ["/home/agent"]
        ),
    ] = ()


class Landlock(Part, frozen=True):
    """Whether a kernel without the needed Landlock ABI stops the start (``hard_requirement``) or only weakens it."""

    compatibility: Annotated[
        Literal["best_effort", "hard_requirement"],
        says("best_effort loads only where governance.yaml sets landlock.allow_best_effort.", "hard_requirement"),
    ] = "hard_requirement"


class Process(Part, frozen=True):
    """Names of the user and group that sandboxed processes run as; never root."""

    run_as_user: Annotated[str, says("Name of the account, not a number.", "agent")] = "agent"
    run_as_group: Annotated[str, says("Name of the group, not a number.", "agent")] = "agent"


class AnyOf(Part, frozen=True):
    """A query matcher that accepts any of several globs."""

    any: Annotated[tuple[str, ...], says("Globs over the value; * is any run of characters.", ["open", "closed"])]


class Params(Part, frozen=True):
    """The parameters of an MCP call that a rule may name."""

    name: Annotated[str | AnyOf, says("Glob over the tool's name; the same as tool.", "search_*")]


OperationType = Literal["query", "mutation", "subscription", "*"]


class Match(Part, frozen=True):
    """The shape of a call. Which fields belong to which protocol: ``docs/policy.md``."""

    method: Annotated[
        str,
        says(
            "rest: HTTP method, or * for every method; GET takes HEAD along. websocket: GET opens it, WEBSOCKET_TEXT is a text "
            "message, * is everything. json-rpc, mcp: name of the method that is called.",
            "GET",
        ),
    ] = "*"
    path: Annotated[str, says("Glob over the canonical path, without the query.", "/v1/**")] = "/**"
    query: Annotated[
        dict[str, str | AnyOf],
        says(
            "Globs over query values by key. To allow, all must match; to deny, one is enough.",
            {"state": {"any": ["open", "closed"]}, "page": "*"},
        ),
    ] = msgspec.field(default_factory=dict)
    operation_type: Annotated[
        OperationType | None, says("graphql: type of the operation, or *; required there.", "mutation")
    ] = None
    operation_name: Annotated[str, says("graphql: glob over the operation's name; absent: any.", "Issue*")] = ""
    fields: Annotated[
        tuple[str, ...],
        says("graphql: globs over root fields. To allow, all must match; to deny, one is enough.", ["createIssue"]),
    ] = ()
    tool: Annotated[
        str | AnyOf | None, says("mcp: glob over the tool that tools/call names.", "search_*", {"any": ["a", "b"]})
    ] = None
    params: Annotated[Params | None, says("mcp: another spelling of tool.", {"name": "search_*"})] = None


class AllowRule(Part, frozen=True):
    """One entry of ``rules``."""

    allow: Annotated[Match, says("The requests that this rule allows.", {"method": "GET", "path": "/v1/**"})]


class PersistedQuery(Part, frozen=True):
    """What a GraphQL query that is called by its hash does, in the words of whoever registered it."""

    operation_type: Annotated[Literal["query", "mutation", "subscription"], says("Type of the operation.", "query")]
    operation_name: Annotated[str, says("Its name; absent: none.", "Viewer")] = ""
    fields: Annotated[tuple[str, ...], says("The root fields that it selects.", ["viewer"])] = ()


class McpOptions(Part, frozen=True):
    """How an MCP endpoint is read."""

    max_body_bytes: Annotated[int, says("Largest body, 1024 to 524288 bytes.", BODY_LIMIT)] = BODY_LIMIT
    strict_tool_names: Annotated[
        bool, says("Whether tool names must be 1 to 128 of letters, digits and _ . -", True)
    ] = True
    allow_all_known_mcp_methods: Annotated[
        bool,
        says(
            "Whether every method of MCP passes; tools/call only as rules with a tool say, where there are any.", True
        ),
    ] = False
    versions: Annotated[
        tuple[str, ...], says("The revisions of MCP that may be spoken; empty: any.", ["2025-11-25"])
    ] = ()


class JsonRpcOptions(Part, frozen=True):
    """How a JSON-RPC endpoint is read."""

    max_body_bytes: Annotated[int, says("Largest body, 1024 to 524288 bytes.", BODY_LIMIT)] = BODY_LIMIT


class Endpoint(Part, frozen=True):
    """One destination and what may be asked of it. Fields that this version cannot enforce are refused by the loader."""

    host: Annotated[
        str,
        says(
            "Host name, or a glob with * for one label and ** for one or more in front.",
            "api.example.com",
            "*.example.com",
        ),
    ] = ""
    port: Annotated[int | None, says("TCP port, 1 to 65535.", 443)] = None
    ports: Annotated[tuple[int, ...], says("Several TCP ports; wins over port.", [443, 8443])] = ()
    path: Annotated[
        str, says("Glob that chooses among endpoints on the same host and port; the more specific decides.", "/v1/**")
    ] = ""
    protocol: Annotated[
        Literal["", "rest", "websocket", "graphql", "mcp", "json-rpc", "tcp"],
        says(
            "rest: access or rules say which calls pass; websocket: also which messages; graphql, json-rpc, mcp: which calls in "
            "the body; tcp: sessions of PostgreSQL, with a credential that says postgres. Absent: every call.",
            "rest",
        ),
    ] = ""
    tls: Annotated[
        Literal["", "terminate", "passthrough", "skip"],
        says("terminate, as when absent. Uninspected TLS (skip, passthrough) is refused by name.", "terminate"),
    ] = ""
    enforcement: Annotated[
        Literal["enforce", "audit"],
        says("audit lets calls pass and records them; loads only with allow_audit in governance.yaml.", "enforce"),
    ] = "enforce"
    access: Annotated[
        Literal["", "read-only", "read-write", "full"],
        says(
            "read-only: GET, HEAD, OPTIONS; read-write: also POST, PUT, PATCH; full: everything. For websocket: open it; "
            "also text messages; also binary ones. With graphql: query; also mutation; also subscription. Excludes rules; not "
            "for json-rpc and mcp.",
            "read-only",
        ),
    ] = ""
    rules: Annotated[
        tuple[AllowRule, ...] | None,
        says(
            "The calls that are allowed, one by one. Excludes access.", [{"allow": {"method": "GET", "path": "/v1/**"}}]
        ),
    ] = None
    deny_rules: Annotated[
        tuple[Match, ...] | None,
        says(
            "Calls that are refused although access or rules allow them.", [{"method": "GET", "path": "/v1/admin/**"}]
        ),
    ] = None
    allowed_ips: Annotated[
        tuple[str, ...],
        says("Networks the host may resolve to, in place of the guard on private addresses.", ["10.20.0.0/16"]),
    ] = ()
    allow_encoded_slash: Annotated[bool, says("Whether %2F may stay in the path.", True)] = False
    graphql_max_body_bytes: Annotated[int, says("graphql: largest body, 1024 to 524288 bytes.", BODY_LIMIT)] = (
        BODY_LIMIT
    )
    persisted_queries: Annotated[
        Literal["deny", "allow_registered"],
        says("graphql: whether the hashes below may be called without the query's text.", "allow_registered"),
    ] = "deny"
    graphql_persisted_queries: Annotated[
        dict[str, PersistedQuery],
        says(
            "graphql: what each hash (SHA-256 of the query, hexadecimal) stands for.",
            {"0" * 64: {"operation_type": "query", "fields": ["viewer"]}},
        ),
    ] = msgspec.field(default_factory=dict)
    mcp: Annotated[
        McpOptions | None, says("mcp: how it is read.", {"max_body_bytes": 131072, "versions": ["2025-11-25"]})
    ] = None
    json_rpc: Annotated[JsonRpcOptions | None, says("json-rpc: how it is read.", {"max_body_bytes": 131072})] = None
    websocket_credential_rewrite: Annotated[bool, says("Of OpenShell; only false loads.", False)] = False
    request_body_credential_rewrite: Annotated[bool, says("Of OpenShell; only false loads.", False)] = False
    allow_uninspected_credentials: Annotated[bool, says("Of OpenShell; only false loads.", False)] = False

    @property
    def all_ports(self) -> tuple[int, ...]:
        """Return the ports of this endpoint; ``ports`` wins over ``port``."""
        if self.ports:
            return self.ports
        return () if self.port is None else (self.port,)


class Binary(Part, frozen=True):
    """An executable (exact path or glob) that may use the rule's endpoints. Attribution, not a boundary."""

    path: Annotated[str, says("Absolute path of the resolved executable, or a glob.", "/usr/lib/git-core/**")]
    harness: Annotated[bool, says("Of OpenShell 0.0.x; without effect there and here.", False)] = False


_ENDPOINT = {"host": "api.example.com", "port": 443, "protocol": "rest", "access": "read-only"}
_RULE = {"name": "Read the API", "endpoints": [_ENDPOINT], "binaries": [{"path": "/usr/bin/curl"}]}


class NetworkRule(Part, frozen=True):
    """Grants every listed binary the use of every listed endpoint."""

    endpoints: Annotated[tuple[Endpoint, ...], says("The destinations, at least one.", [_ENDPOINT])]
    binaries: Annotated[
        tuple[Binary, ...], says("The executables that may use them, at least one.", [{"path": "/usr/bin/curl"}])
    ]
    name: Annotated[str, says("What the rule is for, in words.", "Read the API")] = ""


class Policy(Part, frozen=True):
    """A whole ``policy.yaml``."""

    version: Annotated[Literal[1], says("Version of the schema.", 1)]
    filesystem_policy: Annotated[
        FilesystemPolicy,
        says(
            "The files that the sandbox may use.",
            {"include_workdir": False, "read_only": ["/usr", "/etc"], "read_write": ["/home/agent"]},
        ),
    ] = FilesystemPolicy(include_workdir=True)
    landlock: Annotated[
        Landlock, says("What a kernel with too little Landlock means.", {"compatibility": "hard_requirement"})
    ] = Landlock()
    process: Annotated[
        Process, says("The account of the sandbox.", {"run_as_user": "agent", "run_as_group": "agent"})
    ] = Process()
    network_middlewares: Annotated[
        dict[str, Any], says("Of OpenShell. Nothing here looks into bodies: only an empty map loads.", {})
    ] = msgspec.field(default_factory=dict)
    network_policies: Annotated[
        dict[str, NetworkRule], says("The network rules by name. None: no network.", {"api": _RULE})
    ] = msgspec.field(default_factory=dict)


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
    ``upgrade`` is the protocol that the request asks to switch to, as received. ``message`` asks whether a client may send a
    ``text`` or ``binary`` message on the WebSocket that the request opens. ``data_classes`` are those that delegations say the
    workspace holds; they only add to what policy and the call itself say.
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
    upgrade: str = ""
    message: Literal["", "text", "binary"] = ""
    data_classes: tuple[str, ...] = ()

    @property
    def reads(self) -> bool:
        """Return whether the method alone makes this a read; a message on a WebSocket is none."""
        return not self.message and self.method.upper() in READ_METHODS


class Operation(NamedTuple):
    """One thing that a body asks for.

    GraphQL: ``kind`` is the operation's type, ``name`` its name, ``fields`` its root fields. JSON-RPC and MCP: ``kind`` is the
    method, ``name`` the tool of ``tools/call``. Texts of the caller, bounded in length.
    """

    kind: str
    name: str = ""
    fields: tuple[str, ...] = ()

    def text(self) -> str:
        """Return it in few words."""
        return " ".join(filter(None, (self.kind, self.name, f"{{ {' '.join(self.fields)} }}" if self.fields else "")))


class Decision(msgspec.Struct, frozen=True):
    """The answer to a :class:`Request`.

    ``verdict`` is ``allow`` or ``deny``; ``reason`` is empty when allowed, else one of the reasons in
    ``docs/architecture.md``. ``policy`` is the ``network_policies`` key (or ``inference``), ``rule`` which rule of it
    decided. ``action_class`` is ``auto``, ``staged``, ``review`` or ``deny``. ``credential`` and ``inference`` are ids
    out of ``governance.yaml``. ``canonical_path`` is the only path (with query) that may be sent on. ``frames`` is what the
    client may send on a WebSocket (:data:`saw.policy.websocket.FRAMES`), empty for every other call. ``protocol`` is one of
    :data:`CALL_PROTOCOLS` where the body was judged, and ``operations`` what it asks for as far as it could be read. ``way`` is
    the place of the model service among those of the inference route, ``data_classes`` what a call of a model holds, and
    ``model`` the one that it asks for, as it will be sent.
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
    frames: str = ""
    protocol: str = ""
    operations: tuple[Operation, ...] = ()
    way: int = 0
    data_classes: tuple[str, ...] = ()
    model: str = ""

    @property
    def allowed(self) -> bool:
        """Return whether the verdict is ``allow``."""
        return self.verdict == ALLOW
