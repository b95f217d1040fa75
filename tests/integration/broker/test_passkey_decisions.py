"""Reviews decided with passkeys by people who signed in: real provider and broker, an authenticator in software."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from broker_rig import cli
from git_rig import Repository
from sso_rig import Authenticator, Browser, SsoLab, sso_lab

from databases import beside
from saw.broker.clock import iso
from saw.review.messages import ReviewedCall


@pytest.fixture(scope="module")
def lab() -> Iterator[SsoLab]:
    with sso_lab(Path(tempfile.mkdtemp(prefix="saw-sso-"))) as found:
        found.activate("ws-a", "ws-b")
        yield found


@pytest.fixture(scope="module")
def people(lab: SsoLab) -> Iterator[dict[str, tuple[Browser, Authenticator]]]:
    """``ada``, ``ben`` and ``cleo`` in their browsers, each with a passkey; ``ada`` sponsors the workspaces."""
    with ExitStack() as stack:
        found = {}
        for name in ("ada", "ben", "cleo"):
            browser, key = stack.enter_context(lab.browser()), Authenticator()
            browser.fresh(f"u-{name}")
            answer = browser.register(key, f"{name}'s key")
            assert answer.status_code == 200, answer.text
            found[name] = (browser, key)
        yield found


def sql(lab: SsoLab, text: str, *values: Any) -> None:
    with beside(lab.config) as store:
        store.execute(text, values)


def error(answer: httpx.Response) -> str:
    assert answer.status_code >= 400, answer.text
    return str(answer.json()["error"])


@pytest.mark.control("REV-02")
def test_an_approval_by_passkey_is_claimed_and_its_receipt_holds_outside(
    lab: SsoLab, people: dict[str, Any], tmp_path: Path
) -> None:
    browser, key = people["ben"]
    review = lab.open_review()
    assert review in browser.get("/reviews").text
    answer = browser.decide(review, key, comment="invoice 4711 is right")
    assert (answer.status_code, answer.json()["state"]) == (200, "approved"), answer.text
    assert review not in browser.get("/reviews").text
    assert review in browser.get("/reviews?show=all").text
    while (claimed := lab.claim()) and claimed["id"] != review:
        pass
    assert claimed is not None
    with lab.tls("perimeter", "edge") as client:
        told = {"claim": claimed["claim"], "outcome": "done", "answer": {"status": 201}}
        assert client.post(f"/v1/perimeter/reviews/{review}/result", json=told).status_code == 200
    receipt = tmp_path / "receipt"
    assert cli(lab, "review", "receipt", review, "--out", str(receipt)).returncode == 0
    verified = cli(lab, "review", "verify", str(receipt), "--ca", str(lab.ca_file), "--json")
    assert verified.returncode == 0, verified.stderr
    decision = json.loads(verified.stdout)["decisions"][0]
    assert (decision["approver"], decision["passkey_origin"]) == ("ben@example.com", lab.origin)
    assert decision["key_sha256"] in browser.get("/passkeys").text
    shown = cli(lab, "review", "show", review, "--json")
    assert json.loads(shown.stdout)["decisions"][0]["signed_with"] == "passkey"
    events = lab.audited(reviewer="ben@example.com", review=review)
    assert events[-1]["unmapped"]["saw"]["signed_with"] == "passkey"
    assert events[-1]["unmapped"]["saw"]["principal"] == "user:ben@example.com"


@pytest.mark.control("REV-02")
def test_a_passkey_needs_a_fresh_sign_in_and_a_verified_person(lab: SsoLab) -> None:
    with lab.browser() as browser:
        browser.fresh("u-dan")
        sql(
            lab,
            "UPDATE sso_sessions SET auth_time = ? WHERE person = 'dan@example.com'",
            iso(datetime.now(UTC) - timedelta(minutes=6)),
        )
        assert error(browser.register(Authenticator())) == "sign_in_again"
        assert "Sign in again" in browser.get("/passkeys").text
        browser.fresh("u-dan")
        assert error(browser.register(Authenticator(verified=False))) == "passkey_refused"
        key = Authenticator()
        assert browser.register(key).status_code == 200
        assert error(browser.register(key)) == "key_in_use"
        options = browser.post("/passkeys/options", {}).json()
        foreign = key.create(options, lab.origin, origin="https://evil.example")
        assert error(browser.post("/passkeys", {**foreign, "label": "x"})) == "passkey_refused"
        # the challenge went with the refusal
        late = Authenticator().create(options, lab.origin)
        assert error(browser.post("/passkeys", {**late, "label": "x"})) == "challenge_refused"
    events = lab.audited(class_uid=3001, principal="user:dan@example.com")
    assert [event["status"] for event in events].count("Success") == 1
    assert {"passkey_refused", "key_in_use", "challenge_refused"} <= {
        event["unmapped"]["saw"].get("reason") for event in events
    }


@pytest.mark.control("REV-02")
@pytest.mark.parametrize(
    "how",
    [
        {"origin": "https://evil.example"},
        {"rp_id": "evil.example"},
        {"challenge": "A" * 43},
        {"count": 0},
        {"count": -1},
        {"verified": False},
        {"other": True},
    ],
    ids=str,
)
def test_an_answer_for_something_else_does_not_count(lab: SsoLab, people: dict[str, Any], how: dict[str, Any]) -> None:
    browser, key = people["ben"]
    review = lab.open_review()
    given = dict(how)
    key.verified = given.pop("verified", True)
    used = people["cleo"][1] if given.pop("other", False) else key
    held = key.counter
    try:
        answer = browser.decide(review, used, **given)
    finally:
        key.verified, key.counter = True, max(held, key.counter)
    assert error(answer) == "signature_refused"
    assert lab.show(review)["state"] == "pending"
    assert browser.decide(review, key).json()["state"] == "approved"


@pytest.mark.control("REV-02")
def test_an_answer_counts_once_and_for_its_review_alone(lab: SsoLab, people: dict[str, Any]) -> None:
    browser, key = people["ben"]
    first, second = lab.open_review(quorum=2), lab.open_review(quorum=2)
    signed = key.get(browser.request(first).json(), lab.origin)
    browser.request(second)
    assert error(browser.post(f"/reviews/{second}/decide", signed)) == "nonce_refused"
    assert browser.post(f"/reviews/{first}/decide", signed).status_code == 200
    key.counter += 5
    assert error(browser.post(f"/reviews/{first}/decide", signed)) in {"nonce_refused", "signature_refused"}
    changed = browser.request(second, "deny").json()
    changed["statement"] = changed["statement"].replace('"deny"', '"approve"')
    assert error(browser.post(f"/reviews/{second}/decide", key.get(changed, lab.origin))) == "signature_refused"
    assert lab.show(second)["state"] == "pending"


@pytest.mark.control("REV-02")
def test_nobody_decides_in_another_persons_name(lab: SsoLab, people: dict[str, Any]) -> None:
    ben, cleo = people["ben"], people["cleo"]
    review = lab.open_review()
    asked = ben[0].request(review).json()
    answer = cleo[0].post(f"/reviews/{review}/decide", ben[1].get(asked, lab.origin))
    assert error(answer) == "another_persons_name"
    # nor under ben's name with one's own key; and ben's nonce is still good
    answer = cleo[0].post(f"/reviews/{review}/decide", cleo[1].get(asked, lab.origin))
    assert error(answer) == "another_persons_name"
    assert lab.show(review)["decisions"] == []
    assert ben[0].post(f"/reviews/{review}/decide", ben[1].get(asked, lab.origin)).json()["state"] == "approved"


@pytest.mark.control("REV-02")
def test_the_sponsor_may_deny_and_not_approve(lab: SsoLab, people: dict[str, Any]) -> None:
    browser, key = people["ada"]
    review = lab.open_review()
    page = browser.get(f"/reviews/{review}").text
    assert "You are the sponsor" in page
    assert 'value="approve"' not in page
    assert error(browser.decide(review, key)) == "self_approval"
    assert "0 of 1 people of maintainers approved" in browser.get(f"/reviews/{review}").text
    assert browser.decide(review, key, "deny").json()["state"] == "denied"
    assert "people of maintainers approved" not in browser.get(f"/reviews/{review}").text


@pytest.mark.control("REV-02")
def test_two_people_are_needed_where_policy_says_so_and_one_denial_ends_it(lab: SsoLab, people: dict[str, Any]) -> None:
    (ben, ben_key), (cleo, cleo_key) = people["ben"], people["cleo"]
    review = lab.open_review(quorum=2)
    assert ben.decide(review, ben_key).json()["state"] == "pending"
    assert error(ben.decide(review, ben_key)) == "already_decided"
    assert cleo.decide(review, cleo_key).json()["state"] == "approved"
    assert ben.decide(review, ben_key, "deny").json()["state"] == "denied"
    assert error(cleo.decide(review, cleo_key)) == "review_not_open"
    other = lab.open_review(quorum=2)
    assert ben.decide(other, ben_key).json()["state"] == "pending"
    assert cleo.decide(other, cleo_key, "deny").json()["state"] == "denied"


@pytest.mark.control("REV-02")
@pytest.mark.parametrize(
    "groups", [["staff", "approvers"], ["staff", "maintainers"], ["auditors", "maintainers"], ["staff"]], ids=str
)
def test_who_has_left_the_group_meanwhile_does_not_decide(lab: SsoLab, groups: list[str]) -> None:
    person = f"u-{'-'.join(groups)}"
    with lab.browser() as browser:
        key = lab.member(browser, person)
        review = lab.open_review()
        asked = browser.request(review)
        assert asked.status_code == 200
        lab.provider.change(person, groups=groups)
        answer = browser.post(f"/reviews/{review}/decide", key.get(asked.json(), lab.origin))
        assert error(answer) == "not_in_group"
        assert lab.audited(review=review, reviewer=f"{person}@example.com", reason="not_in_group", status="Failure")
        assert lab.show(review)["state"] == "pending"
        lab.provider.change(person, groups=["staff", "approvers", "maintainers"])
        browser.sign_in(person)
        assert browser.decide(review, key).json()["state"] == "approved"


@pytest.mark.control("REV-02")
def test_without_a_way_to_ask_the_provider_a_decision_needs_a_new_sign_in(lab: SsoLab) -> None:
    with lab.browser() as browser:
        key = lab.member(browser, "u-norefresh")
        review = lab.open_review()
        sql(
            lab,
            "UPDATE sso_sessions SET refresh = NULL, checked_at = ? WHERE person = 'u-norefresh@example.com'",
            iso(datetime.now(UTC) - timedelta(minutes=10)),
        )
        assert browser.get(f"/reviews/{review}").status_code == 200
        assert error(browser.decide(review, key)) == "sign_in_again"
        assert lab.show(review)["state"] == "pending"
        browser.sign_in("u-norefresh")
        assert browser.decide(review, key).json()["state"] == "approved"


@pytest.mark.control("REV-02")
def test_an_approval_ceases_to_count_when_its_approver_leaves(lab: SsoLab, people: dict[str, Any]) -> None:
    cleo, cleo_key = people["cleo"]
    with lab.browser() as browser:
        key = lab.member(browser, "u-leaver")
        review = lab.open_review(quorum=2)
        assert browser.decide(review, key).json()["state"] == "pending"
        assert lab.show(review)["approved_by"] == ["u-leaver@example.com"]
        lab.provider.change("u-leaver", groups=["other"])
        sql(
            lab, "UPDATE sso_sessions SET checked_at = '2026-01-01T00:00:00.000Z' WHERE person = 'u-leaver@example.com'"
        )
        assert browser.get("/").status_code == 403
    assert lab.show(review)["approved_by"] == []
    assert cleo.decide(review, cleo_key).json()["state"] == "pending"
    assert review not in lab.claims()


@pytest.mark.control("REV-02")
def test_what_a_removed_passkey_approved_no_longer_counts(lab: SsoLab) -> None:
    with lab.browser() as browser:
        key = lab.member(browser, "u-loser")
        review = lab.open_review()
        assert browser.decide(review, key).json()["state"] == "approved"
        page = browser.get("/passkeys").text
        identifier = page.partition("/passkeys/pk-")[2].partition("/remove")[0]
        body = {"csrf": browser.csrf()}
        assert browser.http.post(f"/passkeys/pk-{identifier}/remove", data={"csrf": "x"}).status_code == 403
        assert lab.show(review)["approved_by"] == ["u-loser@example.com"]
        assert browser.http.post(f"/passkeys/pk-{identifier}/remove", data=body).status_code == 303
        assert review not in lab.claims()
        assert lab.show(review)["state"] == "pending"
        assert "You have no passkey yet" in browser.get(f"/reviews/{review}").text


@pytest.mark.control("REV-02")
def test_a_review_that_has_ended_by_time_is_not_approved(lab: SsoLab, people: dict[str, Any]) -> None:
    browser, key = people["ben"]
    review = lab.open_review()
    asked = browser.request(review).json()
    sql(lab, "UPDATE reviews SET expires_at = '2026-01-01T00:00:00.000Z' WHERE id = ?", review)
    assert error(browser.post(f"/reviews/{review}/decide", key.get(asked, lab.origin))) == "review_not_open"
    assert lab.show(review)["state"] == "expired"


@pytest.mark.control("REV-02")
def test_a_decision_needs_the_token_of_the_session_and_our_own_origin(lab: SsoLab, people: dict[str, Any]) -> None:
    (ben, key), cleo = people["ben"], people["cleo"][0]
    review = lab.open_review()
    signed = key.get(ben.request(review).json(), lab.origin)
    for token in ("x", cleo.csrf()):
        assert error(ben.post(f"/reviews/{review}/decide", signed, csrf=token)) == "csrf"
    token = ben.csrf()
    foreign = {"x-csrf-token": token, "origin": "https://evil.example"}
    assert error(ben.http.post(f"/reviews/{review}/decide", json=signed, headers=foreign)) == "csrf"
    form = {"content-type": "text/plain", "x-csrf-token": token}
    assert error(ben.http.post(f"/reviews/{review}/decide", content=json.dumps(signed), headers=form)) == "malformed"
    assert ben.post(f"/reviews/{review}/decide", signed).json()["state"] == "approved"


def test_what_the_agent_wrote_is_text_and_marked_as_the_agents(lab: SsoLab, people: dict[str, Any]) -> None:
    evil = b'{"note": "</pre><script>alert(1)</script><img src=x onerror=alert(2)>"}'
    review = lab.open_review(evil)
    page = people["ben"][0].get(f"/reviews/{review}").text
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.index("was written by the agent") < page.index("&lt;script&gt;") < page.index("Your decision")
    assert page.index("Your decision") < page.index("Digests")


@pytest.mark.control("REV-01")
def test_a_push_is_read_at_its_far_end_and_shown_line_by_line(
    lab: SsoLab, people: dict[str, Any], tmp_path: Path
) -> None:
    git = Repository(tmp_path / "r")
    old = git.commit({"a.txt": "one\ntwo\n"})
    new = git.commit({"a.txt": "one\n<img src=x onerror=alert(1)>\n"}, "</pre><script>alert(2)</script>")
    path = "/team/app.git/git-receive-pack"
    push = ReviewedCall(
        method="POST", scheme="https", host="git.example.com", port=443, path=path, body=git.push(old, new)
    )
    review = lab.open_call(push)
    (ben, key), url = people["ben"], f"/reviews/{review}"
    assert "look again, this text will change" in ben.get(url).text
    early = key.get(ben.request(review).json(), lab.origin)
    theirs = git.raw("pack-objects", "--stdout", "--revs", "-q", given=old.encode())
    with lab.tls("perimeter", "edge") as perimeter:
        asked = None
        for _ in range(100):  # what others have approved comes first
            asked = asked or perimeter.post("/v1/perimeter/reviews/claim", json={"wait": 0}).json()["read_context"]
        assert (asked["id"], asked["wants"], asked["step"]) == (review, [old], 1)
        told = {"step": 1, "outcome": "read", "pack": base64.b64encode(theirs).decode()}
        with lab.tls("perimeter", "other") as other:
            assert other.post(f"/v1/perimeter{url}/context", json=told).json()["code"] == "unknown_review"
        assert perimeter.post(f"/v1/perimeter{url}/context", json=told | {"more": 1}).status_code == 400
        assert perimeter.post(f"/v1/perimeter{url}/context", json=told).json() == {"recorded": True}
    page = ben.get(url).text
    assert "<h4>changed &#34;a.txt&#34;, file</h4>" in page
    assert "<del>- two</del>\n<ins>+ &lt;img src=x onerror=alert(1)&gt;</ins>\n" in page
    assert "| &lt;/pre&gt;&lt;script&gt;alert(2)&lt;/script&gt;\n" in page
    assert "<img" not in page
    assert (
        page.index("was written by the agent")
        < page.index("- two")
        < page.index("headers and body")
        < page.index("Your decision")
    )
    assert error(ben.post(f"{url}/decide", early)) == "statement_mismatch", "it was made on another text"
    assert ben.post(f"{url}/decide", key.get(ben.request(review).json(), lab.origin)).json()["state"] == "approved"


def test_who_has_nothing_to_do_with_a_review_does_not_see_it(lab: SsoLab, people: dict[str, Any]) -> None:
    review = lab.open_review()
    with lab.browser() as browser:
        browser.sign_in("u-dan")
        assert browser.get(f"/reviews/{review}").status_code == 404
        assert "You do not have the role" in browser.get("/reviews").text
        assert review not in browser.get("/reviews?show=all").text
        assert error(browser.request(review)) == "unknown_review"
        lab.provider.change("u-dan", groups=["auditors"])
        browser.sign_in("u-dan")
        page = browser.get(f"/reviews/{review}")
        assert page.status_code == 200
        assert "Your decision" not in page.text
        assert error(browser.request(review)) == "not_in_group"
        lab.provider.change("u-dan", groups=["staff"])
    assert people["ben"][0].get(f"/reviews/{review}").status_code == 200
    assert people["ada"][0].get(f"/reviews/{review}").status_code == 200
