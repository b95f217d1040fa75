"""GraphQL, JSON-RPC and MCP endpoints on their way to OpenShell and back.

Source: the schema reference of NVIDIA OpenShell (0.0.111 and 0.1.x). The fields are the same; ``docs/policy.md`` says what is
narrower here.
"""

from __future__ import annotations

from typing import Any

import msgspec

from saw.policy.model import BODY_LIMIT, Endpoint, Match
from saw.policy.openshell_finding import Finding


def spoken(endpoint: Endpoint, where: str, findings: list[Finding], only_01: bool) -> dict[str, Any]:
    """Return what an exported endpoint says of the calls in its bodies, and report where OpenShell grants more.

    ``only_01``: for 0.1.x alone, which knows the revisions of MCP.
    """
    value: dict[str, Any] = {}
    if endpoint.access:
        value["access"] = endpoint.access
    if endpoint.rules is not None:
        value["rules"] = [{"allow": _match(rule.allow, endpoint.protocol)} for rule in endpoint.rules]
    if endpoint.deny_rules:
        value["deny_rules"] = [_match(match, endpoint.protocol) for match in endpoint.deny_rules]
    if endpoint.protocol == "graphql":
        value["graphql_max_body_bytes"] = endpoint.graphql_max_body_bytes
        value["persisted_queries"] = endpoint.persisted_queries
        if endpoint.graphql_persisted_queries:
            value["graphql_persisted_queries"] = _plain(endpoint.graphql_persisted_queries)
        reason = "there a POST may carry the query in its URL, and a GET may carry a mutation"
        findings.append(Finding(f"{where}.protocol", "wider", reason, "keep ring 2 in front of it"))
    elif endpoint.protocol == "json-rpc":
        value["json_rpc"] = {"max_body_bytes": (endpoint.json_rpc.max_body_bytes if endpoint.json_rpc else BODY_LIMIT)}
    else:
        value |= _mcp(endpoint, where, findings, only_01)
    return value


def _mcp(endpoint: Endpoint, where: str, findings: list[Finding], only_01: bool) -> dict[str, Any]:
    told: dict[str, Any] = _plain(endpoint.mcp) if endpoint.mcp is not None else {}
    versions = told.pop("versions", None)
    if versions and only_01:
        told["versions"] = versions
    elif versions:
        reason = f"0.0.x does not know versions, so other revisions than {', '.join(versions)} are spoken too"
        findings.append(Finding(f"{where}.mcp.versions", "wider", reason, "add mcp.versions by hand for 0.1.x"))
    reason = "answers of the client to what a server asks pass there, and every method when all known ones do"
    findings.append(Finding(f"{where}.protocol", "wider", reason, "keep ring 2 in front of it"))
    reason = "the end of a session (DELETE) is not allowed there"
    findings.append(Finding(f"{where}.protocol", "narrower", reason, "nothing to do; a session ends by itself"))
    return {"mcp": told} if told else {}


def _match(match: Match, protocol: str) -> dict[str, Any]:
    """Return a rule with only what it says; every method has a word of its own in JSON-RPC and none in MCP."""
    empty = {"method": "*", "path": "/**", "query": {}, "operation_name": "", "fields": ()}
    value = {key: found for key, found in _plain(match).items() if found is not None and empty.get(key) != found}
    return {**value, "method": match.method} if protocol == "json-rpc" else value


def imported(endpoint: dict[str, Any], where: str) -> list[Finding]:
    """Bring an endpoint of OpenShell, as read from its file, into our words; return what changes by that."""
    findings: list[Finding] = []
    rules = endpoint.get("rules")
    if endpoint.get("protocol") == "json-rpc" and isinstance(rules, list):
        kept = []
        for index, rule in enumerate(rules):
            match = rule.get("allow") if isinstance(rule, dict) else None
            if isinstance(match, dict) and not match.get("method"):
                reason = "it names no method, which matches nothing there and everything here"
                findings.append(Finding(f"{where}.rules[{index}]", "left_out", reason, "add the method"))
            else:
                kept.append(rule)
        endpoint["rules"] = kept
    if endpoint.get("protocol") == "mcp":
        reason = "a DELETE that ends the client's own session passes here and not there"
        findings.append(Finding(f"{where}.protocol", "wider", reason, "deny it with an action rule if it must not"))
    return findings


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value)
