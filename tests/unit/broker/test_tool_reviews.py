"""Calls of tools over stdio at the broker: who asks, what policy lets people decide on, one claim; each with its twin."""

from __future__ import annotations

import asyncio
import json
import threading
from base64 import b64encode
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from review_world import EDGE, OPERATOR, refused
from sqlalchemy import select
from tool_world import ANOTHER, ANSWER, ME, MINE, NEIGHBOUR, PARAMS, PIN, ToolWorld

from saw.broker import apps, tool_review_routes
from saw.broker.break_glass_settings import BreakGlassSettings
from saw.broker.clock import iso
from saw.broker.context import Caller
from saw.broker.delegations import Issue, Revoke
from saw.broker.errors import BrokerError
from saw.broker.notification_settings import Webhook
from saw.broker.review_decisions import AskNonce, Cancel
from saw.broker.review_read_back import ReadAgain
from saw.broker.reviewers import Retire
from saw.broker.reviews import KEEP, MAX_OPEN
from saw.broker.schema import notifications, reviews
from saw.broker.tool_reviews import RUN_FOR
from saw.policy.delegation import Resource
from saw.review.decide import look
from saw.review.receipt import verify_receipt
from saw.review.tool import EndTool, params_of


@pytest.fixture
def world(tmp_path: Path) -> ToolWorld:
    return ToolWorld(tmp_path)


# --- the way of a call that is approved --------------------------------------------------------------------------------------


@pytest.mark.control("REV-01")
@pytest.mark.control("REV-02")
@pytest.mark.control("REV-03")
def test_a_call_waits_for_a_person_is_claimed_once_and_tells_its_end(world: ToolWorld) -> None:
    asked = world.ask()
    assert (asked.state, asked.quorum) == ("pending", 1)
    with refused("not_approved", 409):
        world.begin(asked.id)
    world.decide(asked.id, "ben", comment="read it")
    assert world.look(asked.id).state == "approved"
    begun = world.begin(asked.id)
    assert (begun.state, begun.claim_ends_at) == ("executing", iso(world.now + RUN_FOR))
    assert world.end(asked.id).state == "done"
    assert world.end(asked.id).state == "done"  # told again after a lost answer
    with refused("claim_ended", 409):
        world.end(asked.id, "failed")
    said = [one["unmapped"]["saw"] for one in world.events(asked.id)]
    assert [one["to"] for one in said if one.get("to")] == ["approved", "executing", "done"]
    assert said[-1]["answer_sha256"] == ANSWER
    assert {one["tool"] for one in said} == {"files/publish"}


@pytest.mark.control("REV-02")
def test_people_see_server_tool_and_every_argument_of_the_exact_bytes(world: ToolWorld) -> None:
    shown = world.broker.decisions.show(world.ask().id)
    assert (shown["kind"], shown["method"], shown["host"], shown["group"]) == (
        "tool",
        "TOOL",
        "files/publish",
        "maintainers",
    )
    text = shown["rendering"]
    assert "tool        publish of the MCP server files" in text
    assert "runs        in the workspace: /usr/bin/files --root /workspace" in text
    assert PIN in text
    written = text.partition("# arguments, written by the agent\n")[2]
    assert written == 'path: "/workspace/notes"\ntext: "ready"\n'.replace("path", '"path"').replace("text", '"text"')


def test_a_reviewers_own_machine_shows_and_digests_the_same(world: ToolWorld) -> None:
    asked = world.ask()

    class Direct:
        def request(self, _method: str, path: str, json: object | None = None) -> dict[str, Any]:  # noqa: ARG002
            found: Any = world.broker.decisions
            raw = found.call(asked.id) if path.endswith("/call") else found.show(asked.id)
            return msgspec.json.decode(msgspec.json.encode(raw))

    seen = look(Direct(), asked.id)
    assert seen.digest == asked.request_digest
    assert seen.body == PARAMS


@pytest.mark.control("REV-03")
def test_the_same_call_that_waits_or_runs_is_the_same_review_and_after_its_end_another(world: ToolWorld) -> None:
    first = world.ask()
    assert world.ask().id == first.id
    assert world.ask(params_of("publish", {"path": "/workspace/other"})).id != first.id
    world.decide(first.id, "ben")
    assert world.ask().id == first.id
    world.begin(first.id)
    assert world.ask().id == first.id
    world.end(first.id)
    assert world.ask().id != first.id


@pytest.mark.control("REV-03")
def test_the_same_claim_is_answered_again_and_another_relay_is_refused(world: ToolWorld) -> None:
    identifier = world.agreed()
    first = world.begin(identifier)
    assert world.begin(identifier) == first
    with refused("already_claimed", 409):
        world.begin(identifier, ANOTHER)
    with refused("wrong_claim", 403):
        world.end(identifier, claim=ANOTHER)
    world.end(identifier)
    for claim in (MINE, ANOTHER):
        with refused("already_claimed"):
            world.begin(identifier, claim)


@pytest.mark.control("REV-03")
@pytest.mark.regression("AGT-ADR-0030-09")
def test_of_many_relays_at_once_exactly_one_has_the_claim(world: ToolWorld) -> None:
    identifier = world.agreed()
    barrier, ends = threading.Barrier(8), []

    def run(number: int) -> None:
        barrier.wait()
        try:
            ends.append(world.begin(identifier, f"{number}" * 43).state)
        except BrokerError as error:
            ends.append(error.code)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["already_claimed"] * 7 + ["executing"]


# --- who asks, and for what --------------------------------------------------------------------------------------------------


@pytest.mark.control("RUN-05")
@pytest.mark.parametrize("caller", [NEIGHBOUR, EDGE, Caller("anonymous:", "10.0.0.1", "r"), OPERATOR])
def test_only_the_workspace_itself_asks_looks_claims_and_tells(world: ToolWorld, caller: Caller) -> None:
    with refused("not_this_workspace", 403):
        world.ask(caller=caller)
    identifier = world.agreed()
    with refused("not_this_workspace"):
        world.look(identifier, caller)
    with refused("not_this_workspace"):
        world.begin(identifier, caller=caller)
    world.begin(identifier)
    with refused("not_this_workspace"):
        world.end(identifier, caller=caller)
    assert world.end(identifier).state == "done"


def test_another_workspaces_review_does_not_exist(world: ToolWorld) -> None:
    identifier = world.ask().id
    with refused("unknown_review", 404):
        world.look(identifier, NEIGHBOUR, "ws-b")
    with refused("unknown_review"):
        world.begin(identifier, caller=NEIGHBOUR, workspace_id="ws-b")
    call = world.open(policy_digest=world.digest).id  # a call that leaves the workspace is none of a mediator's
    with refused("unknown_review"):
        world.look(call)
    assert world.look(identifier).id == identifier


@pytest.mark.control("RUN-05")
@pytest.mark.parametrize(
    ("tool", "arguments", "code"),
    [
        ("read", {"path": "/workspace/a"}, "no_review_needed"),
        ("erase", {}, "tool_not_allowed"),
        ("unlisted", {}, "tool_not_allowed"),
        ("publish", {}, "argument_not_allowed"),
        ("publish", {"path": "/etc/passwd"}, "argument_not_allowed"),
        ("publish", {"path": "/workspace/a", "more": 1}, "argument_not_allowed"),
    ],
)
def test_the_broker_judges_the_call_by_its_own_copy_of_the_policy(
    world: ToolWorld, tool: str, arguments: dict[str, object], code: str
) -> None:
    with refused(code):
        world.ask(params_of(tool, arguments))
    for server in ("other", "tracker"):  # the second one is called over HTTP, and ring 2 asks about it
        with refused("tool_not_allowed"):
            world.ask(params_of("move", {"to": "a"}), server=server)
    assert world.ask(params_of("publish", {"path": "/workspace/a"})).state == "pending"


@pytest.mark.parametrize(
    "params",
    [
        b"no JSON",
        b"[]",
        b'{"name":"publish"}',
        b'{"arguments":[],"name":"publish"}',
        b'{"arguments":{"path":"/workspace/notes"},"name":""}',
        b'{"arguments":{"path":"/workspace/notes"},"name":"publish","_meta":{}}',
        b'{"name":"publish","arguments":{"path":"/workspace/notes"}}',
        b'{"arguments":{"path":"/workspace/notes","path":"/workspace/notes"},"name":"publish"}',
        b'{"arguments": {"path":"/workspace/notes"},"name":"publish"}',
        b'{"arguments":{"path":"/workspace/notes"},"name":"publish"}\n',
    ],
)
def test_bytes_that_two_readers_could_take_for_two_calls_are_refused(world: ToolWorld, params: bytes) -> None:
    with refused("tool_call_refused", 400):
        world.ask(params)
    assert world.ask(b'{"arguments":{"path":"/workspace/notes"},"name":"publish"}').state == "pending"


def test_a_call_that_was_judged_by_another_policy_is_refused(world: ToolWorld) -> None:
    with refused("policy_changed", 409):
        world.ask(policy_digest="b" * 64)
    world.set("ws-a", policy_digest="b" * 64)
    # One that the broker holds, but not this workspace's: nothing is read of it, not even whether it has such a tool.
    for params in (params_of("publish", {"path": "/workspace/notes"}), params_of("no-such-tool", {})):
        with refused("policy_changed"):
            world.ask(params, policy_digest=world.digest)
    world.set("ws-a", policy_digest=world.digest)
    assert world.ask().state == "pending"


def test_only_an_active_workspace_asks(world: ToolWorld) -> None:
    world.set("ws-a", state="quarantined")
    with pytest.raises(BrokerError):
        world.ask()
    world.set("ws-a", state="active")
    assert world.ask().state == "pending"


def test_what_waits_is_bounded_with_the_calls_of_the_network(world: ToolWorld) -> None:
    for number in range(MAX_OPEN - 1):
        world.open(f"{number}".encode(), policy_digest=world.digest)
    last = world.ask()
    with refused("too_many_reviews", 429):
        world.ask(params_of("move", {"to": "a"}))
    world.broker.decisions.cancel(OPERATOR, last.id, Cancel("room"))
    assert world.ask(params_of("move", {"to": "a"})).state == "pending"


def test_a_workspace_asks_and_claims_so_often_and_attests_all_the_same(
    world: ToolWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool_review_routes, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(apps, "tls_caller", lambda *_: ME)
    body = {
        "workspace_id": "ws-a",
        "policy_digest": world.digest,
        "server": "files",
        "params": b64encode(PARAMS).decode(),
    }

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(apps.public_app(world.broker))
        async with httpx.AsyncClient(transport=transport, base_url="https://broker") as client:
            first = (await client.post("/v1/workspace/reviews", json=body)).json()["id"]
            path = f"/v1/workspace/reviews/{first}/claim"
            found = [(await client.post(path, json=body | {"claim": MINE})).status_code for _ in range(40)]
            others = ("/v1/workspace/reviews", "/v1/attest/nonce")
            return found + [(await client.post(path, json=body)).status_code for path in others]

    assert asyncio.run(ask()) == [409] * 39 + [429, 429, 400]


@pytest.mark.control("DEL-01")
def test_an_agent_that_asks_too_often_and_a_neighbour_keep_no_workspace_from_learning_what_was_revoked(
    world: ToolWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool_review_routes, "time", SimpleNamespace(monotonic=lambda: 0.0))
    who = [ME]
    monkeypatch.setattr(apps, "tls_caller", lambda *_: who[0])

    async def learn() -> None:
        transport = httpx.ASGITransport(apps.public_app(world.broker))
        async with httpx.AsyncClient(transport=transport, base_url="https://broker") as client:

            async def told() -> int:
                return (await client.get("/v1/workspace/tools", params={"workspace_id": "ws-a"})).status_code

            path = f"/v1/workspace/reviews/rv-{'0' * 32}/claim"
            body = {"workspace_id": "ws-a", "policy_digest": world.digest, "server": "files", "claim": MINE}
            body["params"] = b64encode(PARAMS).decode()
            asked = [(await client.post(path, json=body)).status_code for _ in range(41)]
            assert asked == [404] * 40 + [429]
            who[0] = NEIGHBOUR
            assert {await told() for _ in range(41)} == {403}
            who[0] = ME
            assert [await told() for _ in range(41)] == [200] * 40 + [429]

    asyncio.run(learn())


# --- what ends it ------------------------------------------------------------------------------------------------------------


@pytest.mark.control("REV-02")
@pytest.mark.regression("AGT-ADR-0030-06")
def test_a_denial_wins_also_after_an_approval(world: ToolWorld) -> None:
    identifier = world.agreed()
    world.decide(identifier, "cleo", "deny")
    with refused("review_denied", 409):
        world.begin(identifier)
    assert world.look(identifier).detail == "denied by cleo"
    assert world.begin(world.agreed()).state == "executing"


def test_the_sponsor_does_not_approve_what_the_own_agent_asks_for(world: ToolWorld) -> None:
    identifier = world.ask().id
    with refused("self_approval"):
        world.decide(identifier, "ada")
    assert world.decide(identifier, "ben")["state"] == "approved"


@pytest.mark.control("REV-02")
def test_policy_says_how_many_of_whom_decide_on_a_tool_and_within_which_time(world: ToolWorld) -> None:
    params = params_of("ship", {})
    asked = world.ask(params)
    assert (asked.quorum, asked.expires_at) == (2, iso(world.now + timedelta(hours=2)))
    world.decide(asked.id, "ben")
    with refused("not_approved"):
        world.begin(asked.id, params=params)
    world.decide(asked.id, "cleo")
    assert world.begin(asked.id, params=params).state == "executing"


@pytest.mark.regression("AGT-ADR-0030-04")
def test_nobody_decided_in_time_and_a_cancelled_one_is_not_claimed(world: ToolWorld) -> None:
    late, cancelled = world.agreed(), world.agreed(params_of("move", {"to": "b"}))
    world.broker.decisions.cancel(OPERATOR, cancelled, Cancel("not needed"))
    with refused("review_cancelled"):
        world.begin(cancelled, params=params_of("move", {"to": "b"}))
    world.now += timedelta(days=1)
    assert world.look(late).state == "expired"
    with refused("review_expired"):
        world.begin(late)


@pytest.mark.control("REV-03")
@pytest.mark.parametrize(
    "changes",
    [
        {"params": params_of("publish", {"path": "/workspace/notes", "text": "other"})},
        {"server": "other"},
    ],
)
@pytest.mark.regression("AGT-ADR-0030-02")
@pytest.mark.regression("AGT-ADR-0030-03")
def test_other_bytes_than_people_saw_are_not_claimed(world: ToolWorld, changes: dict[str, Any]) -> None:
    identifier = world.agreed()
    with refused("call_changed", 409):
        world.begin(identifier, **changes)
    assert world.events(identifier)[-1]["status"] == "Failure"
    assert world.begin(identifier).state == "executing"


@pytest.mark.control("REV-03")
def test_bytes_that_were_changed_in_the_database_are_never_claimed(world: ToolWorld) -> None:
    identifier, other = world.agreed(), world.agreed(params_of("move", {"to": "c"}))
    with world.broker.services.store.write() as tx:
        stolen = tx.connection.execute(select(reviews.c.call).where(reviews.c.id == other)).scalar_one()
        tx.connection.execute(reviews.update().where(reviews.c.id == identifier).values(call=stolen))
    with refused("bytes_changed", 409):
        world.begin(identifier)
    assert world.look(identifier).state == "cancelled"
    assert world.begin(other, params=params_of("move", {"to": "c"})).state == "executing"


@pytest.mark.control("REV-03")
@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"policy_digest": "b" * 64}, "policy_changed"),
        ({"state": "quarantined"}, "workspace_not_active"),
        ({"agent_id": "agent-9"}, "agent_retired"),
    ],
)
def test_at_the_claim_policy_workspace_and_agent_are_looked_at_again(
    world: ToolWorld, values: dict[str, Any], code: str
) -> None:
    identifier = world.agreed()
    world.set("ws-a", **values)
    with refused(code, 409):
        world.begin(identifier)
    assert world.look(identifier).state == "cancelled"
    world.set("ws-a", policy_digest=world.digest, state="active", agent_id="agent-1")
    assert world.begin(world.agreed()).state == "executing"


def test_a_lapsed_lease_waits_and_loses_nothing(world: ToolWorld) -> None:
    identifier = world.agreed()
    world.set("ws-a", lease_expires_at=iso(world.now))
    with refused("lease_lapsed", 409):
        world.begin(identifier)
    world.later(seconds=5)
    world.set("ws-a", lease_expires_at=iso(world.now.replace(hour=9)))
    assert world.begin(identifier).state == "executing"


@pytest.mark.regression("AGT-ADR-0030-03")
def test_a_claim_under_another_policy_than_the_review_is_refused(world: ToolWorld) -> None:
    identifier = world.agreed()
    with refused("policy_changed"):
        world.begin(identifier, policy_digest="b" * 64)
    assert world.begin(identifier).state == "executing"


def test_an_approval_that_no_longer_counts_is_none(world: ToolWorld) -> None:
    identifier = world.agreed()
    world.broker.reviewers.retire(OPERATOR, "ben", Retire("left"))
    with refused("not_approved"):
        world.begin(identifier)
    assert world.look(identifier).state == "pending"
    world.decide(identifier, "cleo")
    assert world.begin(identifier).state == "executing"


def test_an_agent_with_delegations_asks_and_claims_under_one_that_counts(world: ToolWorld) -> None:
    early = world.agreed(params_of("move", {"to": "d"}))
    wanted = Issue(workspace_id="ws-a", task="t", resources=(Resource("api.example.com"),), duration_s=3600)
    given = world.broker.delegations.issue(OPERATOR, wanted)["id"]
    identifier = world.agreed()
    assert world.broker.decisions.show(identifier)["delegation"] == given
    world.broker.delegations.revoke(OPERATOR, given, Revoke("task done"))
    with refused("delegation_ended"):
        world.begin(identifier)
    with refused("outside_delegation", 403):
        world.ask()
    with refused("outside_delegation"):
        world.begin(early, params=params_of("move", {"to": "d"}))
    reading = Issue(
        workspace_id="ws-a", task="t", resources=(Resource("api.example.com"),), duration_s=3600, approval="read-only"
    )
    world.broker.delegations.issue(OPERATOR, reading)
    with refused("outside_delegation"):
        world.ask()
    world.broker.delegations.issue(OPERATOR, wanted)
    assert world.begin(world.agreed()).state == "executing"


# --- crashes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.control("REV-03")
def test_a_relay_that_dies_after_its_claim_leaves_it_unknown_and_never_claimed_again(world: ToolWorld) -> None:
    identifier = world.agreed()
    world.begin(identifier)
    world.crash()
    with refused("already_claimed"):
        world.begin(identifier, ANOTHER)
    world.now += RUN_FOR
    world.broker.reviews.tick()
    found = world.look(identifier)
    assert (found.state, found.detail) == ("unknown", "the workspace did not tell in time how the call ended")
    with refused("claim_ended"):
        world.end(identifier)
    with refused("already_claimed"):
        world.begin(identifier)


@pytest.mark.parametrize("outcome", ["failed", "unknown"])
def test_what_the_workspace_tells_of_its_end_is_kept(world: ToolWorld, outcome: str) -> None:
    identifier = world.agreed()
    world.begin(identifier)
    assert world.end(identifier, outcome).state == outcome


def test_an_answer_belongs_to_done_alone(world: ToolWorld) -> None:
    identifier = world.agreed()
    world.begin(identifier)
    for outcome, digest in (("done", ""), ("failed", ANSWER)):
        with refused("malformed", 400):
            told = EndTool(workspace_id="ws-a", claim=MINE, outcome=outcome, answer_sha256=digest)  # type: ignore[arg-type]
            world.broker.tools.result(ME, identifier, told)
    assert world.end(identifier).state == "done"


# --- what every review has ---------------------------------------------------------------------------------------------------


@pytest.mark.control("REV-02")
def test_a_receipt_names_the_tool_and_is_verified_without_the_broker(world: ToolWorld) -> None:
    identifier = world.agreed()
    world.begin(identifier)
    world.end(identifier)
    found = verify_receipt(world.broker.decisions.receipt(identifier)["receipt"], world.broker.authority.ca_pem)
    assert (found.receipt.method, found.receipt.host) == ("TOOL", "files/publish")
    assert (found.receipt.outcome, found.receipt.answer_sha256) == ("done", ANSWER)
    assert found.receipt.rule == "mcp.servers.files.tools.publish"


def test_no_perimeter_claims_or_sees_it_and_it_is_not_read_back(world: ToolWorld) -> None:
    identifier = world.agreed()
    assert world.claim() is None
    with refused("unknown_review"):
        world.view(identifier)
    world.begin(identifier)
    world.end(identifier, "unknown")
    with refused("nothing_to_read_back"):
        world.broker.reviews.read_backs.again(OPERATOR, identifier, ReadAgain("look"))


def test_a_broken_glass_lets_it_through_and_an_overdue_look_holds_the_next_back(tmp_path: Path) -> None:
    world = ToolWorld(tmp_path, break_glass=BreakGlassSettings(group="keys", review_within_s=3600))
    for name in ("dora", "emil"):
        world.keys[name] = Ed25519PrivateKey.generate()
        world.reviewer(name, "keys")
    identifier = world.ask().id
    for name in ("dora", "emil"):
        given = world.broker.decisions.nonce(identifier, AskNonce(name))
        until = given["break_glass_until"]
        world.decide(identifier, name, "break_glass", nonce=given["nonce"], not_after=until, comment="urgent")
    assert world.begin(identifier).state == "executing"
    world.end(identifier)
    next_one = world.agreed(params_of("move", {"to": "e"}))
    world.later(hours=1)
    with refused("after_review_overdue"):
        world.begin(next_one, params=params_of("move", {"to": "e"}))
    given = world.broker.decisions.nonce(identifier, AskNonce("cleo"))
    until = given["after_review_until"]
    world.decide(identifier, "cleo", "uphold", nonce=given["nonce"], not_after=until, comment="right")
    assert world.begin(next_one, params=params_of("move", {"to": "e"})).state == "executing"


def test_people_are_told_that_it_waits_without_a_word_of_the_agent(tmp_path: Path) -> None:
    hook = Webhook(name="chat", url="https://chat.example.com/hook", secret_file="/nowhere/chat")
    world = ToolWorld(tmp_path, notifications=(hook,))
    world.ask()
    with world.broker.services.store.read() as connection:
        (row,) = connection.execute(select(notifications)).all()
    facts = json.loads(row.body)["data"]
    assert facts["title"] == "A call of a tool of ws-a waits for maintainers"
    assert not {"method", "host", "gate"} & facts.keys()
    assert "notes" not in row.body


def test_the_bytes_go_a_week_after_the_end_and_the_review_stays(world: ToolWorld) -> None:
    identifier = world.agreed()
    world.begin(identifier)
    world.end(identifier)
    assert world.broker.decisions.show(identifier)["rendering"]
    world.now += KEEP
    world.broker.reviews.tick()
    shown = world.broker.decisions.show(identifier)
    assert (shown["rendering"], shown["answer_sha256"]) == (None, ANSWER)
