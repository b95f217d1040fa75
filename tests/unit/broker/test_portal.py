"""The pages about workspaces: who sees and does what, by role and sponsorship, and what the pages say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from portal_world import OPERATOR, ORIGIN, POLICY, RELEASED, ROLES, Outline, World

from saw.broker.clock import iso
from saw.broker.delegation_list import Wanted
from saw.broker.registry import Step
from saw.broker.review_decisions import Cancel
from saw.broker.schema import people, reviews, sso_sessions
from saw.broker.sso.pages import Pages, page_routes
from saw.broker.sso.web import HEADERS

SCRIPT = "</td><script>alert(1)</script>"
NOBODY = "nobody"
ALL = {"dan", "eve", "fay"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world that is only looked at."""
    world = World(tmp_path_factory.mktemp("portal"))
    for name in ("ws-a", "ws-b"):
        world.delegation(name)
        world.session(name, command="git status", closed="c" * 64)
        world.session(name)
        world.review(name)
    yield world
    world.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.close()


def session_of(world: World, workspace: str) -> str:
    return str(world.broker.sessions.list(workspace)["sessions"][0]["id"])


def pages_of(world: World, workspace: str) -> list[str]:
    return [
        f"/workspaces/{workspace}", f"/workspaces/{workspace}?engagements=all", f"/workspaces/{workspace}/sessions",
        f"/sessions/{session_of(world, workspace)}", f"/reviews?show=all&workspace={workspace}",
    ]  # fmt: skip


@pytest.mark.control("ID-01")
@pytest.mark.parametrize("who", [*ROLES, NOBODY])
def test_each_role_sees_its_own_pages_and_no_others(shared: World, who: str) -> None:
    visitor = shared[who]
    wanted = {
        "/": {NOBODY: 303, "cleo": 303}.get(who, 200),
        "/reviews": 303 if who == NOBODY else 200,
        "/passkeys": 303 if who == NOBODY else 200,
        "/audit": {NOBODY: 303, "eve": 200, "fay": 200}.get(who, 403),
        "/audit/download": {NOBODY: 303, "eve": 200, "fay": 200}.get(who, 403),
    }
    for workspace, sponsor in (("ws-a", "ada"), ("ws-b", "ben")):
        seen = 303 if who == NOBODY else 200 if who in {sponsor, *ALL} else 404
        wanted |= dict.fromkeys(pages_of(shared, workspace), seen)
    answers = {path: visitor.get(path) for path in wanted}
    assert {path: answer.status_code for path, answer in answers.items()} == wanted
    moved = {answer.headers["location"].partition("?")[0] for answer in answers.values() if answer.status_code == 303}
    assert moved == ({"/sign-in"} if who == NOBODY else {"/reviews"} if who == "cleo" else set())
    for answer in answers.values():
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS


@pytest.mark.control("ID-01")
def test_nothing_but_the_way_in_is_answered_without_a_session(shared: World) -> None:
    way_in = {"/sign-in", "/login", "/callback", "/logout/backchannel", "/v1/sso/device", "/v1/sso/device/poll"}
    assert shared.broker.sso is not None
    routes = page_routes(Pages(shared.broker.sso, shared.broker), shared.broker)
    assert way_in < {route.path for route in routes}
    asked = [(route, method) for route in routes if route.path not in way_in for method in route.methods or ()]
    assert len(asked) > 25
    for route, method in asked:
        path = route.path.replace("{id}", "ws-a")
        answer = shared[NOBODY].ask(method, path, json={}) if method == "POST" else shared[NOBODY].ask(method, path)
        # a page sends to the sign-in, a call is refused as such
        sent = answer.headers.get("location", "").startswith("/sign-in")
        assert ((method, path), answer.status_code, sent) in (((method, path), 303, True), ((method, path), 401, False))


@pytest.mark.control("ID-01")
def test_the_first_page_has_the_persons_own_workspaces_and_all_for_those_who_look(shared: World) -> None:
    listed = {who: set(re.findall(r'href="/workspaces/([^"]+)"', shared[who].get("/").text)) for who in ROLES}
    assert listed == {"ada": {"ws-a"}, "ben": {"ws-b"}, "cleo": set(), **{one: {"ws-a", "ws-b"} for one in ALL}}


@pytest.mark.control("ID-01")
def test_anothers_workspace_session_and_engagement_answer_as_unknown_ones_do(shared: World) -> None:
    ada = shared["ada"]
    foreign = {
        "ws-b": "/workspaces/{}", session_of(shared, "ws-b"): "/sessions/{}",
        str(shared.broker.delegations.listed(Wanted(("ws-b",)))["delegations"][0]["id"]): "/delegations/{}/revoke",
    }  # fmt: skip
    for name, path in foreign.items():
        unknown = name[:-1] + ("c" if name[-1] != "c" else "d")
        ask = ada.post if path.startswith("/delegations") else ada.get
        answers = [ask(path.format(one)) for one in (name, unknown)]
        assert [answer.status_code for answer in answers] == [404, 404]
        texts = [
            re.sub(r"request <code>[^<]+", "", answer.text).replace(one, "X")
            for answer, one in zip(answers, (name, unknown), strict=True)
        ]
        assert texts[0] == texts[1]
    other = ada.get("/reviews?show=all&workspace=ws-b").text, ada.get("/reviews?show=all&workspace=ws-c").text
    assert all("unknown_workspace" in text for text in other)


@pytest.mark.control("ID-01")
def test_a_sponsor_without_the_role_user_sees_nothing_of_the_workspace(world: World) -> None:
    assert world["ada"].get("/workspaces/ws-a").status_code == 200
    with world.broker.services.store.write() as tx:
        tx.connection.execute(people.update().where(people.c.name == "ada@example.com").values(roles='["approver"]'))
    assert world["ada"].get("/workspaces/ws-a").status_code == 404


@pytest.mark.control("DEL-01")
@pytest.mark.parametrize(
    ("who", "status"), [("ada", 303), ("dan", 303), ("eve", 303), ("fay", 403), ("ben", 404), ("cleo", 404)]
)
def test_an_engagement_is_revoked_by_its_sponsor_and_by_those_who_intervene(
    world: World, who: str, status: int
) -> None:
    one = world.delegation("ws-a")
    child = world.delegation("ws-a", "a part of it", parent=one)
    assert ("/revoke" in world[who].get("/workspaces/ws-a").text) == (status == 303)
    answer = world[who].post(f"/delegations/{one}/revoke", reason="task done")
    assert answer.status_code == status, answer.text
    found = [world.broker.delegations.show(name) for name in (one, child)]
    assert [one["state"] for one in found] == ["revoked" if status == 303 else "active"] * 2
    if status == 303:
        assert (found[0]["revoked_by"], found[0]["revoked_reason"]) == (f"user:{who}@example.com", "task done")
    refused = [(f"user:{who}@example.com", "Failure")] if status == 403 else []
    assert world.audited("delegation.revoke") == refused


@pytest.mark.control("ID-03")
@pytest.mark.parametrize(
    ("who", "holder", "status"),
    [
        ("ada", "ada", 303),
        ("dan", "ada", 303),
        ("eve", "", 303),
        ("ada", "", 403),
        ("fay", "ada", 403),
        ("ben", "ada", 404),
    ],
)
def test_people_end_their_own_sessions_and_those_who_intervene_any(
    world: World, who: str, holder: str, status: int
) -> None:
    with world.broker.services.store.write() as tx:  # the bastion's rule compares the sponsor letter by letter
        tx.connection.exec_driver_sql("UPDATE workspaces SET sponsor = lower(sponsor)")
    session = world.session("ws-a", person=holder)
    assert (f"/sessions/{session}/end" in world[who].get(f"/sessions/{session}").text) == (status == 303)
    answer = world[who].post(f"/sessions/{session}/end", reason="left open")
    assert answer.status_code == status, answer.text
    shown = world.broker.sessions.show(session)
    ended = ("ending", "ended_by_operator") if status == 303 else ("open", None)
    assert (shown["state"], shown["reason"]) == ended
    wanted = {303: "Success", 403: "Failure"}.get(status)
    assert world.audited("session.end") == ([(f"user:{who}@example.com", wanted)] if wanted else [])


@pytest.mark.control("LIF-02")
@pytest.mark.parametrize(("who", "status"), [("dan", 303), ("eve", 303), ("fay", 403), ("ada", 403), ("ben", 404)])
def test_a_workspace_is_cut_off_by_operators_and_security_alone(world: World, who: str, status: int) -> None:
    assert ("/kill" in world[who].get("/workspaces/ws-a").text) == (status == 303)
    answer = world[who].post("/workspaces/ws-a/kill", confirm="ws-a", reason="scans others")
    assert answer.status_code == status, answer.text
    assert world.state("ws-a") == ("quarantined" if status == 303 else "active")
    assert world.state("ws-b") == "active"
    wanted = {303: "Success", 403: "Failure"}.get(status)
    assert world.audited("workspace.kill") == ([(f"user:{who}@example.com", wanted)] if wanted else [])


@pytest.mark.control("LIF-02")
def test_a_kill_needs_the_name_a_reason_and_the_providers_fresh_word(world: World) -> None:
    eve = world["eve"]
    for fields in ({"confirm": "ws-b", "reason": "x"}, {"confirm": "ws-a", "reason": " "}, {"reason": "x"}, {}):
        assert eve.post("/workspaces/ws-a/kill", **fields).status_code == 400
    with world.broker.services.store.write() as tx:
        tx.connection.execute(sso_sessions.update().values(checked_at=iso(world.now - timedelta(minutes=10))))
    # without a way to ask the provider its word is too old for this, and good enough to read
    assert eve.get("/workspaces/ws-a").status_code == 200
    answer = eve.post("/workspaces/ws-a/kill", confirm="ws-a", reason="scans others")
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in?to=/")
    assert world.state("ws-a") == "active"
    with world.broker.services.store.write() as tx:
        tx.connection.execute(sso_sessions.update().values(checked_at=iso(world.now)))
    assert eve.post("/workspaces/ws-a/kill", confirm="ws-a", reason="scans others").status_code == 303
    page = eve.get("/workspaces/ws-a").text
    assert "scans others" in page
    assert "/workspaces/ws-a/kill" not in page


@pytest.mark.control("ID-01")
def test_a_change_needs_a_page_of_ones_own_session_and_of_this_site(world: World) -> None:
    one, session = world.delegation("ws-a"), world.session("ws-a")
    dan, eve = world["dan"], world["eve"]
    changes = {
        f"/delegations/{one}/revoke": {"reason": "x"}, f"/sessions/{session}/end": {"reason": "x"},
        "/workspaces/ws-a/kill": {"reason": "x", "confirm": "ws-a"},
    }  # fmt: skip
    for path, fields in changes.items():
        for token in ("", eve.csrf()):
            answer = dan.post(path, token, **fields)
            assert (answer.status_code, "<code>csrf</code>" in answer.text) == (403, True)
        far = dan.ask("POST", path, data={"csrf": dan.csrf(), **fields}, headers={"origin": "https://evil.example"})
        assert (far.status_code, "<code>csrf</code>" in far.text) == (403, True)
        assert dan.get(path).status_code == 404
    assert world.broker.delegations.show(one)["state"] == "active"
    assert (world.broker.sessions.show(session)["state"], world.state("ws-a")) == ("open", "active")
    for path, fields in changes.items():
        assert dan.post(path, **fields).status_code == 303


def test_who_is_sent_to_sign_in_by_a_change_comes_back_to_the_page_that_it_was_made_on(world: World) -> None:
    for referer, back in (
        (f"{ORIGIN}/workspaces/ws-a", "/workspaces/ws-a"),
        ("https://evil.example/x", "/"),
        ("", "/"),
    ):
        answer = world[NOBODY].ask("POST", "/workspaces/ws-a/kill", headers={"referer": referer})
        assert answer.headers["location"] == f"/sign-in?to={back}"


@pytest.mark.control("ID-01")
def test_what_others_wrote_is_text_on_every_page(world: World) -> None:
    world.workspace("ws-x", 3, "ada@example.com", state_reason=SCRIPT, blueprint=SCRIPT[:40])
    one = world.delegation("ws-x", task=SCRIPT)
    session = world.session("ws-x", command=f"echo '{SCRIPT}'", closed="d" * 64)
    world.delegation("ws-a", task="x")
    assert world["ada"].post(f"/delegations/{one}/revoke", reason=SCRIPT).status_code == 303
    shown = 0
    for path in (
        "/", f"/?q={SCRIPT}", "/workspaces/ws-x?engagements=all", "/workspaces/ws-x/sessions", f"/sessions/{session}",
        f"/reviews?workspace={SCRIPT}", f"/workspaces/{SCRIPT}", f"/audit?text={SCRIPT}", "/audit?workspace=ws-x",
    ):  # fmt: skip
        text = world["eve"].get(path).text
        assert "<script>" not in text
        shown += "&lt;script&gt;" in text
    assert shown >= 8


def test_pages_have_captions_labels_and_scopes_and_need_no_script(shared: World) -> None:
    for who in ("ada", "eve"):
        for path in ("/", "/reviews?show=open", "/audit", *pages_of(shared, "ws-a")):
            answer = shared[who].get(path)
            if answer.status_code == 200:
                assert (path, Outline(answer.text).problems) == (path, [])
                assert (path, "<script" in answer.text) == (path, False)
    # the check finds what it looks for
    bad = '<table><tr><th>x</th></tr><tbody></tbody></table><input id="a"><p style="x" onclick="y"><script>z</script>'
    assert len(Outline(bad).problems) == 6


def test_a_list_is_read_page_by_page_and_searched(world: World) -> None:
    for number in range(3, 63):
        sponsor = "ada@example.com" if number % 2 else "ben@example.com"
        world.workspace(f"ws-{number:03d}", number, sponsor, state="stopped" if number > 60 else "active")
    for who, count in (("ada", 31), ("eve", 62)):
        found, path = [], "/?q=&state="
        while path:
            text = world[who].get(path).text
            page = re.findall(r'href="/workspaces/([^"]+)"', text)
            assert len(page) <= 25
            found += page
            following = re.search(r'href="([^"]+)" rel="next"', text)
            path = following[1].replace("&amp;", "&") if following else ""
        assert found == sorted(set(found))
        assert len(found) == count
    listed = lambda path: re.findall(r'href="/workspaces/([^"]+)"', world["ada"].get(path).text)  # noqa: E731
    assert listed("/?q=WS-01") == ["ws-011", "ws-013", "ws-015", "ws-017", "ws-019"]
    assert listed("/?state=stopped") == ["ws-061"]
    assert listed("/?q=ben@") == []
    assert "Nothing is found" in world["ada"].get("/?q=%25").text


@pytest.mark.parametrize(
    "path",
    ["/?state=gone", "/?q=" + "x" * 65, "/?limit=9", "/workspaces/ws-a?before=0", "/workspaces/ws-a?before=x",
     "/workspaces/ws-a/sessions?page=0", "/workspaces/ws-a/sessions?page=1001", "/reviews?show=some", "/reviews?page=-1",
     "/audit?before=0", "/audit?verdict=maybe", "/audit?since=yesterday", "/audit?since=9999-99-99", "/audit/download?after=3"],
)  # fmt: skip
def test_a_place_or_filter_that_there_is_not_is_refused(shared: World, path: str) -> None:
    answer = shared["eve"].get(path)
    assert (answer.status_code, "<code>malformed</code>" in answer.text) == (400, True)
    assert shared["eve"].get(path.partition("?")[0]).status_code == 200


def test_sessions_are_shown_with_how_they_ended_and_pages_of_them(world: World) -> None:
    for number in range(52):
        world.session("ws-a", command=f"run {number}", closed=f"{number:064x}")
    world.session("ws-a", command="still there")
    first = world["ada"].get("/workspaces/ws-a").text
    assert "still there" in first
    assert "All sessions" in first
    pages = [world["ada"].get(f"/workspaces/ws-a/sessions?page={number}").text for number in (1, 2, 3)]
    ids = [re.findall(r'href="/sessions/([^"]+)"', page) for page in pages]
    assert [len(page) for page in ids] == [50, 3, 0]
    assert len({one for page in ids for one in page}) == 53
    assert f"{51:064x}" in pages[0] + pages[1]


@pytest.mark.control("ID-02")
@pytest.mark.parametrize(
    ("who", "status"), [("ada", 200), ("eve", 200), ("fay", 200), ("dan", 403), ("cleo", 404), ("ben", 404)]
)
def test_a_recording_is_sent_to_those_who_may_have_it_and_that_is_audited(
    world: World, tmp_path: Path, who: str, status: int
) -> None:
    session = world.recorded("ws-a", tmp_path / "recording", "hello \x1b[1mthere\x1b[0m")
    page = world[who].get(f"/sessions/{session}").text
    assert (f'action="/sessions/{session}/recording"' in page) is (status == 200)
    before = len(world.audited("session.replay"))
    answer = world[who].post(f"/sessions/{session}/recording")
    assert answer.status_code == status, answer.text
    if status == 200:
        assert answer.headers["content-disposition"] == f'attachment; filename="{session}.cast"'
        header, event = (json.loads(line) for line in answer.text.splitlines())
        assert (header["version"], event) == (2, [0.1, "o", "hello \x1b[1mthere\x1b[0m"])
        assert HEADERS.items() <= dict(answer.headers).items()
    wanted = {200: "Success", 403: "Failure"}.get(status)
    heard = world.audited("session.replay")[before:]
    assert heard == ([(f"user:{who}@example.com", wanted)] if wanted else [])


@pytest.mark.control("ID-02")
def test_a_recording_that_is_not_here_or_was_changed_is_not_sent(world: World, tmp_path: Path) -> None:
    waiting = world.session("ws-a", closed="e" * 64)
    assert "has not handed the recording in yet" in world["ada"].get(f"/sessions/{waiting}").text
    assert world["ada"].post(f"/sessions/{waiting}/recording").status_code == 404
    session = world.recorded("ws-a", tmp_path / "recording", "hello")
    kept = world.broker.recordings.file(session)
    raw = bytearray(kept.read_bytes())
    raw[-1] ^= 1
    kept.write_bytes(raw)
    refused = world["ada"].post(f"/sessions/{session}/recording")
    assert (refused.status_code, "recording_broken" in refused.text) == (403, True), refused.text


def test_what_to_type_to_attach_is_said_to_the_sponsor_alone(shared: World) -> None:
    for who, told in (("ben", True), ("dan", False), ("fay", False)):
        text = shared[who].get("/workspaces/ws-b").text
        assert (f"saw login --url {ORIGIN}\nsaw ssh ws-b<" in text) is told
        assert ("saw ssh --config ws-b &gt;&gt; ~/.ssh/config" in text) is told
    # the bastion takes a sponsor's name letter by letter: what would be refused is not advised
    assert "saw ssh" not in shared["ada"].get("/workspaces/ws-a").text


@pytest.mark.control("POL-02")
def test_whether_the_policy_in_force_is_the_released_one_is_said(world: World) -> None:
    page = lambda: world["ada"].get("/").text  # noqa: E731
    assert "nothing is released for it" in page()
    world.release(POLICY)
    assert ">the released one<" in page()
    world.release(RELEASED, 2)
    assert ">not the released one<" in page()
    assert RELEASED in world["ada"].get("/workspaces/ws-a").text


def test_a_lease_that_has_lapsed_is_said_to_have(world: World) -> None:
    assert "lease until" in world["ada"].get("/").text
    world.now += timedelta(hours=1)
    with world.broker.services.store.write() as tx:
        tx.connection.execute(sso_sessions.update().values(seen_at=iso(world.now), checked_at=iso(world.now)))
    text = world["ada"].get("/").text
    assert "lease lapsed" in text
    assert "lease until" not in text


@pytest.mark.control("BUD-01")
def test_costs_and_what_is_left_are_those_of_the_ledger(world: World) -> None:
    assert "no budget used yet" in world["ada"].get("/").text
    world.charge("ws-a", 125)
    world.charge("ws-a", 0, state="open", reserved=250_000)
    world.charge("ws-a", 10, "engagement")
    world.charge("ws-b", 300)
    told = world.broker.charges.show(None, None, "ws-a")
    mine = next(one for one in told["budgets"] if one["scope"] == "workspace")
    assert (mine["spent"], mine["reserved"], mine["left"]) == (1_250_000, 250_000, 3_500_000)
    for path in ("/", "/workspaces/ws-a"):
        text = world["ada"].get(path).text
        for amount in ("1.35 USD", "0.25 USD", "3.50 USD", "4.90 USD", "5.00 USD"):
            assert amount in text
        assert "3.00 USD" not in text
    # what others spend of a budget that is shared is gone for all
    world.charge("ws-b", 200, "blueprint")
    world.charge("ws-a", 100, "blueprint")
    assert re.search(r"2\.00 USD\s+<span[^>]*>of 5\.00 USD a day, shared", world["ada"].get("/").text)
    # what another month or another workspace has cost is not in it
    world.charge("ws-a", 999, at="2026-10-31T07:00:00Z", start="2026-10-31", end="2026-11-01")
    assert "2.35 USD" in world["ada"].get("/").text


@pytest.mark.control("REV-01")
def test_reviews_are_listed_open_and_ended_and_by_workspace(world: World) -> None:
    first, second = world.review("ws-a"), world.review("ws-a")
    other = world.review("ws-b")
    world.broker.decisions.cancel(OPERATOR, second, Cancel("not needed"))
    ids = lambda who, query: set(  # noqa: E731
        re.findall(r'href="/reviews/(rv-[^"]+)"', world[who].get(f"/reviews?{query}").text)
    )
    assert ids("ada", "show=open") == {first}
    assert ids("ada", "show=decided") == {second}
    assert ids("ada", "show=all") == {first, second}
    assert ids("eve", "show=all") == {first, second, other}
    assert ids("eve", "show=open&workspace=ws-b") == {other}
    assert ids("ada", "show=mine") == set()
    assert '<a href="/reviews?show=open&amp;workspace=ws-a">1</a>' in world["ada"].get("/").text


def test_many_reviews_that_have_ended_push_no_open_one_out_of_its_list(world: World) -> None:
    waiting, ended = world.review("ws-a"), world.review("ws-a")
    world.broker.decisions.cancel(OPERATOR, ended, Cancel("not needed"))
    with world.broker.services.store.write() as tx:
        row = dict(tx.connection.execute(reviews.select().where(reviews.c.id == ended)).one()._mapping)
        late = {**row, "opened_at": iso(world.now + timedelta(hours=1))}
        tx.connection.execute(reviews.insert(), [{**late, "id": f"rv-{number:032x}"} for number in range(1000)])
    assert waiting in world["ada"].get("/reviews?show=open").text
    assert len(world["ada"].get("/reviews?show=decided&page=20").text.split('<a href="/reviews/rv-')) == 51
    assert "no such review" in world["ada"].get("/reviews?show=decided&page=21").text


def test_the_history_has_every_step_with_its_reason_and_goes_back(world: World) -> None:
    for _ in range(12):
        world.broker.registry.transition(OPERATOR, "ws-a", Step("stopped", "night"))
        world.broker.registry.transition(OPERATOR, "ws-a", Step("attesting", "day <b>"))
    found, path = [], "/workspaces/ws-a"
    while path:
        text = world["ada"].get(path).text
        found += re.findall(r"(active|stopped|attesting) → (stopped|attesting)", text)
        assert "day &lt;b&gt;" in text
        earlier = re.search(r'href="(/workspaces/ws-a\?before=\d+)#history"', text)
        path = earlier[1] if earlier else ""
    assert found == [("stopped", "attesting"), ("attesting", "stopped")] * 11 + [
        ("stopped", "attesting"), ("active", "stopped"),
    ]  # fmt: skip


@pytest.mark.control("ID-02")
def test_where_there_is_no_bastion_for_it_no_terminal_is_offered_and_the_page_says_why(shared: World) -> None:
    ben = shared["ben"]
    assert "/terminal" not in ben.get("/workspaces/ws-b").text
    for answer in (ben.get("/workspaces/ws-b/terminal"), ben.post("/workspaces/ws-b/terminal")):
        assert answer.status_code == 409
        assert "no_bastion" in answer.text
        assert "broker_terminal" in answer.text
    # what a person may not see does not exist here either, and who only looks opens nothing
    assert [ben.get(f"/workspaces/{name}/terminal").status_code for name in ("ws-a", "ws-c")] == [404, 404]
    assert shared["dan"].get("/workspaces/ws-b/terminal").status_code == 403
