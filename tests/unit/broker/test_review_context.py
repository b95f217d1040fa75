"""What a push would change is read by its perimeter while people look; a decision counts for the text that it was made on."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest
from review_world import EDGE, OTHER_EDGE, World, call

from saw.broker.errors import BrokerError
from saw.broker.review_context import GIVE_UP
from saw.broker.review_decisions import AskNonce
from saw.broker.review_read_back import ASKED_FOR
from saw.broker.reviews import KEEP
from saw.broker.schema import reviews
from saw.review.decide import ShownOtherwise, look
from saw.review.messages import ContextResult, PushContext, ReadContext, ReadState, ReviewedAnswer
from saw.review.render import render

sys.path.append(str(Path(__file__).parents[1] / "review"))
from git_rig import NONE, Repository, body

pytestmark = [pytest.mark.control("REV-01"), pytest.mark.control("REV-02")]


class Pushed:
    """A push of one changed file, and what the far end has of it: commits with their folders, and contents."""

    def __init__(self, folder: Path) -> None:
        r = Repository(folder)
        self.repository = r
        self.old = r.commit({"text": "one\ntwo\n", "other": "stays\n"})
        self.new = r.commit({"text": "one\nTWO\n"})
        self.call = call(r.push(self.old, self.new), path="/team/app.git/git-receive-pack")
        self.folders = r.raw("pack-objects", "--stdout", "--revs", "-q", "--filter=blob:none", given=self.old.encode())
        self.content = r.git("rev-parse", f"{self.old}:text")
        self.contents = r.raw("pack-objects", "--stdout", "-q", given=self.content.encode())
        self.whole = r.raw("pack-objects", "--stdout", "--revs", "-q", given=self.old.encode())


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Pushed:
    return Pushed(tmp_path_factory.mktemp("pushed") / "r")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def asked(world: World, caller=EDGE) -> ReadContext | None:
    answer = world.broker.reviews.claim(caller)
    assert (answer.claimed, answer.read_back, answer.read_state) == (None, None, None)
    return answer.read_context


def tell(world: World, asked: ReadContext, pack: bytes = b"", outcome: str = "read", caller=EDGE, **more) -> bool:
    result = ContextResult(**{"step": asked.step, "outcome": outcome, "pack": pack, **more})
    return bool(world.broker.reviews.contexts.told(caller, asked.id, result)["recorded"])


def shown(world: World, identifier: str) -> tuple[str, str]:
    found = world.broker.decisions.show(identifier)
    return found["context_state"], found["rendering"]


def test_commits_are_asked_for_first_and_then_the_contents_that_are_compared(world: World, pushed: Pushed) -> None:
    identifier = world.open(call=pushed.call).id
    state, text = shown(world, identifier)
    assert (state, "look again" in text) == ("asked", True)
    first = asked(world)
    assert first is not None
    assert (first.id, first.step, first.wants, first.repository) == (identifier, 1, (pushed.old,), "/team/app.git")
    assert asked(world) is None, "it is asked once"
    assert tell(world, first, pushed.folders)
    assert shown(world, identifier)[0] == "asked"
    second = asked(world)
    assert second is not None
    assert (second.step, second.wants) == (2, (pushed.content,))
    assert tell(world, second, pushed.contents)
    state, text = shown(world, identifier)
    assert state == "read"
    assert '## changed "text", file\n@ old 1 to 2, new 1 to 2\n  one\n- two\n+ TWO\n' in text
    assert asked(world) is None
    assert not tell(world, second, pushed.contents), "a second word changes nothing"
    said = [event for event in world.events(identifier) if event.get("comment") == "the state before the push: read"]
    assert [one["unmapped"]["saw"]["context"] for one in said] == ["read"]


def test_a_far_end_that_sends_everything_at_once_is_asked_once(world: World, pushed: Pushed) -> None:
    identifier = world.open(call=pushed.call).id
    first = asked(world)
    assert first is not None
    assert tell(world, first, pushed.whole)
    assert shown(world, identifier)[0] == "read"
    assert asked(world) is None


def test_a_decision_counts_for_the_text_that_it_was_made_on_and_for_no_other(world: World, pushed: Pushed) -> None:
    identifier = world.open(call=pushed.call, quorum=2).id
    nonce = world.broker.decisions.nonce(identifier, AskNonce("ben"))["nonce"]
    before = world.statement(identifier, "ben", nonce=nonce)
    world.decide(identifier, "cleo")
    assert world.broker.decisions.show(identifier)["approved_by"] == ["cleo"]
    first = asked(world)
    assert first is not None
    assert tell(world, first, pushed.whole)
    assert world.broker.decisions.show(identifier)["approved_by"] == [], "another text was approved"
    with pytest.raises(BrokerError) as refused:
        world.hand_in(before, "ben")
    assert (refused.value.code, refused.value.details["differ"]) == ("statement_mismatch", ["render_digest"])
    assert world.decide(identifier, "ben")["state"] == "pending"
    assert world.decide(identifier, "cleo")["state"] == "approved"
    assert world.claim() is not None


def test_people_may_decide_at_any_time_and_nothing_changes_what_they_approved(world: World, pushed: Pushed) -> None:
    identifier = world.open(call=pushed.call).id
    first = asked(world)
    assert first is not None
    text = shown(world, identifier)[1]
    assert world.decide(identifier, "ben")["state"] == "approved"
    assert not tell(world, first, pushed.whole)
    assert shown(world, identifier)[1] == text
    assert world.claim() is not None


@pytest.mark.parametrize("step", [1, 2])
def test_a_far_end_that_tells_nothing_is_said_with_its_reason(world: World, pushed: Pushed, step: int) -> None:
    identifier = world.open(call=pushed.call).id
    found = asked(world)
    assert found is not None
    if step == 2:
        tell(world, found, pushed.folders)
        found = asked(world)
        assert found is not None
    assert tell(world, found, outcome="unreadable", detail="host_not_allowed: no rule")
    state, text = shown(world, identifier)
    assert state == ("unreadable" if step == 1 else "read")
    assert "host_not_allowed: no rule" in text
    assert ("its old content could not be read" in text) == (step == 2), "what was read before is kept"
    assert asked(world) is None
    assert world.decide(identifier, "ben")["state"] == "approved"


def test_who_does_not_tell_is_asked_again_and_a_far_end_that_is_away_for_a_while(world: World, pushed: Pushed) -> None:
    identifier = world.open(call=pushed.call).id
    assert asked(world) is not None
    world.crash()
    assert asked(world) is None
    world.later(seconds=ASKED_FOR.total_seconds())
    found = asked(world)
    assert found is not None
    text = shown(world, identifier)[1]
    assert tell(world, found, outcome="unreached", detail="no answer: ConnectError")
    assert shown(world, identifier) == ("asked", text)
    world.later(seconds=GIVE_UP.total_seconds())
    found = asked(world)
    assert found is not None
    assert tell(world, found, outcome="unreached", detail="no answer: ConnectError")
    assert shown(world, identifier)[0] == "unreadable"


def test_an_approved_call_that_may_not_be_sent_now_does_not_stand_in_the_way(world: World, pushed: Pushed) -> None:
    world.approved()
    world.set("ws-a", lease_expires_at=None)
    world.open(call=pushed.call)
    assert asked(world) is not None
    world.set("ws-a", lease_expires_at="2027-01-01T00:00:00.000Z")
    assert world.claim() is not None


def test_another_perimeter_neither_asks_nor_tells(world: World, pushed: Pushed) -> None:
    world.open(call=pushed.call)
    assert asked(world, OTHER_EDGE) is None
    found = asked(world)
    assert found is not None
    with pytest.raises(BrokerError) as refused:
        tell(world, found, pushed.whole, caller=OTHER_EDGE)
    assert refused.value.code == "unknown_review"
    assert tell(world, found, pushed.whole)


def test_nothing_is_asked_about_what_needs_nothing_and_about_other_calls(world: World, pushed: Pushed) -> None:
    r = pushed.repository
    fresh = world.open(call=call(r.push(NONE, pushed.old, "refs/heads/x"), path="/team/app.git/git-receive-pack")).id
    gone = world.open(call=call(body((pushed.old, NONE, "refs/heads/x")), path="/team/b.git/git-receive-pack")).id
    other = world.open().id
    assert asked(world) is None
    assert {shown(world, one)[0] for one in (fresh, gone)} == {"read"}
    assert "nothing of the far end is needed" in shown(world, gone)[1]
    assert shown(world, other)[0] is None
    assert "old state" not in shown(world, other)[1]


def test_what_was_read_is_encrypted_and_goes_with_the_bytes(world: World, pushed: Pushed) -> None:
    identifier = world.open(call=pushed.call).id
    found = asked(world)
    assert found is not None
    tell(world, found, pushed.whole)

    def row():
        with world.broker.services.store.read() as connection:
            return connection.execute(reviews.select().where(reviews.c.id == identifier)).one()

    assert pushed.whole[12:40] not in row().context
    assert row().held_bytes == len(row().call) + len(row().context)
    world.decide(identifier, "ben", "deny")
    world.later(seconds=KEEP.total_seconds())
    world.broker.reviews.tick()
    assert (row().call, row().context, row().held_bytes) == (None, None, 0)
    assert shown(world, identifier)[1] is None


def test_what_was_read_and_then_changed_in_the_database_decides_nothing(world: World, pushed: Pushed) -> None:
    identifier = world.open(call=pushed.call).id
    found = asked(world)
    assert found is not None
    tell(world, found, pushed.whole)
    said = world.statement(identifier, "ben", nonce=world.broker.decisions.nonce(identifier, AskNonce("ben"))["nonce"])
    with world.broker.services.store.write() as tx:
        tx.connection.execute(reviews.update().where(reviews.c.id == identifier).values(context=b"other bytes"))
    with pytest.raises(BrokerError) as refused:
        world.hand_in(said, "ben")
    assert refused.value.code == "bytes_changed"


class Operator:
    """The operator's calls, without a socket; ``between`` is done once, after the first answer."""

    def __init__(self, world: World, between=lambda: None) -> None:
        self.world = world
        self.between = between

    def request(self, _method: str, path: str, _json: object | None = None):
        identifier = path.split("/")[3]
        if path.endswith("/call"):
            return msgspec.to_builtins(self.world.broker.decisions.call(identifier))
        told = self.world.broker.decisions.show(identifier)
        between, self.between = self.between, lambda: None
        between()
        return told


def test_a_reviewers_machine_makes_the_same_text_also_when_it_changes_meanwhile(world: World, pushed: Pushed) -> None:
    identifier = world.open(call=pushed.call).id
    found = asked(world)
    assert found is not None
    seen = look(Operator(world, lambda: tell(world, found, pushed.whole)), identifier)
    assert "- two\n+ TWO" in seen.rendering
    context = PushContext(state="read", packs=(pushed.whole,))
    assert seen.rendering == render("ws-a", pushed.call, context)

    class Lying(Operator):
        def request(self, method: str, path: str, json: object | None = None):
            answer = super().request(method, path, json)
            return answer if path.endswith("/call") else {**answer, "rendering": "nothing to see"}

    with pytest.raises(ShownOtherwise):
        look(Lying(world), identifier)


WRITE = call(b'{"amount": 4711}', method="PUT", path="/v1/items/7", headers=(("content-type", "application/json"),))


def asked_of_a_write(world: World, caller=EDGE) -> ReadState | None:
    answer = world.broker.reviews.claim(caller)
    assert (answer.claimed, answer.read_back, answer.read_context) == (None, None, None)
    return answer.read_state


def there(status: int = 200, body: bytes = b'{"amount": 100}') -> ContextResult:
    found = ReviewedAnswer(status=status, headers=(("content-type", "application/json"),), body=body)
    return ContextResult(step=1, outcome="read", answer=found)


def test_what_a_write_would_change_is_read_once_and_shown_to_whoever_decides(world: World) -> None:
    identifier = world.open(call=WRITE, readable=True).id
    state, text = shown(world, identifier)
    assert (state, "not read yet: look again" in text) == ("asked", True)
    wanted = asked_of_a_write(world)
    assert wanted is not None
    assert (wanted.id, wanted.host, wanted.path) == (identifier, "api.example.com", "/v1/items/7")
    assert asked_of_a_write(world) is None, "it is asked once"
    early = world.statement(identifier, "ben")
    contexts = world.broker.reviews.contexts
    with pytest.raises(BrokerError, match="there is no review"):
        contexts.told(OTHER_EDGE, identifier, there())
    assert contexts.told(EDGE, identifier, there())["recorded"]
    assert not contexts.told(EDGE, identifier, there(body=b"{}"))["recorded"], "a second word changes nothing"
    state, text = shown(world, identifier)
    assert (state, "/amount: changed\n- 100\n+ 4711\n" in text) == ("read", True)
    said = [event for event in world.events(identifier) if event.get("comment") == "the state before the write: read"]
    assert [one["unmapped"]["saw"]["bytes"] for one in said] == [len(b'{"amount": 100}')]
    nonce = world.broker.decisions.nonce(identifier, AskNonce("ben"))["nonce"]
    with pytest.raises(BrokerError) as refused:
        world.hand_in(msgspec.structs.replace(early, nonce=nonce), "ben")
    assert refused.value.code == "statement_mismatch"
    assert world.decide(identifier, "ben")["state"] == "approved"


def test_a_write_that_cannot_be_read_is_not_asked_about_and_one_that_is_unreadable_says_why(world: World) -> None:
    for changes in ({"call": WRITE}, {"call": call(b"{}", path="/v1/other"), "readable": True}):
        identifier = world.open(**changes).id
        found = world.broker.decisions.show(identifier)
        assert (found["context_state"], "now   " in found["rendering"]) == (None, False)
    assert asked_of_a_write(world) is None
    identifier = world.open(call=WRITE, workspace_id="ws-b", readable=True).id
    wanted = asked_of_a_write(world)
    assert wanted is not None
    assert world.broker.reviews.contexts.told(EDGE, identifier, there(403))["recorded"]
    found = world.broker.decisions.show(identifier)
    assert (found["context_state"], found["context_detail"]) == ("unreadable", "the far end answered 403")
    assert "NOT read: the far end answered 403" in found["rendering"]
    assert world.decide(identifier, "ben")["state"] == "approved", "people may decide all the same"


def test_a_far_end_of_a_write_that_is_not_reached_is_asked_again_and_no_more_at_last(world: World) -> None:
    identifier = world.open(call=WRITE, readable=True).id
    silent = ContextResult(step=1, outcome="unreached", detail="no answer")
    contexts = world.broker.reviews.contexts
    assert asked_of_a_write(world) is not None
    assert contexts.told(EDGE, identifier, silent)["recorded"]
    world.later(seconds=ASKED_FOR.total_seconds() + 1)
    assert asked_of_a_write(world) is not None
    world.later(seconds=GIVE_UP.total_seconds())
    assert contexts.told(EDGE, identifier, silent)["recorded"]
    assert world.broker.decisions.show(identifier)["context_detail"] == "no answer"
    assert asked_of_a_write(world) is None
