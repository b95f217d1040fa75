"""The address plan: no two workspaces share an address, a port or a device, and the first 250 keep what they had."""

from __future__ import annotations

import ipaddress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw import addressing
from saw.addressing import HIGHEST, INGRESS_BLOCK, PER_NETWORK, Band
from saw.errors import ConfigError

NUMBERS = st.integers(1, HIGHEST)
EDGES = (
    1,
    2,
    249,
    250,
    251,
    252,
    500,
    501,
    9_999,
    10_000,
    10_001,
    15_999,
    16_000,
    16_001,
    32_000,
    32_001,
    48_001,
    63_999,
    64_000,
)


def test_the_first_250_keep_what_they_had() -> None:
    for number in range(1, 251):
        assert addressing.network(number) == ipaddress.ip_network(f"10.210.{number}.0/30")
        assert addressing.gateway(number) == f"10.210.{number}.1"
        assert addressing.workspace(number) == f"10.210.{number}.2"
        assert addressing.ingress(number, "edge") == ("edge", 22000 + number)
        assert addressing.mac(number) == f"52:54:00:5a:00:{number:02x}"
        assert (addressing.bridge(number), addressing.tap(number)) == (f"sawbr{number}", f"sawtap{number}")


@pytest.mark.parametrize(
    ("number", "network"),
    [
        (251, "10.210.1.4/30"), (500, "10.210.250.4/30"), (501, "10.210.1.8/30"), (16_000, "10.210.250.252/30"),
        (16_001, "10.211.1.0/30"), (32_001, "10.208.1.0/30"), (48_001, "10.209.1.0/30"), (64_000, "10.209.250.252/30"),
    ],
)  # fmt: skip
def test_where_one_range_ends_the_next_begins(number: int, network: str) -> None:
    assert str(addressing.network(number)) == network


def test_no_two_workspaces_share_anything() -> None:
    everyone = range(1, HIGHEST + 1)
    for of in (
        addressing.network,
        addressing.gateway,
        addressing.workspace,
        addressing.bridge,
        addressing.tap,
        addressing.mac,
    ):
        assert len({of(number) for number in everyone}) == HIGHEST
    blocks = {str(block): f"192.0.2.{block}" for block in range(1, addressing.ingress_block(HIGHEST) + 1)}
    ways = {addressing.ingress(number, "192.0.2.100", blocks=blocks) for number in everyone}
    assert len(ways) == HIGHEST
    assert max(port for _, port in ways) < 32_768
    assert all(len(addressing.tap(number)) < 15 for number in EDGES)


@given(NUMBERS, NUMBERS)
def test_networks_do_not_meet(one: int, other: int) -> None:
    network = addressing.network(one)
    assert network.subnet_of(addressing.PLAN)
    assert network.overlaps(addressing.network(other)) == (one == other)
    assert any(network.subnet_of(whole) for whole in addressing.networks(Band(one, one)))


@pytest.mark.parametrize("number", [0, -1, HIGHEST + 1, True, 1.0, "1", None])
def test_what_is_no_number_has_no_network(number: object) -> None:
    assert not addressing.is_number(number)
    with pytest.raises(ConfigError, match="is not in 1–64000") as refused:
        addressing.network(number)  # type: ignore[arg-type]
    assert refused.value.cure
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(number, addressing.Number)


def test_networks_are_taken_one_after_the_other() -> None:
    assert [str(one) for one in addressing.networks()] == ["10.210.0.0/16"]
    assert [str(one) for one in addressing.networks(Band(1, PER_NETWORK))] == ["10.210.0.0/16"]
    assert [str(one) for one in addressing.networks(Band(PER_NETWORK + 1, PER_NETWORK + 1))] == [
        "10.210.0.0/16",
        "10.211.0.0/16",
    ]
    assert addressing.networks(Band(HIGHEST, HIGHEST)) == (addressing.NETWORKS[0], addressing.NETWORKS[-1])


def test_a_band_is_in_all_networks_between_its_ends_too() -> None:
    assert addressing.networks(Band(1, 3 * PER_NETWORK)) == addressing.NETWORKS[:3]
    assert addressing.networks(Band(1, HIGHEST)) == addressing.NETWORKS


@given(NUMBERS, NUMBERS, NUMBERS)
def test_networks_of_a_band_have_the_address_of_each_of_its_numbers(one: int, two: int, three: int) -> None:
    first, number, last = sorted((one, two, three))
    own = addressing.networks(Band(first, last))
    for each in (first, number, last):
        assert any(ipaddress.ip_address(addressing.workspace(each)) in network for network in own)


def test_no_port_is_named_that_is_another_workspaces() -> None:
    above = INGRESS_BLOCK + 1
    with pytest.raises(ConfigError, match="no way in by a port for workspace number 10001") as refused:
        addressing.ingress(above, "edge")
    assert "ingress.blocks" in refused.value.cure
    assert addressing.ingress(above, "edge", blocks={"1": "edge-2"}) == ("edge-2", 22_001)
    assert addressing.ingress(1, "edge", blocks={"0": "edge-0"}) == ("edge-0", 22_001)
    assert addressing.ingress(5000, "edge", 60_000) == ("edge", 65_000)
    with pytest.raises(ConfigError):
        addressing.ingress(5536, "edge", 60_000)


def test_blocks_are_checked() -> None:
    assert addressing.problems_of_blocks({"0": "a", "6": "b"}, "x") == []
    assert addressing.problems_of_blocks({"7": "a"}, "x") == ["x: '7' is no block, which are 0 to 6"]
    assert addressing.problems_of_blocks({"1": "a", "2": "a"}, "x") == ["x: an address is named twice"]


@given(NUMBERS, NUMBERS, NUMBERS)
def test_a_band_has_both_its_ends(first: int, last: int, number: int) -> None:
    band = Band(min(first, last), max(first, last))
    assert first in band
    assert last in band
    assert (number in band) == band.meets(Band(number, number))
