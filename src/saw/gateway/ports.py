"""The ports that ring 2's Envoy needs. Envoy itself only logs a port that it did not get, and the workspace stays cut off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address

from saw.gateway.config import GatekeeperConfig
from saw.gateway.envoy_parts import BROKER_PORT, RING2_PORT, Seat
from saw.ports import TakenError, listening


def conflicts(config: GatekeeperConfig, numbers: Iterable[int] | None = None) -> dict[str, str]:
    """Return ``{"address:port (what)": holder}`` for every listener of these workspace numbers that somebody else has; None for
    all that this perimeter serves.

    A listener of ring 2's own Envoy, which this user must be able to see for that (root can), is no conflict.
    """
    found: dict[str, str] = {}
    bootstrap = str(config.ring2.xds_dir / "bootstrap.json")
    served = range(config.numbers.first, config.numbers.last + 1) if numbers is None else numbers
    wanted: dict[int, _Wanted] = {}
    for number in served:
        for address, port, what in _listeners(config, number):
            wanted.setdefault(port, _Wanted(what)).add(address, what)
    for holder in listening(wanted.__contains__):
        taken = None if bootstrap in holder.command else wanted[holder.port].taken_by(holder.address)
        if taken is not None:
            found.setdefault(f"{holder.address}:{holder.port} ({taken})", str(holder))
    return found


@dataclass
class _Wanted:
    """What wants one port: ``first`` of all, what wants it on all addresses, and what on which. Thousands of listeners and as
    many holders are each looked at once."""

    first: str
    everywhere: str | None = None
    at: dict[IPv4Address | IPv6Address, str] = field(default_factory=dict)

    def add(self, address: str, what: str) -> None:
        parsed = ip_address(address)
        self.at.setdefault(parsed, what)
        if parsed.is_unspecified and self.everywhere is None:
            self.everywhere = what

    def taken_by(self, address: str) -> str | None:
        """Return what cannot have the port while somebody listens on it at ``address``; None where nothing wants it there."""
        parsed = ip_address(address)
        return self.first if parsed.is_unspecified else self.at.get(parsed, self.everywhere)


def _listeners(config: GatekeeperConfig, number: int) -> tuple[tuple[str, int, str], ...]:
    seat, address = Seat(number), config.ring2.ingress_of(number)
    ingress = () if address is None else ((address, seat.ingress_port, f"ingress of workspace {number}"),)
    return (
        (seat.gateway, RING2_PORT, "ring 2"),
        (seat.gateway, BROKER_PORT, "passage to the broker"),
        *ingress,
    )


def require_free(config: GatekeeperConfig, numbers: Iterable[int] | None = None) -> None:
    """Raise :class:`TakenError` that names every taken port and who has it."""
    found = conflicts(config, numbers)
    if found:
        listed = "; ".join(f"{holder} listens on {place}" for place, holder in found.items())
        raise TakenError(
            f"ring 2 needs ports that are taken: {listed}",
            cure="stop these, or bind them to another address of this host; `ss -ltnp` as root shows more",
            details={"taken": found},
        )
