"""A terminal in the browser goes the way of every session: the own workspace, the bastion, the recorder, and its ends."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import ROWS, SAID, Chromium, chromium
from page_rig import Page, ask, leftovers, settings, ticket
from session_rig import Bastion, Terminal, running
from sso_rig import Browser, SsoLab, sso_lab, until

from saw.broker.sso.terminal import WINDOW
from saw.broker.terminal.client import READ_BYTES

pytestmark = pytest.mark.control("ID-02")
VIOLATIONS = """
window.violations = [];
document.addEventListener('securitypolicyviolation', (event) =>
  violations.push([event.violatedDirective, event.blockedURI, event.sourceFile, event.lineNumber, event.columnNumber].join(' ')));
"""


@pytest.fixture(scope="module")
def there() -> Iterator[tuple[SsoLab, Bastion]]:
    """A broker with a sign-in, a bastion and terminals; ``ws-a`` is ada's, and who has one has two at most."""
    directory = Path(tempfile.mkdtemp(prefix="saw-pages-"))
    told = settings(directory)
    with sso_lab(directory, **told) as lab, running(lab, directory, told["terminal"].bastion.port) as bastion:
        yield lab, bastion


@pytest.fixture(scope="module")
def ada(there: tuple[SsoLab, Bastion]) -> Iterator[Browser]:
    with there[0].browser() as browser:
        browser.sign_in("u-ada")
        yield browser


@pytest.fixture(scope="module")
def ben(there: tuple[SsoLab, Bastion]) -> Iterator[Browser]:
    with there[0].browser() as browser:
        browser.sign_in("u-ben")
        yield browser


def gone(lab: SsoLab, bastion: Bastion) -> None:
    """Nothing of any terminal is left."""
    until(lambda: leftovers(lab, bastion) == ([], []), 60)


def type_line(page: Chromium, text: str) -> None:
    page.type(text)
    page.key("Enter", "\r", 13)


@pytest.mark.thorough
def test_a_person_with_a_browser_alone_works_in_a_terminal_and_plays_the_recording(
    there: tuple[SsoLab, Bastion], tmp_path: Path
) -> None:
    lab, bastion = there
    profile = tmp_path / "profile"
    profile.mkdir()
    with chromium(profile) as page:
        page.send("Page.addScriptToEvaluateOnNewDocument", source=VIOLATIONS)
        page.sign_in(lab.origin, lab.provider.issuer, "u-ada")
        page.go(f"{lab.origin}/workspaces/ws-a")
        page.run("document.querySelector('a[href=\"/workspaces/ws-a/terminal\"]').click()")
        page.until(f"document.getElementById('said') && {SAID}.startsWith('Session ses-')")
        session = str(page.run(SAID)).split()[1]
        type_line(page, "PS1='$ '; stty -echo; clear; echo in-$((40+2))-chromium")
        page.until(f"{ROWS}.includes('in-42-chromium')")
        # colours and sizes of xterm.js work under the policy of the pages, and what a program shows never is HTML
        type_line(page, "printf '\\033[38;2;1;200;3mgreen\\033[0m<img src=x onerror=document.title=1>\\n'")
        page.until(f"{ROWS}.includes('<img src=x')")
        colour = "[...document.querySelectorAll('.xterm-rows span')].find((one) => one.innerText === 'green')"
        assert page.run(f"getComputedStyle({colour}).color") == "rgb(1, 200, 3)"
        assert page.run("document.images.length") == 0
        height = page.run("document.querySelector('.xterm-rows > div').getBoundingClientRect().height")
        assert 10 < height < 40
        # the workspace learns the size of the window
        page.send("Emulation.setDeviceMetricsOverride", width=700, height=900, deviceScaleFactor=1, mobile=False)
        type_line(page, "until [ $(stty size | cut -d' ' -f2) -lt 90 ]; do :; done; echo small-$((40+2))")
        page.until(f"{ROWS}.includes('small-42')")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        page.send("Emulation.clearDeviceMetricsOverride")
        # what is cut off while somebody works says so, and can be opened again when it is released
        lab.operator.request("POST", "/v1/workspaces/ws-a/kill", {"reason": "scans its neighbours"})
        page.until("document.querySelector('#said.bad').innerText.includes('It has ended (workspace_quarantined)')")
        page.run("document.getElementById('again').click()")
        page.until("document.querySelector('#said.bad').innerText.includes('ws-a is quarantined. What helps:')")
        bastion.sql("UPDATE workspaces SET state = 'active' WHERE id = 'ws-a'")
        page.run("document.getElementById('again').click()")
        page.until(f"{SAID}.startsWith('Session ses-')")
        assert page.run(SAID) != f"Session {session}"
        if wanted := os.environ.get("SAW_PICTURES"):
            type_line(page, "PS1='agent@ws-a:~$ '; clear; git --version; ls --color=always -d /usr/*; tty")
            page.until(f"{ROWS}.includes('git version')")
            page.picture(Path(wanted) / "terminal.png")
        type_line(page, "exit")
        page.until("document.getElementById('said').innerText.includes('It has ended (closed)')")
        assert page.run("violations") == []

        assert bastion.closed(session)["reason"] == "workspace_quarantined"
        page.go(f"{lab.origin}/sessions/{session}")
        page.until(f"location.pathname === '/sessions/{session}' && document.querySelector('#play:not([hidden])')")
        assert not [one for one in bastion.audited(session) if one[0] == "session.replay"]
        page.run("document.getElementById('speed').value = '0'; document.querySelector('#play button').click()")
        page.until("document.getElementById('said').innerText.startsWith('It ends here.')")
        assert page.run(f"{ROWS}.includes('<img src=x') && {ROWS}.includes('small-42')")
        assert page.run(f"getComputedStyle({colour}).color") == "rgb(1, 200, 3)"
        assert page.run("document.images.length") == 0
        assert "workspace_quarantined" in page.run(SAID)
        if wanted:
            page.run("document.getElementById('replay').scrollIntoView()")
            page.picture(Path(wanted) / "replay.png")
        assert page.run("violations") == []
        assert [one for one in bastion.audited(session) if one[0] == "session.replay"]

        page.send("Emulation.setScriptExecutionDisabled", value=True)
        page.go(f"{lab.origin}/workspaces/ws-a/terminal")
        assert "saw ssh ws-a" in page.run("document.querySelector('noscript pre').innerText")
    gone(lab, bastion)


def test_what_is_typed_in_a_page_goes_through_the_bastion_and_is_recorded(
    there: tuple[SsoLab, Bastion], ada: Browser
) -> None:
    lab, bastion = there
    page = Page(lab, ada, ticket(ada))
    session = page.begin(columns=91, rows=33)
    page.type("stty -echo; echo size-$(stty size | tr ' ' x)\n")
    page.until_shown("size-33x91")
    page.say(size={"columns": 77, "rows": 20})
    page.type("until [ \"$(stty size)\" = '20 77' ]; do :; done; echo now-$((40+2))\n")
    page.until_shown("now-42")
    shown = bastion.show(session)
    assert (shown["who"], shown["workspace"], shown["from"], shown["terminal"]) == (
        "user:ada@example.com", "ws-a", "127.0.0.1", True,
    )  # fmt: skip
    page.type("exit 3\n")
    assert page.end() == {
        "ended": {"session": session, "reason": "closed", "message": "The shell has ended.", "exit_code": 3}
    }
    assert bastion.closed(session)["reason"] == "closed"
    # its certificate counts from the broker's host alone; who asked, and from where, is in the trail
    [asked] = [one["event"] for one in lab.events() if one["event"].get("session", {}).get("uid") == session][:1]
    assert asked["unmapped"]["saw"]["principal"] == "user:ada@example.com"
    assert asked["unmapped"]["saw"]["source_address"] == "127.0.0.1"
    assert "127.0.0.1" in asked["src_endpoint"].values()
    assert "now-42" in bastion.saw("replay", session).stdout
    gone(lab, bastion)


def test_a_connection_takes_a_ticket_of_this_sign_in_for_this_workspace_once_from_a_page_of_ours(
    there: tuple[SsoLab, Bastion], ada: Browser, ben: Browser
) -> None:
    lab, bastion = there
    refused = (403, "ticket_refused")
    assert Page(lab, ada, "").refusal == refused
    assert Page(lab, ada, "A" * 43).refusal == refused
    assert Page(lab, ada, ticket(ada), origin="https://evil.example").refusal == (403, "wrong_origin")
    assert Page(lab, ada, ticket(ada), origin=None).refusal == (403, "wrong_origin")
    assert Page(lab, ada, ticket(ada), host="localhost").refusal == (403, "wrong_host")
    assert Page(lab, ben, ticket(ada)).refusal == refused
    with lab.browser() as nobody:
        assert Page(lab, nobody, ticket(ada)).refusal == (401, "not_signed_in")
    with lab.browser() as again:
        again.sign_in("u-ada")
        assert Page(lab, again, ticket(ada)).refusal == refused
    other = ticket(ada)
    assert Page(lab, ada, other, "ws-z").refusal == refused
    # it was shown for something else, which used it up
    assert Page(lab, ada, other).refusal == refused

    secret = ticket(ada)
    page = Page(lab, ada, secret)
    session = page.begin()
    assert Page(lab, ada, secret).refusal == refused
    page.type("stty -echo; echo live-$((40+2))\n")
    page.until_shown("live-42")
    page.close()
    assert bastion.closed(session)["reason"] == "client_gone"
    gone(lab, bastion)


def test_only_the_sponsor_of_an_active_workspace_gets_a_ticket_and_reads_why_not(
    there: tuple[SsoLab, Bastion], ada: Browser, ben: Browser
) -> None:
    lab, bastion = there
    # what a person may not see does not exist; an auditor sees it, and opens nothing
    assert (ask(ben).status_code, ask(ben).json()["code"]) == (404, "unknown_workspace")
    lab.provider.change("u-cleo", groups=["auditors"])
    with lab.browser() as cleo:
        cleo.sign_in("u-cleo")
        assert (ask(cleo).status_code, ask(cleo).json()["code"]) == (403, "not_entitled")
        page = cleo.get("/workspaces/ws-a/terminal")
        assert (page.status_code, "not_your_workspace" in page.text) == (403, True)
    assert lab.audited(class_uid=3002, status_detail="not_entitled")
    unasked = ada.post("/workspaces/ws-a/terminal", {}, csrf="another")
    assert (unasked.status_code, unasked.json()["code"]) == (403, "csrf")

    secret = ticket(ada)
    lab.operator.request("POST", "/v1/workspaces/ws-a/kill", {"reason": "scans its neighbours"})
    try:
        refused = ask(ada)
        assert (refused.status_code, refused.json()["code"]) == (403, "workspace_not_admitted")
        assert refused.json()["message"] == "ws-a is quarantined"
        # one that was asked for before is not opened either
        page = Page(lab, ada, secret)
        page.say(size={"columns": 80, "rows": 24})
        assert page.end()["refused"]["code"] == "workspace_not_admitted"
    finally:
        bastion.sql("UPDATE workspaces SET state = 'active' WHERE id = 'ws-a'")
    page = Page(lab, ada, ticket(ada))
    page.begin()
    page.close()
    gone(lab, bastion)


def test_a_person_has_as_many_terminals_as_the_broker_allows(there: tuple[SsoLab, Bastion], ada: Browser) -> None:
    lab, bastion = there
    early = ticket(ada)
    first = Page(lab, ada, early)
    first.begin()
    late, spare = ticket(ada), None
    second = Page(lab, ada, late)
    second.begin()
    refused = ask(ada)
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_terminals")
    first.close()
    until(lambda: ask(ada).status_code == 200, 60)
    spare = ticket(ada)
    third = Page(lab, ada, spare)
    third.begin()
    for page in (second, third):
        page.close()
    gone(lab, bastion)


@pytest.mark.control("ID-03")
@pytest.mark.parametrize("loss", ["role", "operator", "sign-out"])
def test_a_live_terminal_drops_with_its_reason_and_says_it(there: tuple[SsoLab, Bastion], loss: str) -> None:
    lab, bastion = there
    with lab.browser() as ada:
        ada.sign_in("u-ada")
        page = Page(lab, ada, ticket(ada))
        session = page.begin()
        page.type("stty -echo; echo live-$((40+2))\n")
        page.until_shown("live-42")
        try:
            if loss == "role":
                lab.provider.change("u-ada", groups=["auditors"])
                bastion.sql("UPDATE sso_sessions SET checked_at = '2026-01-01T00:00:00+00:00'")
                assert ada.get("/").status_code == 200
            elif loss == "operator":
                lab.operator.request("POST", f"/v1/sessions/{session}/end", {"reason": "lunch"})
            else:
                ada.http.post("/sign-out", data={"csrf": ada.csrf()})
            said = page.end()["ended"]
        finally:
            lab.provider.change("u-ada", groups=["staff", "approvers", "maintainers"])
            bastion.sql("UPDATE sso_sessions SET checked_at = '2026-01-01T00:00:00+00:00'")
    reason = {"role": "not_entitled", "operator": "ended_by_operator", "sign-out": "sign_in_ended"}[loss]
    assert (said["session"], said["reason"]) == (session, reason)
    assert said["message"]
    assert f"the session has ended: {reason}".encode() in page.shown
    assert bastion.closed(session)["reason"] == reason
    gone(lab, bastion)


def test_what_nobody_reads_waits_in_the_workspace_and_what_is_too_large_ends_it(
    there: tuple[SsoLab, Bastion], ada: Browser
) -> None:
    lab, bastion = there
    page = Page(lab, ada, ticket(ada))
    page.begin()
    page.type("stty -echo; echo begin; yes | head -c 600000; echo end-$((40+2))\n")
    # nothing is confirmed: the broker stops after its window
    page.until(lambda: len(page.shown) - page.confirmed >= WINDOW, confirm=False)
    assert page.quiet(1.0)
    assert len(page.shown) - page.confirmed < WINDOW + READ_BYTES
    page.confirm(WINDOW)
    page.until_shown("end-42")
    page.type(b"x" * 65537)
    page.until(lambda: page.ended)
    gone(lab, bastion)

    wrong = Page(lab, ada, ticket(ada))
    wrong.begin()
    wrong.say(size={"columns": 0, "rows": 24})
    assert wrong.end()["refused"]["code"] == "malformed"
    gone(lab, bastion)


def test_ssh_of_a_terminal_reads_nothing_of_the_broker(there: tuple[SsoLab, Bastion]) -> None:
    lab, _ = there
    directory = Path(tempfile.mkdtemp(prefix="term-"))
    (directory / "own").write_text("own")
    key = lab.config.keys / "sessions.key"
    assert key.is_file()
    child = [sys.executable, "-I", "-m", "saw.broker.terminal.child", str(directory), "22", "--"]
    try:
        client = Terminal([*child, "cat", str(directory / "own"), str(key)])
        assert client.ends() == 1
    finally:
        shutil.rmtree(directory)
    assert client.seen.startswith(b"own")
    assert b"Permission denied" in client.seen


@pytest.mark.thorough
def test_a_broker_that_was_killed_leaves_no_ssh_and_no_key(there: tuple[SsoLab, Bastion], ada: Browser) -> None:
    lab, bastion = there
    page = Page(lab, ada, ticket(ada))
    page.begin()
    page.type("stty -echo; echo live-$((40+2))\n")
    page.until_shown("live-42")
    assert lab.process is not None
    lab.process.kill()
    lab.process.wait()
    until(lambda: leftovers(lab, bastion)[1] == [], 60)
    assert len(leftovers(lab, bastion)[0]) == 1
    lab.start()
    bastion.configure(broker_url=f"https://127.0.0.1:{lab.port}")
    assert leftovers(lab, bastion) == ([], [])
    page = Page(lab, ada, ticket(ada))
    page.begin()
    # one that is stopped ends them itself
    lab.stop()
    page.until(lambda: page.ended)
    gone(lab, bastion)
    lab.start()
    bastion.configure(broker_url=f"https://127.0.0.1:{lab.port}")
