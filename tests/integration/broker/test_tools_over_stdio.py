"""Tools over stdio that wait for people: mediators and the policy agent's desk as processes and threads, with a real broker.

The MCP server is a few lines that write down what reaches them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from broker_rig import NAME, Lab, cli, encode, running_broker

from databases import beside
from saw.broker.secret_place import load_authority, open_secrets
from saw.identity.x509 import new_key_and_csr
from saw.policy.keys import create_key
from saw.review.tool import ToolView, params_of
from saw.runtime.policyd_broker import PolicyBroker
from saw.runtime.policyd_config import PolicydConfig, Workspace
from saw.runtime.policyd_reviews import ReviewBroker
from saw.runtime.policyd_tools import ToolFile
from saw.runtime.review_desk import Claim, Question, ReviewDesk

GOVERNANCE = """\
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: maintainers}
lease: {ttl: 90s}
mcp:
  servers:
    files:
      transport: stdio
      command: [/usr/bin/files]
      tools:
        read: {class: auto, args: {path: {under: /workspace, required: true}}}
        publish: {class: review, args: {path: {under: /workspace, required: true}}}
"""
LONG_S = 120.0


class Server(socketserver.ThreadingUnixStreamServer):
    """The MCP server of every session; ``lines`` is what reached it."""

    daemon_threads = True

    def __init__(self, path: str) -> None:
        self.lines: list[bytes] = []
        super().__init__(path, _Session)


class _Session(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        for line in self.rfile:
            self.server.lines.append(line)
            message = json.loads(line)
            result = {"content": [{"type": "text", "text": f"made {len(self.server.lines)}"}]}
            answer = {"jsonrpc": "2.0", "id": message["id"], "result": result}
            self.wfile.write(json.dumps(answer).encode() + b"\n")


class Client:
    """One session of the agent with a mediator."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(LONG_S)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("rb")
        self.number = 0

    def ask(self, path: str = "/workspace/a", tool: str = "publish") -> None:
        self.number += 1
        params = {"name": tool, "arguments": {"path": path}}
        message = {"jsonrpc": "2.0", "id": self.number, "method": "tools/call", "params": params}
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        return dict(json.loads(self.lines.readline()))

    def call(self, path: str = "/workspace/a", tool: str = "publish") -> dict[str, Any]:
        self.ask(path, tool)
        return self.answer()

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


class Between:
    """The way from the desk to the broker; ``claimed`` is called when a claim was given and nobody has heard of it."""

    def __init__(self, broker: ReviewBroker) -> None:
        self.broker = broker
        self.claimed: Callable[[], None] = lambda: None

    def review(self, question: Question) -> ToolView:
        if hasattr(question, "wait_s"):
            # Whether a call is held for seconds or answered at once is not what is tested here.
            question = type(question)(id=question.id, wait_s=min(question.wait_s, 1))  # type: ignore[call-arg]
        found = self.broker.review(question)
        if isinstance(question, Claim):
            self.claimed()
        return found


class Place:
    """A workspace: its desk, the server, and mediators that are started here."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.digest, publication = lab.officers.publication(1, governance=GOVERNANCE)
        lab.workspace("ws-a", to="attesting")
        lab.operator.request("POST", "/v1/policy/publish", encode(publication))
        lease = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        self.write(
            "UPDATE workspaces SET state = 'active', lease_expires_at = ?, policy_digest = ?", lease, self.digest
        )
        (folder / self.digest).mkdir()
        (folder / self.digest / "governance.yaml").write_text(GOVERNANCE)
        (folder / "current").symlink_to(self.digest)
        (folder / "svid").mkdir()
        (folder / "ca.pem").write_bytes(lab.ca_file.read_bytes())
        self.identify()
        create_key(folder, "ben")
        done = cli(
            lab, "review", "reviewer", "add", "ben@example.com", "--group", "maintainers", "--key", f"{folder}/ben.pub"
        )
        assert done.returncode == 0, done.stderr
        workspace = Workspace(
            workspace_id="ws-a", number=1, trust_domain="saw.example", broker_url=f"https://127.0.0.1:{lab.port}",
            broker_name=NAME, ring2="127.0.0.1:1", ring2_name="ring2", ca_pem=lab.ca_file.read_text(), tuf_root={},
            blueprint="coding", ring="stable",
        )  # fmt: skip
        config = PolicydConfig(run_dir=str(folder), state_dir=str(folder / "state"))
        for name in ("policy", "state"):
            (folder / name).mkdir()
        self.policy_broker = PolicyBroker(workspace, folder)
        self.tools = ToolFile(config, self.policy_broker, print)
        self.hear()
        self.between = Between(ReviewBroker(workspace, folder))
        self.desk = ReviewDesk(folder / "desk.sock", os.getuid(), self.between, print)
        self.desk.start()
        self.server = Server(str(folder / "server.sock"))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.mediators: list[subprocess.Popen[bytes]] = []

    def write(self, text: str, *values: object) -> None:
        with beside(self.lab.config) as store:
            store.execute(text, values)

    def identify(self) -> None:
        """Hold the certificate that an attestation would have given."""
        authority = load_authority(self.lab.config, open_secrets(self.lab.config))
        key, csr = new_key_and_csr("ws-a")
        (self.folder / "svid" / "svid.pem").write_bytes(
            authority.issue_svid(csr, "ws-a", self.digest, datetime.now(UTC))
        )
        (self.folder / "svid" / "key.pem").write_bytes(key)

    def hear(self) -> None:
        """Ask which tools were handed out, as the policy agent does each time it goes round."""
        self.tools.look(self.policy_broker.offer().seq)

    def mediator(self, name: str = "one") -> Path:
        """Start a mediator and return its socket once it serves."""
        listen = self.folder / f"{name}.sock"
        listen.unlink(missing_ok=True)
        command = [sys.executable, "-m", "saw.cli.main", "mcp", "run", "files", "--listen", str(listen)]
        command += [
            "--governance",
            f"{self.folder}/current/governance.yaml",
            "--server-socket",
            f"{self.folder}/server.sock",
        ]
        command += ["--client-uid", str(os.getuid()), "--reviews", f"{self.folder}/desk.sock"]
        command += ["--handed", f"{self.folder}/policy/tools.json"]
        process = subprocess.Popen(command, stderr=(self.folder / f"{name}.log").open("ab"))
        self.mediators.append(process)
        until(lambda: listens(listen))
        return listen

    def approve(self, review: str) -> None:
        done = cli(self.lab, "review", "approve", review, "--key", f"{self.folder}/ben.key", "--yes")
        assert done.returncode == 0, done.stderr

    def review(self, identifier: str) -> dict[str, Any]:
        return self.lab.operator.request("GET", f"/v1/reviews/{identifier}")

    def calls(self) -> int:
        """How many calls of the tool reached the server."""
        return sum(json.loads(line)["params"]["name"] == "publish" for line in self.server.lines)

    def close(self) -> None:
        for process in self.mediators:
            process.kill()
            process.wait(60)
        self.policy_broker.close()
        self.desk.close()
        self.server.shutdown()
        self.server.server_close()


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listens(path: Path) -> bool:
    """Tell whether somebody takes connections: the file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def review_of(answer: dict[str, Any]) -> dict[str, Any]:
    return dict(answer["result"]["_meta"]["saw/review"])


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with running_broker() as lab:
        found = Place(lab, tmp_path)
        yield found
        found.close()


@pytest.mark.control("RUN-05")
@pytest.mark.control("REV-01")
@pytest.mark.control("REV-02")
@pytest.mark.control("REV-03")
def test_a_tool_is_called_once_with_the_bytes_that_a_person_approved(place: Place) -> None:
    agent = Client(place.mediator())
    assert "made" in json.dumps(agent.call(tool="read")["result"])
    waits = review_of(agent.call())
    assert waits["state"] == "pending"
    assert place.calls() == 0
    shown = cli(place.lab, "review", "show", waits["id"])
    assert "publish of the MCP server files" in shown.stdout
    assert '"path": "/workspace/a"' in shown.stdout
    assert "files/publish" in cli(place.lab, "review", "list", "--state", "pending").stdout
    place.approve(waits["id"])
    answer = agent.call()
    assert answer["result"] == {"content": [{"type": "text", "text": "made 2"}]}
    assert params_of("publish", {"path": "/workspace/a"}) in place.server.lines[-1]
    until(lambda: place.review(waits["id"])["state"] == "done")
    receipt = cli(place.lab, "review", "receipt", waits["id"], "--out", f"{place.folder}/receipt")
    assert receipt.returncode == 0, receipt.stderr
    checked = cli(place.lab, "review", "verify", f"{place.folder}/receipt", "--ca", str(place.lab.ca_file))
    assert "files/publish" in checked.stdout
    assert review_of(agent.call())["id"] != waits["id"], "the next one is another call"
    assert place.calls() == 1
    agent.close()


@pytest.mark.control("REV-03")
def test_a_mediator_that_is_killed_between_claim_and_writing_leaves_it_unknown_and_nothing_is_called(
    place: Place,
) -> None:
    agent = Client(place.mediator())
    waits = review_of(agent.call())
    place.approve(waits["id"])
    place.between.claimed = lambda: os.kill(place.mediators[0].pid, signal.SIGKILL)
    agent.ask()
    assert place.mediators[0].wait(LONG_S) == -signal.SIGKILL
    agent.close()
    place.between.claimed = lambda: None
    again = Client(place.mediator())
    assert review_of(again.call()) | {"expires_at": ""} == {"id": waits["id"], "state": "executing", "expires_at": ""}
    place.write("UPDATE reviews SET claim_ends_at = ? WHERE id = ?", "2026-01-01T00:00:00.000Z", waits["id"])
    answer = again.call()
    assert review_of(answer)["state"] == "unknown"
    assert "may have been made" in answer["result"]["content"][0]["text"]
    other = review_of(again.call())
    assert other["id"] != waits["id"]
    assert place.calls() == 0
    place.approve(other["id"])
    assert "result" in again.call()
    assert place.calls() == 1
    again.close()


@pytest.mark.control("REV-03")
def test_of_two_mediators_with_one_approval_one_calls(place: Place) -> None:
    agents = [Client(place.mediator(name)) for name in ("one", "two")]
    ids = {review_of(agent.call())["id"] for agent in agents}
    assert len(ids) == 1, "the same call is the same review"
    place.approve(ids.copy().pop())
    for agent in agents:
        agent.ask()
    texts = [agent.answer()["result"]["content"][0]["text"] for agent in agents]
    assert sorted(text.startswith("made") for text in texts) == [False, True]
    assert place.calls() == 1
    for agent in agents:
        agent.close()


@pytest.mark.thorough
@pytest.mark.control("RUN-05")
def test_without_broker_identity_or_policy_agent_nothing_is_called(place: Place) -> None:
    agent = Client(place.mediator())
    waits = review_of(agent.call())
    place.approve(waits["id"])
    svid = place.folder / "svid" / "svid.pem"
    kept = svid.read_bytes()
    svid.unlink()
    refused = agent.call()["error"]["data"]
    assert (refused["reason"], refused["next_steps"]) == (
        "review_required",
        ["call again later with the same arguments"],
    )
    svid.write_bytes(kept)
    place.desk.close()
    assert agent.call()["error"]["data"]["reason"] == "review_required"
    place.desk = ReviewDesk(place.folder / "desk.sock", os.getuid(), place.between, print)
    place.desk.start()
    place.lab.stop()
    assert agent.call()["error"]["data"]["reason"] == "review_required"
    assert "made" in json.dumps(agent.call(tool="read")["result"]), "what no person decides on goes on"
    assert place.calls() == 0
    agent.close()


@pytest.mark.control("DEL-01")
@pytest.mark.control("RUN-05")
def test_tools_that_no_delegation_names_are_refused_from_the_first_one_on_that_names_some(place: Place) -> None:
    agent = Client(place.mediator())

    def hand(*tools: str) -> str:
        asked = {"workspace_id": "ws-a", "task": "t", "resources": [{"host": "api.example.com"}], "duration_s": 3600}
        if tools:
            asked["tools"] = [{"server": "files", "tools": list(tools)}]
        given = place.lab.operator.request("POST", "/v1/delegations", asked)
        place.hear()
        return str(given["id"])

    def revoke(delegation: str) -> None:
        place.lab.operator.request("POST", f"/v1/delegations/{delegation}/revoke", {"reason": "done"})
        place.hear()

    plain = hand()
    assert "made" in json.dumps(agent.call(tool="read")["result"])
    revoke(plain)
    assert "made" in json.dumps(agent.call(tool="read")["result"]), "it named no tools"
    read = hand("read")
    assert "made" in json.dumps(agent.call(tool="read")["result"])
    refused = agent.call()["error"]["data"]
    assert (refused["reason"], refused["rule_missing"]) == (
        "outside_delegation",
        {"server": "files", "tool": "publish"},
    )
    both = hand("publish")
    waits = review_of(agent.call())
    assert place.review(waits["id"])["delegation"] == both
    place.approve(waits["id"])
    revoke(both)
    assert agent.call()["error"]["data"]["reason"] == "outside_delegation"
    assert place.calls() == 0
    revoke(read)
    assert agent.call(tool="read")["error"]["data"]["reason"] == "outside_delegation"
    plain = hand()
    assert "made" in json.dumps(agent.call(tool="read")["result"]), (
        "one that says nothing of tools leaves them to policy"
    )
    agent.close()


def test_a_denial_and_the_end_of_the_workspace_are_told_and_stop_the_call(place: Place) -> None:
    agent = Client(place.mediator())
    waits = review_of(agent.call())
    done = cli(place.lab, "review", "deny", waits["id"], "--key", f"{place.folder}/ben.key", "--comment", "no", "--yes")
    assert done.returncode == 0, done.stderr
    answer = agent.call()
    assert review_of(answer)["state"] == "denied"
    assert "denied this call" in answer["result"]["content"][0]["text"]
    other = review_of(agent.call("/workspace/b"))
    place.approve(other["id"])
    place.lab.operator.request("POST", "/v1/workspaces/ws-a/kill", {"reason": "test"})
    assert review_of(agent.call("/workspace/b"))["state"] == "cancelled"
    assert agent.call("/workspace/b")["error"]["data"]["error"] == "policy_denied"
    assert place.calls() == 0
    agent.close()
