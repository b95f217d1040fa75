"""From which addresses a session certificate counts: what the broker knows of whoever asks, never more than that.

OpenSSH compares the certificate's ``source-address`` with the peer of the connection (ssh-keygen(1), PROTOCOL.certkeys).
"""

from __future__ import annotations

import ipaddress

from saw import addressing
from saw.broker.context import Caller
from saw.broker.errors import ForbiddenError, MalformedError
from saw.broker.session_settings import SessionRules

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def seen_address(caller: Caller) -> str | None:
    """Return the address that a caller has on the network, None where it tells nothing.

    A caller on the Unix socket has none. One on loopback is on this host, which others see under another address.
    """
    try:
        address = ipaddress.ip_address(caller.address.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return None if address.is_loopback else str(address)


def bound_source(known: str | None, asked: str | None) -> str | ForbiddenError | None:
    """Return the addresses that a certificate counts from, None for all, or why it is not issued.

    ``known`` are those that the broker knows, comma-separated, None where it knows none. What is ``asked`` for may be less.
    Raises :class:`MalformedError` for what are no addresses.
    """
    if asked is None:
        return known
    try:
        wanted = [_network(part) for part in asked.split(",")]
    except ValueError:
        raise MalformedError(
            f"source_address {asked[:64]!r} is not a list of addresses", cure="use 192.0.2.7 or 192.0.2.0/24"
        ) from None
    if known is not None:
        limits = [_network(part) for part in known.split(",")]
        if beyond := [str(part) for part in wanted if not any(_within(part, limit) for limit in limits)]:
            return ForbiddenError(
                f"a certificate for {', '.join(beyond)[:200]} is not issued: it would count beyond {known}",
                cure="leave source_address out; where addresses are translated, set sessions.source_networks of the broker",
                code="source_address_outside",
            )
    return ",".join(map(str, wanted))


def known_source(rules: SessionRules, caller: Caller) -> str | None:
    """Return from where a bastion sees ``caller``: the configured networks, else the address that the broker sees, else None."""
    return ",".join(rules.source_networks) or seen_address(caller)


def workspace_source(rules: SessionRules, number: int) -> str:
    """Return from where workspace ``number`` sees what the perimeter passes on to its SSH server."""
    return rules.leg_source or addressing.gateway(number)


def _network(text: str) -> Network:
    return ipaddress.ip_network(text.strip())


def _within(part: Network, whole: Network) -> bool:
    if isinstance(part, ipaddress.IPv4Network) and isinstance(whole, ipaddress.IPv4Network):
        return part.subnet_of(whole)
    if isinstance(part, ipaddress.IPv6Network) and isinstance(whole, ipaddress.IPv6Network):
        return part.subnet_of(whole)
    return False
