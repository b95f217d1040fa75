"""What ``governance.yaml`` must fulfil beyond its types, and what the two files must agree on."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar
from urllib.parse import urlsplit

from saw.policy import globs, websocket
from saw.policy.addresses import is_blocked_host
from saw.policy.always_on import Agent, check_agent_name, check_agents, check_command
from saw.policy.checks_budgets import (
    GOVERNANCE_BUDGETS,
    check_aliases,
    check_amount,
    check_count,
    check_currency,
    check_limit,
    check_model,
    check_optional_price,
    check_per,
    check_price,
    check_priced,
    check_tokens,
    each,
    repeated,
)
from saw.policy.checks_calls import check_action_match
from saw.policy.checks_inference import (
    check_classes,
    check_classes_are_handled,
    check_record,
    check_upstreams,
)
from saw.policy.checks_policy import (
    check_absolute,
    check_flat_glob,
    check_host_glob,
    check_path_glob,
    not_empty,
    port_is_valid,
)
from saw.policy.databases import Postgres, check_name, check_postgres
from saw.policy.decode import Checks, Report, StructureReport
from saw.policy.governance import (
    LONGEST_TRUST_S,
    Action,
    ActionMatch,
    Blueprint,
    Budget,
    CallLimit,
    Credential,
    DataClasses,
    GitMatch,
    Governance,
    InferenceRoute,
    Inject,
    LandlockFloor,
    Lease,
    Limit,
    Price,
    Record,
    Upstream,
    duration,
)
from saw.policy.linear_regex import LinearRegex, RegexError
from saw.policy.partial import Unknown
from saw.policy.persistence import (
    Persistence,
    check_git_setting,
    check_persistence,
    check_place,
    check_text,
    check_writable,
)
from saw.policy.providers import (
    OAuth2,
    SigV4,
    check_client_id,
    check_method,
    check_oauth2,
    check_optional_reference,
    check_provider,
    check_reference,
    check_resource,
    check_scope,
    check_signed,
    check_token_url,
    may_share,
    routed_scope,
    secrets_apart,
)
from saw.policy.sandbox_limits import (
    MOST_WEIGHT,
    Sandbox,
    SandboxLimits,
    between,
    check_cores,
    check_memory,
    check_size,
    check_tmp,
)
from saw.policy.tool_rules import Argument, Mcp, McpServer, Reviewers, Tool, http_address

T = TypeVar("T")

MAX_SERVERS = 256
"""Most MCP servers of one bundle: each is compared with the endpoints at its host."""

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")
_DEFINITION = re.compile(r"sha256:[0-9a-f]{64}\Z")
_VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+(?:[-+][A-Za-z0-9.+-]+)?\Z")
_TOOL = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")
_HEADER = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,63}\Z")
_FORMAT = re.compile(r"[ -~]*\Z")
_B64 = re.compile(r"\{b64:[^{}]*\{secret\}[^{}]*\}")
_FORBIDDEN_HEADERS = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "upgrade", "te", "trailer", "expect"}
)


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``host:port``; raise ``ValueError`` for other forms."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not port_is_valid(int(port)):
        raise ValueError(f"{text!r} is not host:port")
    return host.lower(), int(port)


def _address(value: str, report: Report) -> None:
    try:
        host, _ = parse_address(value)
    except ValueError as error:
        report(str(error), "write for example api.example.com:443")
        return
    if not globs.is_exact(host):
        report(f"{value!r} has a wildcard", "name the exact host")
    else:
        check_host_glob(host, report)


def _duration(value: str, report: Report) -> None:
    try:
        duration(value)
    except ValueError as error:
        report(str(error), "write a number with s, m, h or d")


def _matches(pattern: re.Pattern[str], what: str, cure: str) -> Callable[[str, Report], None]:
    def check(value: str, report: Report) -> None:
        if not pattern.match(value):
            report(f"{value!r} is not {what}", cure)

    return check


def _ttl(lease: Lease, report: StructureReport) -> None:
    if not 30 <= lease.ttl_s <= 3600:
        report("ttl", f"a lease of {lease.ttl} is outside 30s to 1h", "use 120s")


def _offline_ttl(lease: Lease, report: StructureReport) -> None:
    longest = LONGEST_TRUST_S - lease.ttl_s
    if lease.offline_ttl_s > max(0, longest):
        reason = f"{lease.ttl} and {lease.offline_ttl} offline are longer than a workspace's certificate counts (10m)"
        report("offline_ttl", reason, f"write at most {longest}s" if longest > 0 else "write 0s, or a shorter ttl")


_data_class = _matches(_ID, "a class of data", "use lower-case letters, digits and dashes")


def _data_classes(value: DataClasses, report: StructureReport) -> None:
    handles = set(value.handles)
    for index, name in enumerate(value.never):
        if name in handles:
            report(("never", index), f"{name} is handled as well", "remove it from one of the two")
    for index, name in enumerate(value.assumed or ()):
        if name not in handles:
            report(("assumed", index), f"{name} is not handled", "add it to handles, or remove it here")
    for name, hosts in value.only_to.items():
        if name not in handles:
            report(("only_to", name), f"{name} is not handled", "add it to handles, or remove it here")
        if not hosts:
            report(("only_to", name), "the list is empty", "name at least one host")
        for index, host in enumerate(hosts):
            try:
                globs.host_glob(host.lower())
            except globs.GlobError as error:
                report(("only_to", name, index), str(error), "name a host such as api.example.com or *.example.com")


def _hooks(value: str, report: Report) -> None:
    if value:
        check_absolute(value, report)


def _landlock(value: LandlockFloor, report: StructureReport) -> None:
    if not 1 <= value.minimum_abi <= 16:
        report("minimum_abi", f"{value.minimum_abi} is not an ABI version", "write 4")


def _header(value: str, report: Report) -> None:
    if not _HEADER.match(value) or value.lower() in _FORBIDDEN_HEADERS or value.lower().startswith("x-saw-"):
        report(f"{value!r} cannot carry a credential", "use Authorization or a header of the service")


def _format(value: str, report: Report) -> None:
    if not _FORMAT.match(value):
        report("the format has characters outside printable ASCII", "write a header value")
    elif value.count("{secret}") != 1 or "{" in _B64.sub("", value).replace("{secret}", "", 1):
        report("the format must hold {secret} or {b64:text{secret}} once, and no other braces", "see docs/policy.md")


def _upstream(value: str, report: Report) -> None:
    try:
        parts = urlsplit(value)
        port = parts.port or 443
    except ValueError as error:
        report(f"{value!r} is not a URL: {error}", "write https://host/path")
        return
    host = parts.hostname or ""
    if parts.scheme != "https" or not host or parts.query or parts.fragment or "@" in parts.netloc:
        report("the upstream must be https://host[:port]/path and nothing else", "correct the URL")
        return
    check_host_glob(host, report)
    if not globs.is_exact(host) or not port_is_valid(port):
        report("the upstream needs one exact host and a valid port", "correct the URL")
    if parts.path:
        check_path_glob(parts.path, report)


def _route_port(value: int, report: Report) -> None:
    if not port_is_valid(value):
        report(f"{value} is not a port", "write 443")


def _alias(value: str, report: Report) -> None:
    if not globs.is_exact(value) or is_blocked_host(value):
        report("the alias must be one exact host name", "write inference.local")
    else:
        check_host_glob(value, report)


def _ref(value: str, report: Report) -> None:
    try:
        globs.ref_glob(value)
    except globs.GlobError as error:
        report(str(error), "write for example refs/heads/agent/**")


def _verb(value: str, report: Report) -> None:
    if value != websocket.TEXT and not re.match(r"[A-Z][A-Z-]{0,31}\Z", value):
        report(f"{value!r} is not an upper-case HTTP method", "write for example POST")


def _action_reviewers(action: Action, report: StructureReport) -> None:
    if action.reviewers is not None and action.class_ != "review":
        report("reviewers", f"reviewers have no part in class {action.class_}", "remove them or use class review")


def _git_or_method(match: ActionMatch, report: StructureReport) -> None:
    if match.git is not None and match.method:
        report("method", "a git match already implies the method", "remove method")


def _reviewers(value: Reviewers, report: StructureReport) -> None:
    if not 1 <= value.quorum <= 16:
        report("quorum", f"a quorum of {value.quorum} is outside 1 to 16", "write 1")


def _servers(mcp: Mcp, report: StructureReport) -> None:
    if len(mcp.servers) > MAX_SERVERS:
        report("servers", f"more than {MAX_SERVERS} servers", "remove those that nobody needs, or split the bundle")


def _tool(tool: Tool, report: StructureReport) -> None:
    for name in ("reviewers", "expires"):
        if getattr(tool, name) is not None and tool.class_ != "review":
            report(name, f"{name} have no part in class {tool.class_}", "remove it or use class review")


def _tools_over_http(server: McpServer, report: StructureReport) -> None:
    asked = [name for name, tool in server.tools.items() if tool.reviewers is not None or tool.expires is not None]
    if server.transport == "http" and asked:
        report(
            "tools",
            f"reviewers and expires of {asked[0]!r} would not be read: over HTTP an action rule names them",
            "write an action with match: {host, mcp: {tool}} and reviewers",
        )


def _server(server: McpServer, report: StructureReport) -> None:
    if server.transport == "stdio":
        if not server.command or not server.command[0]:
            report("command", "a stdio server needs a command", "write the executable and its arguments")
        if server.url:
            report("url", "a stdio server is not called at a URL", "remove it, or use transport: http")
        return
    if server.command:
        report("command", "a server over HTTP is not started here", "remove it, or use transport: stdio")
    try:
        http_address(server.url)
    except ValueError as error:
        report("url", f"{server.url[:200]!r} is not where a server is called: {error}", "write https://host/path")


def _argument(argument: Argument, report: StructureReport) -> None:
    kind = argument.type
    if argument.items is not None and kind != "array":
        report("items", f"items do not apply to {kind}", "use type: array")
    if kind == "array" and argument.items is None:
        report("type", "an array needs items", "say what each element may be")
    if kind == "object":
        report("type", "the content of objects is not enforced by this version", "remove the argument")
    if kind != "string" and (argument.under is not None or argument.regex is not None):
        report("type", f"under and regex do not apply to {kind}", "use type: string")
    if kind not in {"integer", "number"} and (argument.min is not None or argument.max is not None):
        report("type", f"min and max do not apply to {kind}", "use type: integer")
    if kind not in {"string", "array"} and argument.max_length is not None:
        report("type", f"max_length does not apply to {kind}", "remove it")


def _under(value: str, report: Report) -> None:
    check_absolute(value, report)


def _regex(value: str, report: Report) -> None:
    try:
        LinearRegex(value)
    except RegexError as error:
        report(str(error), "use literals, classes, groups, |, *, +, ? and {m,n}")


def _tool_name(value: str, report: Report) -> None:
    if not _TOOL.match(value):
        report(f"{value!r} is not a tool name", "use letters, digits, underscore, dot and dash, at most 128")


def _credential_ids(value: Governance, report: StructureReport) -> None:
    for index, name in repeated(each(value.credentials, lambda credential: credential.id)):
        report(("credentials", index, "id"), f"the id {name} is used twice", "give each credential its own id")


def _aliases(value: Governance, report: StructureReport) -> None:
    routes = value.inference.routes
    for index, _ in repeated(each(routes, lambda route: (route.alias.lower(), route.port))):
        where = ("inference", "routes", index, "alias")
        report(where, "two routes have the same alias and port", "give each route its own alias")


def _route_credentials(value: Governance, report: StructureReport) -> None:
    ids = {credential.id for credential in value.credentials}
    for index, name in each(value.inference.routes, lambda route: route.credential):
        if name is not None and name not in ids:
            where = ("inference", "routes", index, "credential")
            report(where, f"it names the unknown credential {name}", "list it under credentials")
    for index, route in enumerate(value.inference.routes):
        with suppress(Unknown):
            for place, name in each(route.upstreams, lambda way: way.credential):
                if name is not None and name not in ids:
                    at = ("inference", "routes", index, "upstreams", place, "credential")
                    report(at, f"it names the unknown credential {name}", "list it under credentials")


def _credentials_apart(value: Governance, report: StructureReport) -> None:
    for index, right in enumerate(value.credentials):
        for left in value.credentials[:index]:
            with suppress(Unknown):
                shared = {host.lower() for host in left.hosts} & {host.lower() for host in right.hosts}
                if (
                    shared
                    and may_share(left.methods, right.methods)
                    and any(globs.may_overlap(a, b) for a in left.paths for b in right.paths)
                ):
                    reason = f"{left.id} and {right.id} both apply on {', '.join(sorted(shared))}"
                    report(("credentials", index), reason, "make their paths or methods disjoint")


def _no_plain_credentials(value: Governance, report: StructureReport) -> None:
    plain = {host.lower(): index for index, host in enumerate(value.plaintext)}
    for credential in value.credentials:
        with suppress(Unknown):
            for host in credential.hosts:
                if host.lower() in plain:
                    reason = f"credential {credential.id} would travel unencrypted to {host}"
                    report(("plaintext", plain[host.lower()]), reason, "remove it")


_GOVERNANCE = (
    _credential_ids,
    _aliases,
    _route_credentials,
    _credentials_apart,
    _no_plain_credentials,
    routed_scope,
    secrets_apart,
    check_classes_are_handled,
    *GOVERNANCE_BUDGETS,
)

_LATER = "this field is not enforced by this version"

GOVERNANCE_CHECKS = Checks(
    fields={
        (Blueprint, "name"): _matches(_ID, "a blueprint name", "use lower-case letters, digits and dashes"),
        (Blueprint, "version"): _matches(_VERSION, "a version", "write for example 1.0.0"),
        (Lease, "ttl"): _duration,
        (Lease, "offline_ttl"): _duration,
        (Credential, "id"): _matches(_ID, "an id", "use lower-case letters, digits and dashes"),
        (Credential, "ref"): check_reference,
        (Postgres, "user"): check_name,
        (SigV4, "service"): check_signed,
        (SigV4, "region"): check_signed,
        (OAuth2, "token_url"): check_token_url,
        (OAuth2, "client_id"): check_client_id,
        (OAuth2, "client_secret"): check_optional_reference,
        (OAuth2, "resource"): check_resource,
        (Credential, "paths"): not_empty(
            "the list is empty, so the credential would never be used", "add /** or remove the field"
        ),
        (Inject, "header"): _header,
        (Inject, "format"): _format,
        (InferenceRoute, "alias"): _alias,
        (InferenceRoute, "models"): not_empty("the list is empty", "list at least one glob"),
        (InferenceRoute, "upstream"): _upstream,
        (InferenceRoute, "port"): _route_port,
        (InferenceRoute, "max_input_tokens"): check_tokens,
        (InferenceRoute, "max_output_tokens"): check_tokens,
        (InferenceRoute, "data_classes"): check_classes,
        (Upstream, "upstream"): _upstream,
        (Upstream, "data_classes"): check_classes,
        (Record, "keep"): _duration,
        (Price, "models"): not_empty("the list is empty", "list at least one glob"),
        (Price, "input"): check_price,
        (Price, "output"): check_price,
        (Price, "cache_read"): check_optional_price,
        (Price, "cache_write"): check_optional_price,
        (CallLimit, "id"): _matches(_ID, "an id", "use lower-case letters, digits and dashes"),
        (CallLimit, "per"): check_per,
        (CallLimit, "requests"): check_count,
        (CallLimit, "tokens"): check_count,
        (Budget, "id"): _matches(_ID, "an id", "use lower-case letters, digits and dashes"),
        (Limit, "currency"): check_currency,
        (Limit, "amount"): check_amount,
        (GitMatch, "ref"): _ref,
        (ActionMatch, "host"): check_host_glob,
        (ActionMatch, "path"): check_path_glob,
        (Action, "expires"): _duration,
        (Tool, "expires"): _duration,
        (Argument, "under"): _under,
        (Persistence, "git_hooks"): _hooks,
        (Sandbox, "agents"): check_agents,
        (Agent, "command"): check_command,
        (SandboxLimits, "memory"): check_memory,
        (SandboxLimits, "swap"): check_size,
        (SandboxLimits, "tasks"): between(32, 32768, "tasks"),
        (SandboxLimits, "cpu"): check_cores,
        (SandboxLimits, "cpu_weight"): between(1, MOST_WEIGHT, "parts"),
        (SandboxLimits, "io_weight"): between(1, MOST_WEIGHT, "parts"),
        (SandboxLimits, "tmp"): check_tmp,
        (SandboxLimits, "shm"): check_tmp,
        (SandboxLimits, "inodes"): between(1024, 1048576, "files and directories"),
        (SandboxLimits, "files"): between(64, 65536, "open files"),
        (Argument, "regex"): _regex,
        (Tool, "definition"): _matches(
            _DEFINITION, "the hash of a definition", "write what `saw policy definitions` prints"
        ),
    },
    items={
        (Governance, "plaintext"): _address,
        (Credential, "hosts"): _address,
        (Credential, "paths"): check_path_glob,
        (Credential, "methods"): check_method,
        (Postgres, "databases"): check_name,
        (OAuth2, "scopes"): check_scope,
        (InferenceRoute, "models"): check_flat_glob,
        (Upstream, "models"): check_flat_glob,
        (Price, "models"): check_flat_glob,
        (ActionMatch, "method"): _verb,
        (DataClasses, "handles"): _data_class,
        (DataClasses, "never"): _data_class,
        (InferenceRoute, "data_classes"): _data_class,
        (Upstream, "data_classes"): _data_class,
        (Persistence, "files"): check_text,
        (Persistence, "writable"): check_writable,
        (Persistence, "git_settings"): check_git_setting,
    },
    structures={
        Lease: (_ttl, _offline_ttl),
        LandlockFloor: (_landlock,),
        DataClasses: (_data_classes,),
        Persistence: (check_persistence,),
        Action: (_action_reviewers,),
        ActionMatch: (_git_or_method, check_action_match),
        InferenceRoute: (check_priced, check_aliases, check_upstreams),
        Record: (check_record,),
        CallLimit: (check_limit,),
        OAuth2: (check_oauth2,),
        Credential: (check_provider,),
        Postgres: (check_postgres,),
        Reviewers: (_reviewers,),
        Mcp: (_servers,),
        McpServer: (_server, _tools_over_http),
        Tool: (_tool,),
        Argument: (_argument,),
        Governance: _GOVERNANCE,
    },
    keys={
        (DataClasses, "only_to"): _data_class,
        (Persistence, "files"): check_place,
        (InferenceRoute, "aliases"): check_model,
        (Upstream, "aliases"): check_model,
        (Sandbox, "agents"): check_agent_name,
        (Mcp, "servers"): _matches(_ID, "a server name", "use lower-case letters, digits and dashes"),
        (McpServer, "tools"): _tool_name,
        (Tool, "args"): _tool_name,
    },
    unsupported={
        (Governance, "delegation"): (_LATER, "remove it"),
    },
)
