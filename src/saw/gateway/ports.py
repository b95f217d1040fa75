"""The ports that ring 2's Envoy needs. Envoy itself only logs a port that it did not get, and the workspace stays cut off."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

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
    wanted = [listener for number in served for listener in _listeners(config, number)]
    ports = {port for _, port, _ in wanted}
    holders = [holder for holder in listening(ports.__contains__) if bootstrap not in holder.command]
    for holder in holders:
        for address, port, what in wanted:
            if port == holder.port and _overlap(address, holder.address):
                found.setdefault(f"{holder.address}:{port} ({what})", str(holder))
                break
    return found


def _listeners(config: GatekeeperConfig, number: int) -> tuple[tuple[str, int, str], ...]:
    seat, address = Seat(number), config.ring2.ingress_of(number)
    ingress = () if address is None else ((address, seat.ingress_port, f"ingress of workspace {number}"),)
    return (
        (seat.gateway, RING2_PORT, "ring 2"),
        (seat.gateway, BROKER_PORT, "passage to the broker"),
        *ingress,
    )


def _overlap(one: str, other: str) -> bool:
    first, second = ipaddress.ip_address(one), ipaddress.ip_address(other)
    return first == second or first.is_unspecified or second.is_unspecified


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
