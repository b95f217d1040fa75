"""Delegations page by page and as they change, asked for once under a key, and what of tools a workspace is told."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from delegations_before import AFTER, fill_before, found_after
from review_world import OPERATOR, refused
from sqlalchemy import create_engine
from starlette.datastructures import QueryParams
from tool_world import ME, NEIGHBOUR, ToolWorld

from saw.broker import delegation_list, handed_tools
from saw.broker.clock import iso
from saw.broker.context import Caller
from saw.broker.delegation_list import Wanted
from saw.broker.delegation_views import DelegationChanges, DelegationPage, Issued, Revoked, Signed
from saw.broker.delegations import Issue, Revoke
from saw.broker.errors import ForbiddenError, MalformedError
from saw.broker.handed_tools import ToolDelegations
from saw.broker.store import Store
from saw.broker.wake import Waker
from saw.policy import handed_tools as policy_handed_tools
from saw.policy.delegation import Resource, Tools
from saw.policy.handed_tools import HandedTools, read_handed
from saw.review.tool import params_of

pytestmark = pytest.mark.control("DEL-01")


class Desk(ToolWorld):
    """A world with the calls about delegations at hand."""

    def hand(self, workspace: str = "ws-a", **changes: Any) -> dict[str, Any]:
        wanted = {
            "workspace_id": workspace,
            "task": "notes",
            "resources": (Resource("api.example.com"),),
            "duration_s": 3600,
        }
        return self.broker.delegations.issue(OPERATOR, Issue(**{**wanted, **changes}))

    def revoke(self, delegation: str) -> dict[str, Any]:
        return self.broker.delegations.revoke(OPERATOR, delegation, Revoke("done"))

    def listed(self, **asked: Any) -> dict[str, Any]:
        found = self.broker.delegations.listed(Wanted(**asked))
        msgspec.convert(found, DelegationPage)
        return found

    def changed(self, after: int) -> dict[str, Any]:
        with self.broker.services.store.read() as connection:
            found = delegation_list.changes(connection, after, self.now)
        msgspec.convert(found, DelegationChanges)
        return found

    def told(self, caller: Caller = ME, workspace: str = "ws-a") -> HandedTools:
        return ToolDelegations(self.broker.services).told(caller, workspace)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def ids(found: dict[str, Any]) -> list[str]:
    return [one["id"] for one in found["delegations"]]


# --- Pages and changes ------------------------------------------------------------------------------------------------


def test_pages_hold_every_delegation_once_the_newest_first(desk: Desk) -> None:
    made = []
    for number in range(7):
        made.append(desk.hand()["id"])
        desk.now += timedelta(seconds=number % 2)  # several within one second
    every = ids(desk.listed())
    assert sorted(every) == sorted(made)
    assert every[0] in made[-2:]
    pages: list[list[str]] = []
    after: str | None = ""
    while after is not None:
        found = desk.listed(after=after, limit=2)
        pages.append(ids(found))
        after = found["next"]
    assert [len(page) for page in pages] == [2, 2, 2, 1]
    assert [one for page in pages for one in page] == every
    with pytest.raises(MalformedError, match="no page ends with"):
        desk.listed(after="dlg-none")


def test_filters_tell_what_counts_from_what_has_ended_and_what_was_revoked(desk: Desk) -> None:
    short, revoked, active = desk.hand(duration_s=60)["id"], desk.hand()["id"], desk.hand()["id"]
    other = desk.hand("ws-b")["id"]
    desk.now += timedelta(seconds=60)
    desk.revoke(revoked)
    states = {state: set(ids(desk.listed(state=(state,)))) for state in ("active", "ended", "revoked")}
    assert states == {"active": {active, other}, "ended": {short}, "revoked": {revoked}}
    assert {one["state"] for one in desk.listed(state=("ended",))["delegations"]} == {"ended"}
    assert set(ids(desk.listed(workspace_id=("ws-a",), state=("active", "ended")))) == {short, active}
    with desk.broker.services.store.read() as connection:
        assert delegation_list.count(connection, Wanted(("ws-a",), ("ended", "revoked")), desk.now) == 2
    with refused("unknown_workspace", 404):
        desk.listed(workspace_id=("ws-none",))


@pytest.mark.parametrize("query", ["state=gone", "limit=0", "limit=1001", "after=a&after=b", "sponsor=ada"])
def test_a_query_that_could_be_misread_is_refused(query: str) -> None:
    assert delegation_list.wanted(QueryParams("state=active&state=ended&limit=1000&workspace_id=a")).limit == 1000
    with pytest.raises(MalformedError):
        delegation_list.wanted(QueryParams(query))


def test_a_delegation_has_a_version_and_tells_both_its_changes_in_order(desk: Desk) -> None:
    seq = desk.listed()["seq"]
    first, second = desk.hand(), desk.hand(tools=(Tools(server="files"),))
    msgspec.convert(first, Issued)
    msgspec.convert(desk.broker.delegations.show(second["id"]), Signed)
    part = desk.hand(parent=first["id"], duration_s=600)
    assert {one["version"] for one in (first, second, part)} == {1}
    found = desk.changed(seq)
    assert ids(found) == [first["id"], second["id"], part["id"]]
    assert desk.changed(found["next"]) == {"delegations": [], "next": found["next"]}
    ended = desk.revoke(first["id"])
    msgspec.convert(ended, Revoked)
    assert (ended["version"], ended["revoked"]) == (2, [first["id"], part["id"]])
    after = desk.changed(found["next"])
    assert set(ids(after)) == {first["id"], part["id"]}
    assert {(one["state"], one["version"], one["seq"]) for one in after["delegations"]} == {
        ("revoked", 2, after["next"])
    }
    assert not desk.revoke(first["id"])["changed"]
    assert ids(desk.changed(after["next"])) == []


def test_changes_that_came_at_once_are_not_torn_apart(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = desk.hand()["id"]
    for _ in range(4):
        desk.hand(parent=whole, duration_s=600)
    seq = desk.listed()["seq"]
    desk.revoke(whole)
    alone = desk.hand()["id"]
    monkeypatch.setattr(delegation_list, "LARGEST_PAGE", 2)
    found = desk.changed(seq)
    assert len(found["delegations"]) == 5
    assert ids(desk.changed(found["next"])) == [alone]


def test_the_same_key_is_the_same_delegation_and_with_another_request_none(desk: Desk) -> None:
    made = desk.hand(idempotency_key="k-1")
    again = desk.hand(idempotency_key="k-1")
    assert (made["changed"], again["changed"], again["id"]) == (True, False, made["id"])
    assert ids(desk.listed()) == [made["id"]]
    with refused("idempotency_mismatch", 409):
        desk.hand(idempotency_key="k-1", tools=())
    stranger = Caller("operator:other", "operator-socket", "request-9")
    wanted = Issue(workspace_id="ws-a", task="x", resources=(Resource("a.test"),), duration_s=60, idempotency_key="k-1")
    assert desk.broker.delegations.issue(stranger, wanted)["changed"]
    with refused("delegation_wider", 403):
        desk.hand(idempotency_key="k-2", parent=made["id"], duration_s=7200)
    assert desk.hand(idempotency_key="k-2", parent=made["id"], duration_s=600)["changed"], (
        "what is refused leaves no key"
    )


def test_delegations_from_before_have_their_versions_and_name_no_tools(tmp_path: Path) -> None:
    path = tmp_path / "broker.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection, connection.begin():
        fill_before(connection)
    engine.dispose()
    store = Store.open_sqlite(path, Waker())
    with store.read() as connection:
        assert found_after(connection) == AFTER
    store.close()


# --- Tools ------------------------------------------------------------------------------------------------------------


def test_a_workspace_is_told_the_tools_of_its_own_delegations_and_nothing_else(desk: Desk) -> None:
    desk.hand()
    assert desk.told() == HandedTools(bound=False)
    named = (Tools(server="files", tools=("read",)),)
    made = desk.hand(tools=named)
    found = desk.told()
    assert found.bound
    assert [one.delegation for one in found.grants if one.tools == named] == [made["id"]]
    assert [one.tools for one in found.grants if one.delegation != made["id"]] == [msgspec.UNSET]
    assert b"api.example.com" not in msgspec.json.encode(found)
    assert b"notes" not in msgspec.json.encode(found)
    assert desk.told(NEIGHBOUR, "ws-b") == HandedTools(bound=False)
    for caller in (NEIGHBOUR, OPERATOR, Caller("anonymous:", "10.77.0.9", "request-6")):
        with refused("not_this_workspace", 403):
            desk.told(caller)


def test_a_workspace_stays_bound_when_what_named_tools_has_ended(desk: Desk) -> None:
    revoked = desk.hand(tools=())["id"]
    desk.hand(tools=(Tools(server="files"),), duration_s=60)
    assert len(desk.told().grants) == 2
    desk.revoke(revoked)
    assert len(desk.told().grants) == 1
    desk.now += timedelta(seconds=60)
    assert desk.told() == HandedTools(bound=True)


def test_a_workspace_is_told_no_more_than_it_reads_and_what_ends_last_first(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = (Tools(server="files", tools=tuple(f"{'t' * 90}-{number}" for number in range(64))),)
    made = [desk.hand(tools=named, duration_s=3600 + number)["id"] for number in range(4)]
    whole = desk.told()
    assert [one.delegation for one in whole.grants] == made[::-1]
    size = len(msgspec.json.encode(whole))
    for bound, told in ((size + 64, 4), (size - 1, 3), (size // 2, 1), (100, 0)):
        monkeypatch.setattr(handed_tools, "MAX_HANDED", bound)
        monkeypatch.setattr(policy_handed_tools, "MAX_HANDED", bound)
        found = read_handed(msgspec.json.encode(desk.told()))
        assert (found.bound, found.grants) == (True, whole.grants[:told])


def test_people_are_asked_about_a_tool_that_was_handed_out_and_about_no_other(desk: Desk) -> None:
    move, publish = params_of("move", {"to": "d"}), params_of("publish", {"path": "/workspace/a"})
    early = desk.agreed(move)
    made = desk.hand(tools=(Tools(server="files", tools=("publish",)),))["id"]
    assert desk.broker.decisions.show(desk.ask(publish).id)["delegation"] == made
    with pytest.raises(ForbiddenError, match="covers the tool move of files"):
        desk.ask(move)
    with refused("outside_delegation", 403):
        desk.begin(early, params=move)
    desk.hand(tools=(Tools(server="*", tools=("mo*",)),), approval="read-only")
    with refused("outside_delegation"):
        desk.ask(move)
    desk.hand(tools=(Tools(server="*", tools=("mo*",)),))
    assert desk.begin(early, params=move).state == "executing"


def test_what_is_handed_out_is_in_the_trail_with_its_tools(desk: Desk) -> None:
    made = desk.hand(tools=(Tools(server="files", tools=("read", "list_*")),))
    events = [one.event for one in desk.broker.trail.page("broker", 0, 10_000)["events"]]
    (event,) = [one for one in events if one.get("entity") == {"type": "delegation", "uid": made["id"]}]
    assert event["unmapped"]["saw"]["tools"] == ["files read list_*"]
    assert list(made["tools"]) == [{"server": "files", "tools": ("read", "list_*")}]
    assert "tools" not in desk.hand()
    assert iso(desk.now) == made["issued_at"]
