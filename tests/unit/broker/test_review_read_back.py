"""A push whose end is not known is looked for by its perimeter, and what was found is kept; nothing is sent a second time."""

from __future__ import annotations

from pathlib import Path

import pytest
from review_world import EDGE, OPERATOR, OTHER_EDGE, World, call

from saw.broker.errors import BrokerError
from saw.broker.review_read_back import ASKED_FOR, GIVE_UP, SETTLE, ReadAgain
from saw.broker.reviews import KEEP
from saw.broker.schema import reviews
from saw.review.messages import ReadBack, ReadBackResult

pytestmark = pytest.mark.control("REV-03")
PUSH = call(b"0000", path="/team/app.git/git-receive-pack")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def unknown(world: World, **changes: object) -> str:
    """Return a review whose call may have been sent."""
    identifier = world.approved(**{"call": PUSH, **changes})
    claimed = world.claim()
    assert claimed is not None
    world.tell(claimed, "unknown", detail="no answer")
    return identifier


def asked(world: World, caller=EDGE) -> ReadBack | None:
    answer = world.broker.reviews.claim(caller)
    assert answer.claimed is None
    return answer.read_back


def settled(world: World) -> ReadBack:
    world.later(seconds=SETTLE.total_seconds())
    found = asked(world)
    assert found is not None
    return found


def tell(world: World, identifier: str, outcome: str, detail: str = "why", caller=EDGE) -> bool:
    result = ReadBackResult(outcome=outcome, detail=detail)
    return bool(world.broker.reviews.read_backs.told(caller, identifier, result)["recorded"])


def shown(world: World, identifier: str) -> tuple[str, str | None, str | None]:
    row = world.broker.decisions.brief(identifier)
    return row["state"], row["read_back"], row["read_back_detail"]


def test_a_push_is_looked_for_once_and_the_review_says_what_was_found(world: World) -> None:
    identifier = unknown(world)
    assert asked(world) is None, "what is on its way shall arrive first"
    found = settled(world)
    assert (found.id, found.workspace_id, found.call) == (identifier, "ws-a", PUSH)
    assert asked(world) is None
    assert tell(world, identifier, "arrived", "the far end has refs/heads/main")
    assert shown(world, identifier) == ("unknown", "arrived", "the far end has refs/heads/main")
    assert world.view(identifier).detail == "no answer; read back: arrived (the far end has refs/heads/main)"
    world.later(hours=2)
    assert asked(world) is None
    assert not tell(world, identifier, "not_arrived"), "a second word changes nothing"
    assert shown(world, identifier)[1] == "arrived"
    said = [event for event in world.events(identifier) if event.get("comment", "").startswith("read back")]
    assert [one["unmapped"]["saw"]["read_back"] for one in said] == ["arrived"]


def test_a_lost_claim_is_looked_for_too(world: World) -> None:
    identifier = world.approved(call=PUSH)
    assert world.claim() is not None
    world.later(minutes=5)
    assert world.view(identifier).state == "unknown"
    assert settled(world).id == identifier


def test_another_perimeter_neither_asks_nor_tells(world: World) -> None:
    identifier = unknown(world)
    world.later(seconds=SETTLE.total_seconds())
    assert asked(world, OTHER_EDGE) is None
    assert asked(world) is not None
    with pytest.raises(BrokerError) as refused:
        tell(world, identifier, "arrived", caller=OTHER_EDGE)
    assert refused.value.code == "unknown_review"
    assert tell(world, identifier, "not_arrived")


def test_who_does_not_tell_is_asked_again_and_a_far_end_that_is_away_for_an_hour(world: World) -> None:
    identifier = unknown(world)
    settled(world)
    world.crash()
    assert asked(world) is None
    world.later(seconds=ASKED_FOR.total_seconds())
    assert asked(world) is not None
    assert tell(world, identifier, "unreached", "no answer: ConnectError")
    assert shown(world, identifier) == ("unknown", "asked", "no answer: ConnectError")
    assert asked(world) is None
    world.later(seconds=GIVE_UP.total_seconds())
    assert asked(world) is not None
    assert tell(world, identifier, "unreached", "no answer: ConnectError")
    assert shown(world, identifier)[1] == "undecided"
    assert asked(world) is None


def test_an_operator_has_it_looked_for_again(world: World) -> None:
    identifier = unknown(world)
    settled(world)
    tell(world, identifier, "undecided", "policy_changed")
    world.later(hours=3)
    again = world.broker.reviews.read_backs.again(OPERATOR, identifier, ReadAgain("the policy is back"))
    assert again == {"id": identifier, "read_back": "asked"}
    assert asked(world) is not None
    assert tell(world, identifier, "unreached"), "it has an hour again"
    assert shown(world, identifier)[1] == "asked"
    world.later(seconds=ASKED_FOR.total_seconds())
    assert asked(world) is not None
    assert tell(world, identifier, "arrived")
    assert any("the policy is back" in event.get("comment", "") for event in world.events(identifier))


@pytest.mark.parametrize("kind", ["done", "failed", "pending", "no push"])
def test_what_is_not_unknown_or_no_push_is_never_looked_for(world: World, kind: str) -> None:
    if kind == "no push":
        identifier = unknown(world, call=call())
    else:
        identifier = world.approved(call=PUSH)
        if kind != "pending":
            claimed = world.claim()
            assert claimed is not None
            world.tell(claimed, kind)
        else:
            world.set("ws-a", lease_expires_at=None)
    world.later(seconds=SETTLE.total_seconds())
    assert asked(world) is None
    with pytest.raises(BrokerError) as refused:
        world.broker.reviews.read_backs.again(OPERATOR, identifier, ReadAgain("please"))
    assert refused.value.code == "nothing_to_read_back"


def test_without_its_bytes_or_with_others_it_is_not_looked_for(world: World) -> None:
    identifier = unknown(world)
    with world.broker.services.store.write() as tx:
        tx.connection.execute(reviews.update().where(reviews.c.id == identifier).values(call=b"other bytes"))
    world.later(seconds=SETTLE.total_seconds())
    assert asked(world) is None
    assert shown(world, identifier)[1:] == ("undecided", "the stored call is not what was reviewed")
    later = unknown(world, call=call(b"0000", path="/team/b.git/git-receive-pack"))
    settled(world)
    world.later(seconds=KEEP.total_seconds())
    world.broker.reviews.tick()
    assert asked(world) is None
    with pytest.raises(BrokerError, match="no longer kept"):
        world.broker.reviews.read_backs.again(OPERATOR, later, ReadAgain("please"))
