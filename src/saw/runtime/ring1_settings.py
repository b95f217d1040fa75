"""What ring 1 is told, the names of the headers between Envoy and saw-decide, and Envoy's recurring words."""

from __future__ import annotations

from pathlib import Path

import msgspec

Config = dict[str, object]

# Names of the headers between Envoy and saw-decide. A client cannot set them: every x-saw-* header is removed first.
FACT_STAGE = "x-saw-i-stage"
FACT_PATH = "x-saw-i-path"
FACT_SOURCE = "x-saw-i-source"
FACT_CONNECT = "x-saw-i-connect"
FACT_SNI = "x-saw-i-sni"
FACT_UPGRADE = "x-saw-i-upgrade"
ANSWER_PATH = "x-saw-i-to-path"
ANSWER_AUTHORITY = "x-saw-i-to-authority"

# Headers that the matcher reads: what a body and an MCP session are, and what could make a service act on another method or path.
POLICY_HEADERS = (
    "accept",
    "content-type",
    "content-encoding",
    "mcp-method",
    "mcp-name",
    "mcp-protocol-version",
    "mcp-session-id",
    "x-http-method-override",
    "x-http-method",
    "x-method-override",
    "x-original-url",
    "x-rewrite-url",
    "x-forwarded-path",
)

PROBE_HOST = "ring1.saw.internal"
PROBE_PATH = "/generation"
REFUSALS_PATH = "/refusals"
"""Where the sandbox reads what was refused last, for clients that show no more of an answer than its status."""
POLICY_HOST = "policy.local"
"""Where the sandbox reads the policy in force and asks people for more; ring 1 answers it, whatever a policy says of it."""
POLICY_PREFIX = "/policy.local"
"""Under which path the decision service answers what is asked there."""
POLICY_CALLS = (
    ("GET", "/"),
    ("GET", "/text"),
    ("GET", "/v1/policy"),
    ("GET", "/v1/requests"),
    ("POST", "/v1/requests"),
)
STATE_AUTHORITY = "saw.connect.authority"
STATE_SOURCE = "saw.connect.source"

API = "type.googleapis.com/envoy"


class Ring1(msgspec.Struct, frozen=True, kw_only=True):
    """Where ring 1 listens, what it trusts and whom it calls. Times are in seconds, sizes in bytes."""

    ring2_address: str
    ring2_port: int
    ring2_name: str = "ring2.saw.internal"
    listen_address: str = "10.200.0.1"
    listen_port: int = 3128
    decide_socket: Path = Path("/run/saw/decide/authz.sock")
    sds_file: Path = Path("/run/saw/svid/sds.json")
    ca_file: Path = Path("/run/saw/ca.pem")
    generations: Path = Path("/run/saw/generations")
    decide_timeout: int = 10


def watched(path: Path, directory: Path) -> Config:
    """Return a configuration source: a file, read again when something is renamed into ``directory``."""
    return {
        "path_config_source": {"path": str(path), "watched_directory": {"path": str(directory)}},
        "resource_api_version": "V3",
    }


def assignment(name: str, address: Config) -> Config:
    """Return the load assignment of a cluster with one address."""
    return {
        "cluster_name": name,
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
    }


def removed(prefix: str) -> Config:
    """Return the mutation that removes every header with this prefix."""
    return {"remove_on_match": {"key_matcher": {"prefix": prefix, "ignore_case": True}}}
