"""Breaking the glass: two keys, a quarter of an hour, loud, and looked at afterwards; each bad case with its allowed twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from review_world import EDGE, OPERATOR, World, refused
from sqlalchemy import select

from saw.broker.break_glass_settings import BreakGlassSettings, problems_of_break_glass
from saw.broker.clock import iso
from saw.broker.gate_settings import GateSettings
from saw.broker.notification_settings import Webhook
from saw.broker.review_decisions import AskNonce, Cancel
from saw.broker.reviewers import Retire
from saw.broker.reviews import KEEP
from saw.broker.schema import notifications, review_decisions, reviews
from saw.review.gate import AskGate, BoundFile, BoundHost, ClaimGate, GateStatement
from saw.review.receipt import verify_receipt

KEYS = "break-glass"
SETTINGS = BreakGlassSettings(group=KEYS)
WHY = "the payroll run of today fails without it"


class GlassWorld(World):
    """``dora`` and ``emil`` hold the keys; ``ben`` and ``cleo`` are the group that looks at it afterwards."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        super().__init__(directory, **{"break_glass": SETTINGS, **settings})
        for name in ("dora", "emil"):
            self.keys[name] = Ed25519PrivateKey.generate()
            self.reviewer(name, KEYS)

    def breaks(self, identifier: str, by: str, **changes: Any) -> dict[str, Any]:
        given = self.broker.decisions.nonce(identifier, AskNonce(by))
        said = {"not_after": given.get("break_glass_until", iso(self.now)), "comment": WHY, **changes}
        return self.decide(identifier, by, "break_glass", nonce=given["nonce"], **said)

    def after(self, identifier: str, by: str, decision: str = "uphold", **changes: Any) -> dict[str, Any]:
        given = self.broker.decisions.nonce(identifier, AskNonce(by))
        said = {"not_after": given["after_review_until"], "comment": "it was right", **changes}
        return self.decide(identifier, by, decision, nonce=given["nonce"], **said)

    def broken(self, **changes: Any) -> str:
        """Return a review that was let through by both keys."""
        identifier = self.open(**changes).id
        self.breaks(identifier, "dora")
        assert self.breaks(identifier, "emil")["state"] == "approved"
        return identifier

    def alarms(self) -> list[tuple[str, str]]:
        page = self.broker.trail.page("broker", 0, 1000)["events"]
        found = [item.event for item in page if item.event["class_uid"] == 2004]
        return [(one["finding_info"]["types"][0], one["severity"].lower()) for one in found]


@pytest.fixture
def world(tmp_path: Path) -> GlassWorld:
    return GlassWorld(tmp_path)


# --- two keys, a quarter of an hour ------------------------------------------------------------------------------------------


@pytest.mark.control("REV-02")
def test_two_keys_let_a_call_through_once_and_a_review_afterwards_is_owed(world: GlassWorld) -> None:
    identifier = world.open(quorum=2).id
    one = world.breaks(identifier, "dora")
    assert (one["state"], one["break_glass_by"], one["after_state"]) == ("pending", ["dora"], None)
    assert world.claim() is None
    both = world.breaks(identifier, "emil")
    assert (both["state"], both["break_glass_by"], both["approved_by"]) == ("approved", ["dora", "emil"], [])
    assert (both["after_state"], both["after_due_at"]) == ("owed", iso(world.now.replace(day=27)))
    claimed = world.claim()
    assert claimed is not None
    assert claimed.id == identifier
    world.tell(claimed)
    assert world.claim() is None
    assert world.broker.decisions.show(identifier)["state"] == "done"
    assert [one["id"] for one in world.broker.decisions.listed(None, None, owed=True)["reviews"]] == [identifier]


@pytest.mark.control("REV-02")
def test_one_key_is_not_enough_neither_twice_nor_under_another_decision(world: GlassWorld) -> None:
    identifier = world.open().id
    world.breaks(identifier, "dora")
    with refused("already_decided"):
        world.breaks(identifier, "dora")
    with refused("not_in_group"):
        world.decide(identifier, "dora", "approve")
    assert world.claim() is None


@pytest.mark.control("REV-02")
def test_who_holds_no_key_breaks_nothing(world: GlassWorld) -> None:
    identifier = world.open().id
    with refused("not_in_group"):
        world.breaks(identifier, "ben")
    world.reviewer("ada", KEYS, "maintainers")
    with refused("self_approval"):  # the sponsor of the workspace
        world.breaks(identifier, "ada")
    assert world.breaks(identifier, "dora")["break_glass_by"] == ["dora"]


@pytest.mark.control("REV-02")
def test_without_the_setting_no_glass_is_broken_and_a_key_that_signed_counts_no_longer(tmp_path: Path) -> None:
    world = GlassWorld(tmp_path)
    identifier = world.broken()
    world.config = msgspec.structs.replace(world.config, break_glass=None)
    world.crash()
    assert world.claim() is None
    assert world.view(identifier).state == "pending"
    with refused("not_in_group"):
        world.broker.decisions.nonce(identifier, AskNonce("dora"))
    world.reviewer("dora", "maintainers")
    with refused("break_glass_off"):
        world.breaks(identifier, "dora", not_after=iso(world.now.replace(minute=5)))


@pytest.mark.control("REV-02")
def test_a_broken_glass_lasts_a_quarter_of_an_hour(world: GlassWorld) -> None:
    identifier = world.open().id
    with refused("statement_expired"):
        world.breaks(identifier, "dora", not_after=iso(world.now.replace(minute=16)))
    world.breaks(identifier, "dora")
    world.later(minutes=14)
    world.breaks(identifier, "emil")
    assert world.view(identifier).expires_at == iso(world.now.replace(minute=15))
    world.later(minutes=2)
    assert world.claim() is None
    assert world.view(identifier).state == "expired"
    # Unused, it is looked at all the same.
    assert world.broker.decisions.show(identifier)["after_state"] == "owed"


@pytest.mark.control("REV-02")
def test_keys_that_sign_too_far_apart_break_nothing(world: GlassWorld) -> None:
    identifier = world.open().id
    world.breaks(identifier, "dora")
    world.later(minutes=16)
    assert world.breaks(identifier, "emil")["state"] == "pending"
    assert world.breaks(identifier, "dora")["state"] == "approved"


@pytest.mark.control("REV-02")
def test_a_key_that_is_retired_before_the_claim_does_not_count(world: GlassWorld) -> None:
    identifier = world.broken()
    world.broker.reviewers.retire(OPERATOR, "emil", Retire("left"))
    assert world.claim() is None
    assert world.view(identifier).state == "pending"


@pytest.mark.control("REV-02")
def test_the_glass_is_broken_with_a_reason(world: GlassWorld) -> None:
    identifier = world.open().id
    with refused("reason_missing"):
        world.breaks(identifier, "dora", comment=" ")
    assert world.breaks(identifier, "dora")["break_glass_by"] == ["dora"]


def test_what_else_binds_a_call_binds_it_still(world: GlassWorld) -> None:
    denied = world.broken(body=b"one")
    world.decide(denied, "ben", "deny", comment="no")
    assert world.view(denied).state == "denied"
    assert world.claim() is None
    world.after(denied, "cleo")
    moved = world.broken(body=b"two")
    world.set("ws-a", policy_digest="b" * 64)
    assert world.claim() is None
    assert world.view(moved).detail == "policy_changed"
    world.set("ws-a", policy_digest="a" * 64)
    world.after(moved, "cleo")
    lapsed = world.broken(body=b"three")
    world.set("ws-a", lease_expires_at=iso(world.now))
    assert world.claim() is None
    assert world.view(lapsed).state == "approved"


def test_approvals_count_beside_a_single_key(world: GlassWorld) -> None:
    identifier = world.open().id
    world.breaks(identifier, "dora")
    assert world.decide(identifier, "ben")["state"] == "approved"
    assert world.broker.decisions.show(identifier)["broken_at"] is None
    assert world.claim() is not None


# --- loud --------------------------------------------------------------------------------------------------------------------


@pytest.mark.control("AUD-01")
def test_every_step_raises_an_alarm_that_names_who_and_why(world: GlassWorld) -> None:
    identifier = world.broken()
    assert world.alarms() == [("break_glass_key", "high"), ("break_glass", "critical")]
    page = world.broker.trail.page("broker", 0, 1000)["events"]
    said = [item.event["unmapped"]["saw"] for item in page if item.event["class_uid"] == 2004]
    assert said[1]["holders"] == ["dora", "emil"]
    assert (said[1]["reason"], said[1]["review"], said[1]["workspace"]) == (WHY, identifier, "ws-a")
    world.after(identifier, "ben", "reject", comment="nobody asked us")
    world.later(days=2)
    world.broker.reviews.tick()
    assert [kind for kind, _ in world.alarms()][2:] == ["break_glass_rejected"]


@pytest.mark.control("REV-01")
def test_people_are_told_of_each_step_and_a_mail_decides_nothing(tmp_path: Path) -> None:
    hook = Webhook(name="chat", url="https://hook.example.com/saw", secret_file="/nowhere/chat")
    world = GlassWorld(tmp_path, notifications=(hook,))
    identifier = world.broken()
    world.tell(world.claim())
    world.later(hours=25)
    for _ in range(2):
        world.broker.reviews.tick()
    world.after(identifier, "ben", "reject")
    with world.broker.services.store.read() as connection:
        bodies = connection.execute(select(notifications.c.body).where(notifications.c.kind == "after_review_owed"))
        (owed,) = [msgspec.json.decode(body) for body in bodies.scalars()]
    assert owed["data"]["expires_at"] == world.broker.decisions.show(identifier)["after_due_at"]
    told = world.broker.notifications.listed(state="", channel="", after="", limit=100)["notifications"]
    assert sorted(one["kind"] for one in told) == [
        "after_review_overdue", "after_review_owed", "break_glass", "break_glass_key", "break_glass_rejected", "review_opened",
    ]  # fmt: skip


def test_an_overdue_after_review_is_told_once(world: GlassWorld) -> None:
    identifier = world.broken()
    world.tell(world.claim())
    world.later(hours=25)
    for _ in range(2):
        world.broker.reviews.tick()
    assert [kind for kind, _ in world.alarms()].count("after_review_overdue") == 1
    assert world.broker.decisions.show(identifier)["after_state"] == "overdue"


# --- looked at afterwards ----------------------------------------------------------------------------------------------------


@pytest.mark.control("REV-02")
def test_the_group_upholds_it_with_its_quorum_and_without_those_who_broke_the_glass(world: GlassWorld) -> None:
    world.reviewer("dora", KEYS, "maintainers")
    identifier = world.broken(quorum=2)
    world.tell(world.claim())
    with refused("own_break_glass"):
        world.after(identifier, "dora")
    with refused("self_approval"):
        world.after(identifier, "ada")
    with refused("reason_missing"):
        world.after(identifier, "ben", comment="")
    with refused("not_in_group"):
        world.after(identifier, "emil")
    assert world.after(identifier, "ben")["after_state"] == "owed"
    with refused("already_decided"):
        world.after(identifier, "ben")
    done = world.after(identifier, "cleo")
    assert (done["after_state"], done["after_at"]) == ("upheld", iso(world.now))
    with refused("review_not_open"):
        world.after(identifier, "cleo")


@pytest.mark.control("REV-02")
def test_who_upheld_it_and_then_breaks_it_again_does_not_count_afterwards(world: GlassWorld) -> None:
    world.reviewer("ben", KEYS, "maintainers")
    identifier = world.broken(quorum=2)
    assert world.after(identifier, "ben")["after_state"] == "owed"
    world.broker.reviewers.retire(OPERATOR, "emil", Retire("left"))
    assert world.claim() is None
    assert world.breaks(identifier, "ben")["state"] == "approved"
    assert world.after(identifier, "cleo")["after_state"] == "owed"


@pytest.mark.control("REV-02")
def test_one_no_rejects_it_and_where_nothing_was_broken_nothing_is_looked_at(world: GlassWorld) -> None:
    identifier = world.broken(quorum=2)
    assert world.after(identifier, "ben", "reject", comment="it could have waited")["after_state"] == "rejected"
    other = world.open(body=b"other").id
    with refused("no_after_review"):
        world.after(other, "ben")


@pytest.mark.control("REV-02")
def test_nobody_breaks_the_glass_again_before_somebody_has_looked(world: GlassWorld) -> None:
    first = world.broken(body=b"one")
    second = world.open(body=b"two").id
    with refused("after_review_owed"):
        world.breaks(second, "dora")
    elsewhere = world.open(body=b"two", workspace_id="ws-b").id
    assert world.breaks(elsewhere, "dora")["break_glass_by"] == ["dora"]
    world.after(first, "ben")
    assert world.breaks(second, "dora")["break_glass_by"] == ["dora"]


@pytest.mark.control("REV-02")
def test_while_it_is_overdue_nothing_of_the_workspace_is_approved_or_sent(world: GlassWorld) -> None:
    first = world.broken(body=b"one", expires_in_s=7200)
    world.tell(world.claim())
    waiting = world.approved(body=b"two", expires_in_s=200_000)
    other = world.open(body=b"three", expires_in_s=200_000).id
    elsewhere = world.approved(body=b"four", workspace_id="ws-b", expires_in_s=200_000)
    world.later(hours=25)
    with refused("after_review_overdue"):
        world.decide(other, "ben")
    claimed = world.claim()
    assert claimed is not None
    assert claimed.id == elsewhere  # another workspace is not held up
    assert world.claim() is None
    assert world.broker.decisions.show(waiting)["held_up_by"] == first
    world.after(first, "ben")
    found = world.claim()
    assert found is not None
    assert found.id == waiting
    assert world.decide(other, "ben")["state"] == "approved"


def test_the_bytes_stay_until_somebody_has_looked(world: GlassWorld) -> None:
    identifier = world.broken()
    world.tell(world.claim())
    world.now += KEEP
    world.later(minutes=1)
    world.broker.reviews.tick()
    assert world.broker.decisions.show(identifier)["rendering"] is not None
    world.after(identifier, "ben")
    world.broker.reviews.tick()
    assert world.broker.decisions.show(identifier)["rendering"] is None


def test_what_was_said_survives_a_crash(world: GlassWorld) -> None:
    identifier = world.broken()
    world.crash()
    assert world.claim() is not None
    world.crash()
    assert world.broker.decisions.show(identifier)["after_state"] == "owed"
    assert world.after(identifier, "ben")["after_state"] == "upheld"


# --- receipts ----------------------------------------------------------------------------------------------------------------


def receipt(world: GlassWorld, identifier: str) -> Any:
    token = world.broker.decisions.receipt(identifier)["receipt"]
    return verify_receipt(token, (world.config.keys / "x509" / "ca.pem").read_bytes())


@pytest.mark.control("REV-02")
def test_a_receipt_tells_of_the_broken_glass_and_holds(world: GlassWorld) -> None:
    identifier = world.broken()
    world.tell(world.claim())
    before = receipt(world, identifier)
    assert (before.receipt.break_glass.keys, before.receipt.break_glass.after) == (2, "owed")
    world.after(identifier, "ben")
    found = receipt(world, identifier)
    assert found.receipt.break_glass.after == "upheld"
    assert [one.said.decision for one in found.decisions] == ["break_glass", "break_glass", "uphold"]
    plain = world.approved(body=b"another")
    world.tell(world.claim())
    assert receipt(world, plain).receipt.break_glass is msgspec.UNSET


@pytest.mark.control("REV-02")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"broken_at": None}, "0 of 1 approvals"),
        ({"after_state": "upheld"}, "0 of 1 upheld it"),
        ({"after_state": "rejected"}, "nobody rejected it"),
    ],
)
def test_a_receipt_of_a_broker_that_lies_about_it_does_not_hold(world: GlassWorld, change: Any, why: str) -> None:
    identifier = world.broken()
    world.tell(world.claim())
    with world.broker.services.store.write() as tx:
        tx.connection.execute(reviews.update().where(reviews.c.id == identifier).values(**change))
    with pytest.raises(Exception, match=why):
        receipt(world, identifier)


@pytest.mark.control("REV-02")
def test_a_receipt_says_how_many_keys_it_took_when_the_glass_was_broken(world: GlassWorld) -> None:
    identifier = world.broken()
    world.tell(world.claim())
    for now in (msgspec.structs.replace(SETTINGS, keys=3), None):
        world.config = msgspec.structs.replace(world.config, break_glass=now)
        world.crash()
        assert receipt(world, identifier).receipt.break_glass.keys == 2


@pytest.mark.control("REV-02")
def test_a_receipt_without_both_keys_does_not_hold(world: GlassWorld) -> None:
    identifier = world.broken()
    world.tell(world.claim())
    with world.broker.services.store.write() as tx:
        tx.connection.execute(review_decisions.delete().where(review_decisions.c.approver == "emil"))
    with pytest.raises(Exception, match="1 of 2 keys broke the glass"):
        receipt(world, identifier)


def test_a_receipt_of_a_cancelled_review_says_that_its_glass_was_broken(world: GlassWorld) -> None:
    identifier = world.broken()
    world.broker.decisions.cancel(OPERATOR, identifier, Cancel("not needed any more"))
    assert receipt(world, identifier).receipt.break_glass.after == "owed"


# --- changes to the fleet ----------------------------------------------------------------------------------------------------


STATED = GateStatement(
    gate="fleet",
    purpose="patch now",
    requested_by="zoe",
    total=1,
    hosts=(BoundHost(name="ws-1"),),
    files=(BoundFile(path="update.yml", kind="file", sha256="1" * 64),),
)


def statement(**changes: Any) -> GateStatement:
    return msgspec.structs.replace(STATED, **changes)


@pytest.mark.control("REV-01")
def test_a_wave_is_let_through_by_both_keys_and_the_next_glass_of_the_gate_waits(tmp_path: Path) -> None:
    gates = {"fleet": GateSettings(group="maintainers"), "lab": GateSettings(group="maintainers")}
    world = GlassWorld(tmp_path, gates=gates)
    asked = world.broker.gates.ask(OPERATOR, AskGate(statement=statement()))
    world.breaks(asked.id, "dora")
    with refused("not_approved"):
        world.broker.gates.claim(OPERATOR, asked.id, ClaimGate(statement=statement(), claim="C" * 43))
    world.breaks(asked.id, "emil")
    claimed = world.broker.gates.claim(OPERATOR, asked.id, ClaimGate(statement=statement(), claim="C" * 43))
    assert (claimed.state, claimed.approved_by) == ("executing", ("dora", "emil"))
    again = world.broker.gates.ask(OPERATOR, AskGate(statement=statement(purpose="once more")))
    with refused("after_review_owed"):
        world.breaks(again.id, "dora")
    other = world.broker.gates.ask(OPERATOR, AskGate(statement=statement(gate="lab")))
    assert world.breaks(other.id, "dora")["break_glass_by"] == ["dora"]
    call = world.open().id
    assert world.breaks(call, "dora")["break_glass_by"] == ["dora"]
    world.after(asked.id, "ben")
    assert world.breaks(again.id, "dora")["break_glass_by"] == ["dora"]


@pytest.mark.control("REV-01")
def test_an_overdue_after_review_holds_up_the_gate(tmp_path: Path) -> None:
    gates = {"fleet": GateSettings(group="maintainers", expires_in_s=200_000)}
    world = GlassWorld(tmp_path, gates=gates)
    first = world.broker.gates.ask(OPERATOR, AskGate(statement=statement()))
    world.breaks(first.id, "dora")
    world.breaks(first.id, "emil")
    second = world.broker.gates.ask(OPERATOR, AskGate(statement=statement(purpose="once more")))
    world.decide(second.id, "ben")
    world.later(hours=25)
    claim = ClaimGate(statement=statement(purpose="once more"), claim="C" * 43)
    with refused("after_review_overdue"):
        world.broker.gates.claim(OPERATOR, second.id, claim)
    world.after(first.id, "ben")
    assert world.broker.gates.claim(OPERATOR, second.id, claim).state == "executing"


# --- settings ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("group", " "), ("group", "sponsors"), ("keys", 1), ("keys", 9), ("last_s", 59), ("last_s", 901),
        ("review_within_s", 3599), ("review_within_s", 7 * 86_400 + 1),
    ],
)  # fmt: skip
def test_a_setting_that_would_weaken_it_is_refused(field: str, value: Any) -> None:
    assert list(problems_of_break_glass(SETTINGS)) == []
    (problem,) = problems_of_break_glass(msgspec.structs.replace(SETTINGS, **{field: value}))
    assert problem.startswith(f"break_glass.{field} must be ")


def test_a_perimeter_of_another_workspace_claims_nothing_of_it(world: GlassWorld) -> None:
    world.broken()
    assert world.claim(msgspec.structs.replace(EDGE, principal="perimeter:other")) is None
    assert world.claim() is not None
