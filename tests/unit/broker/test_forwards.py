"""Grants of ports: who may get one, how long it counts, and what its end does. By the test's clock."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
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
from session_world import ADA, EDGE, OPERATOR, START, World
from sqlalchemy import select

from saw.broker.bastion_sessions import SessionRequest
from saw.broker.clock import iso
from saw.broker.config import load_config
from saw.broker.context import Caller
from saw.broker.errors import BrokerError, ConflictError, ForbiddenError, NotFoundError
from saw.broker.forwarding_settings import ForwardingSettings
from saw.broker.forwards import GrantForward, RevokeForward
from saw.broker.registry import Step
from saw.broker.schema import audit_events, workspaces
from saw.broker.session_views import key_digest
from saw.errors import ConfigError
from saw.sessions.messages import Granted, Redeem

pytestmark = pytest.mark.control("ID-02")
RULES = ForwardingSettings(("3000-3999", "8080"), max_hours=4, blueprints=("coding",))
TO = f"user:{ADA}"
HOUR = 3600


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, forwarding=RULES)


def wanted(**changes: Any) -> GrantForward:
    return GrantForward(
        **{"workspace_id": "ws-a", "port": 3000, "to": TO, "for_s": HOUR, "reason": "look at it", **changes}
    )


def ask(world: World, port: int = 3000, *, person: str = ADA) -> tuple[str, str, str]:
    """Ask for a session for ``port``; return its id, its key and its certificate."""
    key = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    who = {"person": person, "sign_in": "ss-1"} if person else {}
    given = world.sessions.request(OPERATOR, SessionRequest("ws-a", key, forward_port=port), **who)
    return given["session_id"], key, given["certificate"]


def redeem(world: World, session: str, key: str, **more: Any) -> Granted:
    return world.sessions.redeem(EDGE, Redeem(session, key_digest(key), "192.0.2.7", key, **more))


def refused(call: Callable[[], object], code: str) -> None:
    with pytest.raises(BrokerError) as error:
        call()
    assert error.value.code == code


def told(world: World, operation: str) -> list[tuple[str, dict[str, Any]]]:
    """Outcome and details of the events of one operation."""
    with world.broker.services.store.read() as connection:
        events = [msgspec.json.decode(raw) for raw in connection.execute(select(audit_events.c.event)).scalars()]
    return [
        (one["status"], one["unmapped"]["saw"]) for one in events if one.get("api", {}).get("operation") == operation
    ]


def certificate(line: str) -> SSHCertificate:
    found = load_ssh_public_identity(line.encode())
    assert isinstance(found, SSHCertificate)
    return found


def test_a_grant_opens_a_session_for_its_port_that_ends_with_it(world: World) -> None:
    given = world.broker.forwards.grant(OPERATOR, wanted(for_s=120))
    assert (given["state"], given["to"], given["changed"]) == ("granted", TO, True)
    session, key, line = ask(world)
    assert certificate(line).extensions == {}
    granted = redeem(world, session, key)
    assert (granted.forward_port, granted.ends_in_s) == (3000, 120)
    leg = certificate(granted.certificate)
    assert (leg.valid_principals, leg.extensions) == ([b"forward:ws-a"], {})
    assert world.sessions.show(session)["forward_grant"] == given["id"]
    world.now += timedelta(seconds=119)
    world.broker.forwards.tick()
    assert world.state(session) == ("open", None)
    world.now += timedelta(seconds=1)
    world.broker.forwards.tick()
    assert world.state(session) == ("ending", "forward_ended")
    assert told(world, "forward.grant") == [
        (
            "Success",
            {**told(world, "forward.grant")[0][1], "forward": given["id"], "port": 3000, "to": TO, "for_s": 120},
        )
    ]


def test_a_session_of_another_kind_takes_no_grant_and_reaches_no_port(world: World) -> None:
    key = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    given = world.sessions.request(OPERATOR, SessionRequest("ws-a", key))
    assert list(certificate(given["certificate"]).extensions) == [b"permit-pty"]
    granted = redeem(world, given["session_id"], key, command="3000")
    assert granted.forward_port is None
    assert certificate(granted.certificate).valid_principals == [b"ws-a"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"port": 4000}, "port_not_allowed"),
        ({"port": 80}, "port_not_allowed"),
        ({"for_s": 4 * HOUR + 1}, "grant_too_long"),
        ({"to": "user:ben@example.com"}, "not_your_workspace"),
        ({"workspace_id": "ws-b"}, "unknown_workspace"),
    ],
)
def test_what_may_not_be_granted_is_refused_and_in_the_trail(world: World, changes: dict[str, Any], code: str) -> None:
    refused(lambda: world.broker.forwards.grant(OPERATOR, wanted(**changes)), code)
    assert world.broker.forwards.listed(None, everything=True) == {"forwards": []}
    if code != "unknown_workspace":
        assert [outcome for outcome, _ in told(world, "forward.grant")] == ["Failure"]
    assert world.broker.forwards.grant(OPERATOR, wanted(for_s=4 * HOUR))["state"] == "granted"


def test_nobody_grants_a_port_to_themselves_but_the_control_host(world: World) -> None:
    ada = Caller(TO, "192.0.2.9", "r")
    refused(lambda: world.broker.forwards.grant(ada, wanted()), "own_grant")
    assert world.broker.forwards.grant(Caller("user:eve@example.com", "192.0.2.9", "r"), wanted())["changed"]
    assert world.broker.forwards.grant(OPERATOR, wanted(to="operator:root"))["changed"]


def test_without_the_configuration_nothing_is_granted_nor_used_any_more(tmp_path: Path, world: World) -> None:
    off = World(tmp_path / "off")
    refused(lambda: off.broker.forwards.grant(OPERATOR, wanted()), "forwarding_off")
    refused(lambda: ask(off), "forwarding_off")
    world.broker.forwards.grant(OPERATOR, wanted(to="operator:root"))
    live, key, _ = ask(world, person="")
    redeem(world, live, key)
    asked, key, _ = ask(world, person="")
    world.config = msgspec.structs.replace(world.config, forwarding=ForwardingSettings(("8080",)))
    world.start()
    refused(lambda: ask(world, person=""), "port_not_allowed")
    refused(lambda: redeem(world, asked, key), "port_not_allowed")
    world.broker.forwards.tick()
    assert world.state(live) == ("ending", "forward_ended")


def test_a_grant_is_for_one_person_one_port_and_blueprints_that_allow_it(world: World) -> None:
    world.broker.forwards.grant(OPERATOR, wanted())
    refused(lambda: ask(world, person=""), "not_granted")
    refused(lambda: ask(world, 3001), "not_granted")
    session, key, _ = ask(world)
    assert redeem(world, session, key).forward_port == 3000
    with world.broker.services.store.write() as tx:
        tx.connection.execute(workspaces.update().values(blueprint="records"))
    refused(lambda: ask(world), "blueprint_not_allowed")
    refused(lambda: world.broker.forwards.grant(OPERATOR, wanted(port=3001)), "blueprint_not_allowed")


def test_the_entitlement_counts_besides_the_grant(world: World) -> None:
    world.broker.forwards.grant(OPERATOR, wanted())
    session, key, _ = ask(world)
    with world.broker.services.store.write() as tx:
        tx.connection.execute(workspaces.update().values(state="stopped"))
    with pytest.raises(ForbiddenError):
        redeem(world, session, key)
    with pytest.raises(ForbiddenError):
        ask(world)


def test_a_session_for_a_port_runs_no_command_and_has_no_terminal(world: World) -> None:
    world.broker.forwards.grant(OPERATOR, wanted())
    session, key, _ = ask(world)
    refused(lambda: redeem(world, session, key, command="id"), "forward_alone")
    refused(lambda: redeem(world, session, key, terminal=True), "forward_alone")
    assert redeem(world, session, key).forward_port == 3000


@pytest.mark.control("ID-03")
def test_what_is_revoked_ends_at_once_and_opens_nothing(world: World) -> None:
    forwards = world.broker.forwards
    given = forwards.grant(OPERATOR, wanted())
    live, key, _ = ask(world)
    redeem(world, live, key)
    asked, later, _ = ask(world)
    other = world.open()
    assert forwards.revoke(OPERATOR, given["id"], RevokeForward("enough"))["state"] == "revoked"
    assert world.state(live) == ("ending", "forward_revoked")
    assert world.sessions.watch(EDGE, live).state == "ended"
    assert world.state(asked) == ("closed", "forward_revoked")
    assert world.state(other) == ("open", None)
    with pytest.raises(ConflictError):
        redeem(world, asked, later)
    refused(lambda: ask(world), "not_granted")
    assert forwards.revoke(OPERATOR, given["id"], RevokeForward("again"))["changed"] is False
    assert len(told(world, "forward.revoke")) == 1
    with pytest.raises(NotFoundError):
        forwards.revoke(OPERATOR, "fwd-0", RevokeForward("what"))
    assert forwards.listed(None, everything=False) == {"forwards": []}
    assert [one["revoked_reason"] for one in forwards.listed("ws-a", everything=True)["forwards"]] == ["enough"]
    assert forwards.listed("ws-b", everything=True) == {"forwards": []}


def test_one_that_is_over_by_time_is_not_found_between_asking_and_opening(world: World) -> None:
    given = world.broker.forwards.grant(OPERATOR, wanted(for_s=60))
    session, key, _ = ask(world)
    world.now += timedelta(seconds=60)
    refused(lambda: redeem(world, session, key), "not_granted")
    [row] = world.broker.forwards.listed(None, everything=True)["forwards"]
    assert (row["id"], row["state"]) == (given["id"], "expired")
    assert world.broker.forwards.revoke(OPERATOR, given["id"], RevokeForward("late"))["changed"] is False


def test_the_same_again_is_the_same_grant_and_another_is_in_the_way(world: World) -> None:
    forwards = world.broker.forwards
    first = forwards.grant(OPERATOR, wanted())
    assert forwards.grant(OPERATOR, wanted()) == {**first, "changed": False}
    refused(lambda: forwards.grant(OPERATOR, wanted(for_s=2 * HOUR)), "granted_already")
    refused(lambda: forwards.grant(OPERATOR, wanted(reason="another")), "granted_already")
    assert forwards.grant(OPERATOR, wanted(port=3001))["changed"]
    world.now += timedelta(hours=1)
    assert forwards.grant(OPERATOR, wanted(for_s=2 * HOUR))["id"] != first["id"]


@pytest.mark.parametrize("end", ["killed", "retired"])
def test_grants_go_with_a_workspace_that_is_killed_or_retired_and_outlive_a_stop(world: World, end: str) -> None:
    registry = world.broker.registry
    given = world.broker.forwards.grant(OPERATOR, wanted())
    live, key, _ = ask(world)
    redeem(world, live, key)
    registry.transition(OPERATOR, "ws-a", Step("stopped", "night"))
    assert world.state(live) == ("ending", "workspace_stopped")
    assert [one["id"] for one in world.broker.forwards.listed(None, everything=False)["forwards"]] == [given["id"]]
    if end == "killed":
        registry.kill(OPERATOR, "ws-a", "it misbehaves")
    else:
        registry.transition(OPERATOR, "ws-a", Step("decommissioned", "done"))
    assert world.broker.forwards.listed(None, everything=False) == {"forwards": []}
    assert len(told(world, "forward.revoke")) == 1
    refused(lambda: world.broker.forwards.grant(OPERATOR, wanted()), "workspace_not_admitted")


@pytest.mark.parametrize(
    ("ports", "allowed", "refused_ones"),
    [
        (("3000",), (3000,), (2999, 3001)),
        (("1024-65535",), (1024, 65535), (1023, 3128, 9901)),
        (("3000-3002", "8080"), (3000, 3002, 8080), (3003, 8081)),
    ],
)
def test_ports_are_those_listed_and_none_of_ring_1(
    ports: tuple[str, ...], allowed: tuple[int, ...], refused_ones: tuple[int, ...]
) -> None:
    rules = ForwardingSettings(ports)
    assert all(rules.allows(port) for port in allowed)
    assert not any(rules.allows(port) for port in refused_ones)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"ports": []}', "forwarding.ports"),
        ('{"ports": ["80"]}', "forwarding.ports"),
        ('{"ports": ["3000-2000"]}', "forwarding.ports"),
        ('{"ports": ["3000-70000"]}', "forwarding.ports"),
        ('{"ports": ["all"]}', "forwarding.ports"),
        ('{"ports": ["3000"], "max_hours": 0}', "forwarding.max_hours"),
        ('{"ports": ["3000"], "max_hours": 25}', "forwarding.max_hours"),
        ('{"ports": ["3000"], "blueprints": [""]}', "forwarding.blueprints"),
        ('{"ports": ["3000"], "hosts": []}', "hosts"),
    ],
)
def test_each_wrong_field_of_the_configuration_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "broker.json"
    base = '{"trust_domain":"saw.example","state_dir":"/s","operator_socket":"/o","server_names":["b"],"forwarding":%s}'
    file.write_text(base % text)
    with pytest.raises(ConfigError, match=named):
        load_config(file)
    file.write_text(base % '{"ports": ["3000"]}')
    assert load_config(file).forwarding == ForwardingSettings(("3000",))


def test_times_are_kept_as_everywhere(world: World) -> None:
    given = world.broker.forwards.grant(OPERATOR, wanted())
    assert (given["granted_at"], given["expires_at"]) == (iso(START), iso(START + timedelta(hours=1)))
