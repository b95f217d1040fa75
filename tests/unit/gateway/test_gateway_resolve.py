"""Resolution: every answer is checked, one is pinned, the resolver is asked once."""

from __future__ import annotations

import asyncio
import ipaddress
import threading
from pathlib import Path
from typing import Any

import pytest

from saw import addressing
from saw.addressing import Band
from saw.gateway.config import ResolverConfig
from saw.gateway.errors import DestinationBlocked, ResolutionFailed
from saw.gateway.resolve import Resolver, choose

TEN = ipaddress.ip_network("10.20.0.0/16")


@pytest.mark.control("NET-03")
@pytest.mark.parametrize(
    ("addresses", "exact", "allowed", "chosen"),
    [
        (["8.8.8.8", "1.1.1.1"], False, (), "8.8.8.8"),
        (["10.20.0.1"], True, (), "10.20.0.1"),
        (["10.20.0.1"], False, (TEN,), "10.20.0.1"),
        (["2606:4700::1111"], False, (), "2606:4700::1111"),
    ],
)
def test_an_address_that_is_allowed_is_pinned(
    addresses: list[str], exact: bool, allowed: tuple[ipaddress.IPv4Network, ...], chosen: str
) -> None:
    assert choose("h", addresses, exact=exact, allowed=allowed) == chosen


@pytest.mark.control("NET-03")
@pytest.mark.parametrize(
    ("addresses", "exact", "allowed"),
    [
        (["8.8.8.8", "127.0.0.1"], True, ()),
        (["169.254.169.254"], True, (TEN,)),
        (["::ffff:127.0.0.1"], True, ()),
        (["64:ff9b::a9fe:a9fe"], True, ()),
        (["10.20.0.1"], False, ()),
        (["10.99.0.1"], True, (TEN,)),
        (["10.210.3.2"], True, ()),
        (["10.210.3.2"], True, (ipaddress.ip_network("10.0.0.0/8"),)),
    ],
)
def test_one_forbidden_address_refuses_the_whole_answer(
    addresses: list[str], exact: bool, allowed: tuple[ipaddress.IPv4Network, ...]
) -> None:
    with pytest.raises(DestinationBlocked):
        choose("h", addresses, exact=exact, allowed=allowed)


SECOND = addressing.networks(Band(addressing.PER_NETWORK + 1, addressing.PER_NETWORK + 1))
THREE = addressing.networks(Band(1, 3 * addressing.PER_NETWORK))


@pytest.mark.control("NET-03")
@pytest.mark.parametrize(
    ("own", "address", "refused"),
    [
        (SECOND, "10.210.3.2", True),
        (SECOND, "10.211.3.2", True),
        (SECOND, "10.208.3.2", False),
        # Between the ends of a band are workspaces too.
        (THREE, "10.211.3.2", True),
        (THREE, "10.208.3.2", True),
        (THREE, "10.209.3.2", False),
        # Where no workspace of this perimeter is, somebody's servers may be.
        (addressing.networks(), "10.211.3.2", False),
    ],
)
def test_networks_of_the_perimeters_own_workspaces_are_never_dialled(own: Any, address: str, refused: bool) -> None:
    resolver = Resolver(ResolverConfig(), lambda: 0.0, lambda _host: [address], own=own)
    dialled = resolver.chosen("h", exact=True, allowed=())
    if refused:
        with pytest.raises(DestinationBlocked):
            asyncio.run(dialled)
    else:
        assert asyncio.run(dialled) == address


def test_no_address_is_a_failure() -> None:
    with pytest.raises(ResolutionFailed):
        choose("h", [], exact=True, allowed=())


def test_the_resolver_is_asked_once_within_the_time_to_live() -> None:
    asked: list[str] = []
    now = [0.0]

    def lookup(host: str) -> list[str]:
        asked.append(host)
        return [f"8.8.8.{len(asked)}"]

    resolver = Resolver(ResolverConfig(ttl_s=5), lambda: now[0], lookup)

    async def twice() -> tuple[str, ...]:
        assert await resolver.addresses("a.example.com") == ("8.8.8.1",)
        return await resolver.addresses("a.example.com")

    assert asyncio.run(twice()) == ("8.8.8.1",)
    now[0] = 6.0
    assert asyncio.run(twice_again(resolver)) == ("8.8.8.2",)
    assert asked == ["a.example.com"] * 2


async def twice_again(resolver: Resolver) -> tuple[str, ...]:
    return await resolver.addresses("a.example.com")


def test_a_resolver_that_does_not_answer_is_a_failure_in_bounded_time() -> None:
    release = threading.Event()

    def stuck(_host: str) -> list[str]:
        release.wait(10)
        return []

    async def ask() -> None:
        resolver = Resolver(ResolverConfig(timeout_s=0.05), lambda: 0.0, stuck)
        try:
            with pytest.raises(ResolutionFailed):
                await resolver.addresses("slow.example.com")
        finally:
            release.set()

    asyncio.run(ask())


def test_the_hosts_file_comes_first_and_literals_need_no_resolver(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# comment\n10.1.2.3 A.example.com b.example.com # tail\n10.1.2.4 a.example.com\n")

    def never(host: str) -> list[str]:
        raise OSError(host)

    async def ask() -> None:
        resolver = Resolver(ResolverConfig(hosts_file=hosts), lambda: 0.0, never)
        assert await resolver.addresses("a.example.com") == ("10.1.2.3", "10.1.2.4")
        assert await resolver.addresses("192.0.2.7") == ("192.0.2.7",)
        with pytest.raises(ResolutionFailed):
            await resolver.addresses("c.example.com")

    asyncio.run(ask())
