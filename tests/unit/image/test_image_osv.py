"""Which versions an advisory concerns: ranges, lists and severities of OSV records, by the rules of PyPI and of npm."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from saw.image.osv import Advisory, Component, match

VECTOR = "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:{0}/I:{0}/A:{0}"


def advisory(events: list[dict[str, str]] | None = None, ecosystem: str = "PyPI", **more: Any) -> Advisory:
    """An advisory on ``demo``: one range of ``events``; ``more`` goes into the record, ``affected`` into its package."""
    kind = "SEMVER" if ecosystem == "npm" else "ECOSYSTEM"
    ranges = [{"type": kind, "events": events}] if events is not None else []
    about = {"package": {"name": "demo", "ecosystem": ecosystem}, "ranges": ranges, **more.pop("affected", {})}
    record = {"id": "GHSA-1", "modified": "2026-11-29T00:00:00Z", "affected": [about], **more}
    return msgspec.convert(record, Advisory)


def told(version: str, about: Advisory, ecosystem: Any = "pypi") -> str | None:
    """The first fix, an empty text where there is none, and None where the version is not concerned."""
    found = match(Component(ecosystem, "demo", version), about)
    return None if found is None else found.fixed_in


ALL_UNTIL = [{"introduced": "0"}, {"fixed": "2.0"}]
TWO_LINES = [{"introduced": "0"}, {"fixed": "1.5"}, {"introduced": "2.0"}, {"fixed": "2.3"}]


@pytest.mark.control("IMG-01")
@pytest.mark.parametrize(
    ("version", "events", "fix"),
    [
        ("1.9", ALL_UNTIL, "2.0"),
        ("2.0", ALL_UNTIL, None),
        ("2.0rc1", ALL_UNTIL, "2.0"),
        ("2.0.dev1", ALL_UNTIL, "2.0"),
        ("2.0.post1", ALL_UNTIL, None),
        ("0.0.dev0", ALL_UNTIL, "2.0"),
        ("1!0.1", ALL_UNTIL, None),
        ("1.10", [{"introduced": "1.9"}, {"fixed": "1.11"}], "1.11"),
        ("1.4", TWO_LINES, "1.5"),
        ("1.5", TWO_LINES, None),
        ("2.0", TWO_LINES, "2.3"),
        ("2.3", TWO_LINES, None),
        ("2.1", list(reversed(TWO_LINES)), "2.3"),
        ("1.0", [{"introduced": "0"}, {"last_affected": "1.0"}], ""),
        ("1.0.1", [{"introduced": "0"}, {"last_affected": "1.0"}], None),
        ("1.0+cu118", [{"introduced": "0"}, {"last_affected": "1.0"}], ""),
        ("1.0+b2", [{"introduced": "0"}, {"last_affected": "1.0+b1"}], None),
        ("1.0", [{"introduced": "1.0"}, {"last_affected": "1.0"}], ""),
        ("1.1", [{"introduced": "1.0"}, {"last_affected": "1.0"}], None),
        ("1.0", [{"introduced": "0"}, {"fixed": "1.0"}, {"introduced": "1.0"}], ""),
        ("9.9", [{"introduced": "0"}], ""),
        ("1.0", [{"fixed": "0.5"}], None),
        ("9.9", [{"introduced": "0"}, {"fixed": "not a version"}], ""),
    ],
)
def test_ranges_of_python_packages(version: str, events: list[dict[str, str]], fix: str | None) -> None:
    assert told(version, advisory(events)) == fix


@pytest.mark.control("IMG-01")
@pytest.mark.parametrize(
    ("version", "events", "fix"),
    [
        ("1.9.9", [{"introduced": "0"}, {"fixed": "2.0.0"}], "2.0.0"),
        ("2.0.0", [{"introduced": "0"}, {"fixed": "2.0.0"}], None),
        ("2.0.0-rc.1", [{"introduced": "0"}, {"fixed": "2.0.0"}], "2.0.0"),
        ("2.0.0-rc.10", [{"introduced": "2.0.0-rc.2"}, {"fixed": "2.0.0"}], "2.0.0"),
        ("2.0.0-rc.1", [{"introduced": "2.0.0-rc.2"}, {"fixed": "2.0.0"}], None),
        ("2.0.0+build.7", [{"introduced": "0"}, {"fixed": "2.0.0"}], None),
        ("1.10.0", [{"introduced": "1.9.0"}, {"last_affected": "1.10.0"}], ""),
        ("1.10.1", [{"introduced": "1.9.0"}, {"last_affected": "1.10.0"}], None),
        ("1.2.3", [{"introduced": "1.0"}, {"fixed": "2"}], "2"),
        ("1.2.3", [{"introduced": "0"}, {"fixed": "~2"}], ""),
    ],
)
def test_ranges_of_npm_packages(version: str, events: list[dict[str, str]], fix: str | None) -> None:
    assert told(version, advisory(events, "npm"), "npm") == fix


numbers = st.lists(st.integers(0, 12), min_size=3, max_size=3)
dotted = numbers.map(lambda parts: ".".join(map(str, parts)))


@given(version=dotted, first=dotted, end=dotted, ecosystem=st.sampled_from(["PyPI", "npm"]), inclusive=st.booleans())
def test_a_range_is_what_lies_between_its_ends(
    version: str, first: str, end: str, ecosystem: str, inclusive: bool
) -> None:
    events = [{"introduced": first}, {"last_affected" if inclusive else "fixed": end}]
    found = told(version, advisory(events, ecosystem), ecosystem.lower())
    place, low, high = (tuple(map(int, text.split("."))) for text in (version, first, end))
    below = place <= high if inclusive else place < high
    # Without an order between its ends a range begins again at the later one.
    inside = (low <= place and below) if low <= high and (inclusive or low < high) else low <= place
    assert (found is not None) == inside
    assert not found or found == end


@given(version=dotted, points=st.lists(dotted, min_size=2, max_size=8, unique=True), seed=st.randoms())
def test_the_order_of_events_says_nothing(version: str, points: list[str], seed: Any) -> None:
    events = [{"introduced" if index % 2 == 0 else "fixed": point} for index, point in enumerate(points)]
    shuffled = list(events)
    seed.shuffle(shuffled)
    assert told(version, advisory(events)) == told(version, advisory(shuffled))


@given(version=dotted, fix=dotted)
def test_a_fix_is_later_than_what_it_fixes(version: str, fix: str) -> None:
    found = told(version, advisory([{"introduced": "0"}, {"fixed": fix}]))
    assert (found is None) == (Version(version) >= Version(fix))


@pytest.mark.parametrize(
    ("version", "listed", "found"),
    [("1.0", ["1.0.0"], True), ("1.0+local", ["1.0"], True), ("1.1", ["1.0"], False), ("1.0", ["old one"], False)],
)
def test_listed_versions_are_the_same_in_any_spelling(version: str, listed: list[str], found: bool) -> None:
    assert (told(version, advisory(affected={"versions": listed})) is not None) == found


COMMITS = {"type": "GIT", "repo": "https://example.org/r", "events": [{"introduced": "0"}]}


@pytest.mark.control("IMG-01")
@pytest.mark.parametrize(
    "affected",
    [
        {"ranges": [COMMITS]},
        {"ranges": [COMMITS], "versions": []},
        {"ranges": None, "versions": None},
        {"ranges": [{"type": "ECOSYSTEM", "events": []}]},
        {"ranges": [{"type": "OTHER", "events": [{"introduced": "9"}]}]},
    ],
    ids=["commits", "commits and an empty list", "nothing", "a range without an end", "an unheard range"],
)
def test_an_advisory_that_names_no_version_concerns_all_and_its_twin_the_named_ones(affected: dict[str, Any]) -> None:
    assert told("1.0", advisory(affected=affected)) == ""
    assert told("1.0", advisory(affected={**affected, "versions": ["1.0"]})) == ""
    assert told("1.1", advisory(affected={**affected, "versions": ["1.0"]})) is None
    named = [*(affected["ranges"] or ()), {"type": "ECOSYSTEM", "events": ALL_UNTIL}]
    assert told("1.0", advisory(affected={**affected, "ranges": named})) == "2.0"
    assert told("2.0", advisory(affected={**affected, "ranges": named})) is None


def test_a_withdrawn_advisory_says_nothing_and_its_twin_does() -> None:
    assert told("1.0", advisory(ALL_UNTIL)) == "2.0"
    assert told("1.0", advisory(ALL_UNTIL, withdrawn="2026-11-01T00:00:00Z")) is None


@pytest.mark.parametrize(
    ("package", "found"),
    [
        ({"name": "Demo", "ecosystem": "PyPI"}, True),
        ({"name": "demo", "ecosystem": "npm"}, False),
        ({"name": "demo2", "ecosystem": "PyPI"}, False),
        ({"name": "demo", "ecosystem": "Debian:13"}, False),
    ],
)
def test_only_the_same_package_of_the_same_ecosystem(package: dict[str, str], found: bool) -> None:
    assert (told("1.0", advisory(ALL_UNTIL, affected={"package": package})) is not None) == found


def test_names_of_npm_are_not_folded() -> None:
    about = advisory([{"introduced": "0"}], "npm", affected={"package": {"name": "Demo", "ecosystem": "npm"}})
    assert told("1.0.0", about, "npm") is None


@pytest.mark.parametrize(
    ("more", "urgency"),
    [
        ({"database_specific": {"severity": "CRITICAL"}}, "high"),
        ({"database_specific": {"severity": "MODERATE"}}, "medium"),
        ({"database_specific": {"severity": "LOW"}}, "low"),
        ({"severity": [{"type": "CVSS_V3", "score": VECTOR.format("H")}]}, "high"),
        ({"severity": [{"type": "CVSS_V3", "score": VECTOR.format("N")}]}, "unimportant"),
        ({"severity": [{"type": "CVSS_V3", "score": "CVSS:3.1/nonsense"}]}, "not-yet-assigned"),
        ({"severity": [{"type": "Ubuntu", "score": "high"}]}, "not-yet-assigned"),
        (
            {
                "database_specific": {"severity": "LOW"},
                "severity": [{"type": "CVSS_V3", "score": VECTOR.format("H")}],
            },
            "high",
        ),
        ({"id": "MAL-2026-1"}, "high"),
        ({"database_specific": None, "aliases": None}, "not-yet-assigned"),
    ],
)
def test_the_worst_of_what_is_said_counts(more: dict[str, Any], urgency: str) -> None:
    found = match(Component("pypi", "demo", "1.0"), advisory(ALL_UNTIL, **more))
    assert found is not None
    assert found.urgency == urgency
    assert found.advisory.modified == datetime(2026, 11, 29, tzinfo=UTC)


def test_a_version_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match="not a version"):
        told("not a version", advisory(ALL_UNTIL))
