"""From where session certificates count: what the broker sees of whoever asks, or is told, and never beyond that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    load_ssh_public_identity,
)
from session_world import ADA, OPERATOR, World

from saw.broker.bastion_sessions import SessionRequest
from saw.broker.certificates import SshRequest
from saw.broker.config import BrokerConfig, load_config
from saw.broker.context import Caller
from saw.broker.errors import ForbiddenError, MalformedError
from saw.broker.session_settings import SessionRules
from saw.broker.session_source import bound_source, seen_address
from saw.errors import ConfigError

pytestmark = pytest.mark.control("ID-02")
AT_HOME = Caller("user:ada@example.com", "192.0.2.7", "r")
PERSON = {"person": ADA, "sign_in": "ss-1"}


def key() -> str:
    return Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def source_of(certificate: str) -> str | None:
    found = load_ssh_public_identity(certificate.encode())
    assert isinstance(found, SSHCertificate)
    source = found.critical_options.get(b"source-address")
    return None if source is None else source.decode()


def asked(world: World, caller: Caller, source: str | None = None, **more: Any) -> str | None:
    given = world.sessions.request(caller, SessionRequest("ws-a", key(), source_address=source), **more)
    assert world.sessions.show(given["session_id"])["state"] == "requested"
    return source_of(given["certificate"])


def last_event(world: World) -> dict[str, Any]:
    return dict(world.broker.trail.page("broker", 0, 10_000)["events"][-1].event)


def with_networks(directory: Path, *networks: str) -> World:
    return World(directory, SessionRules(source_networks=networks))


def test_who_signed_in_gets_a_certificate_for_the_address_that_the_broker_sees(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert asked(world, AT_HOME, **PERSON) == "192.0.2.7/32"
    assert last_event(world)["unmapped"]["saw"]["source_address"] == "192.0.2.7"
    assert asked(world, AT_HOME, "192.0.2.7", **PERSON) == "192.0.2.7/32"
    for beyond in ("192.0.2.8", "192.0.2.0/24", "0.0.0.0/0", "192.0.2.7,198.51.100.1", "::/0"):
        with pytest.raises(ForbiddenError) as caught:
            asked(world, AT_HOME, beyond, **PERSON)
        assert caught.value.code == "source_address_outside"
        event = last_event(world)
        assert (event["status"], event["status_detail"]) == ("Failure", "source_address_outside")
        assert event["unmapped"]["saw"]["source_address"] == beyond
    with pytest.raises(MalformedError):
        asked(world, AT_HOME, "everywhere", **PERSON)


def test_configured_networks_stand_for_the_address_and_for_those_who_have_none(tmp_path: Path) -> None:
    world = with_networks(tmp_path, "10.0.0.0/8", "2001:db8::/32")
    for caller, who in ((AT_HOME, PERSON), (OPERATOR, {})):
        assert asked(world, caller, **who) == "10.0.0.0/8,2001:db8::/32"
        assert asked(world, caller, "10.1.0.0/16,2001:db8::7", **who) == "10.1.0.0/16,2001:db8::7/128"
        with pytest.raises(ForbiddenError, match="beyond"):
            asked(world, caller, "192.0.2.7", **who)


def test_without_address_or_networks_nothing_is_known_and_the_caller_may_narrow(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert asked(world, OPERATOR) is None
    assert asked(world, OPERATOR, "192.0.2.0/24") == "192.0.2.0/24"


def test_a_terminal_logs_in_from_this_host_whatever_the_browsers_address_is(tmp_path: Path) -> None:
    world = with_networks(tmp_path, "10.0.0.0/8")
    assert asked(world, AT_HOME, from_here="172.16.0.9", **PERSON) == "172.16.0.9/32"


def test_a_certificate_past_the_bastion_counts_on_the_perimeters_side_of_the_link(tmp_path: Path) -> None:
    world = with_networks(tmp_path, "10.0.0.0/8")

    def direct(source: str | None = None) -> str | None:
        given = world.broker.certificates.ssh(OPERATOR, SshRequest("ws-a", key(), source_address=source))
        return source_of(given["certificate"])

    assert direct() == "10.210.1.1/32"
    assert direct("10.210.1.1") == "10.210.1.1/32"
    with pytest.raises(ForbiddenError) as caught:
        direct("10.210.1.0/24")
    assert caught.value.code == "source_address_outside"
    assert last_event(world)["status_detail"] == "source_address_outside"


@pytest.mark.parametrize(
    ("address", "seen"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8::7", "2001:db8::7"),
        ("fe80::1%eth0", "fe80::1"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("127.0.0.1", None),
        ("::1", None),
        ("::ffff:127.0.0.1", None),
        ("operator-socket", None),
        ("", None),
    ],
)
def test_an_address_on_loopback_or_none_tells_nothing(address: str, seen: str | None) -> None:
    assert seen_address(Caller("user:a", address, "r")) == seen


def test_an_ipv4_network_is_within_no_ipv6_one() -> None:
    assert isinstance(bound_source("::/0", "192.0.2.7"), ForbiddenError)
    assert bound_source("::/0,0.0.0.0/0", "192.0.2.7") == "192.0.2.7/32"


@pytest.mark.parametrize(
    "networks", [["10.0.0.1/8"], ["everywhere"], [f"2001:db8:1234:5678::{n:x}/128" for n in range(12)]]
)
def test_networks_that_no_certificate_could_carry_are_refused_at_the_start(tmp_path: Path, networks: list[str]) -> None:
    file = tmp_path / "broker.json"
    config = BrokerConfig(
        "saw.example", "/s", "/o", ("b.internal",), sessions=SessionRules(source_networks=("10.0.0.0/8",))
    )
    good = msgspec.to_builtins(config)
    file.write_bytes(msgspec.json.encode(good))
    assert load_config(file).sessions.source_networks == ("10.0.0.0/8",)
    good["sessions"]["source_networks"] = networks
    file.write_bytes(msgspec.json.encode(good))
    with pytest.raises(ConfigError, match="source_networks"):
        load_config(file)
