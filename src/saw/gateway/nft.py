"""The packet filter of a perimeter host: a workspace link reaches two TCP ports of its own gateway and nothing else.

Rules go by interface-name wildcard, so workspaces come and go without a reload. ``fib`` ties a packet to the interface it
came in by: on ``sawbrN`` only that bridge's own address is a local destination, and only its own network is a source.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence

from saw import addressing
from saw.errors import ConfigError
from saw.gateway.envoy_parts import BROKER_PORT, RING2_PORT, SSH_PORT

_NUMBERS = addressing.Band()
_ANY = "0.0.0.0"  # noqa: S104 - unspecified means any
_GUEST = f"{addressing.PLAN.network_address + 2}"
_MASK = f"{ipaddress.IPv4Address(int(addressing.PLAN.netmask) | 3)}"
"""Whatever the number, the VM's address is the second one of a /30 of the plan."""


def _networks(operator_networks: Sequence[str]) -> tuple[list[str], list[str]]:
    four: list[str] = []
    six: list[str] = []
    for text in operator_networks:
        try:
            network = ipaddress.ip_network(text)
        except ValueError as error:
            raise ConfigError(f"operator network {text!r}: {error}", cure="write it as 192.0.2.0/24") from error
        (four if network.version == 4 else six).append(str(network))
    return four, six


def _ingresses(
    numbers: addressing.Band, ingress_of: Callable[[int], str | None]
) -> list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, str]]:
    """Return the ports of each ingress address, as nft(8) writes a range."""
    found = []
    for block in range(addressing.ingress_block(numbers.first), addressing.ingress_block(numbers.last) + 1):
        first = max(numbers.first, block * addressing.INGRESS_BLOCK + 1)
        last = min(numbers.last, (block + 1) * addressing.INGRESS_BLOCK)
        if (address := ingress_of(first)) is not None:
            ports = f"{addressing.ingress_port(first)}-{addressing.ingress_port(last)}"
            found.append((ipaddress.ip_address(address), ports))
    return found


def render_nft(
    operator_networks: Sequence[str],
    *,
    numbers: addressing.Band = _NUMBERS,
    ingress_of: Callable[[int], str | None] = lambda _number: _ANY,
    ssh_port: int = SSH_PORT,
    bastion_port: int | None = None,
) -> str:
    """Return the ruleset for ``nft -f``: table ``inet saw``, replaced as a whole in one transaction.

    ``operator_networks`` (CIDR) may reach SSH on ``ssh_port``, a bastion on ``bastion_port``, and ingress ports of ``numbers``
    on the address that ``ingress_of`` says, unless it is unspecified. Raises :class:`ConfigError` for text that is not a network.
    """
    four, six = _networks(operator_networks)
    ingresses = _ingresses(numbers, ingress_of)
    admitted: list[str] = []
    for family, networks in (("ip", four), ("ip6", six)):
        if networks:
            source = f"{family} saddr {{ {', '.join(networks)} }}"
            admitted.append(f"{source} tcp dport {ssh_port} counter accept")
            if bastion_port is not None:
                admitted.append(f"{source} tcp dport {bastion_port} counter accept")
            for ingress, ports in ingresses:
                to = "" if ingress.is_unspecified else f"{family} daddr {ingress} "
                if ingress.is_unspecified or (ingress.version == 4) == (family == "ip"):
                    admitted.append(f"{source} {to}tcp dport {ports} counter accept")
    operators = "\n".join(f"    {rule}" for rule in admitted)
    return f"""#!/usr/sbin/nft -f
table inet saw
delete table inet saw
table inet saw {{
  counter vm_allowed {{ }}
  counter vm_refused {{ }}
  counter vm_spoofed {{ }}
  counter forward_refused {{ }}
  counter host_refused {{ }}

  chain workspace {{
    fib saddr . iif oif eq 0 counter name vm_spoofed drop
    ip saddr & {_MASK} != {_GUEST} counter name vm_spoofed drop
    meta nfproto ipv6 counter name vm_refused drop
    ct state established accept
    fib daddr . iif type local tcp dport {{ {RING2_PORT}, {BROKER_PORT} }} ct state new counter name vm_allowed accept
    counter name vm_refused drop
  }}

  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "sawbr*" jump workspace
    iifname "sawtap*" counter name vm_refused drop
    iif "lo" accept
    ct state invalid drop
    ct state established,related accept
    icmp type echo-request limit rate 10/second accept
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert, echo-request }} accept
{operators}
    counter name host_refused drop
  }}

  chain forward {{
    type filter hook forward priority filter; policy drop;
    counter name forward_refused drop
  }}

  chain output {{
    type filter hook output priority filter; policy accept;
    oifname "sawbr*" ct state established accept
    oifname "sawbr*" meta nfproto ipv4 tcp dport {SSH_PORT} ct state new accept
    oifname "sawbr*" counter name vm_refused drop
  }}
}}
"""
