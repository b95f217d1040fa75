"""The pages as a person without a mouse, or with weak eyes, meets them: WCAG 2.2 AA by axe-core, and a decision by keys alone."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from broker_rig import encode
from chromium import ROWS, SAID, Chromium, chromium
from git_rig import Repository
from page_rig import settings
from session_rig import Bastion, running
from sso_rig import SsoLab, sso_lab
from starlette.routing import Route
from tool_world import GOVERNANCE_YAML, PARAMS, POLICY_YAML

from databases import beside
from saw.addressing import Band
from saw.broker.break_glass_settings import BreakGlassSettings
from saw.broker.clock import iso
from saw.broker.forwarding_settings import ForwardingSettings
from saw.broker.gate_settings import GateSettings, MachineSettings
from saw.broker.job_settings import JobSettings
from saw.broker.number_settings import NumberSettings
from saw.broker.sso.fleet_pages import PARTS
from saw.broker.sso.pages import page_routes
from saw.identity.x509 import Authority, new_key_and_csr
from saw.review.gate import BoundFile, BoundHost, GateStatement
from saw.review.messages import ReviewedCall
from saw.review.tool import AskTool

AXE = Path(__file__).parents[2] / "pages/node_modules/axe-core/axe.min.js"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
MOST_PAGES = 60
NOT_SHOWN = {"/login", "/callback", "/audit/download", "/jobs/{id}/now", "/v1/sso/whoami"}
LEAST_CONTRAST = """() => {
  const parts = (colour) => colour.match(/[0-9.]+/g).slice(0, 3).map((one) => one / 255);
  const linear = (one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  const light = (colour) => parts(colour).map(linear).reduce((sum, one, at) => sum + one * [0.2126, 0.7152, 0.0722][at], 0.05);
  const ground = light(getComputedStyle(document.querySelector('.xterm-viewport')).backgroundColor);
  const spans = [...document.querySelectorAll('.xterm-rows span')].filter((one) => one.innerText.trim() === 'some');
  return spans.length !== 8 ? 0 : Math.min(...spans.map((one) => {
    const shown = light(getComputedStyle(one).color);
    return Math.max(shown, ground) / Math.min(shown, ground);
  }));
}"""
"""The smallest contrast of a word in one of eight colours with what is behind it, as WCAG 2.2 defines it."""
OFFERED = {"broken glass": {"uphold", "reject"}}
_ID = re.compile(r"[0-9a-f]{8,}[0-9a-f-]*|[0-9A-HJKMNP-TV-Z]{26}|\d{4,}")


@dataclass(frozen=True)
class Pages:
    """A lab in which there is something to see on each page, and where the kinds are that look alike by their paths."""

    lab: SsoLab
    bastion: Bastion
    reviews: dict[str, str]
    """A review of each kind, by what it is about."""

    @property
    def origin(self) -> str:
        return self.lab.origin


@pytest.fixture(scope="module")
def pages() -> Iterator[Pages]:
    directory = Path(tempfile.mkdtemp(prefix="saw-axe-"))
    told = settings(directory)
    with (
        sso_lab(
            directory,
            jobs=JobSettings(lease_s=600, worker_socket=str(directory / "worker.sock")),
            gates={"update": GateSettings(group="maintainers")},
            machines={"awx": MachineSettings(scopes=("gate:update",))},
            break_glass=BreakGlassSettings(group="break-glass"),
            numbers=NumberSettings(places={"north": Band(300, 309)}),
            forwarding=ForwardingSettings(ports=("3000",)),
            **told,
        ) as found,
        running(found, directory, told["terminal"].bastion.port) as bastion,
    ):
        found.activate("ws-b")
        found.provider.change("u-ada", groups=["staff", "approvers", "maintainers", "operators", "auditors"])
        handed = {
            "workspace_id": "ws-a",
            "task": "settle the invoices of November",
            "resources": [{"host": "api.example.com"}],
            "duration_s": 3600,
        }
        found.operator.request("POST", "/v1/delegations", handed)
        asked = {
            "kind": "stop",
            "workspace": "ws-b",
            "parameters": {"reason": "week-end"},
            "idempotency_key": "accessible",
        }
        found.operator.request("POST", "/v1/jobs", asked)
        found.operator.request("POST", "/v1/holds", {"workspace": "ws-a", "reason": "case 7"})
        stated = GateStatement(
            gate="update", purpose="kernel of November", requested_by="ada", total=1, hosts=(BoundHost(name="ws-a"),),
            files=(BoundFile(path="update.yml", kind="file", sha256="1" * 64),),
        )  # fmt: skip
        gate = found.operator.request("POST", "/v1/gates", {"statement": msgspec.to_builtins(stated)})
        broken = found.open_review()
        break_glass_of(found, broken)
        reviews = {
            "call": found.open_review(),
            "push": push_of(found, directory / "repository"),
            "gate": str(gate["id"]),
            "tool": of_an_agent(found),
            "broken glass": broken,
        }
        yield Pages(found, bastion, reviews)


def of_an_agent(lab: SsoLab) -> str:
    """Have the agent of ``ws-b`` ask for more policy, and for the call of a tool that people decide on; return that review."""
    text = {"content": POLICY_YAML.decode(), "governance": GOVERNANCE_YAML.decode()}
    digest, publication = lab.officers.publication(1, **text)
    lab.operator.request("POST", "/v1/policy/publish", encode(publication))
    with beside(lab.config) as store:
        store.execute("UPDATE workspaces SET policy_digest = ? WHERE id = 'ws-b'", (digest,))
    wish = {
        "workspace_id": "ws-b", "policy_digest": digest, "host": "api.example.com", "port": 443, "scheme": "https",
        "method": "GET", "path": "/v2/list", "program": "/usr/bin/curl", "reason": "the task names this list",
    }  # fmt: skip
    key, csr = new_key_and_csr("ws-b")
    identity = Authority.load(lab.config.keys / "x509").issue_svid(csr, "ws-b", digest, datetime.now(UTC))
    with lab.tls(pair=(key, identity)) as agent:
        tool = AskTool(workspace_id="ws-b", policy_digest=digest, server="files", params=PARAMS)
        answers = [
            agent.post("/v1/workspace/policy-requests", json=wish),
            agent.post("/v1/workspace/reviews", content=msgspec.json.encode(tool)),
        ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
    return str(answers[1].json()["id"])


def push_of(lab: SsoLab, folder: Path) -> str:
    """Open the review of a push that changes a file, and read its far end as the perimeter does."""
    git = Repository(folder)
    old = git.commit({"notes.txt": "one\ntwo\n", "old.txt": "gone\n"})
    new = git.commit({"notes.txt": "one\nthree\n", "old.txt": None, "new.txt": "here\n"}, "the notes of November")
    path = "/team/app.git/git-receive-pack"
    call = ReviewedCall(
        method="POST", scheme="https", host="git.example.com", port=443, path=path, body=git.push(old, new)
    )
    review = lab.open_call(call)
    theirs = git.raw("pack-objects", "--stdout", "--revs", "-q", given=old.encode())
    with lab.tls("perimeter", "edge") as perimeter:
        asked = perimeter.post("/v1/perimeter/reviews/claim", json={"wait": 0}).json()["read_context"]
        assert (asked["id"], asked["wants"]) == (review, [old])
        told = {"step": asked["step"], "outcome": "read", "pack": base64.b64encode(theirs).decode()}
        assert perimeter.post(f"/v1/perimeter/reviews/{review}/context", json=told).json() == {"recorded": True}
    return review


def break_glass_of(lab: SsoLab, review: str) -> None:
    """Leave what breaking the glass of a review leaves, and an event of a perimeter, for pages to show."""
    now, due = (iso(datetime.now(UTC) + timedelta(hours=hours)) for hours in (0, 24))
    with beside(lab.config) as store:
        store.execute(
            "UPDATE reviews SET state = 'done', broken_at = ?, broken_keys = 2, after_state = 'owed', after_due_at = ?"
            " WHERE id = ?",
            (now, due, review),
        )
        store.execute("INSERT INTO audit_heads (source, seq, hash) VALUES ('north', 3, ?)", ("1" * 64,))


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Chromium]:
    directory = tmp_path / "profile"
    directory.mkdir()
    with chromium(directory) as found:
        yield found


def violations(page: Chromium) -> list[str]:
    """Return what axe-core finds on the page as it is shown: rule, place and its own words."""
    assert AXE.exists(), "run scripts/bootstrap.sh: it installs axe-core"
    options = json.dumps({"runOnly": {"type": "tag", "values": RULES}, "resultTypes": ["violations"]})
    page.run(f"{AXE.read_text(encoding='utf-8')};0")
    found = page.send(
        "Runtime.evaluate",
        expression=f"axe.run(document, {options}).then(r => JSON.stringify(r.violations))",
        returnByValue=True,
        awaitPromise=True,
    )
    assert "exceptionDetails" not in found, found["exceptionDetails"]
    told: list[dict[str, Any]] = json.loads(found["result"]["value"])
    return [
        f"{one['id']}: {node['target'][0]}: {' '.join(node['failureSummary'].split())}"
        for one in told
        for node in one["nodes"]
    ]


def kind(path: str, pages: Pages) -> str:
    """Return ``path`` without what names one thing: pages of a kind look alike. Reviews are of a kind by what they are about."""
    about = {f"/reviews/{review}": f"/reviews/{name}" for name, review in pages.reviews.items()}
    return about.get(path) or _ID.sub("ID", path.partition("?")[0])


def crawl(page: Chromium, pages: Pages) -> Iterator[str]:
    """Go to one page of each kind that links lead to but a terminal, which begins a session, and yield its path."""
    waiting = ["/", "/workspaces/ws-a/sessions"]  # the second one is linked where there are many
    seen = set(waiting)
    while waiting:
        path = waiting.pop(0)
        page.go(f"{pages.origin}{path}")
        yield path
        links = page.run(
            "[...document.querySelectorAll('a[href]:not([href*=download])')].filter(a => a.origin === location.origin)"
            ".map(a => a.pathname + a.search)"
        )
        for link in links:
            if (of := kind(link, pages)) not in seen and not link.endswith("/terminal"):
                seen.add(of)
                waiting.append(link)
        assert len(seen) <= MOST_PAGES, sorted(seen)


def in_both(page: Chromium) -> list[str]:
    """Return what is found in light and in dark, and whether something is wider than the window."""
    found = []
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        found += [f"{scheme}: {told}" for told in violations(page)]
    if not page.run("document.documentElement.scrollWidth <= innerWidth"):
        found.append("wider than the window")
    return found


def page_kinds() -> list[Route]:
    """Return the routes of all that is shown: those of GET but what only leads on, downloads, or answers a script."""
    routes = page_routes(Mock(), Mock())
    shown = [route for route in routes if "GET" in (route.methods or ()) and route.path not in NOT_SHOWN]
    assert {route.path for route in routes} >= NOT_SHOWN
    return shown


@pytest.mark.thorough
def test_every_page_is_accessible_in_light_and_dark(pages: Pages, page: Chromium) -> None:
    lab, found = pages.lab, dict[str, list[str]]()
    page.go(f"{pages.origin}/sign-in")
    found["/sign-in"] = in_both(page)
    page.sign_in(pages.origin, lab.provider.issuer, "u-ada")
    session = terminal_found(pages, page, found)
    paths = ["/sign-in", "/workspaces/ws-a/terminal"]
    for path in crawl(page, pages):
        paths.append(kind(path, pages))
        found[path] = in_both(page)
    page.go(f"{pages.origin}/sessions/{session}")
    page.until("document.querySelector('#play:not([hidden])')")
    page.run("document.getElementById('speed').value = '0'; document.querySelector('#play button').click()")
    page.until(f"{SAID}.includes('It ends here.') && {ROWS}.includes('plain')")
    found["a recording that was played"] = in_both(page)
    for path, _, _ in PARTS:
        page.go(f"{pages.origin}{path}")
        assert page.run("document.querySelectorAll('tbody tr').length"), (
            f"{path} shows nothing, so nothing of it was tested"
        )
    for path in ("/fleet/images?q=none", "/fleet/people?q=none"):
        page.go(f"{pages.origin}{path}")
        found[path] = violations(page)
    page.go(f"{pages.origin}/reviews/none-such")
    found["an error"] = in_both(page)
    assert {name: told for name, told in found.items() if told} == {}
    unseen = [route.path for route in page_kinds() if not any(route.path_regex.match(path) for path in paths)]
    assert unseen == [], " ".join(paths)
    assert {f"/reviews/{name}" for name in pages.reviews} <= set(paths), " ".join(paths)


def terminal_found(pages: Pages, page: Chromium, found: dict[str, list[str]]) -> str:
    """Work in a terminal, look at it while it lives and when it has ended, and return the id of its session."""
    page.go(f"{pages.origin}/workspaces/ws-a/terminal")
    page.until(f"{SAID}.startsWith('Session ses-')")
    session = str(page.run(SAID)).split()[1]
    page.type(
        "PS1='$ '; clear; for one in 30 31 32 33 34 35 36 37; do printf '\\033[%smsome \\033[0m' $one; done; echo plain"
    )
    page.key("Enter", "\r", 13)
    page.until(f"{ROWS}.includes('some some plain')")
    found["a terminal at work"] = in_both(page)
    assert page.run(f"({LEAST_CONTRAST})()") >= 4.5  # axe does not look at what a program shows
    page.type("exit")
    page.key("Enter", "\r", 13)
    page.until(f"{SAID}.includes('It has ended (closed)')")
    found["a terminal that has ended"] = in_both(page)
    assert pages.bastion.closed(session)["terminal"]
    return session


@pytest.mark.control("REV-02")
def test_each_kind_of_review_is_accessible_to_whoever_decides(pages: Pages, page: Chromium) -> None:
    """With the buttons of a decision, which ask for a passkey, and with those of whoever holds a key to the glass."""
    pages.lab.provider.change("u-ben", groups=["staff", "approvers", "maintainers", "break-glass"])
    page.virtual_authenticator()
    page.sign_in(pages.origin, pages.lab.provider.issuer, "u-ben")
    register(page, pages.origin)
    found = {"/passkeys": in_both(page)}
    for name, review in pages.reviews.items():
        page.go(f"{pages.origin}/reviews/{review}")
        page.until("document.querySelector('#decide button:not(:disabled)')")
        offered = set(page.run("[...document.querySelectorAll('#decide button')].map((one) => one.value)"))
        assert offered == OFFERED.get(name, {"approve", "deny", "break_glass"}), name
        found[name] = in_both(page)
        if name == "push":
            assert page.run("document.querySelectorAll('section.agent ins, section.agent del').length") == 3
    assert {name: told for name, told in found.items() if told} == {}


def register(page: Chromium, origin: str) -> None:
    """Register a passkey of the virtual authenticator."""
    page.go(f"{origin}/passkeys")
    page.until("document.querySelector('#register button:not(:disabled)')")
    page.run("document.getElementById('label').value = 'laptop'; document.querySelector('#register button').click()")
    page.until("document.querySelector('td') && document.body.innerText.includes('laptop')")


@pytest.mark.control("REV-02")
def test_a_review_is_read_and_approved_by_keys_alone(pages: Pages, page: Chromium) -> None:
    review = pages.lab.open_review()
    page.virtual_authenticator()
    page.sign_in(pages.origin, pages.lab.provider.issuer, "u-cleo")
    tab_to(page, "a[href='/passkeys']")
    page.key("Enter", "\r", 13)
    page.until("document.querySelector('#register button:not(:disabled)')")
    tab_to(page, "#label")
    page.type("keyboard")
    tab_to(page, "#register button")
    page.key("Enter", "\r", 13)
    page.until("document.querySelector('td') && document.body.innerText.includes('keyboard')")
    tab_to(page, "a[href='/reviews']")
    page.key("Enter", "\r", 13)
    page.until("location.pathname === '/reviews' && document.readyState === 'complete'")
    tab_to(page, f"a[href='/reviews/{review}']")
    page.key("Enter", "\r", 13)
    page.until("document.querySelector('#decide button:not(:disabled)')")
    tab_to(page, "#comment")
    page.type("read to its end")
    tab_to(page, "button[value=approve]")
    page.key("Enter", "\r", 13)
    page.until("document.querySelector('.state') && document.querySelector('.state').innerText === 'approved'")


def tab_to(page: Chromium, selector: str) -> None:
    """Press Tab until ``selector`` has the focus; each thing that gets it on the way shows that it has it."""
    for _ in range(80):
        page.key("Tab", "\t", 9)
        shown = page.run(
            "(e => { const s = getComputedStyle(e); return [e.tagName, s.outlineStyle, s.outlineWidth, "
            f"e.matches({json.dumps(selector)})]; }})(document.activeElement)"
        )
        if shown[0] != "BODY":
            assert (shown[1], shown[2]) != ("none", "0px"), shown
        if shown[3]:
            return
    raise AssertionError(f"{selector} is not reached: {page.run('document.body.innerHTML')[:2000]}")
