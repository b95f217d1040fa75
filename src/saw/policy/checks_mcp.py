"""What MCP servers over HTTP and the ``mcp`` endpoints of a policy must agree on.

The tools of a server hold for calls to one host, port and path. So that no other path leads around them, every ``mcp``
endpoint at the host and port of a server has exactly the path of a server there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Protocol

from saw.policy import globs
from saw.policy.checks_governance import parse_address
from saw.policy.decode import Steps
from saw.policy.governance import Governance
from saw.policy.model import Endpoint
from saw.policy.partial import Unknown
from saw.policy.tool_rules import HttpAddress


class Told(Protocol):
    """Called with the way to what is wrong, the reason and the cure."""

    def __call__(self, steps: Steps, reason: str, cure: str, /) -> None: ...


def server_problems(
    endpoints: Iterable[tuple[Steps, Endpoint]],
    governance: Governance,
    of_policy: Told,
    of_governance: Told,
    *,
    complete: bool,
    most: int,
) -> None:
    """Tell where servers over HTTP and endpoints do not fit; ``complete``: no endpoint is unknown. At most ``most`` are told."""
    named: dict[tuple[str, int], dict[str, str]] = {}
    left = most
    for name, server in governance.mcp.servers.items():
        with suppress(Unknown, ValueError):
            address = server.address
            if address is None:
                continue
            url = ("mcp", "servers", name, "url")
            other = named.setdefault((address.host, address.port), {}).setdefault(address.path, name)
            if other != name:
                of_governance(url, f"the server {other} is called there too", "bring their tools together")
            _scheme(governance, address, url, of_governance)
    if not named:
        return
    by_tail: dict[tuple[str, int], list[str]] = {}
    for host, port in named:
        by_tail.setdefault((globs.literal_tail(host), port), []).append(host)
    found: set[tuple[str, int, str]] = set()
    for steps, endpoint in endpoints:
        with suppress(Unknown):
            if endpoint.protocol != "mcp":
                continue
            for server_host, port in _addresses(endpoint, by_tail):
                paths = named[server_host, port]
                found.add((server_host, port, endpoint.path))
                place = f"{server_host}:{port}"
                if endpoint.path not in paths and left:
                    left -= 1
                    path, name = next(iter(paths.items()))
                    reason = f"it leads around the tools of the MCP server {name}, which are for {place}{path} alone"
                    of_policy((*steps, "path"), reason, f"write path: {path}, or a server of its own for this path")
                elif endpoint.enforcement == "audit" and left:
                    left -= 1
                    reason = f"an endpoint under audit cannot be held to the tools of {paths[endpoint.path]}"
                    of_policy((*steps, "enforcement"), reason, "use enforce, or remove the server")
    for (host, port), paths in named.items():
        for path, name in paths.items():
            if complete and (host, port, path) not in found:
                reason = f"no endpoint with protocol mcp has exactly host {host}, port {port} and path {path}"
                of_governance(("mcp", "servers", name, "url"), reason, "add the endpoint, or correct the url")


def _addresses(endpoint: Endpoint, by_tail: Mapping[tuple[str, int], list[str]]) -> Iterator[tuple[str, int]]:
    """Yield host and port of the servers that ``endpoint`` covers; ``by_tail`` are their hosts by last labels and port."""
    host_glob = endpoint.host.lower()
    pattern, tail = globs.host_glob(host_glob), globs.literal_tail(host_glob)
    for port in dict.fromkeys(endpoint.all_ports):
        yield from ((host, port) for host in by_tail.get((tail, port), ()) if pattern.fullmatch(host))


def _scheme(governance: Governance, address: HttpAddress, url: Steps, of_governance: Told) -> None:
    with suppress(Unknown):
        plain = (address.host, address.port) in {parse_address(text) for text in governance.plaintext}
        if plain != (address.scheme == "http"):
            speaks = "without TLS (it is listed under plaintext)" if plain else "TLS"
            reason = f"{address.host}:{address.port} speaks {speaks}, and the url says {address.scheme}"
            of_governance(url, reason, f"write {'http' if plain else 'https'}://")
