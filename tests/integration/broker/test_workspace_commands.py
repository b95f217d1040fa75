"""``saw workspace`` with keys and versions at a real broker, and bodies as programs send them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from broker_rig import Lab, cli_here

from saw.broker.client import BrokerRefusal
from saw.broker.workspace_views import ChangedWorkspace, Workspace, WorkspaceChanges, WorkspacePage

pytestmark = pytest.mark.control("LIF-01")
PROFILE = ("--sponsor", "ada@example.com", "--blueprint", "coding", "--ring", "canary", "--image", "workspace")


@pytest.fixture
def saw(broker: Lab, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``saw workspace`` in this process; a refusal has exit code 1."""
    broker.register_image()
    context = tmp_path / "context.json"
    context.write_text(json.dumps({"broker": {"socket": broker.config.operator_socket}}))
    monkeypatch.setenv("SAW_CONTEXT", str(context))

    def run(*arguments: str) -> Any:
        done = cli_here("workspace", *arguments, "--json")
        assert done.returncode in {0, 1}
        return json.loads(done.stdout)

    return run


def test_keys_and_versions_from_the_command_line(saw: Any) -> None:
    made = saw("create", "cmd-ws", *PROFILE, "--key", "cmd-create-1")
    again = saw("create", "cmd-ws", *PROFILE, "--key", "cmd-create-1")
    assert (made["changed"], again["changed"]) == (True, False)
    assert {**again, "changed": True} == made
    other = saw("create", "cmd-ws-2", *PROFILE, "--key", "cmd-create-1")
    assert other["error"]["code"] == "idempotency_mismatch"
    assert saw("transition", "cmd-ws", "provisioning", "--reason", "made", "--version", "1")["version"] == 2
    for stale in (
        ("start", "cmd-ws", "--version", "1"),
        ("stop", "cmd-ws", "--version", "1"),
        ("decommission", "cmd-ws", "--version", "1"),
        ("transition", "cmd-ws", "attesting", "--reason", "x", "--version", "1"),
    ):
        error = saw(*stale)["error"]
        assert (error["code"], error["details"]) == ("version_conflict", {"version": 2})
    assert saw("stop", "cmd-ws", "--version", "2", "--key", "cmd-stop-1")["version"] == 3
    assert saw("start", "cmd-ws")["version"] == 4
    told = saw("stop", "cmd-ws", "--version", "2", "--key", "cmd-stop-1")
    assert (told["state"], told["changed"]) == ("attesting", False)
    assert saw("kill", "cmd-ws", "--reason", "drill", "--key", "cmd-kill-1")["state"] == "quarantined"
    assert saw("transition", "cmd-ws", "stopped", "--reason", "released", "--version", "5")["version"] == 6
    assert saw("kill", "cmd-ws", "--reason", "drill", "--key", "cmd-kill-1")["state"] == "stopped"
    assert saw("reprovision", "cmd-ws", "--image", "workspace", "--key", "cmd-image-1")["changed"] is False
    assert saw("show", "cmd-ws")["version"] == 6
    assert next(one for one in saw("list")["workspaces"] if one["id"] == "cmd-ws")["version"] == 6


def test_answers_are_as_programs_are_told_and_other_fields_are_refused(broker: Lab) -> None:
    def answer(kind: Any, *call: Any) -> Any:
        return msgspec.convert(broker.operator.request(*call), kind)

    broker.workspace("cmd-told")
    path = "/v1/workspaces/cmd-told"
    assert answer(Workspace, "GET", path).version == 1
    assert answer(WorkspacePage, "GET", "/v1/workspaces?text=cmd-told").workspaces[0].id == "cmd-told"
    step = {"to": "provisioning", "reason": "test"}
    assert answer(
        ChangedWorkspace, "POST", f"{path}/transition", {**step, "version": 1, "idempotency_key": "told-0001"}
    ).changed
    assert not answer(ChangedWorkspace, "POST", f"{path}/transition", step).changed
    assert answer(ChangedWorkspace, "POST", f"{path}/kill", {"reason": "drill"}).state == "quarantined"
    for call, body in (
        ("transition", {**step, "version": "1"}),
        ("transition", {**step, "if_match": 1}),
        ("kill", {"reason": "x", "version": 1}),
    ):
        with pytest.raises(BrokerRefusal) as caught:
            broker.operator.request("POST", f"{path}/{call}", body)
        assert (caught.value.code, caught.value.status) == ("malformed", 400)


def test_the_feed_waits_for_a_change_and_tells_it(broker: Lab, saw: Any) -> None:
    ask = broker.operator.request
    since = msgspec.convert(ask("GET", "/v1/workspaces?limit=1"), WorkspacePage).seq
    assert ask("GET", f"/v1/workspace-changes?after={since}") == {"workspaces": [], "next": since, "behind": ""}
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(ask, "GET", f"/v1/workspace-changes?after={since}&wait=30")
        saw("create", "cmd-feed", *PROFILE)
        found = msgspec.convert(waits.result(60), WorkspaceChanges)
    assert [one.id for one in found.workspaces] == ["cmd-feed"]
    again = ask("GET", f"/v1/workspace-changes?after={found.next}&behind={found.behind}")
    assert again == {"workspaces": [], "next": found.next, "behind": "cmd-feed"}


@pytest.mark.parametrize("query", ["after=x", "after=-1", "behind=" + "a" * 65])
def test_a_feed_that_is_asked_wrongly_is_refused(broker: Lab, query: str) -> None:
    with pytest.raises(BrokerRefusal) as refused:
        broker.operator.request("GET", f"/v1/workspace-changes?{query}")
    assert refused.value.code == "malformed"
