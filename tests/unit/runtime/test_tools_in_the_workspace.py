"""Tools that were handed out, in the workspace: asked for and kept by the policy agent, held to by mediators."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest

from saw.errors import UnavailableError
from saw.policy.delegation import Tools
from saw.policy.handed_tools import Grant, HandedTools
from saw.policy.loader import load_governance
from saw.policy.mcp import decide_tool
from saw.runtime import policyd_broker
from saw.runtime.mcp_handed import HandedSource
from saw.runtime.mcp_mediator import GovernanceSource, Mediator
from saw.runtime.mcp_protocol import Session
from saw.runtime.policyd import Policyd
from saw.runtime.policyd_broker import BrokerUnreachable, PolicyBroker
from saw.runtime.policyd_config import PolicydConfig, Workspace
from saw.runtime.policyd_tools import ToolFile

pytestmark = [pytest.mark.control("DEL-01"), pytest.mark.control("RUN-05")]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
READ = HandedTools(
    bound=True,
    grants=(
        Grant(
            delegation="dlg-1",
            not_before=NOW,
            expires=NOW + timedelta(hours=1),
            tools=(Tools(server="files", tools=("read",)),),
        ),
    ),
)
FREE = HandedTools(bound=False)
GOVERNANCE = b"""
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team}
mcp:
  servers:
    files:
      transport: stdio
      command: [server]
      tools: {read: {class: auto}, write: {class: auto}, publish: {class: review}, erase: {class: deny}}
"""


class Place:
    """A workspace's folders; ``says`` is what the broker answers, None when it does not."""

    def __init__(self, folder: Path) -> None:
        self.config = PolicydConfig(run_dir=str(folder / "run"), state_dir=str(folder / "state"))
        self.laid = folder / "run/policy/tools.json"
        for path in (self.laid.parent, self.config.state):
            path.mkdir(parents=True)
        self.says: HandedTools | None = None
        self.asked = 0
        self.lines: list[str] = []
        self.file = ToolFile(self.config, self, self.lines.append)
        (folder / "governance.yaml").write_bytes(GOVERNANCE)
        self.at = NOW
        self.mediator = Mediator(
            "files", "", "", GovernanceSource(folder / "governance.yaml", "files", load_governance), decide_tool,
            frozenset(), handed=HandedSource(self.laid, lambda: self.at),
        )  # fmt: skip

    def handed_tools(self) -> HandedTools:
        self.asked += 1
        if self.says is None:
            raise UnavailableError("the broker does not answer", cure="wait")
        return self.says

    def hear(self, says: HandedTools | None, seq: int) -> None:
        self.says = says
        self.file.look(seq)

    def outcome(self, tool: str) -> str:
        decision = self.mediator.decide(tool, {})
        return decision.reason or decision.verdict


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_mediator_refuses_what_was_not_handed_out_and_lets_the_rest_to_policy(place: Place) -> None:
    place.hear(READ, 1)
    assert [place.outcome(tool) for tool in ("read", "write", "publish", "erase", "none")] == [
        "allow", "outside_delegation", "outside_delegation", "tool_not_allowed", "tool_not_allowed",
    ]  # fmt: skip
    place.hear(FREE, 2)
    assert [place.outcome(tool) for tool in ("read", "write", "publish")] == ["allow", "allow", "review_required"]


def test_what_was_handed_out_ends_by_itself(place: Place) -> None:
    place.hear(READ, 1)
    place.at = NOW + timedelta(hours=1)
    assert place.outcome("read") == "outside_delegation"


def test_what_is_not_known_or_cannot_be_read_refuses(place: Place) -> None:
    assert place.outcome("read") == "outside_delegation"
    place.hear(FREE, 1)
    assert place.outcome("read") == "allow"
    place.laid.write_text("{}")
    assert place.outcome("read") == "outside_delegation"
    place.laid.unlink()
    assert place.outcome("read") == "outside_delegation"


def test_a_mediator_that_was_not_told_where_to_look_holds_to_policy_alone(place: Place) -> None:
    place.mediator.handed = None
    assert place.outcome("write") == "allow"


def test_the_broker_is_asked_when_something_changed_and_until_it_has_answered(place: Place) -> None:
    place.hear(None, 1)
    place.hear(None, 1)
    assert (place.asked, len(place.lines), place.file.told) == (2, 1, False)
    place.hear(READ, 1)
    place.hear(READ, 1)
    assert (place.asked, place.file.told) == (3, True)
    place.hear(None, 2)
    assert place.outcome("read") == "allow", "what was told counts to its own end"
    place.hear(FREE, 2)
    assert (place.asked, place.outcome("write")) == (5, "allow")


def test_after_a_failure_the_broker_is_asked_again_soon(place: Place) -> None:
    waits: list[float] = []
    nothing = SimpleNamespace(report_calls=None, report_decisions=None, report_usage=None)
    nothing.watch = lambda after, wait: waits.append(wait) or after
    config = msgspec.structs.replace(place.config, poll_s=25.0)
    workspace = Workspace(
        workspace_id="ws-a", number=1, trust_domain="saw.example", broker_url="https://b", broker_name="b", ring2="r",
        ring2_name="r", ca_pem="", tuf_root={}, blueprint="coding", ring="stable",
    )  # fmt: skip
    agent = Policyd(
        config, workspace, nothing, nothing, nothing,  # type: ignore[arg-type]
        now=lambda: NOW, boottime=lambda: 0.0, log=place.lines.append,
    )  # fmt: skip
    agent._tools = place.file
    agent.stop()
    for says, seq in ((READ, 1), (None, 2), (None, 2), (FREE, 2), (None, 2)):
        place.hear(says, seq)
        agent._wait()
    assert waits == [25.0, 2.0, 2.0, 25.0, 25.0]


def test_what_was_told_is_there_after_a_reboot_and_is_private_where_it_is_kept(place: Place) -> None:
    place.hear(READ, 1)
    kept = place.config.state / "tools.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    place.laid.unlink()
    ToolFile(place.config, place, place.lines.append).restore()
    assert (place.outcome("read"), place.outcome("write")) == ("allow", "outside_delegation")
    place.laid.unlink()
    kept.write_text("broken")
    ToolFile(place.config, place, place.lines.append).restore()
    assert not place.laid.exists()
    assert "not known any more" in place.lines[-1]


def test_a_list_leaves_out_what_was_not_handed_out_and_learns_its_definition_all_the_same(place: Place) -> None:
    pinned = GOVERNANCE.replace(b"write: {class: auto}", b"write: {class: auto, definition: 'sha256:%s'}" % (b"0" * 64))
    governance = load_governance(pinned)
    handed = {"read"}
    session = Session(
        "files", lambda: governance.mcp.servers["files"], lambda tool, _: decide_tool(governance, "files", tool, {}),
        lambda _: None, shows=handed.__contains__,
    )  # fmt: skip

    def listed() -> list[str]:
        ask = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
        session.from_client(json.dumps(ask).encode())
        tools = [{"name": name, "inputSchema": {"type": "object"}} for name in ("read", "write", "publish", "erase")]
        said = {"jsonrpc": "2.0", "id": 1, "result": {"tools": tools}}
        (out,) = session.from_server(json.dumps(said).encode())
        return [tool["name"] for tool in json.loads(out.line)["result"]["tools"]]

    assert listed() == ["read"]
    handed.add("publish")
    assert listed() == ["read", "publish"]
    call = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "write", "arguments": {}}}
    (out,) = session.from_client(json.dumps(call).encode())
    assert json.loads(out.line)["error"]["data"]["reason"] == "definition_changed"


@pytest.mark.parametrize(
    ("status", "body", "found"),
    [
        (200, msgspec.json.encode(READ), READ),
        (404, b'{"code": "no_such_call"}', FREE),
        (404, b'{"code": "unknown_workspace"}', None),
        (404, b"gone", None),
        (403, b'{"code": "no_such_call"}', None),
        (200, b'{"bound": "no"}', None),
        (500, b"", None),
    ],
)
def test_what_the_broker_answers_is_taken_strictly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, body: bytes, found: HandedTools | None
) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(status, content=body)

    folders: list[Any] = []

    def client(_workspace: Workspace, _ca: Path, svid: Path | None, _timeout: float) -> httpx.Client:
        folders.append(svid)
        return httpx.Client(transport=httpx.MockTransport(answer), base_url="https://broker")

    monkeypatch.setattr(policyd_broker, "open_client", client)
    monkeypatch.setattr(policyd_broker, "PinnedFetcher", lambda *_, **__: None)
    workspace = Workspace(
        workspace_id="ws-a", number=1, trust_domain="saw.example", broker_url="https://10.0.0.1:8443",
        broker_name="broker", ring2="10.0.0.1:1", ring2_name="ring2", ca_pem="", tuf_root={}, blueprint="coding",
        ring="stable",
    )  # fmt: skip
    broker = PolicyBroker(workspace, tmp_path)
    if found is None:
        with pytest.raises(BrokerUnreachable):
            broker.handed_tools()
    else:
        assert broker.handed_tools() == found
    assert str(seen[0].url.raw_path, "ascii") == "/v1/workspace/tools?workspace_id=ws-a"
    assert folders[-1] == tmp_path / "svid", os.fspath(tmp_path)
