"""An OpenShell policy as the message that its gateway takes, and back.

The message is ``openshell.sandbox.v1.SandboxPolicy`` in the JSON form of Protocol Buffers with the fields' own names. Source:
the descriptors of the Python package ``openshell`` 0.1.5. They differ from the file in names (``filesystem``), in words
(``access`` and ``enforcement`` are enumerations), in what a tool is (``params.name``) and in where the largest body of JSON-RPC
and MCP stands.
"""

from __future__ import annotations

from typing import Any

from saw.policy.errors import PolicyError, Problem

_ENFORCEMENT = "NETWORK_ENFORCEMENT_MODE_"
_ACCESS = "NETWORK_ACCESS_PRESET_"
_SAME = (
    "host", "path", "protocol", "allowed_ips", "allow_encoded_slash", "persisted_queries", "graphql_persisted_queries",
    "graphql_max_body_bytes",
)  # fmt: skip
_MATCH = ("method", "path", "operation_type", "operation_name", "fields")


def message(value: dict[str, Any]) -> dict[str, Any]:
    """Return the message of an exported policy (``Exported.value``). A field that has no place in it raises ``KeyError``."""
    known = {"version", "filesystem_policy", "landlock", "process", "network_policies"}
    _all_known(value, known, "policy")
    return {
        "version": value["version"],
        "filesystem": dict(value["filesystem_policy"]),
        "landlock": dict(value["landlock"]),
        "process": dict(value["process"]),
        "network_policies": {
            key: {
                "name": rule.get("name", key),
                "endpoints": [_endpoint(endpoint) for endpoint in rule["endpoints"]],
                "binaries": [{"path": binary["path"]} for binary in rule["binaries"]],
            }
            for key, rule in value["network_policies"].items()
        },
    }


def value(told: dict[str, Any]) -> dict[str, Any]:
    """Return the policy that a message states, in the words of the file; the inverse of :func:`message`.

    Raises :class:`PolicyError` for a field that :func:`message` never sets: a gateway that states one holds another policy.
    """
    _known_told(told, {"version", "filesystem", "landlock", "process", "network_policies"}, "policy")
    rules = told.get("network_policies", {})
    filesystem = {"include_workdir": False, "read_only": [], "read_write": []} | told.get("filesystem", {})
    return {
        "version": told.get("version", 0),
        "filesystem_policy": filesystem,
        "landlock": told.get("landlock", {}),
        "process": told.get("process", {}),
        "network_policies": {
            key: ({"name": rule["name"]} if rule.get("name", key) != key else {})
            | {
                "endpoints": [_told_endpoint(endpoint, f"{key}.endpoints") for endpoint in rule.get("endpoints", [])],
                "binaries": [{"path": binary.get("path", "")} for binary in rule.get("binaries", [])],
            }
            for key, rule in rules.items()
        },
    }


def _all_known(given: dict[str, Any], known: set[str], where: str) -> None:
    unknown = set(given) - known
    if unknown:
        raise KeyError(f"{where}: no field of the message takes {sorted(unknown)}")


def _known_told(given: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        reason = f"OpenShell states {', '.join(unknown)}, which this policy never says"
        raise PolicyError([Problem("OpenShell", 1, 1, where, reason, "find out who else changes its policy")])


def _endpoint(endpoint: dict[str, Any]) -> dict[str, Any]:
    _all_known(
        endpoint,
        {*_SAME, "port", "ports", "enforcement", "access", "rules", "deny_rules", "json_rpc", "mcp"},
        "endpoint",
    )
    ports = list(endpoint.get("ports") or [endpoint["port"]])
    told: dict[str, Any] = {key: endpoint[key] for key in _SAME if key in endpoint}
    told |= {"port": ports[0], "ports": ports, "enforcement": _ENFORCEMENT + endpoint["enforcement"].upper()}
    if endpoint.get("access"):
        told["access"] = _ACCESS + endpoint["access"].upper().replace("-", "_")
    if "rules" in endpoint:
        told["rules"] = [{"allow": _match(rule["allow"])} for rule in endpoint["rules"]]
    if "deny_rules" in endpoint:
        told["deny_rules"] = [_match(match) for match in endpoint["deny_rules"]]
    if "json_rpc" in endpoint:
        told["json_rpc_max_body_bytes"] = endpoint["json_rpc"]["max_body_bytes"]
    if "mcp" in endpoint:
        options = dict(endpoint["mcp"])
        told["json_rpc_max_body_bytes"] = options.pop("max_body_bytes")
        told["mcp"] = options
    return told


def _match(match: dict[str, Any]) -> dict[str, Any]:
    _all_known(match, {*_MATCH, "query", "tool", "params"}, "rule")
    told: dict[str, Any] = {key: match[key] for key in _MATCH if key in match}
    if "query" in match:
        told["query"] = {key: _matcher(glob) for key, glob in match["query"].items()}
    tool = match.get("tool") or match.get("params", {}).get("name")
    if tool:
        told["params"] = {"name": _matcher(tool)}
    return told


def _matcher(glob: str | dict[str, Any]) -> dict[str, Any]:
    return {"glob": glob} if isinstance(glob, str) else {"any": list(glob["any"])}


def _told_endpoint(told: dict[str, Any], where: str) -> dict[str, Any]:
    words = {"port", "ports", "enforcement", "access", "rules", "deny_rules", "json_rpc_max_body_bytes", "mcp"}
    _known_told(told, {*_SAME, *words}, where)
    endpoint = {key: told[key] for key in _SAME if key in told}
    ports = told.get("ports") or [told.get("port", 0)]
    endpoint |= {"port": ports[0]} if len(ports) == 1 else {"ports": ports}
    endpoint["enforcement"] = told.get("enforcement", _ENFORCEMENT + "AUDIT").removeprefix(_ENFORCEMENT).lower()
    if "access" in told:
        endpoint["access"] = told["access"].removeprefix(_ACCESS).lower().replace("_", "-")
    if "rules" in told:
        endpoint["rules"] = [{"allow": _told_match(rule.get("allow", {}), where)} for rule in told["rules"]]
    if "deny_rules" in told:
        endpoint["deny_rules"] = [_told_match(match, where) for match in told["deny_rules"]]
    body = {"max_body_bytes": told["json_rpc_max_body_bytes"]} if "json_rpc_max_body_bytes" in told else {}
    if told.get("protocol") == "mcp":
        endpoint |= {"mcp": body | told.get("mcp", {})} if body or "mcp" in told else {}
    elif body:
        endpoint["json_rpc"] = body
    return endpoint


def _told_match(told: dict[str, Any], where: str) -> dict[str, Any]:
    _known_told(told, {*_MATCH, "query", "params"}, where)
    match: dict[str, Any] = {key: told[key] for key in _MATCH if key in told}
    if "query" in told:
        match["query"] = {key: _told_matcher(glob) for key, glob in told["query"].items()}
    params = dict(told.get("params", {}))
    if "name" in params:
        match["tool"] = _told_matcher(params.pop("name"))
    _known_told(params, set(), f"{where}.params")
    return match


def _told_matcher(told: dict[str, Any]) -> Any:
    return {"any": told["any"]} if told.get("any") else told.get("glob", "")
