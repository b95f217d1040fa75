"""The address plan: what the number of a workspace is worth. Nothing else knows it; everything asks here.

A broker gives each workspace a number that no other workspace of it has, so two of them never share a network, a port or a
network device, on whichever perimeter they are. The networks are /30 networks out of 10.208.0.0/14. Numbers 1 to 250 have the
networks that they always had (10.210.N.0/30), the next 250 those beside them (10.210.N.4/30), and so on: one /16 network holds
16,000 workspaces, and whoever has no more uses no other.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Annotated

import msgspec

from saw.errors import ConfigError

Network = ipaddress.IPv4Network

PLAN = Network("10.208.0.0/14")
"""All networks of workspaces that there can be."""
NETWORKS = tuple(Network(text) for text in ("10.210.0.0/16", "10.211.0.0/16", "10.208.0.0/16", "10.209.0.0/16"))
"""In the order in which numbers use them up."""
COLUMNS = 250
"""Third octets in use, 1 to 250."""
PER_NETWORK = COLUMNS * 64
"""Workspaces in one of :data:`NETWORKS`."""
HIGHEST = PER_NETWORK * len(NETWORKS)
"""Highest number that a workspace can have."""
DEFAULT_MOST = 1000
"""Up to this number, brokers give numbers and perimeters serve them unless they are told otherwise."""

INGRESS_BASE = 22000
INGRESS_BLOCK = 10_000
"""Ingress ports of one address: they stay below 32768, where the kernel takes ports of outgoing connections (ip(7))."""

Number = Annotated[int, msgspec.Meta(ge=1, le=HIGHEST)]


class Band(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """A range of numbers, both ends in it."""

    first: Number = 1
    last: Number = DEFAULT_MOST

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self.first <= number <= self.last

    def meets(self, other: Band) -> bool:
        """Tell whether a number is in both."""
        return self.first <= other.last and other.first <= self.last


def is_number(number: object) -> bool:
    """Tell whether ``number`` can be that of a workspace."""
    return type(number) is int and 1 <= number <= HIGHEST


def network(number: int) -> Network:
    """Return the network of workspace ``number``, a /30; raise :class:`ConfigError` for what is no number."""
    if not is_number(number):
        raise ConfigError(
            f"workspace number {number!r} is not in 1–{HIGHEST}", cure="take the number that the broker assigned"
        )
    block, rest = divmod(number - 1, PER_NETWORK)
    layer, column = divmod(rest, COLUMNS)
    return Network((int(NETWORKS[block].network_address) + ((column + 1) << 8) + (layer << 2), 30))


def gateway(number: int) -> str:
    """Return the perimeter's address on the network of workspace ``number``."""
    return str(network(number)[1])


def workspace(number: int) -> str:
    """Return the address of the VM of workspace ``number``."""
    return str(network(number)[2])


def networks(band: Band | None = None) -> tuple[Network, ...]:
    """Return those of :data:`NETWORKS` that workspaces of ``band`` are in, with all between its ends, and always the first."""
    blocks = () if band is None else range((band.first - 1) // PER_NETWORK, (band.last - 1) // PER_NETWORK + 1)
    return tuple(NETWORKS[block] for block in sorted({0, *blocks}))


def bridge(number: int) -> str:
    """Return the name of the bridge of workspace ``number``; the kernel takes 15 characters (IFNAMSIZ)."""
    return f"sawbr{number}"


def tap(number: int) -> str:
    """Return the name of the tap device of workspace ``number``."""
    return f"sawtap{number}"


def mac(number: int) -> str:
    """Return the MAC address of the VM of workspace ``number``: one of QEMU's own range (52:54:00)."""
    return f"52:54:00:5a:{number >> 8:02x}:{number & 255:02x}"


def ingress_block(number: int) -> int:
    """Return which block of :data:`INGRESS_BLOCK` numbers ``number`` is in, from 0: each has an address of its own."""
    return (number - 1) // INGRESS_BLOCK


def ingress_port(number: int, base: int = INGRESS_BASE) -> int:
    """Return the port after ``base`` that passes SSH on to workspace ``number``, on the address of its block."""
    return base + 1 + (number - 1) % INGRESS_BLOCK


def ingress_address(number: int, host: str, blocks: Mapping[str, str]) -> str | None:
    """Return the address of the block of ``number``: that of ``blocks``, else ``host`` for the first; None without either."""
    block = ingress_block(number)
    return blocks.get(str(block), host if block == 0 else None)


def ingress(
    number: int, host: str, base: int = INGRESS_BASE, blocks: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """Return where the ingress of workspace ``number`` is: ``host`` for the first block, ``blocks`` for others, by number.

    Raises :class:`ConfigError` where no address is known, rather than name the port of another workspace.
    """
    at, port = ingress_address(number, host, blocks or {}), ingress_port(number, base)
    if at is None or port > 65535:
        raise ConfigError(
            f"there is no way in by a port for workspace number {number}",
            cure="go through a bastion, or name the perimeter's address "
            f"under {ingress_block(number)} in ingress.blocks (docs/scale.md)",
        )
    return at, port


def problems_of_blocks(blocks: Mapping[str, str], name: str) -> list[str]:
    """Return what is wrong with addresses of ingress blocks, ``name`` first."""
    known = {str(block) for block in range(ingress_block(HIGHEST) + 1)}
    found = [f"{name}: {key!r} is no block, which are 0 to {len(known) - 1}" for key in blocks if key not in known]
    return found + ([f"{name}: an address is named twice"] if len(set(blocks.values())) != len(blocks) else [])
