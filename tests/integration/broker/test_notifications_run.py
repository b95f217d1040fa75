"""A running broker tells people: nothing is lost when it is killed, and operators see, test and try again what it tells."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from broker_rig import Lab, cli_here, running_broker
from notify_rig import PASSWORD, Hooks, Mails

from saw.broker.client import BrokerRefusal
from saw.broker.gate_settings import GateSettings

pytestmark = pytest.mark.control("REV-01")

GATES = {"update": GateSettings(group="maintainers", quorum=2)}
STATEMENT = {
    "gate": "update", "purpose": "kernel of November", "requested_by": "ada@example.com", "total": 1,
    "hosts": [{"name": "ws-1"}], "files": [{"path": "update.yml", "kind": "file", "sha256": "1" * 64}],
}  # fmt: skip


@pytest.fixture
def hooks(tmp_path: Path) -> Iterator[Hooks]:
    found = Hooks(tmp_path / "hooks")
    found.start()
    yield found
    found.stop()


@pytest.fixture
def mails(tmp_path: Path) -> Iterator[Mails]:
    found = Mails(tmp_path / "mails", login=True)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def run(lab: Lab, *arguments: str) -> Any:
        context = tmp_path / "context.json"
        context.write_text(json.dumps({"broker": {"socket": lab.config.operator_socket, "ssh": None}}))
        monkeypatch.setenv("SAW_CONTEXT", str(context))
        return cli_here(*arguments)

    return run


def kill_9(lab: Lab) -> None:
    assert lab.process is not None
    lab.process.kill()
    lab.process.wait(60)


def listed(lab: Lab) -> list[dict[str, Any]]:
    return list(lab.operator.request("GET", "/v1/notifications")["notifications"])


def ended(lab: Lab, identifier: str) -> dict[str, Any]:
    """Return a message once its attempt has ended."""
    for _ in range(3):
        found = lab.operator.request("GET", f"/v1/notifications/{identifier}?wait=25")
        if found["state"] == "delivered":
            return dict(found)
    raise AssertionError(f"{found}")


def test_a_question_is_told_at_once_by_webhook_and_mail(hooks: Hooks, mails: Mails, saw: Callable[..., Any]) -> None:
    channels = (hooks.channel(), mails.channel(to={"maintainers": ("ben@example.com",)}))
    with running_broker(gates=GATES, notifications=channels) as lab:
        asked = lab.operator.request("POST", "/v1/gates", {"statement": STATEMENT})
        [got] = hooks.wait(1)
        assert got.verified()
        assert (got.said["data"]["review"], got.said["data"]["quorum"]) == (asked["id"], 2)
        for one in listed(lab):
            ended(lab, one["id"])
        [letter] = mails.letters()
        assert (letter["to"], letter["subject"]) == (
            "ben@example.com", "A change to the fleet (update) waits for maintainers",
        )  # fmt: skip
        assert f"saw review show {asked['id']}" in letter.get_payload(decode=True).decode()
        shown = saw(lab, "notify", "list")
        assert shown.stdout.count("delivered") == 2, shown.stdout + shown.stderr
        assert "ben@example.com" in shown.stdout
        told = lab.events()
        assert [one["event"]["api"]["operation"] for one in told if "notification" in str(one["event"].get("api"))] == [
            "notification.deliver"
        ] * 2
        assert PASSWORD not in lab.log() + json.dumps(told)


def test_what_was_not_told_before_a_kill_9_is_told_after_it(hooks: Hooks) -> None:
    hooks.stop()
    with running_broker(notifications=(hooks.channel(),)) as lab:
        lab.workspace("ws-lost")
        lab.operator.request("POST", "/v1/workspaces/ws-lost/kill", {"reason": "test"})
        [waiting] = listed(lab)
        kill_9(lab)
        hooks.start()
        assert hooks.got == []
        lab.start()
        [got] = hooks.wait(1)
        assert (got.id, got.said["data"]["workspace"]) == (waiting["id"], "ws-lost")
        assert ended(lab, got.id)["state"] == "delivered"


def test_a_broker_that_is_killed_while_it_tells_tells_again_with_the_same_id(hooks: Hooks) -> None:
    hooks.hold = threading.Event()
    with running_broker(notifications=(hooks.channel(),)) as lab:
        lab.workspace("ws-twice")
        lab.operator.request("POST", "/v1/workspaces/ws-twice/kill", {"reason": "test"})
        hooks.wait(1)
        assert [one["state"] for one in listed(lab)] == ["sending"]
        kill_9(lab)
        hooks.hold.set()
        hooks.hold = None
        lab.start()
        first, again = hooks.wait(2)
        assert (first.id, first.body) == (again.id, again.body)
        assert ended(lab, first.id)["attempts"] == 2
        assert len(hooks.got) == 2


def test_a_broker_stops_while_a_receiver_keeps_it_waiting(hooks: Hooks) -> None:
    hooks.hold = threading.Event()
    with running_broker(notifications=(hooks.channel(),)) as lab:
        lab.workspace("ws-slow")
        lab.operator.request("POST", "/v1/workspaces/ws-slow/kill", {"reason": "test"})
        hooks.wait(1)
        lab.stop()  # within its bound
        hooks.hold.set()


def test_operators_test_a_channel_and_try_again(hooks: Hooks, mails: Mails, saw: Callable[..., Any]) -> None:
    away = Hooks(hooks.folder / "away")
    away.start()
    away.stop()
    channels = (hooks.channel(), mails.channel(), away.channel("away"))
    with running_broker(notifications=channels) as lab:
        for channel in ("chat", "mail"):
            done = saw(lab, "notify", "test", channel)
            assert (done.returncode, "delivered" in done.stdout) == (0, True), done.stderr
        assert [one.said["type"] for one in hooks.got] == ["test"]
        assert mails.letters()[0]["subject"] == "A test of the channel mail"
        failed = saw(lab, "notify", "test", "away", "--json")
        error = json.loads(failed.stdout)["error"]
        assert (failed.returncode, error["code"], error["details"]["reason"]) == (1, "not_delivered", "unreachable")
        waiting = json.loads(saw(lab, "notify", "list", "--channel", "away", "--json").stdout)["notifications"]
        assert [one["id"] for one in waiting] == [error["details"]["id"]]
        away.start()
        try:
            again = saw(lab, "notify", "retry", waiting[0]["id"])
            assert again.returncode == 0, again.stderr
            away.wait(1)
            assert ended(lab, waiting[0]["id"])["state"] == "delivered"
        finally:
            away.stop()
        refused = saw(lab, "notify", "retry", waiting[0]["id"], "--json")
        assert (refused.returncode, json.loads(refused.stdout)["error"]["code"]) == (1, "delivered")
        unknown = saw(lab, "notify", "test", "nowhere", "--json")
        assert json.loads(unknown.stdout)["error"]["code"] == "unknown_channel"
        queued = json.loads(saw(lab, "notify", "test", "chat", "--no-wait", "--json").stdout)
        assert queued["notifications"][0]["state"] == "waiting"
        shown = saw(lab, "notify", "list", "--channels").stdout
        assert [line.split()[:2] for line in shown.splitlines()[1:]] == [
            ["chat", "webhook"], ["mail", "email"], ["away", "webhook"],
        ]  # fmt: skip
        assert os.fspath(hooks.secret) not in shown
        with pytest.raises(BrokerRefusal, match="colour"):
            lab.operator.request("GET", "/v1/notifications?colour=red")
