"""Names to addresses, once per call: every answer is checked, one is pinned, and only that one is dialled."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from saw import addressing
from saw.gateway.config import ResolverConfig
from saw.gateway.errors import DestinationBlocked, ResolutionFailed
from saw.policy.addresses import classify

Lookup = Callable[[str], list[str]]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
WORKSPACE_NETWORKS: tuple[Network, ...] = addressing.networks()
"""Never a destination, whatever a policy names: workspaces do not reach each other through the perimeter."""

_REMEMBERED = 4096


def system_lookup(host: str) -> list[str]:
    """Return the addresses of ``host`` in the system resolver's order; raise ``OSError`` when there are none."""
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def read_hosts(path: Path) -> dict[str, list[str]]:
    """Read a hosts file (hosts(5)): address, then names; ``#`` starts a comment."""
    table: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        for name in names:
            table.setdefault(name.lower(), []).append(address)
    return table


def choose(
    host: str,
    addresses: Iterable[str],
    *,
    exact: bool,
    allowed: Iterable[Network],
    own: Sequence[Network] = WORKSPACE_NETWORKS,
) -> str:
    """Check every address and return the first, the one to dial.

    ``exact`` says whether policy names the host itself rather than by a pattern, ``allowed`` are the endpoint's
    ``allowed_ips``; either admits private ranges, and ``allowed`` alone decides where it is given. ``own`` are the networks of
    this perimeter's workspaces. Raises
    :class:`DestinationBlocked` when any address is refused, so that an answer mixing good and bad is refused whole.
    """
    found = list(addresses)
    networks = tuple(allowed)
    for address in found:
        reach = classify(address)
        if reach == "blocked":
            raise DestinationBlocked(f"{host} resolves to {address}, which may never be dialled")
        parsed = ipaddress.ip_address(address)
        if any(parsed in network for network in own):
            raise DestinationBlocked(f"{host} resolves to {address}, a workspace network")
        if reach == "private":
            inside = any(parsed in network for network in networks)
            if not (inside if networks else exact):
                raise DestinationBlocked(
                    f"{host} resolves to the private address {address}",
                    cure="declare the exact host or its allowed_ips in policy",
                )
    if not found:
        raise ResolutionFailed(f"{host} has no address")
    return found[0]


class Resolver:
    """Looks names up with a bounded time and a short memory. ``monotonic`` returns seconds; ``own`` are the networks of this
    perimeter's workspaces, which :meth:`chosen` never returns an address of."""

    def __init__(
        self,
        config: ResolverConfig,
        monotonic: Callable[[], float],
        lookup: Lookup = system_lookup,
        *,
        own: Sequence[Network] = WORKSPACE_NETWORKS,
    ) -> None:
        self._own = tuple(own)
        self._config = config
        self._monotonic = monotonic
        self._lookup = lookup
        self._known: dict[str, tuple[float, tuple[str, ...]]] = {}
        self._hosts: tuple[float, dict[str, list[str]]] = (-1.0, {})

    async def chosen(self, host: str, *, exact: bool, allowed: Iterable[Network]) -> str:
        """Return the address of ``host`` to dial, as :func:`choose` does; raise :class:`ResolutionFailed` where there is none."""
        return choose(host, await self.addresses(host), exact=exact, allowed=allowed, own=self._own)

    async def addresses(self, host: str) -> tuple[str, ...]:
        """Return all addresses of ``host``; raise :class:`ResolutionFailed` when it has none or time runs out."""
        literal = host.strip("[]")
        try:
            return (str(ipaddress.ip_address(literal)),)
        except ValueError:
            pass
        named = self._from_file(host)
        if named:
            return tuple(named)
        now = self._monotonic()
        expires, known = self._known.get(host, (0.0, ()))
        if known and now < expires:
            return known
        try:
            async with asyncio.timeout(self._config.timeout_s):
                found = tuple(await asyncio.to_thread(self._lookup, host))
        except (OSError, TimeoutError, UnicodeError) as error:
            raise ResolutionFailed(f"{host} cannot be resolved", cure="check the name and the resolver") from error
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[host] = (now + self._config.ttl_s, found)
        return found

    def _from_file(self, host: str) -> list[str]:
        path = self._config.hosts_file
        if path is None:
            return []
        try:
            changed = path.stat().st_mtime
            if changed != self._hosts[0]:
                self._hosts = (changed, read_hosts(path))
        except (OSError, UnicodeError) as error:
            raise ResolutionFailed(f"the hosts file {path} cannot be read") from error
        return self._hosts[1].get(host, [])
