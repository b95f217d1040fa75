"""``saw sponsor`` at a real broker, and who hears it when somebody is disabled."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from broker_rig import Lab, cli

from saw.broker.sponsor_views import ChangedSponsor, Sponsor, SponsorPage
from saw.gateway.state import parse_state

pytestmark = pytest.mark.control("ID-04")


def saw(broker: Lab, *arguments: str) -> Any:
    return json.loads(cli(broker, "sponsor", *arguments, "--json").stdout)


@pytest.mark.control("LIF-02")
def test_somebody_who_left_is_disabled_from_the_command_line_and_perimeters_hear_it(broker: Lab) -> None:
    broker.workspace("cmd-leaver", sponsor="Kim@example.com")
    shown = saw(broker, "show", "kim@example.com")
    assert (shown["state"], shown["workspaces"]) == ("active", {"requested": ["cmd-leaver"]})
    done = saw(broker, "disable", "kim@example.com", "--reason", "left")
    assert (done["changed"], done["quarantined"]) == (True, ["cmd-leaver"])
    with broker.tls("perimeter", "edge") as client:
        state = parse_state(client.get("/v1/perimeter/state?after=0&wait=0").content)
    assert next(entry.state for entry in state.workspaces if entry.id == "cmd-leaver") == "quarantined"
    assert [one["name"] for one in saw(broker, "list", "--state", "disabled", "--text", "kim")["sponsors"]] == [
        "kim@example.com"
    ]
    text = cli(broker, "sponsor", "list", "--text", "kim").stdout.splitlines()
    assert text[0].split() == ["NAME", "STATE", "WORKSPACES", "AGENTS", "CHANGED_AT", "CHANGED_BY", "REASON"]
    assert text[1].startswith("kim@example.com  disabled  1 quarantined")
    refused = cli(broker, "sponsor", "disable", "kimm@example.com", "--reason", "left")
    assert (refused.returncode, "names 'kimm@example.com' as its sponsor" in refused.stderr) == (1, True)
    back = saw(broker, "enable", "kim@example.com", "--reason", "came back")
    assert (back["state"], back["workspaces"]) == ("active", {"quarantined": ["cmd-leaver"]})


def test_answers_are_of_the_types_that_are_told(broker: Lab) -> None:
    broker.workspace("cmd-typed", sponsor="lou@example.com")
    for method, path, kind in (
        ("GET", "/v1/sponsors/lou@example.com", Sponsor),
        ("GET", "/v1/sponsors?text=lou", SponsorPage),
        ("POST", "/v1/sponsors/lou@example.com/disable", ChangedSponsor),
        ("POST", "/v1/sponsors/lou@example.com/enable", ChangedSponsor),
    ):
        body = {"reason": "typed"} if method == "POST" else None
        msgspec.convert(broker.operator.request(method, path, body), kind, strict=True)
