"""Step-up: which sign-in a decision wants, and that nothing that lets something through gets by with less."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from review_world import OPERATOR, World, refused

from saw.broker.review_decisions import Decisions
from saw.broker.sso_settings import ProviderSettings, SsoSettings, problems_of
from saw.broker.step_up import StepUp, StepUpSettings

NOW = datetime(2026, 11, 30, 9, tzinfo=UTC)
STRONG = StepUp(acr=("phr", "phrh"), max_age_s=300)
SETTINGS = StepUpSettings(
    reviews=StepUp(max_age_s=3600), groups={"security": STRONG}, break_glass=StepUp(acr=("phrh",))
)  # fmt: skip


@pytest.mark.parametrize(
    ("decision", "group", "acr", "age_s", "words"),
    [
        ("approve", "maintainers", "", 3600, ""),
        ("approve", "maintainers", "", 3601, "more than 3600 seconds"),
        ("uphold", "maintainers", "", 3601, "more than 3600 seconds"),
        ("approve", "security", "phr", 300, ""),
        ("approve", "security", "phrh", 0, ""),
        ("approve", "security", "phr", 301, "more than 300 seconds"),
        ("approve", "security", "loa1", 0, "not as strong"),
        ("approve", "security", "", 0, "not as strong"),
        ("approve", "security", "phr phrh", 0, "not as strong"),
        ("approve", "security", "PHR", 0, "not as strong"),
        ("break_glass", "security", "phr", 0, "not as strong"),
        ("break_glass", "security", "phrh", 9999, ""),
        ("break_glass", "maintainers", "phrh", 9999, ""),
        ("deny", "security", "", 99_999, ""),
        ("reject", "security", "", 99_999, ""),
    ],
)
def test_the_nearest_part_counts_and_only_for_what_lets_something_through(
    decision: str, group: str, acr: str, age_s: int, words: str
) -> None:
    found = SETTINGS.refusal(decision, group, (acr, NOW - timedelta(seconds=age_s)), NOW)
    assert (found is None) == (words == "")
    if found is not None:
        assert words in found.message
        assert (found.code, bool(found.cure)) == ("step_up_needed", True)


@pytest.mark.parametrize("decision", ["approve", "uphold", "break_glass"])
def test_a_sign_in_whose_time_nobody_knows_is_too_old(decision: str) -> None:
    settings = StepUpSettings(reviews=StepUp(max_age_s=60))
    assert settings.refusal(decision, "g", ("", datetime.fromtimestamp(0, UTC)), NOW) is not None


def test_without_settings_every_sign_in_does() -> None:
    for signed_in in (None, ("", datetime.fromtimestamp(0, UTC))):
        assert StepUpSettings().refusal("approve", "security", signed_in, NOW) is None


def test_a_registered_key_has_no_sign_in() -> None:
    assert SETTINGS.refusal("approve", "security", None, NOW) is not None
    assert SETTINGS.refusal("deny", "security", None, NOW) is None
    allowed = msgspec.structs.replace(SETTINGS, registered_keys=True)
    assert allowed.refusal("approve", "security", None, NOW) is None


@pytest.mark.parametrize(
    ("step_up", "words"),
    [
        (StepUpSettings(reviews=StepUp()), "step_up.reviews must have acr or max_age_s"),
        (StepUpSettings(break_glass=StepUp(max_age_s=59)), "step_up.break_glass.max_age_s must be 60 to 86400"),
        (StepUpSettings(groups={"g": StepUp(max_age_s=86_401)}), "step_up.groups.g.max_age_s must be"),
        (StepUpSettings(groups={"g": StepUp(acr=("a b",))}), "step_up.groups.g.acr must list words"),
        (StepUpSettings(groups={"g": StepUp(acr=("",))}), "step_up.groups.g.acr must list words"),
        (SETTINGS, ""),
    ],
)
def test_settings_that_cannot_be_are_named(step_up: StepUpSettings, words: str) -> None:
    sso = SsoSettings(
        origin="https://saw.example.com", provider=ProviderSettings(issuer="https://i.example.com", client_id="saw"),
        roles={"user": ("staff",)}, step_up=step_up,
    )  # fmt: skip
    found = list(problems_of(sso))
    assert [words in problem for problem in found] == ([True] if words else [])


# --- Registered keys, through the broker --------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    found.reviewer("ben", "maintainers")
    yield found
    found.broker.close()


def with_step_up(world: World, **parts: Any) -> None:
    decisions: Decisions = world.broker.decisions
    decisions._step_up = StepUpSettings(**parts)


@pytest.mark.control("REV-02")
def test_an_approval_with_a_key_is_refused_where_a_sign_in_is_wanted_and_a_denial_is_not(world: World) -> None:
    with_step_up(world, reviews=StepUp(acr=("phr",)))
    asked = world.open().id
    with refused("step_up_needed", 403):
        world.decide(asked, "ben")
    said = world.broker.decisions.show(asked)
    assert (said["state"], said["decisions"]) == ("pending", [])
    assert world.decide(asked, "ben", "deny")["state"] == "denied"


@pytest.mark.control("REV-02")
def test_an_approval_with_a_key_is_taken_where_that_is_said_or_another_group_is_meant(world: World) -> None:
    for parts in ({"reviews": StepUp(acr=("phr",)), "registered_keys": True}, {"groups": {"security": STRONG}}, {}):
        with_step_up(world, **parts)
        assert world.decide(world.open(str(parts).encode()).id, "ben")["state"] == "approved"
    assert OPERATOR.principal
