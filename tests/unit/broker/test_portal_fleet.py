"""The pages about the installation as a whole: who sees which, what each says also when there is nothing, and no change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from image_rows import put_image
from portal_world import OPERATOR, POLICY, ROLES, Outline, World

from saw.addressing import Band
from saw.broker import fleet, fleet_people
from saw.broker.break_glass_settings import BreakGlassSettings
from saw.broker.clock import iso
from saw.broker.gate_settings import GateSettings, MachineSettings
from saw.broker.holds import AddHold, ReleaseHold
from saw.broker.images import Move
from saw.broker.number_settings import NumberSettings
from saw.broker.operator_roles import ALLOWED
from saw.broker.people import disentitle
from saw.broker.review_decisions import AskNonce
from saw.broker.review_evidence import Decide
from saw.broker.reviewers import Reviewer
from saw.broker.rollout import Course
from saw.broker.schema import certificates, jobs, passkeys, people, reviews, rollouts, workspaces
from saw.broker.sponsors import SwitchSponsor
from saw.broker.sso.fleet_pages import PARTS
from saw.policy.keys import public_pem
from saw.review.gate import AskGate, BoundFile, BoundHost, GateStatement
from saw.review.statement import ReviewStatement, encode_statement, sign_review

pytestmark = pytest.mark.control("ID-01")

NOBODY = "nobody"
SCRIPT = "<script>alert(1)</script>"
LOOK = {"dan", "eve", "fay"}
EXAMINE = {"eve", "fay"}
EXAMINED = {"/fleet/holds", "/fleet/break-glass"}
PATHS = [path for path, _, _ in PARTS]
KEYS = "break-glass"
SETTINGS: dict[str, Any] = {
    "gates": {"update": GateSettings(group="maintainers", quorum=2, expires_in_s=7200, run_for_s=600)},
    "machines": {"awx": MachineSettings(scopes=("gate:update",)), "ci": MachineSettings(scopes=("gate:update",))},
    "break_glass": BreakGlassSettings(group=KEYS, last_s=600, review_within_s=7200),
    "numbers": NumberSettings(places={"north": Band(300, 309)}),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world that is only looked at."""
    found = World(tmp_path_factory.mktemp("fleet"), **SETTINGS)
    yield found
    found.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path, **SETTINGS)
    yield found
    found.close()


def put(world: World, table: Any, **values: Any) -> None:
    with world.broker.services.store.write() as tx:
        tx.connection.execute(table.insert().values(**values))


def cells(page: str) -> list[list[str]]:
    """Return the words of each line of all tables' bodies, cell by cell, without tags."""
    lines = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL) for line in lines if 'scope="col"' not in line]
    return [[" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in line] for line in found]


def line(page: str, first: str) -> list[str]:
    (found,) = [one for one in cells(page) if one[0].split()[:1] == [first]]
    return found


def text(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


# --- who sees which ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [*ROLES, NOBODY])
def test_each_page_is_for_those_whose_work_it_is_to_look_and_for_nobody_else(shared: World, who: str) -> None:
    assert set(PATHS) >= EXAMINED
    for path in PATHS:
        answer = shared[who].get(path)
        if who == NOBODY:
            assert (answer.status_code, answer.headers["location"]) == (303, f"/sign-in?to={path}")
            continue
        seen = who in (EXAMINE if path in EXAMINED else LOOK)
        assert answer.status_code == (200 if seen else 403), path
        assert ("<code>not_allowed</code>" in answer.text) == (not seen)
        if seen:
            links = re.findall(r'<a href="(/fleet[^"]*)" ?(aria-current="page")?>', answer.text.partition("<main")[2])
            mine = [one for one in PATHS if who in EXAMINE or one not in EXAMINED]
            assert [one for one, _ in links if one in PATHS][: len(mine)] == mine
            assert [one for one, current in links if current] == [path]
    way_in = '<a href="/fleet">Fleet</a>' in shared[who].get("/reviews").text
    assert way_in == (who in LOOK)


def test_holds_are_seen_on_the_page_by_whom_the_call_shows_them(shared: World) -> None:
    allowed = ALLOWED["GET", "/v1/holds"]
    for who, roles in ROLES.items():
        assert (shared[who].get("/fleet/holds").status_code == 200) == bool(allowed & set(roles))


def test_somebody_who_has_lost_the_role_sees_nothing_any_more(world: World) -> None:
    assert world["dan"].get("/fleet").status_code == 200
    with world.broker.services.store.write() as tx:
        tx.connection.execute(people.update().where(people.c.name == "dan@example.com").values(roles='["user"]'))
    assert world["dan"].get("/fleet").status_code == 403


@pytest.mark.parametrize("path", PATHS)
def test_the_pages_change_nothing_and_take_no_form(shared: World, path: str) -> None:
    answer = shared["eve"].get(path)
    forms = re.findall(r'<form method="(\w+)"( action="[^"]*")', answer.text)
    assert [action for method, action in forms if method == "post"] == [' action="/sign-out"']
    assert Outline(answer.text).problems == []
    assert shared["eve"].post(path, reason="x").status_code in {404, 405}


@pytest.mark.parametrize(
    "query", ["x=1", "page=0", "page=1001", "state=none", "role=root", "show=some", "q=" + "a" * 65]
)
def test_a_filter_that_there_is_not_is_refused(shared: World, query: str) -> None:
    for path in PATHS:
        answer = shared["eve"].get(f"{path}?{query}")
        assert (answer.status_code, "<code>malformed</code>" in answer.text) == (400, True), path


# --- the fleet in figures ----------------------------------------------------------------------------------------------------


def test_the_overview_counts_by_state_ring_and_blueprint_and_says_that_nothing_needs_a_look(world: World) -> None:
    world.workspace("ws-c", 3, "ada@example.com", state="stopped", ring="canary")
    world.workspace("ws-d", 4, "ada@example.com", state="decommissioned", ring="canary")
    page = world["dan"].get("/fleet").text
    assert [one for one in cells(page) if len(one) == 2] == [["active", "2"], ["stopped", "1"], ["decommissioned", "1"]]
    assert [one for one in cells(page) if len(one) == 3] == [["canary", "coding", "1"], ["stable", "coding", "2"]]
    assert "Workspaces by state; 3 live" in page
    assert '<a href="/?state=stopped">' in page
    assert "ws-c" in world["dan"].get("/?state=stopped").text
    assert "Nothing: every active workspace has a lease" in page
    assert "0 jobs, 0 open reviews, 0 after-reviews owed" in re.sub(r"\s*,", ",", text(page))


def test_the_overview_says_what_needs_a_look(world: World) -> None:
    lapsed = iso(world.now - timedelta(seconds=1))
    world.workspace("ws-c", 3, "ada@example.com", lease_expires_at=lapsed)
    world.workspace("ws-d", 4, "ada@example.com", lease_expires_at=None)
    world.workspace("ws-e", 5, "ada@example.com", lease_expires_at=lapsed, state="stopped")
    put_image(world.broker.services.store, "old", "2" * 64)
    world.broker.images.move(OPERATOR, "old", Move(to=fleet.ImageState.REVOKED, reason="CVE"))
    for number, state in ((6, "stopped"), (7, "decommissioned"), (8, "requested")):
        world.workspace(f"ws-{number}", number, "ada@example.com", image="old", image_sha256="2" * 64, state=state)
    for ring, revision, state in (("a", 1, "halted"), ("a", 2, "complete"), ("b", 1, "complete"), ("b", 2, "halted")):
        put(
            world, rollouts, ring=ring, blueprint="coding", revision=revision, policy_digest=POLICY, state=Course(state),
            reason="", state_by="", state_since="", opened_at="", everyone=False, rollback_due=False, warned="[]",
        )  # fmt: skip
    for number, (state, hours) in enumerate([("failed", 1), ("interrupted", 2), ("failed", 25), ("succeeded", 1)]):
        ended = iso(world.now - timedelta(hours=hours))
        put_job(world, f"job-{number}", state, ended)
    put_job(world, "job-live", "running", None)
    world.review("ws-a")
    page = world["fay"].get("/fleet").text
    found = [" ".join(re.sub(r"<[^>]*>", "", one).split()) for one in re.findall(r"<li>(.*?)</li>", page)]
    assert found == [
        "2 active workspaces without a lease that counts: every call of theirs is refused",
        "2 workspaces on a revoked image",
        "1 rings whose newest release was halted: saw policy watch shows why",
        "2 jobs that failed or were interrupted in the last 24 hours",
    ]
    assert "1 job , 1 open review ," in text(page)
    assert "Nothing: every" not in page


def put_job(world: World, identifier: str, state: str, ended: str | None) -> None:
    stamp = iso(world.now)
    needed = {
        column.name: "" if "CHAR" in str(column.type) or str(column.type) == "TEXT" else 0
        for column in jobs.c
        if not column.nullable and column.server_default is None
    }
    given = {"id": identifier, "workspace_id": f"w-{identifier}", "state": state, "asked_at": stamp, "ended_at": ended}
    with world.broker.services.store.write() as tx:
        tx.connection.execute(jobs.insert().values(**{**needed, "idempotency_key": identifier, **given}))


def test_the_overview_of_an_installation_without_workspaces_says_so(world: World) -> None:
    with world.broker.services.store.write() as tx:
        tx.connection.execute(workspaces.delete())
    page = world["dan"].get("/fleet").text
    assert "There is no workspace yet." in page
    assert cells(page) == []


def test_more_rings_than_a_page_has_lines_are_said_to_be_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "GROUPS", 2)
    world.workspace("ws-c", 3, "ada@example.com", ring="a")
    assert "the first" not in world["dan"].get("/fleet").text
    world.workspace("ws-d", 4, "ada@example.com", ring="b")
    page = world["dan"].get("/fleet").text
    assert ": the first 2 lines" in page
    assert [one[0] for one in cells(page) if len(one) == 3] == ["a", "b"]


def test_the_overview_says_on_what_the_broker_stands(shared: World) -> None:
    said = text(shared["dan"].get("/fleet").text)
    if shared.config.postgresql is None:
        assert "One broker, with a register of its own in a file (SQLite)." in said
    else:
        assert "1 broker serves on one PostgreSQL. The one that answered does the upkeep" in said


# --- perimeters, images, gates -----------------------------------------------------------------------------------------------


def test_perimeters_bastions_and_machines_are_those_with_a_certificate(world: World) -> None:
    page = world["dan"].get("/fleet/perimeters").text
    assert "has a certificate yet" in page
    assert "No perimeter has shipped an event yet." in page
    hours = {"old": -1, "new": 5}
    for kind, name, ends in (
        ("perimeter", "edge", "old"), ("perimeter", "edge", "new"), ("bastion", "far", "old"), ("svid", "ws-a", "new"),
    ):  # fmt: skip
        issued, until = iso(world.now - timedelta(days=1)), iso(world.now + timedelta(hours=hours[ends]))
        digest = f"{kind}-{name}-{ends}"
        put(world, certificates, sha256=digest, kind=kind, name=name, issued_at=issued, expires_at=until)
    world.charge("ws-a", 100)
    world.charge("ws-a", 100)
    page = world["dan"].get("/fleet/perimeters").text
    assert line(page, "far")[1] == "bastion"
    assert line(page, "far")[3].endswith("has ended")
    edge, source = [one for one in cells(page) if one[0] == "edge"]
    assert edge[1] == "perimeter"
    assert "has ended" not in edge[3]
    assert source == ["edge", "2", f"{iso(world.now)[:16].replace('T', ' ')} UTC"]
    assert line(page, "north") == ["north", "300", "309"]
    assert "ws-a" not in page
    assert "/audit?source=edge" not in page
    assert '<a href="/audit?source=edge">edge</a>' in world["eve"].get("/fleet/perimeters").text
    assert world["eve"].get("/audit?source=edge").status_code == 200


@pytest.mark.sqlite("the plan of a question to its file")
def test_certificates_of_parts_are_found_without_those_of_workspaces(shared: World) -> None:
    with shared.broker.services.store.read() as connection:
        asked = str(fleet.newest_certificates().compile(connection, compile_kwargs={"literal_binds": True}))
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {asked}").all()
    assert "SEARCH certificates USING INDEX certificates_of_name (kind=?)" in str(plan)


def test_images_are_searched_by_name_digest_and_state_and_say_whether_they_may_run(world: World) -> None:
    store = world.broker.services.store
    put_image(store, "older", "2" * 64)
    put_image(store, "older", "3" * 64)
    world.broker.images.move(OPERATOR, "older", Move(to=fleet.ImageState.REVOKED, reason=SCRIPT, image_sha256="2" * 64))
    page = world["dan"].get("/fleet/images").text
    assert [one[0].split()[0] for one in cells(page)] == ["older", "older", "workspace"]
    assert [one[3] for one in cells(page)] == ["0", "0", "2"]
    assert line(page, "workspace")[2].startswith("until 2027-11-01")
    revoked = world["dan"].get("/fleet/images?state=revoked").text
    (only,) = cells(revoked)
    assert only[0] == f"older {'2' * 16}"
    assert only[2].startswith("no image_revoked")
    assert SCRIPT not in revoked
    assert "&lt;script&gt;" in revoked
    assert [one[0] for one in cells(world["dan"].get("/fleet/images?q=333").text)] == [f"older {'3' * 16}"]
    assert [one[0].split()[0] for one in cells(world["dan"].get("/fleet/images?q=WORK").text)] == ["workspace"]
    for query in ("q=none", "state=deprecated", "page=2", "q=%25"):
        assert "Nothing is found." in world["dan"].get(f"/fleet/images?{query}").text
    world.now += timedelta(days=400)
    again = world.sign_in("gil", ("operator",))
    assert line(again.get("/fleet/images").text, "workspace")[2].startswith("no image_expired")


def test_a_long_list_of_images_has_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "PAGE", 2)
    for number in range(4):
        put_image(world.broker.services.store, f"i-{number}", f"{number + 2}" * 64)
    seen, path = [], "/fleet/images?q=&state="
    while path:
        page = world["dan"].get(path).text
        seen += [one[0].split()[0] for one in cells(page)]
        after = re.search(r'href="([^"]*)" rel="next"', page)
        path = after[1].replace("&amp;", "&") if after else ""
    assert seen == ["i-0", "i-1", "i-2", "i-3", "workspace"]
    assert 'rel="prev"' in page


def test_gates_are_shown_with_what_was_asked_at_them(world: World) -> None:
    page = world["dan"].get("/fleet/gates").text
    assert cells(page) == [["update", "2 of maintainers", "120 min", "10 min"]]
    assert "Nothing was asked at a gate yet." in page
    identifier = ask(world, SCRIPT)
    world.review("ws-a")
    page = world["dan"].get("/fleet/gates").text
    assert cells(page)[1][0] == "update: &lt;script&gt;alert(1)&lt;/script&gt;"
    assert cells(page)[1][1] == "pending"
    assert cells(page)[1][4] == "dan operator:root"
    assert SCRIPT not in page
    assert len(cells(page)) == 2
    assert f'<a href="/reviews/{identifier}">' in page
    assert world["dan"].get(f"/reviews/{identifier}").status_code == 200
    assert "Nothing is found." in world["dan"].get("/fleet/gates?page=2").text


def ask(world: World, purpose: str) -> str:
    stated = GateStatement(
        gate="update", purpose=purpose, requested_by="dan", total=1, hosts=(BoundHost(name="ws-a"),),
        files=(BoundFile(path="update.yml", kind="file", sha256="1" * 64),),
    )  # fmt: skip
    return world.broker.gates.ask(OPERATOR, AskGate(statement=stated)).id


# --- people ------------------------------------------------------------------------------------------------------------------


def test_people_have_the_roles_that_the_providers_word_gives_them_now(world: World) -> None:
    groups = ["staff", "maintainers", KEYS, "football", SCRIPT]
    with world.broker.services.store.write() as tx:
        there = people.c.name == "cleo@example.com"
        tx.connection.execute(people.update().where(there).values(groups=msgspec.json.encode(groups).decode()))
        ended = people.c.name == "ben@example.com"
        tx.connection.execute(people.update().where(ended).values(entitled_until=iso(world.now)))
        disentitle(tx.connection, "ada@example.com", world.now)
        row = {"person": "cleo@example.com", "label": "", "public_key": "", "sign_count": 0, "added_at": iso(world.now)}
        for number, removed in ((1, None), (2, iso(world.now))):
            key = {
                "id": f"pk-{number}",
                "credential_id": f"c{number}",
                "key_sha256": f"{number}",
                "removed_at": removed,
            }
            tx.connection.execute(passkeys.insert().values(**row, **key))
    page = world["dan"].get("/fleet/people").text
    assert line(page, "ada@example.com")[1:3] == ["none", "-"]
    assert line(page, "ben@example.com")[1] == f"none user until {iso(world.now)[:16].replace('T', ' ')} UTC"
    cleo = line(page, "cleo@example.com")
    assert cleo[1:3] == ["approver", f"staff, maintainers, {KEYS} and 2 that mean nothing here"]
    assert cleo[4:] == ["1", "1"]
    assert "football" not in page
    assert "script" not in page.partition("<main")[2]
    assert line(page, "dan@example.com")[1] == "operator"
    assert line(page, "user") == ["user", "staff"]
    assert line(page, "auditor") == ["auditor", "nobody"]
    assert f"At gates decide maintainers. The glass is broken by {KEYS}." in page
    assert line(page, "awx") == ["awx", "gate:update", "a certificate of its name"]


def test_people_are_searched_by_name_and_role_page_by_page(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(query: str) -> list[str]:
        return [
            one[0].partition("@")[0] for one in cells(world["dan"].get(f"/fleet/people?{query}").text) if len(one) == 6
        ]

    assert names("role=user") == ["ada", "ben"]
    assert names("role=security&q=E") == ["eve"]
    assert names("q=ada") == ["ada"]
    for query in ("q=none", "q=%25", "role=user&q=eve"):
        assert names(query) == []
        assert "Nobody is found." in world["dan"].get(f"/fleet/people?{query}").text
    monkeypatch.setattr(fleet_people, "PAGE", 4)
    first = world["dan"].get("/fleet/people").text
    after = re.search(r'href="/fleet/people\?([^"]*)" rel="next"', first)
    assert after is not None
    assert names(after[1].replace("&amp;", "&")) == ["eve", "fay"]


def test_who_is_disabled_as_a_sponsor_has_no_role_and_is_said_to_be(world: World) -> None:
    world.broker.sponsors.disable(OPERATOR, "ben@example.com", SwitchSponsor(reason="left"))
    found = line(world["dan"].get("/fleet/people").text, "ben@example.com")
    assert found[0] == "ben@example.com disabled as a sponsor"
    assert (found[1], found[4]) == ("none", "0")


# --- holds and the glass -----------------------------------------------------------------------------------------------------


def test_holds_are_shown_with_what_they_keep_and_released_ones_when_asked(world: World, tmp_path: Path) -> None:
    assert "Nothing is held." in world["eve"].get("/fleet/holds").text
    assert "Nothing was ever held." in world["eve"].get("/fleet/holds?show=all").text
    since = int(world.now.timestamp() * 1000)
    one = world.broker.holds.add(OPERATOR, AddHold(reason=SCRIPT, workspace="ws-a", since=since))["id"]
    other = world.broker.holds.add(OPERATOR, AddHold(reason="case 7", since=since - 60_000, until=since))["id"]
    session = world.recorded("ws-b", tmp_path / "recording", "hello")
    world.broker.recordings.hold(OPERATOR, session, "case 8")
    world.broker.holds.release(OPERATOR, other, ReleaseHold("settled"))
    page = world["fay"].get("/fleet/holds").text
    assert {found[0] for found in cells(page)} == {one, session}
    kept = line(page, one)
    assert kept[1] == f"all about ws-a from {iso(world.now)[:16].replace('T', ' ')} UTC"
    assert kept[2] == "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert kept[3].endswith("operator:root")
    assert SCRIPT not in page
    assert line(page, session)[1] == "the recording of a session with ws-b"
    assert f'<a href="/sessions/{session}">' in page
    everything = world["fay"].get("/fleet/holds?show=all").text
    assert line(everything, other)[1].startswith("everything from ")
    assert line(everything, other)[4].endswith("operator:root: settled")


def test_a_broken_glass_is_shown_with_who_broke_it_why_and_what_came_after(world: World) -> None:
    assert "The glass was never broken." in world["eve"].get("/fleet/break-glass").text
    held = {name: Ed25519PrivateKey.generate() for name in ("dora", "emil", "gus")}
    for name, key in held.items():
        groups = ("maintainers",) if name == "gus" else (KEYS,)
        pem = public_pem(key.public_key()).decode()
        world.broker.reviewers.put(OPERATOR, name, Reviewer(groups=groups, public_key=pem))
    review = world.review("ws-b")

    def decide(by: str, decision: str, comment: str) -> None:
        given = world.broker.decisions.nonce(review, AskNonce(by))
        shown = world.broker.decisions.show(review)
        until = given["after_review_until" if decision in {"uphold", "reject"} else "break_glass_until"]
        said = {name: shown[name] for name in ("request_digest", "render_digest", "policy_digest")}
        said |= {"review": review, "decision": decision, "approver": by, "nonce": given["nonce"], "not_after": until}
        stated = msgspec.convert({**said, "comment": comment}, ReviewStatement)
        signed = Decide(encode_statement(stated).decode(), sign_review(stated, held[by]))
        world.broker.decisions.decide(OPERATOR, review, signed)

    decide("dora", "break_glass", "payroll")
    assert "The glass was never broken." in world["eve"].get("/fleet/break-glass").text
    decide("emil", "break_glass", SCRIPT)
    page = world["fay"].get("/fleet/break-glass").text
    assert f"2 people of {KEYS} let a call through" in page
    assert "count 10 minutes" in page.replace("counts", "count")
    (found,) = cells(page)
    assert found[0] == "POST api.example.com/v1/notes ws-b, approved"
    assert re.match(r"break glass by dora .*: payroll break glass by emil .*: &lt;script&gt;", found[2])
    assert found[3].startswith("owed by maintainers, until ")
    assert SCRIPT not in page
    assert "1 after-review owed" in text(world["dan"].get("/fleet").text)
    with world.broker.services.store.write() as tx:
        tx.connection.execute(reviews.update().values(after_due_at=iso(world.now)))
    assert cells(world["fay"].get("/fleet/break-glass").text)[0][3].startswith("overdue by maintainers")
    assert "after-reviews that are overdue" in world["dan"].get("/fleet").text
    decide("gus", "uphold", "it was right")
    (found,) = cells(world["fay"].get("/fleet/break-glass").text)
    assert found[2].endswith("it was right")
    assert found[3] == "upheld"
    assert "Nothing is found." in world["eve"].get("/fleet/break-glass?page=2").text


def test_pages_of_an_installation_without_gates_programs_and_keys_say_so(tmp_path: Path) -> None:
    world = World(tmp_path)
    try:
        said = {path: text(world["eve"].get(path).text) for path in PATHS}
    finally:
        world.close()
    assert "There is no gate: the role variable broker_gates makes one." in said["/fleet/gates"]
    assert "No program may ask for anything" in said["/fleet/people"]
    assert "Nobody can break the glass here" in said["/fleet/break-glass"]
    assert "No numbers are kept for one perimeter" in said["/fleet/perimeters"]
