"""The register of agents: made, bound, changed under a version, retired with all that it held, and succeeded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from agents_before import AFTER, fill_before, found_after
from hypothesis import given, settings
from hypothesis import strategies as st
from review_world import OPERATOR, POLICY, World
from sqlalchemy import create_engine, select
from starlette.datastructures import QueryParams

from saw.audit import verify_chain
from saw.broker import agent_list
from saw.broker.agents import ChangeAgent, RegisterAgent, RetireAgent, SucceedAgent
from saw.broker.clock import iso
from saw.broker.context import Caller
from saw.broker.delegation_ends import held_by
from saw.broker.delegations import Issue
from saw.broker.errors import BrokerError, ConflictError, MalformedError, NotFoundError
from saw.broker.registry import Step
from saw.broker.schema import agents, audit_events, workspaces
from saw.broker.store import SOURCE, Store, chained_rows
from saw.broker.wake import Waker
from saw.gateway.delegations import Engagement, engagements, verify_statements
from saw.gateway.state import PerimeterState, WorkspaceEntry, parse_state
from saw.policy.delegation import Resource

pytestmark = pytest.mark.control("ID-04")

OTHER = Caller("operator:other", "operator-socket", "request-9")
ENDS = RetireAgent(reason="the task is over")


class Register:
    """A world in which each test has workspaces of its own, without an agent until it is given one."""

    def __init__(self, directory: Path) -> None:
        self.world = World(directory)
        self.broker = self.world.broker
        self.kept = self.broker.agents
        self._numbers = iter(range(10, 251))

    def workspace(self, name: str, **changes: Any) -> str:
        stamp = iso(self.world.now)
        values = {"sponsor": "Ada", "blueprint": "coding", "ring": "stable", "image": "i", "image_sha256": "1" * 64}
        values |= {"state_reason": "test", "state_since": stamp, "created_at": stamp, "watch_seq": 0, "state": "active"}
        values |= {
            "agent_id": "",
            "policy_digest": POLICY,
            "lease_expires_at": iso(self.world.now + timedelta(days=60)),
        }
        with self.broker.services.store.write() as tx:
            tx.connection.execute(
                workspaces.insert().values(id=name, number=next(self._numbers), **{**values, **changes})
            )
        return name

    def agent(self, workspace: str = "", **said: Any) -> dict[str, Any]:
        return self.kept.register(OPERATOR, RegisterAgent(sponsor="Ada", workspace=workspace, **said))

    def hand(self, workspace: str, parent: str = "", seconds: int = 3600) -> str:
        resource = Resource("api.example.com", paths=("/v1/**",))
        wanted = Issue(workspace_id=workspace, task="notes", resources=(resource,), duration_s=seconds, parent=parent)
        return str(self.broker.delegations.issue(OPERATOR, wanted)["id"])

    def state(self, delegation: str) -> str:
        return str(self.broker.delegations.show(delegation)["state"])

    def told(self, workspace: str) -> tuple[WorkspaceEntry, Engagement]:
        """What a gatekeeper makes of what it is told about a workspace."""
        state: PerimeterState = parse_state(msgspec.json.encode(self.broker.views.perimeter_state()))
        verified, refused = verify_statements(state.workspaces, {}, self.broker.authority.ca_pem, self.world.now)
        assert not refused
        [entry] = [one for one in state.workspaces if one.id == workspace]
        return entry, engagements(state.workspaces, verified).get(workspace, Engagement())

    def events(self, kind: str, identifier: str) -> list[dict[str, Any]]:
        found = self.broker.trail.page("broker", 0, 100_000)["events"]
        return [one.event for one in found if one.event.get("entity") == {"type": kind, "uid": identifier}]


@pytest.fixture(scope="module")
def register(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Register]:
    found = Register(tmp_path_factory.mktemp("agents"))
    yield found
    found.broker.close()


def refused(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(BrokerError) as caught:
        call(*arguments, **named)
    return caught.value.code


# --- Registering and binding ------------------------------------------------------------------------------------------


def test_an_agent_is_registered_with_what_is_claimed_of_it_and_bound_to_one_workspace(register: Register) -> None:
    alone = register.agent(
        name="notes-helper", owner="team A", purpose="keeps the notes", harness="codex 1.2", model="m/x"
    )
    assert (alone["state"], alone["workspace"], alone["version"], alone["changed"]) == ("registered", None, 1, True)
    assert alone["claims"] == {"harness": "codex 1.2", "model": "m/x"}
    bound = register.kept.change(OPERATOR, alone["id"], ChangeAgent(version=1, workspace=register.workspace("ws-bind")))
    assert (bound["state"], bound["workspace"], bound["blueprint"], bound["version"]) == (
        "active",
        "ws-bind",
        "coding",
        2,
    )
    assert register.broker.registry.show("ws-bind")["agent_id"] == alone["id"]
    made, enrolled = register.events("agent", alone["id"])
    assert (made["activity_name"], made["unmapped"]["saw"]["harness_claim"]) == ("Create", "codex 1.2")
    assert enrolled["unmapped"]["saw"]["workspace"] == "ws-bind"
    nameless = register.agent()
    assert nameless["name"] == nameless["id"]


def test_a_name_a_workspace_and_a_sponsor_are_those_of_one_living_agent(register: Register) -> None:
    first = register.agent(register.workspace("ws-one"), name="only-one")
    assert refused(register.agent, name="only-one") == "name_taken"
    assert refused(register.agent, name="agent-99999") == "name_refused"
    assert refused(register.agent, "ws-one") == "workspace_has_agent"
    assert refused(register.agent, "ws-none") == "unknown_workspace"
    assert refused(register.agent, register.workspace("ws-bens", sponsor="Ben")) == "other_sponsor"
    assert refused(register.agent, register.workspace("ws-gone", state="decommissioned")) == "decommissioned"
    second = register.agent(name="another")
    change = ChangeAgent(version=first["version"], workspace=register.workspace("ws-two"))
    assert refused(register.kept.change, OPERATOR, first["id"], change) == "agent_bound"
    assert register.kept.change(OPERATOR, second["id"], ChangeAgent(version=1, workspace="ws-two"))["changed"]
    register.kept.retire(OPERATOR, first["id"], ENDS)
    again = register.agent("ws-one", name="only-one")
    assert again["id"] != first["id"]


def test_nothing_of_a_refused_registration_stays(register: Register) -> None:
    before = register.kept.register(OPERATOR, RegisterAgent(sponsor="Ada"))["id"]
    assert refused(register.agent, "ws-none", name="half-made") == "unknown_workspace"
    after = register.agent(name="half-made")
    assert int(after["id"].partition("-")[2]) == int(before.partition("-")[2]) + 1


# --- Versions and keys ------------------------------------------------------------------------------------------------


def test_a_change_needs_the_version_that_is_there(register: Register) -> None:
    made = register.agent(purpose="one")
    changed = register.kept.change(OPERATOR, made["id"], ChangeAgent(version=1, purpose="two", model="m-2"))
    assert (changed["purpose"], changed["claims"]["model"], changed["version"]) == ("two", "m-2", 2)
    with pytest.raises(ConflictError) as caught:
        register.kept.change(OPERATOR, made["id"], ChangeAgent(version=1, purpose="three"))
    assert (caught.value.code, caught.value.details) == ("version_conflict", {"version": 2})
    assert refused(register.kept.retire, OPERATOR, made["id"], RetireAgent(reason="r", version=1)) == "version_conflict"
    same = register.kept.change(OPERATOR, made["id"], ChangeAgent(version=2, purpose="two"))
    assert (same["changed"], same["version"]) == (False, 2)
    assert register.kept.retire(OPERATOR, made["id"], RetireAgent(reason="r", version=2))["changed"]
    assert refused(register.kept.change, OPERATOR, made["id"], ChangeAgent(version=3, purpose="x")) == "agent_retired"


def test_the_same_key_is_the_same_agent_and_never_another_request(register: Register) -> None:
    wanted = RegisterAgent(sponsor="Ada", name="keyed", idempotency_key="key-0001")
    first = register.kept.register(OPERATOR, wanted)
    again = register.kept.register(OPERATOR, wanted)
    assert (again["id"], again["changed"]) == (first["id"], False)
    other = RegisterAgent(sponsor="Ada", name="keyed-2", idempotency_key="key-0001")
    assert refused(register.kept.register, OPERATOR, other) == "idempotency_mismatch"
    assert register.kept.register(OTHER, other)["changed"]
    follows = SucceedAgent(reason="newer", idempotency_key="key-0002")
    new = register.kept.succeed(OPERATOR, first["id"], follows)
    assert register.kept.succeed(OPERATOR, first["id"], follows)["id"] == new["id"]
    assert refused(register.kept.succeed, OPERATOR, new["id"], follows) == "idempotency_mismatch"


# --- Retiring ---------------------------------------------------------------------------------------------------------


@pytest.mark.control("DEL-01")
def test_retiring_ends_all_that_the_agent_held_at_once_and_nothing_of_others(register: Register) -> None:
    for name in ("ws-ends", "ws-stays"):
        register.workspace(name)
    agent, other = register.agent("ws-ends"), register.agent("ws-stays")
    whole = register.hand("ws-ends")
    part = register.hand("ws-ends", whole, 600)
    handed_on, own = register.hand("ws-stays", whole, 600), register.hand("ws-stays")
    waiting = register.world.open(workspace_id="ws-ends").id
    entry, held = register.told("ws-ends")
    assert (entry.agent_retired, {line.record.id for line in held.lines}) == (False, {whole, part})
    seq = register.broker.views.registry_seq()

    ended = register.kept.retire(OPERATOR, agent["id"], ENDS)
    assert (ended["state"], ended["changed"], ended["retired_by"]) == ("retired", True, "operator:root")
    assert set(ended["revoked"]) == {whole, part, handed_on}
    assert [register.state(one) for one in (whole, part, handed_on, own)] == ["revoked"] * 3 + ["active"]
    assert register.world.view(waiting, "ws-ends").state == "cancelled"
    assert register.broker.views.registry_seq() > seq
    entry, held = register.told("ws-ends")
    assert (entry.agent_retired, entry.agent, held) == (True, agent["id"], Engagement(required=True))
    entry, held = register.told("ws-stays")
    assert (entry.agent_retired, [line.record.id for line in held.lines]) == (False, [own])
    assert register.kept.show(other["id"])["state"] == "active"
    event = register.events("agent", agent["id"])[-1]
    assert (event["comment"], event["unmapped"]["saw"]["to"]) == ("the task is over", "retired")
    assert not register.kept.retire(OPERATOR, agent["id"], ENDS)["changed"]


@pytest.mark.control("DEL-01")
@pytest.mark.control("REV-01")
def test_nothing_new_is_handed_to_a_retired_agent_or_reviewed_for_it(register: Register) -> None:
    agent = register.agent(register.workspace("ws-shut"))
    assert register.state(register.hand("ws-shut")) == "active"
    register.kept.retire(OPERATOR, agent["id"], ENDS)
    assert refused(register.hand, "ws-shut") == "agent_retired"
    assert refused(register.world.open, workspace_id="ws-shut") == "agent_retired"
    register.kept.succeed(OPERATOR, agent["id"], SucceedAgent(reason="goes on"))
    assert register.state(register.hand("ws-shut")) == "active"
    assert register.world.open(workspace_id="ws-shut").state == "pending"


@pytest.mark.control("LIF-01")
def test_an_agent_follows_its_workspace_and_ends_with_it(register: Register) -> None:
    agent = register.agent(register.workspace("ws-life"))["id"]
    handed = register.hand("ws-life")
    states = []
    for to in ("stopped", "attesting", "decommissioned"):
        register.broker.registry.transition(OPERATOR, "ws-life", Step(to, "drill"))
        states.append(register.kept.show(agent)["state"])
    assert states == ["suspended", "suspended", "retired"]
    assert register.state(handed) == "revoked"
    early = register.agent(register.workspace("ws-early", state="requested"))["id"]
    register.broker.registry.transition(OPERATOR, "ws-early", Step("provisioning", "drill"))
    assert register.kept.show(early)["state"] == "registered"
    with register.broker.services.store.write() as tx:
        row = tx.connection.execute(select(workspaces).where(workspaces.c.id == "ws-early")).one()
        register.broker.registry.activate(tx, OPERATOR, row)
    assert register.kept.show(early)["state"] == "active"


@pytest.mark.control("LIF-01")
def test_a_workspace_that_starts_again_does_not_bring_a_retired_agent_back(register: Register) -> None:
    agent = register.agent(register.workspace("ws-back"))["id"]
    register.kept.retire(OPERATOR, agent, ENDS)
    for to in ("stopped", "attesting"):
        register.broker.registry.transition(OPERATOR, "ws-back", Step(to, "drill"))
    with register.broker.services.store.write() as tx:
        row = tx.connection.execute(select(workspaces).where(workspaces.c.id == "ws-back")).one()
        register.broker.registry.activate(tx, OPERATOR, row)
    assert register.kept.show(agent)["state"] == "retired"
    assert register.told("ws-back")[0].agent_retired


# --- Succession -------------------------------------------------------------------------------------------------------


@pytest.mark.control("DEL-01")
def test_a_successor_takes_the_workspace_and_inherits_nothing(register: Register) -> None:
    old = register.agent(register.workspace("ws-next"), name="first", owner="team A", model="m-1")
    handed = register.hand("ws-next")
    new = register.kept.succeed(OPERATOR, old["id"], SucceedAgent(reason="newer model", model="m-2"))
    assert (new["workspace"], new["state"], new["predecessor"]) == ("ws-next", "active", old["id"])
    assert (new["owner"], new["claims"]["model"], new["name"]) == ("", "m-2", new["id"])
    assert (new["revoked"], new["reissued"]) == ([handed], [])
    before = register.kept.show(old["id"])
    assert (before["state"], before["successor"], before["retired_reason"]) == ("retired", new["id"], "newer model")
    entry, held = register.told("ws-next")
    assert (entry.agent, entry.agent_retired, held) == (new["id"], False, Engagement(required=True))
    assert refused(register.kept.succeed, OPERATOR, old["id"], SucceedAgent(reason="again")) == "agent_succeeded"


@pytest.mark.control("DEL-01")
@pytest.mark.control("DEL-02")
def test_what_is_named_is_issued_anew_until_the_same_end_and_in_the_same_line(register: Register) -> None:
    old = register.agent(register.workspace("ws-anew"))
    whole = register.hand("ws-anew")
    part, left = register.hand("ws-anew", whole, 600), register.hand("ws-anew")
    ends = {one: register.broker.delegations.show(one)["expires"] for one in (whole, part)}
    new = register.kept.succeed(OPERATOR, old["id"], SucceedAgent(reason="r", reissue=(part, whole)))
    shown = [register.broker.delegations.show(one) for one in new["reissued"]]
    assert [(one["agent"], one["expires"], one["task"]) for one in shown] == [
        (new["id"], ends[whole], "notes"),
        (new["id"], ends[part], "notes"),
    ]
    assert [one["parent"] for one in shown] == ["", shown[0]["id"]]
    assert set(new["revoked"]) == {whole, part, left}
    assert {line.record.id for line in register.told("ws-anew")[1].lines} == set(new["reissued"])


@pytest.mark.control("DEL-02")
def test_a_succession_with_something_that_does_not_count_changes_nothing(register: Register) -> None:
    old = register.agent(register.workspace("ws-whole"))
    whole = register.hand("ws-whole")
    part = register.hand("ws-whole", whole, 600)
    # Without the one that it was made from, a part would hang on something that has ended.
    lone = SucceedAgent(reason="r", reissue=(part,))
    assert refused(register.kept.succeed, OPERATOR, old["id"], lone) == "delegation_ended"
    unknown = SucceedAgent(reason="r", reissue=("dlg-none",))
    assert refused(register.kept.succeed, OPERATOR, old["id"], unknown) == "delegation_ended"
    assert register.kept.show(old["id"])["state"] == "active"
    assert [register.state(one) for one in (whole, part)] == ["active", "active"]
    assert register.kept.succeed(OPERATOR, old["id"], SucceedAgent(reason="r", reissue=(whole, part)))["changed"]


@pytest.mark.control("LIF-02")
def test_nothing_is_issued_anew_while_a_workspace_is_cut_off(register: Register) -> None:
    old = register.agent(register.workspace("ws-cut"))
    handed = register.hand("ws-cut")
    register.broker.registry.kill(OPERATOR, "ws-cut", "drill")
    wanted = SucceedAgent(reason="r", reissue=(handed,))
    assert refused(register.kept.succeed, OPERATOR, old["id"], wanted) == "workspace_ended"
    assert register.kept.show(old["id"])["state"] == "suspended"
    bare = register.kept.succeed(OPERATOR, old["id"], SucceedAgent(reason="r"))
    assert (bare["state"], register.state(handed)) == ("registered", "revoked")


# --- Looking ----------------------------------------------------------------------------------------------------------


def found(register: Register, **query: Any) -> Any:
    with register.broker.services.store.read() as connection:
        return agent_list.page(connection, agent_list.wanted(QueryParams([*query.items()])))


def test_agents_are_found_by_what_is_said_of_them_page_by_page(register: Register) -> None:
    register.workspace("ws-look")
    ids = [register.agent(purpose=f"look for seven {number}")["id"] for number in range(3)]
    bound = register.agent("ws-look", name="looked-for", purpose="Look for seven too")["id"]
    assert [one["id"] for one in found(register, workspace="ws-look")["agents"]] == [bound]
    assert [one["id"] for one in found(register, name="looked-for")["agents"]] == [bound]
    seen: list[str] = []
    after: str | None = ""
    while after is not None:
        page = found(register, text="LOOK for seven", limit="3", after=after)
        seen += [one["id"] for one in page["agents"]]
        after = page["next"]
    assert sorted(seen) == sorted([*ids, bound])
    assert {one["state"] for one in found(register, state="retired")["agents"]} <= {"retired"}
    assert found(register, sponsor="nobody")["agents"] == []
    for wrong in ({"state": "asleep"}, {"colour": "red"}, {"limit": "0"}):
        with pytest.raises(MalformedError):
            found(register, **wrong)
    with pytest.raises(NotFoundError):
        register.kept.show("agent-none")


def test_the_feed_tells_each_agent_that_changed_once_as_it_is_now(register: Register) -> None:
    since = found(register)["seq"]
    one, two = register.agent(), register.agent()
    register.kept.change(OPERATOR, one["id"], ChangeAgent(version=1, purpose="later"))
    with register.broker.services.store.read() as connection:
        told = agent_list.changes(connection, since)
        assert [(item["id"], item["version"]) for item in told["agents"]] == [(two["id"], 1), (one["id"], 2)]
        assert agent_list.changes(connection, told["next"]) == {"agents": [], "next": told["next"]}


# --- What always holds ------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(st.sampled_from(["register", "retire", "succeed", "hand"]), st.integers(0, 1), st.booleans()),
    max_size=6,
)


@settings(max_examples=12, deadline=None)
@given(steps=STEPS)
def test_whatever_is_done_a_workspace_has_one_agent_and_a_retired_one_holds_nothing(
    register: Register, steps: Any
) -> None:
    places = [register.workspace(f"ws-any-{os.urandom(4).hex()}") for _ in range(2)]
    used = {one["id"] for one in found(register)["agents"]}
    for what, number, again in steps:
        place = places[number]
        here = [one for one in found(register, workspace=place)["agents"] if one["successor"] is None]
        try:
            if what == "register":
                register.agent(place)
            elif here and what == "hand":
                register.hand(place)
            elif here and what == "retire":
                register.kept.retire(OPERATOR, here[-1]["id"], ENDS)
            elif here:
                with register.broker.services.store.read() as connection:
                    row = connection.execute(select(agents).where(agents.c.id == here[-1]["id"])).one()
                    held = [one.id for one in held_by(connection, row, iso(register.world.now))]
                wanted = SucceedAgent(reason="r", reissue=tuple(held) if again else ())
                register.kept.succeed(OPERATOR, here[-1]["id"], wanted)
        except BrokerError as error:
            assert error.code in {"workspace_has_agent", "agent_retired"}
    with register.broker.services.store.read() as connection:
        rows = connection.execute(select(agents).where(agents.c.workspace_id.in_(places))).all()
        assert not used & {row.id for row in rows}
        for place in places:
            assert len([row for row in rows if row.workspace_id == place and row.state != "retired"]) <= 1
        for row in rows:
            assert row.state != "retired" or held_by(connection, row, iso(register.world.now)) == []


def test_the_trail_of_all_that_is_whole(register: Register) -> None:
    with register.broker.services.store.read() as connection:
        query = select(audit_events).where(audit_events.c.source == SOURCE).order_by(audit_events.c.seq)
        assert verify_chain(list(chained_rows(connection.execute(query)))).complete


# --- Databases from before --------------------------------------------------------------------------------------------


def test_a_database_from_before_keeps_its_agents_and_gives_them_names(tmp_path: Path) -> None:
    path = tmp_path / "broker.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection, connection.begin():
        fill_before(connection)
    engine.dispose()
    store = Store.open_sqlite(path, Waker())
    with store.read() as connection:
        assert found_after(connection) == AFTER
    store.close()
