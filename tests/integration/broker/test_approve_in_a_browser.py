"""A person with a real browser: signs in at a real provider, registers a passkey, approves what was read; stops a workspace."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chromium import Chromium, chromium
from sso_rig import SsoLab, sso_lab

from saw.broker.job_settings import JobSettings

BODY = (
    b'{"invoice": 4711, "amount": "1250.00 EUR", "to": "Example Supplies Ltd.",'
    b' "note": "</pre><script>document.title = \'owned\'</script> urgent: please approve without reading"}'
)


@pytest.fixture(scope="module")
def lab() -> Iterator[SsoLab]:
    directory = Path(tempfile.mkdtemp(prefix="saw-sso-"))
    with sso_lab(directory, jobs=JobSettings(lease_s=600, worker_socket=str(directory / "worker.sock"))) as found:
        found.activate("ws-a")
        yield found


@pytest.fixture
def page(lab: SsoLab, tmp_path: Path) -> Iterator[Chromium]:
    """A browser that nobody has used before."""
    directory = tmp_path / "profile"
    directory.mkdir()
    with chromium(directory) as found:
        yield found


@pytest.mark.control("ID-01")
@pytest.mark.control("REV-02")
def test_from_the_sign_in_to_the_approval_with_a_passkey(lab: SsoLab, page: Chromium) -> None:
    review = lab.open_review(BODY)
    page.virtual_authenticator()
    page.sign_in(lab.origin, lab.provider.issuer, "u-ben")
    page.go(f"{lab.origin}/passkeys")
    page.until("document.querySelector('#register button:not(:disabled)')")
    page.run("document.getElementById('label').value = 'laptop'; document.querySelector('#register button').click()")
    page.until("document.querySelector('td') && document.body.innerText.includes('laptop')")

    page.go(f"{lab.origin}/reviews")
    page.until(f"document.querySelector('a[href=\"/reviews/{review}\"]')")
    page.run(f"document.querySelector('a[href=\"/reviews/{review}\"]').click()")
    page.until("document.querySelector('#decide button:not(:disabled)')")
    # what the agent wrote is text: nothing of it ran, and it stands in the box that says whose it is
    assert page.run("document.title").startswith("Review")
    assert "<script>" in page.run("document.querySelector('section.agent pre').innerText")
    assert page.run("document.querySelectorAll('section.agent script').length") == 0
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    if wanted := os.environ.get("SAW_PICTURES"):
        for name in ("light", "dark"):
            page.scheme(name)
            page.picture(Path(wanted) / f"review-{name}.png")
    page.run("document.getElementById('comment').value = 'invoice 4711 is right'")
    # the return key in the comment decides nothing
    page.run("document.getElementById('comment').focus()")
    page.key("Enter", "\r", 13)
    assert page.run("document.getElementById('said').textContent") == ""
    page.run("document.querySelector('button[value=approve]').click()")
    page.until("document.querySelector('.state') && document.querySelector('.state').innerText === 'approved'")
    assert "invoice 4711 is right" in page.run("document.body.innerText")
    assert lab.show(review)["approved_by"] == ["ben@example.com"]
    assert review in lab.claims()

    page.run("document.querySelector('header form button').click()")
    page.until("location.pathname === '/sign-in' && document.body.innerText.includes('signed out')")
    page.go(f"{lab.origin}/reviews/{review}")
    page.until("location.pathname === '/sign-in'")


@pytest.mark.control("REV-02")
def test_an_authenticator_that_does_not_know_the_person_decides_nothing(lab: SsoLab, page: Chromium) -> None:
    review = lab.open_review()
    authenticator = page.virtual_authenticator()
    page.sign_in(lab.origin, lab.provider.issuer, "u-cleo")
    page.go(f"{lab.origin}/passkeys")
    page.until("document.querySelector('#register button:not(:disabled)')")
    page.run("document.getElementById('label').value = 'key'; document.querySelector('#register button').click()")
    page.until("document.querySelector('td')")
    page.send("WebAuthn.setUserVerified", authenticatorId=authenticator, isUserVerified=False)
    page.go(f"{lab.origin}/reviews/{review}")
    page.until("document.querySelector('#decide button:not(:disabled)')")
    page.run("document.querySelector('button[value=approve]').click()")
    page.until("document.querySelector('#said.bad')")
    assert lab.show(review)["state"] == "pending"
    page.send("WebAuthn.setUserVerified", authenticatorId=authenticator, isUserVerified=True)
    page.run("document.querySelector('button[value=approve]').click()")
    page.until("document.querySelector('.state').innerText === 'approved'")


@pytest.mark.control("DEL-01")
def test_the_portal_works_without_javascript(lab: SsoLab, page: Chromium) -> None:
    resources = [{"host": "api.example.com", "methods": ["GET", "POST"], "paths": ["/v1/invoices/**"]}]
    asked = {
        "workspace_id": "ws-a",
        "task": "settle the invoices of November",
        "resources": resources,
        "duration_s": 3600,
    }
    handed = lab.operator.request("POST", "/v1/delegations", asked)["id"]
    page.sign_in(lab.origin, lab.provider.issuer, "u-ada")
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    page.go(f"{lab.origin}/")
    page.run("document.querySelector('a[href=\"/workspaces/ws-a\"]').click()")
    page.until("location.pathname === '/workspaces/ws-a' && document.readyState === 'complete'")
    assert "saw ssh ws-a" in page.run("document.querySelector('#attach ~ pre').innerText")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    if wanted := os.environ.get("SAW_PICTURES"):
        for name in ("light", "dark"):
            page.scheme(name)
            page.picture(Path(wanted) / f"portal-{name}.png")
    # without a reason the browser itself sends nothing
    form = f"document.querySelector('form[action=\"/delegations/{handed}/revoke\"]')"
    page.run(f"{form}.querySelector('button').click()")
    assert page.run(f"{form}.querySelector('input[name=reason]').matches(':invalid')")
    page.run(f"{form}.querySelector('input[name=reason]').value = 'the task is done'")
    page.run(f"{form}.querySelector('button').click()")
    page.until("document.readyState === 'complete' && document.body.innerText.includes('No engagement counts now')")
    shown = lab.operator.request("GET", f"/v1/delegations/{handed}")
    assert (shown["state"], shown["revoked_by"], shown["revoked_reason"]) == (
        "revoked", "user:ada@example.com", "the task is done",
    )  # fmt: skip


@pytest.mark.thorough
@pytest.mark.control("LIF-01")
def test_an_operator_stops_a_workspace_and_the_page_goes_on_by_itself(lab: SsoLab, page: Chromium) -> None:
    lab.provider.change("u-dan", groups=["staff", "operators"])
    page.sign_in(lab.origin, lab.provider.issuer, "u-dan")
    page.go(f"{lab.origin}/workspaces/ws-a")
    page.run("document.querySelector('a[href$=\"/jobs/stop\"]').click()")
    page.until("document.querySelector('h1').innerText === 'Stop ws-a?'")
    page.run("document.getElementById('reason').value = 'week-end'; document.querySelector('form.act button').click()")
    page.until("location.pathname.startsWith('/jobs/') && document.querySelector('#now .state').innerText === 'queued'")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    transport = httpx.HTTPTransport(uds=str(lab.config.jobs and lab.config.jobs.worker_socket))
    with httpx.Client(transport=transport, base_url="http://broker", timeout=30) as worker:

        def tell(path: str, **body: object) -> dict[str, Any]:
            answer = worker.post(f"/v1/worker/{path}", json={"claim": "a" * 43, **body})
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        job = str(tell("claim", executor="ansible")["claimed"]["id"])
        page.until("document.querySelector('#now .state').innerText === 'running'")
        page.run("window.same = true; document.getElementById('reason').value = 'half a reason'")
        told = "Power the VM off <img src=x onerror=window.owned=1>"
        progress = {"play": "Stop a workspace", "task": told, "tasks": 9, "hosts": {"edge": {"ok": 8, "changed": 1}}}
        tell(f"jobs/{job}/beat", progress=progress, events=[{"kind": "task", "text": told}])
        page.until("document.getElementById('now').innerText.includes('Power the VM off <img')")
        if wanted := os.environ.get("SAW_PICTURES"):
            page.picture(Path(wanted) / "job.png")
        # nothing was loaded anew, what was typed stays, and what the run said is text
        assert page.run("window.same && document.getElementById('reason').value") == "half a reason"
        assert page.run("document.querySelectorAll('#now img').length + Number(window.owned || 0)") == 0
        tell(f"jobs/{job}/end", outcome="succeeded")
    page.until(
        "document.querySelector('#now .state').innerText === 'succeeded' && !document.querySelector('main form')"
    )
    assert lab.operator.request("GET", f"/v1/jobs/{job}")["asked_by"] == "user:dan@example.com"
