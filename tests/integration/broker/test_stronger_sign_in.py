"""Step-up with a real provider: a decision sends the person there, and nothing less than what is wanted comes back as enough."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from sso_rig import Authenticator, Browser, SsoLab, sso_lab

from saw.broker.step_up import StepUp, StepUpSettings

STEP_UP = StepUpSettings(reviews=StepUp(acr=("phr",), max_age_s=600), groups={"staff": StepUp(max_age_s=86_400)})


@pytest.fixture(scope="module")
def lab() -> Iterator[SsoLab]:
    with sso_lab(Path(tempfile.mkdtemp(prefix="saw-step-")), step_up=STEP_UP) as found:
        found.activate("ws-a", "ws-b")
        yield found


@pytest.fixture
def ben(lab: SsoLab) -> Iterator[tuple[Browser, Authenticator]]:
    """Somebody who signed in the plain way, with a passkey."""
    lab.provider.change("u-ben", reached="loa1")
    with lab.browser() as browser:
        key = Authenticator()
        browser.fresh("u-ben")
        assert browser.register(key).status_code == 200
        yield browser, key


def stepped_up(browser: Browser, review: str, person: str = "u-ben", decision: str = "approve") -> httpx.Response:
    """Follow the link of the page to the provider, sign in there, and come back."""
    link = f"/login?step_up={decision}&amp;to=/reviews/{review}"
    assert link in browser.get(f"/reviews/{review}").text
    browser.trail.clear()
    return browser.at_provider(browser.get(link.replace("&amp;", "&")), person)


def asked_of_provider(browser: Browser) -> dict[str, list[str]]:
    """What the broker's redirect told the provider."""
    return parse_qs(urlsplit(next(one for one in browser.trail if "acr_values" in one or "max_age" in one)).query)


def told(answer: httpx.Response) -> dict[str, Any]:
    return dict(answer.json())


@pytest.mark.control("REV-02")
def test_an_approval_takes_the_stronger_sign_in_and_comes_back_to_its_review(
    lab: SsoLab, ben: tuple[Browser, Authenticator]
) -> None:
    browser, key = ben
    review = lab.open_review()
    refused = browser.decide(review, key)
    assert (refused.status_code, told(refused)["code"]) == (403, "step_up_needed")
    lab.provider.change("u-ben", reached="phr")
    page = stepped_up(browser, review)
    asked = asked_of_provider(browser)
    assert (asked["acr_values"], asked["prompt"], asked["max_age"]) == (["phr"], ["login"], ["0"])
    assert str(page.url) == f"{lab.origin}/reviews/{review}"
    assert "step_up=" not in page.text
    assert told(browser.decide(review, key))["state"] == "approved"
    assert lab.audited(reviewer="ben@example.com", decision="approve", acr="phr")


@pytest.mark.control("REV-02")
@pytest.mark.parametrize("reached", ["loa1", "other", None])
def test_a_provider_that_says_less_lets_nobody_in_and_the_old_session_stays(
    lab: SsoLab, ben: tuple[Browser, Authenticator], reached: str | None
) -> None:
    browser, key = ben
    review = lab.open_review()
    before = browser.cookie("__Host-saw-session")
    lab.provider.change("u-ben", reached=reached)
    page = stepped_up(browser, review)
    assert page.status_code == 403
    assert "not as strong" in page.text
    assert browser.cookie("__Host-saw-session") == before
    assert told(browser.decide(review, key))["code"] == "step_up_needed"
    assert lab.show(review)["state"] == "pending"


@pytest.mark.control("REV-02")
def test_what_the_page_asked_for_before_is_refused_at_the_decision_too(
    lab: SsoLab, ben: tuple[Browser, Authenticator]
) -> None:
    browser, key = ben
    review = lab.open_review()
    lab.provider.change("u-ben", reached="phr")
    stepped_up(browser, review)
    asked = browser.request(review)
    assert asked.status_code == 200
    # The same browser signs in the plain way before it hands the decision in.
    lab.provider.change("u-ben", reached="loa1")
    browser.fresh("u-ben")
    given = browser.post(f"/reviews/{review}/decide", key.get(told(asked), lab.origin))
    assert (given.status_code, told(given)["code"]) == (403, "step_up_needed")
    assert lab.show(review)["state"] == "pending"
    assert lab.audited(reviewer="ben@example.com", reason="step_up_needed")


def test_a_denial_wants_no_more_than_before(lab: SsoLab, ben: tuple[Browser, Authenticator]) -> None:
    browser, key = ben
    assert told(browser.decide(lab.open_review(), key, "deny"))["state"] == "denied"


def test_the_provider_is_told_nothing_about_a_review_that_the_person_cannot_see(lab: SsoLab) -> None:
    review = lab.open_review(group="nobody")
    with lab.browser() as browser:
        browser.sign_in("u-dan")
        browser.trail.clear()
        for path in (f"/reviews/{review}", "/reviews/r-unknown", "/elsewhere", "//evil.example"):
            browser.get(f"/login?step_up=approve&to={path}")
        assert not [one for one in browser.trail if "acr_values" in one]
