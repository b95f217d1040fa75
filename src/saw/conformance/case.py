"""What a case is, and the facts about a target that its arguments are filled with."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SUITES = ("network", "sockets", "addressing", "http", "credentials", "process", "files")
"""The suites in the order in which they run."""
NONCE = re.compile(r"saw-[0-9a-f]{20}")
"""What every attempt carries, so that the recorder can tell which attempt a packet belongs to. Valid as a DNS label."""
_PLACE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Case:
    """One attack, or one allowed twin.

    ``expected`` are the reasons that count as the right ones in our own workspaces: names of errno, ``signal:NAME``, the
    ``reason`` of a refusal's body, ``status:N``, ``dropped`` (sent, and nothing arrived) or what the probe calls
    ``reason``. ``layer`` is the layer that refuses it there. ``arguments`` hold ``${fact}``; a fact that a target lacks makes
    the case not applicable. With ``arrival`` only what the recorder saw is success: the kernel taking a packet says nothing
    yet. ``twin`` names the allowed twin;
    without one ``no_twin`` says why.
    """

    id: str
    control: str
    suite: str
    title: str
    attempt: str
    arguments: Mapping[str, Any]
    layer: str = ""
    expected: tuple[str, ...] = ()
    twin: str = ""
    no_twin: str = ""
    arrival: bool = False
    recorded: bool = False
    seconds: float = 8.0
    needs: tuple[str, ...] = ()
    is_twin: bool = False

    def facts(self) -> set[str]:
        """Return the names of the facts that the case needs, the nonce left out."""
        found: set[str] = set(self.needs)
        for value in self.arguments.values():
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, str):
                    found |= set(_PLACE.findall(item))
        return found - {"nonce"}


class MissingFactError(Exception):
    """The target lacks a fact; the message is the reason for *not applicable*."""


def new_nonce() -> str:
    """Return a fresh nonce."""
    return f"saw-{secrets.token_hex(10)}"


def fill(case: Case, facts: Mapping[str, Any], nonce: str) -> dict[str, Any]:
    """Return the arguments of ``case`` for a target; raise :class:`MissingFactError` naming what it lacks.

    A string that is nothing but ``${fact}`` becomes the fact itself, of whatever type.
    """
    missing = sorted(name for name in case.facts() if facts.get(name) is None)
    if missing:
        raise MissingFactError(", ".join(dict.fromkeys(FACTS.get(name, name) for name in missing)))
    values = {**facts, "nonce": nonce}

    def one(value: Any) -> Any:
        if not isinstance(value, str):
            return [one(item) for item in value] if isinstance(value, (list, tuple)) else value
        whole = _PLACE.fullmatch(value)
        return values[whole[1]] if whole else _PLACE.sub(lambda found: str(values[found[1]]), value)

    return {name: one(value) for name, value in case.arguments.items()}


FACTS = {
    "v4": "no recorder at an IPv4 address outside",
    "v4_number": "no recorder at an IPv4 address outside",
    "v4_hex": "no recorder at an IPv4 address outside",
    "v6": "no recorder at an IPv6 address outside",
    "link6": "no recorder at a link-local address",
    "metadata": "no recorder at the metadata address",
    "ground": "no private network around the target in which a recorder can hold such an address",
    "dns": "the system's resolver does not lead to a recorder",
    "proxy": "no proxy is known (--proxy ADDRESS:PORT)",
    "proxy_port": "no proxy is known (--proxy ADDRESS:PORT)",
    "other_port": "no recorder on another port of the proxy's address",
    "http_proxy": "the target has no HTTP proxy with a policy (--allowed-url)",
    "allowed_host": "no allowed URL is known (--allowed-url)",
    "allowed_authority": "no allowed URL is known (--allowed-url)",
    "allowed_path": "no allowed URL is known (--allowed-url)",
    "graphql_host": "no GraphQL address is known (--graphql-url)",
    "graphql_authority": "no GraphQL address is known (--graphql-url)",
    "graphql_path": "no GraphQL address is known (--graphql-url)",
    "mcp_host": "no MCP server is known (--mcp-url)",
    "mcp_authority": "no MCP server is known (--mcp-url)",
    "mcp_path": "no MCP server is known (--mcp-url)",
    "redirect_host": "no address that redirects is known (--redirect-url)",
    "redirect_authority": "no address that redirects is known (--redirect-url)",
    "redirect_path": "no address that redirects is known (--redirect-url)",
    "second_host": "only one allowed host is known (--second-url)",
    "second_authority": "only one allowed host is known (--second-url)",
    "second_path": "only one allowed host is known (--second-url)",
    "placeholder": "no placeholder of a credential is known (--placeholder)",
    **{
        f"{name}_{part}": words
        for name, words in {
            "echo": "no service is known that shows a credential (--echo-url)",
            "websocket": "no WebSocket is known (--websocket-url)",
            "inside": "no allowed name that leads inside is known (--inside-url)",
            "mixed": "no allowed name that leads inside and outside is known (--mixed-url)",
            "forged": "no allowed service with a forged certificate is known (--forged-url)",
        }.items()
        for part in ("host", "authority", "path")
    },
    "sibling": "only one allowed host is known (--second-url)",
    "host_mark": "nothing of the kit runs beside the target",
    "host_pid": "nothing of the kit runs beside the target",
    "canary_tmp": "nothing of the kit runs beside the target",
    "canary_shm": "nothing of the kit runs beside the target",
    "canary_var": "nothing of the kit runs beside the target",
    "unix_abstract": "nothing of the kit runs beside the target",
    "unix_path": "nothing of the kit runs beside the target",
    "unix_run": "the host's /run cannot be given recorders",
    "shm_key": "nothing of the kit runs beside the target",
    "fd_mark": "descriptors do not pass to this target",
    "knock": "no address of the target is known from outside",
    "host_interfaces": "no interface of the host is known",
    "beyond_tmp": "the policy gives as much of it as of memory, which is out first (--governance)",
    "beyond_shm": "the policy gives as much of it as of memory, which is out first (--governance)",
    "beyond_inodes": "how many files a temporary directory may hold is not known",
    "beyond_memory": "how much the policy gives is not known (--governance)",
    "cgroup": "resource limits of the cgroup are not part of this target",
}
"""Each fact, with what its absence means, in words for the report."""
