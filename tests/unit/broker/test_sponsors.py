"""Sponsors: of one who left everything ends, nothing begins meanwhile, and nothing comes back by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from portal_world import OPERATOR, World
from sqlalchemy import select
from starlette.datastructures import QueryParams

from saw.audit import verify_chain
from saw.broker import sponsors as calls
from saw.broker.agents import ChangeAgent, RegisterAgent
from saw.broker.delegations import Issue, Revoke
from saw.broker.errors import BrokerError
from saw.broker.people import Identity, PersonRefused, admit
from saw.broker.registry import CreateWorkspace, Step
from saw.broker.schema import audit_events, people, sso_sessions, workspaces
from saw.broker.sponsors import SwitchSponsor
from saw.broker.store import SOURCE, chained_rows
from saw.gateway.state import parse_state
from saw.policy.delegation import Resource

pytestmark = pytest.mark.control("ID-04")
ADA = "ada@example.com"
LEFT = SwitchSponsor(reason="left the company")
BACK = SwitchSponsor(reason="came back")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """``ada``, written in two ways, sponsors ``ws-a`` and ``ws-c``; ``ben`` ``ws-b``."""
    found = World(tmp_path)
    found.workspace("ws-c", 3, "ADA@example.com")
    yield found
    found.close()


def refused(call: Any, *arguments: Any) -> str:
    with pytest.raises(BrokerError) as caught:
        call(*arguments)
    return caught.value.code


def hand(world: World, workspace: str) -> str:
    resource = Resource("api.example.com", paths=("/v1/**",))
    wanted = Issue(workspace_id=workspace, task="notes", resources=(resource,), duration_s=3600)
    return str(world.broker.delegations.issue(OPERATOR, wanted)["id"])


def signed_in(world: World) -> set[str]:
    with world.broker.services.store.read() as connection:
        return set(connection.execute(select(sso_sessions.c.person)).scalars())


def states(world: World) -> dict[str, str]:
    return {name: world.broker.registry.show(name)["state"] for name in ("ws-a", "ws-b", "ws-c")}


@pytest.mark.control("DEL-01")
def test_who_left_is_disabled_with_workspaces_delegations_and_sign_ins_and_nobody_else_is(world: World) -> None:
    handed = {name: hand(world, name) for name in ("ws-a", "ws-b", "ws-c")}
    world.terminal("ada")
    present = world.broker.sponsors.show("Ada@Example.com")
    assert (present["name"], present["state"], present["version"], present["changed_at"]) == (ADA, "active", 1, None)
    assert present["workspaces"] == {"active": ("ws-a", "ws-c")}
    done = world.broker.sponsors.disable(OPERATOR, ADA, LEFT)
    assert (done["changed"], done["state"], done["reason"], done["version"]) == (True, "disabled", LEFT.reason, 2)
    assert (done["quarantined"], set(done["revoked"])) == (["ws-a", "ws-c"], {handed["ws-a"], handed["ws-c"]})
    assert done["sign_ins"] == 2
    assert states(world) == {"ws-a": "quarantined", "ws-b": "active", "ws-c": "quarantined"}
    assert world.broker.registry.show("ws-a")["state_reason"] == "sponsor disabled: left the company"
    assert world.broker.delegations.show(handed["ws-b"])["state"] == "active"
    assert ADA not in signed_in(world)
    assert "ben@example.com" in signed_in(world)
    assert world["ada"].get("/").status_code == 303  # to the sign-in
    state = parse_state(msgspec.json.encode(world.broker.views.perimeter_state()))
    told = {entry.id: entry.state for entry in state.workspaces}
    assert told == {"ws-a": "quarantined", "ws-b": "active", "ws-c": "quarantined"}
    again = world.broker.sponsors.disable(OPERATOR, " ADA@EXAMPLE.COM ", LEFT)
    assert (again["changed"], again["version"]) == (False, 2)


@pytest.mark.control("DEL-01")
def test_nothing_begins_in_the_name_of_a_disabled_sponsor_and_everything_can_end(world: World) -> None:
    broker = world.broker
    spare = broker.agents.register(OPERATOR, RegisterAgent(sponsor=ADA))["id"]
    broker.sponsors.disable(OPERATOR, ADA, LEFT)
    assert refused(broker.agents.register, OPERATOR, RegisterAgent(sponsor="Ada@example.com")) == "sponsor_disabled"
    assert broker.agents.register(OPERATOR, RegisterAgent(sponsor="ben@example.com"))["changed"]
    assert refused(hand, world, "ws-a") == "workspace_ended"
    stop = Step("stopped", "released")
    assert broker.registry.transition(OPERATOR, "ws-a", stop)["state"] == "stopped"
    for to in ("provisioning", "attesting"):
        assert refused(broker.registry.transition, OPERATOR, "ws-a", Step(to, "start")) == "sponsor_disabled"
    assert refused(hand, world, "ws-a") == "sponsor_disabled"
    assert hand(world, "ws-b")
    assert broker.agents.change(OPERATOR, spare, ChangeAgent(version=1, purpose="none"))["changed"]
    assert broker.registry.transition(OPERATOR, "ws-c", Step("decommissioned", "over"))["state"] == "decommissioned"
    who = Identity("https://idp", "ada", ADA, ("staff",))
    assert broker.sso is not None
    with pytest.raises(PersonRefused, match="is disabled as a sponsor"), broker.services.store.write() as tx:
        admit(tx, world.config.sso, who, world.now)  # type: ignore[arg-type]


def test_who_comes_back_finds_nothing_running_and_can_begin_again(world: World) -> None:
    broker, handed = world.broker, hand(world, "ws-a")
    broker.sponsors.disable(OPERATOR, ADA, LEFT)
    back = broker.sponsors.enable(OPERATOR, ADA, BACK)
    assert (back["changed"], back["state"], back["version"]) == (True, "active", 3)
    assert broker.sponsors.enable(OPERATOR, ADA, BACK)["changed"] is False
    assert states(world)["ws-a"] == "quarantined"
    assert broker.delegations.show(handed)["state"] == "revoked"
    broker.registry.transition(OPERATOR, "ws-a", Step("stopped", "released"))
    assert broker.registry.transition(OPERATOR, "ws-a", Step("attesting", "start"))["state"] == "attesting"
    assert hand(world, "ws-a")
    who = Identity("https://idp", "ada", ADA, ("staff",))
    with broker.services.store.write() as tx:
        assert admit(tx, world.config.sso, who, world.now).roles == ("user",)  # type: ignore[arg-type]
    # What was told once is not told again: a second departure ends what began since.
    assert broker.sponsors.disable(OPERATOR, ADA, LEFT)["quarantined"] == ["ws-a"]


def test_a_slip_in_the_name_and_a_version_of_before_change_nothing(world: World) -> None:
    assert refused(world.broker.sponsors.disable, OPERATOR, "adda@example.com", LEFT) == "unknown_sponsor"
    old = SwitchSponsor(reason="x", version=7)
    assert refused(world.broker.sponsors.disable, OPERATOR, ADA, old) == "version_conflict"
    assert set(states(world).values()) == {"active"}
    assert world.broker.sponsors.disable(OPERATOR, ADA, SwitchSponsor(reason="x", version=1))["changed"]


def test_somebody_who_sponsors_nothing_is_disabled_too(world: World) -> None:
    assert world.broker.sponsors.disable(OPERATOR, "cleo@example.com", LEFT)["sign_ins"] == 1
    assert "cleo@example.com" not in signed_in(world)
    assert ADA in signed_in(world)


@pytest.mark.parametrize("name", ["corp/dana", "..", "."])
def test_a_name_that_no_call_could_address_sponsors_nothing(name: str) -> None:
    body = {"id": "ws-new", "sponsor": name, "blueprint": "coding", "ring": "stable", "image": "workspace"}
    for kind, said in ((CreateWorkspace, body), (RegisterAgent, {"sponsor": name})):
        with pytest.raises(msgspec.ValidationError, match="sponsor"):
            msgspec.convert(said, kind)
        assert msgspec.convert({**said, "sponsor": "Dana O'Neil.."}, kind)


def test_the_list_is_filtered_and_comes_in_pages(world: World) -> None:
    kept = world.broker.sponsors
    kept.disable(OPERATOR, ADA, LEFT)

    def listed(**query: str) -> list[tuple[str, str]]:
        found = kept.listed(calls.wanted(QueryParams(query)))["sponsors"]
        return [(one["name"], one["state"]) for one in found]

    everybody = [(ADA, "disabled"), ("ben@example.com", "active")]
    assert (listed(), listed(state="disabled"), listed(text="BEN")) == (everybody, everybody[:1], everybody[1:])
    first = kept.listed(calls.wanted(QueryParams({"limit": "1"})))
    assert (first["sponsors"][0]["name"], first["next"]) == (ADA, ADA)
    assert listed(after=first["next"]) == everybody[1:]
    assert refused(calls.wanted, QueryParams({"colour": "red"})) == "malformed"


def test_all_of_it_is_in_the_trail_once(world: World) -> None:
    world.broker.sponsors.disable(OPERATOR, ADA, LEFT)
    world.broker.sponsors.disable(OPERATOR, ADA, LEFT)
    with world.broker.services.store.read() as connection:
        query = select(audit_events).where(audit_events.c.source == SOURCE).order_by(audit_events.c.seq)
        rows = list(chained_rows(connection.execute(query)))
    assert verify_chain(rows).complete
    found = [row.event for row in rows if row.event.get("entity") == {"type": "sponsor", "uid": ADA}]
    assert [(one["activity_name"], one["comment"]) for one in found] == [("Deactivate", LEFT.reason)]
    assert found[0]["unmapped"]["saw"]["quarantined"] == ["ws-a", "ws-c"]


def test_of_a_disabling_and_a_start_that_race_nothing_is_left_running(world: World) -> None:
    """Whichever comes first: no workspace of a disabled sponsor ends in a state in which it may attest."""
    broker = world.broker
    for _ in range(20):
        with broker.services.store.write() as tx:
            tx.connection.execute(workspaces.update().where(workspaces.c.id == "ws-a").values(state="stopped"))
        broker.sponsors.enable(OPERATOR, ADA, BACK)
        begin = threading.Barrier(2)

        def start(begin: threading.Barrier = begin) -> None:
            begin.wait(60)
            try:
                broker.registry.transition(OPERATOR, "ws-a", Step("attesting", "start"))
            except BrokerError as error:
                assert error.code in {"sponsor_disabled", "transition_refused"}

        racer = threading.Thread(target=start)
        racer.start()
        begin.wait(60)
        broker.sponsors.disable(OPERATOR, ADA, LEFT)
        racer.join(60)
        assert states(world)["ws-a"] == "quarantined"


@pytest.mark.control("REV-01")
def test_a_disabled_person_decides_nothing_and_what_was_approved_before_does_not_count(world: World) -> None:
    from saw.broker.review_evidence import in_group

    with world.broker.services.store.write() as tx:
        values = {"groups": '["maintainers"]', "roles": '["approver","user"]'}
        tx.connection.execute(people.update().where(people.c.name == ADA).values(**values))
        assert in_group(tx.connection, ADA, "maintainers", world.now, passkey=True)
    world.broker.sponsors.disable(OPERATOR, ADA, LEFT)
    with world.broker.services.store.write() as tx:
        later = {"groups": '["maintainers"]', "roles": '["approver"]', "entitled_until": "9999-01-01T00:00:00Z"}
        tx.connection.execute(people.update().where(people.c.name == ADA).values(**later))
        assert not in_group(tx.connection, ADA, "maintainers", world.now, passkey=True)


def test_a_delegation_that_was_revoked_before_is_left_as_it_was(world: World) -> None:
    handed = hand(world, "ws-a")
    world.broker.delegations.revoke(OPERATOR, handed, Revoke(reason="over"))
    assert world.broker.sponsors.disable(OPERATOR, ADA, LEFT)["revoked"] == []
    assert world.broker.delegations.show(handed)["revoked_reason"] == "over"
