"""Taken ports of ring 2: who is in whose way, and that many of both are looked at once each."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest

from saw import addressing
from saw.gateway import ports
from saw.gateway.config import GatekeeperConfig, Ring2Config
from saw.gateway.envoy_parts import RING2_PORT
from saw.ports import Holder

ENVOY = ("envoy", "-c", "/var/lib/saw/ring2/bootstrap.json")


def perimeter(ingress: str = "0.0.0.0") -> GatekeeperConfig:
    return GatekeeperConfig(
        name="edge", broker_url="https://192.0.2.1:8443", ca_file=Path("/ca"), cert_file=Path("/cert"),
        key_file=Path("/key"), tuf_root_file=Path("/root.json"), state_dir=Path("/state"), authz_socket=Path("/authz"),
        credentials_dir=Path("/credentials"),
        ring2=Ring2Config(broker_address="192.0.2.1:8443", ingress_address=ingress),
    )  # fmt: skip


def taken(monkeypatch: pytest.MonkeyPatch, config: GatekeeperConfig, numbers: Any, *holders: Holder) -> list[str]:
    """Return what is in the way of these workspaces when ``holders`` listen."""
    monkeypatch.setattr(ports, "listening", lambda want: [holder for holder in holders if want(holder.port)])
    return list(ports.conflicts(config, numbers))


@pytest.mark.parametrize(
    ("ingress", "address", "port", "found"),
    [
        ("192.0.2.7", "10.210.2.1", RING2_PORT, ["10.210.2.1:8443 (ring 2)"]),
        ("192.0.2.7", "0.0.0.0", RING2_PORT, ["0.0.0.0:8443 (ring 2)"]),
        ("192.0.2.7", "::", 22002, [":::22002 (ingress of workspace 2)"]),
        ("192.0.2.7", "192.0.2.7", 22002, ["192.0.2.7:22002 (ingress of workspace 2)"]),
        ("0.0.0.0", "192.0.2.9", 22002, ["192.0.2.9:22002 (ingress of workspace 2)"]),
        ("192.0.2.7", "10.210.3.1", RING2_PORT, []),
        ("192.0.2.7", "192.0.2.9", 22002, []),
        ("192.0.2.7", "192.0.2.7", 22003, []),
    ],
)
def test_a_holder_is_in_the_way_at_the_same_address_or_where_one_of_both_is_all_addresses(
    monkeypatch: pytest.MonkeyPatch, ingress: str, address: str, port: int, found: list[str]
) -> None:
    assert taken(monkeypatch, perimeter(ingress), (1, 2), Holder(address, port)) == found


def test_ring_2_itself_is_not_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Holder("10.210.1.1", RING2_PORT, 7, "envoy", ENVOY)
    assert taken(monkeypatch, perimeter(), (1,), own) == []


def test_work_grows_with_listeners_and_holders_not_with_their_product(monkeypatch: pytest.MonkeyPatch) -> None:
    work = 0

    class Counted(ipaddress.IPv4Address):
        def __init__(self, text: str) -> None:
            nonlocal work
            work += 1
            super().__init__(text)

        def __eq__(self, other: object) -> bool:
            nonlocal work
            work += 1
            return super().__eq__(other)

        __hash__ = ipaddress.IPv4Address.__hash__

    monkeypatch.setattr(ports, "ip_address", Counted)
    many = range(1, 301)
    holders = [Holder(addressing.gateway(number), RING2_PORT) for number in many]
    found = taken(monkeypatch, perimeter("192.0.2.7"), many, *holders)
    assert len(found) == len(holders)
    # Each of three listeners for a workspace, and each holder, is parsed once and compared with two others at most.
    assert work <= 3 * (3 * len(many) + len(holders))
