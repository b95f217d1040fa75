"""Single sign-on against a real OpenID provider: browsers, sessions, groups and their loss, logout by the provider."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import msgspec
import pytest
from sso_rig import SsoLab, command_login, logout_token, sso_lab, until

from databases import beside
from saw.broker.clock import iso
from saw.broker.errors import BrokerError
from saw.broker.sso.provider import Provider

SESSION = "__Host-saw-session"


@pytest.fixture(scope="module")
def lab() -> Iterator[SsoLab]:
    with sso_lab(Path(tempfile.mkdtemp(prefix="saw-sso-"))) as found:
        yield found


def sql(lab: SsoLab, text: str, *values: Any) -> list[Any]:
    with beside(lab.config) as store:
        return store.execute(text, values).fetchall()


def age(lab: SsoLab, person: str, column: str, **by: float) -> None:
    """Let time pass for the sessions of a person."""
    sql(lab, f"UPDATE sso_sessions SET {column} = ? WHERE person = ?", iso(datetime.now(UTC) - timedelta(**by)), person)  # noqa: S608


def signed_in(page: httpx.Response) -> bool:
    return page.status_code == 200 and page.url.path != "/sign-in"


@pytest.mark.control("ID-01")
def test_a_person_signs_in_and_out_and_both_are_audited(lab: SsoLab) -> None:
    with lab.browser() as browser:
        assert browser.get("/").url.path == "/sign-in"
        assert "ben@example.com" in browser.sign_in("u-ben").text
        authorize = parse_qs(urlsplit(browser.trail[1]).query)
        assert authorize["code_challenge_method"] == ["S256"]
        assert authorize["response_type"] == ["code"]
        secret = browser.cookie(SESSION)
        out = browser.http.post("/sign-out", data={"csrf": browser.csrf()})
        assert (out.status_code, out.headers["location"]) == (303, "/sign-in?out")
        browser.http.cookies.set(SESSION, secret, domain="localhost.local", path="/")
        assert not signed_in(browser.get("/"))
    events = lab.audited(class_uid=3002, principal="user:ben@example.com")
    assert [event["activity_name"] for event in events][-2:] == ["Logon", "Logoff"]
    assert secret not in json.dumps(lab.events())


def test_the_session_cookie_is_for_this_host_tls_and_no_script(lab: SsoLab) -> None:
    with lab.browser() as browser:
        browser.http.event_hooks["response"] = [lambda answer: seen.extend(answer.headers.get_list("set-cookie"))]
        seen: list[str] = []
        browser.sign_in("u-ben")
        cookie = next(item for item in seen if item.startswith(f"{SESSION}=") and "Max-Age=0" not in item)
        assert {"HttpOnly", "Path=/", "SameSite=lax", "Secure"} <= set(cookie.split("; "))
        assert "domain" not in cookie.lower()
        value = cookie.partition("=")[2].partition(";")[0]
        stored = sql(lab, "SELECT secret_sha256 FROM sso_sessions")
        assert len(value) == 43
        assert value not in json.dumps(stored)


@pytest.mark.control("ID-01")
def test_a_session_that_was_fixed_before_the_sign_in_is_not_the_session_after_it(lab: SsoLab) -> None:
    with lab.browser() as browser, lab.browser() as attacker:
        attacker.sign_in("u-dan")
        planted = attacker.cookie(SESSION)
        browser.http.cookies.set(SESSION, planted, domain="localhost.local", path="/")
        assert "ben@example.com" in browser.sign_in("u-ben").text
        assert browser.cookie(SESSION) != planted
        # what was planted has ended, for the attacker too
        assert not signed_in(attacker.get("/"))


@pytest.mark.control("ID-01")
def test_a_state_counts_once_and_in_the_browser_that_began_alone(lab: SsoLab) -> None:
    with lab.browser() as browser, lab.browser() as other:
        page = browser.get("/login?to=/passkeys")
        callback = ""
        browser.http.event_hooks["request"] = [lambda request: urls.append(str(request.url))]
        urls: list[str] = []
        done = browser.at_provider(page, "u-ben")
        assert done.url.path == "/passkeys"
        callback = next(url for url in urls if "/callback?" in url)
        again = browser.http.get(callback)
        assert again.status_code == 403
        assert "unknown_sign_in" in again.text
        # a victim's browser that is sent to an attacker's callback (login CSRF)
        stolen = other.get("/login")
        assert stolen.status_code == 200
        begun = browser.http.get("/login")
        state = parse_qs(urlsplit(begun.headers["location"]).query)["state"][0]
        crossed = other.http.get(f"/callback?state={state}&code=x")
        assert crossed.status_code == 403
        assert "other_browser" in crossed.text
        assert not signed_in(other.get("/"))
    reasons = {event.get("status_detail") for event in lab.audited(class_uid=3002, status="Failure")}
    assert {"unknown_sign_in", "other_browser"} <= reasons


def test_only_our_own_pages_are_shown_after_a_sign_in(lab: SsoLab) -> None:
    for to in ("//evil", "//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)"):
        with lab.browser() as browser:
            page = browser.sign_in("u-ben", to=to)
            assert str(page.url).startswith(lab.origin)
    with lab.browser() as browser:
        assert browser.sign_in("u-ben", to="/passkeys").url.path == "/passkeys"


@pytest.mark.control("ID-01")
@pytest.mark.parametrize(("person", "reason"), [("u-eve", "no_role"), ("u-fay", "email_not_verified")])
def test_who_has_no_role_or_no_verified_name_is_not_let_in(lab: SsoLab, person: str, reason: str) -> None:
    with lab.browser() as browser:
        page = browser.sign_in(person)
        assert page.status_code == 403
        assert reason in page.text
        assert browser.cookie(SESSION) == ""
    assert lab.audited(class_uid=3002, status="Failure", status_detail=reason)
    with lab.browser() as browser:
        assert signed_in(browser.sign_in("u-dan"))


def test_a_name_never_becomes_another_accounts(lab: SsoLab) -> None:
    with lab.browser() as browser:
        assert signed_in(browser.sign_in("u-cleo"))
    people = json.loads(lab.provider.people.read_text())
    people["u-mallory"] = people["u-cleo"]
    lab.provider.people.write_text(json.dumps(people))
    with lab.browser() as browser:
        page = browser.sign_in("u-mallory")
        assert page.status_code == 403
        assert "name_taken" in page.text


@pytest.mark.control("ID-01")
@pytest.mark.parametrize(("column", "hours"), [("seen_at", 1), ("expires_at", 0.001)])
def test_an_idle_session_and_an_old_one_have_ended(lab: SsoLab, column: str, hours: float) -> None:
    with lab.browser() as browser:
        browser.sign_in("u-dan")
        assert signed_in(browser.get("/"))
        age(lab, "dan@example.com", column, hours=hours)
        assert not signed_in(browser.get("/"))


@pytest.mark.control("ID-01")
def test_who_loses_the_group_loses_the_session_at_the_next_check(lab: SsoLab) -> None:
    with lab.browser() as browser:
        browser.sign_in("u-dan")
        age(lab, "dan@example.com", "checked_at", minutes=10)
        assert signed_in(browser.get("/"))  # asked again, and still in the group
        lab.provider.change("u-dan", groups=["other"])
        try:
            assert signed_in(browser.get("/"))  # the provider's word is fresh
            age(lab, "dan@example.com", "checked_at", minutes=10)
            page = browser.get("/")
            assert page.status_code == 403
            assert "no_role" in page.text
            assert not signed_in(browser.get("/"))
        finally:
            lab.provider.change("u-dan", groups=["staff"])
    assert any(
        event["message"] == "no_role"
        for event in lab.audited(class_uid=3002, principal="user:dan@example.com", activity_id=2)
    )


@pytest.mark.control("ID-01")
def test_a_session_ends_when_the_person_signs_out_at_the_provider(lab: SsoLab) -> None:
    with lab.browser() as browser, lab.browser() as other:
        browser.sign_in("u-ben")
        other.sign_in("u-cleo")
        page = browser.http.get(f"{lab.provider.issuer}/session/end")
        form = dict(re.findall(r'name="(xsrf)" value="([^"]+)"', page.text))
        browser.http.post(f"{lab.provider.issuer}/session/end/confirm", data={**form, "logout": "yes"})
        until(lambda: not signed_in(browser.get("/")))
        assert signed_in(other.get("/"))
    events = lab.audited(class_uid=3002, activity_id=2, message="signed out at the provider")
    assert events[-1]["unmapped"]["saw"]["principal"] == "user:ben@example.com"


def test_a_forged_logout_token_ends_nothing(lab: SsoLab) -> None:
    with lab.browser() as browser:
        browser.sign_in("u-ben")
        answer = browser.http.post("/logout/backchannel", data={"logout_token": "eyJhbGciOiJub25lIn0.e30."})
        assert answer.status_code == 403
        assert signed_in(browser.get("/"))


def test_a_refresh_token_that_was_changed_in_the_database_ends_the_session(lab: SsoLab) -> None:
    with lab.browser() as browser:
        browser.sign_in("u-ben")
        sql(lab, "UPDATE sso_sessions SET refresh = x'00' WHERE person = 'ben@example.com'")
        assert signed_in(browser.get("/"))
        age(lab, "ben@example.com", "checked_at", minutes=10)
        assert not signed_in(browser.get("/"))


def test_another_name_for_the_broker_and_another_site_are_refused(lab: SsoLab) -> None:
    with lab.browser() as browser:
        browser.sign_in("u-ben")
        token = browser.csrf()
        rebound = browser.http.get("/", headers={"host": "evil.example"})
        assert (rebound.status_code, "wrong_host" in rebound.text) == (403, True)
        foreign = browser.http.post("/sign-out", data={"csrf": token}, headers={"origin": "https://evil.example"})
        assert foreign.status_code == 403
        assert signed_in(browser.get("/"))


@pytest.mark.control("ID-01")
def test_a_change_needs_the_token_of_its_own_session(lab: SsoLab) -> None:
    with lab.browser() as browser, lab.browser() as other:
        browser.sign_in("u-ben")
        other.sign_in("u-cleo")
        for token in ("", "x" * 43, other.csrf()):
            assert browser.http.post("/sign-out", data={"csrf": token}).status_code == 403
        assert signed_in(browser.get("/"))
        assert browser.http.post("/sign-out", data={"csrf": browser.csrf()}).status_code == 303
        assert not signed_in(browser.get("/"))


def test_every_answer_keeps_itself_out_of_frames_caches_and_foreign_scripts(lab: SsoLab) -> None:
    with lab.browser() as browser:
        answers = [browser.http.get(path) for path in ("/sign-in", "/", "/static/passkey.js", "/no-such-page")]
        browser.sign_in("u-ben")
        answers += [browser.http.get("/"), browser.http.post("/sign-out")]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
    for answer in answers:
        if "text/html" in answer.headers.get("content-type", ""):
            assert not re.search(r"<script(?![^>]*src=)|\son[a-z]+=|style=", answer.text), answer.url


def saw(lab: SsoLab, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CONFIG_HOME": str(home)}
    command = [sys.executable, "-m", "saw.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.control("ID-01")
def test_the_command_line_signs_in_by_a_code_that_a_browser_confirms(lab: SsoLab, tmp_path: Path) -> None:
    told = command_login(lab, tmp_path, "u-ben")
    assert (told["name"], "approver" in told["roles"]) == ("ben@example.com", True)
    file = tmp_path / "saw/session.json"
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert "token" not in told
    who = saw(lab, tmp_path, "whoami", "--json")
    assert json.loads(who.stdout)["name"] == "ben@example.com", who.stderr
    # the same secret opens no page in a browser, and a browser's none for the command line
    with lab.browser() as browser:
        browser.http.cookies.set(SESSION, json.loads(file.read_text())["token"], domain="localhost.local", path="/")
        assert not signed_in(browser.get("/"))
    file.chmod(0o644)
    loose = saw(lab, tmp_path, "whoami")
    assert (loose.returncode, "private" in loose.stderr) == (1, True)
    file.chmod(0o600)
    token = json.loads(file.read_text())["token"]
    assert saw(lab, tmp_path, "logout").returncode == 0
    assert not file.exists()
    with lab.browser() as browser:
        answer = browser.http.get("/v1/sso/whoami", headers={"authorization": f"Bearer {token}"})
        assert answer.json()["error"] == "not_signed_in"
    gone = saw(lab, tmp_path, "whoami")
    assert (gone.returncode, "saw login" in gone.stderr) == (1, True)


def test_no_secret_is_in_the_log_or_in_the_process_list(lab: SsoLab) -> None:
    assert lab.provider.secret not in lab.log()
    assert lab.process is not None
    assert lab.provider.secret not in Path(f"/proc/{lab.process.pid}/cmdline").read_text()


@pytest.mark.control("ID-01")
def test_a_logout_token_counts_once_and_for_its_person(lab: SsoLab) -> None:
    with lab.browser() as browser, lab.browser() as other:
        browser.sign_in("u-dan")
        other.sign_in("u-ben")

        def told(token: str) -> httpx.Response:
            return browser.http.post("/logout/backchannel", data={"logout_token": token})

        for changes in ({"aud": "other"}, {"iss": "https://evil.example"}, {"events": {}}, {"nonce": "x"}):
            assert told(logout_token(lab, "u-dan", **changes)).status_code == 403
        assert signed_in(browser.get("/"))
        good = logout_token(lab, "u-dan")
        assert told(good).status_code == 200
        assert not signed_in(browser.get("/"))
        assert signed_in(other.get("/"))
        browser.sign_in("u-dan")
        assert told(good).json()["error"] == "token_used"
        assert signed_in(browser.get("/"))


@pytest.mark.control("ID-01")
@pytest.mark.parametrize("issuer", ["https://evil.example", None])
def test_an_answer_that_is_not_the_providers_own_is_refused(lab: SsoLab, issuer: str | None) -> None:
    with lab.browser() as browser:
        begun = browser.http.get("/login")
        state = parse_qs(urlsplit(begun.headers["location"]).query)["state"][0]
        query = f"/callback?state={state}&code=x" + (f"&iss={issuer}" if issuer else "")
        page = browser.http.get(query)
        assert (page.status_code, "wrong_issuer" in page.text) == (403, True)


def test_what_the_provider_refuses_is_said(lab: SsoLab) -> None:
    with lab.browser() as browser:
        begun = browser.http.get("/login")
        state = parse_qs(urlsplit(begun.headers["location"]).query)["state"][0]
        page = browser.http.get(f"/callback?state={state}&error=access_denied&iss={lab.provider.issuer}")
        assert page.status_code == 403
        assert "access_denied" in page.text


@pytest.mark.control("ID-01")
def test_only_the_configured_provider_is_spoken_to(lab: SsoLab, tmp_path: Path) -> None:
    assert lab.config.sso is not None
    wanted = lab.config.sso.provider

    def refused(**changes: Any) -> str:
        provider = Provider(msgspec.structs.replace(wanted, **changes), time.monotonic)
        try:
            with pytest.raises(BrokerError) as error:
                provider.exchange("x", "v" * 43, lab.config.sso.redirect_uri)  # type: ignore[union-attr]
            return getattr(error.value, "error", error.value.code)
        finally:
            provider.close()

    (tmp_path / "secret").write_text("wrong\n")
    assert refused() == "invalid_grant"  # the provider knows the client, and not the code
    assert refused(client_secret_file=str(tmp_path / "secret")) == "invalid_client"
    assert refused(issuer=f"{wanted.issuer}/") == "wrong_issuer"
    assert refused(ca_file=str(lab.ca_file)) == "provider_unavailable"
    assert refused(issuer="https://localhost:1") == "provider_unavailable"


@pytest.mark.control("ID-01")
def test_while_the_provider_is_away_a_check_that_is_due_refuses_and_nobody_gets_in() -> None:
    with sso_lab(Path(tempfile.mkdtemp(prefix="saw-sso-"))) as own, own.browser() as browser, own.browser() as late:
        browser.sign_in("u-ben")
        waiting = late.get("/login")
        assert waiting.status_code == 200
        code = browser.http.post("/v1/sso/device").json()
        own.provider.stop()
        # who asks too early is answered without asking the provider
        handle = {"handle": code["handle"]}
        assert browser.http.post("/v1/sso/device/poll", json=handle).json()["pending"] is True
        sql(own, "UPDATE sso_logins SET poll_at = '2026-01-01T00:00:00.000Z'")
        assert browser.http.post("/v1/sso/device/poll", json=handle).json()["error"] == "provider_unavailable"
        assert signed_in(browser.get("/"))
        age(own, "ben@example.com", "checked_at", minutes=10)
        page = browser.get("/")
        assert (page.status_code, "provider_unavailable" in page.text) == (503, True)
        query = f"state={parse_qs(urlsplit(late.trail[0]).query)['state'][0]}&code=x&iss={own.provider.issuer}"
        assert late.http.get(f"/callback?{query}").status_code == 503
        # the operator's way in needs no provider
        assert own.operator.request("GET", "/v1/workspaces")["workspaces"] == []


@pytest.mark.control("ID-01")
def test_a_code_that_nobody_confirmed_gives_no_session(lab: SsoLab) -> None:
    with lab.browser() as browser:
        begun = browser.http.post("/v1/sso/device").json()
        assert begun["interval"] >= 1

        def poll(handle: str) -> httpx.Response:
            return browser.http.post("/v1/sso/device/poll", json={"handle": handle})

        assert poll(begun["handle"]).json()["pending"] is True  # too early: the provider is not asked
        sql(lab, "UPDATE sso_logins SET poll_at = '2026-01-01T00:00:00.000Z'")
        assert poll(begun["handle"]).json()["pending"] is True  # asked, and nobody has agreed
        assert poll("x" * 43).json()["error"] == "unknown_sign_in"
        sql(lab, "UPDATE sso_logins SET expires_at = '2026-01-01T00:00:00.000Z'")
        assert poll(begun["handle"]).json()["error"] == "unknown_sign_in"
        # a handle is no state of a browser's sign-in
        begun = browser.http.post("/v1/sso/device").json()
        page = browser.http.get(f"/callback?state={begun['handle']}&code=x")
        assert (page.status_code, "unknown_sign_in" in page.text) == (403, True)


@pytest.mark.control("LIF-02")
def test_who_was_an_operator_a_moment_ago_cuts_nothing_off(lab: SsoLab) -> None:
    lab.activate("ws-cut")
    lab.provider.change("u-dan", groups=["operators"])
    try:
        with lab.browser() as browser:
            form = {"confirm": "ws-cut", "reason": "scans its neighbours"}
            page = browser.sign_in("u-dan", to="/workspaces/ws-cut")
            assert "Quarantine ws-cut" in page.text
            form["csrf"] = browser.csrf()
            lab.provider.change("u-dan", groups=["auditors"])
            refused = browser.http.post("/workspaces/ws-cut/kill", data=form)
            assert (refused.status_code, "not_allowed" in refused.text) == (403, True)
            assert lab.operator.request("GET", "/v1/workspaces/ws-cut")["state"] == "active"
            lab.provider.change("u-dan", groups=["operators"])
            done = browser.http.post("/workspaces/ws-cut/kill", data=form)
            assert (done.status_code, done.headers["location"]) == (303, "/workspaces/ws-cut")
            shown = lab.operator.request("GET", "/v1/workspaces/ws-cut")
            assert (shown["state"], shown["state_reason"]) == ("quarantined", "scans its neighbours")
    finally:
        lab.provider.change("u-dan", groups=["staff"])
    events = lab.audited(principal="user:dan@example.com", class_uid=6003)
    assert [event["status"] for event in events if event["api"]["operation"] == "workspace.kill"] == [
        "Failure",
        "Success",
    ]


@pytest.mark.control("ID-01")
def test_an_operator_who_signed_in_operates_without_a_login_on_the_control_host(lab: SsoLab, tmp_path: Path) -> None:
    lab.activate("ws-far")
    context = tmp_path / "context.json"
    context.write_text(json.dumps({"broker": {"sign_in": True}}))

    def operate(*arguments: str) -> subprocess.CompletedProcess[str]:
        return saw(lab, tmp_path, *arguments, "--context", str(context))

    nobody = operate("workspace", "list")
    assert (nobody.returncode, "saw login" in nobody.stderr) == (1, True)
    lab.provider.change("u-dan", groups=["operators"])
    try:
        assert command_login(lab, tmp_path, "u-dan")["roles"] == ["operator"]
        listed = operate("workspace", "list", "--json")
        assert "ws-far" in listed.stdout, listed.stderr
        lab.provider.change("u-dan", groups=["auditors"])
        refused = operate("workspace", "kill", "ws-far", "--reason", "scans its neighbours")
        assert (refused.returncode, "takes the role operator or security" in refused.stderr) == (1, True)
        assert lab.operator.request("GET", "/v1/workspaces/ws-far")["state"] == "active"
        lab.provider.change("u-dan", groups=["operators"])
        killed = operate("workspace", "kill", "ws-far", "--reason", "scans its neighbours")
        assert killed.returncode == 0, killed.stderr
        shown = lab.operator.request("GET", "/v1/workspaces/ws-far")
        assert (shown["state"], shown["state_reason"]) == ("quarantined", "scans its neighbours")
    finally:
        lab.provider.change("u-dan", groups=["staff"])
