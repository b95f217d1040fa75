"""Granted ports on the page of a workspace: who sees, grants and ends them, what the page says where nothing can be granted."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from portal_world import OPERATOR, ORIGIN, ROLES, Outline, World

from saw.broker.clock import iso
from saw.broker.forwarding_settings import ForwardingSettings
from saw.broker.forwards import GrantForward, RevokeForward
from saw.broker.operator_roles import ALLOWED
from saw.broker.schema import sso_sessions

pytestmark = pytest.mark.control("ID-02")

RULES = ForwardingSettings(("3000-3999", "8080"), max_hours=4, blueprints=("coding",))
SCRIPT = "</td><script>alert(1)</script>"
ADA = "user:ada@example.com"
GRANT = ALLOWED["POST", "/v1/forwards"]
NUMBERS = count(10)
FORM = {"port": "3000", "hours": "2", "reason": "look at the form"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world in which each test has a workspace of its own."""
    found = World(tmp_path_factory.mktemp("ports"), operate=True, forwarding=RULES)
    yield found
    found.close()


@pytest.fixture
def ws(world: World) -> str:
    """A workspace of ada's that has no grant."""
    number = next(NUMBERS)
    world.workspace(f"ws-p{number}", number, "ada@example.com")
    return f"ws-p{number}"


def grants(world: World, workspace: str) -> list[dict[str, Any]]:
    return list(world.broker.forwards.listed(workspace, everything=True)["forwards"])


def grant(world: World, workspace: str, to: str = ADA, **changes: Any) -> str:
    wanted = {"workspace_id": workspace, "port": 3000, "to": to, "for_s": 3600, "reason": "look at it", **changes}
    return str(world.broker.forwards.grant(OPERATOR, GrantForward(**wanted))["id"])


def ports_of(world: World, who: str, workspace: str, query: str = "") -> str:
    """Return what the page of the workspace says of its ports."""
    text = world[who].get(f"/workspaces/{workspace}{query}").text
    return text.partition('<section aria-labelledby="ports">')[2].partition("</section>")[0]


@pytest.mark.control("ID-01")
@pytest.mark.parametrize(
    ("who", "status"), [("ada", 403), ("ben", 404), ("cleo", 404), ("dan", 303), ("eve", 303), ("fay", 403)]
)
def test_whoever_may_make_the_call_grants_a_port_to_the_sponsor(world: World, ws: str, who: str, status: int) -> None:
    assert (status == 303) == bool(GRANT & set(ROLES[who]))
    assert (f'action="/workspaces/{ws}/ports"' in ports_of(world, who, ws)) == (status == 303)
    before = len(world.audited("forward.grant"))
    answer = world[who].post(f"/workspaces/{ws}/ports", **FORM)
    assert answer.status_code == status, answer.text
    given = [(one["port"], one["to"], one["granted_by"], one["reason"]) for one in grants(world, ws)]
    assert given == ([(3000, ADA, f"user:{who}@example.com", FORM["reason"])] if status == 303 else [])
    wanted = {303: "Success", 403: "Failure"}.get(status)
    assert world.audited("forward.grant")[before:] == ([(f"user:{who}@example.com", wanted)] if wanted else [])
    if status == 303:
        assert answer.headers["location"] == f"/workspaces/{ws}#ports"
        until = iso(world.now + timedelta(hours=2))
        assert all(said in ports_of(world, "fay", ws) for said in ("3000", ADA, f'datetime="{until}"', FORM["reason"]))


@pytest.mark.parametrize(
    ("who", "to", "status"),
    [
        ("ada", ADA, 303),
        ("dan", ADA, 303),
        ("eve", ADA, 303),
        ("ada", "operator:root", 403),
        ("fay", ADA, 403),
        ("ben", ADA, 404),
    ],
)
def test_a_grant_is_ended_by_those_who_may_and_by_whom_it_is_for(
    world: World, ws: str, who: str, to: str, status: int
) -> None:
    one = grant(world, ws, to=to)
    assert (f"/forwards/{one}/revoke" in ports_of(world, who, ws)) == (status == 303)
    before = len(world.audited("forward.revoke"))
    answer = world[who].post(f"/forwards/{one}/revoke", reason="done")
    assert answer.status_code == status, answer.text
    (found,) = grants(world, ws)
    ended = (found["state"], found["revoked_by"], found["revoked_reason"])
    assert ended == (("revoked", f"user:{who}@example.com", "done") if status == 303 else ("granted", None, None))
    wanted = {303: "Success", 403: "Failure"}.get(status)
    assert world.audited("forward.revoke")[before:] == ([(f"user:{who}@example.com", wanted)] if wanted else [])
    if status == 303:
        assert "No port is granted now." in ports_of(world, who, ws)
        over = ports_of(world, who, ws, "?ports=all")
        assert f'revoked <time datetime="{found["revoked_at"]}"' in over
        assert f"/forwards/{one}/revoke" not in over


def test_the_page_of_an_unknown_grant_is_that_of_anothers(world: World, ws: str) -> None:
    one = grant(world, "ws-b", "user:ben@example.com")
    for path in (f"/forwards/{one}/revoke", "/forwards/fwd-none/revoke"):
        answer = world["ada"].post(path, reason="x")
        assert (answer.status_code, "<code>unknown_grant</code>" in answer.text) == (404, True)
    assert one not in world["ada"].get(f"/workspaces/{ws}?ports=all").text
    assert world["ben"].post(f"/forwards/{one}/revoke", reason="x").status_code == 303


@pytest.mark.control("ID-01")
def test_a_grant_and_its_end_need_the_providers_fresh_word(world: World, ws: str) -> None:
    one = grant(world, ws, port=8080)
    with world.broker.services.store.write() as tx:
        tx.connection.execute(sso_sessions.update().values(checked_at=iso(world.now - timedelta(minutes=10))))
    dan = world["dan"]
    assert dan.get(f"/workspaces/{ws}").status_code == 200
    for path, fields in ((f"/workspaces/{ws}/ports", FORM), (f"/forwards/{one}/revoke", {"reason": "x"})):
        answer = dan.post(path, **fields)
        assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in?to=/")
    assert [item["state"] for item in grants(world, ws)] == ["granted"]
    with world.broker.services.store.write() as tx:
        tx.connection.execute(sso_sessions.update().values(checked_at=iso(world.now)))
    for path, fields in ((f"/workspaces/{ws}/ports", FORM), (f"/forwards/{one}/revoke", {"reason": "x"})):
        assert dan.post(path, **fields).headers["location"] == f"/workspaces/{ws}#ports"
    assert sorted(item["state"] for item in grants(world, ws)) == ["granted", "revoked"]


@pytest.mark.control("ID-01")
def test_a_change_needs_a_page_of_ones_own_session_and_of_this_site(world: World, ws: str) -> None:
    one = grant(world, ws, port=8080)
    dan = world["dan"]
    changes: dict[str, dict[str, str]] = {f"/workspaces/{ws}/ports": FORM, f"/forwards/{one}/revoke": {"reason": "x"}}
    for path, fields in changes.items():
        for token in ("", world["eve"].csrf()):
            answer = dan.post(path, token, **fields)
            assert (answer.status_code, "<code>csrf</code>" in answer.text) == (403, True)
        far = dan.ask("POST", path, data={"csrf": dan.csrf(), **fields}, headers={"origin": "https://evil.example"})
        assert (far.status_code, "<code>csrf</code>" in far.text) == (403, True)
        assert world["nobody"].post(path, "x", **fields).headers["location"].startswith("/sign-in")
    assert [item["state"] for item in grants(world, ws)] == ["granted"]
    for path, fields in changes.items():
        assert dan.post(path, **fields).status_code == 303


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"port": "4000"}, 403, "port_not_allowed"),
        ({"hours": "5"}, 403, "grant_too_long"),
        ({"hours": "0"}, 400, "malformed"),
        ({"hours": "25"}, 400, "malformed"),
        ({"port": "http"}, 400, "malformed"),
        ({"port": ""}, 400, "malformed"),
        ({"reason": " "}, 400, "malformed"),
        ({"to": "user:ben@example.com"}, 400, "malformed"),
    ],
)
def test_what_may_not_be_granted_is_refused_in_words(
    world: World, ws: str, changes: dict[str, str], status: int, code: str
) -> None:
    answer = world["dan"].post(f"/workspaces/{ws}/ports", **{**FORM, **changes})
    assert (answer.status_code, f"<code>{code}</code>" in answer.text) == (status, True), answer.text
    assert grants(world, ws) == []
    assert world["dan"].post(f"/workspaces/{ws}/ports", **FORM).status_code == 303


def test_another_grant_in_the_way_is_named_and_the_same_form_twice_is_one_grant(world: World, ws: str) -> None:
    assert [world["dan"].post(f"/workspaces/{ws}/ports", **FORM).status_code for _ in range(2)] == [303, 303]
    (one,) = grants(world, ws)
    answer = world["eve"].post(f"/workspaces/{ws}/ports", **{**FORM, "hours": "3"})
    assert answer.status_code == 409
    assert all(said in answer.text for said in (one["id"], "<code>granted_already</code>"))


def test_nobody_is_offered_to_grant_to_themselves(world: World) -> None:
    boss = world.sign_in("gus", ("user", "operator"))
    world.workspace("ws-g", 4, "gus@example.com")
    text = boss.get("/workspaces/ws-g").text
    assert "Nobody grants a port to themselves" in text
    assert "/workspaces/ws-g/ports" not in text
    refused = boss.post("/workspaces/ws-g/ports", **FORM)
    assert (refused.status_code, "<code>own_grant</code>" in refused.text) == (403, True)
    assert grants(world, "ws-g") == []
    assert world["dan"].post("/workspaces/ws-g/ports", **FORM).status_code == 303


def test_what_stands_in_the_way_is_said_and_refused(world: World) -> None:
    world.workspace("ws-cut", next(NUMBERS), "ada@example.com", state="quarantined")
    world.workspace("ws-other", next(NUMBERS), "ada@example.com", blueprint="research")
    for name, said, code in (
        ("ws-cut", "nobody may enter it", "workspace_not_admitted"),
        ("ws-other", "No port of workspaces of research is forwarded.", "blueprint_not_allowed"),
    ):
        text = ports_of(world, "dan", name)
        assert (said in text, "<form" in text) == (True, False)
        answer = world["dan"].post(f"/workspaces/{name}/ports", **FORM)
        assert (answer.status_code, f"<code>{code}</code>" in answer.text) == (403, True)


@pytest.mark.parametrize(
    ("operate", "rules", "said", "code"),
    [
        (False, RULES, "These pages do not operate", "operate_off"),
        (True, None, "<code>broker_forwarding</code>", "forwarding_off"),
    ],
)
def test_where_it_is_off_the_page_says_how_it_is_switched_on(
    tmp_path: Path, operate: bool, rules: ForwardingSettings | None, said: str, code: str
) -> None:
    world = World(tmp_path, operate=operate, forwarding=rules)
    try:
        text = ports_of(world, "dan", "ws-a")
        assert (said in text, "<form" in text) == (True, False)
        answer = world["dan"].post("/workspaces/ws-a/ports", **FORM)
        assert (answer.status_code, f"<code>{code}</code>" in answer.text) == (403, True)
        assert grants(world, "ws-a") == []
    finally:
        world.close()


def test_without_operate_a_grant_is_ended_all_the_same(tmp_path: Path) -> None:
    world = World(tmp_path, forwarding=RULES)
    try:
        one = grant(world, "ws-b", "user:ben@example.com")
        assert world["eve"].post(f"/forwards/{one}/revoke", reason="leak").status_code == 303
        assert [item["state"] for item in grants(world, "ws-b")] == ["revoked"]
    finally:
        world.close()


def test_the_sponsor_is_told_how_to_reach_what_is_granted_and_forwarded(world: World, ws: str) -> None:
    one = grant(world, ws)
    grant(world, ws, port=3001, to="operator:root")
    assert "saw expose" not in ports_of(world, "dan", ws)
    said = ports_of(world, "ada", ws)
    assert f"saw expose {ws} --port 3000</pre>" in said
    world.broker.forwards.revoke(OPERATOR, one, RevokeForward("done"))
    assert "saw expose" not in ports_of(world, "ada", ws)


def test_a_grant_that_is_over_is_said_to_be(world: World, ws: str) -> None:
    assert "No port was ever granted." in ports_of(world, "ada", ws)
    grant(world, ws, for_s=60)
    world.now += timedelta(minutes=2)
    text = ports_of(world, "ada", ws)
    assert "No port is granted now." in text
    assert "Grants that are over too (1)" in text
    assert "is over" in ports_of(world, "ada", ws, "?ports=all")
    assert world["ada"].get(f"/workspaces/{ws}?ports=some").status_code == 400


@pytest.mark.control("ID-01")
def test_what_others_wrote_is_text_and_the_part_needs_no_script(world: World, ws: str) -> None:
    one = grant(world, ws, reason=SCRIPT)
    grant(world, ws, port=3001)
    world.broker.forwards.revoke(OPERATOR, one, RevokeForward(SCRIPT))
    for who in ("ada", "dan"):
        page = world[who].get(f"/workspaces/{ws}?ports=all").text
        assert "<script>" not in page
        assert page.count("&lt;/td&gt;&lt;script&gt;") == 2
        assert Outline(page).problems == []
    assert world["dan"].ask("POST", f"/workspaces/{ws}/ports", headers={"origin": ORIGIN}).status_code == 403
