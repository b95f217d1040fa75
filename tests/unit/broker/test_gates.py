"""Changes to the fleet at the broker: who asks, who decides, one claim, the same to the byte; bad cases with allowed twins."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from review_world import EDGE, OPERATOR, World

from saw.broker.clock import iso
from saw.broker.config import load_config
from saw.broker.context import Caller
from saw.broker.errors import BrokerError
from saw.broker.gate_settings import GateSettings, MachineSettings
from saw.broker.gates import MAX_ASKED
from saw.broker.review_decisions import AskNonce, Cancel
from saw.broker.reviewers import Retire
from saw.broker.reviews import KEEP
from saw.broker.schema import reviews
from saw.errors import ConfigError
from saw.review.gate import (
    AskGate,
    BoundFile,
    BoundHost,
    ClaimGate,
    EndGate,
    GateRequest,
    GateStatement,
    GateView,
    bound_variable,
)
from saw.review.receipt import verify_receipt

AWX = Caller("machine:awx", "10.0.0.7", "request-9")
STRANGER = Caller("machine:other", "10.0.0.8", "request-10")
GATES = {
    "update": GateSettings(group="maintainers", quorum=2, expires_in_s=3600, run_for_s=600),
    "small": GateSettings(group="maintainers"),
}
MACHINES = {
    "awx": MachineSettings(scopes=("gate:update", "gate:small")),
    "other": MachineSettings(scopes=("gate:small",)),
}
STATED = GateStatement(
    gate="small",
    purpose="kernel of November",
    requested_by="Ada",
    total=2,
    hosts=(BoundHost(name="ws-1"), BoundHost(name="ws-2")),
    files=(BoundFile(path="update.yml", kind="file", sha256="1" * 64),),
    variables=(bound_variable("version", 7),),
)
MINE, ANOTHER = "A" * 43, "B" * 43


class Fleet(World):
    """A broker with two gates; ``ada`` asks through AWX, ``ben`` and ``cleo`` decide."""

    def ask(self, caller: Caller = AWX, **changes: Any) -> GateView:
        return self.broker.gates.ask(caller, AskGate(statement=msgspec.structs.replace(STATED, **changes)))

    def agreed(self, **changes: Any) -> str:
        identifier = self.ask(**changes).id
        assert self.decide(identifier, "ben")["state"] == "approved"
        return identifier

    def begin(self, identifier: str, claim: str = MINE, caller: Caller = AWX, **changes: Any) -> GateView:
        body = ClaimGate(statement=msgspec.structs.replace(STATED, **changes), claim=claim)
        return self.broker.gates.claim(caller, identifier, body)

    def end(self, identifier: str, outcome: str = "done", claim: str = MINE) -> GateView:
        return self.broker.gates.result(AWX, identifier, msgspec.convert({"claim": claim, "outcome": outcome}, EndGate))

    def state(self, identifier: str) -> str:
        return self.broker.gates.view(AWX, identifier).state


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path, gates=GATES, machines=MACHINES)


def refusal(code: str, call: Any, *given: Any, **named: Any) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        call(*given, **named)
    assert caught.value.code == code, caught.value
    return caught.value


@pytest.mark.control("REV-01")
@pytest.mark.control("REV-02")
def test_a_wave_waits_for_its_quorum_is_claimed_once_and_tells_its_end(fleet: Fleet) -> None:
    asked = fleet.ask(gate="update")
    assert (asked.state, asked.group, asked.quorum) == ("pending", "maintainers", 2)
    refusal("not_approved", fleet.begin, asked.id, gate="update")
    fleet.decide(asked.id, "ben", comment="looked at the diff")
    assert fleet.state(asked.id) == "pending"
    fleet.decide(asked.id, "cleo")
    view = fleet.broker.gates.view(AWX, asked.id)
    assert (view.state, view.approved_by) == ("approved", ("ben", "cleo"))
    assert view.decisions[0].comment == "looked at the diff"
    begun = fleet.begin(asked.id, gate="update")
    assert begun.state == "executing"
    assert begun.claim_ends_at
    assert fleet.end(asked.id).state == "done"
    assert fleet.end(asked.id).state == "done"  # told again after a lost answer
    refusal("review_ended", fleet.end, asked.id, "failed")


@pytest.mark.control("REV-03")
def test_the_same_claim_is_answered_again_and_another_run_is_refused(fleet: Fleet) -> None:
    identifier = fleet.agreed()
    first = fleet.begin(identifier)
    assert fleet.begin(identifier) == first
    error = refusal("already_claimed", fleet.begin, identifier, ANOTHER)
    assert error.status == 409
    refusal("wrong_claim", fleet.end, identifier, "done", ANOTHER)
    fleet.end(identifier)
    for claim in (MINE, ANOTHER):
        refusal("already_claimed", fleet.begin, identifier, claim)
    assert fleet.ask().id != identifier  # a second run asks anew


@pytest.mark.control("REV-03")
def test_of_many_claims_at_once_exactly_one_is_given(fleet: Fleet) -> None:
    identifier = fleet.agreed()
    barrier, ends = threading.Barrier(8), []

    def run(number: int) -> None:
        barrier.wait()
        try:
            ends.append(fleet.begin(identifier, f"{number}" * 43).state)
        except BrokerError as error:
            ends.append(error.code)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["already_claimed"] * 7 + ["executing"]


@pytest.mark.control("REV-02")
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"files": (BoundFile(path="update.yml", kind="file", sha256="2" * 64),)}, "~ file update.yml"),
        ({"hosts": (BoundHost(name="ws-1"), BoundHost(name="ws-3"))}, "+ host ws-3"),
        ({"variables": (bound_variable("version", 8),)}, "~ variable version = 8 (was = 7)"),
        ({"image": "3" * 64}, "image: - → 333"),
    ],
)
def test_a_claim_of_anything_else_is_refused_with_the_difference(
    fleet: Fleet, changed: dict[str, Any], named: str
) -> None:
    identifier = fleet.agreed()
    error = refusal("statement_changed", fleet.begin, identifier, **changed)
    assert named in error.message
    assert fleet.state(identifier) == "approved"
    assert fleet.begin(identifier).state == "executing"


@pytest.mark.control("REV-02")
def test_who_asks_does_not_approve_and_may_deny(fleet: Fleet) -> None:
    identifier = fleet.ask().id
    refusal("self_approval", fleet.decide, identifier, "ada")
    assert fleet.decide(identifier, "ada", "deny")["state"] == "denied"
    assert fleet.decide(fleet.ask(requested_by="somebody else").id, "ada")["state"] == "approved"


@pytest.mark.control("REV-02")
def test_a_machine_that_is_registered_as_a_reviewer_does_not_approve_its_own_question(fleet: Fleet) -> None:
    fleet.keys["awx"] = Ed25519PrivateKey.generate()
    fleet.reviewer("awx")
    identifier = fleet.ask().id
    refusal("self_approval", fleet.decide, identifier, "awx")
    assert fleet.decide(identifier, "ben")["state"] == "approved"


@pytest.mark.control("REV-02")
def test_one_denial_wins_over_approvals_until_the_claim(fleet: Fleet) -> None:
    identifier = fleet.agreed()
    fleet.decide(identifier, "cleo", "deny", comment="not on a Friday")
    error = refusal("review_denied", fleet.begin, identifier)
    assert "denied by cleo" in error.message
    assert [one.comment for one in fleet.broker.gates.view(AWX, identifier).decisions] == ["", "not on a Friday"]
    other = fleet.agreed()
    fleet.begin(other)
    refusal("review_not_open", fleet.decide, other, "cleo", "deny", nonce="A" * 43)
    assert fleet.state(other) == "executing"


@pytest.mark.control("REV-02")
def test_an_approval_that_has_expired_is_refused(fleet: Fleet) -> None:
    early, late = fleet.agreed(), fleet.agreed(purpose="another")
    fleet.later(seconds=GATES["small"].expires_in_s - 1)
    assert fleet.begin(early).state == "executing"
    fleet.later(seconds=1)
    refusal("review_expired", fleet.begin, late, purpose="another")
    assert fleet.state(late) == "expired"
    assert fleet.ask(purpose="another").id != late


@pytest.mark.control("REV-02")
def test_an_approver_who_leaves_before_the_claim_no_longer_counts(fleet: Fleet) -> None:
    identifier = fleet.agreed()
    fleet.broker.reviewers.retire(OPERATOR, "ben", Retire(reason="left"))
    refusal("not_approved", fleet.begin, identifier)
    assert fleet.state(identifier) == "pending"
    fleet.decide(identifier, "cleo")
    assert fleet.begin(identifier).state == "executing"


@pytest.mark.control("REV-02")
def test_a_gate_that_wants_other_people_now_takes_no_older_approval(fleet: Fleet) -> None:
    identifier = fleet.agreed()
    fleet.broker.services.store.close()
    fleet.config = msgspec.structs.replace(
        fleet.config, gates={**GATES, "small": GateSettings(group="maintainers", quorum=2)}
    )
    fleet.open_broker()
    refusal("gate_changed", fleet.begin, identifier)
    assert fleet.state(identifier) == "cancelled"
    assert fleet.ask().quorum == 2


@pytest.mark.control("REV-02")
def test_a_statement_that_was_changed_in_the_database_is_never_run(fleet: Fleet) -> None:
    good, bad = fleet.agreed(purpose="good"), fleet.agreed()
    sly = msgspec.structs.replace(STATED, image="3" * 64)
    sealed = fleet.broker.gates._vault.seal(bad, "call", GateRequest(statement=sly))
    with fleet.broker.services.store.write() as tx:
        tx.connection.execute(reviews.update().where(reviews.c.id == bad).values(call=sealed))
    refusal("bytes_changed", fleet.begin, bad, image="3" * 64)
    assert fleet.state(bad) == "cancelled"
    assert fleet.begin(good, purpose="good").state == "executing"


def test_a_run_that_never_tells_its_end_is_unknown(fleet: Fleet) -> None:
    identifier = fleet.agreed()
    fleet.begin(identifier)
    fleet.later(seconds=GATES["small"].run_for_s + 1)
    assert fleet.broker.gates.view(AWX, identifier).state == "unknown"
    refusal("review_ended", fleet.end, identifier)


def test_the_same_question_waits_on_the_same_review_also_after_a_crash(fleet: Fleet) -> None:
    first = fleet.ask()
    assert fleet.ask() == first
    fleet.crash()
    assert fleet.ask() == first
    assert fleet.ask(purpose="another").id != first.id
    assert fleet.ask(OPERATOR).id != first.id


# --- machines ------------------------------------------------------------------------------------------------------------


def test_a_machine_asks_where_its_scopes_say_and_nowhere_else(fleet: Fleet) -> None:
    assert fleet.ask(STRANGER).state == "pending"
    refusal("out_of_scope", fleet.ask, STRANGER, gate="update")
    for caller in (
        Caller("machine:nobody", "", ""),
        EDGE,
        Caller("workspace:ws-a", "", ""),
        Caller("anonymous:", "", ""),
    ):
        assert refusal("out_of_scope", fleet.ask, caller).status == 403
        refusal("out_of_scope", fleet.broker.gates.preview, caller, AskGate(statement=STATED))
    assert fleet.ask(OPERATOR, gate="update").state == "pending"
    refusal("unknown_gate", fleet.ask, OPERATOR, gate="nowhere")


def test_another_clients_question_does_not_exist(fleet: Fleet) -> None:
    identifier = fleet.agreed()
    for caller in (STRANGER, OPERATOR, EDGE):
        refusal("unknown_review", fleet.broker.gates.view, caller, identifier)
        refusal("unknown_review", fleet.begin, identifier, MINE, caller)
    call = fleet.open().id
    refusal("unknown_review", fleet.broker.gates.view, EDGE, call)
    assert fleet.begin(identifier).state == "executing"


def test_no_perimeter_is_given_a_change_to_the_fleet(fleet: Fleet) -> None:
    identifier = fleet.agreed()
    with fleet.broker.services.store.write() as tx:
        tx.connection.execute(reviews.update().where(reviews.c.id == identifier).values(perimeter=EDGE.principal))
    assert fleet.claim() is None
    call = fleet.approved()
    claimed = fleet.claim()
    assert claimed is not None
    assert claimed.id == call


def test_a_machine_fills_no_queue(fleet: Fleet) -> None:
    opened = [fleet.ask(purpose=f"number {number}").id for number in range(MAX_ASKED)]
    refusal("too_many_reviews", fleet.ask)
    assert fleet.ask(STRANGER).state == "pending"
    fleet.broker.decisions.cancel(OPERATOR, opened[0], Cancel("too many"))
    assert fleet.ask().state == "pending"


# --- what people and the trail get ---------------------------------------------------------------------------------------


def test_people_see_the_difference_to_the_last_approved_statement_also_much_later(fleet: Fleet) -> None:
    first = fleet.agreed()
    assert "no statement of this gate was approved" in fleet.broker.decisions.show(first)["rendering"]
    fleet.begin(first)
    fleet.end(first)
    denied = fleet.ask(purpose="never").id
    fleet.decide(denied, "cleo", "deny")
    fleet.later(seconds=KEEP.total_seconds() + 60)
    fleet.broker.reviews.tick()
    changed = {"files": (BoundFile(path="update.yml", kind="file", sha256="2" * 64),)}
    body = AskGate(statement=msgspec.structs.replace(STATED, **changed))
    seen = fleet.broker.gates.preview(AWX, body)
    assert seen.waiting is None
    assert "1" * 64 in seen.before
    second = fleet.ask(**changed)
    shown = fleet.broker.decisions.show(second.id)
    assert f"~ file update.yml  file {'2' * 64} (was file {'1' * 64})" in shown["rendering"]
    assert "purpose: " not in shown["rendering"]
    assert shown["rendering"] == seen.rendering
    assert fleet.broker.gates.preview(AWX, body).waiting == second.id
    assert fleet.broker.gates.preview(AWX, body).statement_digest == second.statement_digest


def test_a_preview_asks_nobody(fleet: Fleet) -> None:
    fleet.broker.gates.preview(AWX, AskGate(statement=STATED))
    assert fleet.broker.decisions.listed(None, None)["reviews"] == []
    fleet.ask()
    assert len(fleet.broker.decisions.listed(None, None)["reviews"]) == 1


@pytest.mark.control("AUD-01")
def test_question_decision_claim_end_and_refusals_are_events(fleet: Fleet) -> None:
    identifier = fleet.agreed()
    fleet.begin(identifier)
    refusal("already_claimed", fleet.begin, identifier, ANOTHER)
    fleet.end(identifier)
    said = [event["unmapped"]["saw"] for event in fleet.events(identifier)]
    assert [one.get("reason") or one.get("to") or one.get("decision") or "asked" for one in said] == [
        "asked",
        "approve",
        "approved",
        "executing",
        "already_claimed",
        "done",
    ]
    assert said[0]["hosts"] == ["ws-1", "ws-2"]
    assert {one["gate"] for one in said} == {"small"}
    assert {one["requested_by"] for one in said} == {"Ada"}
    refusal("out_of_scope", fleet.ask, STRANGER, gate="update")
    assert fleet.events("update")[0]["unmapped"]["saw"]["reason"] == "out_of_scope"
    assert fleet.broker.trail.verify()["complete"]


@pytest.mark.control("REV-02")
def test_a_receipt_of_a_wave_is_verified_without_the_broker(fleet: Fleet) -> None:
    identifier = fleet.agreed()
    refusal("review_not_ended", fleet.broker.decisions.receipt, identifier)
    fleet.begin(identifier)
    fleet.end(identifier, "failed")
    told = fleet.broker.decisions.receipt(identifier)
    found = verify_receipt(told["receipt"], fleet.broker.authority.ca_pem)
    assert (found.receipt.outcome, found.receipt.rule, found.receipt.sponsor) == ("failed", "small", "Ada")
    assert found.receipt.request_digest == fleet.broker.gates.view(AWX, identifier).statement_digest
    assert [one.said.approver for one in found.decisions] == ["ben"]


def test_a_decision_about_another_statement_is_refused(fleet: Fleet) -> None:
    first, second = fleet.ask().id, fleet.ask(purpose="another").id
    nonce = fleet.broker.decisions.nonce(second, AskNonce("ben"))["nonce"]
    digest = fleet.broker.decisions.show(first)["request_digest"]
    refusal("statement_mismatch", fleet.decide, second, "ben", nonce=nonce, request_digest=digest)
    assert fleet.decide(second, "ben")["state"] == "approved"


# --- configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"gates": {"Upper": {"group": "a"}}}, "gates: 'Upper'"),
        ({"gates": {"a": {"group": "sponsors"}}}, "gates.a.group"),
        ({"gates": {"a": {"group": "g", "quorum": 0}}}, "gates.a.quorum"),
        ({"gates": {"a": {"group": "g"}}, "machines": {"m": {"scopes": ["gate:b"]}}}, "machines.m.scopes"),
        ({"gates": {"a": {"group": "g"}}, "machines": {"m": {"scopes": ["a"]}}}, "machines.m.scopes"),
        ({"machines": {"m": {"scopes": [], "oauth_client": "awx"}}}, "machines.m.oauth_client"),
    ],
)
def test_a_wrong_field_of_the_configuration_is_named(tmp_path: Path, part: dict[str, Any], named: str) -> None:
    plain = {"trust_domain": "saw.example", "state_dir": "/s", "operator_socket": "/o", "server_names": ["b.example"]}
    path = tmp_path / "broker.json"
    path.write_bytes(msgspec.json.encode(plain | part))
    with pytest.raises(ConfigError, match="is not valid") as caught:
        load_config(path)
    assert named in str(caught.value)
    good = {"gates": {"a": {"group": "g"}}, "machines": {"m": {"scopes": ["gate:a"]}}}
    path.write_bytes(msgspec.json.encode(plain | good))
    assert load_config(path).machines["m"].scopes == ("gate:a",)


def test_times_of_a_question_are_those_of_its_gate(fleet: Fleet) -> None:
    assert fleet.ask(gate="update").expires_at == iso(fleet.now.replace(hour=9))
