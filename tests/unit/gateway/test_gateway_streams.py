"""What may be open at ring 2 while a workspace stands, and what its listener is made of for that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saw.gateway.envoy_listeners import listeners
from saw.gateway.streams import Standing


def governed(standing: Standing | None) -> dict[str, Any]:
    text = listeners(
        "1", numbers=[1], credential_headers=(), xds_dir=Path("/x"), ingress_of=lambda _number: "192.0.2.1",
        send_sockets=[Path("/s")], streams={} if standing is None else {1: standing},
    )  # fmt: skip
    found = next(item for item in json.loads(text)["resources"] if item["name"] == "ring2-1")
    return dict(found["filter_chains"][0]["filters"][0]["typed_config"])


def lasting(manager: dict[str, Any]) -> dict[str, str]:
    routes = manager["route_config"]["virtual_hosts"][0]["routes"]
    return {
        route["match"]["headers"][0]["string_match"]["exact"]: route["route"]["max_stream_duration"][
            "max_stream_duration"
        ]
        for route in routes
        if "max_stream_duration" in route.get("route", {})
    }


@pytest.mark.control("POL-05")
def test_what_goes_on_has_routes_of_its_own_which_end_it_and_only_while_the_workspace_stands() -> None:
    calls = {"tls-unread": "600s", "plain-unread": "600s"}
    assert lasting(governed(None)) == {}
    assert lasting(governed(Standing("a", websockets=False))) == calls
    both = {**calls, "tls-upgrade": "600s", "plain-upgrade": "600s"}
    assert lasting(governed(Standing("a", websockets=True))) == both
    assert lasting(governed(Standing("a", websockets=False, sessions=True))) == {**calls, "postgres": "600s"}


@pytest.mark.control("POL-05")
def test_the_listener_changes_with_what_open_calls_rest_on_and_takes_websockets_only_where_policy_has_them() -> None:
    first, other = governed(Standing("a", websockets=False)), governed(Standing("b", websockets=False))
    assert first != other
    assert first == governed(Standing("a", websockets=False))
    for standing, expected in (
        (None, False),
        (Standing("a", websockets=False), False),
        (Standing("a", websockets=True), True),
    ):
        manager = governed(standing)
        assert ("upgrade_configs" in manager, "allow_connect" in manager["http2_protocol_options"]) == (
            expected,
            expected,
        )


@pytest.mark.control("POL-05")
def test_sessions_are_taken_only_where_policy_has_them_and_pass_the_gatekeeper_unread() -> None:
    for standing, expected in (
        (Standing("a", websockets=False), []),
        (Standing("a", websockets=True), ["websocket"]),
        (Standing("a", websockets=False, sessions=True), ["postgres"]),
        (Standing("a", websockets=True, sessions=True), ["websocket", "postgres"]),
    ):
        manager = governed(standing)
        assert [one["upgrade_type"] for one in manager.get("upgrade_configs", [])] == expected
        assert ("allow_connect" in manager["http2_protocol_options"]) == bool(expected)
    [upgrade] = governed(Standing("a", websockets=False, sessions=True))["upgrade_configs"]
    asked, routed = upgrade["filters"]
    assert asked["name"] == "envoy.filters.http.ext_authz" and "with_request_body" not in asked["typed_config"]
    assert asked["typed_config"]["failure_mode_allow"] is False
    assert routed["name"] == "envoy.filters.http.router"
    assert governed(Standing("a", websockets=False, sessions=True)) != governed(
        Standing("b", websockets=False, sessions=True)
    )
