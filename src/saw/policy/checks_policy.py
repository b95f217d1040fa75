"""What ``policy.yaml`` must fulfil beyond its types, and which public fields this version refuses.

A field that is not enforced is refused by name: a policy that loads is a policy that holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Network, ip_network
from typing import Any

from saw.policy import checks_calls, databases, globs, websocket
from saw.policy.addresses import blocked_networks, is_blocked_host
from saw.policy.decode import Checks, Report, StructureCheck, StructureReport
from saw.policy.errors import NotCanonical
from saw.policy.model import (
    CALL_PROTOCOLS,
    AnyOf,
    Binary,
    Endpoint,
    FilesystemPolicy,
    Match,
    NetworkRule,
    Policy,
    Process,
)
from saw.policy.paths import canonicalise_path

MAX_DIRECTORIES = 256
"""Most directories of a file system policy, read-only and read-write together."""

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx", "/dev/pts")
"""The device nodes of every sandbox. Beside them only a GPU's can be granted, so no other one may be listed."""

GPU_DEVICE = re.compile(r"/dev/nvidia([0-9]{1,2}|ctl|-uvm|-uvm-tools)\Z")
"""A device node of a GPU: granted to the sandbox by being listed as ``read_write``, and absent from it otherwise."""

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the sandbox's own
"""The one writable directory below ``/dev``, private to each sandbox."""

_LATER = "this field is not enforced by this version"
_CONVERT = "saw policy import FILE --out FOLDER --owner TEAM takes over what it can and reports the rest"
_REMOVE = f"remove it; {_CONVERT}"

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_ACCOUNT = re.compile(r"[a-z_][a-z0-9_-]{0,31}\Z")


def check_path_glob(value: str, report: Report, *, what: str = "path") -> None:
    """Report a path glob that is not a glob over canonical paths."""
    try:
        globs.path_glob(value)
    except globs.GlobError as error:
        report(str(error), "write for example /v1/** or /v1/*/items")
        return
    try:
        canonical = canonicalise_path(value, allow_encoded_slash=True)
    except NotCanonical as error:
        report(f"no request can match: {error.message}", f"write the {what} in canonical form")
        return
    if canonical != value:
        report(f"no request can match: the canonical form is {canonical}", f"write {canonical}")


def check_host_glob(value: str, report: Report) -> None:
    """Report a host that is not a host name or glob, or that may never be dialled."""
    if ":" in value:
        report("the host holds a colon", "name a host or an IPv4 address; the port has its own field")
        return
    try:
        globs.host_glob(value)
    except globs.GlobError as error:
        report(str(error), "name a host such as api.example.com or *.example.com")
        return
    blocked = is_blocked_host(value.replace("*", "x"))
    if blocked:
        report(blocked, "name another host")


def check_absolute(value: str, report: Report) -> None:
    """Report a directory or file name that is not absolute and plain."""
    if not value.startswith("/"):
        report(f"{value!r} is not absolute", "start it with /")
    elif any(part in {"..", "."} for part in value.split("/")) or "//" in value:
        report(f"{value!r} has dot or empty segments", "write the plain path")
    elif not value.isprintable() or any(char in value for char in "*?[]{}\\"):
        report(f"{value!r} has wildcards or control characters", "list directories one by one")


def _directory(value: str, report: Report) -> None:
    check_absolute(value, report)
    if GPU_DEVICE.match(value):
        report(
            f"{value!r} is a GPU's device node, which nothing can use read-only", "list it as read_write, or remove it"
        )
    elif (value + "/").startswith("/dev/") and value not in {*DEVICES, SHARED_MEMORY}:
        report(
            f"{value!r} is no device of the sandbox, so listing it would grant nothing",
            f"remove it; {', '.join(DEVICES)} and {SHARED_MEMORY} are there without being listed",
        )


def _read_write(value: str, report: Report) -> None:
    if GPU_DEVICE.match(value):
        return
    _directory(value, report)
    if value.rstrip("/") == "":
        report("the whole file system would be writable", "list the directories to write to")


def not_empty(reason: str, cure: str) -> Callable[[Any, Report], None]:
    """Return a check that reports an empty list."""

    def check(value: Any, report: Report) -> None:
        if not value:
            report(reason, cure)

    return check


def _binary(value: str, report: Report) -> None:
    if any(part in {"..", "."} for part in value.split("/")) or "//" in value:
        report(f"{value!r} has dot or empty segments", "write the resolved path of the executable")
        return
    try:
        globs.path_glob(value)
    except globs.GlobError as error:
        report(str(error), "write an absolute path or glob such as /usr/bin/git")


def _account(value: str, report: Report) -> None:
    if value in {"root", "toor"}:
        report("the sandbox never runs as root", "name an unprivileged account")
    elif not _ACCOUNT.match(value):
        report(f"{value!r} is not the name of an account", "write a lower-case name such as agent (no number)")


def check_flat_glob(value: str, report: Report) -> None:
    """Report a glob over plain text that is none."""
    try:
        globs.flat_glob(value)
    except globs.GlobError as error:
        report(str(error), "write literal text with * as the wildcard")


def _query(value: str | AnyOf, report: Report) -> None:
    if isinstance(value, str):
        check_flat_glob(value, report)


def port_is_valid(port: int) -> bool:
    """Return whether ``port`` is a TCP port."""
    return 1 <= port <= 65535


def _port(value: int | None, report: Report) -> None:
    if value is not None and not port_is_valid(value):
        report(f"{value} is not a port", "write a number from 1 to 65535")


def _allowed_ip(value: str, report: Report) -> None:
    try:
        network = ip_network(value)
    except ValueError as error:
        report(f"{value!r} is not a network: {error}", "write for example 10.20.0.0/16")
        return
    for blocked in blocked_networks():
        same_family = isinstance(network, IPv4Network) == isinstance(blocked, IPv4Network)
        if same_family and network.overlaps(blocked):
            report(f"{value} holds addresses of {blocked}, which are always blocked", "list smaller networks")
            break


def _protocol(value: str, report: Report) -> None:
    if value not in {"", "rest", websocket.PROTOCOL, databases.PROTOCOL, *CALL_PROTOCOLS}:
        report(f"protocol {value} is not enforced by this version", f"use rest, or remove the endpoint; {_CONVERT}")


def _tls(value: str, report: Report) -> None:
    if value in {"skip", "passthrough"}:
        report(
            "uninspected TLS is not carried: every call is decided by host, method and path", f"remove tls; {_CONVERT}"
        )


def _host(value: str, report: Report) -> None:
    if not value:
        report("an endpoint without a host is not enforced by this version", "name the host; keep allowed_ips")
    else:
        check_host_glob(value, report)


def _has_host(endpoint: Endpoint, report: StructureReport) -> None:
    if not endpoint.host:
        report("host", "an endpoint without a host is not enforced by this version", "name the host")


def _has_port(endpoint: Endpoint, report: StructureReport) -> None:
    if not endpoint.all_ports:
        report("", "the endpoint has neither port nor ports", "add port: 443")


def _one_base(endpoint: Endpoint, report: StructureReport) -> None:
    if endpoint.access and endpoint.rules is not None:
        report("access", "access and rules exclude each other", "keep one of the two")


def _some_rules(endpoint: Endpoint, report: StructureReport) -> None:
    if endpoint.rules is not None and not endpoint.rules:
        report("rules", "the list of rules is empty, so nothing would be allowed", "add a rule or remove the endpoint")


def _some_deny_rules(endpoint: Endpoint, report: StructureReport) -> None:
    if endpoint.deny_rules is not None and not endpoint.deny_rules:
        report("deny_rules", "the list is empty", "add a rule or remove the field")


def _deny_rules_narrow(endpoint: Endpoint, report: StructureReport) -> None:
    profile = endpoint.protocol == "mcp" and endpoint.mcp is not None and endpoint.mcp.allow_all_known_mcp_methods
    base = bool(endpoint.access) or bool(endpoint.rules) or profile
    if endpoint.deny_rules is not None and (not endpoint.protocol or not base):
        report("deny_rules", "deny_rules need a protocol and access or rules to narrow", "add them")


def _protocol_and_base(endpoint: Endpoint, report: StructureReport) -> None:
    base = bool(endpoint.access) or bool(endpoint.rules)
    if not endpoint.protocol and base:
        report("protocol", "access and rules need a protocol", "add protocol: rest")
    if endpoint.protocol in {"rest", websocket.PROTOCOL} and not base:
        report("protocol", f"a {endpoint.protocol} endpoint needs access or rules", "add access: read-only, or rules")


_ENDPOINT: tuple[StructureCheck, ...] = (
    _has_host,
    _has_port,
    _one_base,
    _some_rules,
    _some_deny_rules,
    _deny_rules_narrow,
    _protocol_and_base,
    checks_calls.fields_of_protocol,
    checks_calls.options_of_protocol,
    checks_calls.graphql,
    checks_calls.json_rpc,
    checks_calls.mcp,
    databases.check_endpoint,
)


def _has_endpoints(rule: NetworkRule, report: StructureReport) -> None:
    if not rule.endpoints:
        report("endpoints", "the list is empty", "add an endpoint or remove the rule")


def _has_binaries(rule: NetworkRule, report: StructureReport) -> None:
    if not rule.binaries:
        report("binaries", "the list is empty, so no process could use this rule", "list the executables")


def _filesystem(value: FilesystemPolicy, report: StructureReport) -> None:
    count = len(value.read_only) + len(value.read_write)
    if count > MAX_DIRECTORIES:
        report("", f"{count} directories are listed", f"list at most {MAX_DIRECTORIES}")


def _rule_key(value: str, report: Report) -> None:
    if value.startswith("_provider_"):
        report("names that start with _provider_ are reserved", "choose another name")
    elif not _KEY.match(value):
        report(f"{value!r} is not a name", "use letters, digits, dot, dash and underscore")


def _off(value: bool, report: Report) -> None:
    if value:
        report(_LATER, f"write false, or {_REMOVE}")


def _no_middlewares(value: dict[str, Any], report: Report) -> None:
    if value:
        report("nothing here looks into or changes bodies: this field is not enforced by this version", _REMOVE)


POLICY_CHECKS = Checks(
    fields={
        (Process, "run_as_user"): _account,
        (Process, "run_as_group"): _account,
        (AnyOf, "any"): not_empty("the list is empty", "list at least one glob"),
        (Binary, "path"): _binary,
        (Match, "path"): check_path_glob,
        (Endpoint, "host"): _host,
        (Endpoint, "port"): _port,
        (Endpoint, "ports"): not_empty("the list of ports is empty", "list at least one port"),
        (Endpoint, "path"): check_path_glob,
        (Endpoint, "protocol"): _protocol,
        (Endpoint, "tls"): _tls,
        (Endpoint, "websocket_credential_rewrite"): _off,
        (Endpoint, "request_body_credential_rewrite"): _off,
        (Endpoint, "allow_uninspected_credentials"): _off,
        (Policy, "network_middlewares"): _no_middlewares,
        (Endpoint, "allowed_ips"): not_empty(
            "the list is empty", "list networks such as 10.20.0.0/16, or remove the field"
        ),
    },
    items={
        (FilesystemPolicy, "read_only"): _directory,
        (FilesystemPolicy, "read_write"): _read_write,
        (AnyOf, "any"): check_flat_glob,
        (Match, "query"): _query,
        (Endpoint, "ports"): _port,
        (Endpoint, "allowed_ips"): _allowed_ip,
    },
    structures={
        Endpoint: _ENDPOINT,
        NetworkRule: (_has_endpoints, _has_binaries),
        FilesystemPolicy: (_filesystem,),
    },
    keys={(Policy, "network_policies"): _rule_key},
    unsupported={
        **{
            (Endpoint, field): (_LATER, _REMOVE)
            for field in (
                "credential_signing",
                "signing_service",
                "signing_region",
                "credential_binding",
            )
        },
        (Match, "command"): (_LATER, _REMOVE),
    },
)
