"""The JSON Schema of ``policy.yaml`` and ``governance.yaml``, made from the structures that the loader reads.

``policies/schema/*.schema.json`` are its output, kept for editors and reviewers. The loader is stricter than a schema can
say (globs, addresses, agreement of the two files); ``saw policy check`` is the judge.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from saw.policy import governance, model

EXAMPLES: dict[str, dict[str, Any]] = {
    "Policy": {
        "version": 1,
        "filesystem_policy": {"include_workdir": False, "read_only": ["/usr"], "read_write": ["/home/agent"]},
        "landlock": {"compatibility": "hard_requirement"},
        "process": {"run_as_user": "agent", "run_as_group": "agent"},
        "network_policies": {
            "api": {
                "endpoints": [{"host": "api.example.com", "port": 443, "protocol": "rest", "access": "read-only"}],
                "binaries": [{"path": "/usr/bin/curl"}],
            }
        },
    },
    "FilesystemPolicy": {"include_workdir": False, "read_only": ["/usr", "/etc"], "read_write": ["/home/agent"]},
    "Landlock": {"compatibility": "hard_requirement"},
    "Process": {"run_as_user": "agent", "run_as_group": "agent"},
    "AnyOf": {"any": ["open", "closed"]},
    "Match": {"method": "GET", "path": "/v1/**", "query": {"state": {"any": ["open", "closed"]}}},
    "AllowRule": {"allow": {"method": "GET", "path": "/v1/**"}},
    "Endpoint": {
        "host": "*.example.com",
        "port": 443,
        "ports": [443, 8443],
        "path": "/v1/**",
        "protocol": "rest",
        "tls": "terminate",
        "enforcement": "enforce",
        "access": "read-only",
        "rules": [{"allow": {"method": "GET", "path": "/v1/**"}}],
        "deny_rules": [{"method": "GET", "path": "/v1/admin/**"}],
        "allowed_ips": ["10.20.0.0/16"],
        "allow_encoded_slash": True,
    },
    "Binary": {"path": "/usr/lib/git-core/**"},
    "NetworkRule": {
        "name": "Read the API",
        "endpoints": [{"host": "api.example.com", "port": 443, "protocol": "rest", "access": "read-only"}],
        "binaries": [{"path": "/usr/bin/curl"}],
    },
    "Governance": {
        "schema": 1,
        "blueprint": {"name": "coding", "version": "1.0.0", "owner": "team-dev-platform"},
        "lease": {"ttl": "120s"},
        "landlock": {"minimum_abi": 4},
        "allow_audit": False,
        "plaintext": ["mirror.example.com:80"],
        "credentials": [{"id": "api-token", "ref": "local:api", "inject": {"header": "X-Key", "format": "{secret}"}}],
        "inference": {"routes": []},
        "actions": [{"match": {"host": "api.example.com", "method": ["POST"]}, "class": "auto"}],
        "mcp": {"servers": {}},
    },
    "Blueprint": {
        "name": "coding",
        "version": "1.0.0",
        "owner": "team-dev-platform",
        "incident_contact": "soc@example.com",
        "review_days": 90,
    },
    "Lease": {"ttl": "120s", "offline_ttl": "0s"},
    "LandlockFloor": {"minimum_abi": 4, "allow_best_effort": False},
    "Credential": {
        "id": "git-token",
        "ref": "local:git-token",
        "inject": {"header": "Authorization", "format": "Basic {b64:x-access-token:{secret}}"},
        "hosts": ["git.example.com:443"],
        "paths": ["/team/**"],
    },
    "Inject": {"header": "Authorization", "format": "Bearer {secret}"},
    "Inference": {
        "routes": [{"alias": "inference.local", "models": ["demo-*"], "upstream": "https://models.example.com/v1"}]
    },
    "InferenceRoute": {
        "alias": "inference.local",
        "models": ["demo-*"],
        "upstream": "https://models.example.com/v1",
        "credential": "model-key",
        "port": 443,
    },
    "Action": {
        "match": {"host": "git.example.com", "git": {"service": "receive-pack"}},
        "class": "review",
        "reviewers": {"group": "maintainers", "quorum": 1},
        "expires": "24h",
    },
    "ActionMatch": {
        "host": "git.example.com",
        "port": 443,
        "method": ["POST"],
        "path": "/team/**",
        "git": {"service": "receive-pack", "ref": "refs/heads/agent/**"},
    },
    "GitMatch": {"service": "receive-pack", "ref": "refs/heads/agent/**", "operation": ["create", "update"]},
    "Reviewers": {"group": "maintainers", "quorum": 2},
    "Mcp": {"servers": {"files": {"transport": "stdio", "command": ["mcp-server-filesystem", "/workspace"]}}},
    "McpServer": {
        "transport": "stdio",
        "command": ["mcp-server-filesystem", "/workspace"],
        "tools": {"read_file": {"class": "auto", "args": {"path": {"under": "/workspace"}}}},
    },
    "Tool": {"class": "auto", "args": {"path": {"under": "/workspace"}}},
    "Argument": {
        "type": "string",
        "required": True,
        "under": "/workspace",
        "regex": "[A-Z]+-[0-9]{1,5}",
        "enum": ["open", "closed"],
        "min": 1,
        "max": 100,
        "max_length": 4096,
        "items": {"under": "/workspace"},
    },
}
"""An example for every field, by structure."""


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("``", "")).strip()


def schema_of(kind: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of ``policy`` or ``governance``."""
    structure = model.Policy if kind == "policy" else governance.Governance
    (reference,), components = msgspec.json.schema_components([structure])
    for name, component in components.items():
        for field, value in component.get("properties", {}).items():
            value["examples"] = [EXAMPLES[name][field]]
        if "description" in component:
            component["description"] = _plain(component["description"])
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{kind}.yaml",
        **reference,
        "$defs": components,
    }
    # Through text, so that tuples of defaults become the lists that a reader of the file sees.
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(schema))
    return plain
