"""Which addresses may be dialled: public, private, or blocked whatever a policy says.

Blocked are loopback, link-local, unspecified, multicast, reserved and cloud-metadata addresses, and every transition form
that carries one (v4-mapped RFC 4291, v4-compatible, NAT64 RFC 6052, 6to4 RFC 3056, Teredo RFC 4380, ISATAP RFC 5214).
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Literal

Reach = Literal["public", "private", "blocked"]

_BLOCKED_4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "100.100.100.200/32",
        "168.63.129.16/32",
        "192.0.0.192/32",
    )
)
_PRIVATE_4 = tuple(
    IPv4Network(text)
    for text in (
        "10.0.0.0/8",
        "100.64.0.0/10",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
    )
)
_BLOCKED_6 = tuple(
    IPv6Network(text)
    for text in (
        "::/128",
        "::1/128",
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
        "64:ff9b:1::/48",
        "fd00:ec2::254/128",
        "fd20:ce::254/128",
    )
)
_PRIVATE_6 = tuple(
    IPv6Network(text)
    for text in ("fc00::/7", "100::/64", "2001:2::/48", "2001:10::/28", "2001:20::/28", "2001:db8::/32", "3fff::/20")
)
_GLOBAL_6 = IPv6Network("2000::/3")
_V4_COMPATIBLE = IPv6Network("::/96")
_V4_MAPPED = IPv6Network("::ffff:0:0/96")
_V4_TRANSLATED = IPv6Network("::ffff:0:0:0/96")
_NAT64 = IPv6Network("64:ff9b::/96")
_TEREDO = IPv6Network("2001::/32")
_SIX_TO_FOUR = IPv6Network("2002::/16")
_ISATAP = frozenset({0x00005EFE, 0x02005EFE})

_METADATA_NAMES = frozenset(
    {
        "metadata",
        "metadata.google.internal",
        "metadata.goog",
        "metadata.azure.internal",
        "metadata.packet.net",
        "metadata.platformequinix.com",
        "metadata.oraclecloud.com",
        "metadata.tencentyun.com",
        "instance-data",
        "instance-data.ec2.internal",
    }
)
_LOOPBACK_NAMES = frozenset(
    {"localhost", "localhost4", "localhost6", "localhost.localdomain", "ip6-localhost", "ip6-loopback", "loopback"}
)
_NUMERIC_LABEL = re.compile(r"(?:[0-9]+|0[xX][0-9a-fA-F]*)\Z")
_STRICT_IPV4 = re.compile(r"(?:(?:0|[1-9][0-9]{0,2})\.){3}(?:0|[1-9][0-9]{0,2})\Z")


def _worst(*reaches: Reach) -> Reach:
    if "blocked" in reaches:
        return "blocked"
    return "private" if "private" in reaches else "public"


def _classify_4(address: IPv4Address) -> Reach:
    if any(address in network for network in _BLOCKED_4):
        return "blocked"
    return "private" if any(address in network for network in _PRIVATE_4) else "public"


def _embedded(address: IPv6Address) -> tuple[IPv4Address, ...]:
    """Return the IPv4 addresses that a packet to ``address`` may end up at or pass through."""
    value = int(address)
    if any(address in network for network in (_V4_MAPPED, _V4_COMPATIBLE, _V4_TRANSLATED, _NAT64)):
        return (IPv4Address(value & 0xFFFFFFFF),)
    if address in _SIX_TO_FOUR:
        return (IPv4Address((value >> 80) & 0xFFFFFFFF),)
    if address in _TEREDO:
        return (IPv4Address((value >> 64) & 0xFFFFFFFF), IPv4Address((value & 0xFFFFFFFF) ^ 0xFFFFFFFF))
    if (value >> 32) & 0xFFFFFFFF in _ISATAP:
        return (IPv4Address(value & 0xFFFFFFFF),)
    return ()


def _classify_6(address: IPv6Address) -> Reach:
    if address.scope_id is not None or any(address in network for network in _BLOCKED_6):
        return "blocked"
    embedded = _embedded(address)
    if embedded:
        return _worst(*(_classify_4(inner) for inner in embedded))
    if any(address in network for network in _PRIVATE_6) or address not in _GLOBAL_6:
        return "private"
    return "public"


@lru_cache(maxsize=4096)
def classify(address: str) -> Reach:
    """Return whether ``address`` (textual IPv4 or IPv6, no brackets) is public, private or blocked.

    Text that is not an address is ``blocked``: nothing that cannot be read is dialled.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return "blocked"
    return _classify_4(parsed) if isinstance(parsed, IPv4Address) else _classify_6(parsed)


def blocked_networks() -> tuple[IPv4Network | IPv6Network, ...]:
    """Return the networks that no ``allowed_ips`` may touch."""
    return (*_BLOCKED_4, *_BLOCKED_6)


@lru_cache(maxsize=4096)
def is_blocked_host(host: str) -> str | None:
    """Return why ``host`` may never be a destination, judged by its text alone, or ``None``.

    Covers metadata and loopback names, address literals that :func:`classify` blocks, and every numeric form besides the
    plain dotted quad (decimal, octal, hexadecimal, short: WHATWG URL, host parsing), which resolvers read differently.
    """
    name = host.lower()
    if not name or not name.isascii() or not name.isprintable() or " " in name:
        return "the host is empty or holds characters outside printable ASCII"
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    if ":" in name:
        return None if classify(name) != "blocked" else f"{host} is a blocked or unreadable IPv6 address"
    bare = name.rstrip(".")
    if bare in _METADATA_NAMES:
        return f"{host} is a cloud metadata name"
    if bare in _LOOPBACK_NAMES or bare.endswith(".localhost"):
        return f"{host} names the machine itself"
    labels = bare.split(".")
    if not _NUMERIC_LABEL.match(labels[-1]):
        return None
    if not _STRICT_IPV4.match(name):
        return f"{host} is a numeric form of an address that is not a plain dotted quad"
    return None if classify(name) != "blocked" else f"{host} is a blocked address"
