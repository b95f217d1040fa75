"""What agents ask for beyond their policy, at the broker: who asks, for what, how often, and that no answer allows anything."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from request_world import ME, NEIGHBOUR, RequestWorld, ask_more
from review_world import EDGE, OPERATOR, refused
from sqlalchemy import func, select

from saw.broker import apps, policy_request_routes
from saw.broker import policy_request_ends as ends
from saw.broker import policy_requests as kept
from saw.broker.agents import RetireAgent
from saw.broker.context import Caller
from saw.broker.delegations import Issue, Revoke
from saw.broker.errors import BrokerError
from saw.broker.holds import AddHold, ReleaseHold
from saw.broker.notification_settings import Kind, Webhook
from saw.broker.policy_request_ends import KEEP
from saw.broker.policy_requests import MOST_OPEN, OPEN_FOR
from saw.broker.releases import bundles_of
from saw.broker.schema import notifications, policy_requests
from saw.policy.bundle import read_content
from saw.policy.delegation import Resource
from saw.policy.loader import load_members
from saw.policy.matcher import Matcher
from saw.policy.model import Request
from saw.policy.yamltext import read


@pytest.fixture
def world(tmp_path: Path) -> Iterator[RequestWorld]:
    found = RequestWorld(tmp_path)
    yield found
    found.broker.close()


# --- a request is never a grant ----------------------------------------------------------------------------------------------


@pytest.mark.control("POL-01")
@pytest.mark.control("NET-01")
@pytest.mark.parametrize(("decision", "state"), [("accept", "accepted"), ("decline", "declined")])
def test_an_answered_request_changes_nothing_that_decides_about_calls(
    world: RequestWorld, decision: str, state: str
) -> None:
    before, seen = world.everything_else(), world.broker.views.perimeter_state()
    asked = world.ask()
    assert asked.state == "open"
    assert world.broker.policy_requests.show(asked.id).now.standing == "refused"
    assert world.answer(asked.id, decision).state == state
    assert world.broker.policy_requests.show(asked.id).now.standing == "refused"
    assert world.everything_else() == before
    after = world.broker.views.perimeter_state()
    assert msgspec.to_builtins(after["workspaces"]) == msgspec.to_builtins(seen["workspaces"])


@pytest.mark.control("POL-01")
def test_what_is_accepted_is_allowed_by_a_release_that_says_so_and_then_shown_as_allowed(world: RequestWorld) -> None:
    asked = world.ask()
    world.answer(asked.id)
    second = world.release(2, ", {allow: {method: GET, path: /v2/list}}")
    assert world.broker.policy_requests.show(asked.id).now.standing == "refused"
    world.set("ws-a", policy_digest=second)
    shown = world.broker.policy_requests.show(asked.id)
    assert (shown.now.standing, shown.policy_now, shown.policy_digest) == ("allowed", second, world.digest)


@pytest.mark.control("AUD-01")
def test_each_step_is_an_event_with_who_and_why_in_the_same_transaction(world: RequestWorld) -> None:
    asked = world.ask(reason="a\u202eb")
    world.answer(asked.id, "decline", "not this quarter")
    other = world.ask(path="/v2/other")
    world.now += OPEN_FOR
    world.broker.policy_requests.tick()
    operations = [(one["api"]["operation"], one["status_detail"]) for one in world.told(asked.id)]
    assert operations == [
        ("policy.request.open", "an agent asks for more than its policy allows"),
        ("policy.request.decline", "not this quarter"),
    ]
    opened, declined = (one["unmapped"]["saw"] for one in world.told(asked.id))
    assert (opened["principal"], opened["workspace"], opened["agent"]) == ("workspace:ws-a", "ws-a", "agent-1")
    assert (opened["host"], opened["path"], opened["standing"]) == ("api.example.com", "/v2/list", "refused")
    assert opened["reason_by_agent"] == "a\\u{202e}b"
    assert declined["principal"] == "operator:root"
    assert [one["api"]["operation"] for one in world.told(other.id)][-1] == "policy.request.expire"


@pytest.mark.control("AUD-01")
def test_a_request_whose_event_cannot_be_written_is_not_there(
    world: RequestWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object, **__: object) -> None:
        raise RuntimeError("no event")

    with monkeypatch.context() as patched:
        patched.setattr(type(world.broker.services.events), "api_activity", fault)
        with pytest.raises(RuntimeError):
            world.ask()
    assert world.broker.policy_requests.mine(ME, "ws-a").requests == ()
    asked = world.ask()
    with monkeypatch.context() as patched:
        patched.setattr(type(world.broker.services.events), "api_activity", fault)
        with pytest.raises(RuntimeError):
            world.answer(asked.id)
    assert world.broker.policy_requests.show(asked.id).state == "open"


# --- who asks, and for what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", [NEIGHBOUR, EDGE, OPERATOR, Caller("anonymous:", "10.0.0.1", "r")])
def test_a_workspace_asks_and_looks_for_itself_alone(world: RequestWorld, caller: Caller) -> None:
    with refused("not_this_workspace", 403):
        world.ask(caller)
    with refused("not_this_workspace", 403):
        world.broker.policy_requests.mine(caller, "ws-a")
    mine = world.ask()
    theirs = world.ask(NEIGHBOUR, workspace_id="ws-b")
    assert [one.id for one in world.broker.policy_requests.mine(ME, "ws-a").requests] == [mine.id]
    assert [one.id for one in world.broker.policy_requests.mine(NEIGHBOUR, "ws-b").requests] == [theirs.id]


def test_it_is_asked_under_the_policy_in_force_by_an_active_workspace_with_a_living_agent(world: RequestWorld) -> None:
    for other in ("f" * 64, world.release(2)):
        with refused("policy_changed", 409):
            world.ask(policy_digest=other)
    world.set("ws-a", state="stopped")
    with pytest.raises(BrokerError):
        world.ask()
    world.set("ws-a", state="active")
    assert world.ask().state == "open"
    world.broker.agents.retire(OPERATOR, "agent-2", RetireAgent(reason="done"))
    with refused("agent_retired"):
        world.ask(NEIGHBOUR, workspace_id="ws-b")
    world.set("ws-a", policy_digest="e" * 64)  # attested, and no release here
    with refused("policy_changed"):
        world.ask(policy_digest="e" * 64)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"path": "/v1/x"}, "already_allowed"),
        ({"host": "169.254.169.254", "path": "/latest"}, "never_allowed"),
        ({"host": "localhost"}, "never_allowed"),
        ({"path": "/v2/../x"}, "malformed"),
        ({"path": "/v2/%zz"}, "malformed"),
        ({"path": "/v2/list?a=1"}, "malformed"),
    ],
)
def test_what_is_allowed_already_or_never_or_no_path_is_not_kept(
    world: RequestWorld, changes: dict[str, Any], code: str
) -> None:
    with refused(code):
        world.ask(**changes)
    assert world.broker.policy_requests.mine(ME, "ws-a").requests == ()
    assert world.ask().state == "open"


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "API.example.com"}, {"host": "*.example.com"}, {"host": ""}, {"host": "a b"}, {"port": 0}, {"port": 65536},
        {"method": "get"}, {"path": "v2"}, {"path": "/" + "a" * 512}, {"path": "/\u00e4"}, {"program": "curl"},
        {"program": "/bin/\x1b"}, {"reason": ""}, {"reason": "x" * 501}, {"scheme": "ftp"}, {"workspace_id": "w" * 65},
        {"policy_digest": "A" * 64}, {"allow": True},
    ],
)  # fmt: skip
def test_the_body_is_read_strictly(changes: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        ask_more(**changes)
    assert ask_more(reason="x" * 500, path="/" + "a" * 511)


# --- how much ----------------------------------------------------------------------------------------------------------------


def test_the_same_ask_is_one_request_while_it_is_open_and_while_the_policy_that_answered_it_is_in_force(
    world: RequestWorld,
) -> None:
    first = world.ask()
    assert world.ask(reason="I ask again").id == first.id
    assert world.ask(method="DELETE").id != first.id
    assert world.ask(program="/usr/bin/git").id != first.id
    world.answer(first.id, "decline", "no")
    again = world.ask()
    assert (again.id, again.state, again.comment) == (first.id, "declined", "no")
    second = world.release(2, ", {allow: {method: GET, path: /v3}}")
    world.set("ws-a", policy_digest=second)
    under = world.ask(policy_digest=second)
    assert (under.id != first.id, under.state) == (True, "open")
    world.now += OPEN_FOR
    late = world.ask(policy_digest=second)
    assert (late.id != under.id, late.state) == (True, "open")


def test_of_many_who_ask_at_once_there_is_one_request(world: RequestWorld) -> None:
    barrier, found = threading.Barrier(8), []

    def run() -> None:
        barrier.wait()
        found.append(world.ask().id)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found))) == (8, 1)
    assert len(world.told()) == 1


def test_open_and_kept_requests_of_a_workspace_are_bounded_and_those_of_others_are_not_touched(
    world: RequestWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MOST_KEPT", MOST_OPEN + 5)
    made = [world.ask(path=f"/v2/{number}").id for number in range(MOST_OPEN)]
    with refused("too_many_requests", 429):
        world.ask()
    assert world.ask(path="/v2/0").id == made[0]
    assert world.ask(NEIGHBOUR, workspace_id="ws-b").state == "open"
    world.answer(made[0], "decline", "no")
    world.later(seconds=1)
    assert world.ask().state == "open"
    for number in range(1, 5):
        world.answer(made[number], "decline", "no")
        world.ask(path=f"/v3/{number}")
    assert count(world) == MOST_OPEN + 5
    world.answer(made[5])
    world.later(seconds=1)
    more = world.ask(path="/v3/more")
    assert (count(world), more.state) == (MOST_OPEN + 5, "open")
    with refused("unknown_policy_request"):
        world.broker.policy_requests.show(made[0])
    assert world.broker.policy_requests.show(made[1]).state == "declined"
    told = [one for one in world.told() if one["api"]["operation"] == "policy.request.retention.remove"]
    assert [(one["unmapped"]["saw"]["workspace"], one["unmapped"]["saw"]["requests"]) for one in told] == [("ws-a", 1)]
    monkeypatch.setattr(kept, "SHOWN", 7)
    assert len(world.broker.policy_requests.mine(ME, "ws-a").requests) == 7


def count(world: RequestWorld, workspace: str = "ws-a") -> int:
    query = select(func.count()).select_from(policy_requests).where(policy_requests.c.workspace_id == workspace)
    with world.broker.services.store.read() as connection:
        return int(connection.execute(query).scalar_one())


def test_what_is_held_makes_no_room_and_what_is_not_does(world: RequestWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_KEPT", 3)
    monkeypatch.setattr(ends, "STEP", 1)
    made = []
    for number in range(3):
        made.append(world.ask(path=f"/v2/{number}").id)
        world.answer(made[-1], "decline", "no")
        world.now += timedelta(days=1)
    day = int(world.now.timestamp() * 1000) - 2 * 86_400_000
    first = world.broker.holds.add(OPERATOR, AddHold(reason="a case", since=0, until=day))["id"]
    world.ask(path="/v2/more")
    left = {one.id for one in world.broker.policy_requests.mine(ME, "ws-a").requests}
    assert made[0] in left, "it ended first and is held"
    assert made[1] not in left
    world.broker.holds.add(OPERATOR, AddHold(reason="another", workspace="ws-a"))
    with refused("all_requests_held", 429):
        world.ask(path="/v2/again")
    assert world.ask(NEIGHBOUR, workspace_id="ws-b").state == "open"
    for hold in world.broker.holds.listed(everything=False)["holds"]:
        world.broker.holds.release(OPERATOR, hold["id"], ReleaseHold(reason="over"))
    assert first
    assert world.ask(path="/v2/again").state == "open"
    assert count(world) == 3


def test_the_routes_give_each_workspace_a_share_of_its_own(
    world: RequestWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = {"now": ME}
    monkeypatch.setattr(apps, "tls_caller", lambda *_: caller["now"])
    monkeypatch.setattr(policy_request_routes, "time", SimpleNamespace(monotonic=lambda: 0.0))
    app = apps.public_app(world.broker)
    body = {
        "workspace_id": "ws-a", "policy_digest": world.digest, "host": "api.example.com", "port": 443, "scheme": "https",
        "method": "GET", "path": "/v2/list", "program": "", "reason": "why",
    }  # fmt: skip

    async def call(method: str, **how: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="https://broker") as client:
            return await client.request(method, "/v1/workspace/policy-requests", **how)

    def ask(**changes: Any) -> int:
        return asyncio.run(call("POST", json={**body, **changes})).status_code

    assert [ask() for _ in range(11)] == [200] * 10 + [429]
    assert ask(extra=1) == 400
    caller["now"] = NEIGHBOUR
    assert ask(workspace_id="ws-b") == 200
    assert ask() == 403
    assert ask(reason="x" * 9000) == 413
    seen = asyncio.run(call("GET", params={"workspace_id": "ws-b"}))
    assert [one["path"] for one in seen.json()["requests"]] == ["/v2/list"]
    assert [asyncio.run(call("GET", params={"workspace_id": "ws-b"})).status_code for _ in range(20)][-1] == 429


# --- what people see and say -------------------------------------------------------------------------------------------------


@pytest.mark.control("POL-01")
def test_the_lines_that_are_proposed_allow_exactly_the_call_and_say_nothing_of_secrets(world: RequestWorld) -> None:
    shown = world.broker.policy_requests.show(world.ask(host="new.example.com").id)
    assert "# policy.yaml: add under network_policies" in shown.now.proposal
    added = read(shown.now.proposal.encode(), "proposal")["network_policies"]
    with world.broker.services.store.read() as connection:
        bundle = read_content(bundles_of(connection, {world.digest})[world.digest])
    tree = read(bundle.members["policy.yaml"], "policy.yaml")
    tree["network_policies"] |= added
    changed = load_members({**bundle.members, "policy.yaml": json.dumps(tree).encode()})
    matcher = Matcher.compile(changed.policy, changed.governance)
    asked = Request("https", "new.example.com", 443, "GET", "/v2/list", binary="/usr/bin/curl")
    assert matcher.decide(asked).allowed
    for other in (
        msgspec.structs.replace(asked, path="/v2/other"),
        msgspec.structs.replace(asked, method="POST"),
        msgspec.structs.replace(asked, binary="/usr/bin/git"),
        msgspec.structs.replace(asked, host="old.example.com"),
    ):
        assert not matcher.decide(other).allowed
    assert b"the-secret-place" not in msgspec.json.encode(shown)


def test_without_a_program_there_are_no_lines_and_why_is_said(world: RequestWorld) -> None:
    found = world.broker.policy_requests.show(world.ask(program="").id).now
    assert (found.proposal, "names the program" in found.impossible) == ("", True)


@pytest.mark.control("DEL-01")
def test_what_policy_allows_and_no_delegation_covers_is_told_apart(world: RequestWorld) -> None:
    wanted = Issue(workspace_id="ws-a", task="t", resources=(Resource("other.example.com"),), duration_s=3600)
    given = world.broker.delegations.issue(OPERATOR, wanted)["id"]
    asked = world.ask(path="/v1/x")
    shown = world.broker.policy_requests.show(asked.id)
    assert (shown.standing, shown.now.standing, shown.now.proposal) == ("delegation", "delegation", "")
    covering = msgspec.structs.replace(wanted, resources=(Resource("api.example.com"),))
    world.broker.delegations.issue(OPERATOR, covering)
    assert world.broker.policy_requests.show(asked.id).now.standing == "allowed"
    with refused("already_allowed"):
        world.ask(path="/v1/x")
    world.broker.delegations.revoke(OPERATOR, given, Revoke("done"))


def test_a_call_that_waits_for_review_is_told_apart(world: RequestWorld) -> None:
    found = world.broker.policy_requests.show(world.ask(method="POST", path="/v1/notes").id).now
    assert (found.standing, "class: auto" in found.proposal) == ("review", True)
    assert "nobody would look at such a call any more" in found.notes


def test_an_answer_is_given_once_and_says_why(world: RequestWorld) -> None:
    asked = world.ask()
    for comment in (" ", "\n"):
        with refused("malformed"):
            world.answer(asked.id, comment=comment)
    with pytest.raises(msgspec.ValidationError):
        world.answer(asked.id, "allow")
    assert world.answer(asked.id).changed
    assert not world.answer(asked.id).changed
    with refused("already_answered", 409):
        world.answer(asked.id, "decline")
    with refused("unknown_policy_request", 404):
        world.answer("pr-nothing")
    late = world.ask(path="/v2/late")
    world.now += OPEN_FOR
    with refused("request_expired", 409):
        world.answer(late.id)
    assert world.broker.policy_requests.show(late.id).state == "expired"
    assert len(world.told(asked.id)) == 2


def test_the_list_is_filtered_and_comes_in_pages_newest_first(world: RequestWorld) -> None:
    made = []
    for number in range(5):
        made.append(world.ask(path=f"/v2/{number}").id)
        world.later(seconds=1)
    world.answer(made[0])
    theirs = world.ask(NEIGHBOUR, workspace_id="ws-b").id

    def listed(**changes: Any) -> list[str]:
        asked = {"state": "", "workspace": "", "sponsor": "", "after": "", "limit": 100, **changes}
        return [one.id for one in world.broker.policy_requests.listed(**asked).requests]

    assert listed() == [theirs, *reversed(made)]
    assert listed(workspace="ws-a", state="open") == list(reversed(made[1:]))
    assert listed(state="accepted") == [made[0]]
    assert listed(sponsor="ADA") == listed()
    assert listed(sponsor="ben") == []
    first = world.broker.policy_requests.listed(state="", workspace="ws-a", sponsor="", after="", limit=2)
    assert [one.id for one in first.requests] == made[:2:-1]
    assert listed(workspace="ws-a", after=first.next) == made[2::-1]
    with refused("malformed"):
        listed(state="granted")
    world.now += OPEN_FOR
    assert listed(state="open") == []
    assert set(listed(state="expired")) == {theirs, *made[1:]}


def test_what_ended_long_ago_goes_and_what_is_held_or_open_stays(world: RequestWorld) -> None:
    gone, held = world.ask(), world.ask(NEIGHBOUR, workspace_id="ws-b")
    for one in (gone, held):
        world.answer(one.id)
    world.broker.holds.add(OPERATOR, AddHold(reason="a case", workspace="ws-b"))
    world.now += KEEP
    fresh = world.ask(path="/v2/fresh")
    world.broker.policy_requests.tick()
    with world.broker.services.store.read() as connection:
        left = set(connection.execute(select(policy_requests.c.id)).scalars())
    assert left == {held.id, fresh.id}
    assert world.told()[-1]["unmapped"]["saw"]["requests"] == 1


def test_what_is_held_keeps_nothing_behind_it_and_has_nothing_written(
    world: RequestWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends, "STEP", 2)
    world.broker.holds.add(OPERATOR, AddHold(reason="a case", workspace="ws-b"))
    for number in range(5):
        world.answer(world.ask(NEIGHBOUR, workspace_id="ws-b", path=f"/v2/{number}").id)
        world.now += timedelta(seconds=1)
    for number in range(3):
        world.answer(world.ask(path=f"/v2/{number}").id)
    world.now += KEEP
    for _ in range(5):
        world.broker.policy_requests.tick()
    assert (count(world), count(world, "ws-b")) == (0, 5)

    def write() -> None:
        raise AssertionError("nothing is to be written")

    with monkeypatch.context() as patched:
        patched.setattr(world.broker.services.store, "write", write)
        for _ in range(4):
            world.broker.policy_requests.tick()
    (hold,) = world.broker.holds.listed(everything=False)["holds"]
    world.broker.holds.release(OPERATOR, hold["id"], ReleaseHold(reason="over"))
    for _ in range(5):
        world.broker.policy_requests.tick()
    assert count(world, "ws-b") == 0


def test_a_hold_that_comes_between_look_and_removal_counts(
    world: RequestWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = world.ask()
    world.answer(asked.id)
    world.now += KEEP
    real = world.broker.services.store.write

    def write() -> Any:
        monkeypatch.undo()
        world.broker.holds.add(OPERATOR, AddHold(reason="a case", workspace="ws-a"))
        return real()

    monkeypatch.setattr(world.broker.services.store, "write", write)
    world.broker.policy_requests.tick()
    assert count(world) == 1
    assert [one["api"]["operation"] for one in world.told()][-1] == "policy.request.accept"


def test_people_are_told_where_they_want_it_without_a_word_of_the_agent(tmp_path: Path) -> None:
    quiet = Webhook(name="quiet", url="https://chat.example.com/hook", secret_file="/nowhere/chat")
    wants = Webhook(
        name="wants", url="https://chat.example.com/hook", secret_file="/nowhere/chat", kinds=(Kind.POLICY_REQUESTED,)
    )
    world = RequestWorld(tmp_path, notifications=(quiet, wants))
    asked = world.ask(host="agent-words.example.com", reason="agent words")
    world.ask(host="agent-words.example.com", reason="agent words")
    with world.broker.services.store.read() as connection:
        (row,) = connection.execute(select(notifications)).all()
    assert (row.channel, row.urgent) == ("wants", False)
    facts = json.loads(row.body)["data"]
    assert facts["title"] == "The agent of ws-a asks for more than its policy allows"
    assert facts["command"] == f"saw policy requests show {asked.id}"
    assert "words" not in row.body
    world.broker.close()


@pytest.mark.control("POL-01")
def test_no_other_part_reads_or_writes_the_table_of_requests() -> None:
    source = Path(apps.__file__).parents[1]
    found = {
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        if re.search(r"\bpolicy_requests\b", path.read_text()) and "migrations" not in path.parts
    }
    assert found == {
        "broker/schema.py", "broker/policy_requests.py", "broker/policy_request_ends.py",
        "broker/policy_request_routes.py", "broker/core.py", "broker/server.py",
        "broker/sso/policy_request_pages.py", "cli/policy.py",
    }  # fmt: skip
