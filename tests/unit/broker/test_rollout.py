"""A release on its way through a ring: offers, last words, limits, halt, rollback in escrow, resume, and crashes."""

from __future__ import annotations

import contextlib
import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from databases import installed, nobody_writes
from examples import examples
from saw.attest.verifier import RELEASED_PCRS
from saw.audit import Chain, EventFactory, Head, Subject
from saw.broker.config import BrokerConfig, RolloutSettings
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import BrokerError, StorageFull
from saw.broker.perimeter import Report, Shipment
from saw.broker.releases import Publication as Body
from saw.broker.rollout_calls import MAX_INSIDE
from saw.broker.rollout_control import Deposit, Order
from saw.broker.rollout_limits import Calls, Counts, crossed
from saw.broker.schema import images, workspaces
from saw.errors import SawError
from saw.policy.bundle import build_manifest, policy_digest, sign
from saw.policy.keys import load_public_key
from saw.policy.loader import load_members
from saw.policy.tuf_changes import roll_back
from saw.policy.tuf_draft import contribute
from saw.policy.tuf_reach import bundle_diff
from saw.policy.tuf_repository import (
    Publication,
    adopt_publication,
    init_repository,
    stage_publication,
)
from saw.policy.tuf_rings import held_revision
from saw.policy.tuf_statements import state_reach

OPERATOR = Caller("operator:ada", "operator-socket", "r-1")
RING = "stable"
START = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
POLICY = """version: 1
network_policies:
  git:
    endpoints: [{host: git.example.com, port: 443, protocol: rest, access: read-only}]
    binaries: [{path: "/usr/bin/gitN"}]
"""
RECORD = msgspec.json.encode(
    {
        "format": "saw-image-release/2",
        "name": "i",
        "image_sha256": "1" * 64,
        "inputs_digest": "inputs",
        "created": "2026-11-01T00:00:00Z",
        "not_after": "2027-11-01T00:00:00Z",
        "boot": {"pcrs": {str(pcr): f"{pcr:064x}" for pcr in RELEASED_PCRS}},
    }
).decode()
GOVERNANCE = "schema: 1\nblueprint: {name: coding, version: 1.0.0, owner: team}\n"


class World:
    """A broker without network, its officers, and workspaces whose attestation is written straight into the register."""

    def __init__(self, directory: Path, **limits: object) -> None:
        self.directory = directory
        self.now = START
        self.config = BrokerConfig(
            "saw.example",
            str(directory / "state"),
            str(directory / "o.sock"),
            ("b.saw.internal",),
            rollout=RolloutSettings(**limits),
        )
        self.config = installed(self.config, self.now)
        self.keys = [Ed25519PrivateKey.generate() for _ in range(3)]
        self.officers = directory / "officers"
        online = load_public_key(self.config.keys / "tuf-online.pub")
        self.root = init_repository(self.officers, self.keys, online, 2, now=self.now)
        self.open()
        with self.broker.services.store.write() as tx:
            tx.connection.execute(
                images.insert().values(
                    name="i", image_sha256="1" * 64, record=RECORD, envelope="{}", state="stable", registered_at="2026"
                )
            )
        self.digests: dict[int, str] = {}
        self.chain = Chain("edge", Head())

    def open(self) -> None:
        self.broker = Broker.open(self.config, lambda: self.now, os.urandom)

    def restart(self) -> None:
        self.broker.close()
        self.open()

    def publication(
        self, revision: int, content: int | None = None, *, ring: str = RING, blind: bool = False
    ) -> Publication:
        """A publication whose change of reach is stated, unless ``blind``."""
        members = {
            "policy.yaml": POLICY.replace("gitN", f"git{content or revision}").encode(),
            "governance.yaml": GOVERNANCE.encode(),
        }
        manifest = build_manifest(load_members(members), revision, self.now, self.now + timedelta(days=30))
        self.digests[revision] = policy_digest(manifest)
        raw = sign(manifest, members, self.keys[:2])
        path = f"rings/{ring}/coding.bundle.json"
        reach = None if blind else state_reach(self.officers, path, raw, bundle_diff())[1]
        return stage_publication(self.officers, path, raw, self.keys[:2], self.now, reach=reach)

    def publish(self, revision: int, content: int | None = None) -> str:
        made = self.publication(revision, content)
        self.broker.releases.publish(OPERATOR, as_body(made))
        adopt_publication(self.officers, made)
        return self.digests[revision]

    def rollback(self, to: int) -> Publication:
        old = held_revision(self.officers, RING, "coding", to)
        draft = roll_back(self.officers, RING, "coding", old, now=self.now, validity=timedelta(days=30))
        return contribute(draft, self.keys[:2]).publication

    def deposit(self, to: int) -> bool:
        made = self.rollback(to)
        return self.broker.rollouts.deposit(OPERATOR, RING, msgspec.convert(msgspec.to_builtins(made), Deposit))

    def workspace(self, name: str, digest: str | None = None, state: str = "active") -> None:
        from saw.broker.registry import CreateWorkspace

        self.broker.registry.create(OPERATOR, CreateWorkspace(name, "ada@example.com", "coding", RING, "i"))
        self.attest(name, digest, state)

    def attest(self, name: str, digest: str | None, state: str = "active") -> None:
        with self.broker.services.store.write() as tx:
            where = workspaces.c.id == name
            tx.connection.execute(workspaces.update().where(where).values(policy_digest=digest, state=state))

    def say(self, name: str, state: str, digest: str, reason: str = "", *, verified: bool = True) -> None:
        caller = Caller(f"workspace:{name}" if verified else "anonymous:", "10.0.0.1", "r-2")
        report = Report(name, "policy_state", state, 0, reason, digest)
        self.broker.views.report(caller, report, verified=verified)

    def load(self, name: str, digest: str) -> None:
        self.say(name, "offered", digest)
        self.say(name, "verified", digest)
        self.attest(name, digest)
        self.say(name, "loaded", digest)

    def given(self, name: str) -> str | None:
        answer = self.broker.views.watch(name)["policy_digest"]
        stated = {w["id"]: w["released_digest"] for w in self.broker.views.perimeter_state()["workspaces"]}
        assert stated[name] == answer, "perimeters and workspaces are told the same"
        return answer

    def view(self, revision: int | None = None):
        found = self.broker.rollout_views.ring(RING)["rollouts"]
        return next(one for one in found if revision in {None, one.revision})

    def findings(self) -> list[str]:
        events = self.broker.trail.page("broker", 0, 1000)["events"]
        return [e.event["finding_info"]["types"][0] for e in events if e.event["class_uid"] == 2004]

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.broker.rollouts.tick()

    def calls(
        self, workspace: str, digest: str, allowed: int, denied: int, reason: str = "host_not_allowed"
    ) -> Shipment:
        factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "u")
        events = []
        for number in range(allowed + denied):
            good = number < allowed
            event = factory.http_activity(
                self.now,
                Subject(workspace=workspace, policy_digest=digest),
                method="GET",
                scheme="https",
                host="h",
                port=443,
                path="/",
                allowed=good,
                reason="" if good else reason,
            )
            events.append(self.chain.append(event))
        return Shipment("edge", tuple(events))

    def ship(self, shipment: Shipment) -> None:
        self.broker.views.accept_events(Caller("perimeter:edge", "10.0.0.2", "r-3"), shipment)


def as_body(made: Publication) -> Body:
    return msgspec.json.decode(msgspec.json.encode({"metadata": made.metadata, "targets": made.targets}), type=Body)


@pytest.fixture
def make(tmp_path):
    """Make worlds that are closed at the end."""
    made: list[World] = []

    def build(**limits: object) -> World:
        made.append(World(tmp_path / str(len(made)), **limits))
        return made[-1]

    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    yield build
    for world in made:
        world.broker.close()


@pytest.fixture
def ring(make):
    """Revision 1 complete on three workspaces, revision 2 just published."""

    def build(**limits: object) -> World:
        world = make(**limits)
        first = world.publish(1)
        for name in ("a", "b", "c"):
            world.workspace(name, first)
            world.load(name, first)
        world.pass_time(world.config.rollout.soak_s + 1)
        assert world.view(1).state == "complete"
        world.publish(2)
        return world

    return build


@pytest.mark.control("POL-02")
def test_a_release_is_complete_when_everyone_loaded_it_for_the_soak_time(ring):
    world = ring()
    new = world.digests[2]
    assert [world.given(name) for name in "abc"] == [new] * 3
    for name in "abc":
        assert not world.view().all_loaded
        world.load(name, new)
    assert world.view().all_loaded
    assert (world.view().counts.loaded, world.view().state) == (3, "running")
    world.pass_time(601)
    assert world.view().state == "complete"
    assert world.findings() == []


@pytest.mark.control("POL-02")
def test_loaded_counts_only_under_the_workspaces_identity_and_with_the_attested_digest(ring):
    world = ring()
    new = world.digests[2]
    world.attest("a", new)
    world.say("a", "loaded", new, verified=False)
    assert world.view().counts.loaded == 0
    world.say("b", "loaded", new)
    assert (world.view().counts.loaded, world.findings()) == (0, ["loaded_not_attested"])
    world.say("a", "loaded", new)
    assert world.view().counts.loaded == 1


@pytest.mark.control("POL-02")
def test_a_refusal_that_anybody_could_have_sent_halts_nothing(ring):
    world = ring()
    world.say("a", "refused", world.digests[2], "validate_failed", verified=False)
    assert world.view().state == "running"
    assert world.broker.rollout_views.workspace("a")["history"][0]["verified"] is False
    world.say("a", "refused", world.digests[2], "validate_failed")
    assert world.view().state == "halted"


@pytest.mark.control("POL-02")
def test_a_refusal_halts_and_only_who_loaded_the_release_goes_on_with_it(ring):
    world = ring()
    old, new = world.digests[1], world.digests[2]
    world.load("a", new)
    world.say("b", "refused", new, "validate_failed")
    view = world.view()
    assert (view.state, view.state_by) == ("halted", "service:saw-broker")
    assert "max_refused: 1" in view.reason
    assert [world.given(name) for name in "abc"] == [new, old, old]
    assert "rollout_halted" in world.findings()
    assert view.prepare_rollback.startswith(f"saw policy rollback --repository OFFICERS_COPY --ring {RING}")
    assert "--to 1" in view.prepare_rollback
    # One that was attested with it and did not say so yet is past the point of return.
    world.attest("c", new)
    assert world.given("c") == new
    world.workspace("d")
    assert world.given("d") == old
    assert world.broker.rollout_views.bundle("d")["policy_digest"] == old


def test_as_many_refusals_as_allowed_halt_nothing(ring):
    world = ring(max_refused=1)
    world.say("a", "refused", world.digests[2], "validate_failed")
    assert world.view().state == "running"
    world.say("b", "refused", world.digests[2], "validate_failed")
    assert world.view().state == "halted"


@pytest.mark.control("POL-02")
def test_a_workspace_that_says_nothing_is_a_finding_and_halts(ring):
    world = ring(max_silent_s=60)
    world.load("a", world.digests[2])
    world.load("b", world.digests[2])
    world.pass_time(60)
    assert world.view().state == "running"
    world.pass_time(2)
    assert world.findings() == ["policy_silent", "rollout_halted"]
    assert [m.workspace for m in world.view().members if m.silent] == ["c"]


def test_a_workspace_that_is_stopped_is_not_silent(ring):
    world = ring(max_silent_s=60)
    world.attest("c", world.digests[1], "stopped")
    for name in "ab":
        world.load(name, world.digests[2])
    world.pass_time(1000)
    assert world.view().state == "complete"


@pytest.mark.control("POL-02")
def test_a_deny_rate_above_the_one_before_halts_and_each_event_counts_once(ring):
    world = ring(min_calls=10, max_deny_rate_increase=0.2)
    old, new = world.digests[1], world.digests[2]
    world.ship(world.calls("a", old, 9, 1))
    world.load("a", new)
    again = world.calls("a", new, 7, 2)
    world.ship(again)
    world.ship(again)
    assert (world.view().calls.allowed, world.view().calls.denied, world.view().state) == (7, 2, "running")
    # What has nothing to do with the policy does not count.
    world.ship(world.calls("a", new, 0, 5, "lease_expired"))
    assert world.view().calls.denied == 2
    world.ship(world.calls("a", new, 0, 1))
    assert world.view().state == "running"  # 30 % of 10 calls, not above 10 % + 20 %
    world.ship(world.calls("a", new, 0, 2))
    assert world.view().state == "halted"
    assert "max_deny_rate_increase" in world.view().reason


def tell(world: World, name: str, digest: str, denied: dict[str, int], *, verified: bool = True) -> bool:
    """Say as a workspace how many calls its ring 1 denied; return whether they were counted."""
    caller = Caller(f"workspace:{name}" if verified else "anonymous:", "10.0.0.1", "r-4")
    body = {"workspace_id": name, "kind": "calls", "policy_digest": digest, "calls": {"allowed": 5, "denied": denied}}
    return world.broker.views.report(caller, msgspec.convert(body, Report), verified=verified)["recorded"]


@pytest.mark.control("POL-02")
def test_calls_that_ring_1_denied_count_up_to_a_bound_and_halt(ring):
    world = ring(min_calls=10, max_deny_rate_increase=0.2)
    old, new = world.digests[1], world.digests[2]
    world.ship(world.calls("a", old, 10, 0))
    world.load("a", new)
    world.ship(world.calls("a", new, 10, 0))
    # Not proven, not of the policy in force there, or not about the policy: nothing is counted.
    assert not tell(world, "a", new, {"host_not_allowed": 50}, verified=False)
    assert not tell(world, "b", new, {"host_not_allowed": 50})
    assert not tell(world, "a", old, {"host_not_allowed": 50})
    assert not tell(world, "a", new, {"lease_expired": 50, "not_released": 50})
    assert (world.view().calls.denied, world.view().state) == (0, "running")
    assert tell(world, "a", new, {"host_not_allowed": 1, "tool_not_allowed": 1})
    assert (world.view().calls.denied, world.view().state) == (2, "running")
    assert tell(world, "a", new, {"method_or_path_not_allowed": 10**6})
    assert (world.view().calls.denied, world.view().state) == (MAX_INSIDE, "halted")
    assert not tell(world, "a", new, {"host_not_allowed": 1})
    # It halts the ring of that workspace and gives nobody anything that was not released.
    assert world.given("b") == old


@pytest.mark.parametrize(
    "denied",
    [{"x" * 41: 1}, {"A reason": 1}, {"host_not_allowed": -1}, {"a": 10**7}, {f"r_{'a' * n}": 1 for n in range(33)}],
)
def test_counts_that_are_none_are_refused(ring, denied):
    with pytest.raises(msgspec.ValidationError):
        tell(ring(), "a", "0" * 64, denied)


@pytest.mark.control("LIF-03")
def test_a_halt_publishes_the_rollback_in_escrow_and_everyone_returns(ring):
    world = ring()
    new = world.digests[2]
    assert world.deposit(1)
    world.load("a", new)
    world.say("b", "refused", new, "validate_failed")
    view = world.view()
    assert (view.revision, view.returns_to, view.state) == (3, 1, "running")
    assert world.view(2).rollback.state == "published"
    assert {world.given(name) for name in "abc"} == {view.policy_digest} - {new}
    # Going back is never halted itself: there is nothing behind it.
    world.say("c", "refused", view.policy_digest, "validate_failed")
    assert (world.view().state, world.findings()[-1]) == ("running", "rollout_limit")


@pytest.mark.control("LIF-03")
def test_a_rollback_is_taken_only_when_it_would_be_accepted_and_really_goes_back(ring):
    world = ring()
    good = world.rollback(1)

    def refused(made: Publication) -> str:
        with pytest.raises(SawError) as caught:
            world.broker.rollouts.deposit(OPERATOR, RING, msgspec.convert(msgspec.to_builtins(made), Deposit))
        return caught.value.code

    old = held_revision(world.officers, RING, "coding", 1)
    alone = roll_back(world.officers, RING, "coding", old, now=world.now, validity=timedelta(days=1))
    assert refused(contribute(alone, world.keys[:1]).publication) == "threshold"
    assert refused(world.publication(3)) == "not_a_rollback"
    assert refused(world.publication(3, content=2)) == "not_a_rollback"
    stale = Publication({**good.metadata}, dict(good.targets))
    assert world.broker.rollouts.deposit(OPERATOR, RING, msgspec.convert(msgspec.to_builtins(good), Deposit))
    assert not world.broker.rollouts.deposit(OPERATOR, RING, msgspec.convert(msgspec.to_builtins(good), Deposit))
    world.publish(3)
    assert refused(stale) == "stale_base"


@pytest.mark.control("POL-01")
@pytest.mark.control("LIF-03")
def test_a_rollback_that_allows_again_what_nobody_signed_is_not_kept(ring):
    """Otherwise it would lie there and be refused at the moment when it is needed."""
    world = ring()
    blind = world.publication(3, content=1, blind=True)
    with pytest.raises(SawError) as caught:
        world.broker.rollouts.deposit(OPERATOR, RING, msgspec.convert(msgspec.to_builtins(blind), Deposit))
    assert caught.value.code == "unsigned_widening"
    assert world.view().rollback is None
    stated = world.publication(3, content=1)
    assert world.broker.rollouts.deposit(OPERATOR, RING, msgspec.convert(msgspec.to_builtins(stated), Deposit))
    world.pass_time(1)
    world.restart()
    world.pass_time(1)
    assert world.view().rollback.state == "kept", "also when it is compared again"
    world.say("b", "refused", world.digests[2], "validate_failed")
    assert (world.view().revision, world.view(2).rollback.state) == (3, "published")


@pytest.mark.control("POL-01")
def test_a_release_whose_change_of_reach_nobody_signed_is_refused_and_audited(ring):
    world = ring()
    with pytest.raises(SawError) as caught:
        world.broker.releases.publish(OPERATOR, as_body(world.publication(3, blind=True)))
    assert caught.value.code == "unsigned_widening"
    assert world.view().revision == 2
    assert world.broker.trail.page("broker", 0, 1000)["events"][-1].event["status_detail"] == "unsigned_widening"
    first = world.publication(3, ring="canary", blind=True)
    with pytest.raises(SawError) as caught:
        world.broker.releases.publish(OPERATOR, as_body(first))
    assert caught.value.code == "unsigned_widening", "the first of a ring as well"
    world.publish(3)
    assert world.view().revision == 3


def test_reach_is_compared_outside_the_locks_of_register_and_repository(ring):
    """A comparison may take seconds; attestation, the timestamp and halts must not wait for it."""
    import fcntl

    compared: list[str] = []

    def diff(old, new):
        assert nobody_writes(world.config)
        descriptor = os.open(world.config.tuf_dir, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        compared.append(new.governance.blueprint.name)
        return bundle_diff()(old, new)

    world = ring()
    world.broker.repository._compared._diff = diff
    world.publish(3)
    world.deposit(2)
    assert len(compared) == 2
    world.pass_time(1)
    assert len(compared) == 2, "what is in escrow is not compared again each minute"
    world.say("b", "refused", world.digests[3], "validate_failed")
    assert world.view().revision == 4
    assert len(compared) == 2


@pytest.mark.control("LIF-03")
def test_a_rollback_that_another_publication_made_useless_is_told_before_it_is_needed(ring):
    world = ring()
    world.deposit(1)
    world.broker.releases.publish(OPERATOR, as_body(world.publication(3, ring="canary")))
    world.pass_time(1)
    assert (world.view(2).rollback.state, world.findings()) == ("stale", ["rollback_stale"])


def killed(world: World, moment: str) -> None:
    """Have another process take in a refusal and be killed with SIGKILL at ``moment``."""
    world.broker.close()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            world.open()
            whom = {
                "halting": (world.broker.rollouts._audit, "finding"),
                "halted": (world.broker.repository, "accept"),
                "published": (world.broker.releases, "synchronise"),
            }
            part, name = whom[moment]
            object.__setattr__(part, name, lambda *_a, **_n: os.kill(os.getpid(), signal.SIGKILL))
            world.say("b", "refused", world.digests[2], "validate_failed")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.control("LIF-03")
@pytest.mark.parametrize("moment", ["halted", "published"])
def test_a_broker_killed_during_the_rollback_finishes_it_at_its_next_start(ring, moment):
    world = ring()
    world.deposit(1)
    killed(world, moment)
    world.open()
    assert (world.view().revision, world.view().returns_to) == (3, 1)
    assert (world.view(2).state, world.view(2).rollback.state) == ("halted", "published")
    assert world.findings() == ["rollout_halted"]
    assert world.broker.trail.verify()["complete"]
    world.restart()
    assert world.view().revision == 3


def test_a_broker_killed_while_it_halts_has_halted_or_not_and_its_trail_says_which(ring):
    world = ring()
    killed(world, "halting")
    world.open()
    assert (world.view().state, world.findings()) == ("running", [])
    assert world.broker.trail.verify()["complete"]
    world.say("b", "refused", world.digests[2], "validate_failed")
    assert (world.view().state, world.findings()) == ("halted", ["rollout_halted"])


def test_a_manual_halt_holds_back_and_resume_offers_again(ring):
    world = ring()
    old, new = world.digests[1], world.digests[2]
    world.deposit(1)
    assert world.broker.rollouts.halt(OPERATOR, RING, Order("look first")) == 2
    assert world.broker.rollouts.halt(OPERATOR, RING, Order("look first")) == 2
    assert [world.given(name) for name in "abc"] == [old] * 3
    world.restart()
    assert (world.view().state, world.view().reason, world.view().state_by) == ("halted", "look first", "operator:ada")
    world.broker.rollouts.resume(OPERATOR, RING, Order("it was the network"))
    assert [world.given(name) for name in "abc"] == [new] * 3
    with pytest.raises(BrokerError, match="nothing rolls out"):
        world.broker.rollouts.halt(OPERATOR, "other", Order("x"))
    world.broker.rollouts.halt(OPERATOR, RING, Order("back", roll_back=True))
    assert world.view().returns_to == 1


def test_resume_forgives_what_was_and_counts_anew(ring):
    world = ring()
    world.say("a", "refused", world.digests[2], "validate_failed")
    world.broker.rollouts.resume(OPERATOR, RING, Order("envoy was replaced"))
    assert (world.view().state, world.view().counts.refused, world.view().counts.waiting) == ("running", 0, 3)
    for name in "abc":
        world.load(name, world.digests[2])
    assert world.view().all_loaded
    world.pass_time(601)
    with pytest.raises(BrokerError, match="not halted"):
        world.broker.rollouts.resume(OPERATOR, RING, Order("again"))


def test_waves_go_on_when_the_one_before_has_loaded(ring):
    world = ring(first_wave=1)
    old, new = world.digests[1], world.digests[2]
    assert [world.given(name) for name in "abc"] == [new, old, old]
    world.load("a", new)
    assert [world.given(name) for name in "abc"] == [new, new, old]
    world.load("b", new)
    assert [world.given(name) for name in "abc"] == [new] * 3
    world.load("c", new)
    assert world.view().all_loaded


@pytest.mark.control("LIF-03")
def test_content_that_was_halted_is_no_earlier_content_when_it_comes_again(ring):
    world = ring(first_wave=1)
    world.say("a", "refused", world.digests[2], "validate_failed")
    assert world.view().state == "halted"
    world.publish(3, content=1)
    assert [world.given(name) for name in "abc"] == [world.digests[3]] * 3
    world.publish(4, content=2)
    assert (world.view().revision, world.view().returns_to) == (4, None)
    assert [world.given(name) for name in "abc"] == [world.digests[4], world.digests[3], world.digests[3]]
    world.publish(5, content=1)
    assert world.view().returns_to == 3, "what was not halted is"
    assert [world.given(name) for name in "abc"] == [world.digests[5]] * 3


def test_a_wave_that_refuses_spares_the_rest(ring):
    world = ring(first_wave=1)
    world.say("a", "refused", world.digests[2], "validate_failed")
    assert [m.workspace for m in world.view().members] == ["a"]
    assert [world.given(name) for name in "abc"] == [world.digests[1]] * 3


@pytest.mark.control("LIF-03")
def test_where_a_rollback_is_required_nobody_is_offered_anything_before(ring):
    world = ring(require_rollback=True)
    old, new = world.digests[1], world.digests[2]
    assert [world.given(name) for name in "abc"] == [old] * 3
    world.deposit(1)
    assert [world.given(name) for name in "abc"] == [new] * 3


def test_a_renewal_needs_no_rollback_and_what_stands_is_told(make):
    world = make(require_rollback=True)
    first = world.publish(1)
    world.workspace("a", first)
    world.load("a", first)
    renewed = world.publish(2, content=1)
    assert world.given("a") == renewed
    world.publish(3)
    assert world.given("a") == renewed, "a change waits"
    told = world.broker.rollout_views.ring("stable")
    assert told["limits"].require_rollback
    assert [(one.blueprint, one.revision) for one in told["standing"]] == [("coding", 3)]
    world.broker.rollouts.halt(OPERATOR, RING, Order("no"))
    [standing] = world.broker.rollout_views.ring("stable")["standing"]
    assert (standing.revision, standing.policy_digest) == (2, renewed)
    world.publish(4, content=3)
    assert world.given("a") == renewed, "the content that was halted is no renewal of what stands"


def test_the_first_release_of_a_ring_is_never_halted_by_itself(make):
    world = make()
    first = world.publish(1)
    world.workspace("a")
    world.say("a", "refused", first, "validate_failed")
    assert (world.view().state, world.findings(), world.given("a")) == ("running", ["rollout_limit"], first)


@pytest.mark.control("POL-02")
def test_the_history_keeps_every_word_and_the_trail_too(ring):
    world = ring()
    world.load("a", world.digests[2])
    world.say("a", "loaded", world.digests[2])
    status = world.broker.rollout_views.workspace("a")
    words = [(entry["revision"], entry["state"]) for entry in reversed(status["history"])]
    assert words == [(revision, state) for revision in (1, 2) for state in ("offered", "verified", "loaded")]
    assert (status["given_revision"], status["attested_digest"]) == (2, world.digests[2])
    events = world.broker.trail.page("broker", 0, 1000)["events"]
    told = [e.event.get("message", "") for e in events if e.event.get("device", {}).get("uid") == "a"]
    assert [text for text in told if text.startswith("policy ")][-4:] == [
        "policy offered",
        "policy verified",
        "policy loaded",
        "policy loaded",
    ]


@given(
    st.builds(Counts, refused=st.integers(0, 5), silent=st.integers(0, 3), loaded=st.integers(0, 5)),
    st.builds(Calls, st.integers(0, 50), st.integers(0, 50)),
    st.builds(Calls, st.integers(0, 50), st.integers(0, 50)),
    st.integers(0, 5),
)
@settings(max_examples=examples(300), deadline=None)
def test_a_limit_is_crossed_exactly_when_it_is_exceeded(counts, calls, before, allowed) -> None:
    limits = RolloutSettings(max_refused=allowed, min_calls=10, max_deny_rate_increase=0.1)
    found = {reason.partition(":")[0] for reason in crossed(limits, counts, calls, before)}
    assert ("max_refused" in found) == (counts.refused > allowed)
    assert ("max_silent_s" in found) == (counts.silent > 0)
    enough = calls.total >= 10 and before.total >= 10
    assert ("max_deny_rate_increase" in found) == (enough and calls.deny_rate - before.deny_rate > 0.1)


def test_a_row_lost_between_repository_and_register_does_not_begin_a_second_rollout(ring):
    world = ring()
    world.say("a", "offered", world.digests[2])
    from saw.broker.schema import releases, rollouts

    with world.broker.services.store.write() as tx:
        tx.connection.execute(releases.delete().where(releases.c.revision == 2))
    world.restart()
    with world.broker.services.store.read() as connection:
        assert len(connection.execute(select(rollouts)).all()) == 2
    assert world.view().counts.offered == 1


def test_a_publication_that_the_database_had_no_room_for_is_recorded_once_there_is(ring, monkeypatch):
    world = ring()
    releases = world.broker.releases
    made = world.publication(3)

    def full(_caller: object = None) -> None:
        raise StorageFull

    with monkeypatch.context() as patch:
        patch.setattr(releases, "synchronise", full)
        for call in (lambda: releases.publish(OPERATOR, as_body(made)), releases.catch_up):
            with pytest.raises(StorageFull):
                call()
    assert world.view().revision == 2
    releases.catch_up()
    assert world.view().revision == 3
    before = world.broker.trail.page("broker", 0, 1000)["events"]
    releases.catch_up()
    assert world.broker.trail.page("broker", 0, 1000)["events"] == before, "and once"
