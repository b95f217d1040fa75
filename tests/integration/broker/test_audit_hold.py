"""``saw audit hold`` at a running broker: added, listed, released; the audit socket has no such call."""

from __future__ import annotations

import json

import httpx
import pytest
from broker_rig import cli_here


@pytest.mark.control("AUD-01")
def test_holds_are_added_listed_and_released(broker, tmp_path, monkeypatch) -> None:
    context = tmp_path / "context.json"
    context.write_text(json.dumps({"broker": {"socket": broker.config.operator_socket, "ssh": None}}))
    monkeypatch.setenv("SAW_CONTEXT", str(context))
    broker.workspace("ws-held")
    made = cli_here("audit", "hold", "add", "--workspace", "ws-held", "--reason", "case 7")
    assert made.returncode == 0, made.stderr
    hold = made.stdout.split()[0]
    again = cli_here("audit", "hold", "add", "--workspace", "ws-held", "--reason", "case 7", "--json")
    assert (json.loads(again.stdout)["id"], json.loads(again.stdout)["changed"]) == (hold, False)
    time = ("--from", "2026-11-01", "--to", "2026-12-01T00:00:00Z", "--reason", "case 8")
    other = json.loads(cli_here("audit", "hold", "add", *time, "--json").stdout)
    assert (other["since"], other["until"]) == ("2026-11-01T00:00:00.000Z", "2026-12-01T00:00:00.000Z")
    listed = cli_here("audit", "hold", "list").stdout
    assert hold in listed
    assert other["id"] in listed
    for identifier in (hold, other["id"]):
        done = cli_here("audit", "hold", "release", identifier, "--reason", "closed")
        assert done.stdout == f"{identifier} is released\n"
    assert hold not in cli_here("audit", "hold", "list").stdout
    everything = json.loads(cli_here("audit", "hold", "list", "--all", "--json").stdout)["holds"]
    assert {"closed"} == {one["released_reason"] for one in everything if one["id"] in {hold, other["id"]}}
    for wrong, code in (
        (("add", "--reason", "x"), "hold_malformed"),
        (("add", "--workspace", "ws-nobody", "--reason", "x"), "unknown_workspace"),
        (("release", "hold-none", "--reason", "x"), "unknown_hold"),
    ):
        done = cli_here("audit", "hold", *wrong, "--json")
        assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (1, code)
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=broker.config.audit_socket), base_url="http://broker"
    ) as reader:
        assert reader.get("/v1/audit/events").status_code == 200
        assert reader.post("/v1/holds", json={"workspace": "ws-held", "reason": "x"}).status_code == 404
