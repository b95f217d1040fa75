"""OCSF 1.8: what the factory builds is valid, names who, where and under which policy; anything else is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saw.audit import EventFactory, EventInvalid, Subject, validate

NOW = datetime(2026, 11, 23, 7, 0, tzinfo=UTC)
WHO = Subject("operator:root", "agent-1", "ws-demo", "a" * 64, "req-1", "10.77.0.10")
COUNTER = itertools.count()
MAKE = EventFactory("saw-broker", host="control", new_uid=lambda: f"uid-{next(COUNTER)}")

BUILD: dict[int, Callable[[Subject], dict[str, Any]]] = {
    0: lambda who: MAKE.log(NOW, who, message="kernel: an error", severity="high"),
    2002: lambda who: MAKE.vulnerability_finding(
        NOW, who, kind="vulnerable", title="A package is vulnerable", vulnerabilities=[{
            "cve": {"uid": "CVE-2026-1"}, "is_fix_available": True,
            "affected_packages": [{"name": "openssl", "version": "1", "fixed_in_version": "2"}],
        }],
    ),
    2003: lambda who: MAKE.compliance_finding(
        NOW, who, kind="hold_expired", title="A hold ran out", control="a held package", standards=["P0-02"]
    ),
    2004: lambda who: MAKE.detection_finding(NOW, who, kind="chain_gap", title="A gap", description="2 to 3 are missing"),
    3001: lambda who: MAKE.account_change(NOW, who, "sponsor@example.com", activity="disable"),
    3002: lambda who: MAKE.authentication(
        NOW, who, activity="ticket", protocol="tpm2-quote", session_uid="ses-1", expires=NOW + timedelta(minutes=5)
    ),
    3004: lambda who: MAKE.entity_management(NOW, who, ("workspace", "ws-demo"), activity="suspend", comment="killed"),
    4002: lambda who: MAKE.http_activity(
        NOW, who, method="GET", scheme="https", host="git.example.com", port=443, path="/a/b?c=d", allowed=False, status_code=403,
        reason="host_not_allowed", rule="deny-1", duration_ms=3,
    ),
    6002: lambda who: MAKE.application_lifecycle(NOW, who, ("policy/coding", "7"), activity="install", detail={"ring": "stable"}),
    6003: lambda who: MAKE.api_activity(NOW, who, "workspace.kill", activity="update", resource=("workspace", "ws-demo")),
}  # fmt: skip


@pytest.mark.control("AUD-01")
@pytest.mark.parametrize("class_uid", sorted(BUILD))
def test_every_class_is_valid_and_names_principal_agent_workspace_policy_and_request(class_uid: int) -> None:
    event = BUILD[class_uid](WHO)
    validate(event)
    assert event["class_uid"] == class_uid
    assert event["type_uid"] // 100 == class_uid
    assert event["time"] == 1795417200000
    ours = {
        name: event["unmapped"]["saw"][name]
        for name in ("principal", "agent", "workspace", "policy_digest", "request_id")
    }
    assert ours == {
        "principal": "operator:root",
        "agent": "agent-1",
        "workspace": "ws-demo",
        "policy_digest": "a" * 64,
        "request_id": "req-1",
    }
    assert event["device"]["uid"] == "ws-demo"
    assert event["policy"]["uid"] == "a" * 64
    assert event["metadata"]["correlation_uid"] == "req-1"
    assert event["actor"]["user"]["uid"] == "operator:root"


@pytest.mark.parametrize("class_uid", sorted(BUILD))
def test_an_event_about_nobody_in_particular_is_valid_too(class_uid: int) -> None:
    event = BUILD[class_uid](Subject())
    validate(event)
    assert "device" not in event


@pytest.mark.parametrize("class_uid", sorted(BUILD))
@pytest.mark.parametrize("name", ["metadata", "time", "severity_id", "type_uid", "activity_id", "category_uid"])
def test_a_missing_required_attribute_is_refused(class_uid: int, name: str) -> None:
    event = BUILD[class_uid](WHO)
    del event[name]
    with pytest.raises(EventInvalid) as caught:
        validate(event)
    assert any(problem.startswith(f"{name} is required") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("colour",), "red", "colour is not an attribute here"),
        (("actor", "user", "shoe_size"), 43, "actor.user.shoe_size is not an attribute here"),
        (("time",), "yesterday", "time must be an integer"),
        (("time",), 2**53, "time must be an integer"),
        (("severity_id",), 7, "severity_id 7 is not one of its values"),
        (("activity_id",), 50, "activity_id 50 is not one of class 6003"),
        (("type_uid",), 600301, "type_uid is not"),
        (("category_uid",), 3, "category_uid of class 6003 is 6"),
        (("message",), "x" * 9000, "message is longer"),
        (("status_id",), 42, "status_id 42 is not one of class 6003"),
        (("metadata", "version"), "1.9.0", "metadata.version must be 1.8.0"),
        (("class_uid",), 1001, "class_uid 1001 is not one of"),
        (("is_alert",), 1, "is_alert must be true or false"),
        (("resources",), {}, "resources must be a list"),
        (("src_endpoint",), {"port": 1}, "src_endpoint.needs one of"),
    ],
)
def test_a_wrong_attribute_is_refused_and_named(path: tuple[str, ...], value: object, expected: str) -> None:
    event = BUILD[6003](WHO)
    place = event
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(EventInvalid) as caught:
        validate(event)
    assert any(problem.startswith(expected) for problem in caught.value.problems), caught.value.problems


def test_an_unknown_method_is_other_and_a_denied_call_is_blocked() -> None:
    event = MAKE.http_activity(
        NOW,
        WHO,
        method="BREW",
        scheme="https",
        host="a.example",
        port=443,
        path="/",
        allowed=False,
        reason="method_or_path_not_allowed",
    )
    assert (event["activity_id"], event["action_id"], event["disposition_id"]) == (99, 2, 2)
    assert event["status_detail"] == "method_or_path_not_allowed"


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12),
        st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()),
    )
)
def test_no_mapping_of_chance_passes_or_breaks_the_check(event: dict[str, Any]) -> None:
    with pytest.raises(EventInvalid):
        validate(event)


def test_a_time_without_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="zone"):
        MAKE.account_change(NOW.replace(tzinfo=None), WHO, "u", activity="create")


@pytest.mark.parametrize("name", ["class_uid", "activity_id", "category_uid", "severity_id", "status_id", "action_id"])
@pytest.mark.parametrize("value", [[], {}, [1], "1", None])
def test_a_number_that_is_none_is_a_problem_and_no_crash(name: str, value: object) -> None:
    with pytest.raises(EventInvalid, match=name):
        validate({**MAKE.log(NOW, WHO, message="m"), name: value})
