"""The pages as a person without a mouse, or with weak eyes, meets them: WCAG 2.2 AA by axe-core, and a decision by keys alone."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from chromium import Chromium, chromium
from sso_rig import SsoLab, sso_lab

from databases import beside
from saw.addressing import Band
from saw.broker.break_glass_settings import BreakGlassSettings
from saw.broker.clock import iso
from saw.broker.gate_settings import GateSettings, MachineSettings
from saw.broker.job_settings import JobSettings
from saw.broker.number_settings import NumberSettings
from saw.broker.sso.fleet_pages import PARTS
from saw.review.gate import BoundFile, BoundHost, GateStatement

AXE = Path(__file__).parents[2] / "pages/node_modules/axe-core/axe.min.js"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
MOST_PAGES = 60
_ID = re.compile(r"[0-9a-f]{8,}[0-9a-f-]*|[0-9A-HJKMNP-TV-Z]{26}|\d{4,}")


@pytest.fixture(scope="module")
def lab() -> Iterator[SsoLab]:
    directory = Path(tempfile.mkdtemp(prefix="saw-axe-"))
    with sso_lab(
        directory,
        jobs=JobSettings(lease_s=600, worker_socket=str(directory / "worker.sock")),
        gates={"update": GateSettings(group="maintainers")},
        machines={"awx": MachineSettings(scopes=("gate:update",))},
        break_glass=BreakGlassSettings(group="break-glass"),
        numbers=NumberSettings(places={"north": Band(300, 309)}),
    ) as found:
        found.activate("ws-a", "ws-b")
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
            "workspace": "ws-a",
            "parameters": {"reason": "week-end"},
            "idempotency_key": "accessible",
        }
        found.operator.request("POST", "/v1/jobs", asked)
        found.operator.request("POST", "/v1/holds", {"workspace": "ws-a", "reason": "case 7"})
        stated = GateStatement(
            gate="update", purpose="kernel of November", requested_by="ada", total=1, hosts=(BoundHost(name="ws-a"),),
            files=(BoundFile(path="update.yml", kind="file", sha256="1" * 64),),
        )  # fmt: skip
        found.operator.request("POST", "/v1/gates", {"statement": msgspec.to_builtins(stated)})
        break_glass_of(found, found.open_review())
        yield found


def break_glass_of(lab: SsoLab, review: str) -> None:
    """Leave what breaking the glass of a review leaves, and an event of a perimeter, for pages to show."""
    now, later = (iso(datetime.now(UTC) + timedelta(hours=hours)) for hours in (0, 24))
    with beside(lab.config) as store:
        store.execute(
            "UPDATE reviews SET broken_at = ?, broken_keys = 2, after_state = 'owed', after_due_at = ? WHERE id = ?",
            (now, later, review),
        )
        store.execute("INSERT INTO audit_heads (source, seq, hash) VALUES ('north', 3, ?)", ("1" * 64,))


@pytest.fixture
def page(lab: SsoLab, tmp_path: Path) -> Iterator[Chromium]:
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


def kind(path: str) -> str:
    """Return ``path`` without what names one thing: pages of a kind look alike."""
    return _ID.sub("ID", path.partition("?")[0])


def crawl(page: Chromium, origin: str) -> Iterator[str]:
    """Go to one page of each kind that links lead to, and yield its path."""
    waiting, seen = ["/"], {"/"}
    while waiting:
        path = waiting.pop(0)
        page.go(f"{origin}{path}")
        yield path
        links = page.run(
            "[...document.querySelectorAll('a[href]:not([href*=download])')].filter(a => a.origin === location.origin)"
            ".map(a => a.pathname + a.search)"
        )
        for link in links:
            if kind(link) not in seen:
                seen.add(kind(link))
                waiting.append(link)
        assert len(seen) <= MOST_PAGES, sorted(seen)


def test_every_page_is_accessible_in_light_and_dark(lab: SsoLab, page: Chromium) -> None:
    review = lab.open_review()
    found: dict[str, list[str]] = {}
    page.go(f"{lab.origin}/sign-in")
    found["/sign-in"] = violations(page)
    page.sign_in(lab.origin, lab.provider.issuer, "u-ada")
    paths = []
    for path in crawl(page, lab.origin):
        paths.append(kind(path))
        for scheme in ("light", "dark"):
            page.scheme(scheme)
            if told := violations(page):
                found[f"{path} ({scheme})"] = told
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), path
    for path, _, _ in PARTS:
        page.go(f"{lab.origin}{path}")
        assert page.run("document.querySelectorAll('tbody tr').length"), (
            f"{path} shows nothing, so nothing of it was tested"
        )
    for path in ("/fleet/images?q=none", "/fleet/people?q=none"):
        page.go(f"{lab.origin}{path}")
        found[path] = violations(page)
    page.go(f"{lab.origin}/reviews/none-such")
    found["an error"] = violations(page)
    assert {name: told for name, told in found.items() if told} == {}
    assert {
        "/",
        "/workspaces/ws-a",
        "/reviews",
        kind(f"/reviews/{review}"),
        "/agents",
        "/jobs",
        "/audit",
        *(path for path, _, _ in PARTS),
        "/jobs/job-ID",
        "/workspaces/ws-b/jobs/stop",
    } <= set(paths), " ".join(paths)


@pytest.mark.control("REV-02")
def test_a_review_is_read_and_approved_by_keys_alone(lab: SsoLab, page: Chromium) -> None:
    review = lab.open_review()
    page.virtual_authenticator()
    page.sign_in(lab.origin, lab.provider.issuer, "u-ben")
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
