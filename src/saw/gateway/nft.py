"""The packet filter of a perimeter host: a workspace link reaches two TCP ports of its own gateway and nothing else.

Rules go by interface-name wildcard, so workspaces come and go without a reload. ``fib`` ties a packet to the interface it
came in by: on ``sawbrN`` only that bridge's own address is a local destination, and only its own network is a source.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from saw.errors import ConfigError
from saw.gateway.envoy_parts import BROKER_PORT, INGRESS_BASE, RING2_PORT, SSH_PORT

MAX_NUMBER = 250
"""Highest workspace number."""


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


def render_nft(
    operator_networks: Sequence[str],
    *,
    ingress_address: str = "0.0.0.0",  # noqa: S104 - unspecified means any
    ssh_port: int = SSH_PORT,
    bastion_port: int | None = None,
) -> str:
    """Return the ruleset for ``nft -f``: table ``inet saw``, replaced as a whole in one transaction.

    ``operator_networks`` (CIDR) may reach SSH on ``ssh_port``, a bastion on ``bastion_port`` and the ingress ports;
    ``ingress_address`` narrows the latter to one address unless it is unspecified. Raises :class:`ConfigError` for text that
    is not a network.
    """
    four, six = _networks(operator_networks)
    ingress = ipaddress.ip_address(ingress_address)
    to = "" if ingress.is_unspecified else f"{'ip' if ingress.version == 4 else 'ip6'} daddr {ingress} "
    ports = f"{INGRESS_BASE + 1}-{INGRESS_BASE + MAX_NUMBER}"
    admitted: list[str] = []
    for family, networks in (("ip", four), ("ip6", six)):
        if networks:
            source = f"{family} saddr {{ {', '.join(networks)} }}"
            admitted.append(f"{source} tcp dport {ssh_port} counter accept")
            if bastion_port is not None:
                admitted.append(f"{source} tcp dport {bastion_port} counter accept")
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
    ip saddr & 255.255.0.3 != 10.210.0.2 counter name vm_spoofed drop
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
